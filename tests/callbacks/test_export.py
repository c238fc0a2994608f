"""Files that the Export callback writes, read back."""

import pytest
import torch

from lq_plugin import PTQ, QAT, Export
from lq_plugin.errors import ExportError
from lq_plugin.export import load_packed, onnx_session
from tests.callbacks.conftest import Data, Module


def test_a_packed_file_after_a_fit(trainer, tmp_path):
    module, data = Module(), Data()
    export = Export(tmp_path / "files" / "model.safetensors")
    trainer(QAT("w4a8"), export).fit(module, datamodule=data)
    assert export.size == export.path.stat().st_size
    assert module.training, "as Lightning left it"
    loaded = Module().eval()
    load_packed(loaded, export.path)
    x = data.x[:8]
    with torch.no_grad():
        assert torch.equal(loaded(x), module.eval()(x))


@pytest.mark.parametrize("round_sums", [False, True])
def test_onnx_after_an_evaluation(trainer, tmp_path, round_sums):
    module, data = Module(), Data()
    path = tmp_path / "model.onnx"
    trainer(PTQ("w8a8"), Export(path, round_sums=round_sums, batches=2)).validate(module, datamodule=data, verbose=False)
    session, x = onnx_session(path), data.x[:5]
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = module.eval()(x)
    assert (torch.from_numpy(got) - expected).abs().max() < (0.05 if round_sums else 0.01) * expected.abs().max()


def test_other_suffixes_are_refused():
    with pytest.raises(ExportError, match=r"ends in .safetensors or .onnx, got 'model.pt'"):
        Export("model.pt")
