"""The QAT callback in real Trainers."""

import copy
import shutil

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch.utils.checkpoint import checkpoint

from lq_plugin import QAT, CalibrationError, CoverageError, PlanError, QuantPlan, Rule, remove
from lq_plugin.layers import QuantizedLayer
from lq_plugin.model import prepare, quantized_layers, quantizers
from tests.callbacks.conftest import Data, Module, ResumableLoader


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("where", ["init", "setup", "configure_model"])
def test_layers_are_found_wherever_they_are_built(where, trainer, data):
    module = Module(where)
    trainer(QAT("w4a8"), max_epochs=1).fit(module, datamodule=data)
    assert [name for name, _ in quantized_layers(module)] == ["net.conv", "net.conv2", "net.fc"]
    assert all(q.is_calibrated for q in quantizers(module))
    assert "configure_model" not in module.__dict__


def test_nothing_to_quantize_is_an_error(trainer, data):
    class Empty(Module):
        def __init__(self):
            super().__init__("never")
            self.scale = torch.nn.Parameter(torch.ones(1))

    with pytest.raises(PlanError, match="matches no layer"):
        trainer(QAT("w4a8")).fit(Empty(), datamodule=data)


def test_user_code_is_untouched(trainer, module, data):
    conv, weight, forward = module.net.conv, module.net.conv.weight, module.forward
    float_keys = set(module.state_dict())
    trainer(QAT("w4a8"), max_epochs=1).fit(module, datamodule=data)
    assert module.net.conv is conv
    assert conv.weight is weight
    assert module.forward == forward
    assert float_keys < set(module.state_dict())
    assert "QuantizedConv2d" in str(ModelSummary(module, max_depth=-1))
    remove(module)
    assert set(module.state_dict()) == float_keys
    assert type(conv) is torch.nn.Conv2d


def test_training_forward_is_really_quantized(trainer, module, data):
    levels = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            levels.append(max(len(row.unique()) for row in pl_module.net.conv2.quantized_weight().detach()))

    trainer(QAT("w2a8"), Watch()).fit(module, datamodule=data)
    assert 2 <= max(levels) <= 4


class Sampled(Module):
    """Validates with layers in training mode, as where dropout draws samples."""

    def validation_step(self, batch, batch_idx):
        self.net.train()
        super().validation_step(batch, batch_idx)
        self.net.eval()


@pytest.mark.parametrize("kind", [Module, Sampled])
def test_ema_is_the_formula_on_the_training_batches_only(kind, trainer, data):
    """r ← mₜ·r + (1 - mₜ)·batch, mₜ = min(m, (1 + t) / (10 + t)); the calibration counts as 90 batches; validation
    moves nothing, whatever mode its layers are in."""
    L.seed_everything(0, verbose=False)
    module = kind(optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    data.x[64:] *= 1000  # the validation part: would be seen at once
    trainer(QAT("int8 / uint8 affine ema:0.95"), max_epochs=2).fit(module, datamodule=data)
    batches = [batch[0] for batch in data.train_dataloader()]
    low, high = batches[0].min(), batches[0].max()
    for t, batch in enumerate(batches * 2, start=90):
        m = min(0.95, (1 + t) / (10 + t))
        low, high = m * low + (1 - m) * batch.min(), m * high + (1 - m) * batch.max()
    quantizer = module.net.conv.input_quantizer
    torch.testing.assert_close(quantizer.running_min, low.reshape(1))
    torch.testing.assert_close(quantizer.running_max, high.reshape(1))
    torch.testing.assert_close(quantizer.scale, ((high - low) / 255).reshape(1))


def test_schedule_switches_by_epoch_and_step(trainer, module, data):
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            conv = pl_module.net.conv2
            seen.append(
                (
                    conv.weight_quantizer.is_enabled,
                    conv.input_quantizer.is_enabled,
                    conv.input_quantizer.observing,
                    pl_module.net.bn.training,
                )
            )

    schedule = {
        "weights_start": "step 2",
        "activations_start": "epoch 1",
        "observer_freeze": "step 6",
        "batch_norm_freeze": "step 7",
    }
    trainer(QAT("w4a8", schedule=schedule), Watch(), max_epochs=2).fit(module, datamodule=data)
    assert [s[0] for s in seen] == [False] * 2 + [True] * 6
    assert [s[1] for s in seen] == [False] * 4 + [True] * 4
    assert [s[2] for s in seen] == [True] * 6 + [False] * 2
    assert [s[3] for s in seen] == [True] * 7 + [False]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    "plan", ["w4a8", "w4 mse a8 mse", "w4 lsq a4 lsq", "int4 per_channel octav / int8 per_channel ema:0.9"]
)
def test_resume_is_bit_equal(plan, trainer, data, tmp_path):
    """Stopped after one epoch, or in the middle of one, and resumed in a new module: the uninterrupted run, bit for
    bit."""
    batches = list(data.train_dataloader())
    data.train_dataloader = lambda: ResumableLoader(batches)

    def run(**options):
        L.seed_everything(1, verbose=False)
        module = Module()
        callback = QAT(plan, schedule={"activations_start": "step 3", "observer_freeze": "step 7"})
        resume = options.pop("resume", None)
        keep = ModelCheckpoint(tmp_path / "run", filename="{step}", save_top_k=-1, every_n_train_steps=1)
        trainer(callback, keep, enable_checkpointing=True, **options).fit(module, datamodule=data, ckpt_path=resume)
        return module.state_dict()

    whole = run(max_epochs=3)
    saved = (tmp_path / "run").rename(tmp_path / "saved")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        resumed = run(max_epochs=3, resume=saved / f"step={step}.ckpt")
        assert states_equal(whole, resumed)


