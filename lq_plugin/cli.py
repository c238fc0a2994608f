"""Entry points: `lq-train`, `lq-search`, `lq-sensitivity` and `lq-export`.

Hydra composes their configs from `pkg://lq_plugin.conf` and the user's own `--config-dir`.

Nothing heavy is imported before a run starts: `lq-train --help` and tab completion stay quick.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lq_plugin.errors import QuantizationError, did_you_mean
from lq_plugin.export_command import check_export, run_export
from lq_plugin.files import make_folder, write_file
from lq_plugin.hydra_files import hide_passwords, plain, storage_passwords
from lq_plugin.passwords import masked, without

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

log = logging.getLogger(__name__)

Metrics = dict[str, float]


@hydra.main(version_base="1.3", config_path="pkg://lq_plugin.conf", config_name="train")
def train(cfg: DictConfig) -> float | None:
    """`lq-train`: build what the config names, then fit, validate and test it.

    Returns:
        The metric named by `optimized_metric`, for a sweep; None when none is named.
    """
    with told(cfg):
        check_request(cfg)
        return optimized_metric(run(cfg), cfg.optimized_metric)


def run(cfg: DictConfig) -> Metrics:
    """The stages that `cfg` switches on, in order; returns every metric they logged."""
    from lq_plugin.instantiate import instantiate_for
    from lq_plugin.lightning_packages import any_package
    from lq_plugin.model.checkpoint import load_float_weights

    log_once()
    any_package().seed_everything(cfg.seed, workers=True, verbose=False)
    output_dir = make_folder(cfg.paths.output_dir)
    shown = masked(plain(cfg))
    write_file(output_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(shown)))

    datamodule: LightningDataModule = instantiate(cfg.data)
    model: LightningModule = instantiate(cfg.model)
    metrics: Metrics = {}
    if cfg.float_checkpoint:
        load_float_weights(model, Path(cfg.float_checkpoint))
    if cfg.float_epochs:
        metrics |= train_float(cfg, model, datamodule, output_dir / "float.ckpt")

    # Instantiated one by one: a list in the config would be merged away by an override.
    callbacks = [instantiate_for(model, entry) for entry in (cfg.get("callbacks") or {}).values()]
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
    """Fit, validate and test, as `cfg` says; after a fit the best checkpoint is evaluated, else `ckpt_path`."""
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
    """Train `model` without any callback of the config; its weights are saved to `path`.

    Returns:
        What validation and test logged, with `float/` before the names.
    """
    from lq_plugin.instantiate import instantiate_for

    bare: dict[str, Any] = {"callbacks": [], "logger": False, "enable_checkpointing": False}
    trainer: Trainer = instantiate_for(model, cfg.trainer, max_epochs=cfg.float_epochs, **bare)
    trainer.fit(model, datamodule=datamodule)
    trainer.save_checkpoint(path, weights_only=True)
    metrics: Metrics = {}
    for wanted, evaluate in ((cfg.validate, trainer.validate), (cfg.test, trainer.test)):
        if wanted:
            evaluate(model, datamodule=datamodule)
            metrics |= {f"float/{name}": value for name, value in logged(trainer).items()}
    return metrics


def logged(trainer: Trainer) -> Metrics:
    """The metrics that the Trainer's last stage logged, as plain floats."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def optimized_metric(metrics: Metrics, name: str | None) -> float | None:
    """The value of metric `name`.

    Raises:
        QuantizationError: when it was not logged.

    >>> optimized_metric({"val/acc": 0.5}, "val/ac")
    Traceback (most recent call last):
    lq_plugin.errors.QuantizationError: optimized_metric 'val/ac' was not logged; logged: val/acc. Did you mean
    'val/acc'?
    """
    if name is None:
        return None
    if name not in metrics:
        listing = ", ".join(sorted(metrics)) or "nothing (no stage was run)"
        raise QuantizationError(
            f"optimized_metric {name!r} was not logged; logged: {listing}.{did_you_mean(name, metrics)}"
        )
    return metrics[name]


