"""Calibration of AIMET: weights int4 per channel, activations uint4, by two of its schemes.

Its configuration quantizes what layers give, not what they take; what a model computes outside of modules stays float.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

# Behind it AIMET can be imported.
from benchmarks.peers.aimet import CONFIGURATION, QuantizationSimModel, QuantScheme

SCHEMES = {
    "aimet min-max": QuantScheme.post_training_tf,
    "aimet sqnr": QuantScheme.post_training_tf_enhanced,
}


def calibration(model: nn.Module, batches: list[Tensor]) -> dict[str, Callable[[], None]]:
    """Making the quantized model is not timed; each run begins with fresh statistics."""
    return {name: partial(_run, _quantized(model, batches[0], scheme), batches) for name, scheme in SCHEMES.items()}


def _quantized(model: nn.Module, batch: Tensor, scheme: QuantScheme) -> QuantizationSimModel:
    options = {"default_output_bw": 4, "default_param_bw": 4, "config_file": str(CONFIGURATION)}
    return QuantizationSimModel(model, batch, quant_scheme=scheme, **options)


def _run(simulation: QuantizationSimModel, batches: list[Tensor]) -> None:
    def forward(quantized: nn.Module) -> None:
        for batch in batches:
            quantized(batch)

    simulation.compute_encodings(forward)
