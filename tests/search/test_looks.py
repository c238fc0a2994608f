"""Looks at plans read batches that no trial has read, or parts of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lq_plugin.errors import QuantizationError
from lq_plugin.search import Evaluator, Rung
from lq_plugin.search.evaluation.looks import Looks

from .conftest import CPU

SPACE = {"weight": {"bit_widths": [2, 3, 4, 8], "granularities": ["per_channel"], "ranges": ["mse"]}}
#: What validation steps read, by loader, and the random numbers that they drew.
SEEN: list[tuple[int, list[float]]] = []
DRAWN: list[float] = []


class Numbers(Dataset[Tensor]):
    """0, 1, 2, ...; what was read is kept."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        self.read.append(index)
        return torch.full((4,), float(index))


class Plain:
    """A loader that is none of torch's."""

    def __init__(self, loader: Any) -> None:
        self.batches = list(loader)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return (torch.full((4,), float(index)) for index in range(10**6))


class Data(LightningDataModule):
    def __init__(self, loaders: Callable[[], Any]) -> None:
        super().__init__()
        self.loaders = loaders

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4)

    def val_dataloader(self) -> Any:
        return self.loaders()

    def test_dataloader(self) -> Any:
        raise AssertionError("the test split is read")


class Reader(LightningModule):
    """Logs the mean of the numbers of its batches, and keeps them in `SEEN`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        batch = batch[0] if isinstance(batch, tuple | list) else batch
        SEEN.append((dataloader_idx, batch[:, 0].tolist()))
        DRAWN.append(float(torch.rand(())))
        self(batch)
        self.log("mean", batch[:, 0].mean())


def looks_of(loaders: Callable[[], Any], count: int, *rungs: Rung, **trainer: Any) -> Iterator[Any]:
    evaluator = Evaluator(Reader(), Data(loaders), trainer=lambda **o: CPU(**trainer, **o), calibration_batches=1)
    with evaluator:
        evaluator.calibrate(SPACE)
        yield Looks(evaluator, count, 3, rungs), evaluator


def read_by(looks: Looks, evaluator: Evaluator, look: int) -> tuple[list[tuple[int, list[float]]], dict[str, float]]:
    SEEN.clear()
    found = looks.take({}, look)
    return SEEN.copy(), found


def test_looks_read_what_trials_do_not() -> None:
    numbers = Numbers(100)
    for looks, evaluator in looks_of(lambda: DataLoader(numbers, batch_size=5), 8, limit_val_batches=2):
        assert (looks.number, looks.fresh, looks.share) == (8, True, 1.0)
        for look in range(8):
            numbers.read.clear()
            seen, metrics = read_by(looks, evaluator, look)
            first = 10 * (look + 1)
            assert [value for _, values in seen for value in values] == list(range(first, first + 10))
            # Only those are loaded.
            assert numbers.read == list(range(first, first + 10))
            assert metrics["mean"] == pytest.approx(first + 4.5)
        # Trials read what they did before.
        SEEN.clear()
        evaluator.evaluate_layers({})
        assert [value for _, values in SEEN for value in values] == list(range(10))
        assert "val_dataloader" not in vars(evaluator.datamodule)


def test_a_share_of_the_batches_is_a_limit_too() -> None:
    for looks, evaluator in looks_of(lambda: DataLoader(Numbers(40), batch_size=2), 3, limit_val_batches=0.25):
        assert (looks.number, looks.fresh, looks.share) == (3, True, 1.0)
        seen, _ = read_by(looks, evaluator, 2)
        assert [value for _, values in seen for value in values] == list(range(30, 40))


def test_the_rest_is_divided_where_it_is_smaller() -> None:
    for looks, evaluator in looks_of(lambda: DataLoader(Numbers(30), batch_size=2), 4, limit_val_batches=8):
        # Seven batches are left: 1, 2, 2 and 2 of them.
        assert (looks.number, looks.fresh, looks.share) == (4, True, pytest.approx(7 / 4 / 8))
        read = [[v for _, values in read_by(looks, evaluator, look)[0] for v in values] for look in range(4)]
        assert [value for part in read for value in part] == list(range(16, 30))
        assert {len(part) for part in read} == {2, 4}


@pytest.mark.parametrize("wrap", [lambda loader: loader, Plain])
def test_looks_are_parts_of_what_trials_read_where_that_is_all(wrap: Callable[[Any], Any]) -> None:
    for looks, evaluator in looks_of(lambda: wrap(DataLoader(Numbers(24), batch_size=2)), 5):
        assert (looks.number, looks.fresh, looks.share) == (5, False, pytest.approx(0.2))
        read = [[v for _, values in read_by(looks, evaluator, look)[0] for v in values] for look in range(5)]
        assert [value for part in read for value in part] == list(range(24))


def test_several_loaders_are_divided_each() -> None:
    def loaders() -> list[Any]:
        return [DataLoader(Numbers(40), batch_size=2), DataLoader(Numbers(400), batch_size=10)]

    for looks, evaluator in looks_of(loaders, 3, limit_val_batches=4):
        seen, _ = read_by(looks, evaluator, 1)
        assert [values[0] for index, values in seen if index == 0] == [16, 18, 20, 22]
        assert [values[0] for index, values in seen if index == 1] == [80, 90, 100, 110]


def test_an_endless_stream_is_read_from_further_on_and_must_have_a_limit() -> None:
    def loader() -> Any:
        return DataLoader(Endless(), batch_size=2)

    for looks, evaluator in looks_of(loader, 3, limit_val_batches=4):
        assert looks.fresh
        seen, _ = read_by(looks, evaluator, 1)
        assert [value for _, values in seen for value in values] == list(range(16, 24))


def test_a_rung_of_some_batches_leaves_the_others() -> None:
    rung = Rung(batches=3)
    for looks, evaluator in looks_of(lambda: DataLoader(Numbers(40), batch_size=2), 3, rung):
        assert looks.fresh
        assert looks.share == 1.0
        seen, _ = read_by(looks, evaluator, 0)
        assert [value for _, values in seen for value in values] == list(range(6, 12))


@pytest.mark.parametrize("lower", [Rung(batches=6), Rung(batches=6, qat={"max_steps": 1})])
def test_what_any_rung_reads_is_not_fresh(lower: Rung) -> None:
    # A rung that trains has a Trainer of its own, whose batches no other limit holds.
    limit = 2 if lower.qat else 8
    rungs = lower, Rung(batches=2)
    for looks, evaluator in looks_of(lambda: DataLoader(Numbers(40), batch_size=2), 4, *rungs, limit_val_batches=limit):
        assert (looks.fresh, looks.share) == (True, 1.0)
        seen, _ = read_by(looks, evaluator, 0)
        assert [value for _, values in seen for value in values] == list(range(12, 16))
    # As many as are left, where that is all.
    for looks, _ in looks_of(lambda: DataLoader(Numbers(40), batch_size=2), 4, Rung(), Rung(batches=2)):
        assert not looks.fresh


def test_a_validation_of_few_batches_has_no_looks() -> None:
    with pytest.raises(QuantizationError, match="the validation has 2 batches, an interval needs 3 at least"):
        list(looks_of(lambda: DataLoader(Numbers(10), batch_size=5), 8))


def test_each_look_has_random_numbers_of_its_own_and_the_same_again() -> None:
    for looks, evaluator in looks_of(lambda: DataLoader(Numbers(24), batch_size=2), 3):
        drawn = []
        for look in (0, 1, 0):
            DRAWN.clear()
            looks.take({}, look)
            drawn.append(DRAWN.copy())
        assert drawn[0] == drawn[2]
        assert not set(drawn[0]) & set(drawn[1])
        assert evaluator.seed == 0
