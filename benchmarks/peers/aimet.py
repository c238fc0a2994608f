"""AdaRound of AIMET, in its own recipe.

`prepare_model`, batch norms folded, `Adaround` with its default loss (learning rate 0.001 and batches of 32 are fixed
in it), then activation ranges over the same images. Scheme `tf_enhanced` and the default configuration per channel:
weights symmetric, activations affine, quantized at the outputs of operators (not of the mean before the last layer);
biases float.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.peers.request import Request


def _import_torchvision() -> None:
    """Import torchvision where its compiled operators do not load.

    Package indexes offer builds for CUDA, whose operators need CUDA's libraries. AIMET names a few for its export and
    calls none here; that they are declared is enough for the import.
    """
    try:
        import torchvision  # type: ignore[import-not-found]
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
        import torchvision  # noqa: F401


#: Keeps the declarations alive: a library that is collected takes them along.
_DECLARED: list[torch.library.Library] = []
_import_torchvision()

from aimet_torch import QuantizationSimModel  # type: ignore[import-not-found]  # noqa: E402
from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters  # type: ignore[import-not-found]  # noqa: E402
from aimet_torch.batch_norm_fold import fold_all_batch_norms  # type: ignore[import-not-found]  # noqa: E402
from aimet_torch.common import quantsim_config  # type: ignore[import-not-found]  # noqa: E402
from aimet_torch.common.defs import QuantScheme  # type: ignore[import-not-found]  # noqa: E402
from aimet_torch.model_preparer import prepare_model  # type: ignore[import-not-found]  # noqa: E402

PACKAGES = ("aimet-torch",)
CONFIGURATION = Path(quantsim_config.__file__).with_name("default_config_per_channel.json")
SCHEME = QuantScheme.post_training_tf_enhanced


def quantize(model: nn.Module, batches: list[Tensor], request: Request) -> nn.Module:
    """A quantized copy of a float model."""
    weight_bits, input_bits = request.bits
    result = prepare_model(model).eval()
    fold_all_batch_norms(result, input_shapes=tuple(batches[0].shape))
    parameters = AdaroundParameters(batches, len(batches), default_num_iterations=request.iterations)
    with tempfile.TemporaryDirectory() as folder:
        result = Adaround.apply_adaround(
            result,
            batches[0],
            parameters,
            path=folder,
            filename_prefix="weights",
            default_param_bw=weight_bits,
            default_quant_scheme=SCHEME,
            default_config_file=str(CONFIGURATION),
        )
        simulation = QuantizationSimModel(
            result,
            batches[0],
            quant_scheme=SCHEME,
            default_output_bw=input_bits,
            default_param_bw=weight_bits,
            config_file=str(CONFIGURATION),
        )
        simulation.set_and_freeze_param_encodings(str(Path(folder) / "weights.encodings"))
    simulation.compute_encodings(lambda quantized: [quantized(batch) for batch in batches])
    return simulation.model
