"""Packed files with a right checksum and wrong content: refused before anything is allocated, the model untouched."""

import copy
import hashlib
import json
import zlib

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn

from lq_plugin import QuantPlan, QuantSpec, Rule, calibrate, prepare
from lq_plugin.errors import ExportError, SpecError
from lq_plugin.export import load_packed, save_packed
from lq_plugin.export.codes import encode, layout
from lq_plugin.intent.spec import PerGroup
from lq_plugin.quantizers import make_weight_quantizer
from tests.export.test_packed import SPECS


def net(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4))


def packed_content(path):
    """Metadata, blob and table of a file that `load_packed` reads into `net()`."""
    model = net()
    plan = [Rule("*", weight="int4 affine per_channel", input="uint8 affine"), Rule("3", weight="mxfp6_e3m2")]
    prepare(model, QuantPlan(plan))
    calibrate(model, [torch.randn(32, 16)])
    save_packed(model.eval(), path)
    with safe_open(path, framework="numpy") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return file.metadata(), arrays["blob"], json.loads(zlib.decompress(arrays["table"].tobytes()))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return packed_content(tmp_path_factory.mktemp("packed") / "net.safetensors")


def rewritten(packed, path, change):
    """The file with its content changed, and a checksum that fits."""
    metadata, blob, table = copy.deepcopy(packed)
    table = change(metadata, blob, table) or table
    content = table if isinstance(table, bytes) else zlib.compress(json.dumps(table).encode())
    arrays = {"blob": blob, "table": np.frombuffer(content, np.uint8)}
    digest = hashlib.blake2b(metadata["plan"].encode(), digest_size=16)
    for array in arrays.values():
        digest.update(array.tobytes())
    save_file(arrays, path, metadata | {"checksum": digest.hexdigest()})
    return path


def part(layer, key, index, value):
    def change(metadata, blob, table):
        place = table["weights"][layer]["parts"][key]
        place[index] = value(place[index]) if callable(value) else value

    return change


def entry(layer, key, value):
    def change(metadata, blob, table):
        table["weights"][layer][key] = value

    return change


def floats(find, value):
    """Puts a number where a float is."""

    def change(metadata, blob, table):
        offset = find(table)[0]
        blob[offset : offset + 4] = np.frombuffer(np.float32(value).tobytes(), np.uint8)

    return change


def state(key, value):
    def change(metadata, blob, table):
        table["state"][key] = value

    return change


def planned(old, new):
    def change(metadata, blob, table):
        assert old in metadata["plan"]
        metadata["plan"] = metadata["plan"].replace(old, new)

    return change


def deep(metadata, blob, table):
    return zlib.compress(b'{"weights":' + b"[" * 200_000 + b"]" * 200_000 + b',"state":{}}')


def bomb(metadata, blob, table):
    return zlib.compress(b'{"weights":{},"state":{},"x":"' + b" " * 2**30 + b'"}')


