"""Exports and runtimes refuse what they cannot do, before the work."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, load_checkpoint, prepare
from lq_plugin.errors import ExportError, PlanError
from lq_plugin.export import load_packed, save_packed, use_torchao, use_xnor
from lq_plugin.intent.spec import QuantSpec

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from lq_plugin.export import OpenVINOSession, export_onnx, onnx_session  # noqa: E402
from lq_plugin.export.codes import encode  # noqa: E402
from lq_plugin.export.onnx_file import write as export_module  # noqa: E402
from lq_plugin.export.onnx_file.containers import container, refusal  # noqa: E402


@pytest.fixture
def x():
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net(x):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    prepare(net, "w8a8")
    calibrate(net, [x])
    return net.eval()


@pytest.fixture
def no_work(monkeypatch):
    """Whatever is refused is refused before the graph is made."""
    monkeypatch.setattr(export_module, "float_graph", lambda *args: pytest.fail("the graph was made"))


@pytest.mark.parametrize(
    ("dtype", "why"),
    [
        (torch.bfloat16, "ONNX Runtime 1.32 has no kernels for bfloat16"),
        (torch.float64, "a file is float32 or float16"),
    ],
)
def test_other_precisions(net, x, tmp_path, no_work, dtype, why):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        ExportError,
        match=rf"Sequential is in {name} \(0.weight, 4 of 4 parameters\): {why}.*; call model.float\(\)",
    ):
        export_onnx(net.to(dtype), (x,), tmp_path / "net.onnx")


def test_float16_beside_what_it_does_not_go_with(net, x, tmp_path, no_work):
    net[0].half()
    with pytest.raises(ExportError, match="2 of 4 parameters.*one precision for all parameters"):
        export_onnx(net, (x,), tmp_path / "net.onnx")
    with pytest.raises(ExportError, match=r"without round_sums \(sums_from\)"):
        export_onnx(net.half(), (x.half(),), tmp_path / "net.onnx", sums_from=[x.half()])


@pytest.mark.parametrize(
    "write", [lambda net, x, path: export_onnx(net, (x,), path), lambda net, x, path: save_packed(net, path)]
)
def test_places_that_are_none(net, x, tmp_path, no_work, write):
    with pytest.raises(ExportError, match=r"cannot write .*net.file: there is no folder .*missing"):
        write(net, x, tmp_path / "missing" / "net.file")
    with pytest.raises(ExportError, match="it is a folder, give the name of a file"):
        write(net, x, tmp_path)


@pytest.mark.parametrize("names", [[], ["a", "b"], "a"])
def test_names_are_as_many_as_inputs(net, x, tmp_path, no_work, names):
    with pytest.raises(ExportError, match="input_names are 1, as many as there are tensors in inputs, got"):
        export_onnx(net, (x,), tmp_path / "net.onnx", input_names=names)


def test_inputs_are_arguments(net, x, tmp_path, no_work):
    with pytest.raises(ExportError, match=r"got a Tensor: write \(x,\)"):
        export_onnx(net, x, tmp_path / "net.onnx")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (lambda x: [], "there were no batches"),
        (
            lambda x: x,
            r"batch 0 has torch.float32 of shape \[16\] as input 0, the example has torch.float32 of shape \[4, 16\]",
        ),
        (lambda x: [x, x.double()], "batch 1 has torch.float64 of shape"),
        (lambda x: [x, x[:, :3]], r"batch 1 has torch.float32 of shape \[4, 3\]"),
        (lambda x: [(x, x[:, 0])], "batch 0 has 2 tensors, the model has 1 inputs; .* of \\(x, y\\) give x"),
        (lambda x: [{"x": x}], "batch 0 is a tensor or a tuple like inputs, got dict"),
    ],
)
def test_sums_from(net, x, tmp_path, no_work, batches, message):
    with pytest.raises(ExportError, match=f"(?s)sums_from: .*{message}"):
        export_onnx(net, (x,), tmp_path / "net.onnx", sums_from=batches(x))


def test_no_sums_is_said(net, x, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        export_onnx(net, (x,), tmp_path / "net.onnx", sums_from=iter([x, (x[:1],)]))
    assert "sums_from has no effect, no sum in the graph reads an integer convolution" in caplog.text


def test_after_use_torchao(net, x, tmp_path):
    pytest.importorskip("torchao")
    use_torchao(net)
    for write in (
        lambda: export_onnx(net, (x,), tmp_path / "net.onnx"),
        lambda: save_packed(net, tmp_path / "net.safetensors"),
    ):
        with pytest.raises(ExportError, match=r"Sequential was changed by use_torchao \(0, 2\).*export it before"):
            write()


def test_after_use_xnor(x, tmp_path):
    net = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    prepare(net, QuantPlan([Rule("0", weight="sign", input="sign")]))
    use_xnor(net, native=False)
    with pytest.raises(ExportError, match=r"changed by use_xnor \(0\)"):
        save_packed(net, tmp_path / "net.safetensors")


@pytest.mark.parametrize("content", [b"hello world", b""])
@pytest.mark.parametrize("saturates", [False, True])
def test_files_that_are_no_onnx(tmp_path, monkeypatch, content, saturates):
    from lq_plugin.export import runtime

    monkeypatch.setattr(runtime, "saturates", lambda: saturates)
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"net\.onnx"):
        onnx_session(path)
    pytest.importorskip("openvino")
    with pytest.raises(ExportError, match=r"OpenVINO cannot read .*net\.onnx: .*Unable to read the model") as caught:
        OpenVINOSession(path)
    assert "INT2" not in str(caught.value)
    assert "Exception from" not in str(caught.value)


def test_openvino_does_not_read_ragged_groups(tmp_path):
    pytest.importorskip("openvino")
    net, x = nn.Sequential(nn.Linear(40, 8)), torch.randn(2, 40)
    prepare(net, "int8 group16 ragged")
    calibrate(net, [x])
    export_onnx(net, (x,), tmp_path / "net.onnx")
    with pytest.raises(
        ExportError, match=r"groups that do not divide their axis \(0.weight_codes: \[40, 8\], groups of 16\).*; Dequ"
    ) as caught:
        OpenVINOSession(tmp_path / "net.onnx")
    assert "INT2" not in str(caught.value)


def test_openvino_names(net, x, tmp_path):
    pytest.importorskip("openvino")
    export_onnx(net, (x,), tmp_path / "net.onnx", input_names=["in"], output_names=["out"])
    session = OpenVINOSession(tmp_path / "net.onnx", threads=1)
    (every,), (named,) = session.run(None, {"in": x.numpy()}), session.run(["out"], {"in": x.numpy()})
    assert (every == named).all()
    names = "the graph has inputs in and outputs out"
    with pytest.raises(ExportError, match=f"{names}: there is no output 'nope'"):
        session.run(["nope"], {"in": x.numpy()})
    with pytest.raises(ExportError, match=f"(?s){names}: .*there is no input 'x'.*the input 'in' is missing"):
        session.run(None, {"x": x.numpy()})


def test_openvino_reads_arrays_of_any_kind(net, x, tmp_path):
    pytest.importorskip("openvino")
    export_onnx(net, (x,), tmp_path / "net.onnx", input_names=["x"])
    session = OpenVINOSession(tmp_path / "net.onnx", threads=1)
    whole = x.numpy()
    first = session.run(None, {"x": whole})[0]
    kept = first.copy()
    still = whole.copy()
    still.flags.writeable = False
    for same in (whole.astype("float64"), np.asfortranarray(whole), still, whole.repeat(2, axis=-1)[..., ::2]):
        np.testing.assert_array_equal(session.run(None, {"x": same})[0], kept)
    session.run(None, {"x": -whole})
    np.testing.assert_array_equal(first, kept)
    with pytest.raises(ExportError, match=r"the graph takes x: \[\?,.*; got x: \[2, 3\]"):
        session.run(None, {"x": np.zeros((2, 3), np.float32)})


def test_files_of_the_other_kind(net, tmp_path):
    packed, checkpoint = tmp_path / "net.safetensors", tmp_path / "net.ckpt"
    save_packed(net, packed)
    torch.save(net.state_dict(), checkpoint)
    with pytest.raises(PlanError, match=r"net.safetensors is a packed file, which lq_plugin.export.load_packed reads"):
        load_checkpoint(nn.Sequential(nn.Linear(16, 8)), packed)
    with pytest.raises(ExportError, match=r"net.ckpt is no packed file, .* which load_checkpoint reads"):
        load_packed(nn.Sequential(nn.Linear(16, 8)), checkpoint)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(
    "text",
    [
        *(
            "int4 per_channel",
            "int3 group4",
            "mx6",
            "mxint8",
            "mxfp4",
            "mxfp6_e3m2",
            "mxfp8_e4m3",
            "mxfp8_e5m2",
            "nvfp4",
        ),
        *("sign", "bwn", "twn", "ttq", "ttq per_channel", "kmeans4", "kmeans4 per_channel"),
    ],
)
def test_what_is_refused_is_known_before_the_weights_are(text, channels):
    spec = QuantSpec.parse(text)
    net = nn.Sequential(nn.Linear(32, channels))
    prepare(net, QuantPlan([Rule("0", weight=text)]))
    calibrate(net, [torch.randn(2, 32)])
    try:
        container(spec, encode(net[0].weight_quantizer, net[0].weight), "weight")
        expected = None
    except ExportError as error:
        expected = str(error)
    assert expected == (None if (reason := refusal(spec, channels)) is None else f"weight ({spec}): {reason}")
