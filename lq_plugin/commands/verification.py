"""Verification of `lq-export`: its options, the certificate next to the file, and metrics of model and file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.utils import instantiate
from omegaconf import DictConfig

from lq_plugin.errors import ExportError, raise_all
from lq_plugin.export.target import Target
from lq_plugin.report.certificates import SUFFIX
from lq_plugin.utilities.hydra_files import plain

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule
    from torch import Tensor

    from lq_plugin.export.certificate import Certificate

log = logging.getLogger(__name__)


class Verify(NamedTuple):
    """Options of a verification.

    Args:
        run: the file is run next to the model.
        min_agreement: share of samples with the model's class, 0..1, below which the command fails; None: it never
            does.
    """

    run: bool = False
    min_agreement: float | None = None

    @classmethod
    def of(cls, cfg: DictConfig) -> Verify:
        """Reads `verify`: true or false, or a mapping; a least agreement asks for a verification."""
        given: Any = plain(cfg.verify)
        if isinstance(given, bool):
            return cls(given)
        least = given.get("min_agreement")
        return cls(bool(given.get("run")) or least is not None, least)


def is_verify(value: Any) -> bool:
    """Returns True for a valid `verify`."""
    if isinstance(value, bool):
        return True
    if not isinstance(value, Mapping) or not value.keys() <= set(Verify._fields):
        return False
    least = value.get("min_agreement")
    number = isinstance(least, int | float) and not isinstance(least, bool) and 0 <= least <= 1
    return isinstance(value.get("run", False), bool) and (least is None or number)


def verify_file(
    cfg: DictConfig,
    target: Target,
    model: LightningModule,
    path: Path,
    inputs: Sequence[Tensor],
    datamodule: LightningDataModule | None,
) -> Certificate:
    """Runs a file next to its model, writes the certificate next to it (`model.onnx.certificate.json`), and logs both.

    Args:
        cfg: of the command.
        target: that wrote the file.
        model: the exported one.
        path: of the file.
        inputs: of validation batches.
        datamodule: of the metrics.

    Raises:
        ExportError: model and file agree on fewer samples than `verify.min_agreement`; the certificate is written.
    """
    from lq_plugin.export.certificate import certify

    metrics = metrics_of(cfg, target, model, path, datamodule)
    found = certify(model, path, inputs, lambda: instantiate(cfg.model), cfg.runtime, target.name, metrics)
    written = path.with_name(f"{path.name}{SUFFIX}")
    found.write(written)
    log.info("%s", found.summary())
    log.info("certificate written to %s", written)
    least = Verify.of(cfg).min_agreement
    raise_all(ExportError, "verify", [] if least is None else found.faults(least))
    return found


def metrics_of(
    cfg: DictConfig,
    target: Target,
    model: LightningModule,
    path: Path,
    datamodule: LightningDataModule | None,
) -> dict[str, dict[str, float]]:
    """Returns what the module logs in a validation, computed by the model and by the file.

    Args:
        cfg: of the command.
        target: that wrote the file.
        model: the exported one.
        path: of the file.
        datamodule: of the validation.
    """
    from lq_plugin.callbacks.trainer.traces import SilentLogger
    from lq_plugin.export.certificate import computed_by
    from lq_plugin.utilities.instantiate import instantiate_for
    from lq_plugin.utilities.lightning_packages import is_overridden, logged

    if not is_overridden("validation_step", model):
        return {}

    def validate() -> dict[str, float]:
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer: Any = instantiate_for(model, cfg.trainer, callbacks=[], limit_val_batches=cfg.verify_batches, **quiet)
        trainer.logger = SilentLogger()
        trainer.validate(model, datamodule=datamodule, verbose=False)
        return logged(trainer)

    found = {"model": validate()}
    with computed_by(model, target, path, cfg.runtime, lambda: instantiate(cfg.model)) as calls:
        metrics = validate()
    if calls.number:
        found["file"] = metrics
    else:
        log.warning(
            "%s.validation_step does not call self(...), so its metrics cannot be computed with the file",
            type(model).__name__,
        )
    return found
