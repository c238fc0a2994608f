"""`lq-export`: what `cfg` (composed from `export.yaml`) names becomes a file. Lightning and torch are imported once it
can be."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from lq_plugin.errors import CalibrationError, ExportError, PlanError, QuantizationError, did_you_mean, raise_all
from lq_plugin.export.options import SUFFIXES, check_runtime, dims_faults, need_onnx, smallest_faults
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.utilities.files import make_folder

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule
    from torch import Tensor

    from lq_plugin.callbacks import PTQ

log = logging.getLogger(__name__)


def run_export(cfg: DictConfig) -> Path:
    """Build, load or calibrate the model; write and verify the file; returns its path.

    What can be told to be impossible is told before the next thing that takes longer: of the request before anything is
    imported, of the model and its plan before data is read, of a batch before the model is calibrated.

    Raises:
        QuantizationError: nothing to export, an unknown target, a plan that does not fit, or a model that the file
            cannot hold.
    """
    check_export(cfg)
    from lq_plugin.callbacks import PTQ
    from lq_plugin.export import save_packed, verify
    from lq_plugin.model.checkpoint import load_checkpoint, load_float_weights
    from lq_plugin.utilities.lightning_packages import any_package

    ptq = None if cfg.plan is None else PTQ(cfg.plan, cfg.calibration_batches, cfg.phases)
    any_package().seed_everything(cfg.seed, workers=True, verbose=False)
    model: LightningModule = instantiate(cfg.model)
    if ptq is None:
        load(load_checkpoint, model, cfg.ckpt_path)
        check_model(cfg, model)
    else:
        if cfg.float_checkpoint:
            load(load_float_weights, model, cfg.float_checkpoint)
        check_plan(cfg, model, ptq.plan)
    path = Path(cfg.output or Path(cfg.paths.output_dir) / f"model{SUFFIXES[cfg.to]}")
    make_folder(path.parent, ExportError)
    datamodule: LightningDataModule | None = instantiate(cfg.get("data"))
    inputs: list[Tensor] = []
    sums_from: list[Tensor] | None = None
    if datamodule is not None and (cfg.verify or cfg.to == "onnx"):
        inputs, sums_from = example_batches(cfg, datamodule)
    if ptq is not None:
        calibrate_plan(cfg, model, datamodule, ptq)
    model.eval().cpu()
    if cfg.to == "packed":
        size = save_packed(model, path)
    else:
        from lq_plugin.export import export_onnx  # not above: packed files need no onnx

        size = export_onnx(
            model, inputs[:1], path, sums_from=sums_from, smallest=cfg.smallest, dynamic_dims=list(cfg.dynamic_dims)
        )
    log.info("written to %s: %s bytes", path, f"{size:,}")
    if cfg.verify:
        result = verify(model, path, inputs, lambda: instantiate(cfg.model), cfg.runtime)
        nan = " (there is NaN in the outputs)" if math.isnan(result.largest_difference) else ""
        log.info(
            "%d samples: %s, agreement %.4f, largest difference %.2g of the largest output%s",
            result.samples, "bit-equal" if result.bit_equal else "not bit-equal", result.agreement,
            result.largest_difference, nan,
        )  # fmt: skip
    return path


def check_export(cfg: DictConfig) -> None:
    """Refuse what cannot be exported, before anything is built.

    Raises:
        ExportError: naming every fault.
        MissingPackageError: a package for the file, or for the runtime that shall verify it, is not installed.
    """
    check_runtime(cfg.runtime)
    if cfg.to not in SUFFIXES:
        raise ExportError(
            f"to={cfg.to}: a model is exported to {' or '.join(SUFFIXES)}.{did_you_mean(str(cfg.to).lower(), SUFFIXES)}"
        )
    if (cfg.ckpt_path is None) == (cfg.plan is None):
        raise ExportError(
            "give either ckpt_path=..., of a run with QAT or PTQ, or plan=... (with float_checkpoint=...)"
        )
    faults = smallest_faults(cfg.smallest) + dims_faults(cfg.dynamic_dims)
    for name in ("ckpt_path", "float_checkpoint"):
        if cfg[name] is not None and not Path(cfg[name]).is_file():
            faults.append(f"{name}={cfg[name]}: there is no such file")
    if cfg.ckpt_path is not None and cfg.float_checkpoint is not None:
        faults.append("float_checkpoint=... is for plan=...: the weights of ckpt_path=... are in the checkpoint")
    if cfg.plan is not None:
        try:
            QuantPlan.parse(cfg.plan)
        except QuantizationError as error:
            faults.append(str(error))
    if cfg.get("data") is None and (cfg.verify or cfg.to == "onnx"):
        faults.append("there is no data=...: verify=true and to=onnx run the model on a batch of it")
    if cfg.output is not None and Path(cfg.output).suffix != SUFFIXES[cfg.to]:
        faults.append(f"output={cfg.output}: a file of to={cfg.to} ends in {SUFFIXES[cfg.to]}")
    if cfg.round_sums and cfg.to != "onnx":
        faults.append(f"round_sums=true is for to=onnx, got to={cfg.to}: no sum is in a packed file")
    if cfg.dynamic_dims and cfg.to != "onnx":
        faults.append(f"dynamic_dims is for to=onnx, got to={cfg.to}: a packed file has no sizes")
    faults += [
        f"{name} is true or false, got {cfg[name]!r}"
        for name in ("verify", "round_sums")
        if not isinstance(cfg[name], bool)
    ]
    for name in ("verify_batches", "calibration_batches"):
        if not isinstance(cfg[name], int) or cfg[name] < 1:
            faults.append(f"{name} is a number of batches, 1 or more, got {cfg[name]!r}")
    raise_all(ExportError, "cannot export", faults)
    if cfg.to == "onnx":
        need_onnx("to=onnx with verify=true" if cfg.verify else "to=onnx", cfg.runtime if cfg.verify else None)


def load(function: Callable[[LightningModule, str], Any], model: LightningModule, path: str) -> None:
    """Load a checkpoint of one kind.

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


