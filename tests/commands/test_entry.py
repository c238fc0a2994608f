"""Every command knows its version, its purpose and the modules of the current folder."""

import os
import subprocess
import sys

import pytest

from lq_plugin import __version__
from lq_plugin.commands import entry
from lq_plugin.commands.explain import explain
from lq_plugin.commands.report import report

COMMANDS = {"train": "lq-train", "search": "lq-search", "sensitivity": "lq-sensitivity", "export": "lq-export"}


@pytest.mark.parametrize("name", COMMANDS)
def test_version(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [COMMANDS[name], "--version"])
    getattr(entry, name)()
    assert capsys.readouterr().out == f"lq_plugin {__version__}\n"


@pytest.mark.parametrize("run", [explain, report])
def test_version_of_the_others(run, capsys):
    with pytest.raises(SystemExit) as ended:
        run(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"lq_plugin {__version__}\n"


def test_modules_of_the_current_folder_are_found_after_installed_ones(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("NAME = 'mine'\n")
    (tmp_path / "yaml.py").write_text("raise AssertionError\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lq-train"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")

    @entry.command
    def run():
        import mine

        return mine.NAME, sys.path[-1], os.environ["PYTHONPATH"]

    assert run() == ("mine", str(tmp_path), f"elsewhere{os.pathsep}{tmp_path}")
    assert run()[2] == f"elsewhere{os.pathsep}{tmp_path}"
    del sys.modules["mine"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_purpose_and_examples(name, tmp_path):
    code = (
        f"import sys; sys.argv = ['{COMMANDS[name]}', '--help']; from lq_plugin.commands.entry import {name}; {name}()"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    purpose, examples = shown.split("Examples:")
    assert len(purpose.split()) > 8
    assert f"  {COMMANDS[name]} " in examples.partition("==")[0]
    assert "== Config ==" in shown
