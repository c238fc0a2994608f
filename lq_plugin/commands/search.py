"""`lq-search`: builds the model and data of a config, searches, and shows the result. One call is one worker."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from optuna.storages import BaseStorage
from rich.console import Console

from lq_plugin.commands.options import SEARCHED
from lq_plugin.commands.train import fit_float
from lq_plugin.errors import QuantizationError
from lq_plugin.model.checkpoint import load_float_weights
from lq_plugin.search.shared.database import alone
from lq_plugin.search.space.space import Space
from lq_plugin.search.study.config import SearchConfig
from lq_plugin.search.study.result import SearchResult
from lq_plugin.search.study.study_logs import StudyLogs
from lq_plugin.search.study.worker import StudyWorker
from lq_plugin.utilities.files import make_folder, replacing
from lq_plugin.utilities.hydra_files import plain
from lq_plugin.utilities.instantiate import instantiate_for
from lq_plugin.utilities.lightning_packages import any_package
from lq_plugin.utilities.passwords import masked, passwords_in, without

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.loggers import Logger

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> SearchResult:
    """Searches as `cfg` (composed from `search.yaml`) says.

    Raises:
        QuantizationError: see `search`.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the results so far are written.
    """
    output_dir = make_folder(cfg.paths.output_dir)
    # Only the first worker shows anything: the others share its terminal.
    first = cfg.worker == 0
    # Read before a float model is trained, which takes long.
    progress = first and cfg.search.progress
    config = read_config(cfg, instantiate(cfg.model), progress=progress, output_dir=output_dir)
    datamodule: LightningDataModule = instantiate(cfg.data)
    model = load_model(cfg, datamodule, output_dir)
    any_package().seed_everything(cfg.seed, workers=True, verbose=False)
    storage, sampler = make_storage(cfg.search.storage), instantiate(cfg.search.sampler, _partial_=True)
    logs = study_logs(cfg) if first else StudyLogs([])
    worker = None
    try:
        worker = StudyWorker(
            replace(
                config,
                model=model,
                datamodule=datamodule,
                storage=storage,
                output_dir=output_dir,
                sampler=sampler,
                trainer=partial(instantiate_for, model, cfg.trainer),
                on_trial=logs.update if logs.loggers else None,
            )
        )
        result = worker.work()
        if first:
            Console().print(result.table())
            logs.finish(result)
    except KeyboardInterrupt:
        # A stop that was asked for: the results so far are written, and go to the loggers also.
        if worker is not None and worker.is_open and first:
            logs.finish(worker.result())
        else:
            logs.close("failed")
        raise
    except BaseException:
        logs.close("failed")
        raise
    log.info("written to %s", output_dir)
    return result


def read_config(cfg: DictConfig, model: LightningModule, **options: Any) -> SearchConfig:
    """Returns the request of `cfg`, without its data, storage, folder and sampler.

    Args:
        cfg: composed from `search.yaml`.
        model: trained or not.
        options: further fields of `SearchConfig`.

    Raises:
        QuantizationError: listing everything that is wrong in it.
    """
    given = {key: plain(cfg.search[key]) for key in SEARCHED}
    trainer = partial(instantiate_for, model, cfg.trainer)
    return SearchConfig(
        model, None, read_space(cfg), trainer=trainer, seed=cfg.seed, worker=cfg.worker, **given, **options
    )


def make_storage(given: Any) -> BaseStorage | str | None:
    """Returns the storage of `search.storage`: a URL, None, or the object that a mapping with `_target_` describes.

    Raises:
        QuantizationError: it cannot be made.
    """
    if isinstance(given, str | None):
        return given
    try:
        return cast(BaseStorage, instantiate(given))
    except InstantiationException as error:
        raise QuantizationError(f"search.storage: {without(str(error), passwords_in(plain(given)))}") from None


def read_space(cfg: DictConfig) -> Space:
    """Returns the search space of a config, or the object that it describes by `_target_`."""
    given = cfg.search.space
    return instantiate(given) if "_target_" in given else Space.parse(plain(given))


def load_model(cfg: DictConfig, datamodule: LightningDataModule, output_dir: Path) -> LightningModule:
    """Returns the model with its float weights, loaded from `float_checkpoint` or trained for `float_epochs`.

    Workers that start together train once: the others wait and load the weights of the first.

    Args:
        cfg: of the command.
        datamodule: of the training.
        output_dir: where trained weights are kept for the next run.
    """
    any_package().seed_everything(cfg.seed, workers=True, verbose=False)
    model: LightningModule = instantiate(cfg.model)
    path = Path(cfg.float_checkpoint) if cfg.float_checkpoint else None
    if path is None and cfg.float_epochs:
        # Named after everything it depends on: another model or more epochs are trained anew.
        recipe = [plain(cfg[key]) for key in ("model", "data", "float_epochs", "seed")]
        path = output_dir / f"float_{hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]}.ckpt"
        with alone(f"{path}.lock", f"the float model, {path}"):
            if not path.exists():
                train(cfg, model, datamodule, path)
    if path is not None:
        load_float_weights(model, path)
    return model


def train(cfg: DictConfig, model: LightningModule, datamodule: LightningDataModule, path: Path) -> None:
    """Trains the float model and saves its weights.

    Args:
        cfg: of the command.
        model: float.
        datamodule: of the training.
        path: of the weights.
    """
    log.info("training the float model for %d epochs", cfg.float_epochs)
    fit_float(cfg, model, datamodule)
    with replacing(path) as stream:
        torch.save({"state_dict": model.state_dict()}, stream)


def study_logs(cfg: DictConfig) -> StudyLogs:
    """Returns the config's loggers, to which the config itself is written.

    In W&B the study's run and those of its trials are one group.
    """
    loggers: list[Logger] = []
    for entry in (cfg.get("logger") or {}).values():
        wandb = str(entry.get("_target_", "")).endswith("WandbLogger")
        grouped = {"group": entry.get("group") or cfg.search.study_name, "job_type": "study"} if wandb else {}
        loggers.append(instantiate(entry, **grouped))
        loggers[-1].log_hyperparams(masked(plain(cfg)))
    return StudyLogs(loggers, trial_runs=cfg.search.trial_runs)
