"""`lq-train`: builds what a config names, then fits, validates and tests it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lq_plugin.commands.common import log_once
from lq_plugin.errors import QuantizationError, did_you_mean
from lq_plugin.utilities.files import make_folder, write_file
from lq_plugin.utilities.hydra_files import plain
from lq_plugin.utilities.passwords import masked

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

log = logging.getLogger(__name__)

Metrics = dict[str, float]


def run(cfg: DictConfig) -> Metrics:
    """Runs the stages that `cfg` switches on, in order; returns every metric they logged."""
    from lq_plugin.callbacks import QuantMonitor
    from lq_plugin.model.checkpoint import load_float_weights
    from lq_plugin.utilities.instantiate import instantiate_for
    from lq_plugin.utilities.lightning_packages import any_package

    log_once()
    any_package().seed_everything(cfg.seed, workers=True, verbose=False)
    output_dir = make_folder(cfg.paths.output_dir)
    shown = masked(plain(cfg))
    write_file(output_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(shown)))

    datamodule: LightningDataModule = instantiate(cfg.data)
    model: LightningModule = instantiate(cfg.model)
    # Made one by one: a list in the config would be merged away by an override. And before the float training, so that
    # what is wrong with a plan is said first.
    callbacks = [instantiate_for(model, entry) for entry in (cfg.get("callbacks") or {}).values()]
    metrics: Metrics = {}
    if cfg.float_checkpoint:
        load_float_weights(model, Path(cfg.float_checkpoint))
    if cfg.float_epochs:
        metrics |= train_float(cfg, model, datamodule, output_dir / "float.ckpt")
        for callback in callbacks:
            if isinstance(callback, QuantMonitor):
                callback.scoreboard.add("float", {name.removeprefix("float/"): v for name, v in metrics.items()})

    loggers = [instantiate_for(model, entry) for entry in (cfg.get("logger") or {}).values()]
    trainer: Trainer = instantiate_for(model, cfg.trainer, callbacks=callbacks, logger=loggers)
    for logger in loggers:
        logger.log_hyperparams(shown)
        if metrics:
            logger.log_metrics(metrics, step=0)
    metrics |= run_stages(cfg, trainer, model, datamodule)
    log.info("metrics: %s", ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    log.info("written to %s", output_dir)
    return metrics


def run_stages(cfg: DictConfig, trainer: Trainer, model: LightningModule, datamodule: LightningDataModule) -> Metrics:
    """Fits, validates and tests as `cfg` says; after a fit the best checkpoint is evaluated, else `ckpt_path`.

    Args:
        cfg: of the command.
        trainer: of the run.
        model: to be trained.
        datamodule: of its data.
    """
    from lq_plugin.utilities.lightning_packages import logged

    metrics: Metrics = {}
    ckpt_path = cfg.ckpt_path
    if cfg.fit:
        trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
        metrics |= logged(trainer)
        ckpt_path = getattr(trainer.checkpoint_callback, "best_model_path", None) or None
    for wanted, evaluate in ((cfg.validate, trainer.validate), (cfg.test, trainer.test)):
        if wanted:
            evaluate(model, datamodule=datamodule, ckpt_path=ckpt_path)
            metrics |= logged(trainer)
    return metrics


def train_float(cfg: DictConfig, model: LightningModule, datamodule: LightningDataModule, path: Path) -> Metrics:
    """Trains the float model without any callback of the config, and saves its weights.

    Args:
        cfg: of the command.
        model: float.
        datamodule: of its data.
        path: of the weights.

    Returns:
        Metrics of validation and test, with `float/` before the names.
    """
    from lq_plugin.utilities.lightning_packages import logged

    trainer = fit_float(cfg, model, datamodule)
    trainer.save_checkpoint(path, weights_only=True)
    metrics: Metrics = {}
    for wanted, evaluate in ((cfg.validate, trainer.validate), (cfg.test, trainer.test)):
        if wanted:
            evaluate(model, datamodule=datamodule)
            metrics |= {f"float/{name}": value for name, value in logged(trainer).items()}
    return metrics


def fit_float(cfg: DictConfig, model: LightningModule, datamodule: LightningDataModule) -> Trainer:
    """Trains the float model for `float_epochs`, without any callback or logger of the config.

    Args:
        cfg: of the command.
        model: float.
        datamodule: of its data.
    """
    from lq_plugin.utilities.instantiate import instantiate_for

    bare: dict[str, Any] = {"callbacks": [], "logger": False, "enable_checkpointing": False}
    trainer: Trainer = instantiate_for(model, cfg.trainer, max_epochs=cfg.float_epochs, **bare)
    trainer.fit(model, datamodule=datamodule)
    return trainer


def optimized_metric(metrics: Metrics, name: str | None) -> float | None:
    """Returns the value of a metric, or None without a name.

    Raises:
        QuantizationError: when it was not logged.

    >>> optimized_metric({"acc": 0.5}, "ac")
    Traceback (most recent call last):
    lq_plugin.errors.QuantizationError: optimized_metric 'ac' was not logged; logged: acc. Did you mean 'acc'?
    """
    if name is None:
        return None
    if name not in metrics:
        listing = ", ".join(sorted(metrics)) or "nothing (no stage was run)"
        raise QuantizationError(
            f"optimized_metric {name!r} was not logged; logged: {listing}.{did_you_mean(name, metrics)}"
        )
    return metrics[name]
