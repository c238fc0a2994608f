"""Target `mlx`: its files hold what the model computes with; MLX and mlx-lm read them (`make test-targets`)."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.commands.export import run_export
from lq_plugin.errors import ExportError, PlanError
from lq_plugin.export import certify, export_model, verify
from lq_plugin.export.mlx_file.words import packed
from lq_plugin.export.planned import refuse_for_target
from lq_plugin.export.request import Request
from lq_plugin.export.target import TARGETS
from tests.export.test_cli import composed

SPECS = {
    **{
        f"int{bits} group{size}": ("affine", bits, size)
        for bits, size in ((2, 32), (3, 64), (4, 128), (5, 32), (8, 64))
    },
    "int6 group32 narrow mse": ("affine", 6, 32),
    "uint4 group64": ("affine", 4, 64),
    "int4 group32 affine": ("affine", 4, 32),
    "int7 group32": ("affine", 8, 32),
    "int4 group64:4": ("affine", 4, 64),
    "int4 per_channel": ("affine", 4, 128),
    "int8": ("affine", 8, 128),
    "q4_0": ("affine", 4, 32),
    "q8_0": ("affine", 8, 32),
    "tq2_0": ("affine", 2, 128),
    "twn": ("affine", 2, 128),
    "bwn": ("affine", 2, 128),
    "mxint8": ("affine", 8, 32),
    "mxfp4": ("mxfp4", 4, 32),
    "mxfp4:rceil": ("mxfp4", 4, 32),
    "mxfp8": ("mxfp8", 8, 32),
    "nvfp4:unit": ("nvfp4", 4, 16),
    "nvfp4:four_six:unit": ("nvfp4", 4, 16),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 256)
        self.inner, self.norm, self.head = nn.Linear(256, 128), nn.LayerNorm(128), nn.Linear(128, 20, bias=False)

    def forward(self, x):
        return self.head(self.norm(torch.relu(self.inner(self.embedding(x)))))


def quantized(weight, model=None, match="*"):
    torch.manual_seed(0)
    model = Net() if model is None else model
    prepare(model, QuantPlan([Rule(match, weight=weight)]))
    calibrate(model, [ids()])
    return model.eval()


def ids():
    return torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(1))


def stream(words, bits):
    """Numbers of a row, bit for bit: a whole number in Python."""
    whole = sum(int(word) << (32 * index) for index, word in enumerate(words))
    return [whole >> (bits * index) & (2**bits - 1) for index in range(32 * len(words) // bits)]


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def by_hand(tensors, layer, mode, bits, group):
    """The values of a weight, in float64."""
    words, scales = tensors[f"{layer}.weight"].numpy(), tensors[f"{layer}.scales"].numpy()
    codes = np.array([stream(row, bits) for row in words])
    if mode == "affine":
        biases = tensors[f"{layer}.biases"].double().numpy()
        return codes * scales.astype(float).repeat(group, 1) + biases.repeat(group, 1)
    if mode == "nvfp4":
        blocks = torch.tensor(scales).view(torch.float8_e4m3fn).double().numpy()
        return E2M1[codes & 7] * np.where(codes & 8, -1, 1) * blocks.repeat(group, 1)
    if mode == "mxfp4":
        values = E2M1[codes & 7] * np.where(codes & 8, -1, 1)
    else:
        values = torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    return values * 2.0 ** (scales.astype(float) - 127).repeat(group, 1)


@pytest.mark.parametrize("spec", SPECS)
def test_words_scales_and_biases_are_the_weight(spec, tmp_path):
    model, path = quantized(spec), tmp_path / "model.safetensors"
    size = export_model(model, path, target="mlx")
    assert size == path.stat().st_size + (tmp_path / "config.json").stat().st_size
    tensors, config = load_file(path), json.loads((tmp_path / "config.json").read_text())
    mode, bits, group = SPECS[spec]
    for layer in ("inner", "head", "embedding"):
        # The largest group that divides its rows and shares a scale.
        settings = config["quantization"][layer]
        assert (settings["mode"], settings["bits"]) == (mode, bits)
        assert settings["group_size"] == group
        expected = model.get_submodule(layer).quantized_weight().detach().double().numpy()
        found = by_hand(tensors, layer, mode, bits, group)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1.3e-7 * np.abs(expected).max() * (mode == "affine"))
    assert torch.equal(tensors["norm.weight"], model.norm.weight)
    assert torch.equal(tensors["inner.bias"], model.inner.bias)
    assert {key for key in config["quantization"] if "." not in key} >= {"group_size", "bits", "mode"}


def test_numbers_lie_in_a_row_from_the_lowest_bit():
    codes = np.random.default_rng(0).integers(0, 8, (2, 64))
    assert [stream(row, 3) for row in packed(codes, 3)] == codes.tolist()


@pytest.mark.parametrize("spec", SPECS)
def test_mlx_computes_the_layers_of_the_model(spec, tmp_path):
    mx = pytest.importorskip("mlx.core")
    model, path = quantized(spec), tmp_path / "model.safetensors"
    export_model(model, path, target="mlx")
    arrays, config = mx.load(str(path)), json.loads((tmp_path / "config.json").read_text())["quantization"]
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(2))
    for layer, inputs in (("inner", x), ("head", x[:, :128])):
        parts = [arrays.get(f"{layer}.{part}") for part in ("weight", "scales", "biases")]
        y = np.array(mx.quantized_matmul(mx.array(inputs.numpy()), *parts, transpose=True, **config[layer]))
        bias = 0.0 if model.get_submodule(layer).bias is None else model.get_submodule(layer).bias.detach().numpy()
        expected = model.get_submodule(layer)(inputs).detach().numpy()
        np.testing.assert_allclose(y + bias, expected, rtol=0, atol=2e-5)
    result = certify(model, path, [ids()], Net, target="mlx")
    assert result.verification.agreement == 1.0
    assert result.verification.largest_difference < 2e-5
    assert result.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spec", ["int4 group64", "int3 group32 mse", "mxfp4", "mxfp8", "nvfp4:unit"])
def test_mlx_lm_loads_the_folder(spec, tied, tmp_path):
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    pytest.importorskip("transformers")
    from tests.export.language import Language, language, tokens

    model = language(tie_word_embeddings=True) if tied else Language()
    prepare(model, QuantPlan([Rule("*", weight=spec), Rule("*layers.0.mlp.up_proj", weight="int8 group32")]))
    calibrate(model, [tokens()])
    model.eval()
    path = tmp_path / "model.safetensors"
    export_model(model, path, target="mlx")
    loaded, config = utils.load_model(tmp_path)
    assert config["quantization"]["model.layers.0.mlp.up_proj"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    y = torch.from_numpy(np.array(loaded(mx.array(tokens().numpy())).astype(mx.float32)))
    with torch.no_grad():
        expected = model(tokens())
    torch.testing.assert_close(y, getattr(expected, "logits", expected), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("weight", "inputs", "message"),
    [
        ("int4 group16", None, "rows of 256 elements under 'group16' are no groups of 128, 64, 32; the nearest"),
        ("int12 per_channel", None, "MLX has integers of at most 8 bits; the nearest that fits is 'int8 group64'"),
        (
            "kmeans4",
            None,
            "MLX has integers times a scale, mxfp4, mxfp8_e4m3, nvfp4; the nearest that fits is 'int4 group64'",
        ),
        ("nvfp4", None, "layers of MLX have no scale above those of the blocks; the nearest"),
        ("int4 group64", "int8 ema", "MLX computes products of float inputs: leave them float"),
    ],
)
def test_a_plan_is_refused_before_any_work(weight, inputs, message):
    model = nn.Sequential(nn.Linear(256, 8))
    prepare(model, QuantPlan([Rule("*", weight=weight, input=inputs)]))
    with pytest.raises(PlanError, match=message):
        refuse_for_target(model, QuantPlan([Rule("*", weight=weight)], target="mlx"))


def test_layers_that_mlx_does_not_pack_are_named():
    model = nn.Sequential(nn.Conv2d(32, 4, 1), nn.Linear(40, 4))
    prepare(model, "int4 per_channel")
    faults = TARGETS["mlx"].faults(Request(model=model))
    assert (
        "0.weight (int4 per_channel): MLX has packed weights of linear layers and embeddings, here is Conv2d" in faults
    )
    assert any("1.weight (int4 per_channel): rows of 40 elements" in fault for fault in faults)


def test_one_weight_has_one_spec(tmp_path):
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.inner, self.norm = nn.Identity(), nn.Identity()
            self.head = nn.Linear(256, 50, bias=False)
            self.head.weight = self.embedding.weight

    model, path = quantized("int4 group64", Tied(), "head"), tmp_path / "model.safetensors"
    with pytest.raises(ExportError, match=r"head.weight \(int4 group64\) is that of embedding \(float\), and MLX"):
        export_model(model, path, target="mlx")
    export_model(quantized("int4 group64", Tied()), path, target="mlx")
    assert "head.weight" not in load_file(path)


def test_a_float_tensor_of_two_names_is_read_once(tmp_path):
    pytest.importorskip("mlx.core")

    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(256, 256), nn.Linear(256, 50, bias=False)
            self.norm, self.head.weight = nn.Identity(), self.embedding.weight

    model, path = quantized("int4 group64", Tied(), "inner"), tmp_path / "model.safetensors"
    export_model(model, path, target="mlx")
    assert len({"head.weight", "embedding.weight"} & load_file(path).keys()) == 1
    assert verify(model, path, [ids()], Tied, target="mlx").largest_difference < 2e-5


def test_configs_of_others_and_damaged_files(tmp_path):
    model, path = quantized("int4 group64"), tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ExportError, match=r"config\.json is of another model: give a folder without one"):
        export_model(model, path, target="mlx")
    assert not path.exists()
    (tmp_path / "config.json").unlink()
    export_model(model, path, target="mlx")
    export_model(model, path, target="mlx")  # over its own
    pytest.importorskip("mlx.core")
    with pytest.raises(ExportError, match=r"give verify\(\.\.\., fresh=lambda"):
        verify(model, path, [ids()], target="mlx")
    with pytest.raises(ExportError, match="of another model"):
        verify(model, path, [ids()], lambda: nn.Sequential(nn.Linear(4, 4)), target="mlx")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ExportError, match=r"cannot read .*model\.safetensors"):
        verify(model, path, [ids()], Net, target="mlx")


def test_the_command_writes_it(tmp_path):
    plan = "plan={rules: [{match: 'head.2', weight: int4 per_channel}], target: mlx}"
    path = run_export(composed(tmp_path, "to=mlx", plan, "~data", "phases=[calibrate]", "model.width=16"))
    assert path == tmp_path / "model.safetensors"
    assert load_file(path)["head.2.weight"].dtype == torch.uint32
