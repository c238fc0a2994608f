"""`lq-export`: what `cfg` (composed from `export.yaml`) names becomes a file."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from lq_plugin.commands.common import import_modules
from lq_plugin.commands.options import EXPORT, kind_faults
from lq_plugin.commands.verification import Verify, verify_file
from lq_plugin.errors import CalibrationError, ExportError, PlanError, QuantizationError, raise_all
from lq_plugin.export.request import Request
from lq_plugin.export.target import TARGETS, Target, target_of
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.utilities.files import make_folder
from lq_plugin.utilities.hydra_files import plain

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule
    from torch import Tensor

    from lq_plugin.callbacks import PTQ

log = logging.getLogger(__name__)


def run_export(cfg: DictConfig) -> Path:
    """Builds, loads or calibrates the model, writes and verifies the file; returns its path.

    It refuses as early as possible: a request before anything is imported, the model and its plan before data is read,
    a batch before the model is calibrated.

    Raises:
        QuantizationError: nothing to export, an unknown target, a plan that does not fit, or a model that the file
            cannot hold.
    """
    target = check_export(cfg)
    from lq_plugin.callbacks import PTQ
    from lq_plugin.export import export_model
    from lq_plugin.model.checkpoint import load_checkpoint, load_float_weights
    from lq_plugin.utilities.lightning_packages import any_package

    ptq = None if cfg.plan is None else PTQ(cfg.plan, cfg.calibration_batches, cfg.phases)
    any_package().seed_everything(cfg.seed, workers=True, verbose=False)
    model: LightningModule = instantiate(cfg.model)
    if ptq is None:
        load(load_checkpoint, model, cfg.ckpt_path)
        check_model(cfg, target, model)
    else:
        if cfg.float_checkpoint:
            load(load_float_weights, model, cfg.float_checkpoint)
        check_plan(cfg, target, model, ptq.plan)
    path = Path(cfg.output or Path(cfg.paths.output_dir) / f"model{target.suffix}")
    make_folder(path.parent, ExportError)
    datamodule: LightningDataModule | None = instantiate(cfg.get("data"))
    inputs: list[Tensor] = []
    batches: list[Tensor] | None = None
    if datamodule is not None and (Verify.of(cfg).run or target.needs_inputs or target.needs_batches(options_of(cfg))):
        inputs, batches = example_batches(cfg, target, datamodule)
    if ptq is not None:
        calibrate_plan(cfg, target, model, datamodule, ptq)
    model.eval().cpu()
    size = export_model(model, path, inputs[:1] or None, batches, target.name, **options_of(cfg))
    log.info("written to %s: %s bytes", path, f"{size:,}")
    if Verify.of(cfg).run:
        verify_file(cfg, target, model, path, inputs, datamodule)
    return path


def check_export(cfg: DictConfig) -> Target:
    """Refuses what cannot be exported before anything is built; returns the target.

    Raises:
        ExportError: naming every fault.
        MissingPackageError: a package for the file, or for the runtime that shall verify it, is not installed.
    """
    raise_all(ExportError, "cannot export", kind_faults(cfg, EXPORT))
    verify = Verify.of(cfg).run
    import_modules(cfg)
    target = target_of(name=cfg.to)
    runtime = target.runtime_of(cfg.runtime)
    if (cfg.ckpt_path is None) == (cfg.plan is None):
        raise ExportError(
            "give either ckpt_path=..., of a run with QAT or PTQ, or plan=... (with float_checkpoint=...)"
        )
    faults = target.faults(Request(options_of(cfg), None if cfg.output is None else Path(cfg.output)))
    for name in ("ckpt_path", "float_checkpoint"):
        if cfg[name] is not None and not os.path.isfile(cfg[name]):
            faults.append(f"{name}={cfg[name]}: there is no such file")
    if cfg.ckpt_path is not None and cfg.float_checkpoint is not None:
        faults.append("float_checkpoint=... is for plan=...: the weights of ckpt_path=... are in the checkpoint")
    if cfg.plan is not None:
        try:
            QuantPlan.parse(cfg.plan)
        except QuantizationError as error:
            faults.append(str(error))
    if cfg.get("data") is None and (verify or target.needs_inputs):
        who = f"to={target.name}" if target.needs_inputs else "verify=true"
        faults.append(f"there is no data=...: {who} runs the model on a batch of it")
    raise_all(ExportError, "cannot export", faults)
    verified = " with verify=true" if verify else ""
    target.need_packages(f"to={target.name}{verified}", runtime if verify else None)
    return target


def options_of(cfg: DictConfig) -> dict[str, Any]:
    """Returns the options of targets that a config has a value for."""
    names = {option.name for target in TARGETS.values() for option in target.options}
    return {name: plain(cfg[name]) for name in sorted(names) if name in cfg}


def load(function: Callable[[LightningModule, str], Any], model: LightningModule, path: str) -> None:
    """Loads a checkpoint of one kind.

    Args:
        function: `load_checkpoint` or `load_float_weights`.
        model: to be filled.
        path: of the checkpoint.

    Raises:
        ExportError: it is of the other kind, or of another model.
    """
    try:
        function(model, path)
    except PlanError as error:
        raise ExportError(
            f"{error}. ckpt_path=... is for checkpoints of QAT and PTQ; float_checkpoint=... (and plan=...) for others"
        ) from error
    except RuntimeError as error:  # torch's, with every key and shape
        raise ExportError(f"{path} is of another model than model=...: {error}") from error


def check_plan(cfg: DictConfig, target: Target, model: LightningModule, plan: QuantPlan) -> None:
    """Refuses a plan that does not fit the float model, or that the file cannot hold.

    Args:
        cfg: of the command.
        target: of the export.
        model: float.
        plan: for it.

    Raises:
        PlanError, ExportError: naming every fault.
    """
    from lq_plugin.model.operations.rules import needs_recording
    from lq_plugin.model.prepare import prepare
    from lq_plugin.utilities.lightning_packages import is_overridden

    # Layers that hooks build are known once a Trainer has the module; operations that a plan names, after a batch.
    if not any(is_overridden(hook, model) for hook in ("setup", "configure_model")) and not needs_recording(
        model, plan
    ):
        probe = copy.deepcopy(model)
        prepare(probe, plan)
        check_model(cfg, target, probe)


def check_model(cfg: DictConfig, target: Target, model: LightningModule) -> None:
    """Refuses a prepared model that the file cannot hold, whatever its ranges will be.

    Args:
        cfg: of the command.
        target: of the export.
        model: prepared.

    Raises:
        ExportError: naming every fault.
    """
    from_loader = Verify.of(cfg).run or target.needs_inputs
    request = Request(options_of(cfg), model=model, settled="weights", from_loader=from_loader)
    raise_all(ExportError, f"to={cfg.to} cannot hold {type(model).__name__} under its plan", target.faults(request))


def example_batches(
    cfg: DictConfig, target: Target, datamodule: LightningDataModule
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Returns inputs of validation batches, and of training batches where an option wants them; the random state stays.

    Args:
        cfg: of the command.
        target: of the export.
        datamodule: of the inputs.

    Raises:
        ExportError: there are none, or batches do not begin with a tensor.
    """
    from lq_plugin.export.inputs import inputs_of
    from lq_plugin.utilities.lightning_packages import isolate_rng

    wanted = target.needs_batches(options_of(cfg))
    with isolate_rng():
        datamodule.prepare_data()
        datamodule.setup("fit" if wanted else "validate")
        inputs = inputs_of(datamodule.val_dataloader(), cfg.verify_batches if Verify.of(cfg).run else 1)
        batches = inputs_of(datamodule.train_dataloader(), cfg.calibration_batches) if wanted else None
    if not inputs or batches == []:
        name = "train_dataloader" if inputs else "val_dataloader"
        raise ExportError(f"{type(datamodule).__name__}.{name} gives no batches")
    return inputs, batches


