"""llm-compressor on the pretrained transformer of `benchmarks.transformer`.

`python -m benchmarks.peers.llmcompressor_transformer SEEDS THREADS`, in its own environment.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.peers.process import serve

_FLOAT: dict[str, Any] = {"num_bits": 4, "type": "float", "symmetric": True}
_INT8: dict[str, Any] = {"num_bits": 8, "type": "int"}
_CHANNELS: dict[str, Any] = {**_INT8, "strategy": "channel", "symmetric": True}
#: Weights and inputs of the plans of `benchmarks.ptq_transformer` that it has, in its words.
PLANS: dict[str, dict[str, dict[str, Any]]] = {
    "W8A8 static": {"weights": _CHANNELS, "input_activations": {**_INT8, "strategy": "tensor", "symmetric": False}},
    "W8A8 dynamic": {
        "weights": _CHANNELS,
        "input_activations": {**_INT8, "strategy": "token", "symmetric": False, "dynamic": True, "observer": None},
    },
    "W4 g32": {
        "weights": {
            "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True,
            "observer": "memoryless_mse",
        }
    },
    "MXFP4": {
        "weights": {**_FLOAT, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8",
                    "zp_dtype": "torch.uint8"}
    },
    "NVFP4": {
        "weights": {**_FLOAT, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn",
                    "zp_dtype": "torch.float8_e4m3fn"}
    },
}  # fmt: skip
METHODS = ("nearest", "gptq", "autoround")


def modifier(plan: str, method: str) -> Any:
    """Returns its recipe."""
    groups = {"group": {"targets": ["re:bert\\.encoder\\..*"], **PLANS[plan]}}
    if method == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]

        return GPTQModifier(config_groups=groups)
    if method == "autoround":
        from llmcompressor.modifiers.autoround import AutoRoundModifier  # type: ignore[import-not-found]

        return AutoRoundModifier(config_groups=groups, enable_torch_compile=False)
    from llmcompressor.modifiers.quantization import QuantizationModifier  # type: ignore[import-not-found]

    return QuantizationModifier(config_groups=groups)


def make(seeds: int) -> dict[str, Callable[[], dict[str, float]]]:
    """Returns what answers with the scores of a plan, a method and a calibration set: `"W4 g32 gptq 0"`.

    Args:
        seeds: calibration sets.
    """
    import torch
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from tokenizers import Tokenizer, models
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerFast

    from benchmarks.transformer import load_all, predictions, scores

    # It asks for one, though the batches are tokens already.
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    model, calibration, test = load_all(seeds)
    reference, tokens = predictions(model, test), torch.cat([batch.tokens for batch in test])

    def answer(plan: str, method: str, seed: int) -> dict[str, float]:
        before = time.perf_counter()
        result: Any = copy.deepcopy(model)
        batches = [batch.inputs for batch in calibration[seed]]
        with tempfile.TemporaryDirectory() as folder:
            # It reads the configuration from where the model came from.
            result.config.save_pretrained(folder)
            result.name_or_path = result.config._name_or_path = folder
            loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
            oneshot(
                model=result, processor=words, dataset=loader, recipe=modifier(plan, method), pipeline="sequential",
                num_calibration_samples=len(batches), sequential_targets=["BertLayer"],
            )  # fmt: skip
        seconds = time.perf_counter() - before
        return {**scores(predictions(result, test), reference, tokens), "seconds": seconds}

    return {
        f"{plan} {method} {seed}": partial(answer, plan, method, seed)
        for plan in PLANS
        for method in METHODS
        for seed in range(seeds)
    }


if __name__ == "__main__":
    import torch

    torch.set_num_threads(int(sys.argv[2]))
    serve(lambda: make(int(sys.argv[1])))
