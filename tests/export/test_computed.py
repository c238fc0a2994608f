"""Layers whose weight is computed are refused by every export, until they are made plain."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from lq_plugin import calibrate, prepare
from lq_plugin.errors import ExportError
from lq_plugin.export import export_onnx, load_packed, save_packed, use_torchao
from lq_plugin.export.onnx_file.float_model import inference_copy


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    parametrizations.weight_norm(net[0])
    prepare(net, "w8a8")
    calibrate(net, [torch.randn(16, 8)])
    return net.eval()


def test_refused_with_the_reason_and_what_helps(model: nn.Module, tmp_path: Path) -> None:
    for export in (
        lambda: save_packed(model, tmp_path / "model.safetensors"),
        lambda: export_onnx(model, (torch.randn(2, 8),), tmp_path / "model.onnx"),
    ):
        with pytest.raises(ExportError, match=r"0: its weight is computed .*remove_parametrizations"):
            export()
    assert not list(tmp_path.iterdir())
    assert "computed" in use_torchao(model)["0"]


def test_made_plain_it_is_exported(model: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(5, 8)
    expected = model(x)
    parametrize.remove_parametrizations(model[0], "weight")
    assert torch.equal(model(x), expected)
    save_packed(model, tmp_path / "model.safetensors")
    other = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    load_packed(other, tmp_path / "model.safetensors")
    assert torch.equal(other.eval()(x), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    "kind", [weight_norm, spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)]
)
def test_layers_left_float_are_copied_after_a_training_step(kind) -> None:
    """The hooks of old keep a weight with a gradient function in the module, which torch refuses to copy."""
    torch.manual_seed(0)
    net, x = nn.Sequential(kind(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4)), torch.randn(5, 8)
    prepare(net, {"rules": [{"match": "2", "weight": "int8 per_channel", "input": "uint8 affine"}]})
    calibrate(net, [x])
    net.train()(x).sum().backward()
    computed = vars(net[0])["weight"]
    copied = inference_copy(net)
    assert vars(net[0])["weight"] is computed
    assert computed.grad_fn is not None
    assert torch.equal(copied(x), net.eval()(x))
