"""README from top to bottom, in an empty folder, with the library as it is installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.examples.conftest import EXAMPLES
from tests.wheels import build_wheel, install_alone

README = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.slow
Run = Callable[..., str]


def block(kind: str, word: str) -> str:
    """The first block of README of a kind that has a word in it."""
    found = re.findall(rf"^```{kind}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return next(text for text in found if word in text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stranger")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Run:
    home = tmp_path_factory.mktemp("installed")
    commands = install_alone(build_wheel(home / "wheel"), home / "venv")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"COLUMNS": "160"}

    def run(command: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(commands / command), *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    where = run("python", "-c", "import lq_plugin; print(lq_plugin.__file__)")
    assert where.startswith(str(home / "venv"))
    return run


# Each goes on in the folder of the one before.


def test_the_first_lines_train_save_and_pack(run: Run, folder: Path) -> None:
    (folder / "first.py").write_text(block("python", "runs/first"))
    run("python", "first.py")
    written = re.findall(r"^\| `(runs/[^`]+)` \|", README, re.MULTILINE)
    assert len(written) == 3
    assert all((folder / name).exists() for name in written)
    # 4 bits a weight: less than a quarter of the checkpoint's float weights.
    sizes = [(folder / name).stat().st_size for name in written[:2]]
    assert sizes[1] < sizes[0] / 4


def test_a_plan_is_explained_before_anything_is_trained(run: Run, folder: Path) -> None:
    (folder / "plan.yaml").write_text(block("yaml", "schedule: {"))
    assert "lq-explain plan.yaml digits_cnn" in README
    shown = run("lq-explain", "plan.yaml", "digits_cnn")
    assert "int4 per_channel mse" in shown
    assert "int8 per_channel" in shown


def test_the_checkpoint_becomes_a_file_that_is_proved(run: Run, folder: Path) -> None:
    line = next(line for line in block("sh", "lq-train").splitlines() if line.startswith("lq-export"))
    for mine, name in (
        ("quantized.ckpt", "runs/first/quantized.ckpt"),
        ("my_model", "digits_cnn"),
        ("my_data", "digits"),
    ):
        line = line.replace(mine, name)
    run("lq-export", *line.split()[1:], "output=digits.onnx")
    assert (folder / "digits.onnx").is_file()
    certificate = json.loads((folder / "digits.onnx.certificate.json").read_text())
    assert certificate["verification"]["agreement"] > 0.99


def test_runs_and_searches_from_the_command_line(run: Run, folder: Path) -> None:
    lines = re.sub(" +", " ", block("sh", "lq-train"))
    assert "lq-train experiment=digits_qat" in lines
    assert "lq-search experiment=digits_search" in lines
    run("lq-train", "experiment=digits_qat", "trainer.max_epochs=1", "float_epochs=1")
    run("lq-search", "experiment=digits_search", "float_epochs=1", "search.n_trials=4", "search.seeds=2")
    (front,) = (folder / "logs").rglob("front.csv")
    plans = sorted((front.parent / "plans").glob("*.yaml"))
    assert plans
    assert all(yaml.safe_load(path.read_text())["rules"] for path in plans)
    page = run("lq-report", str(front.parent))
    assert "report.html" in page
    # The one root of all that commands write.
    assert "`logs/<task>/runs/<date>`" in README
    assert {path.name for path in folder.iterdir()} >= {"logs", "runs"}


def test_the_demo_ends_with_its_table_and_page(run: Run, folder: Path) -> None:
    assert "python -m lq_plugin.demo" in block("sh", "lq_plugin.demo")
    shown = run("python", "-m", "lq_plugin.demo")
    assert "QAT of the searched plan" in shown
    # Sizes of README's table; accuracies differ from processor to processor.
    for row in ("float", "PTQ, `w4 minmax a4 minmax`", "PTQ, `w2 mse a8 mse`"):
        size = next(line for line in README.splitlines() if line.startswith(f"| {row} |")).split("|")[5].strip()
        assert size in shown, row
    pages = [path for path in folder.rglob("report.html") if "digits_demo" in str(path)]
    assert pages