def check_request(cfg: Any) -> None:
    """Refuse what is wrong with any config, before anything is imported for it.

    Raises:
        QuantizationError: a group that was not found, or no file of float weights.
    """
    require_lq_configs(cfg)
    path = cfg.get("float_checkpoint")
    if path and not Path(path).is_file():
        raise QuantizationError(f"float_checkpoint={path}: there is no such file")


def require_lq_configs(cfg: Any) -> None:
    """Refuse a config in which `+lq=qat` became the plain string `"qat"`.

    Hydra makes it one where it does not find the group `lq`, and the run would be float without a word.

    Raises:
        QuantizationError: saying so.
    """
    if isinstance(value := cfg.get("lq"), str):
        raise QuantizationError(
            f"lq={value} was read as a plain string, not as the config group of lq_plugin: nothing would be quantized. "
            "Is lq_plugin installed in this environment (pip show lq_plugin)?"
        )


def log_once() -> None:
    """Take away Lightning's own console handlers, which would show each line a second time, beside Hydra's.

    And a warning of torch that Lightning calls a deprecated class, which a search would show for each of its trials.
    """
    from lq_plugin.lightning_packages import LOGGERS  # adds them, with the package

    warnings.filterwarnings(
        "ignore", r".isinstance\(treespec, LeafSpec\). is deprecated", module=r"(pytorch_)?lightning\."
    )
    for name in ("lightning", *LOGGERS):
        logging.getLogger(name).handlers.clear()


@contextmanager
def told(cfg: DictConfig) -> Iterator[None]:
    """What is wrong with a request is told in words, with exit code 2; a sweeper gets the error, HYDRA_FULL_ERROR=1 the
    traceback.

    The W&B run of this job ends: the next job of a multirun would go on writing into it. Passwords of storages are
    taken out of what Hydra has written, and out of what is said.
    """
    passwords = storage_passwords(cfg)
    hide_passwords(passwords)
    try:
        yield
    except QuantizationError as error:
        whole = os.environ.get("HYDRA_FULL_ERROR", "0") != "0"
        # Next to a traceback Hydra shows the overrides, and with them passwords.
        if HydraConfig.get().mode != RunMode.RUN or (whole and not passwords):
            raise
        log.error("%s", without(traceback.format_exc() if whole else str(error), passwords))
        sys.exit(2)
    except Exception:
        if not passwords or HydraConfig.get().mode != RunMode.RUN:
            raise
        log.error("%s", without(traceback.format_exc(), passwords))
        sys.exit(1)
    finally:
        if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
            wandb.finish()


@hydra.main(version_base="1.3", config_path="pkg://lq_plugin.conf", config_name="search")
def search(cfg: DictConfig) -> None:
    """`lq-search`: search the bits of one model; see `lq_plugin.search`."""
    with told(cfg):
        check_request(cfg)
        log_once()
        from lq_plugin.search.main import run as run_search

        try:
            run_search(cfg)
        except KeyboardInterrupt:
            log.warning("stopped; the same command goes on with the study in %s", cfg.paths.output_dir)
            sys.exit(130)


@hydra.main(version_base="1.3", config_path="pkg://lq_plugin.conf", config_name="sensitivity")
def sensitivity(cfg: DictConfig) -> None:
    """`lq-sensitivity`: how much each tensor suffers from each choice of the search space; see
    `lq_plugin.search.sensitivity`."""
    with told(cfg):
        check_request(cfg)
        log_once()
        from lq_plugin.search.sensitivity_main import run as run_sensitivity

        run_sensitivity(cfg)


@hydra.main(version_base="1.3", config_path="pkg://lq_plugin.conf", config_name="export")
def export(cfg: DictConfig) -> None:
    """`lq-export`: write a checkpoint, or float weights and a plan, as a packed file or as ONNX."""
    with told(cfg):
        # Before Lightning is imported, which takes longer than anything that can be wrong with a request takes to say.
        check_export(cfg)
        log_once()
        run_export(cfg)
