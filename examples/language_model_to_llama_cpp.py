"""From a small language model to llama.cpp: QAT on the grid of a GGUF type, one file, the same weights bit for bit.

A small Llama-like model learns a page of text, is trained on with weights in Q4_0 (blocks of 32 under a float16 scale,
4.5 bits each), and becomes a `.gguf` file. What training saw is what the file holds: the packing error is 0, which
rounding a model that was trained on another grid never reaches. llama.cpp rounds activations itself, to 8 bits.

    pip install "lq_plugin[gguf]" transformers xllamacpp
    python examples/language_model_to_llama_cpp.py --output runs/llama.gguf
    llama-cli -m runs/llama.gguf      # a real model has a tokenizer: Export(..., tokenizer="folder of the model")
"""

from __future__ import annotations

import argparse
import copy
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from lq_plugin import PTQ, QAT, Export, QuantPlan, Rule
from lq_plugin.export import verify

#: All linear layers but the head.
PLAN = QuantPlan([Rule("net.model.layers.*_proj", weight="q4_0")], target="gguf")
CONFIG = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, use_cache=False,
)  # fmt: skip


class LanguageModel(L.LightningModule):
    """Any LightningModule with one transformers model in it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = LlamaForCausalLM(CONFIG)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens).logits

    def loss(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch[0])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def pages() -> Tensor:
    """Returns overlapping pieces of this file, each of 64 characters."""
    text = torch.tensor([min(ord(character), 127) for character in Path(__file__).read_text(encoding="utf-8")])
    return text.unfold(0, 64, 16)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    args = parse(arguments)
    L.seed_everything(0, verbose=False)
    tokens = pages()
    train = DataLoader(TensorDataset(tokens), batch_size=32, shuffle=True)
    val = DataLoader(TensorDataset(tokens), batch_size=64)

    def trainer(epochs: int, *callbacks: L.Callback) -> L.Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return L.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[*callbacks], limit_val_batches=0, **quiet)

    def score(model: LanguageModel, *callbacks: L.Callback) -> float:
        scored = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[*callbacks])
        return scored.validate(model, val, verbose=False)[0]["val/loss"]

    model = LanguageModel()
    trainer(args.float_epochs).fit(model, train, val)
    losses = {"float": score(model)}
    losses["rounded"] = score(copy.deepcopy(model), PTQ(PLAN, phases=["calibrate"], dataloader=train))

    trainer(args.epochs, QAT(PLAN), Export(args.output, floats="f32")).fit(model, train, val)
    model.eval()
    losses["trained"] = score(model)

    # The file's weights in a fresh model, then llama.cpp itself.
    read = verify(model, args.output, [tokens[:64]], LanguageModel)
    assert read.bit_equal
    print(read)
    if find_spec("xllamacpp") is not None:
        print(verify(model, args.output, [tokens[:1, :16]], runtime="xllamacpp"))
    size = args.output.stat().st_size
    print(f"loss {losses}; {size:,} bytes, {4 * model.net.num_parameters():,} as float32")
    return losses


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/llama.gguf"))
    parser.add_argument("--float-epochs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=5)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
