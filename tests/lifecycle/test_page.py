"""LIFECYCLE.md names tests that exist, and says which of them are slow."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
NAMED = re.findall(r"`([\w/]+\.py)::(test_\w+)`( \*)?", (TESTS / "LIFECYCLE.md").read_text(encoding="utf-8"))


def functions(path):
    return {
        node.name: node
        for node in ast.parse((TESTS / path).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }


def test_every_test_that_is_named_exists():
    assert len(NAMED) > 50
    missing = [
        f"{path}::{name}" for path, name, _ in NAMED if not (TESTS / path).is_file() or name not in functions(path)
    ]
    assert not missing


def test_slow_tests_are_marked():
    for path, name, star in NAMED:
        decorators = [ast.unparse(decorator) for decorator in functions(path)[name].decorator_list]
        assert ("pytest.mark.slow" in decorators) == bool(star), name


def test_every_test_of_this_folder_is_named():
    here = {
        f"lifecycle/{path.name}": functions(f"lifecycle/{path.name}")
        for path in Path(__file__).parent.glob("test_*.py")
    }
    unnamed = {(path, name) for path, found in here.items() for name in found if name.startswith("test_")} - {
        (p, n) for p, n, _ in NAMED
    }
    known = {"test_page.py", "test_models.py", "test_checkpoint_matrix.py", "test_hostile_checkpoints.py"}
    # What tests the tests themselves, or stands in the docstring of another.
    assert {Path(path).name for path, _ in unnamed} <= known, unnamed
