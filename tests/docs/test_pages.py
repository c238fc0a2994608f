"""The site's own pages: their code runs, their messages are printed, their commands and settings exist."""

from __future__ import annotations

import re
import shlex
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import wandb
import yaml
from hydra.errors import HydraException

from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from tests.examples.test_migration import FAST
from tests.examples.test_pages import brief_trainers

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md"))
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
pytestmark = pytest.mark.filterwarnings("ignore:QuantMonitor. the Trainer has no logger")


def blocks(text: str, kind: str) -> list[str]:
    return [
        re.sub(f"^{indent}", "", body, flags=re.MULTILINE) for indent, name, body in BLOCK.findall(text) if name == kind
    ]


def space() -> dict[str, Any]:
    torch.manual_seed(0)
    batches = [torch.rand(8, 1, 8, 8)]
    found: dict[str, Any] = {
        "model": DigitsCNN(width=4),
        "data": DigitsDataModule(),
        "batches": batches,
        "x": batches[0][:2],
    }
    exec("from lq_plugin import *; from lq_plugin.export import *", found)
    return found | {
        "torch": torch,
        "Trainer": partial(lightning.Trainer, **FAST),
        "MyModule": partial(DigitsCNN, width=4),
    }


@pytest.mark.parametrize(
    "path",
    [
        # The first page always, the others where there is time.
        pytest.param(path, marks=() if path.stem == "start" else pytest.mark.slow)
        for path in PAGES
        if path.stem != "faq" and blocks(path.read_text(encoding="utf-8"), "python")
    ],
    ids=lambda path: path.stem,
)
def test_python_of_a_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    given = space()
    brief_trainers(monkeypatch)
    try:
        for text in blocks(path.read_text(encoding="utf-8"), "python"):
            exec(text, given)
    finally:
        # The page's own process would end here, and its run with it.
        wandb.finish()
    written = re.findall(r"^\| `(runs/[^`]+)` \|", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert all((tmp_path / name).is_file() for name in written), written


ENTRIES = re.findall(
    r"^## ((?!Questions)[^\n]*)\n(.*?)(?=^## )", (DOCS / "faq.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)


@pytest.mark.filterwarnings("ignore:.*weights_only.*", "ignore:.*Checkpoint directory.*")
@pytest.mark.parametrize(("title", "text"), ENTRIES, ids=[title for title, _ in ENTRIES])
def test_a_message_is_what_its_code_raises(
    title: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = space() | {"DigitsCNN": DigitsCNN}
    (shown,), code = blocks(text, "text"), blocks(text, "python")[-1]
    with pytest.raises((ValueError, RuntimeError, HydraException)) as raised:
        exec(code, given)
    message = " ".join(str(raised.value).split())
    for part in shown.split("\n...\n"):
        head, found, message = message.partition(" ".join(part.split()))
        assert found, (part, head[:500])
    for advice in blocks(text, "python")[:-1]:
        exec(advice, given)  # what the entry says to write instead


def test_there_are_entries() -> None:
    assert len(ENTRIES) > 20


def test_commands_exist() -> None:
    known = {entry.name for entry in entry_points(group="console_scripts") if entry.value.startswith("lq_plugin.")}
    for path in PAGES:
        for line in "\n".join(blocks(path.read_text(encoding="utf-8"), "sh")).splitlines():
            assert not line or shlex.split(line)[0] in known | {"pip", "wandb", "optuna-dashboard"}, line
        for text in blocks(path.read_text(encoding="utf-8"), "yaml"):
            assert yaml.safe_load(text)
