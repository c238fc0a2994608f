"""Checkpoints of version 0.1 have no ranges of hidden states, which were float: they compute what they did."""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import QAT, QuantPlan, Rule, calibrate, load_checkpoint, prepare
from lq_plugin.errors import PlanError
from lq_plugin.model import quantizers
from lq_plugin.model.measure.cost import cost

ADDED = ("weight_hh_l0.input", "weight_ih_l1.input", "weight_hh_l1.input")
OLDER = "comes from a version without ranges for rnn.weight_hh_l0.input"
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
    pytest.mark.filterwarnings(f"ignore:.*{OLDER}"),
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
    assert ledger["rnn.weight_hh_l0"].reason == "the file comes from a version without these ranges, of its input"
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


def state_of(path: Path, plan: QuantPlan | str, hidden: int = 6) -> tuple[Path, torch.Tensor, int]:
    """Writes a state dict of a calibrated model; returns its path, its outputs and how many quantizers it has."""
    model, x = Sequences(), next(iter(data()))[0]
    if hidden != 6:
        model.rnn, model.head = nn.LSTM(4, hidden, num_layers=2, batch_first=True), nn.Linear(hidden, 2)
    prepare(model, plan)
    calibrate(model, [x])
    torch.save(model.state_dict(), path)
    with torch.no_grad():
        return path, model.eval()(x), len(quantizers(model))


@pytest.fixture
def old_plan() -> QuantPlan:
    return QuantPlan([*QuantPlan.parse("w8a8").rules, FLOAT_STATE])


@pytest.mark.parametrize("order", [["old", "new"], ["new", "old", "new"], ["new", "old", "old"]])
def test_files_of_both_versions_one_after_another(tmp_path: Path, old_plan: QuantPlan, order: list[str]) -> None:
    files = {"old": state_of(tmp_path / "old.pt", old_plan), "new": state_of(tmp_path / "new.pt", "w8a8")}
    assert files["new"][2] == files["old"][2] + len(ADDED)
    model, x = Sequences(), next(iter(data()))[0]
    for version in order:
        path, wanted, count = files[version]
        ledger = load_checkpoint(model, path, "w8a8")
        assert len(quantizers(model)) == count, version
        assert torch.equal(model.eval()(x), wanted), version
    fresh = Sequences()
    load_checkpoint(fresh, path, "w8a8")
    assert list(model.state_dict()) == list(fresh.state_dict())
    reason = ledger["rnn.weight_hh_l0"].reason or ""
    assert ("comes from a version" in reason) == (version == "old")


def test_a_bare_state_dict_brings_the_quantizers_back(tmp_path: Path, old_plan: QuantPlan) -> None:
    model, (new, wanted, count) = Sequences(), state_of(tmp_path / "new.pt", "w8a8")
    load_checkpoint(model, state_of(tmp_path / "old.pt", old_plan)[0], "w8a8")
    model.load_state_dict(torch.load(new, weights_only=True))
    assert len(quantizers(model)) == count
    assert torch.equal(model.eval()(next(iter(data()))[0]), wanted)


@pytest.mark.parametrize("first", ["new", "old"])
def test_after_an_old_file_of_another_width_the_model_is_as_before(
    tmp_path: Path, old_plan: QuantPlan, first: str
) -> None:
    path, wanted, count = state_of(tmp_path / "first.pt", "w8a8" if first == "new" else old_plan)
    other, _, _ = state_of(tmp_path / "other.pt", old_plan, hidden=8)
    new, _, _ = state_of(tmp_path / "other_new.pt", "w8a8", hidden=8)
    model, x = Sequences(), next(iter(data()))[0]
    load_checkpoint(model, path, "w8a8")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for wrong in (other, new):
        with pytest.raises(RuntimeError, match="size mismatch"):
            load_checkpoint(model, wrong, "w8a8")
        assert len(quantizers(model)) == count
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert torch.equal(model.eval()(x), wanted)


def test_a_file_without_some_of_the_ranges_is_refused(tmp_path: Path) -> None:
    path, _, _ = state_of(tmp_path / "new.pt", "w8a8")
    state = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in state.items() if "weight_hh_l1.input_quantizer" not in key}, path)
    model = Sequences()
    with pytest.raises(PlanError, match=r"only some of the ranges(.|\n)*rnn\.weight_hh_l1\.input") as caught:
        load_checkpoint(model, path, "w8a8")
    assert "weight_hh_l0" not in str(caught.value)
    assert not quantizers(model)


def test_an_old_file_under_a_plan_that_quantizes_states_warns_once(tmp_path: Path, old_plan: QuantPlan) -> None:
    path, _, _ = state_of(tmp_path / "old.pt", old_plan)
    with pytest.warns(UserWarning, match=OLDER) as caught:
        load_checkpoint(Sequences(), path, "w8a8")
    (message,) = [str(warning.message) for warning in caught]
    assert all(f"rnn.{name}" in message for name in ADDED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ledger = load_checkpoint(Sequences(), path, old_plan)
    assert ledger["rnn.weight_hh_l0"].reason == "the plan leaves its input float"


def test_one_module_resumes_from_files_of_both_versions(written: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    new, x = Sequences(), next(iter(data()))[0]
    trainer = L.Trainer(max_epochs=1, default_root_dir=tmp_path, callbacks=[QAT("w8a8")], **QUIET)
    trainer.fit(new, data())
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    model, callback = Sequences(), QAT("w8a8")
    trainer = L.Trainer(default_root_dir=tmp_path, callbacks=[callback], **QUIET)
    for path in (written[0], tmp_path / "new.ckpt"):
        trainer.validate(model, data(), ckpt_path=path, verbose=False)
    assert callback.ledger["rnn.weight_hh_l0"].plan.input is not None
    assert torch.equal(model.eval()(x), new.eval()(x))
