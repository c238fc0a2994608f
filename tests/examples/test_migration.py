"""examples/migration.md: every line of the right column runs."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from lq_plugin import calibrate, prepare
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.export import save_packed
from lq_plugin.model.prepare import quantized_layers
from tests.examples.conftest import EXAMPLES

PAGE = (EXAMPLES / "migration.md").read_text(encoding="utf-8")
(IMPORTS,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
LINES = re.findall(r"^\| .* \| `([^`]+)` \|$", PAGE, re.MULTILINE)
FAST: dict[str, Any] = {
    "accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "logger": False,
    "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
}  # fmt: skip


def test_every_row_has_a_line_that_runs_or_says_why_there_is_none() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| before", "|---"))]
    without = [row for row in rows if not any(f"`{line}`" in row for line in LINES)]
    assert len(LINES) > 25
    assert all("| nothing: " in row for row in without), without


@pytest.mark.filterwarnings("ignore:QuantMonitor. the Trainer has no logger")
@pytest.mark.parametrize("line", LINES)
def test_a_line_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    batches = [torch.rand(8, 1, 8, 8)]
    given = DigitsCNN(width=8)
    prepare(given, "w4a8")
    calibrate(given, batches)
    save_packed(given, "given.safetensors")
    space: dict[str, Any] = {"model": DigitsCNN(width=8), "data": DigitsDataModule(), "batches": batches}
    exec(IMPORTS, space)
    space["Trainer"] = partial(lightning.Trainer, **FAST)
    space["search"] = partial(space["search"], trainer=space["Trainer"], progress=False)
    # As many iterations as a test has time for.
    fewer = re.sub(r'"iterations": \d+', '"iterations": 5', line).replace(
        '"by": "layer"', '"by": "layer", "iterations": 5'
    )
    result = eval(fewer, space) if ";" not in fewer else exec(fewer, space)
    if line.startswith("search"):
        assert len(result.candidates) == 4
    else:
        assert quantized_layers(space["model"])
    written = re.findall(r'"(model\.\w+)"', line)
    assert all((tmp_path / name).stat().st_size > 0 for name in written)