def calibrate_weights(model: LightningModule, ptq: PTQ) -> None:
    """Prepares and calibrates a model of which only weights are quantized, without data.

    Raises:
        CalibrationError: data is needed.
    """
    from lq_plugin.model import calibrate, prepare
    from lq_plugin.model.calibrate import needs_data

    if others := [phase for phase in ptq.phases if phase != "calibrate"]:
        raise CalibrationError(
            f"there is no data=..., and {', '.join(others)} needs a batch: give it, or phases=[calibrate]"
        )
    ledger = prepare(model, ptq.plan)
    log.info("PTQ without data, nothing is known of operations and MACs: %s", ledger.summary())
    if needs_data(model):
        raise CalibrationError(
            "there is no data=..., and the ranges of activations come from it: give it, or a plan for weights alone"
        )
    calibrate(model, ())


def calibrate_plan(
    cfg: DictConfig, target: Target, model: LightningModule, datamodule: LightningDataModule | None, ptq: PTQ
) -> None:
    """Runs PTQ on the float model, without evaluation.

    Args:
        cfg: of the command.
        target: of the export.
        model: float.
        datamodule: of the calibration batches; None: there is none.
        ptq: the callback.

    Raises:
        CalibrationError: there is no data, and the plan or a phase needs it.
    """
    from lq_plugin.callbacks.trainer.traces import SilentLogger
    from lq_plugin.utilities.instantiate import instantiate_for
    from lq_plugin.utilities.lightning_packages import is_overridden, package_of

    if datamodule is None and not is_overridden("val_dataloader", model):
        calibrate_weights(model, ptq)
        return
    # Then all layers and operations are known, and nothing is calibrated yet.
    check = package_of(model).callbacks.LambdaCallback(
        on_validation_start=lambda trainer, module: check_model(cfg, target, module)
    )
    # One batch: its metrics are not shown.
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "limit_val_batches": 1}
    trainer: Any = instantiate_for(model, cfg.trainer, callbacks=[check, ptq], **quiet)
    trainer.logger = SilentLogger()  # for steps that call their logger
    trainer.validate(model, datamodule=datamodule, verbose=False)
