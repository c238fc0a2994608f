"""examples/cifar10_resnet.py runs on a miniature data folder, and says what is missing without one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.cifar_data import data_folder  # noqa: F401  (a fixture)


@pytest.fixture
def example() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "cifar10_resnet.py"
    spec = importlib.util.spec_from_file_location("cifar10_resnet", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ptq_and_qat(example: ModuleType, data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    options = [
        "--weights",
        "resnet8.safetensors",
        "--depth",
        "8",
        "--batch-size",
        "16",
        "--held-out",
        "32",
        "--calibration-batches",
        "2",
    ]
    rows = example.main(["--data", str(data_folder), *options])
    assert [name for name, *_ in rows] == ["float", "PTQ w4 mse a4 mse", "then QAT, 1 epochs"]
    sizes = [size for *_, size in rows]
    assert sizes[0] > 5 * sizes[1]
    assert sizes[1] == sizes[2]
    assert "effective bits" in capsys.readouterr().out


def test_without_data_it_says_how_to_get_it(example: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="hf download"):
        example.main(["--data", str(tmp_path)])
