"""Shared parts of the commands: checks of a request, quiet logs, errors without tracebacks."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lq_plugin.commands.options import Kind, kind_faults, stray_keys
from lq_plugin.errors import QuantizationError, raise_all
from lq_plugin.utilities.hydra_files import hide_passwords, storage_passwords
from lq_plugin.utilities.passwords import without

log = logging.getLogger(__name__)


def check_request(cfg: DictConfig, kinds: Mapping[str, Kind]) -> None:
    """Refuses what is wrong with a config, before anything is imported for it.

    Args:
        cfg: composed.
        kinds: of the command's options.

    Raises:
        QuantizationError: a group that was not found, options that are missing, misspelt or of another kind, or no file
            of float weights.
    """
    require_lq_configs(cfg)
    strays, unread = stray_keys(cfg, kinds)
    raise_all(QuantizationError, "the config", kind_faults(cfg, kinds) + strays)
    for words in unread:
        log.warning("%s, and nothing in the config refers to it: it has no effect", words)
    import_modules(cfg)
    if cfg.float_checkpoint is not None and not os.path.isfile(cfg.float_checkpoint):
        raise QuantizationError(f"float_checkpoint={cfg.float_checkpoint}: there is no such file")


def import_modules(cfg: Any) -> None:
    """Imports the modules of `imports=[...]`, which register a project's own targets, ranges, layers or phases.

    Raises:
        QuantizationError: one that cannot be imported.
    """
    for name in cfg.get("imports") or ():
        try:
            import_module(str(name))
        except ImportError as error:
            raise QuantizationError(f"imports={name}: {error}; is its project installed, or on PYTHONPATH?") from error


def require_lq_configs(cfg: Any) -> None:
    """Refuses a config in which `+lq=qat` became the plain string `"qat"`.

    Hydra does so where it does not find the group `lq`; the run would be float without any message.

    Raises:
        QuantizationError: saying so.
    """
    if isinstance(value := cfg.get("lq"), str):
        raise QuantizationError(
            f"lq={value} was read as a plain string, not as the config group of lq_plugin: nothing would be quantized. "
            "Is lq_plugin installed in this environment (pip show lq_plugin)?"
        )


def log_once() -> None:
    """Removes Lightning's own console handlers, which would show each line twice, next to Hydra's.

    It also ignores torch's warning that Lightning uses a deprecated class, which a search would show for each trial.
    """
    from lq_plugin.utilities.lightning_packages import LOGGERS  # adds them, with the package

    warnings.filterwarnings(
        "ignore", r".isinstance\(treespec, LeafSpec\). is deprecated", module=r"(pytorch_)?lightning\."
    )
    for name in ("lightning", *LOGGERS):
        logging.getLogger(name).handlers.clear()


@contextmanager
def told(cfg: DictConfig) -> Iterator[None]:
    """Context that logs a bad request as its error message alone and exits with code 2.

    A sweeper gets the exception, and HYDRA_FULL_ERROR=1 shows the traceback. The W&B run of the job ends, or the next
    job of a multirun would write into it. Passwords of storages are removed from Hydra's files and from messages.
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
