"""The site is built without a warning, its links lead somewhere, every format and public name has its place."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lq_plugin
from lq_plugin.intent.formats import FORMATS

ROOT = Path(__file__).parents[2]
SITE_CODE = ROOT / "docs" / "site"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"site_{name}", SITE_CODE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # a dataclass looks for its module there
    spec.loader.exec_module(module)
    return module


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="b.html#there">1</a> <a href="#here">2</a> <img src="c.png">'
    )
    (tmp_path / "b.html").write_text('<p id="their"><a href="https://example.org">3</a>')
    assert load("check_links").faults(tmp_path) == ["a.html: b.html#there", "a.html: c.png"]


def test_levels_are_those_of_the_papers() -> None:
    levels = load("levels")
    # E2M1 (OCP MX, table 5) at the block scale 2^(0 - 2) of a largest number of 1.75.
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert levels.staircase("mxfp4").levels.tolist() == [x / 4 for x in (*(-p for p in positive[:0:-1]), *positive)]
    assert levels.staircase("sign").levels.tolist() == [-1, 1]
    d = 1.75 / -8
    assert sorted(levels.staircase("q4_0").levels.tolist()) == sorted(d * k for k in range(-8, 8))
    assert levels.draw("sign", "dark").startswith("<svg")


@pytest.mark.slow
def test_the_site_is_built_and_its_links_hold(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="the site needs lq_plugin[docs]")
    pytest.importorskip("material", reason="the site needs lq_plugin[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    site = tmp_path / "site"
    assert load("check_links").faults(site) == []
    formats = " ".join(path.read_text(encoding="utf-8") for path in (site / "formats").glob("*.html"))
    for name, kind in FORMATS.items():
        assert f"<code>{kind.spellings(name)[0]}</code>" in formats, name
    reference = (site / "api" / "lq_plugin.html").read_text(encoding="utf-8")
    assert {name for name in lq_plugin.__all__ if not re.search(rf'id="[\w.]+\.{name}"', reference)} == set()
    assert "&gt;&gt;&gt;" in reference  # examples are code
    assert not re.search(r'(?:src|href)="https?://(?!example)[^"]*\.(?:js|css|woff2?)"', reference), (
        "loads from elsewhere"
    )
    shutil.rmtree(site)
