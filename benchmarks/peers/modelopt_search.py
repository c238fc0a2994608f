"""ModelOpt's AutoQuantize on ResNet-20: bits of each layer for a budget, from gradients and an integer program.

`python -m benchmarks.peers.modelopt_search DATA THREADS`, in its own environment.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.process import serve

BITS = (2, 3, 4, 5, 6, 7, 8)
#: Mean bits of a weight, scales not counted.
BUDGETS = tuple(round(2 + i / 20, 2) for i in range(61))
#: Train images that it calibrates with, those of `benchmarks.search`.
CALIBRATION = 1024


def make(folder: Path) -> dict[str, Callable[[], dict[str, int]]]:
    """Returns what answers each budget with the bits of each layer's weights; layers that stay float are left out.

    Args:
        folder: with the data.
    """
    import modelopt.torch.quantization as mtq  # type: ignore[import-not-found]
    from torch.nn import functional as F

    from lq_plugin.demo.cifar10 import load_images, normalize
    from lq_plugin.demo.resnet import load_resnet

    model = load_resnet(folder / "resnet_cifar10" / "resnet20_jpeg.safetensors", 20)
    images, labels = load_images(folder, "train", 0, CALIBRATION)
    batches = list(zip(normalize(images).split(128), labels.split(128), strict=True))
    inputs = {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}}
    weights = [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}} for bits in BITS]
    # Sensitivities are measured once; each budget is an integer program on them.
    _, state = mtq.auto_quantize(
        model,
        constraints={"effective_bits": 4.0},
        quantization_formats=[{"quant_cfg": [weight, inputs], "algorithm": "max"} for weight in weights],
        data_loader=batches,
        forward_step=lambda network, batch: network(batch[0]),
        loss_func=lambda output, batch: F.cross_entropy(output, batch[1]),
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
    )

    def solve(budget: float) -> dict[str, int]:
        config: dict[str, Any] = mtq.get_auto_quantize_config(state, {"effective_bits": budget})
        suffix = ".weight_quantizer"
        return {
            entry["quantizer_name"].removesuffix(suffix): entry["cfg"]["num_bits"]
            for entry in config["quant_cfg"]
            if entry["quantizer_name"].endswith(suffix) and entry["enable"]
        }

    return {str(budget): partial(solve, budget) for budget in BUDGETS}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(int(sys.argv[2]))
    serve(lambda: make(Path(sys.argv[1])))
