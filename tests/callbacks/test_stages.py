"""Precision lowered step by step, stochastic rounding and distillation, in real Trainers and across a resume."""

import shutil

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lq_plugin import QAT, PlanError, QuantMonitor, QuantPlan, Rule, load_checkpoint, prepare
from lq_plugin.callbacks.distill import Distillation
from lq_plugin.model import quantized_layers
from tests.callbacks.conftest import Data, Module, ResumableLoader

LOWERING = [
    Rule("*", weight="int8 per_channel", input="uint8 affine"),
    Rule("*", weight="int4 per_channel mse", start="epoch 1"),
    Rule("*", weight="int2 per_channel lsq", input="uint4 affine", start="step 9"),
]
TO_BINARY = [
    Rule("net.conv*", weight="float", input="uint8 affine stochastic"),
    Rule("net.conv*", weight="ttq", start="step 3"),
    Rule("net.conv*", weight="sign stochastic:1", start="epoch 2"),
]


class Watch(L.Callback):
    """The spec in force and the number of weight values, at the end of each batch."""

    def __init__(self, layer):
        self.layer, self.seen = layer, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        layer = dict(quantized_layers(pl_module))[self.layer]
        current = layer.weight_quantizer.current
        self.seen.append(
            (trainer.global_step - 1, current and str(current.spec), len(layer.quantized_weight().unique()))
        )


def test_each_stage_starts_at_its_moment(trainer, data):
    module, watch = Module(), Watch("net.conv2")
    trainer(QAT(QuantPlan(LOWERING)), watch, max_epochs=3).fit(module, datamodule=data)
    steps = len(data.train_dataloader())
    for step, spec, values in watch.seen:
        wanted = (
            "int2 per_channel lsq" if step >= 9 else "int4 per_channel mse" if step >= steps else "int8 per_channel"
        )
        assert spec == wanted
        # 8 filters, each with its own scale.
        assert values <= 8 * 2 ** int(spec[3])
    assert {spec for _, spec, _ in watch.seen} == {str(rule.weight) for rule in LOWERING}


def test_float_to_ternary_to_binary(trainer, data):
    module, watch = Module(), Watch("net.conv")
    trainer(QAT(QuantPlan(TO_BINARY)), watch, max_epochs=3).fit(module, datamodule=data)
    values = {spec: count for _, spec, count in watch.seen}
    assert values[None] == 72  # every weight its own
    assert values["ttq"] == 3
    assert values["sign stochastic:1"] == 2
    assert module.net.conv.weight.abs().max() <= 1.0


def test_a_new_stage_takes_its_range_from_the_weight_of_that_moment(trainer, data):
    class AtTheSwitch(L.Callback):
        scale = weight = None

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            quantizer = pl_module.net.conv.weight_quantizer
            if quantizer.current is quantizer.last and self.scale is None:
                self.scale = quantizer.last.scale.detach().clone()
                self.weight = pl_module.net.conv.weight.detach().clone()

    watch = AtTheSwitch()
    plan = QuantPlan([Rule("net.conv", weight="int8"), Rule("net.conv", weight="int4 lsq", start="step 5")])
    trainer(QAT(plan), watch, max_epochs=2).fit(Module(), datamodule=data)
    # LSQ's own start: 2 E|v| / sqrt(Q_p).
    torch.testing.assert_close(watch.scale.flatten(), (2 * watch.weight.abs().mean() / 7**0.5).reshape(1))


def test_learned_ranges_of_all_stages_get_no_weight_decay(trainer, data):
    class Decaying(Module):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3, weight_decay=0.1)

    module, plan = (
        Decaying(),
        [Rule("net.conv", weight="int8 lsq"), Rule("net.conv", weight="int4 lsq", start="step 5")],
    )
    fit = trainer(QAT(QuantPlan(plan)), max_epochs=1)
    fit.fit(module, datamodule=data)
    decay = {id(p): group["weight_decay"] for group in fit.optimizers[0].param_groups for p in group["params"]}
    assert [decay[id(stage.scale)] for stage in module.net.conv.weight_quantizer.stages()] == [0, 0]
    assert decay[id(module.net.conv.weight)] == 0.1


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.parametrize("rules", [LOWERING, TO_BINARY], ids=["lowering", "binary"])
@pytest.mark.parametrize("killed_at", [2, 7, 8, 9, 12])
def test_resumed_in_the_middle_the_run_is_the_same(rules, killed_at, trainer, data, tmp_path):
    """Also at the very step where a stage begins, and with the float copy as teacher."""

    def run(folder, checkpoint=None):
        L.seed_everything(1, verbose=False)
        module = Module()
        batches = ResumableLoader(list(data.train_dataloader()))
        saver = ModelCheckpoint(folder, every_n_train_steps=killed_at, save_top_k=-1)
        fit = trainer(QAT(QuantPlan(rules), distill=0.5), saver, max_epochs=3, enable_checkpointing=True)
        fit.fit(module, batches, data.val_dataloader(), ckpt_path=checkpoint)
        return module.state_dict()

    whole = run(tmp_path)
    (checkpoint,) = (path for path in tmp_path.iterdir() if f"step={killed_at}.ckpt" in path.name)
    shutil.copy(checkpoint, tmp_path / "killed.ckpt")
    resumed = run(tmp_path, tmp_path / "killed.ckpt")
    different = [key for key in whole if not torch.equal(whole[key], resumed[key])]
    assert not different


