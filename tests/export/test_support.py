"""The table of what targets hold is that of the guide, and says what the targets do."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lq_plugin import calibrate, prepare
from lq_plugin.commands.explain import explain
from lq_plugin.errors import ExportError
from lq_plugin.export import export_model
from lq_plugin.export.support import held, markdown, specs
from lq_plugin.export.target import TARGETS
from lq_plugin.intent.spec import QuantSpec

GUIDE = Path(__file__).parents[2] / "examples" / "targets.md"


def test_the_guide_has_the_tables():
    text = GUIDE.read_text(encoding="utf-8")
    start = text.index("### Weights")
    assert text[start:] == markdown(), f"write {GUIDE.name} anew below '### Weights': lq-explain --targets"


def test_every_target_and_every_format_has_a_place():
    table = markdown()
    assert all(f"`{name}`" in table for name in TARGETS)
    assert len(specs("weight")) > 20


@pytest.mark.parametrize("text", ["int8 per_channel", "int4 group32", "ttq", "mx6", "bwn"])
@pytest.mark.parametrize("name", ["onnx", "tensorrt", "packed"])
def test_what_the_table_says_is_what_a_file_gets(name, text, tmp_path):
    """A linear layer is written where the table has it, and refused where it has not."""
    pytest.importorskip("onnx")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256)).eval()
    prepare(net, text)
    calibrate(net, ())
    path = tmp_path / f"net{TARGETS[name].suffix}"
    if "Linear" in held(TARGETS[name], "weight", QuantSpec.parse(text)):
        assert export_model(net, path, (torch.randn(2, 256),), target=name) > 0
    else:
        with pytest.raises(ExportError, match=r"0\.weight"):
            export_model(net, path, (torch.randn(2, 256),), target=name)


def test_the_command_prints_the_table_and_refuses_a_plan(capsys):
    with pytest.raises(SystemExit) as ended:
        explain(["--targets"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == markdown()
    assert explain(["w8a8", "digits_cnn", "--target", "tensorrt"]) == 0
    shown = capsys.readouterr().out
    assert "int8 ema" in shown
    assert "uint8" not in shown
    assert explain(["w4 group16 ragged a8", "digits_cnn", "--target", "tensorrt"]) == 2
    error = capsys.readouterr().err
    assert "target 'tensorrt' cannot hold DigitsCNN under its plan" in error
    assert "the nearest that fits is" in error
    assert explain(["w8a8", "digits_cnn", "--target", "tensort"]) == 2
    assert "Did you mean 'tensorrt'" in capsys.readouterr().err
