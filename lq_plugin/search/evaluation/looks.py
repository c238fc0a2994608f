"""Scores plans again: on validation batches that no trial has seen, or else on parts of them, with other luck.

Where the Trainer's `limit_val_batches`, or the `batches` of all rungs, leave a part of the validation data out, a look
reads as many of those batches as a trial reads at the top rung, and other looks read others: its score is what the
trial would have scored with them. Where trials read everything, looks are equal parts of the same batches: the
intervals that they give say what other data of the same kind may score, but no longer that the plan was chosen by
these. A rung that trains is trained again, with another seed. Data of the test split is never read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from math import inf
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lq_plugin.callbacks.trainer.data import seeded
from lq_plugin.errors import QuantizationError
from lq_plugin.intent.plan import LayerPlan
from lq_plugin.search.evaluation.evaluator import Evaluator
from lq_plugin.search.evaluation.rungs import Rung, evaluate_layers_at
from lq_plugin.utilities.lightning_packages import either, is_overridden, package_of


class Looks:
    """Scores plans by looks, numbered from 0; the same look of the same plan has the same score.

    Args:
        evaluator: calibrated.
        count: looks of a plan, at most.
        least: looks of a plan, at least.
        rungs: at which trials are scored, looks at the last of them; none: PTQ on the validation data.

    Attributes:
        number: of looks that the data has; `count` at most.
        fresh: True if they read what trials do not.
        share: batches of a look, as a share of those of a trial; a mean over it has 1 / share the variance.

    Raises:
        QuantizationError: the validation has fewer than `least` batches, or does not say how many.
    """

    def __init__(self, evaluator: Evaluator, count: int, least: int, rungs: Sequence[Rung] = ()) -> None:
        rungs = rungs or [Rung()]
        self.evaluator, self.rung = evaluator, rungs[-1]
        self.number, self.fresh, self.share = count, True, 1.0
        self._parts: list[Callable[[int], tuple[int, int]]] = []
        if self.rung.qat is None:
            self._divide(count, least, rungs)

    def _divide(self, count: int, least: int, rungs: Sequence[Rung]) -> None:
        lengths = [_length(loader) for loader in self._combined(self.evaluator.trainer.val_dataloaders).flattened]
        reads = [self._read_at(rung, lengths) for rung in rungs]
        # What trials have read at any rung is not fresh; a look is as large as the score of the top one.
        known, seen = [max(each) for each in zip(*reads, strict=True)], reads[-1]
        if not seen or inf in seen:
            raise QuantizationError(
                "confirm: the validation does not say how many batches it has, so they cannot be divided into looks: "
                "give the Trainer limit_val_batches"
            )
        self.fresh = all(length - read >= least for length, read in zip(lengths, known, strict=True))
        firsts = [int(read) if self.fresh else 0 for read in known]
        rests = [length - first for length, first in zip(lengths, firsts, strict=True)]
        self.number = int(min(count, *rests))
        if self.number < least:
            raise QuantizationError(
                f"confirm: the validation has {self.number} batches, an interval needs {least} at least: use smaller "
                "batches, or more validation data"
            )
        for first, rest, read in zip(firsts, rests, seen, strict=True):
            self._parts.append(_parts(first, rest, int(read), self.number))
        self.share = float(min(min(rest / self.number / read, 1.0) for rest, read in zip(rests, seen, strict=True)))

    def _read_at(self, rung: Rung, lengths: Sequence[float]) -> list[float]:
        """Returns how many batches of each loader a trial reads at a rung; what it trains with has no other limit."""
        if rung.batches is None:
            return list(self.evaluator.loader_batches)
        most = rung.batches if rung.qat is not None else min(rung.batches, self.evaluator.batches)
        return [min(length, most) for length in lengths]

    def describe(self) -> dict[str, Any]:
        """Returns what looks are, as plain values; scores of equal ones can be compared."""
        found: dict[str, Any] = {"looks": self.number, "fresh": self.fresh, "share": round(self.share, 6)}
        if self._parts:
            found["batches"] = [list(part(0)) for part in self._parts]
        return found

    def take(self, layer_plans: Mapping[str, LayerPlan], look: int) -> dict[str, float]:
        """Returns everything that a plan logs in one look.

        Args:
            layer_plans: specs by layer name; layers that are left out stay float.
            look: its number.
        """
        evaluator, before = self.evaluator, self.evaluator.seed
        # Trials have the seed itself.
        evaluator.seed = before + 1 + look
        try:
            with self._only(look), seeded(evaluator.seed):
                return evaluate_layers_at(evaluator, layer_plans, self.rung)
        finally:
            evaluator.seed = before

    @contextmanager
    def _only(self, look: int) -> Iterator[None]:
        """A context in which a validation reads the batches of one look."""
        if not self._parts:
            yield
            return
        evaluator = self.evaluator
        source: Any = evaluator.model
        if evaluator.datamodule is not None and is_overridden("val_dataloader", evaluator.datamodule):
            source = evaluator.datamodule
        own, original, places = vars(source).get("val_dataloader"), source.val_dataloader, self._parts

        def val_dataloader() -> Any:
            combined = copy.copy(self._combined(original()))
            loaders = zip(combined.flattened, places, strict=True)
            combined.flattened = [_part(loader, *place(look)) for loader, place in loaders]
            return combined

        options = vars(evaluator.trainer)
        limit = options["limit_val_batches"]
        vars(source)["val_dataloader"], options["limit_val_batches"] = val_dataloader, 1.0
        try:
            yield
        finally:
            options["limit_val_batches"] = limit
            if own is None:
                del vars(source)["val_dataloader"]
            else:
                vars(source)["val_dataloader"] = own

    def _combined(self, loaders: Any) -> Any:
        if isinstance(loaders, either("utilities.combined_loader.CombinedLoader")):
            return loaders
        return package_of(self.evaluator.model).utilities.combined_loader.CombinedLoader(loaders, "sequential")


def _parts(first: int, rest: float, most: int, number: int) -> Callable[[int], tuple[int, int]]:
    """Returns what gives the first batch and the one after the last of each look.

    Args:
        first: batch of the first look.
        rest: batches from there on.
        most: batches of a look.
        number: of looks.
    """
    if rest >= most * number:
        return lambda look: (first + look * most, first + (look + 1) * most)
    whole = int(rest)
    return lambda look: (first + look * whole // number, first + (look + 1) * whole // number)


def _length(loader: Any) -> float:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # of an iterable data set
        return inf


class _Part:
    """Some batches of a loader; those before them are loaded also."""

    def __init__(self, loader: Iterable[Any], start: int, stop: int) -> None:
        self._loader, self._start, self._stop = loader, start, stop

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._loader), self._start, self._stop)

    def __len__(self) -> int:
        return self._stop - self._start


def _part(loader: Any, start: int, stop: int) -> Any:
    """Returns a loader of the batches from `start` to before `stop`; only those are loaded where it can be told."""
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return _Part(loader, start, stop)
    return DataLoader(
        loader.dataset,
        batch_sampler=list(islice(loader.batch_sampler, start, stop)),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )
