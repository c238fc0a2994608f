"""torch.compile before and after the callback: one graph, the same numbers, and compiled once for each phase of the
schedule."""

import lightning as L
import pytest
import torch
from torch._dynamo.utils import counters

from lq_plugin import PTQ, QAT, QuantPlan, Rule
from tests.callbacks.conftest import Module

SCHEDULE = {"activations_start": "epoch 1", "observer_freeze": "epoch 2"}
PLANS = {
    "ema": QuantPlan([Rule("*", weight="int4 per_channel", input="uint8 affine ema")], SCHEDULE),
    "learned": QuantPlan([Rule("*", weight="int4 per_channel lsq", input="int4 lsq")], SCHEDULE),
    "stages": QuantPlan(
        [Rule("*", weight="int8 mse", input="uint8 affine"), Rule("*", weight="int4 mse", start="epoch 1")]
    ),
}
#: Graphs of the training forward after each epoch: one for each phase, and nothing new where no phase begins. Learned
#: ranges are not observed, so that there is nothing for them in the freeze of observers.
GRAPHS = {"ema": [1, 2, 3, 3], "learned": [1, 2, 2, 2], "stages": [1, 2, 2, 2]}
pytestmark = [
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
]


class Compiled(Module):
    """Runs its net compiled: from the beginning, from the first batch on, or not at all."""

    def __init__(self, when):
        super().__init__()
        self.when = when
        self.compiled = [self.compile_net()] if when == "before" else []

    def compile_net(self):
        # The captured graph run as it is: what a code generator makes of it may round differently.
        return torch.compile(self.net, backend="eager", fullgraph=True)

    def forward(self, x):
        if self.when == "never":
            return self.net(x)
        if not self.compiled:
            self.compiled.append(self.compile_net())
        return self.compiled[0](x)


class Count(L.Callback):
    def __init__(self):
        self.graphs = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.graphs.append(counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def trained(trainer, data, plan, when):
    counters.clear()
    L.seed_everything(0, verbose=False)
    module, count = Compiled(when), Count()
    trainer(QAT(plan), count, max_epochs=4, num_sanity_val_steps=0, limit_val_batches=0).fit(module, datamodule=data)
    return module.state_dict(), count.graphs, sum(counters["graph_break"].values())


@pytest.mark.parametrize("name", PLANS)
def test_a_compiled_run_is_the_run_that_is_not_compiled(name, trainer, data):
    """Bit for bit; no graph breaks, also while ranges are found first; one graph a phase, however often it toggles."""
    plan = PLANS[name]
    plain, graphs, _ = trained(trainer, data, plan, "never")
    assert graphs == [0, 0, 0, 0]
    for when in ("before", "after") if name == "ema" else ("before",):
        torch.compiler.reset()
        state, graphs, breaks = trained(trainer, data, plan, when)
        assert breaks == 0
        assert graphs == GRAPHS[name]
        assert state.keys() == plain.keys()
        assert all(torch.equal(value, plain[key]) for key, value in state.items())


def test_going_back_to_a_phase_compiles_nothing(trainer, data):
    """Training, validation and training again: the graphs of both are kept."""
    L.seed_everything(0, verbose=False)
    module, count = Compiled("before"), Count()
    trainer(QAT("w4a8"), count, max_epochs=4, num_sanity_val_steps=0).fit(module, datamodule=data)
    assert count.graphs[1:] == [count.graphs[1]] * 3
    assert not counters["graph_break"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_in_place(when, trainer, data):
    """`net.compile()` before the fit, or once the quantizers are in: the run that is not compiled, bit for bit."""

    class Late(L.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.net.compile(backend="eager", fullgraph=True)

    states = []
    for compiled in (False, True):
        counters.clear()
        torch.compiler.reset()
        L.seed_everything(0, verbose=False)
        module = Module()
        if compiled and when == "before":
            module.net.compile(backend="eager", fullgraph=True)
        late = [Late()] if compiled and when == "after" else []
        trainer(QAT("w4a8"), *late).fit(module, datamodule=data)
        states.append(module.state_dict())
        assert bool(counters["stats"]["unique_graphs"]) == compiled
        assert not counters["graph_break"]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("when", ["before", "after"])
def test_calibrated_and_evaluated(when, trainer, data):
    answers = []
    for kind in ("never", when):
        L.seed_everything(0, verbose=False)
        module = Compiled(kind)
        trainer(PTQ("w4 mse a8 percentile:99.9")).validate(module, datamodule=data, verbose=False)
        with torch.no_grad():
            answers.append(module.eval()(data.x))
    assert torch.equal(*answers)
    assert not counters["graph_break"]


class Silent(Module):
    """Dynamo cannot look into Lightning's `log`, with and without quantizers."""

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])


def test_a_compiled_lightning_module(trainer, data):
    """`trainer.fit(torch.compile(module))`: Lightning compiles its steps, too."""
    states = []
    for compiled in (False, True):
        L.seed_everything(0, verbose=False)
        module = Silent()
        given = torch.compile(module, backend="eager") if compiled else module
        trainer(QAT("w4a8"), max_epochs=1, limit_val_batches=0).fit(given, datamodule=data)
        states.append(module.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
