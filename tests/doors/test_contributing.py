"""The code of CONTRIBUTING.md is the code that these tests run."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)


def lines(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.search(r"register_\w+", block + "register_none")[0])
def test_each_block_is_run_by_a_test(block: str) -> None:
    definitions = [part for part in re.split(r"\n\n\n(?=\S)", block) if part.strip()]
    code = [lines(path.read_text()) for path in Path(__file__).parent.glob("*.py") if path != Path(__file__)]
    for definition in definitions:
        assert any(lines(definition) in text for text in code), definition


def test_every_door_is_shown() -> None:
    found = set(re.findall(r"register_(\w+)\(|@register_(\w+)", "".join(BLOCKS)))
    assert {name for pair in found for name in pair if name} >= {
        "format",
        "layer",
        "range",
        "learned_range",
        "phase",
        "target",
        "picture",
    }


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.search(r"register_\w+", block + "register_none")[0])
def test_a_door_opens_with_public_names(block: str) -> None:
    tree = ast.parse(block)
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    used = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    overridden = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not [name for name in (*imported, *used, *overridden) if re.match(r"_(?!_)", name)]
