"""Entry points: `lq-train`, composed by Hydra from `pkg://lq_plugin.conf` and the user's own `--config-dir`.

Nothing heavy is imported before a run starts: `lq-train --help` and tab completion stay quick.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lq_plugin.errors import ExportError, did_you_mean, raise_all

if TYPE_CHECKING:
    from lightning import LightningDataModule, LightningModule, Trainer
    from torch import Tensor

log = logging.getLogger(__name__)

Metrics = dict[str, float]


@hydra.main(version_base="1.3", config_path="pkg://lq_plugin.conf", config_name="train")
def train(cfg: DictConfig) -> float | None:
    """`lq-train`: build what the config names, then fit, validate and test it.

    Returns:
        The metric named by `optimized_metric`, for a sweep; None when none is named.

    Raises:
        ValueError: when the config lacks the plugin's own part, or that metric was not logged.
    """
    require_lq_configs(cfg)
    try:
        return optimized_metric(run(cfg), cfg.optimized_metric)
    finally:
        close_wandb()


def run(cfg: DictConfig) -> Metrics:
    """The stages that `cfg` switches on, in order; returns every metric they logged."""
    from lightning import seed_everything

    from lq_plugin.model.checkpoint import load_float_weights

    log_once()
    seed_everything(cfg.seed, workers=True, verbose=False)
    output_dir = Path(cfg.paths.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, output_dir / "config.yaml", resolve=True)

    datamodule: LightningDataModule = instantiate(cfg.data)
    model: LightningModule = instantiate(cfg.model)
    metrics: Metrics = {}
    if cfg.float_checkpoint:
        load_float_weights(model, Path(cfg.float_checkpoint))
    if cfg.float_epochs:
        metrics |= train_float(cfg, model, datamodule, output_dir / "float.ckpt")

    # Instantiated one by one: a list in the config would be merged away by an override.
    callbacks = [instantiate(entry) for entry in (cfg.get("callbacks") or {}).values()]
    loggers = [instantiate(entry) for entry in (cfg.get("logger") or {}).values()]
    trainer: Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
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
    trainer: Trainer = instantiate(cfg.trainer, max_epochs=cfg.float_epochs, callbacks=[], logger=False, enable_checkpointing=False)
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
        ValueError: when it was not logged.

    >>> optimized_metric({"val/acc": 0.5}, "val/ac")
    Traceback (most recent call last):
    ValueError: optimized_metric 'val/ac' was not logged; logged: val/acc. Did you mean 'val/acc'?
    """
    if name is None:
        return None
    if name not in metrics:
        listing = ", ".join(sorted(metrics)) or "nothing (no stage was run)"
        raise ValueError(f"optimized_metric {name!r} was not logged; logged: {listing}.{did_you_mean(name, metrics)}")
    return metrics[name]


def require_lq_configs(cfg: Any) -> None:
    """Refuse a config in which `+lq=qat` became the plain string `"qat"`.

    Hydra makes it one where it does not find the group `lq`, and the run would be float without a word.

    Raises:
        ValueError: saying so.
    """
    if isinstance(value := cfg.get("lq"), str):
        raise ValueError(
            f"lq={value} was read as a plain string, not as the config group of lq_plugin: nothing would be quantized. "
            "Is lq_plugin installed in this environment (pip show lq_plugin)?"
        )


def log_once() -> None:
    """Take away Lightning's own console handlers, which would show each line a second time, beside Hydra's.

    And a warning of torch that Lightning calls a deprecated class, which a search would show for each of its trials.
    """
    import lightning.pytorch  # noqa: F401  (adds them)

    warnings.filterwarnings("ignore", r".isinstance\(treespec, LeafSpec\). is deprecated", module=r"lightning\.")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()


def close_wandb() -> None:
    """End the W&B run of this job: the next job of a multirun would go on writing into it."""
    if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
        wandb.finish()


@hydra.main(version_base="1.3", config_path="pkg://lq_plugin.conf", config_name="search")
def search(cfg: DictConfig) -> None:
    """`lq-search`: search the bits of one model; see `lq_plugin.search`."""
    require_lq_configs(cfg)
    log_once()
    from lq_plugin.search.main import run as run_search

    try:
        run_search(cfg)
    except KeyboardInterrupt:
        log.warning("stopped; the same command goes on with the study in %s", cfg.paths.output_dir)
        sys.exit(130)
    finally:
        close_wandb()


@hydra.main(version_base="1.3", config_path="pkg://lq_plugin.conf", config_name="sensitivity")
def sensitivity(cfg: DictConfig) -> None:
    """`lq-sensitivity`: how much each tensor suffers from each choice of the search space; see `lq_plugin.search.sensitivity`.

    Raises:
        QuantizationError: an unknown measure, or one that does not fit the space or the module.
    """
    require_lq_configs(cfg)
    log_once()
    from lq_plugin.search.sensitivity_main import run as run_sensitivity

    run_sensitivity(cfg)


@hydra.main(version_base="1.3", config_path="pkg://lq_plugin.conf", config_name="export")
def export(cfg: DictConfig) -> None:
    """`lq-export`: write a checkpoint, or float weights and a plan, as a packed file or as ONNX.

    Raises:
        ExportError: nothing to export, an unknown target, or a model that the file cannot hold.
    """
    log_once()
    run_export(cfg)


