"""The wheel has everything, and Hydra's plugin costs nothing."""

import email
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from zipfile import ZipFile

import pytest

import lq_plugin
from tests.wheels import build_wheel

ROOT = Path(__file__).parents[1]


def configs(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_everything_and_nothing_else(wheel):
    names = set(ZipFile(wheel).namelist())
    source = wheel.parent / "source"
    held = {
        path.relative_to(source).as_posix()
        for room in ("lq_plugin", "hydra_plugins")
        for path in (source / room).rglob("*.*")
    }
    assert held <= names
    assert {
        "lq_plugin/py.typed",
        "lq_plugin/native/variants.h",
        "lq_plugin/layers/integer/integer.cpp",
    } <= held
    assert {f"lq_plugin/conf/{name}" for name in configs(source / "conf")} <= names
    assert {"lq_plugin/conf/__init__.py", "lq_plugin/conf/shared/__init__.py"} <= names
    assert "hydra_plugins/__init__.py" not in names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"lq_plugin", "hydra_plugins"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_citation_has_the_version():
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None
    assert cited[1] == lq_plugin.__version__


def test_links_on_the_package_index_are_absolute(wheel):
    archive = ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    described = email.message_from_bytes(archive.read(metadata))
    links = re.findall(r"\]\(([^)\s]+)\)", described.get_payload())
    assert len(links) > 10
    assert [link for link in links if "://" not in link] == []
    assert described["Description-Content-Type"] == "text/markdown"
    repository = dict(url.split(", ", 1) for url in described.get_all("Project-URL"))["Repository"]
    ours = {
        link.removeprefix(f"{repository}/").partition("/main/")[2].partition("#")[0]
        for link in links
        if repository in link
    }
    assert {path for path in ours if not (ROOT / path).exists()} == set()


def test_the_installed_configs_are_those_of_the_repository():
    assert configs(Path(str(files("lq_plugin.conf")))) == configs(ROOT / "conf")


def test_commands_exist():
    commands = {
        entry.name: entry for entry in entry_points(group="console_scripts") if entry.value.startswith("lq_plugin.")
    }
    assert set(commands) == {"lq-explain", "lq-export", "lq-report", "lq-search", "lq-sensitivity", "lq-train"}
    assert all(callable(entry.load()) for entry in commands.values())


@pytest.mark.slow
def test_a_wheel_alone_runs_from_another_folder(wheel, tmp_path):
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    assert subprocess.run(pip, check=False).returncode == 0
    # PYTHONPATH: the wheel's files come before those of the environment.
    code = "import lq_plugin; from lq_plugin.commands.entry import train; print('#', lq_plugin.__file__); train()"
    command = [sys.executable, "-c", code, "experiment=digits_qat", "--cfg", "job"]
    env = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"# {target}")
    assert "_target_: lq_plugin.QAT" in done.stdout
    # The kernels compile from what the wheel brings.
    code = "import lq_plugin, pathlib; from lq_plugin.native.build import compiled, cache; "
    code += "print([compiled(path, cache()).stem for path in pathlib.Path(lq_plugin.__file__).parent.rglob('*.cpp')])"
    kernels = {"LQ_NATIVE_CACHE": str(tmp_path / "kernels")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env | kernels, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {name in done.stdout for name in ("fake_quantize", "integer", "xnor")} == {True}
    info = subprocess.run(
        [*command[:3], "--info", "searchpath"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert [info.stdout.count(f"pkg://lq_plugin.{room} ") for room in ("conf", "conf.shared")] == [1, 1]


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("hydra_plugins.lq_plugin_searchpath", ["torch"]),
        ("hydra_plugins.lq_sweeper", ["torch", "optuna", "lightning"]),
        ("lq_plugin.conf.shared", ["torch", "lightning", "optuna", "wandb", "matplotlib"]),
        ("lq_plugin.commands.entry", ["torch", "lightning", "optuna", "wandb", "matplotlib"]),
    ],
)
def test_what_hydra_imports_at_each_start_is_light(module, heavy):
    code = f"import sys, {module}; print(sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_quantizing_draws_nothing():
    """matplotlib and Pillow are imported where a picture is made (torchmetrics looks for them by itself)."""
    code = """
import sys
from lq_plugin import PTQ, QAT, Export, QuantMonitor, load_checkpoint, prepare
from lq_plugin.export import save_packed
from lq_plugin.report import model_report, write_page
drawing = ("lq_plugin.plots.", "lq_plugin.report.pictures")
sys.exit(", ".join(name for name in sys.modules if name.startswith(drawing)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_only_pictures_import_matplotlib():
    package = ROOT / "lq_plugin"
    drawing = {path for path in package.rglob("*.py") if "\nfrom matplotlib" in path.read_text(encoding="utf-8")}
    assert drawing == {*(package / "plots").glob("[!_]*.py"), package / "report" / "pictures.py"}


def test_the_demo_needs_no_test_extra():
    """`make demo` installs the library and its data set alone, and no browser."""
    dry = subprocess.run(
        ["make", "-n", "-W", "pyproject.toml", "demo"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert "[demo]" in dry
    assert not {word for word in ("[test", "chromium", "apt-get") if word in dry}
