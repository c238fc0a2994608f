"""Writes a W&B run for each trial of a study, in one group."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from lq_plugin.intent.flat_keys import layer_keys
from lq_plugin.search.study.result import SearchResult

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger


def log_trials(logger: WandbLogger, result: SearchResult) -> None:
    """Writes the trials of a finished search: plan, origin and metrics of each, in about a third of a second each.

    They share project, entity, group, tags and mode of the logger's run; without a group there the study's name is
    theirs. A trial's config holds what each layer got under names of its own (`bits.layer1.0.conv1`), which parallel
    coordinates and the importance of parameters need. A trial has the same id
    whenever it is written, so that a study that went on does not show its trials twice. With several rungs of fidelity
    a run has a step for each.

    Args:
        logger: with the run of the study.
        result: what was found.
    """
    import wandb  # not at the top: it takes a second, and not every search needs it

    study = logger.experiment
    name = result.study.study_name
    origin = _origin(result)
    # Machine statistics of a run that lasts milliseconds say nothing.
    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, x_disable_meta=True)
    for candidate in result.candidates:
        run = wandb.init(
            project=study.project,
            entity=study.entity or None,
            dir=study.settings.root_dir,
            mode="offline" if study.offline else "online",
            id=f"{origin}-{candidate.number}",
            name=f"{name} {candidate.number}",
            group=study.group or name,
            job_type="trial",
            tags=[*(study.tags or ()), candidate.origin],
            config={
                **layer_keys(candidate.plan),
                "plan": candidate.plan.to_dict(),
                "origin": candidate.origin,
                "study": name,
                "trial": candidate.number,
            },
            reinit="create_new",
            resume="allow",
            settings=settings,
        )
        try:
            for rung in candidate.lower:
                run.log(dict(rung))
            run.log({**candidate.metrics, **candidate.confirmed, "seconds": candidate.seconds})
        finally:
            run.finish()


def _origin(result: SearchResult) -> str:
    """Returns six letters of a study that stay while it goes on: its attributes and its trials may grow."""
    begun = [trial.datetime_start for trial in result.study.get_trials(deepcopy=False) if trial.datetime_start]
    known = (result.study.study_name, str(min(begun, default=None)))
    return hashlib.sha256(repr(known).encode()).hexdigest()[:6]
