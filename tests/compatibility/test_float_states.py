"""Checkpoints of version 0.1 have no ranges of hidden states, which were float: they compute what they did."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import QAT, QuantPlan, Rule, calibrate, load_checkpoint, prepare
from lq_plugin.model import quantizers
from lq_plugin.model.measure.cost import cost

ADDED = ("weight_hh_l0.input", "weight_ih_l1.input", "weight_hh_l1.input")
FLOAT_STATE = Rule(r"re:.*weight_(hh|ih_l[1-9]).*", input="float")
QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


class Sequences(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = nn.LSTM(4, 6, num_layers=2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0].mean(1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data() -> DataLoader:
    x = torch.randn(32, 5, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum((1, 2)).gt(0).long()), batch_size=8)


def as_0_1_wrote_it(path: Path) -> None:
    """Takes out of a checkpoint what version 0.1 had not, after a run that left it float, and gives it 0.1's plan."""
    content = torch.load(path, weights_only=True)
    assert not any(
        f"{name.replace('.input', '.input_quantizer')}." in key for key in content["state_dict"] for name in ADDED
    )
    for state in content["callbacks"].values():
        if "plan" in state:
            state["plan"]["rules"] = state["plan"]["rules"][:1]
    torch.save(content, path)


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A checkpoint of 0.1 and the outputs of its model."""
    plan = QuantPlan([*QuantPlan.parse("w8a8").rules, FLOAT_STATE])
    model, path = Sequences(), tmp_path / "old.ckpt"
    trainer = L.Trainer(max_epochs=1, default_root_dir=tmp_path, callbacks=[QAT(plan)], **QUIET)
    trainer.fit(model, data())
    trainer.save_checkpoint(path)
    as_0_1_wrote_it(path)
    with torch.no_grad():
        return path, model.eval()(next(iter(data()))[0])


def test_loaded_it_computes_what_it_did(written: tuple[Path, torch.Tensor]) -> None:
    path, wanted = written
    model = Sequences()
    ledger = load_checkpoint(model, path)
    assert torch.equal(model.eval()(next(iter(data()))[0]), wanted)
    names = {quantizer.name for quantizer in quantizers(model)}
    assert "rnn.weight_ih_l0.input" in names
    assert not {f"rnn.{name}" for name in ADDED} & names
    assert ledger["rnn.weight_hh_l0"].reason == "the plan leaves its input float"
    assert cost(model)["rnn.weight_hh_l1"].input_bits == 32
    assert prepare(model, "w8a8").same_layers(ledger), "prepared again it stays as it is"


def test_training_and_evaluation_go_on_with_it(written: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    path, wanted = written
    x, y = next(iter(data()))
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    trainer = L.Trainer(default_root_dir=tmp_path, callbacks=[QAT("w8a8")], **QUIET)
    (logged,) = trainer.validate(Sequences(), loader, ckpt_path=path, verbose=False)
    assert logged["loss"] == pytest.approx(nn.functional.cross_entropy(wanted, y).item(), rel=1e-6)
    model, callback = Sequences(), QAT("w8a8")
    trainer = L.Trainer(max_epochs=2, default_root_dir=tmp_path, callbacks=[callback], **QUIET)
    trainer.fit(model, data(), ckpt_path=path)
    assert not {f"rnn.{name}" for name in ADDED} & {quantizer.name for quantizer in quantizers(model)}
    assert callback.ledger["rnn.weight_hh_l0"].plan.input is None
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    again = Sequences()
    load_checkpoint(again, tmp_path / "again.ckpt")
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_checkpoints_of_this_version_keep_their_states(tmp_path: Path) -> None:
    model, x = Sequences(), next(iter(data()))[0]
    prepare(model, "w8a8")
    calibrate(model, [x])
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = Sequences()
    load_checkpoint(other, tmp_path / "state.pt", "w8a8")
    assert {f"rnn.{name}" for name in ADDED} <= {quantizer.name for quantizer in quantizers(other)}
    assert torch.equal(other.eval()(x), model.eval()(x))
