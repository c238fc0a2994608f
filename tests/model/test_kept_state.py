"""Whatever Python state other people's code changes is as it was, in place; what calibration changes on purpose is not
touched."""

import functools
import itertools
import random
import sqlite3
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lq_plugin import prepare
from lq_plugin.model import kept_state
from lq_plugin.model.kept_state import LARGE, KeptState, state_kept
from lq_plugin.model.prepare import quantizers


class Slotted:
    __slots__ = ("count", "unset")

    def __init__(self):
        self.count = 0

    def add(self):
        self.count += 1
        self.unset = True


@dataclass
class Meter:
    total: float = 0.0
    history: list = field(default_factory=list)

    def add(self, value):
        self.total += value
        self.history.append(value)


class Module(nn.Module):
    shared: ClassVar[list] = []
    built = 0

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.register_buffer("bank", torch.zeros(4))
        self.lock = threading.Lock()
        self.meter = Meter()


#: What a module may hold, how a step changes it, and what of it can be compared.
STATES = {
    "counter": (lambda: 3, lambda m: setattr(m, "x", m.x + 1), lambda x: x),
    "list": (lambda: [1], lambda m: m.x.append(2), list),
    "list that is made anew": (lambda: [1], lambda m: setattr(m, "x", []), list),
    "list in a dict": (lambda: {"a": [1]}, lambda m: m.x["a"].clear(), lambda x: {k: list(v) for k, v in x.items()}),
    "order of a dict": (lambda: OrderedDict(a=1, b=2), lambda m: m.x.move_to_end("a"), lambda x: list(x.items())),
    "least recently used": (lambda: {"a": 1, "b": 2}, lambda m: m.x.update(a=m.x.pop("a")), lambda x: list(x.items())),
    "Counter": (lambda: Counter(a=2), lambda m: m.x.update("ab"), dict),
    "defaultdict": (lambda: defaultdict(list, a=[1]), lambda m: m.x["b"].append(m.x["a"].pop()),
    lambda x: {k: [*v] for k, v in x.items()}),
    "set": (lambda: {1, 2}, lambda m: m.x.symmetric_difference_update({2, 3}), sorted),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda m: m.x.append(3), lambda x: (list(x), x.maxlen)),
    "tensor in place": (lambda: torch.zeros(2), lambda m: m.x.add_(1), torch.Tensor.tolist),
    "tensor in a tuple": (lambda: (torch.zeros(2), 1), lambda m: m.x[0].add_(1), lambda x: x[0].tolist()),
    "list of rows": (lambda: [(1, "a"), (2, "b")], lambda m: m.x.__setitem__(1, (2, "b", 3)), list),
    "list in a list of rows": (lambda: [(1, "a"), (2, [3])], lambda m: m.x[1][1].append(4), lambda x: str(x)),
    "jagged tensor": (
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
        lambda m: m.x.values().add_(1),
        lambda x: x.values().tolist(),
    ),
    "tensor of an expression": (lambda: torch.zeros(1), lambda m: setattr(m, "x", m.x + 1), torch.Tensor.tolist),
    "array": (lambda: np.zeros(2), lambda m: m.x.__setitem__(0, 1), np.ndarray.tolist),
    "bytearray": (lambda: bytearray(b"ab"), lambda m: m.x.extend(b"c"), bytes),
    "object": (Meter, lambda m: m.x.add(2.0), lambda x: (x.total, list(x.history))),
    "object with slots": (Slotted, lambda m: m.x.add(), lambda x: (x.count, hasattr(x, "unset"))),
    "object in a partial": (lambda: functools.partial(max, Meter()), lambda m: m.x.args[0].add(1),
    lambda x: list(x.args[0].history)),
    "generator of torch": (lambda: torch.Generator().manual_seed(1), lambda m: torch.rand(2, generator=m.x),
    lambda x: [*x.get_state()]),
    "generator of numpy": (lambda: np.random.default_rng(1), lambda m: m.x.random(), lambda x: x.bit_generator.state),
    "older generator of numpy": (lambda: np.random.RandomState(1), lambda m: m.x.rand(),
    lambda x: x.get_state()[1].tolist()),
    "generator of Python": (lambda: random.Random(1), lambda m: m.x.random(), random.Random.getstate),
    "metric": (MeanMetric, lambda m: m.x.update(torch.tensor(2.0)), lambda x: (x.mean_value.tolist(), x.weight.tolist(),
    x._update_count)),
    "module in a list": (lambda: [Module()], lambda m: m.x[0].meter.history.append(1),
    lambda x: list(x[0].meter.history)),
}  # fmt: skip