def check_plan(cfg: DictConfig, model: LightningModule, plan: QuantPlan) -> None:
    """Refuse a plan that does not fit the float model, or what the file cannot hold of it.

    Raises:
        PlanError, ExportError: naming every fault.
    """
    from lq_plugin.model.operations.rules import needs_recording
    from lq_plugin.model.prepare import prepare
    from lq_plugin.utilities.lightning_packages import is_overridden

    # Which layers such a module builds is known once a Trainer has it, and which operations a plan names from a batch
    # only.
    if not any(is_overridden(hook, model) for hook in ("setup", "configure_model")) and not needs_recording(
        model, plan
    ):
        probe = copy.deepcopy(model)
        prepare(probe, plan)
        check_model(cfg, probe)


def check_model(cfg: DictConfig, model: LightningModule) -> None:
    """Refuse a prepared model that the file cannot hold, whatever its ranges will be.

    Raises:
        ExportError: naming every fault.
    """
    from lq_plugin.export.checks import check_float32, stored_faults
    from lq_plugin.export.verify import need_one_input
    from lq_plugin.layers import computed_faults
    from lq_plugin.model.prepare import quantized_layers

    if cfg.verify or cfg.to == "onnx":
        need_one_input(model)
    faults = computed_faults(quantized_layers(model)) + stored_faults(model)
    if cfg.to == "onnx":
        from lq_plugin.export.onnx_file.write import knowable_faults

        check_float32(model)
        faults += knowable_faults(model)
    raise_all(ExportError, f"to={cfg.to} cannot hold {type(model).__name__} under its plan", faults)


def example_batches(cfg: DictConfig, datamodule: LightningDataModule) -> tuple[list[Tensor], list[Tensor] | None]:
    """Inputs of validation batches, and of training batches where sums are rounded; the random state is as before.

    Raises:
        ExportError: there are none, or batches do not begin with a tensor.
    """
    from lq_plugin.export.verify import inputs_of
    from lq_plugin.utilities.lightning_packages import isolate_rng

    with isolate_rng():
        datamodule.prepare_data()
        datamodule.setup("fit" if cfg.round_sums else "validate")
        inputs = inputs_of(datamodule.val_dataloader(), cfg.verify_batches if cfg.verify else 1)
        sums_from = inputs_of(datamodule.train_dataloader(), cfg.calibration_batches) if cfg.round_sums else None
    if not inputs or sums_from == []:
        name = "train_dataloader" if inputs else "val_dataloader"
        raise ExportError(f"{type(datamodule).__name__}.{name} gives no batches")
    return inputs, sums_from


def calibrate_weights(model: LightningModule, ptq: PTQ) -> None:
    """Prepare and calibrate a model of which nothing but weights is quantized: no data is needed.

    Raises:
        CalibrationError: it is.
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


def calibrate_plan(cfg: DictConfig, model: LightningModule, datamodule: LightningDataModule | None, ptq: PTQ) -> None:
    """Run PTQ on the float model; nothing is evaluated.

    Raises:
        CalibrationError: there is no data, and what cannot do without is asked for.
    """
    from lq_plugin.callbacks.trainer.traces import SilentLogger
    from lq_plugin.utilities.instantiate import instantiate_for
    from lq_plugin.utilities.lightning_packages import is_overridden, package_of

    if datamodule is None and not is_overridden("val_dataloader", model):
        calibrate_weights(model, ptq)
        return
    # What `check_plan` could not tell is known then, and nothing is calibrated yet.
    check = package_of(model).callbacks.LambdaCallback(
        on_validation_start=lambda trainer, module: check_model(cfg, module)
    )
    # One batch: nobody sees a metric of it.
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "limit_val_batches": 1}
    trainer: Any = instantiate_for(model, cfg.trainer, callbacks=[check, ptq], **quiet)
    trainer.logger = SilentLogger()  # a step that calls its logger finds one
    trainer.validate(model, datamodule=datamodule, verbose=False)
