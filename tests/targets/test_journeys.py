"""Pages of the guide that need the large runtimes, run as they are written."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore")


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("weight", ["int8 per_channel", "int4 per_channel mse"])
def test_a_cnn_to_a_phone(weight, tmp_path, capsys):
    pytest.importorskip("executorch", reason="make test-targets installs it")
    pytest.importorskip("litert_torch", reason="make test-targets installs it")
    arguments = ["--output", str(tmp_path), "--float-epochs", "3", "--weight", weight]
    found = load("cnn_to_a_phone").main(arguments)
    assert found["test/acc"] > 0.85
    assert found["executorch"] > 0.99
    assert found["litert"] > 0.99
    assert capsys.readouterr().out.count("6 of 6 products of integers") == 2
