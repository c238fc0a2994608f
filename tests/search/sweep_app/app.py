"""A Hydra application without a model: `python tests/search/sweep_app/app.py -m hydra/sweeper=lq ...`."""

import math
import os
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from optuna import TrialPruned


class Unpicklable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


def task(cfg: DictConfig) -> float | tuple[float, float] | None:
    from lq_plugin.search.sweep.job import current_trial

    if cfg.log:
        with Path(cfg.log).open("a") as file:
            file.write(f"{HydraConfig.get().job.num}\n")
    if cfg.kind == "raises":
        raise Unpicklable(f"no luck with x={cfg.x}", "")
    if cfg.kind == "exits" and not (marker := Path(f"{cfg.log}.exited")).exists():
        marker.touch()
        time.sleep(1.0)
        os._exit(9)
    if cfg.kind == "slow":
        time.sleep(0.5)
    if (special := {"nan": math.nan, "none": None}.get(cfg.kind, 0.0)) != 0.0:
        return special
    for step in range(cfg.steps):
        trial = current_trial()
        assert trial is not None
        trial.report(cfg.x, step)
        if trial.should_prune():
            raise TrialPruned
    value = (cfg.x - 0.3) ** 2 + cfg.net.width / 100
    return (value, float(cfg.net.width)) if cfg.two else value


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | tuple[float, float] | None:
    return task(cfg)


if __name__ == "__main__":
    main()
