"""Layers that no batch reaches: float with a reason, in every file and in every later run, until a training batch
reaches them."""

import logging

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lq_plugin import PTQ, QAT, Export, load_checkpoint
from lq_plugin.export import load_packed, save_packed
from lq_plugin.model import quantizers

PLAN = "int4 per_channel mse / uint8 affine mse"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*reach"),
    pytest.mark.filterwarnings("ignore:.*but have no .val_dataloader"),
    pytest.mark.filterwarnings("ignore:QAT. the sanity check runs float"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
]


def x_of(seed=0, size=32):
    return torch.randn(size, 16, generator=torch.Generator().manual_seed(seed))


DATA = DataLoader(x_of(), batch_size=8)


class Base(L.LightningModule):
    def __init__(self):
        super().__init__()
        L.seed_everything(0, verbose=False)
        self.body, self.head = nn.Linear(16, 32), nn.Linear(32, 4)

    def validation_step(self, x, batch_idx):
        self.log("val", self(x).square().mean())

    test_step = validation_step

    def training_step(self, x, batch_idx):
        return self(x).square().mean()

    def train_dataloader(self):
        return DATA

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class ReadPast(Base):
    """Reads the weight of `body` without calling it, as Mamba and BEiT do."""

    def forward(self, x):
        return self.head(F.relu(F.linear(x, self.body.weight, self.body.bias)))


class Auxiliary(Base):
    """A head that runs in training alone, as Inception's does."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Linear(32, 4)

    def forward(self, x):
        h = self.body(x).relu()
        return self.head(h) + 0.3 * self.aux(h) if self.training else self.head(h)


class Experts(Base):
    """`experts.1` gets no token that is not large; `experts.2` none at all, and is called all the same."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        h = self.body(x).relu()
        route = (x[:, 0] > 50).long()
        y = torch.zeros_like(h)
        for index, expert in enumerate(self.experts):
            y[route == index] = expert(h[route == index])
        return self.head(y)


UNREACHED = {ReadPast: {"body"}, Auxiliary: {"aux"}, Experts: {"experts.1", "experts.2"}}


@pytest.fixture
def trainer(tmp_path):
    def make(*callbacks, **options):
        quiet = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        return L.Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            callbacks=list(callbacks),
            **quiet | {"max_epochs": 1} | options,
        )

    return make


def float_layers(module):
    return {
        name
        for name, layer in module.named_modules()
        if (q := getattr(layer, "weight_quantizer", None)) and not q.is_enabled
    }


@pytest.mark.parametrize("kind", UNREACHED)
def test_calibrated_once_written_and_read(kind, trainer, tmp_path, caplog):
    module, callback = kind(), PTQ(PLAN)
    runner = trainer(callback)
    with pytest.warns(UserWarning, match=r"no calibration batch reached .*stay float, weights also"):
        runner.validate(module, DATA, verbose=False)
    assert float_layers(module) == UNREACHED[kind]
    left = {entry.name: entry.reason for entry in callback.ledger.left_float if not entry.functional}
    assert left == dict.fromkeys(UNREACHED[kind], "no batch has reached it")
    x = x_of(1)
    before = module.eval()(x)

    # The second call finds the ranges, and the file holds what there is.
    batches = []
    handle = module.head.register_forward_hook(lambda *_: batches.append(1))
    runner.test(module, DATA, verbose=False)
    handle.remove()
    assert len(batches) == len(DATA)
    assert torch.equal(module.eval()(x), before)
    runner.save_checkpoint(tmp_path / "model.ckpt")
    loaded = kind()
    ledger = load_checkpoint(loaded, tmp_path / "model.ckpt")
    assert torch.equal(loaded.eval()(x), before)
    assert {entry.name for entry in ledger.left_float} == UNREACHED[kind]
    for again in (PTQ(PLAN), QAT(PLAN)):
        loaded = kind()
        trainer(again).validate(loaded, DATA, ckpt_path=tmp_path / "model.ckpt", verbose=False)
        assert torch.equal(loaded.eval()(x), before)

    save_packed(module, tmp_path / "model.safetensors")
    packed = kind()
    load_packed(packed, tmp_path / "model.safetensors")
    assert torch.equal(packed(x), before)


@pytest.mark.parametrize("kind", [ReadPast, Experts])
@pytest.mark.parametrize("init_batches", [0, 1])
def test_trained_written_and_read(kind, init_batches, trainer, tmp_path):
    module, callback = kind(), QAT(PLAN, init_batches=init_batches)
    runner = trainer(callback, Export(tmp_path / "model.safetensors"), enable_checkpointing=True)
    runner.fit(module, DATA, DATA)
    assert float_layers(module) == UNREACHED[kind]
    x = x_of(1)
    before = module.eval()(x)
    packed = kind()
    load_packed(packed, tmp_path / "model.safetensors")
    assert torch.equal(packed(x), before)
    # A file of the middle of the run, and of its end.
    runner.save_checkpoint(tmp_path / "model.ckpt")
    for path in (tmp_path / "model.ckpt", runner.checkpoint_callback.best_model_path):
        loaded = kind()
        load_checkpoint(loaded, path)
        assert torch.equal(loaded.eval()(x), before)


def test_a_training_batch_that_reaches_a_layer_quantizes_it(trainer):
    module, callback = Auxiliary(), QAT(PLAN)
    states = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            aux = pl_module.aux
            states.append(
                (aux.weight_quantizer.is_enabled, aux.input_quantizer.is_enabled, aux.input_quantizer.is_calibrated)
            )

    seen = []
    handle = module.aux.register_forward_pre_hook(
        lambda layer, args: seen.append(args[0].detach()) if layer.training else None
    )
    trainer(callback, Look()).fit(module, DATA)
    handle.remove()
    assert states == [(False, False, False), *[(True, True, True)] * 3]
    # The first training batch alone gave the range: that of a calibration on its inputs.
    alone = nn.Linear(32, 4)
    from lq_plugin import calibrate, prepare

    net = nn.Sequential(alone)
    prepare(net, PLAN)
    calibrate(net, [seen[0]])
    assert torch.equal(module.aux.input_quantizer.scale, alone.input_quantizer.scale)


def test_the_schedule_decides_when_a_layer_that_was_reached_late_is_quantized(trainer):
    module = Auxiliary()
    states = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            states.append((pl_module.aux.weight_quantizer.is_enabled, pl_module.aux.input_quantizer.is_enabled))

    trainer(QAT(PLAN, schedule={"activations_start": "step 3"}), Look()).fit(module, DATA)
    assert states == [(False, False), (True, False), (True, False), (True, True)]


@pytest.mark.parametrize("plan", ["w8a8", PLAN])
def test_a_layer_that_is_reached_after_ranges_are_frozen_gets_a_range_that_stays(plan, trainer):
    class Late(Auxiliary):
        def forward(self, x):
            h = self.body(x).relu()
            return (
                self.head(h) + self.aux(h * self.global_step)
                if self.training and self.global_step > 1
                else self.head(h)
            )

    module, scales = Late(), []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            quantizers_of = (pl_module.body.input_quantizer, pl_module.aux.input_quantizer)
            scales.append([q.scale.item() if q.is_calibrated else None for q in quantizers_of])

    trainer(QAT(plan, schedule={"observer_freeze": "step 1"}), Look()).fit(module, DATA)
    body, aux = zip(*scales, strict=True)
    assert body[1] == body[2] == body[3]
    assert aux[0] is aux[1] is None
    assert aux[2] == aux[3] is not None
    assert module.aux.weight_quantizer.is_enabled
    assert module.aux.input_quantizer.is_enabled


def test_stopped_before_a_layer_is_reached_and_resumed(trainer, tmp_path):
    """`experts.1` is reached in the second epoch alone."""
    late = x_of(2)
    late[5, 0] = 60.0

    class Late(Experts):
        def train_dataloader(self):
            return DataLoader(x_of() if self.trainer.current_epoch == 0 else late, batch_size=8)

    def fit(module, **options):
        ckpt_path = options.pop("ckpt_path", None)
        runner = trainer(QAT(PLAN), reload_dataloaders_every_n_epochs=1, **options)
        runner.fit(module, ckpt_path=ckpt_path)
        return runner

    whole = Late()
    fit(whole, max_epochs=2)
    assert float_layers(whole) == {"experts.2"}
    fit(Late(), max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    resumed = Late()
    fit(resumed, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    after = resumed.state_dict()
    assert all(torch.equal(after[key], value) for key, value in whole.state_dict().items())


def test_more_data_reaches_more(caplog):
    from lq_plugin import calibrate, prepare

    module = Experts()
    prepare(module, PLAN)
    with caplog.at_level(logging.WARNING, "lq_plugin.model.calibrate"):
        calibrate(module, [x_of()])
    assert "no batch reached experts.1.input, experts.2.input" in caplog.text
    assert float_layers(module) == {"experts.1", "experts.2"}
    large = x_of(3)
    large[0, 0] = 60.0
    calibrate(module, [x_of(), large])
    assert float_layers(module) == {"experts.2"}
    assert all(q.is_enabled for q in quantizers(module.experts[1]))


def test_an_evaluation_without_any_calibration_is_still_an_error():
    from lq_plugin import CalibrationError, prepare

    module = Auxiliary()
    prepare(module, PLAN)
    with pytest.raises(CalibrationError, match="body.input"):
        module.eval()(x_of())