HOSTILE = {
    "a shape of terabytes": part("0", "codes", 1, [2**40, 16]),
    "a shape that overflows 64 bits": part("0", "codes", 1, [2**32, 2**32, 4]),
    "a shape of another layer": entry("0", "shape", [2**30, 16]),
    "negative sizes": part("0", "codes", 1, [-8, -16]),
    "an offset before the blob": part("0", "codes", 0, -8),
    "an offset behind the blob": part("0", "codes", 0, 2**50),
    "an offset that is no integer": part("0", "codes", 0, 0.5),
    "no bits": part("0", "codes", 2, 0),
    "bits that no code has": part("0", "codes", 2, 17),
    "bits that the format has not": part("0", "codes", 2, 3),
    "a truth value for bits": part("0", "codes", 2, True),
    "a dtype that there is not": part("0", "scale", 2, "float128"),
    "scales as integers": part("0", "scale", 2, 8),
    "a place of two numbers": lambda m, b, t: t["weights"]["0"]["parts"].update(scale=[0, [8, 1]]),
    "a part too few": lambda m, b, t: t["weights"]["0"]["parts"].pop("zero_point") and None,
    "a part too many": lambda m, b, t: t["weights"]["0"]["parts"].update(coarse=[0, [1, 1], "float32"]),
    "a group of a billion channels": entry("0", "spec", "int4 affine group1000000000 ragged"),
    "a format that there is not": entry("0", "spec", "int4 per_lunch"),
    "a format of inputs": entry("0", "spec", "xnor"),
    "a spec that is no text": entry("0", "spec", {"format": ["int"]}),
    "tied to itself": lambda m, b, t: t["weights"].update({"0": {"tied": "0"}}),
    "tied to nothing": lambda m, b, t: t["weights"].update({"0": {"tied": "there"}}),
    "tied to a list": lambda m, b, t: t["weights"].update({"0": {"tied": [1]}}),
    "a scale of NaN": floats(lambda t: t["weights"]["0"]["parts"]["scale"], np.nan),
    "a scale of 0": floats(lambda t: t["weights"]["0"]["parts"]["scale"], 0.0),
    "a negative scale": floats(lambda t: t["weights"]["0"]["parts"]["scale"], -0.1),
    "an infinite exponent": lambda m, b, t: b.__setitem__(slice(t["weights"]["3"]["parts"]["exponent"][0], None), 255),
    "a range of Inf": floats(lambda t: t["state"]["0.input_quantizer.scale"], np.inf),
    "a negative range": floats(lambda t: t["state"]["0.input_quantizer.scale"], -0.1),
    "a bias of gigabytes": state("0.bias", [0, [2**31], "float32"]),
    "a bias that is packed": state("0.bias", [0, [8], 4]),
    "a bias that is no place": state("0.bias", {"0": 1}),
    "a tensor of no model": state("nobody.bias", [0, [2], "float32"]),
    "no weights": lambda m, b, t: {"state": {}},
    "a table that is a number": lambda m, b, t: b"1",
    "a table without an end": deep,
    "a table of a gigabyte": bomb,
    "a plan of another model": planned('"match":"3"', '"match":"there"'),
    "a plan that is no plan": lambda m, b, t: m.update(plan='{"rules": 3}'),
}


@pytest.mark.parametrize(
    "case",
    [name if name != "a table of a gigabyte" else pytest.param(name, marks=pytest.mark.slow) for name in HOSTILE],
)
def test_it_is_refused_and_the_model_is_as_before(case, packed, tmp_path):
    path = rewritten(packed, tmp_path / "net.safetensors", HOSTILE[case])
    model, x = net().eval(), torch.randn(3, 16)
    before, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ExportError, match="net.safetensors is"):
        load_packed(model, path)
    assert [type(module) for module in model] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), before)


def test_unchanged_it_is_read(packed, tmp_path):
    load_packed(net(), rewritten(packed, tmp_path / "net.safetensors", lambda metadata, blob, table: None))


def test_a_wrong_model_stays_float(packed, tmp_path):
    path = rewritten(packed, tmp_path / "net.safetensors", lambda metadata, blob, table: None)
    model, x = net(12), torch.randn(3, 16)
    keys, training = list(model.state_dict()), model.training
    with pytest.raises(
        ExportError, match=r"is of another model(.|\n)*0\.weight has shape \[12, 16\] here and \[8, 16\] in the file"
    ):
        load_packed(model, path)
    assert list(model.state_dict()) == keys
    assert model.training == training
    assert type(model[0]) is nn.Linear
    assert torch.equal(model.eval()(x), net(12).eval()(x))


def test_the_same_model_gives_the_same_bytes(tmp_path):
    files = []
    for name in ("a", "b"):
        model = net()
        prepare(model, "w4a8")
        calibrate(model, [torch.ones(4, 16)])
        save_packed(model, tmp_path / name)
        save_packed(model, tmp_path / f"{name}2")
        files += [(tmp_path / name).read_bytes(), (tmp_path / f"{name}2").read_bytes()]
    assert len(set(files)) == 1


@pytest.mark.parametrize("spec", SPECS)
def test_the_layout_is_that_of_the_parts(spec):
    spec = QuantSpec.parse(spec)
    for shape in ((8, 40), (3, 17, 3, 3), (1, 20), (2, 5)):
        weight = torch.randn(shape)
        if spec.kind.codebook and isinstance(spec.granularity, PerGroup) and shape[1] % spec.granularity.group_size:
            with pytest.raises(SpecError, match="a codebook is of a whole group, and 4 does not divide its"):
                layout(spec, shape)
            continue
        quantizer = make_weight_quantizer(spec, "weight", shape)
        quantizer.calibrate(weight)
        parts = encode(quantizer, weight)
        assert layout(spec, shape) == {key: (tuple(part.values.shape), part.bits) for key, part in parts.items()}
