"""GPTQ of llm-compressor on a model of `benchmarks.scale`: scheme W4A16, sequential pipeline, one line of JSON.

`python benchmarks/peers/llmcompressor_scale.py SIZE THREADS`, in its own environment.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any


def main(size: str, threads: str, folder: str) -> dict[str, Any]:
    import torch
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
    from tokenizers import Tokenizer, models
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerFast

    from benchmarks.scale_models import SIZES, Size, decibels, hidden_states, make, measured, sequences, status

    torch.set_num_threads(int(threads))
    # It asks for one, though the batches are tokens already.
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))

    def quantize(model: Any, sized: Size) -> None:
        batches = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in sequences(sized)]
        recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"], dampening_frac=0.01)
        # It reads the configuration from where the model came from.
        model.config.save_pretrained(folder)
        model.name_or_path = model.config._name_or_path = folder
        loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        oneshot(
            model=model, processor=words, dataset=loader, recipe=recipe, num_calibration_samples=sized.sequences,
            max_seq_length=sized.tokens, pipeline="sequential",
        )  # fmt: skip

    sized = SIZES[size]
    # What a first call loads does not grow with a model.
    warm = SIZES["12m"]._replace(layers=1, sequences=1, tokens=64)
    quantize(make(warm), warm)
    before = status("VmRSS")
    model = make(sized)
    batches, held = sequences(sized), sequences(sized, 1)
    reference, model_bytes = hidden_states(model, held), 4 * sum(p.numel() for p in model.parameters())
    one = min((measured(lambda: hidden_states(model, batches)) for _ in range(3)), key=lambda row: row["seconds"])
    rows = {"forward": one, "gptq": measured(lambda: quantize(model, sized))}
    rows["gptq"]["decibels"] = decibels(reference, hidden_states(model, held))
    for row in rows.values():
        row["passes"] = row["seconds"] / one["seconds"]
        row["over_model"] = (row["peak_bytes"] - before) / model_bytes
    return rows


if __name__ == "__main__":
    # Libraries print on stdout, too: that goes to stderr.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)
        with tempfile.TemporaryDirectory() as folder:
            answer.write(json.dumps(main(*sys.argv[1:], folder)) + "\n")
