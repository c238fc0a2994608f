"""A model without ranges runs as the float one; with them it is quantized, and never silently float."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from torch import nn
from torch.utils.data import DataLoader

from lq_plugin import PTQ, QAT, CalibrationError

MIXED = {
    "rules": [
        {"match": "*", "weight": "bwn", "input": "xnor"},
        {"match": "net.0", "weight": "int8 per_channel", "input": "uint8 affine mse"},
    ]
}
STAGES = {
    "rules": [
        {"match": "*", "weight": "int8 per_channel", "input": "uint8 affine"},
        {"match": "*", "weight": "int4 per_channel", "input": "uint4 affine", "start": "epoch 1"},
    ]
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:QAT. the sanity check runs float"),
]


def x_of(seed=0, size=16):
    return torch.randn(size, 8, generator=torch.Generator().manual_seed(seed))


def loader():
    return DataLoader(x_of(), batch_size=8)


X = x_of(1)


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        L.seed_everything(0, verbose=False)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.example_input_array = torch.zeros(1, 8)

    def forward(self, x):
        return self.net(x)

    def training_step(self, x, batch_idx):
        return self(x).square().mean()

    def validation_step(self, x, batch_idx):
        self.log("val", self(x).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Look(L.Callback):
    """Runs the model where callbacks do."""

    def __init__(self):
        self.seen = {}

    def look(self, name, pl_module):
        if name not in self.seen:
            training = pl_module.training
            with torch.no_grad():
                self.seen[name] = pl_module.eval()(X).clone()
            pl_module.train(training)

    def on_fit_start(self, trainer, pl_module):
        self.look("fit", pl_module)
        self.copy = copy.deepcopy(pl_module.net)

    def on_sanity_check_start(self, trainer, pl_module):
        self.look("sanity", pl_module)

    def on_train_start(self, trainer, pl_module):
        self.look("train", pl_module)

    def on_validation_start(self, trainer, pl_module):
        self.look("validation", pl_module)


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
            accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, callbacks=list(callbacks), **quiet | options
        )

    return make


def float_answer():
    return Module().eval()(X).detach()


@pytest.mark.parametrize(
    "plan", ["w8a8", "w4 lsq a4 lsq", MIXED, STAGES, "w4 mse"], ids=["ema", "lsq", "xnor", "stages", "weights"]
)
@pytest.mark.parametrize("first", [True, False], ids=["before QAT", "after QAT"])
@pytest.mark.parametrize("init_batches", [0, 1])
def test_in_a_fit(plan, first, init_batches, trainer):
    look, qat, module = Look(), QAT(plan, init_batches=init_batches), Module()
    trainer(*((look, qat) if first else (qat, look))).fit(module, loader(), loader())
    is_float = {name: torch.equal(answer, float_answer()) for name, answer in look.seen.items()}
    waits = init_batches == 0
    assert is_float == {"fit": first or waits, "sanity": waits, "validation": waits, "train": waits}
    assert not torch.equal(module.eval()(X), float_answer())


@pytest.mark.parametrize("first", [True, False], ids=["before PTQ", "after PTQ"])
def test_in_an_evaluation(first, trainer):
    look, ptq, module = Look(), PTQ("w8a8", dataloader=loader()), Module()
    trainer(*((look, ptq) if first else (ptq, look))).validate(module, loader(), verbose=False)
    assert torch.equal(look.seen["validation"], float_answer()) == first
    assert not torch.equal(module.eval()(X), float_answer())
    # The second evaluation has ranges from its beginning.
    look.seen.clear()
    trainer(look, PTQ("w8a8")).validate(module, loader(), verbose=False)
    assert not torch.equal(look.seen["validation"], float_answer())


@pytest.mark.parametrize("summary", [ModelSummary, RichModelSummary])
@pytest.mark.parametrize("init_batches", [0, 1])
def test_summaries_with_an_example_input(summary, init_batches, trainer):
    for callbacks in (
        [summary(), QAT("w8a8", init_batches=init_batches)],
        [QAT("w8a8", init_batches=init_batches), summary()],
    ):
        trainer(*callbacks, enable_model_summary=True).fit(Module(), loader(), loader())


def test_what_got_no_ranges_is_not_silently_float(trainer):
    class Fails(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            raise KeyError("mine")

    look, module = Look(), Module()
    with pytest.raises(KeyError, match="mine"):
        trainer(look, Fails(), QAT("w8a8")).fit(module, loader(), loader())
    assert torch.equal(look.seen["fit"], float_answer())
    for left in (module.net, look.copy):
        with pytest.raises(CalibrationError, match=r"net\.0\.input.*has no range yet"):
            left.eval()(X)
    with pytest.raises(CalibrationError, match="has no range yet"):
        trainer(QAT("w8a8")).validate(Module(), loader(), verbose=False)
