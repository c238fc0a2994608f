"""Studies in `sweeps/`: each begins with its command, is a config of lq-search, and runs."""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from lq_plugin.commands.options import SEARCH, kind_faults, stray_keys
from lq_plugin.commands.search import read_space

SWEEPS = Path(__file__).parents[2] / "sweeps"
STUDIES = sorted(SWEEPS.glob("*.yaml"))


def command(path: Path) -> list[str]:
    """Returns the words of the command in the file's first line."""
    return shlex.split(path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_first_line_is_its_command(path: Path) -> None:
    program, *words = command(path)
    assert program == "lq-search"
    assert words[: words.index("-m")][:4] == ["--config-dir", "sweeps", "--config-name", path.stem]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_it_is_a_config_of_lq_search(path: Path) -> None:
    with initialize_config_dir(str(SWEEPS), version_base="1.3"):
        given = [
            "hydra.searchpath=[pkg://lq_plugin.conf]",
            "paths.output_dir=out",
            *["data.folder=images"] * (path.stem == "image_folder"),
        ]
        cfg = compose(path.stem, given)
    assert kind_faults(cfg, SEARCH) == []
    assert stray_keys(cfg, SEARCH) == ([], [])
    assert read_space(cfg).weight is not None


def write_images(folder: Path) -> None:
    """Writes two classes of images, bright ones and dark ones, of two sizes and kinds of file."""
    from PIL import Image

    random = np.random.default_rng(0)
    for part, count in (("train", 40), ("val", 10)):
        for name, level in (("bright", 180), ("dark", 60)):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = (level + random.integers(-40, 40, (24 + number % 2 * 16, 32, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.{'png' if number % 2 else 'jpg'}")


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_two_trials(path: Path, tmp_path: Path) -> None:
    small = [
        "search.n_trials=2",
        "search.seeds=0",
        "search.progress=false",
        "float_epochs=1",
        f"paths.log_dir={tmp_path}",
    ]
    if path.stem == "image_folder":
        write_images(tmp_path / "images")
        small += [f"data.folder={tmp_path / 'images'}", "model.classes=2"]
    if path.stem == "detector":
        small += ["search.constraints=[]"]  # one epoch is not enough for its bound
    program = Path(sys.executable).with_name("lq-search")
    words = [str(program), "--config-dir", "sweeps", "--config-name", path.stem, *small]
    done = subprocess.run(
        words, cwd=SWEEPS.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (front,) = tmp_path.rglob("front.csv")
    rows = list(csv.DictReader(front.read_text().splitlines()))
    assert 1 <= len(rows) <= 2
    assert all((front.parent / "plans" / row["plan"]).is_file() for row in rows)