def run_export(cfg: DictConfig) -> Path:
    """Build, load or calibrate the model; write and verify the file; returns its path."""
    from lightning import seed_everything

    from lq_plugin.export import export_onnx, save_packed, verify
    from lq_plugin.export.verify import need_one_input
    from lq_plugin.model.checkpoint import load_checkpoint

    check_export(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    path = Path(cfg.output or Path(cfg.paths.output_dir) / f"model{SUFFIXES[cfg.to]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    model: LightningModule = instantiate(cfg.model)
    datamodule: LightningDataModule = instantiate(cfg.data)
    inputs: list[Tensor] = []
    sums_from: list[Tensor] | None = None
    if cfg.verify or cfg.to == "onnx":
        # Before the work: a batch of another kind is refused at once.
        need_one_input(model)
        inputs, sums_from = example_batches(cfg, datamodule)
    if cfg.ckpt_path is not None:
        load_checkpoint(model, cfg.ckpt_path)
    else:
        calibrate_plan(cfg, model, datamodule)
    model.eval().cpu()
    if cfg.to == "packed":
        size = save_packed(model, path)
    else:
        size = export_onnx(model, inputs[:1], path, sums_from=sums_from, smallest=cfg.smallest)
    log.info("written to %s: %s bytes", path, f"{size:,}")
    if cfg.verify:
        result = verify(model, path, inputs, lambda: instantiate(cfg.model), cfg.runtime)
        nan = " (there is NaN in the outputs)" if math.isnan(result.largest_difference) else ""
        log.info(
            "%d samples: %s, agreement %.4f, largest difference %.2g of the largest output%s",
            result.samples, "bit-equal" if result.bit_equal else "not bit-equal", result.agreement, result.largest_difference, nan,
        )  # fmt: skip
    return path


#: What `to=` may be, and what the file's name ends in.
SUFFIXES = {"packed": ".safetensors", "onnx": ".onnx"}


def check_export(cfg: DictConfig) -> None:
    """Refuse what cannot be exported, before anything is built.

    Raises:
        ExportError: naming every fault.
    """
    from lq_plugin.export.checks import smallest_faults
    from lq_plugin.export.verify import check_runtime

    check_runtime(cfg.runtime)
    if cfg.to not in SUFFIXES:
        raise ExportError(f"to={cfg.to}: a model is exported to {' or '.join(SUFFIXES)}.{did_you_mean(str(cfg.to), SUFFIXES)}")
    if (cfg.ckpt_path is None) == (cfg.plan is None):
        raise ExportError("give either ckpt_path=..., of a run with QAT or PTQ, or plan=... (with float_checkpoint=...)")
    faults = smallest_faults(cfg.smallest)
    if cfg.output is not None and Path(cfg.output).suffix != SUFFIXES[cfg.to]:
        faults.append(f"output={cfg.output}: a file of to={cfg.to} ends in {SUFFIXES[cfg.to]}")
    if cfg.round_sums and cfg.to != "onnx":
        faults.append(f"round_sums=true is for to=onnx, got to={cfg.to}: no sum is in a packed file")
    for name in ("verify_batches", "calibration_batches"):
        if not isinstance(cfg[name], int) or cfg[name] < 1:
            faults.append(f"{name} is a number of batches, 1 or more, got {cfg[name]!r}")
    raise_all(ExportError, "cannot export", faults)


def example_batches(cfg: DictConfig, datamodule: LightningDataModule) -> tuple[list[Tensor], list[Tensor] | None]:
    """Inputs of validation batches, and of training batches where sums are rounded; the random state is as before.

    Raises:
        ExportError: there are none, or batches do not begin with a tensor.
    """
    from lightning.pytorch.utilities.seed import isolate_rng

    from lq_plugin.export.verify import inputs_of

    with isolate_rng():
        datamodule.prepare_data()
        datamodule.setup("fit" if cfg.round_sums else "validate")
        inputs = inputs_of(datamodule.val_dataloader(), cfg.verify_batches if cfg.verify else 1)
        sums_from = inputs_of(datamodule.train_dataloader(), cfg.calibration_batches) if cfg.round_sums else None
    if not inputs or sums_from == []:
        name = "train_dataloader" if inputs else "val_dataloader"
        raise ExportError(f"{type(datamodule).__name__}.{name} gives no batches")
    return inputs, sums_from


def calibrate_plan(cfg: DictConfig, model: LightningModule, datamodule: LightningDataModule) -> None:
    """Load float weights and run PTQ with the config's plan."""
    from lq_plugin import PTQ
    from lq_plugin.model.checkpoint import load_float_weights

    if cfg.float_checkpoint:
        load_float_weights(model, Path(cfg.float_checkpoint))
    ptq = PTQ(cfg.plan, cfg.calibration_batches, cfg.phases)
    trainer: Trainer = instantiate(cfg.trainer, callbacks=[ptq], logger=False, enable_checkpointing=False)
    trainer.validate(model, datamodule=datamodule, verbose=False)