def test_checkpoints_float_and_quantized(trainer, module, data, tmp_path):
    fit = trainer(max_epochs=1, enable_checkpointing=True)
    fit.fit(module, datamodule=data)
    fit.save_checkpoint(tmp_path / "float.ckpt")
    float_state = copy.deepcopy(module.state_dict())
    # Float into QAT: the weights load, the ranges are found anew.
    quantized = Module()
    qat = trainer(QAT("w4a8"), max_epochs=1)
    prepare(quantized, "w4a8")
    quantized.load_state_dict(float_state)
    assert all(torch.equal(quantized.state_dict()[key], value) for key, value in float_state.items())
    qat.fit(quantized, datamodule=data)
    qat.save_checkpoint(tmp_path / "qat.ckpt")
    # QAT into a plain module: refused, never silently float.
    with pytest.raises(RuntimeError, match="Unexpected key.*weight_quantizer"):
        Module.load_from_checkpoint(tmp_path / "qat.ckpt")
    # QAT into QAT: the same metric in a new module.
    want = trainer(QAT("w4a8")).validate(quantized, datamodule=data, verbose=False)
    got = trainer(QAT("w4a8")).validate(Module(), datamodule=data, ckpt_path=tmp_path / "qat.ckpt", verbose=False)
    assert got == want
    with pytest.raises(PlanError, match="written with another plan"):
        trainer(QAT("w8a8")).validate(Module(), datamodule=data, ckpt_path=tmp_path / "qat.ckpt", verbose=False)
    content = torch.load(tmp_path / "qat.ckpt", weights_only=True)
    assert QuantPlan.from_dict(content["callbacks"]["QAT"]["plan"]) == QuantPlan.parse("w4a8")


def two_groups(module):
    optimizer = torch.optim.AdamW(
        [
            {"params": module.net.conv.parameters(), "lr": 1e-3},
            {"params": [*module.net.conv2.parameters(), *module.net.fc.parameters()], "lr": 2e-3},
        ],
        weight_decay=0.1,
    )
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=2)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda e: 0.9**e, lambda e: 0.8**e])
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[2])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_learned_ranges_reach_the_optimizer_of_their_layer(trainer, data):
    module = Module(optimizers=two_groups)
    qat = trainer(QAT("w4 lsq a4 lsq"))
    qat.fit(module, datamodule=data)
    optimizer = qat.optimizers[0]
    held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, layer in quantized_layers(module):
        home = held[id(layer.weight)]
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            assert not torch.equal(quantizer.scale, torch.ones_like(quantizer.scale)), name
            group = held[id(quantizer.scale)]
            assert group["weight_decay"] == 0
            assert group["lr"] == pytest.approx(home["lr"])
            assert home["weight_decay"] == 0.1
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(held)
    assert all(
        len(s.base_lrs) == len(optimizer.param_groups) for s in qat.lr_scheduler_configs[0].scheduler._schedulers
    )


