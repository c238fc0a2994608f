"""Scores the plans near a front again, look by look, until it is clear which of them are on it or the looks are spent.

The next look goes to a plan that may be on the front: its score, noise included, is not below that of a plan which
costs no more. Of those one with too few looks for an interval is next, then the one with the fewest looks, then the one
that is nearest to the front. A plan that another one beats for sure gets no more.

Workers share the looks: who takes one says so in the study, and others take others. One that is silent for so long that
it must have been killed is waited for no longer.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from optuna import Study

from lq_plugin.search.shared.database import StudyError, alone_with
from lq_plugin.search.shared.others import POLL
from lq_plugin.search.study.candidates import Candidate, StudyCandidates
from lq_plugin.search.study.confidence import (
    CONFIRM,
    LEAST,
    Confirm,
    Scores,
    better,
    claim_key,
    claims_in,
    look_key,
    looks_in,
    quantile,
    spread_of_differences,
    usable,
)

log = logging.getLogger(__name__)

#: Degrees of freedom that the noise of differences is taken to have: many.
_MANY = 1000
#: Seconds after which a look that another worker takes is taken again, and how many times as long as the plan's trial.
_PATIENCE, _TIMES = 30.0, 3.0


class Source(Protocol):
    """Source of further scores of plans, such as `lq_plugin.search.evaluation.looks.Looks`."""

    number: int
    share: float

    def describe(self) -> dict[str, Any]: ...


class Confirmation:
    """Takes looks at the plans of a study, and keeps them in it; workers share them.

    Args:
        study: with finished trials.
        source: of the looks.
        take: scores a plan in one look, from the plan and the look's number; None where the score is no number.
        options: how many looks, and how sure.
        most: looks of all plans together.

    Attributes:
        failed: tracebacks of looks that raised; they are not asked for again.

    Raises:
        StudyError: the study has looks of another kind.
    """

    def __init__(
        self, study: Study, source: Source, take: Callable[[Candidate, int], float | None], options: Confirm, most: int
    ) -> None:
        self.study, self.source, self.take, self.options = study, source, take, options
        self.most = most if options.most is None else options.most
        self.failed: list[str] = []
        self._given_up: set[tuple[int, int]] = set()
        #: Looks that workers take, by trial and look, with who does, and since when this one knows: clocks differ.
        self._seen: dict[tuple[tuple[int, int], str], float] = {}
        known = study.user_attrs.get(CONFIRM)
        looks = source.describe()
        if known is not None and known["looks"] != looks:
            raise StudyError(
                f"confirm: study '{study.study_name}' has looks of another kind ({known['looks']}, now {looks}): ask "
                "for the same looks and validation data, or take another study_name"
            )
        definition = {"looks": looks, "level": options.level}
        if known != definition:
            study.set_user_attr(CONFIRM, definition)

    def scores(self) -> dict[int, dict[int, float | None]]:
        """Returns all looks so far, by trial and look."""
        return looks_in(self.study.user_attrs)

    def means(self) -> dict[int, float]:
        """Returns what trials score by their looks, where all of them are numbers."""
        kept, _ = usable(self.scores())
        return {
            trial: fmean(score for score in scores.values() if score is not None)
            for trial, scores in kept.items()
            if scores and None not in scores.values()
        }

    def step(self, result: StudyCandidates) -> bool:
        """Takes one look, and returns False where no plan needs one, the looks are spent, or others take what is left.

        One that raises is noted in `failed`.
        """
        with alone_with(self.study):
            wanted = self.next(result)
            if wanted is None:
                return False
            candidate, look = wanted
            place = candidate.number, look
            self.study.set_user_attr(claim_key(*place), uuid4().hex)
        try:
            score = self.take(candidate, look)
        except BaseException as error:
            self.study.set_user_attr(claim_key(*place), None)
            if not isinstance(error, Exception):
                raise
            self._given_up.add(place)
            self.failed.append(traceback.format_exc())
            log.warning("confirm: trial %d, look %d failed: %s: %s", *place, type(error).__name__, error)
            return True
        self.study.set_user_attr(look_key(*place), score)
        log.info("confirm: trial %d, look %d: %s", *place, score)
        return True

    def next(self, result: StudyCandidates) -> tuple[Candidate, int] | None:
        """Returns the plan that is to be scored next and the number of its look; None where none is."""
        attributes = self.study.user_attrs
        every, claimed = looks_in(attributes), self._claimed(attributes, result)
        if sum(map(len, every.values())) + len(claimed) >= self.most or not result.candidates:
            return None
        scores, unusable = usable(every)
        asked = claimed | self._given_up | {(trial, look) for trial, each in every.items() for look in each}
        sign = 1.0 if result.maximize else -1.0
        signed: dict[int, Scores] = {
            trial: {look: None if score is None else sign * score for look, score in each.items()}
            for trial, each in scores.items()
        }
        # What scored no number is not looked at again.
        sound = [c for c in result.candidates if None not in scores.get(c.number, {}).values()]
        if not sound:
            return None
        gaps, cheaper = _gaps(sound, signed, sign)
        difference = spread_of_differences([each for each in signed.values() if None not in each.values()])
        margin = 0.0
        if difference is not None:
            margin = quantile(_MANY, self.options.level) * difference * self.source.share**0.5
        near = [i for i in range(len(sound)) if gaps[i] <= margin]
        looked = [signed.get(c.number, {}) for c in sound]
        level = self.options.level
        wanted = sorted((_turn(len(looked[i])), float(gaps[i]), sound[i].number, i) for i in near)
        for *_, chosen in wanted:
            numbers = set(range(self.source.number)) - unusable
            free = [look for look in sorted(numbers) if (sound[chosen].number, look) not in asked]
            if not free:
                continue
            # Last, as it takes longest.
            if not any(cheaper[chosen, j] and better(looked[j], looked[chosen], level) for j in near if j != chosen):
                return sound[chosen], free[0]
        return None

    def finish(self, result: StudyCandidates, stopped: Callable[[], bool]) -> None:
        """Takes looks at the plans of a study until none is needed, or `stopped` says so; waits for other workers'."""
        waiting = False
        while not stopped():
            others = self._claimed(self.study.user_attrs, result)
            if self.step(result):
                continue
            if not others:
                break
            if not waiting:
                log.info("confirm: waiting for %d looks of other workers", len(others))
            waiting = True
            time.sleep(POLL)
        if unusable := usable(self.scores())[1]:
            log.warning("confirm: looks %s are no number for several plans: they count for none", sorted(unusable))

    def _claimed(self, attributes: Mapping[str, Any], result: StudyCandidates) -> set[tuple[int, int]]:
        """Returns the looks that workers take at the moment, by trial and look."""
        now, claims = time.monotonic(), claims_in(attributes)
        self._seen = {claim: self._seen.get(claim, now) for claim in claims.items()}
        took = {c.number: c.seconds for c in result.candidates}
        return {
            (trial, look)
            for ((trial, look), _), since in self._seen.items()
            if now - since < _PATIENCE + _TIMES * took.get(trial, 0.0)
        }


def _turn(looks: int) -> int:
    """Returns when a plan with so many looks has its turn: what was begun is brought to an interval first."""
    return 0 if 0 < looks < LEAST else max(looks, 1)


def _gaps(
    candidates: Sequence[Candidate], looks: Mapping[int, Scores], sign: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Returns how much less each candidate scores than the best that costs no more, and who costs no more than whom.

    Args:
        candidates: of the study.
        looks: by trial; larger is better.
        sign: 1 where the metric is maximized, else -1.
    """
    known = [[score for score in looks.get(c.number, {}).values() if score is not None] for c in candidates]
    score = np.array([fmean(each) if each else sign * c.metric for c, each in zip(candidates, known, strict=True)])
    costs = np.array([c.values[1:] for c in candidates], dtype=np.float64).reshape(len(candidates), -1)
    cheaper = np.asarray((costs[None, :, :] <= costs[:, None, :]).all(-1))
    best = np.where(cheaper, score[None, :], -np.inf).max(1)
    return best - score, cheaper
