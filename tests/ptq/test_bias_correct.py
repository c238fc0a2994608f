"""Bias correction: every layer's mean output is the float model's again, and what cannot be corrected is named."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from lq_plugin import CalibrationError, QuantPlan, Rule, calibrate, prepare
from lq_plugin.model.calibrate import float_forward
from lq_plugin.model.checkpoint import load_checkpoint
from lq_plugin.model.graph.record import record
from lq_plugin.ptq.batch_norm.fold import find_batch_norm_pairs, fold_batch_norm
from lq_plugin.ptq.bias_correction.correct import bias_correct
from tests.models import randomize, resnet20

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def quantized(model: nn.Module, batches: list[Tensor], plan: Any = "w3 a4 per_tensor") -> nn.Module:
    result = copy.deepcopy(model)
    prepare(result, plan)
    calibrate(result, batches)
    return result.eval()


@torch.no_grad()
def means(model: nn.Module, batches: list[Tensor]) -> dict[str, np.ndarray]:
    """Mean of each channel of each linear and convolution, over all batches, by numpy.

    That of a layer without bias is taken after its batch norm.
    """
    seen: dict[str, list[np.ndarray]] = {}
    hooks = []
    names = dict(model.named_modules())
    for name, module in names.items():
        if isinstance(module, (*_LAYERS, nn.modules.batchnorm._BatchNorm)):
            channel = -1 if isinstance(module, nn.Linear) else 1

            def keep(module: nn.Module, args: Any, y: Tensor, name: str = name, channel: int = channel) -> None:
                seen.setdefault(name, []).append(
                    np.moveaxis(y.double().numpy(), channel, 0).reshape(y.shape[channel], -1)
                )

            hooks.append(module.register_forward_hook(keep))
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    return {
        name: np.concatenate(parts, 1).mean(1)
        for name, parts in seen.items()
        if getattr(names[name], "bias", None) is not None
    }


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, float]:
    assert a.keys() == b.keys()
    return {name: float(np.abs(a[name] - b[name]).max()) for name in a}


MODELS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "linear": (lambda: [nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 4)], (64, 6)),
    "sequences": (lambda: [nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 5)], (8, 7, 6)),
    "conv1d": (lambda: [nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Conv1d(6, 4, 2, groups=2)], (16, 4, 12)),
    "depthwise": (
        lambda: [nn.Conv2d(4, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(), nn.Conv2d(8, 5, 1)],
        (16, 4, 7, 7),
    ),
    "conv3d": (lambda: [nn.Conv3d(2, 4, 2), nn.ReLU(), nn.Conv3d(4, 3, 2)], (8, 2, 5, 5, 5)),
    "transposed": (
        lambda: [nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 3, 2)],
        (8, 4, 5, 5),
    ),
    "transposed1d": (lambda: [nn.ConvTranspose1d(4, 6, 2), nn.ReLU(), nn.ConvTranspose1d(6, 3, 2)], (8, 4, 5)),
    "batch norm": (
        lambda: [
            nn.Conv2d(3, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 5, bias=False),
            nn.BatchNorm1d(5),
        ],
        (16, 3, 8, 8),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_mean_outputs_are_those_of_the_float_model(name: str, dtype: torch.dtype) -> None:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = randomize(nn.Sequential(*build())).to(dtype)
    batches = [torch.randn(shape, dtype=dtype) + 0.3]
    expected = means(model, batches)
    mine = quantized(model, batches)
    before = distance(means(mine, batches), expected)
    assert min(before.values()) > 1e-3
    result = bias_correct(mine, batches)
    after = distance(means(mine, batches), expected)
    assert max(after.values()) < (2e-5 if dtype == torch.float32 else 1e-12), after
    assert result.skipped == {}
    assert list(result.layers) == [name for name, module in model.named_modules() if isinstance(module, _LAYERS)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in mine.modules())


@torch.no_grad()
def test_the_correction_of_one_layer_against_numpy() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).double()
    batches = [torch.randn(n, 4, 6, 6, dtype=torch.float64) for n in (5, 1, 9)]
    mine = quantized(model, batches)
    layer = mine[0]
    x = torch.cat(batches)
    error = F.conv2d(layer.quantized_input(x), layer.quantized_weight(), groups=2) - F.conv2d(x, layer.weight, groups=2)
    expected = error.numpy().mean((0, 2, 3))
    result = bias_correct(mine, batches)
    np.testing.assert_allclose((model[0].bias - mine[0].bias).numpy(), expected, rtol=1e-9, atol=1e-15)
    corrected = result.layers["0"]
    assert (corrected.target, corrected.elements, result.batches) == ("0.bias", 15 * 16, 3)
    assert corrected.mean == pytest.approx(np.abs(expected).mean())
    assert corrected.largest == pytest.approx(np.abs(expected).max())


def test_batches_are_pooled_and_read_once() -> None:
    torch.manual_seed(0)
    model = randomize(nn.Sequential(*MODELS["batch norm"][0]()))
    x = torch.randn(256, 3, 8, 8)
    batches = [x[:32], *x[32:].split(56)]
    expected = means(model, [x])
    mine = quantized(model, batches)
    before = distance(means(mine, [x]), expected)

    def once() -> Iterator[Tensor]:
        yield from batches

    bias_correct(mine, once())
    after = distance(means(mine, [x]), expected)
    assert after["1"] < 1e-5
    assert all(after[name] < 0.1 * before[name] for name in before), (before, after)


def test_upstream_is_corrected_before_downstream_is_measured() -> None:
    """Corrections of layers alone, each with the uncorrected prefix, are other ones."""
    torch.manual_seed(1)
    model, batches = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), [torch.randn(128, 8) + 0.5]
    mine, other = quantized(model, batches), quantized(model, batches)
    with torch.no_grad():
        alone = (other(batches[0]) - model(batches[0])).mean(0)
    bias_correct(mine, batches)
    taken = model[2].bias - mine[2].bias
    assert (taken - alone).abs().max() > 1e-3


@torch.no_grad()
def test_outputs_are_corrected_in_front_of_their_quantizer() -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.ConvTranspose1d(1, 2, 2)), [torch.randn(40, 1, 6)]
    mine = quantized(model, batches, QuantPlan([Rule("*", weight="int3", input="int8 affine", output="int4 affine")]))
    bias_correct(mine, batches)
    expected, seen = means(model, batches), means_in_front(mine, batches)
    for name in ("0", "2"):
        np.testing.assert_allclose(seen[name], expected[name], atol=1e-5)
    assert mine[0](batches[0]).unique().numel() <= 16, "the output is on its quantizer's levels"


def means_in_front(model: nn.Module, batches: list[Tensor]) -> dict[str, np.ndarray]:
    """Means of the layers' outputs while output quantizers pass them on."""
    quantizers = {name: model.get_submodule(name).output_quantizer for name in ("0", "2")}
    found = {}
    for name, quantizer in quantizers.items():
        kept: list[Tensor] = []
        hook = quantizer.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
        for batch in batches:
            model(batch)
        hook.remove()
        channel = -1 if name == "0" else 1
        found[name] = np.moveaxis(torch.cat(kept).numpy(), channel, 0).reshape(kept[0].shape[channel], -1).mean(1)
    return found