def test_scales_lose_weight_decay_where_the_user_passed_all_parameters(trainer, module, data):
    plan = QuantPlan(
        [Rule("*", weight="int4 lsq"), Rule("net.conv2", input="uint4 pact"), Rule("net.fc", input="uint4 pact")]
    )
    qat = trainer(QAT(plan), max_epochs=1)
    qat.fit(module, datamodule=data)
    held = {id(p): group for group in qat.optimizers[0].param_groups for p in group["params"]}
    assert held[id(module.net.conv2.weight)]["weight_decay"] == 1e-2
    assert held[id(module.net.conv2.weight_quantizer.scale)]["weight_decay"] == 0
    assert held[id(module.net.conv2.input_quantizer.alpha)]["weight_decay"] == 1e-2  # PACT wants it


def test_gradient_checkpointing_equals_none(trainer, data):
    class Checkpointed(Module):
        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    states = []
    for kind in (Module, Checkpointed):
        L.seed_everything(3, verbose=False)
        module = kind()
        module.net.bn = module.net.bn2 = torch.nn.Identity()  # torch's own batch norm sees a checkpointed batch twice
        trainer(QAT("w4a8 ema:0.5")).fit(module, datamodule=data)
        states.append(module.state_dict())
    assert states_equal(*states)


def test_without_first_batches_the_sanity_check_says_it_is_float(trainer, module, data):
    with pytest.warns(UserWarning, match="sanity check runs float, 3 tensors"):
        trainer(QAT("w4a8", init_batches=0), max_epochs=1).fit(module, datamodule=data)
    assert all(q.is_calibrated for q in quantizers(module) if q.needs_calibration)


@pytest.mark.parametrize("plan", ["w4 lsq a4 lsq", "w8 a8 mse", "w8a8"])
def test_layer_that_only_training_reaches_gets_its_range_from_its_first_batch(plan, trainer, data):
    """In a GAN no validation step may call the generator: it must not stay float."""

    class Auxiliary(Module):
        def __init__(self):
            super().__init__()
            self.auxiliary = torch.nn.Linear(36, 4)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.auxiliary(batch[0].flatten(1)).square().mean()

    module = Auxiliary()
    with pytest.warns(
        UserWarning, match=r"reached auxiliary.input; their layers are float until a training batch reaches them"
    ):
        trainer(QAT(plan), max_epochs=1).fit(module, datamodule=data)
    quantizer = module.auxiliary.input_quantizer
    assert quantizer.is_calibrated
    assert quantizer.pending is None
    x = data.x[:16].flatten(1)
    assert len(quantizer.train()(x).unique()) <= quantizer.spec.grid.levels


def test_coverage_below_the_minimum_fails_before_training(trainer, module, data):
    plan = QuantPlan([Rule("net.fc", weight="int4", input="uint8 affine")])
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(CoverageError, match=r"net.conv2 \(Conv2d\): the plan leaves its weight and input float"):
        trainer(QAT(plan, min_coverage=0.9)).fit(module, datamodule=data)
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())


def test_ledger_has_functional_calls_and_reasons(trainer, module, data):
    callback = QAT(QuantPlan([Rule("*", weight="int4"), Rule("net.fc", input="uint8 affine")]))
    trainer(callback, max_epochs=1).fit(module, datamodule=data)
    ledger = callback.ledger
    assert ledger["net.add_0"].reason == "functional add: no rule asks for it by name"
    assert ledger["net.conv"].reason == "the plan leaves its input float"
    assert ledger["net.fc"].reason is None
    assert ledger["net.conv2"].macs == 8 * 8 * 9 * 36  # C_out · C_in · kernel · pixels, of one sample
    assert ledger.weight_coverage == 1
    assert ledger.compute_coverage == ledger["net.fc"].macs / sum(entry.macs for entry in ledger)


