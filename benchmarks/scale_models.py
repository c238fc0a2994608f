"""Llama-like models of any size with random weights, and what is read off a run: `benchmarks.scale` and its peers."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Size(NamedTuple):
    """A decoder of the Llama family and the tokens that it is calibrated on.

    Args:
        layers, width, hidden, heads, vocabulary: of the model; `hidden` is the width within a feed-forward.
        sequences, tokens: number of calibration sequences, and their length.
    """

    layers: int = 8
    width: int = 640
    hidden: int = 1792
    heads: int = 10
    vocabulary: int = 16_000
    sequences: int = 8
    tokens: int = 256


#: Sizes by name; a number of parameters each.
SIZES = {
    "12m": Size(4, 256, 768, 4, 16_000),
    "60m": Size(),
    "300m": Size(16, 1024, 2816, 16, 32_000, 16, 256),
    "1.1b": Size(22, 2048, 5632, 32, 32_000, 4, 256),
}


def make(size: Size) -> nn.Module:
    """Returns the model in float32 and evaluation mode, its weights from a seed.

    Weights of linear layers have a few columns that are larger than the others, as in trained models: without any,
    rounding to nearest is as good as anything else.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=max(size.tokens, 256),
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                columns = module.weight.shape[1]
                factors = torch.exp(0.5 * torch.randn(columns, generator=generator))
                module.weight.normal_(0.0, columns**-0.5, generator=generator).mul_(
                    factors / factors.square().mean().sqrt()
                )
    return model


def sequences(size: Size, seed: int = 0) -> list[Tensor]:
    """Returns `[1, tokens]` each; a few tokens are frequent, as in texts."""
    generator = torch.Generator().manual_seed(2 + seed)
    weights = 1.0 / torch.arange(1, size.vocabulary + 1)
    shape = size.sequences, size.tokens
    drawn = torch.multinomial(weights, shape[0] * shape[1], replacement=True, generator=generator)
    return list(drawn.view(shape).unsqueeze(1))


def hidden_states(model: Any, batches: list[Tensor]) -> list[Tensor]:
    """Returns what the last layer of the decoder gives, in front of `lm_head`."""
    with torch.no_grad():
        return [model.model(input_ids=batch).last_hidden_state for batch in batches]


def decibels(reference: list[Tensor], found: list[Tensor]) -> float:
    """Returns 10 log10 of the power of `reference` over that of the difference."""
    signal = sum(float(x.double().square().sum()) for x in reference)
    noise = sum(float((x.double() - y.double()).square().sum()) for x, y in zip(reference, found, strict=True))
    return 10 * float(torch.tensor(signal / max(noise, 1e-300)).log10())


def status(key: str) -> int:
    """Returns bytes of a field of this process's memory (Linux)."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Returns the seconds of a call, the CPU seconds of the process, and its peak of resident memory meanwhile."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": status("VmHWM"),
    }