def test_folded_and_plain_batch_norms_are_corrected_alike() -> None:
    torch.manual_seed(0)
    model, batches = randomize(resnet20(8)), [torch.randn(8, 3, 32, 32)]
    plan = "w4 a8 per_channel"  # folding scales a channel's levels with its weights
    plain = quantized(model, batches, plan)
    folded = copy.deepcopy(model)
    with torch.no_grad():
        pairs, _ = find_batch_norm_pairs(folded, record(folded, lambda: folded(batches[0])))
        fold_batch_norm(folded, pairs)
    folded = quantized(folded, batches, plan)
    results = [bias_correct(each, batches) for each in (plain, folded)]
    for result in results:
        assert len(result.layers) == 20
        assert result.skipped == {}
        assert result.layers["layer1.0.conv1"].target == "layer1.0.bn1.running_mean"
        assert result.layers["linear"].target == "linear.bias"
    with torch.no_grad():
        y, z, float_y = folded(batches[0]), plain(batches[0]), model(batches[0])
        print(
            (y - z).abs().max(),
            (y - float_y).abs().max(),
            quantized(model, batches, plan)(batches[0]).sub(z).abs().max(),
        )
        torch.testing.assert_close(y, z, atol=2e-2, rtol=1e-2)


def test_a_corrected_checkpoint_has_the_keys_of_before(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, batches = randomize(nn.Sequential(*MODELS["batch norm"][0]())), [torch.randn(16, 3, 8, 8)]
    mine = quantized(model, batches, "w3a8")
    keys = list(mine.state_dict())
    bias_correct(mine, batches)
    assert list(mine.state_dict()) == keys
    torch.save(mine.state_dict(), tmp_path / "model.pt")
    fresh = nn.Sequential(*MODELS["batch norm"][0]()).eval()
    load_checkpoint(fresh, tmp_path / "model.pt", "w3a8")
    with torch.no_grad():
        assert torch.equal(fresh(batches[0]), mine(batches[0]))


class Various(nn.Module):
    """One layer for each reason to be skipped, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.bare = nn.Linear(6, 6, bias=False)
        self.last = nn.Linear(6, 4, bias=False)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.tied, self.tied_too = nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied_too.bias = self.tied.bias
        self.own = Clamped(6, 6)
        self.idle = nn.Linear(6, 6)
        self.a, self.b, self.shared_bn = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6)
        self.reshaped, self.untracked = nn.Linear(6, 5, bias=False), nn.Linear(6, 6, bias=False)
        self.bn, self.bn_untracked = nn.BatchNorm1d(5), nn.BatchNorm1d(6, track_running_stats=False)
        self.twice = nn.Linear(6, 6)
        self.computed = nn.Linear(6, 6)
        nn.utils.parametrize.register_parametrization(self.computed, "bias", nn.Identity())

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.lstm(self.table(tokens))
        x = F.relu(self.bare(x))
        x = self.own(F.relu(self.tied_too(F.relu(self.tied(x)))))
        x = self.twice(F.relu(self.twice(x)))
        x = self.computed(x)
        y = self.bn(self.reshaped(x))
        x = x[:, 0]
        x = self.shared_bn(self.b(F.relu(self.shared_bn(self.a(x)))))
        return self.last(self.bn_untracked(self.untracked(x))) + y.mean()


class Clamped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-0.1, 0.1)


def test_what_is_skipped_says_why() -> None:
    torch.manual_seed(0)
    model, batches = Various().eval(), [torch.randint(0, 10, (32, 5))]
    prepare(model, QuantPlan([Rule("*", weight="int4")]))
    calibrate(model, batches)
    before = copy.deepcopy(model.state_dict())
    result = bias_correct(model, batches)
    assert set(result.layers) == {"twice"}
    assert result.layers["twice"].elements == 2 * 32 * 5
    expected = {
        "table": "Embedding has no bias",
        "bare": "it has no bias, and a new one would change the checkpoint's keys; it is read by 'relu_0', not by a "
        "batch norm alone",
        "last": "is read by 'add_0'",
        "lstm.weight_ih_l0": "made inside the kernel of 'lstm'",
        "tied": "'tied.bias' is shared with 'tied_too.bias'",
        "tied_too": "'tied_too.bias' is shared with 'tied.bias'",
        "own": "Clamped has a forward of its own",
        "idle": "no batch reached it",
        "a": "'shared_bn' after it reads other layers also",
        "b": "'shared_bn' after it reads other layers also",
        "reshaped": "the channels of 'bn' after it are not shown to be its own",
        "untracked": "normalizes each batch by its own mean",
        "computed": "its bias is computed|a forward of its own",
    }
    for name, reason in expected.items():
        assert any(part in result.skipped[name] for part in reason.split("|")), (name, result.skipped[name])
    assert set(result.skipped) == {*expected, "lstm.weight_hh_l0"}
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ["twice.bias"]


def test_refusals_change_nothing() -> None:
    torch.manual_seed(0)
    model, batches = randomize(nn.Sequential(*MODELS["batch norm"][0]())), [torch.randn(8, 3, 8, 8)]
    with pytest.raises(CalibrationError, match="prepare it first"):
        bias_correct(model, batches)
    mine = quantized(model, batches)
    with pytest.raises(CalibrationError, match="0 batches"):
        bias_correct(mine, [])
    with pytest.raises(CalibrationError, match=r"'0' makes NaN or Inf"):
        bias_correct(mine, [batches[0], torch.full_like(batches[0], torch.nan)])
    prepared = copy.deepcopy(model)
    prepare(prepared, "w3a4")
    with pytest.raises(CalibrationError, match="calibrate first"):
        bias_correct(prepared, batches)
    for each in (mine, prepared):
        assert all(torch.equal(value, each.state_dict()[key]) for key, value in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in each.modules())


class Branching(nn.Module):
    """Calls its layer once more when values are large, which quantization can decide."""

    def __init__(self, more: bool) -> None:
        super().__init__()
        self.layer, self.more, self.quantized = nn.Linear(4, 4), more, False

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        again = (
            self.more == self.layer.weight_quantizer.is_enabled if hasattr(self.layer, "weight_quantizer") else False
        )
        return self.layer(y) if again else y


@pytest.mark.parametrize("more", [True, False])
def test_ways_through_the_model_that_differ_are_named(more: bool) -> None:
    model, batches = Branching(more), [torch.randn(8, 4)]
    prepare(model, "w8a8")
    calibrate(model, batches)
    with pytest.raises(CalibrationError, match="'layer'.*the way through the model depends on its values"):
        bias_correct(model, batches)


def test_run_modes_and_float_model() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.Linear(9, 5)), torch.randn(64, 6)
    mine = quantized(model, [x])
    mine.train()
    mine[2].eval()
    bias_correct(mine, [{"x": x}], lambda batch: mine(batch["x"]))
    assert mine[1].training
    assert not mine[2].training
    mine.eval()
    model.eval()
    np.testing.assert_allclose(means(mine, [x])["2"], means(model, [x])["2"], atol=1e-5)
    # The weights are untouched, so the float pass differs by the biases alone.
    with float_forward(mine), torch.no_grad():
        assert torch.equal(mine[0].weight, model[0].weight)
        torch.testing.assert_close(mine[0](x) - mine[0].bias, model[0](x) - model[0].bias)


def _rank(rank: int, path: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{path}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    mine, batches = pooled()
    result = bias_correct(mine, batches[rank : rank + 1])
    assert result.layers["0"].elements == 64
    torch.save(mine.state_dict(), f"{path}/{rank}.pt")
    with pytest.raises(CalibrationError, match="0 batches in the process of rank 1"):
        bias_correct(mine, [] if rank else batches)
    dist.destroy_process_group()


def pooled() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5)), [torch.randn(n, 6) for n in (48, 16)]
    return quantized(model, batches), batches


@pytest.mark.slow
def test_processes_pool_their_batches(tmp_path: Any) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    mine, batches = pooled()
    bias_correct(mine, batches)
    for key, value in mine.state_dict().items():
        torch.testing.assert_close(first[key], value, rtol=1e-6, atol=1e-7)
