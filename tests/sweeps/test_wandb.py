"""Sweeps of W&B: what its agent starts is a run of lq-train that Hydra and the plan take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_module
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from lq_plugin.commands.options import TRAIN, kind_faults, stray_keys
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.utilities.hydra_files import plain

SWEEPS = sorted((Path(__file__).parents[2] / "sweeps" / "wandb").glob("*.yaml"))


def choices(parameter: dict[str, Any]) -> list[Any]:
    """Returns the values of a parameter that a sweep may choose; of a continuous one its ends."""
    if "values" in parameter:
        return list(parameter["values"])
    return [parameter["value"]] if "value" in parameter else [parameter["min"], parameter["max"]]


def command(sweep: dict[str, Any], **chosen: Any) -> list[str]:
    """Returns what W&B's agent runs for these choices, other parameters at their first one."""
    values = {name: chosen.get(name, choices(parameter)[0]) for name, parameter in sweep["parameters"].items()}
    given = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    found: list[str] = []
    for part in create_sweep_command(list(sweep["command"])):
        if part == "${args_no_hyphens}":
            found += given["args_no_hyphens"]
        elif part != "${env}":
            found.append(part)
    return found


def test_there_are_sweeps() -> None:
    assert len(SWEEPS) >= 2


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_choice_is_a_config_of_lq_train(path: Path) -> None:
    sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert sweep["method"] in ("bayes", "grid", "random")
    assert sweep["metric"]["goal"] in ("maximize", "minimize")
    for name, parameter in sweep["parameters"].items():
        for value in choices(parameter):
            program, *overrides = command(sweep, **{name: value})
            assert program == sweep["program"] == "lq-train"
            with initialize_config_module("lq_plugin.conf", version_base="1.3"):
                cfg = compose("train", [*overrides, "paths.output_dir=out"])
            assert kind_faults(cfg, TRAIN) == []
            assert stray_keys(cfg, TRAIN) == ([], [])
            quantizer = next(cfg.callbacks[key] for key in ("lq_qat", "lq_ptq") if key in cfg.callbacks)
            QuantPlan.parse(plain(quantizer)["plan"])


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_two_runs_of_the_agents_command(path: Path, tmp_path: Path) -> None:
    sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    small = ["model.width=4", "trainer.max_epochs=1", "logger.wandb.offline=true"]
    lq_train = Path(sys.executable).with_name("lq-train")
    env = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    if "float_checkpoint" in sweep["parameters"]:
        first = [str(lq_train), "experiment=digits_float", "paths.output_dir=runs/float", *small[:2]]
        subprocess.run(first, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=300)
    (name,) = [n for n in ("quantization", "callbacks.lq_ptq.plan") if n in sweep["parameters"]]
    for number, value in enumerate(choices(sweep["parameters"][name])[-2:]):
        # The agent's environment: the run is the sweep's.
        run = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": f"run{number}"}
        _, *overrides = command(sweep, **{name: value})
        done = subprocess.run(
            [str(lq_train), *overrides, *small],
            cwd=tmp_path,
            env=env | run,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        (log,) = tmp_path.rglob(f"run-run{number}.wandb")
        assert log.stat().st_size > 0
        assert f"{sweep['metric']['name']} " in done.stdout + done.stderr
