"""From a transformers model to a folder that vLLM serves: QAT, one folder, the same logits in transformers.

A small Llama-like model learns a page of text, is trained on with int4 weights in groups of 32, and becomes a folder of
compressed-tensors. `AutoModelForCausalLM.from_pretrained` loads it on a CPU and gives the logits of the trained model,
bit for bit. `QAT(target=...)` refuses before the first step what such a folder cannot hold.

    pip install "lq_plugin[compressed-tensors]"
    python examples/transformer_to_vllm.py --output runs/llama-int4
    vllm serve runs/llama-int4 --skip-tokenizer-init      # a real model has a tokenizer: its files come along
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lq_plugin import PTQ, QAT, Export, QuantPlan, Rule
from lq_plugin.export import verify

#: All linear layers but the head, as most checkpoints for vLLM have it.
PLAN = QuantPlan([Rule("net.model.layers.*_proj", weight="int4 group32 mse")], target="compressed-tensors")
CONFIG = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, use_cache=False,
)  # fmt: skip


class LanguageModel(L.LightningModule):
    """Any LightningModule with one transformers model in it; `AutoModelForCausalLM.from_pretrained(...)`, say."""

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

    trainer(args.epochs, QAT(PLAN), Export(args.output, target="compressed-tensors")).fit(model, train, val)
    model.eval()
    losses["trained"] = score(model)

    net = AutoModelForCausalLM.from_pretrained(args.output)
    with torch.no_grad():
        assert torch.equal(net(tokens[:64]).logits, model(tokens[:64]))
    print(verify(model, args.output, [tokens[:64]], LanguageModel, target="compressed-tensors"))
    size = sum(file.stat().st_size for file in args.output.iterdir())
    print(f"loss {losses}; {size:,} bytes, {4 * net.num_parameters():,} as float32")
    return losses


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/llama-int4"))
    parser.add_argument("--float-epochs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=5)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
