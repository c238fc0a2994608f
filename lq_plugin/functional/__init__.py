"""Tensors in, tensors out, no state."""

from lq_plugin.functional.affine import bounds_from_qparams, dequantize, fake_quantize, qparams_from_bounds, quantize
from lq_plugin.functional.lsq import fake_quantize_learned
from lq_plugin.functional.pact import fake_quantize_pact

__all__ = [
    "bounds_from_qparams",
    "dequantize",
    "fake_quantize",
    "fake_quantize_learned",
    "fake_quantize_pact",
    "qparams_from_bounds",
    "quantize",
]
