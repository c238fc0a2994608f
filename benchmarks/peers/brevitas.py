"""Learned round of Brevitas, by the recipe of its own image classification example.

`brevitas_examples.imagenet_classification.ptq`, which its wheel ships: batch norms merged, layers quantized one by one
at their inputs, rectified sigmoid with the AdaRound loss, then bias correction; without its equalization. Where it
leaves a choice: weights symmetric per channel with the largest magnitude as range, inputs affine per tensor, biases
float, first and last layer at the width of the others, batches of 32. The example's annealing counts 1,000 iterations
whatever it is told; here it counts those that are run.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize  # type: ignore[import-not-found]
from brevitas_examples.common.learned_round.learned_round_args import (  # type: ignore[import-not-found]
    HandlerSpec,
    LossArgs,
    OptimizerArgs,
    TrainerConfig,
    TrainingArgs,
)
from brevitas_examples.common.learned_round.learned_round_method import LearnedRoundArgs  # type: ignore[import-not-found]
from brevitas_examples.common.learned_round.learned_round_trainer import (  # type: ignore[import-not-found]
    LearnedRoundTrainer,
    get_blocks,
)
from brevitas_examples.imagenet_classification.ptq.learned_round_utils import (  # type: ignore[import-not-found]
    CacheVision,
    is_layer,
    vision_block_forward,
    vision_forward,
)
from brevitas_examples.imagenet_classification.ptq.ptq_common import (  # type: ignore[import-not-found]
    apply_bias_correction,
    calibrate,
    create_quant_maps,
)
from torch import Tensor, nn

from benchmarks.peers.request import Request

PACKAGES = ("brevitas",)
#: The best on train images 10,000 to 12,000 at W2A8 and 200 iterations, of 0.001 (its default), 0.01 and 0.03 with
#: ranges "mse", and of 0.01 and 0.03 with "stats" (its default).
LEARNING_RATE = 0.03
WEIGHT_RANGE = "stats"
BATCH_SIZE = 32


def quantize(model: nn.Module, batches: list[Tensor], request: Request) -> nn.Module:
    """A quantized copy of a float model."""
    weight_bits, input_bits = request.bits
    # It reads pairs of images and labels, and does not look at the labels.
    loader = [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in batches]
    result = preprocess_for_quantize(copy.deepcopy(model), equalize_iters=0)
    # Not its `quantize_model`, which gives the first layer's weights and inputs one width.
    _, by_layer, _, _ = create_quant_maps(
        dtype=torch.float32,
        weight_bit_width=weight_bits,
        act_bit_width=input_bits,
        bias_bit_width=None,
        weight_quant_format="int",
        weight_quant_type="sym",
        weight_quant_granularity="per_channel",
        weight_param_method=WEIGHT_RANGE,
        weight_scale_type="float_scale",
        weight_narrow_range=False,
        act_quant_format="int",
        act_quant_type="asym",
        act_quant_granularity="per_tensor",
        act_param_method="stats",
        act_quant_percentile=99.999,
        act_scale_type="float_scale",
        act_scale_computation_type="static",
    )
    result = layerwise_quantize(result, compute_layer_map=by_layer)
    with torch.no_grad():
        result.eval()(batches[0])
    calibrate(loader, result)
    LearnedRoundTrainer(_training(request.iterations)).train(
        model=result,
        model_forward=vision_forward,
        block_forward=vision_block_forward,
        data_loader=loader,
        cache=CacheVision(),
        get_blocks_fn=partial(get_blocks, block_check_fn=is_layer),
    )
    apply_bias_correction(loader, result)
    return result.eval()


def _training(iterations: int) -> TrainerConfig:
    losses = [LossArgs("round_reg", {"max_count": iterations}), LossArgs("mse", {"reduction": "none", "dim": 1})]
    training = TrainingArgs(
        optimizers_args=[OptimizerArgs("learned_round", "Adam", LEARNING_RATE)],
        batch_size=BATCH_SIZE,
        iters=iterations,
        losses_args=losses,
        use_best_model=False,
        use_amp=False,
    )
    return TrainerConfig(training, [HandlerSpec("learned_round", LearnedRoundArgs("hard_sigmoid"))])
