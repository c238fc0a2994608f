"""Learned rounding: against exhaustive search, on every kind of layer, and what becomes of bad input."""

import copy
import itertools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

from lq_plugin import PTQ, CalibrationError, PlanError, QuantizationError, QuantPlan, Rule, calibrate, prepare
from lq_plugin.functional.affine import quantize
from lq_plugin.ptq.batch_norm.correct import correct_batch_norm
from lq_plugin.ptq.reconstruction.reconstruct import reconstruct
from tests.callbacks.conftest import Data, Module, trainer  # noqa: F401  (a fixture)
from tests.models import randomize, resnet20

FAST = {"iterations": 120, "batch_size": 64}


def prepared(net, batches, weight="int3 per_channel mse", inputs=None, run=None):
    prepare(net, QuantPlan([Rule("*", weight=weight, input=inputs)]))
    calibrate(net, batches, run)
    return net.eval()


def correlated(count, features, seed=0):
    """Inputs with strong correlations: nearest rounding is far from the best there."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(2, features, generator=generator)
    return torch.randn(count, 2, generator=generator) @ mixing + 0.1 * torch.randn(count, features, generator=generator)


@torch.no_grad()
def test_the_learned_rounding_is_near_the_best_of_all():
    """All 2^8 ways to round the eight weights of each neuron, by exhaustive search."""
    torch.manual_seed(0)
    x, float_layer = correlated(256, 8), nn.Linear(8, 12, bias=False)
    net, target = prepared(nn.Sequential(copy.deepcopy(float_layer)), [x]), float_layer(x)
    scale = net[0].weight_quantizer.scale
    floor = (float_layer.weight / scale).floor()
    levels = [(floor + torch.tensor(ups)).clamp(-4, 3) for ups in itertools.product([0, 1], repeat=8)]
    errors = torch.stack([(x @ (level * scale).T - target).square().mean(0) for level in levels])
    nearest = (net(x) - target).square().mean(0)
    fixed = {"scale_learning_rate": 0.0, "bias_learning_rate": 0.0}
    reconstruct(net, [x], by="layer", iterations=600, batch_size=256, learning_rate=0.05, **fixed)
    learned = (net(x) - target).square().mean(0)
    assert ((errors - learned).abs().amin(0) < 1e-6).all(), "each neuron has one of the roundings"
    assert learned.mean() < 0.3 * nearest.mean()
    ranks = (errors < learned - 1e-9).sum(0).float()
    assert ranks.median() <= 8, "among the best few of 256"


LAYERS = {
    "linear": (lambda: nn.Linear(12, 6), lambda: correlated(96, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3), lambda: correlated(96, 42).reshape(96, 6, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), lambda: correlated(96, 64).reshape(96, 4, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), lambda: correlated(96, 96).reshape(96, 6, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), lambda: correlated(96, 54).reshape(96, 2, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2), lambda: correlated(96, 36).reshape(96, 4, 3, 3)),
}


@pytest.mark.parametrize(
    "spec",
    ["int3 per_channel mse", "int2 affine mse per_channel", "int3", "int3 group4 mse ragged", "int4 group4:4 ragged"],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_and_granularity(kind, spec):
    torch.manual_seed(1)
    make, data = LAYERS[kind]
    layer, x = make(), data()
    target = layer(x).detach()
    before = layer.weight.detach().clone()
    net = prepared(nn.Sequential(layer), [x], spec)
    nearest = float((net(x) - target).detach().square().mean())
    result = reconstruct(net, [x[:48], x[48:]], by="layer", scale_learning_rate=0.0, bias_learning_rate=0.0, **FAST)
    (fit,) = result.units.values()
    assert float((net(x) - target).detach().square().mean()) <= nearest * (1 + 1e-5)
    if fit.kept:
        assert torch.equal(layer.quantized_weight(), layer.weight), "the weights are the levels"
        quantizer = layer.weight_quantizer
        canonical, was = layer.canonical(layer.weight), layer.canonical(before)
        if "group" not in spec:
            q = quantize(canonical, quantizer.scale, quantizer.zero_point, quantizer.spec.grid)
            q_before = (was / quantizer.scale + quantizer.zero_point).clamp(
                quantizer.spec.grid.quant_min, quantizer.spec.grid.quant_max
            )
            assert ((q - q_before).abs() < 1 + 1e-4).all(), "a level next to the weight"


@torch.no_grad()
def test_blocks_are_found_and_improve_a_network():
    torch.manual_seed(0)
    net = randomize(resnet20(8))
    x = torch.randn(64, 3, 32, 32)
    target = net(x).detach()
    prepared(net, [x], "int3 per_channel mse", "uint8 affine mse")
    nearest = float((net(x) - target).square().mean())
    result = reconstruct(net, [x], iterations=30, batch_size=16)
    assert list(result.units)[1:10] == [f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1, 2)]
    assert float((net(x) - target).square().mean()) < nearest
    assert not result.skipped


def test_patterns_name_blocks():
    net = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 2))
    x = correlated(64, 8)
    prepared(net, [x])
    assert list(reconstruct(net, [x], by=["0"], iterations=5).units) == ["0", "1"]
    with pytest.raises(QuantizationError, match="no module with quantized layers matches: 'encoder'"):
        reconstruct(net, [x], by=["encoder"])
    with pytest.raises(QuantizationError, match="iterations is an integer from 0, got -1"):
        reconstruct(net, [x], iterations=-1)


def test_the_same_seed_gives_the_same_weights_also_from_disk():
    def run(**options):
        torch.manual_seed(0)
        net = prepared(
            nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)), [correlated(64, 12)], inputs="uint4 affine mse"
        )
        reconstruct(net, [correlated(32, 12, 1), correlated(32, 12, 2)], iterations=40, drop=0.5, **options)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    assert torch.equal(run(), run())
    assert not torch.equal(run(), run(seed=1))
    # Batches on disk are not merged, so that other samples are drawn: the same twice.
    assert torch.equal(run(cache_bytes=0), run(cache_bytes=0))


def test_shared_layers_and_layers_that_never_run():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.head, self.unused = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(torch.relu(self.shared(torch.relu(self.shared(x)))))

    torch.manual_seed(0)
    net, x = Net(), correlated(96, 8)
    prepared(net, [x])
    result = reconstruct(net, [x], by="layer", **FAST)
    assert result.skipped == {"unused": "no batch reached it"}
    assert result.units["shared"].after < result.units["shared"].before
    assert result.units["head"].after < result.units["head"].before


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.read = nn.Linear(8, 8)

    def forward(self, tokens):
        x = torch.relu(self.middle(self.embedding(tokens)))
        return self.head(x + self.read(x) @ self.read.weight)


@pytest.mark.parametrize("method", ["adaround", "signround"])
def test_weights_that_others_read_keep_nearest_rounding(method):
    """An embedding that is to stay float would have three bits, and quantized weights the levels of another layer."""
    torch.manual_seed(0)
    net, tokens = Tied(), torch.randint(0, 20, (64, 5))
    prepare(net, QuantPlan([Rule("*", weight="int3 per_channel mse"), Rule("embedding", weight="float")]))
    calibrate(net, [tokens])
    before = {name: p.detach().clone() for name, p in net.eval().named_parameters()}
    result = reconstruct(net, [tokens], by="layer", iterations=20, batch_size=16, method=method)
    assert result.skipped == {
        "read": "'read.weight' is also read by 'matmul_0'",
        "head": "'head.weight' is shared with 'embedding.weight'",
    }
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert {"middle.weight"} <= moved <= {"middle.weight", "middle.bias", "read.bias"}


class Memory:
    """Keys so far, which each block writes into, as a cache of a language model."""

    def __init__(self, prefix=None):
        self.keys = [prefix, prefix]

    def extend(self, index, keys):
        held = self.keys[index]
        self.keys[index] = keys if held is None else torch.cat([held, keys], dim=1)
        return self.keys[index]


class Attending(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.index, self.key, self.out = index, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, memory=None):
        keys = self.key(x) if memory is None else memory.extend(self.index, self.key(x))
        return x + self.out((x @ keys.transpose(1, 2)).softmax(-1) @ keys)


class Remembering(nn.Module):
    """`memory` says whether it hands a memory from block to block, empty or with a prefix of each sample."""

    def __init__(self, memory):
        super().__init__()
        torch.manual_seed(0)
        self.memory, self.blocks = memory, nn.ModuleList([Attending(0), Attending(1)])

    def forward(self, x):
        memory = {"none": None, "empty": Memory(), "prefix": Memory(x[:, :1])}[self.memory]
        for block in self.blocks:
            x = block(x, memory)
        return x


def test_a_memory_that_blocks_write_into_is_as_it_was_in_every_run():
    batches = [correlated(80, 6).reshape(16, 5, 6)]
    rounded = {}
    for memory in ("none", "empty", "prefix"):
        net = prepared(Remembering(memory), batches)
        result = reconstruct(net, batches, by="block", iterations=60, batch_size=8)
        assert set(result.units) == {"blocks.0", "blocks.1"}
        assert all(fit.after <= fit.before for fit in result.units.values())
        rounded[memory] = net.state_dict()
    # A memory that is empty when a block begins computes what no memory does.
    assert all(torch.equal(rounded["empty"][key], value) for key, value in rounded["none"].items())


def test_formats_without_levels_to_choose_from_are_named():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = correlated(64, 8)
    prepare(net, QuantPlan([Rule("0", weight="bwn"), Rule("1", weight="int3 mse")]))
    calibrate(net, [x])
    result = reconstruct(net, [x], iterations=10)
    assert result.skipped == {"0": "bwn has no levels under fixed scales to choose from"}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 5, batch_first=True, bidirectional=True), nn.Linear(10, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


def encoder_layer():
    return nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, dropout=0.0)


@pytest.mark.parametrize("make", [Recurrent, Attention, encoder_layer])
@pytest.mark.parametrize("by", [pytest.param("layer", marks=pytest.mark.slow), "block"])
def test_weights_inside_a_kernel_are_learned_together(make, by, tmp_path):
    x, shares = correlated(256, 24).reshape(256, 4, 6), []
    for seed in range(3):
        torch.manual_seed(seed)
        net = make()
        randomize(net)
        prepared(net, [x], inputs="uint8 affine")
        fresh = copy.deepcopy(net)
        result = reconstruct(net, [x], by=by, **FAST, folder=str(tmp_path / str(seed)))
        assert not result.skipped
        assert all(fit.iterations > 0 for fit in result.units.values())
        kernel = next(iter(result.units.values()))
        shares.append(kernel.after / kernel.before)
        assert reconstruct(fresh, [x], by=by, **FAST, folder=str(tmp_path / str(seed))) == result
        assert all(torch.equal(value, net.state_dict()[name]) for name, value in fresh.state_dict().items())
    # Of so few weights, nearest rounding is the best now and then: 0.47, 0.37 and 0.49 over ten seeds.
    assert sum(shares) / len(shares) < 0.85


@pytest.mark.parametrize("inputs", ["int4 per_channel mse", "uint4 affine per_channel mse", "uint4 affine mse"])
def test_each_scale_of_the_inputs_is_learned(inputs):
    x = correlated(256, 8) * torch.tensor([0.1, 1.0, 5.0, 20.0] * 2)
    net = prepared(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), [x], inputs=inputs)
    before = net[0].input_quantizer.scale.clone()
    result = reconstruct(net, [x], by="layer", **FAST, scale_learning_rate=0.01)
    factor = net[0].input_quantizer.scale / before
    assert (factor != 1).all()
    assert ((factor - 1).abs() < 0.3).all()
    assert all(fit.after <= fit.before for fit in result.units.values())


def test_bad_input_is_refused():
    x = correlated(32, 8)
    net = prepared(nn.Sequential(nn.Linear(8, 8)), [x])
    with pytest.raises(CalibrationError, match="0 batches"):
        reconstruct(net, [])
    with pytest.raises(CalibrationError, match="reconstruction of 0: .* NaN or Inf"):
        reconstruct(net, [torch.full((4, 8), float("nan"))])
    with pytest.raises(CalibrationError, match="no quantized layers"):
        reconstruct(nn.Linear(2, 2), [x])


def test_minmax_weights_keep_their_scale_and_travel_with_the_state_dict():
    torch.manual_seed(0)
    x = correlated(96, 8)
    net = prepared(nn.Sequential(nn.Linear(8, 8)), [x], "int3 per_channel")
    reconstruct(net, [x], by="layer", **FAST)
    other = nn.Sequential(nn.Linear(8, 8))
    prepare(other, QuantPlan([Rule("*", weight="int3 per_channel")]))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(x), net(x))
    assert torch.equal(F.linear(x, net[0].weight, net[0].bias), net(x))


def test_a_phase_of_ptq(trainer):  # noqa: F811
    module, data = Module(), Data()
    module.net.requires_grad_(True)
    float_module = copy.deepcopy(module).eval()
    phases = ["fold_batch_norm", "calibrate", {"reconstruct": {"iterations": 20, "by": "layer"}}]
    ptq = PTQ("w3 mse a8 mse", phases=phases)
    trainer(ptq).validate(module, datamodule=data, verbose=False)
    assert set(ptq.reconstruction.units) >= {"net.fc"}
    assert not ptq.reconstruction.skipped
    x = data.x[:8]
    assert not torch.equal(module.eval()(x), float_module(x))
    assert all(p.requires_grad for p in module.parameters())


def test_options_of_phases_are_checked_at_once():
    with pytest.raises(PlanError, match="phase 'reconstruct': .*iterations is an integer"):
        PTQ("w4a8", phases=["calibrate", {"reconstruct": {"iterations": "many"}}])
    with pytest.raises(PlanError, match="phase 'reconstruct' has no options 'itterations'.*Did you mean 'iterations'"):
        PTQ("w4a8", phases=["calibrate", {"reconstruct": {"itterations": 3}}])
    with pytest.raises(PlanError, match="phase 'calibrate' has no options"):
        PTQ("w4a8", phases=[{"calibrate": {"x": 1}}])
    with pytest.raises(PlanError, match="use reconstruct or correct_batch_norm, not both"):
        PTQ("w4a8", phases=["calibrate", "correct_batch_norm", "reconstruct"])
    with pytest.raises(PlanError, match=r"(?s)put reconstruct after calibrate.*put equalize before calibrate"):
        PTQ("w4a8", phases=["reconstruct", "calibrate", "equalize"])
    with pytest.raises(PlanError, match="phase 'equalize': iterations is an integer from 1, got 0"):
        PTQ("w4a8", phases=[{"equalize": {"iterations": 0}}, "calibrate"])
    with pytest.raises(PlanError, match="put reconstruct after calibrate"):
        PTQ("w4a8", phases=["reconstruct", "calibrate"])


class Killed(BaseException):
    """Stands for a signal: nothing in the library may catch it."""


@pytest.mark.parametrize("by", ["layer", "block"])
def test_a_killed_run_goes_on_with_the_same_result(tmp_path, by):
    torch.manual_seed(0)
    net, batches = randomize(resnet20()), [torch.randn(16, 3, 8, 8) for _ in range(2)]
    prepared(net, batches, inputs="uint4 affine")
    whole, killed = copy.deepcopy(net), copy.deepcopy(net)
    options = {"iterations": 6, "by": by, "folder": str(tmp_path / "units")}
    expected = reconstruct(whole, batches, **{**options, "folder": None})
    last = list(expected.units)[3]

    def kill(unit, iteration):
        if last.startswith(unit) and iteration == 3:
            raise Killed

    with pytest.raises(Killed):
        reconstruct(killed, batches, on_step=kill, **options)
    assert len(list((tmp_path / "units").glob("unit_*"))) == 3
    steps = []
    resumed = copy.deepcopy(net)
    result = reconstruct(resumed, batches, on_step=lambda unit, iteration: steps.append(unit), **options)
    assert len(set(steps)) == len(expected.units) - 3, "the first three are not learned again"
    assert result == expected
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    with pytest.raises(CalibrationError, match=r"other data: choose another folder"):
        reconstruct(copy.deepcopy(net), batches[:1], **options)
    with pytest.raises(CalibrationError, match=r"other options, weights or ranges: choose"):
        reconstruct(whole, batches, **{**options, "iterations": 7})
    unit = tmp_path / "units" / "unit_0001.safetensors"
    content = bytearray(unit.read_bytes())
    content[-5] ^= 16
    unit.write_bytes(content)
    with pytest.raises(
        CalibrationError,
        match=r"unit_0001.safetensors is not a reconstructed unit: its checksum does not fit its content",
    ):
        reconstruct(copy.deepcopy(net), batches, **options)
    unit.write_bytes(b"x" * 40)
    with pytest.raises(CalibrationError, match=r"unit_0001.safetensors is not a reconstructed unit"):
        reconstruct(copy.deepcopy(net), batches, **options)


def _rank(rank: int, path: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{path}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)).eval()
    x = correlated(256, 50).reshape(256, 2, 5, 5)
    target = net(x).detach()
    prepared(net, [x], "int3 per_channel mse", "uint4 affine")
    nearest = (net(x) - target).square().mean()
    reconstruct(net, [x[rank::2]], by="layer", iterations=100, folder=f"{path}/units")
    assert (net(x) - target).square().mean() < 0.7 * nearest
    torch.save(net.state_dict(), f"{path}/{rank}.pt")
    with pytest.raises(CalibrationError, match=r"in the process of rank 1"):
        reconstruct(net, [x] if rank == 0 else [])
    with pytest.raises(CalibrationError, match=r"NaN or Inf"):
        reconstruct(net, [x if rank == 0 else x * torch.nan], by="layer", iterations=3, correct_batch_norm=False)
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_learn_the_same(tmp_path):
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert len(list((tmp_path / "units").glob("unit_*"))) == 2


def test_batch_norms_are_corrected_by_the_batches_alone():
    """The first samples are tried out once more, to see whether they are independent: that must not count."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)).eval()
    randomize(net)
    batches = [torch.randn(16, 8) + shift for shift in range(3)]
    prepare(net, "w2 a4")
    calibrate(net, batches)
    twin = copy.deepcopy(net)
    reconstruct(net, batches, by="layer", iterations=0)
    correct_batch_norm(twin, batches)
    torch.testing.assert_close(net[1].running_mean, twin[1].running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net[1].running_var, twin[1].running_var, rtol=1e-5, atol=1e-6)