def test_a_checkpoint_from_the_middle_is_loaded_in_its_stage(trainer, data, tmp_path):
    module = Module()
    fit = trainer(QAT(QuantPlan(LOWERING)), max_epochs=1)
    fit.fit(module, datamodule=data)
    fit.save_checkpoint(tmp_path / "middle.ckpt")
    other = Module()
    load_checkpoint(other, tmp_path / "middle.ckpt")
    x = next(iter(data.train_dataloader()))[0]
    assert str(other.net.conv2.weight_quantizer.current.spec) == "int8 per_channel"
    assert torch.equal(other.eval()(x), module.eval()(x))


def test_a_progression_may_not_end_float():
    plan = QuantPlan([Rule("*", weight="int8"), Rule("0", weight="float", start="epoch 2")])
    with pytest.raises(PlanError, match="0: its weight ends float at epoch 2"):
        prepare(nn.Sequential(nn.Linear(4, 4)), plan)


def test_stages_round_trip_through_yaml(tmp_path):
    plan = QuantPlan(LOWERING)
    plan.to_yaml(tmp_path / "plan.yaml")
    assert QuantPlan.from_yaml(tmp_path / "plan.yaml") == plan
    with pytest.raises(PlanError, match="start: a moment is"):
        Rule("*", weight="int8", start="later")


def test_distillation_loss_is_the_formula():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    p, q = torch.softmax(teacher / 3, 1), torch.softmax(student / 3, 1)
    want = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(Distillation(0.5, 3.0).loss(student, teacher), want)


def test_the_teacher_is_the_float_model_and_its_loss_is_in_the_gradient(trainer, data):
    """With weight 1 labels have no influence: training on wrong ones gives the same model."""

    class Shifted(Data):
        def train_dataloader(self):
            loader = super().train_dataloader()
            x, y = loader.dataset.tensors
            loader.dataset.tensors = (x, (y + 1) % 4)
            return loader

    def run(datamodule, **options):
        L.seed_everything(3, verbose=False)
        module = Module()
        trainer(QAT("w4a8", **options), max_epochs=1).fit(module, datamodule=datamodule)
        return module

    right, wrong = run(data, distill=1.0), run(Shifted(), distill=1.0)
    assert torch.equal(right.net.fc.weight, wrong.net.fc.weight)
    assert not torch.equal(run(data).net.fc.weight, run(Shifted()).net.fc.weight)
    assert "training_step" not in right.__dict__


def test_distillation_says_what_it_cannot_do(trainer, data):
    with pytest.raises(PlanError, match=r"share in 0\.\.1, got 1\.5"):
        QAT("w4a8", distill=1.5)
    with pytest.raises(PlanError, match="no submodule 'head'"):
        trainer(QAT("w4a8", distill={"output": "head"}), max_epochs=1).fit(Module(), datamodule=data)

    class ByHand(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(PlanError, match="optimizes by hand"):
        trainer(QAT("w4a8", distill=0.5), max_epochs=1).fit(ByHand(), datamodule=data)


class SaveState(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), f"{self.path}/{trainer.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weights", ["lowering", "kmeans2:linear:mean:reassign", "twn stochastic-input"])
def test_ranks_stay_equal(weights, tmp_path):
    rules = {
        "lowering": LOWERING,
        "kmeans2:linear:mean:reassign": [Rule("*", weight="kmeans2:linear:mean:reassign")],
        "twn stochastic-input": [Rule("*", weight="twn", input="uint4 affine ema stochastic")],
    }[weights]
    L.seed_everything(0, verbose=False)
    fit = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_spawn", callbacks=[QAT(QuantPlan(rules), distill=0.5),
        SaveState(str(tmp_path))],
        max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    fit.fit(Module(), datamodule=Data(batch_size=8))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    # A batch norm's statistics are those of its rank's batches; everything that is trained or observed is shared.
    shared = [key for key in first if ".running_" not in key or "quantizer" in key]
    assert not [key for key in shared if not torch.equal(first[key], second[key])]


@pytest.mark.parametrize(
    "rules", [LOWERING, TO_BINARY, [Rule("*", weight="mxfp4", input="nvfp4")]], ids=["lowering", "binary", "nvfp4"]
)
def test_the_monitor_follows_the_stages(rules, trainer, data, tmp_path):
    rules = [*rules, Rule("net.fc", input="mx6")]
    trainer(QAT(QuantPlan(rules)), QuantMonitor(), logger=CSVLogger(tmp_path), max_epochs=3).fit(
        Module(), datamodule=data
    )
    tables = list(tmp_path.rglob("fidelity*.csv"))
    assert tables
    last = max(tables, key=lambda path: path.stat().st_mtime).read_text()
    assert str(rules[-2].weight) in last, "the stage that is in force"
