"""Files of a quantized model, as small and as fast as its bits say, and checks that they compute the same."""

from typing import TYPE_CHECKING

from lq_plugin.export import targets as targets  # registers them
from lq_plugin.utilities.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.export.certificate import Certificate as Certificate, certify as certify
    from lq_plugin.export.onnx_file import export_onnx as export_onnx
    from lq_plugin.export.openvino import OpenVINOSession as OpenVINOSession
    from lq_plugin.export.packed import load_packed as load_packed, save_packed as save_packed
    from lq_plugin.export.request import Option as Option, Request as Request
    from lq_plugin.export.runtime import onnx_session as onnx_session
    from lq_plugin.export.target import (
        Reader as Reader,
        Target as Target,
        export_model as export_model,
        register_target as register_target,
    )
    from lq_plugin.export.torchao import use_torchao as use_torchao
    from lq_plugin.export.verify import Verification as Verification, verify as verify
    from lq_plugin.export.xnor import use_xnor as use_xnor, xnor_layer as xnor_layer

# Loaded on first use: commands ask the targets before torch and onnx are imported.
__getattr__, __dir__, __all__ = attributes(__name__, __file__)
