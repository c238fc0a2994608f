"""Entry points of the commands that Hydra configures: `lq-train`, `lq-search`, `lq-sensitivity` and `lq-export`.

Hydra composes their configs from `pkg://lq_plugin.conf` and the user's own `--config-dir`.

Nothing heavy is imported before a run starts: `lq-train --help` and tab completion stay quick.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from typing import Any

import hydra
from omegaconf import DictConfig

from lq_plugin.commands.common import check_request, log_once, told
from lq_plugin.commands.export import check_export, run_export
from lq_plugin.commands.options import SEARCH, SENSITIVITY, TRAIN
from lq_plugin.commands.train import optimized_metric, run as run_train

log = logging.getLogger(__name__)


def command(run: Callable[[], Any]) -> Callable[[], Any]:
    """Returns an entry point that knows `--version`, and finds modules in the current folder, as `python -m` does."""

    @wraps(run)
    def entry() -> Any:
        if "--version" in sys.argv[1:]:
            sys.stdout.write(f"lq_plugin {version('lq_plugin')}\n")
            return None
        folder = os.getcwd()
        if folder not in sys.path:
            # Last: a file there hides no installed package. Jobs of a launcher are processes of their own.
            sys.path.append(folder)
            known = os.environ.get("PYTHONPATH")
            os.environ["PYTHONPATH"] = folder if not known else f"{known}{os.pathsep}{folder}"
        return run()

    return entry


@command
@hydra.main(version_base="1.3", config_path="pkg://lq_plugin.conf", config_name="train")
def train(cfg: DictConfig) -> float | None:
    """`lq-train`: builds what the config names, then fits, validates and tests it.

    Returns:
        The metric named by `optimized_metric`, for a sweep; None when none is named.
    """
    with told(cfg):
        check_request(cfg, TRAIN)
        return optimized_metric(run_train(cfg), cfg.optimized_metric)


@command
@hydra.main(version_base="1.3", config_path="pkg://lq_plugin.conf", config_name="search")
def search(cfg: DictConfig) -> None:
    """`lq-search`: searches the bits of one model; see `lq_plugin.search`."""
    with told(cfg):
        check_request(cfg, SEARCH)
        log_once()
        from lq_plugin.commands.search import run as run_search

        try:
            run_search(cfg)
        except KeyboardInterrupt:
            log.warning("stopped; the same command goes on with the study in %s", cfg.paths.output_dir)
            sys.exit(130)


@command
@hydra.main(version_base="1.3", config_path="pkg://lq_plugin.conf", config_name="sensitivity")
def sensitivity(cfg: DictConfig) -> None:
    """`lq-sensitivity`: measures the damage of each choice to each tensor (`lq_plugin.search.sensitivity.measure`)."""
    with told(cfg):
        check_request(cfg, SENSITIVITY)
        log_once()
        from lq_plugin.commands.sensitivity import run as run_sensitivity

        run_sensitivity(cfg)


@command
@hydra.main(version_base="1.3", config_path="pkg://lq_plugin.conf", config_name="export")
def export(cfg: DictConfig) -> None:
    """`lq-export`: writes a checkpoint, or float weights and a plan, to a file of any target."""
    with told(cfg):
        # Before Lightning is imported, which takes longer than all of these checks.
        check_export(cfg)
        log_once()
        run_export(cfg)
