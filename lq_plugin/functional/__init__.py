"""Tensors in, tensors out, no state."""

from lq_plugin.functional.affine import (
    bounds_from_qparams as bounds_from_qparams,
    dequantize as dequantize,
    fake_quantize as fake_quantize,
    qparams_from_bounds as qparams_from_bounds,
    quantize as quantize,
)
from lq_plugin.functional.lsq import fake_quantize_learned as fake_quantize_learned
from lq_plugin.functional.pact import fake_quantize_pact as fake_quantize_pact