@pytest.mark.filterwarnings("ignore:QAT. no calibration batch reached critic.input")
def test_layers_that_run_in_training_only_are_what_they_are_in_training(trainer):
    class Adversarial(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.generator, self.critic, self.unused = (
                torch.nn.Linear(4, 8),
                torch.nn.Linear(8, 1),
                torch.nn.Linear(8, 8),
            )

        def training_step(self, batch, batch_idx):
            return self.critic(self.generator(batch)).mean()

        def validation_step(self, batch, batch_idx):
            self.log("val/mean", self.generator(batch).mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    module, callback = Adversarial(), QAT("w4a8", min_coverage=1.0)
    loader = torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=4)
    trainer(callback, max_epochs=1).fit(module, loader, loader)
    entry = callback.ledger["critic"]
    assert (entry.quantized, entry.calls, entry.reason) == (True, 0, "never called in the recorded batch")
    x = torch.randn(16, 8)
    critic = module.critic
    assert critic.input_quantizer.is_calibrated
    assert not torch.equal(critic(x), torch.nn.functional.linear(x, critic.weight, critic.bias))


def test_nan_in_training_data_names_the_layer(trainer, module, data):
    data.x[40] = float("nan")
    with pytest.raises(CalibrationError, match=r"net.conv.input: the batch holds NaN"):
        trainer(QAT("w4a8"), max_epochs=1, num_sanity_val_steps=0).fit(module, datamodule=data)


def test_random_states_and_metrics_are_as_without_the_callback(trainer, data):
    """With all quantizers off, a QAT run is the float run, bit for bit."""
    states = []
    for callbacks in ([], [QAT("w4a8", schedule={"weights_start": "epoch 9", "activations_start": "epoch 9"})]):
        L.seed_everything(5, verbose=False)
        module = Module()
        module.net.bn2 = torch.nn.Dropout(0.5)
        shuffled = copy.copy(data)
        shuffled.train_dataloader = lambda: torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(data.x[:64], data.y[:64]), batch_size=16, shuffle=True
        )
        fit = trainer(*callbacks)
        fit.fit(module, train_dataloaders=shuffled.train_dataloader(), val_dataloaders=data.val_dataloader())
        remove(module)
        states.append((module.state_dict(), fit.callback_metrics["val/acc"]))
    assert states_equal(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


def test_fit_remove_fit_again(trainer, module, data):
    trainer(QAT("w4a8"), max_epochs=1).fit(module, datamodule=data)
    with pytest.raises(PlanError, match="prepared with another plan"):
        trainer(QAT("w2a8"), max_epochs=1).fit(module, datamodule=data)
    remove(module)
    trainer(QAT("w2a8"), max_epochs=1).fit(module, datamodule=data)
    assert isinstance(module.net.conv, QuantizedLayer)
    assert module.net.conv.weight_quantizer.spec.bit_width == 2


def fit_in_two_processes(path):
    """Entry of the DDP test: run by a fresh interpreter."""
    L.seed_everything(0, verbose=False)
    module, callback = Module(), QAT("w4 mse a8 ema:0.5", init_batches=1)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_spawn", callbacks=[callback, Save(path)], max_epochs=1,
        logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=Data(batch_size=8))


class Save(L.Callback):
    """Notes what each batch of this rank reached, and writes it beside the state."""

    def __init__(self, path):
        self.path = path
        self.bounds = []

    def on_train_start(self, trainer, pl_module):
        self.bounds.append(
            torch.stack(
                [pl_module.net.conv.input_quantizer.running_min, pl_module.net.conv.input_quantizer.running_max]
            )
        )

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.bounds.append(torch.stack([batch[0].min(), batch[0].max()]).view(2, 1))

    def on_train_end(self, trainer, pl_module):
        torch.save(
            {"state": pl_module.state_dict(), "bounds": torch.stack(self.bounds)},
            f"{self.path}/{trainer.global_rank}.pt",
        )


@pytest.mark.slow
def test_ddp_ranges_are_equal_on_all_ranks(tmp_path):
    fit_in_two_processes(str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert states_equal(first["state"], second["state"])
    # The first range joins batch 0 (rank 0) and batch 1 (rank 1); then each step folds in the joined batch.
    x = Data().x
    low, high = x[:16].min(), x[:16].max()
    assert torch.equal(first["bounds"][0].flatten(), torch.stack([low, high]))
    assert not torch.equal(first["bounds"][1:], second["bounds"][1:])
    for t, (mine, theirs) in enumerate(zip(first["bounds"][1:], second["bounds"][1:], strict=True)):
        m = min(0.5, (91 + t) / (100 + t))
        low = m * low + (1 - m) * torch.minimum(mine[0], theirs[0])
        high = m * high + (1 - m) * torch.maximum(mine[1], theirs[1])
    torch.testing.assert_close(first["state"]["net.conv.input_quantizer.running_min"], low)
    torch.testing.assert_close(first["state"]["net.conv.input_quantizer.running_max"], high)