@pytest.mark.parametrize("kind", STATES)
def test_what_a_step_changes_is_as_before_in_place(kind):
    make, change, seen = STATES[kind]
    module = Module()
    module.x = make()
    before, what = seen(module.x), module.x
    change(module)
    assert seen(module.x) != before, "the case must change something"
    module.x = make()
    before, what = seen(module.x), module.x
    with state_kept(module):
        change(module)
    assert seen(module.x) == before
    assert module.x is what


def test_buffers_classes_and_new_attributes():
    module = Module()
    bank = module.bank
    with state_kept(module):
        module.bank.add_(1)
        module.bank = module.bank * 2
        module.seen = [1]
        Module.shared.append(1)
        type(module).built += 1
    assert module.bank is bank
    assert bank.tolist() == [0.0] * 4
    assert not hasattr(module, "seen")
    assert Module.shared == []
    assert Module.built == 0


def test_what_was_made_in_inference_mode():
    module = Module()
    with torch.inference_mode():
        module.old = torch.zeros(2)
        with state_kept(module):
            module.old.add_(1)
            module.bank.add_(1)
            module.outputs = torch.ones(1)
    assert module.old.tolist() == [0.0, 0.0]
    assert module.bank.tolist() == [0.0] * 4
    assert not hasattr(module, "outputs")


def test_metrics_in_collections_and_after_an_error():
    module = nn.Module()
    module.accuracy = MulticlassAccuracy(3)
    module.accuracy.update(torch.tensor([0, 1]), torch.tensor([0, 2]))
    value = float(module.accuracy.compute())

    def step():
        module.accuracy.update(torch.tensor([0, 0]), torch.tensor([2, 2]))
        module.accuracy.compute()
        raise RuntimeError("step")

    with pytest.raises(RuntimeError, match="step"), state_kept(module):
        step()
    assert float(module.accuracy.compute()) == value
    assert module.accuracy._update_count == 1


def test_what_calibration_changes_stays():
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    prepare(module, "w8 mse a8 mse")
    module.view = module[0].weight.detach()
    module.parameters_of_mine = [module[0].weight]
    chosen = quantizers(module)
    with state_kept(module), torch.no_grad():
        module[0].weight.fill_(2.0)
        module[1].running_mean.fill_(3.0)
        module[0].calibrate_weight()
        for quantizer in chosen:
            quantizer.set_enabled(False)
        module.head = nn.Linear(2, 2)
    assert (module[0].weight == 2).all()
    assert (module.view == 2).all()
    assert (module[1].running_mean == 3).all()
    assert module[0].weight_quantizer.is_calibrated
    assert not any(bool(q.enabled) or q.is_enabled for q in chosen)
    assert isinstance(module.head, nn.Linear)


def test_a_submodule_that_takes_the_place_of_none():
    module = nn.Module()
    module.head = None
    with state_kept(module):
        module.head = nn.Linear(2, 2)
    assert isinstance(module.head, nn.Linear)


def test_iterators_give_once_more_what_they_gave():
    module = Module()
    module.numbers, module.both = (n * n for n in range(5)), itertools.count()
    module.again, original = module.numbers, module.numbers
    with state_kept(module):
        assert [next(module.numbers), next(module.again), next(module.both)] == [0, 1, 0]
    assert list(module.numbers) == [0, 1, 4, 9, 16]
    assert list(module.again) == []
    assert next(module.both) == 0
    module.numbers = original
    with state_kept(module):
        pass
    assert module.numbers is original


def test_an_iterator_with_methods_of_its_own_stays_what_it_is():
    module = Module()
    module.cursor = original = sqlite3.connect(":memory:").cursor()
    with state_kept(module):
        assert next(module.cursor.execute("SELECT 1")) == (1,)
        assert next(module.cursor, None) is None
    assert module.cursor is original
    assert module.cursor.execute("SELECT 2").fetchone() == (2,)
    module.cursor.connection.close()


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        return x - self.mean


