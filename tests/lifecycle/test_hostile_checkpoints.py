"""Checkpoints that are damaged, of another model, or hold code: one error that names the file, and the model is as
before."""

import copy
import os

import lightning as L
import pytest
import torch
from torch import nn

from lq_plugin import QAT, PlanError, load_checkpoint, prepare
from lq_plugin.model.checkpoint import load_float_weights
from lq_plugin.model.prepare import quantized_layers
from tests.callbacks.conftest import Data, Module


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of a QAT run, as bytes."""
    folder = tmp_path_factory.mktemp("saved")
    L.seed_everything(0, verbose=False)
    fit = L.Trainer(
        accelerator="cpu", callbacks=[QAT("w4 lsq a4 ema")], max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    fit.fit(Module(), datamodule=Data())
    fit.save_checkpoint(folder / "qat.ckpt")
    return (folder / "qat.ckpt").read_bytes()


def assert_unchanged(module, before):
    assert not quantized_layers(module)
    assert type(module.net.conv) is nn.Conv2d
    state = module.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], value) for key, value in before.items())


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("load", [load_checkpoint, load_float_weights])
def test_truncated(load, share, saved, tmp_path):
    path = tmp_path / "cut.ckpt"
    path.write_bytes(saved[: int(share * len(saved))])
    module = Module()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(PlanError, match=r"cut\.ckpt cannot be read"):
        load(module, path)
    assert_unchanged(module, before)
    assert path.stat().st_size == int(share * len(saved))


@pytest.mark.parametrize("name", ["text.ckpt", "weights.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00.", bytes(4096)]
)
def test_not_a_checkpoint_at_all(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    module = Module()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(PlanError, match=name):
        load_checkpoint(module, path, "w4a8")
    assert_unchanged(module, before)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        torch.zeros(3),
        {"state_dict": [torch.zeros(3)]},
        {1: torch.zeros(3)},
        {"state_dict": {}, "callbacks": {"Other": {"plan": "a day at the sea"}}},
        {"state_dict": {}, "callbacks": [1]},
        {"state_dict": {}, "callbacks": {"QAT": {"plan": {"rules": "w4"}}}},
        {
            "state_dict": {},
            "callbacks": {"QAT": {"plan": {"rules": [{"match": "*", "weight": "int4", "_target_": "os.system"}]}}},
        },
    ],
    ids=str,
)
def test_foreign_content(content, tmp_path):
    torch.save(content, tmp_path / "foreign.ckpt")
    module = Module()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(PlanError):
        load_checkpoint(module, tmp_path / "foreign.ckpt")
    assert_unchanged(module, before)


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_not_run(zipped, tmp_path):
    torch.save(
        {"state_dict": Code(tmp_path / "spoiled")}, tmp_path / "code.ckpt", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(PlanError, match=r"code\.ckpt cannot be read"):
        load_checkpoint(Module(), tmp_path / "code.ckpt", "w4a8")
    assert not (tmp_path / "spoiled").exists()


def test_of_another_model(saved, tmp_path):
    """Strict, and the tensors that would fit are not loaded either."""
    path = tmp_path / "qat.ckpt"
    path.write_bytes(saved)
    module = Module()
    module.net.fc = nn.Linear(8, 5)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for net.fc.weight"):
        load_checkpoint(module, path)
    assert_unchanged(module, before)
    module.net.more = nn.Linear(8, 5)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="net.more"):
        load_checkpoint(module, path)
    assert_unchanged(module, before)
    with pytest.raises(PlanError, match=r"net\.convolution"):
        load_checkpoint(module, path, {"rules": [{"match": "net.convolution", "weight": "int4"}]})
    assert_unchanged(module, before)


def test_with_another_plan_than_it_was_written_with(saved, tmp_path):
    path = tmp_path / "qat.ckpt"
    path.write_bytes(saved)
    module = Module()
    before = copy.deepcopy(module.state_dict())
    for plan in ("w4a4", "w4 lsq", "w4 per_tensor lsq a4 ema", "bwn"):
        with pytest.raises(RuntimeError, match="Missing key|Unexpected key|size mismatch"):
            load_checkpoint(module, path, plan)
        assert_unchanged(module, before)


def test_before_its_ranges_were_found(tmp_path):
    module = Module()
    prepare(module, "w4 mse a8")
    torch.save(module.state_dict(), tmp_path / "early.pt")
    fresh = Module()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(PlanError, match=r"early\.pt has no ranges for .*net\.conv\.weight"):
        load_checkpoint(fresh, tmp_path / "early.pt", "w4 mse a8")
    assert_unchanged(fresh, before)


def test_a_missing_file_is_just_that(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_checkpoint(Module(), tmp_path / "nowhere.ckpt")
