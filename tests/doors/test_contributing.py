"""The code of CONTRIBUTING.md is the code that these tests run."""

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
