"""A transformer of the transformers library, made from a config, that classifies texts."""

from __future__ import annotations

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertConfig, BertForSequenceClassification


class Tokens(LightningDataModule):
    """Texts as token ids, made anew from a seed: the label says which of two words comes more often.

    Put your own `[N, length]` tensors of ids in their place.

    Args:
        texts: number of texts for training; a quarter of it for validation.
        length: tokens of a text.
        words: size of the vocabulary.
        batch_size: texts of a batch.
    """

    def __init__(self, texts: int = 2048, length: int = 24, words: int = 64, batch_size: int = 64) -> None:
        super().__init__()
        self.texts, self.length, self.words, self.batch_size = texts, length, words, batch_size

    def setup(self, stage: str | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (self.texts + self.texts // 4, self.length)
        ids = torch.randint(3, self.words, shape, generator=generator)
        often = torch.rand(shape, generator=generator) < 0.3
        ids = torch.where(often, 1 + torch.randint(0, 2, shape, generator=generator), ids)
        labels = ((ids == 1).sum(1) > (ids == 2).sum(1)).long()
        self.train = TensorDataset(ids[: self.texts], labels[: self.texts])
        self.val = TensorDataset(ids[self.texts :], labels[self.texts :])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)


class TextClassifier(LightningModule):
    """BERT with two small layers; logs `val/acc`.

    Args:
        words: size of the vocabulary.
        width: of the hidden states.
        layers: number of layers.
        lr: learning rate of AdamW.
    """

    def __init__(self, words: int = 64, width: int = 48, layers: int = 2, lr: float = 2e-3) -> None:
        super().__init__()
        self.lr = lr
        config = BertConfig(
            vocab_size=words, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
            intermediate_size=2 * width, max_position_embeddings=128, num_labels=2,
        )  # fmt: skip
        self.bert = BertForSequenceClassification(config)
        self.accuracy = MulticlassAccuracy(2, average="micro")

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(ids).logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("val/acc", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)
