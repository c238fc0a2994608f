"""The rooms of the library: a file imports only from rooms above it, and stays short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lq_plugin"
ROOMS = [
    "lazy", "errors", "files", "csv_text", "passwords", "hydra_files", "lightning_packages", "instantiate",
    "extras", "export_options", "plain_yaml", "schedule", "granularity", "formats", "spec", "layer_plan",
    "short_plan", "name_pattern", "plan",
    "native", "functional", "metrics", "ranges",
    "quantizers", "layers", "model", "plots", "export", "report",
    "callbacks", "search", "demo", "export_command", "cli", "__init__",
]  # fmt: skip
ALLOWED_LENGTH = 450
#: All else asks `lightning_packages`: either package may be the user's.
USES_LIGHTNING = {"lightning_packages", "demo"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Modules imported when the file is: what stands inside functions or under TYPE_CHECKING is not."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_upwards(path):
    room = room_of(path)
    for module in imports(path):
        top, _, rest = module.partition(".")
        if top == "lq_plugin" and rest:
            other = rest.split(".")[0]
            assert ROOMS.index(other) <= ROOMS.index(room), f"{path.name} ({room}) imports {module}"
        if top in ("lightning", "pytorch_lightning"):
            assert room in USES_LIGHTNING, f"{path.name} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short_and_do_not_print(path):
    text = path.read_text()
    assert len(text.splitlines()) <= ALLOWED_LENGTH
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


@pytest.mark.parametrize("module", ["lq_plugin", "lq_plugin.plan", "lq_plugin.model", "lq_plugin.ranges"])
def test_the_core_does_not_import_lightning(module):
    heavy = ("lightning", "optuna", "wandb", "hydra", "matplotlib")
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
