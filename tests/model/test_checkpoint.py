"""Loading quantized checkpoints without a Trainer."""

import lightning as L
import pytest
import torch

from lq_plugin import PTQ, QAT, PlanError, load_checkpoint
from tests.callbacks.conftest import Data, Module


@pytest.fixture
def fitted(tmp_path):
    L.seed_everything(0, verbose=False)
    module = Module()
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    trainer = L.Trainer(callbacks=[QAT("w4 lsq a4 ema")], max_epochs=1, enable_checkpointing=False, **options)
    trainer.fit(module, datamodule=Data())
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    return module.eval(), tmp_path


def test_bit_equal_from_every_kind_of_file(fitted):
    module, folder = fitted
    x = Data().x
    for name, plan in (("full.ckpt", None), ("weights.ckpt", "w4 lsq a4 ema"), ("state.pt", "w4 lsq a4 ema")):
        fresh = Module()
        load_checkpoint(fresh, folder / name, plan)
        assert torch.equal(fresh.eval()(x), module(x))


def test_what_cannot_be_loaded_is_explained(fitted):
    _, folder = fitted
    with pytest.raises(PlanError, match="holds no plan"):
        load_checkpoint(Module(), folder / "weights.ckpt")
    torch.save(Module().state_dict(), folder / "float.pt")
    with pytest.raises(PlanError, match="float checkpoint"):
        load_checkpoint(Module(), folder / "float.pt", "w4 lsq a4 ema")
    with pytest.raises(RuntimeError, match="size mismatch|Missing key|Unexpected key"):
        load_checkpoint(Module(), folder / "full.ckpt", "w4a4")


def test_a_file_with_code_in_it_is_refused(tmp_path):
    torch.save({"state_dict": {}, "callbacks": {"PTQ": PTQ("w8a8")}}, tmp_path / "code.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        load_checkpoint(Module(), tmp_path / "code.ckpt")
