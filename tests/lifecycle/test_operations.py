"""Quantized operations in real Trainers: trained, calibrated, saved, resumed, averaged and removed."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import PTQ, QAT, CalibrationError, PlanError, QuantPlan, Rule, load_checkpoint, remove
from lq_plugin.model import quantized_operations, quantizers
from tests.callbacks.conftest import Data, Module, ResumableLoader

EMA = QuantPlan([*QuantPlan.parse("w4a8").rules, Rule("*.add_0", input="int8 ema:0.5")])
LSQ = QuantPlan([*QuantPlan.parse("w4 lsq a4 lsq").rules, Rule("type:add", input="int4 lsq")])
STAGES = QuantPlan(
    [*EMA.rules, Rule("net.add_*", input="int4 minmax", start="step 5")], {"activations_start": "step 2"}
)
PLANS = pytest.mark.parametrize("plan", [EMA, LSQ, STAGES], ids=["ema", "lsq", "stages"])
pytestmark = [pytest.mark.filterwarnings("ignore:The dirpath has changed")]


def states_equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


def seeded(kind=Module, **options):
    L.seed_everything(0, verbose=False)
    return kind(**options)


class Rooted(Module):
    """The layers are the LightningModule's own, and the step adds something outside of its forward."""

    def __init__(self):
        super().__init__()
        self.net = None
        self.first, self.second, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        return self.head((x + self.second(x).relu()).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        x = batch[0] + batch[0]
        return F.cross_entropy(self(x), batch[1])


@PLANS
@pytest.mark.parametrize("where", ["init", "configure_model"])
def test_trained_saved_loaded_and_removed(plan, where, trainer, data, tmp_path):
    module = seeded(where=where)
    qat = QAT(plan)
    fit = trainer(qat)
    fit.fit(module, datamodule=data)
    entry = qat.ledger["net.add_0"]
    assert (entry.quantized, entry.functional, entry.reason, entry.calls) == (True, True, None, 1)
    ((name, operation),) = quantized_operations(module)
    assert name == "net.add_0"
    in_force = [q.current for q in operation.quantizers()]
    assert all(q.is_calibrated and q.is_enabled for q in in_force)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    module.eval()
    with torch.no_grad():
        want = module(data.x)
        fresh = seeded(where=where)
        if where == "configure_model":
            fresh.configure_model()
        load_checkpoint(fresh, tmp_path / "last.ckpt")
        assert torch.equal(fresh.eval()(data.x), want)
        again = seeded(where=where)
        trainer(QAT(plan)).validate(again, datamodule=data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
        assert torch.equal(again.eval()(data.x), want)
        trained = {key: value for key, value in module.state_dict().items() if "quantizer" not in key}
        remove(module)
        assert states_equal(trained, module.state_dict())
        assert "forward" not in module.net.__dict__
        # The range of one operand is what makes the difference.
        scale = fresh.net.quantized_operations.add_0.input_1_quantizer.current.scale
        scale.mul_(2)
        assert not torch.equal(fresh(data.x), want)


@PLANS
@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_is_the_uninterrupted_one(plan, step, trainer, data, tmp_path):
    batches = list(data.train_dataloader())
    data.train_dataloader = lambda: ResumableLoader(batches)

    def run(resume=None):
        module = seeded()
        keep = ModelCheckpoint(tmp_path / str(resume is None), filename="{step}", save_top_k=-1, every_n_train_steps=3)
        fit = trainer(QAT(plan), keep, enable_checkpointing=True)
        fit.fit(module, datamodule=data, ckpt_path=resume, weights_only=None if resume is None else True)
        return module, fit

    module, fit = run()
    assert fit.global_step == 8
    again, resumed = run(tmp_path / "True" / f"step={step}.ckpt")
    assert states_equal(module.state_dict(), again.state_dict())
    mine, theirs = (f.optimizers[0].state_dict()["state"] for f in (fit, resumed))
    assert all(torch.equal(mine[key]["momentum_buffer"], theirs[key]["momentum_buffer"]) for key in mine)


def test_learned_ranges_of_operations_are_trained_without_weight_decay(trainer, data):
    module = seeded(optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=0.05, weight_decay=0.1))
    fit = trainer(QAT(LSQ))
    first = {}

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            first.update({q.name: q.scale.detach().clone() for q in quantizers(pl_module)})

    fit.callbacks.append(Look())
    fit.fit(module, datamodule=data)
    groups = {id(p): group["weight_decay"] for group in fit.optimizers[0].param_groups for p in group["params"]}
    for q in dict(quantized_operations(module))["net.add_0"].quantizers():
        assert groups[id(q.scale)] == 0
        assert not torch.equal(q.scale, first[q.name])
    assert groups[id(module.net.conv.weight)] == 0.1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_ptq_equals_ranges_found_by_hand(precision, trainer, data):
    module = seeded()
    seen = {}
    twin = copy.deepcopy(module).eval()
    add = torch.Tensor.add
    plan = QuantPlan([Rule("net.add_0", input="int8 minmax")])
    ptq = PTQ(plan, calibration_batches=2, phases=["calibrate"])
    trainer(ptq, precision=precision).validate(module, datamodule=data, verbose=False)
    if precision != "32-true":
        assert all(q.scale.dtype == torch.float32 and q.is_calibrated for q in quantizers(module))
        return
    twin.net.bn.register_forward_hook(lambda m, args, y: seen.setdefault("x", torch.relu(y)))
    twin.net.bn2.register_forward_hook(lambda m, args, y: seen.setdefault("y", torch.relu(y)))
    with torch.no_grad():
        twin(data.x[:32])
        scales = [float(seen[key].abs().max()) / 127 for key in "xy"]
        for q, scale in zip(quantizers(module), scales, strict=True):
            assert float(q.scale) == pytest.approx(scale)
        x, y = (
            torch.fake_quantize_per_tensor_affine(seen[key], scale, 0, -128, 127)
            for key, scale in zip("xy", scales, strict=True)
        )
        want = twin.net.fc(add(x, y).mean((2, 3)))
        torch.testing.assert_close(module.eval()(data.x[:32]), want, rtol=0, atol=1e-5)
    assert [(e.name, e.functional) for e in ptq.ledger.quantized] == [("net.add_0", True)]


def test_operations_of_the_lightning_module_itself(trainer, data, tmp_path):
    """Operations of its forward are its own; those of a step around it belong to nobody, and shift no name."""
    module = seeded(Rooted)
    fit = trainer(QAT(QuantPlan([Rule("add_0", input="int8 ema")])))
    fit.fit(module, datamodule=data)
    assert [name for name, _ in quantized_operations(module)] == ["add_0"]
    x, y = (q for _, q in sorted((q.name, q) for q in quantizers(module)))
    assert int(x.batches) == int(y.batches) == 90 + 8
    with torch.no_grad():
        assert float(x.running_max) < 2 * float(module.first(data.x * 2).max())
    with pytest.raises(PlanError, match=r"'outside.add_0' matches no layer and no operation"):
        trainer(QAT(QuantPlan([Rule("outside.add_0", input="int8 ema")]))).fit(seeded(Rooted), datamodule=data)


def test_in_an_evaluation_without_training_data(trainer, data, tmp_path):
    """A quantized checkpoint is evaluated although there is no calibration data: any batch shows the operations."""
    module = seeded()
    fit = trainer(QAT(EMA), max_epochs=1)
    fit.fit(module, datamodule=data)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    with torch.no_grad():
        want = module.eval()(data.x[64:])
    loader = DataLoader(TensorDataset(data.x[64:], data.y[64:]), 16)
    again = seeded()
    trainer(QAT(EMA)).validate(again, loader, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    with torch.no_grad():
        assert torch.equal(again.eval()(data.x[64:]), want)
    with pytest.raises(CalibrationError, match="the loader gave 0 batches"):
        trainer(QAT(EMA)).validate(seeded(), DataLoader(TensorDataset(data.x[:0], data.y[:0])), verbose=False)


def test_random_states_are_as_without(trainer, data):
    """Looking for operations draws no random number and leaves batch norms as they are."""
    states = []
    for plan in ("w4a8", QuantPlan([*QuantPlan.parse("w4a8").rules, Rule("net.add_0", input="int8 minmax")])):
        module, found = seeded(), {}

        class Look(L.Callback):
            def on_fit_start(self, trainer, pl_module, found=found):
                found.update(
                    {key: value.clone() for key, value in pl_module.state_dict().items() if "quant" not in key}
                )
                found["rng"] = torch.get_rng_state()

        trainer(QAT(plan), Look(), max_epochs=1).fit(module, datamodule=data)
        states.append(found)
    assert states_equal(*states)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_weight_averages_hold_the_operations(trainer, data):
    module = seeded()
    average = EMAWeightAveraging(decay=0.5)
    trainer(average, QAT(LSQ), max_epochs=1).fit(module, datamodule=data)
    assert [name for name, _ in quantized_operations(module)] == ["net.add_0"]


def test_a_typing_error_lists_the_operations(trainer, data):
    with pytest.raises(
        PlanError, match=r"'net.add_1' matches no layer and no operation of the recorded batch; operations: net.add_0"
    ):
        trainer(QAT(QuantPlan([Rule("net.add_1", input="int8 ema")]))).fit(seeded(), datamodule=data)


class Save(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), f"{self.path}/{trainer.global_rank}.pt")


def fit_in_two_processes(path, kind, plan):
    """Entry of the spawned processes."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_spawn", callbacks=[QAT(plan), Save(path)], max_epochs=1,
        logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(kind(), datamodule=Data(batch_size=8))


@pytest.mark.slow
@pytest.mark.parametrize("plan", [EMA, LSQ], ids=["ema", "lsq"])
@pytest.mark.parametrize("kind", [Module, Rooted])
def test_ddp_ranges_of_operations_are_equal_on_all_ranks(kind, plan, tmp_path):
    if kind is Rooted:
        plan = QuantPlan([Rule("add_0", input=plan.rules[-1].input)])
    fit_in_two_processes(str(tmp_path), kind, plan)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert any("quantized_operations.add_0.input_1_quantizer" in key for key in first)
    assert states_equal(first, second)
    scale = next(value for key, value in first.items() if key.endswith("add_0.input_0_quantizer.scale"))
    assert float(scale) != 1.0