@pytest.mark.filterwarnings("ignore:`torch.jit.* is (deprecated|not supported)")
@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(2, 3))], ids=["script", "trace"]
)
def test_scripted_modules_keep_their_buffers(make):
    module = Module()
    module.loss = make(nn.Sequential(nn.Linear(3, 3), Shifted()))
    mean = next(buffer for name, buffer in module.named_buffers() if name.endswith("mean"))
    with state_kept(module), torch.no_grad():
        module.loss(torch.randn(2, 3))
        mean.add_(1)
    assert mean.tolist() == [0.0] * 3


def test_kept_once_and_restored_after_each_step():
    module = Module()
    module.outputs, module.rng = [], np.random.default_rng(0)
    state = KeptState(module)
    drawn = []
    for _ in range(3):
        module.outputs.append(torch.zeros(1))
        module.bank.add_(1)
        drawn.append(module.rng.random())
        state.restore()
    assert module.outputs == []
    assert module.bank.tolist() == [0.0] * 4
    assert len(set(drawn)) == 1


@pytest.mark.parametrize("make", [list, tuple, lambda x: dict(enumerate(x))], ids=["list", "tuple", "dict"])
def test_containers_of_plain_values_are_looked_at_as_one(make, monkeypatch):
    """A data set's samples: 3,000 of them, with 30,000 numbers."""
    rows = [make(range(row, row + 10)) for row in range(3000)]
    module = Module()
    module.data = rows
    asked = []
    monkeypatch.setattr(kept_state, "is_read_once", lambda item: asked.append(item) or False)
    with state_kept(module):
        rows.reverse()
    assert rows[0][0] == 0
    assert len(asked) < 100


def test_a_large_list_is_not_entered():
    class Loud:
        @property
        def __dict__(self):
            raise AssertionError("entered")

    module = Module()
    module.data = [Loud() for _ in range(LARGE + 1)]
    with state_kept(module):
        module.data.append(1)
    assert len(module.data) == LARGE + 1


def test_what_is_nearest_is_kept_where_there_is_too_much(monkeypatch):
    """Objects of objects without end: those nearest to the module are as before, and the rest is said."""
    monkeypatch.setattr(kept_state, "MOST", 100)
    module = Module()
    module.samples = [Meter() for _ in range(200)]
    module.deeper = [[Meter()]]
    with pytest.warns(
        RuntimeWarning, match=r"more than 100 Python objects, \d+ of the first of them of class .*Meter: "
    ):
        state = KeptState(module)
    module.meter.add(1.0)
    module.samples[0].add(1.0)
    module.samples.reverse()
    module.deeper[0][0].add(1.0)
    state.restore()
    assert module.meter.total == 0
    assert module.samples[0].total == 0
    assert module.deeper[0][0].total == 1
    monkeypatch.setattr(kept_state, "MOST", 1000)
    with state_kept(module):
        module.deeper[0][0].add(1.0)
    assert module.deeper[0][0].total == 1


def test_long_chains_need_no_recursion():
    module = Module()
    module.chain = None
    for _ in range(20_000):
        module.chain = [module.chain]
    with state_kept(module):
        module.chain.append(1)
    assert len(module.chain) == 1


class Noisy(Dataset):
    def __init__(self):
        self.rng, self.asked = np.random.default_rng(3), 0

    def __len__(self):
        return 6

    def __getitem__(self, index):
        self.asked += 1
        return torch.tensor([float(index), self.rng.random()])


def test_loaders_with_generators_of_their_own():
    rng = np.random.default_rng(5)

    def collate(items):
        return torch.stack(items) + rng.random()

    def make():
        data, generator = Noisy(), torch.Generator().manual_seed(2)
        return DataLoader(
            data,
            batch_size=2,
            sampler=RandomSampler(data, generator=generator),
            generator=generator,
            collate_fn=collate,
        )

    loader = make()
    state = rng.bit_generator.state
    wanted = list(loader)
    rng.bit_generator.state, loader = state, make()
    with state_kept(loader, values=False):
        next(iter(loader))
    assert loader.dataset.asked == 0
    assert all(torch.equal(a, b) for a, b in zip(loader, wanted, strict=True))


def test_positions_of_files(tmp_path):
    (tmp_path / "numbers").write_text("1\n2\n")
    module = Module()
    with (tmp_path / "numbers").open() as module.file, (tmp_path / "log").open("w") as module.log:
        with state_kept(module):
            assert module.file.read() == "1\n2\n"
            module.log.write("kept")
        assert module.file.readline() == "1\n"
    assert (tmp_path / "log").read_text() == "kept"
