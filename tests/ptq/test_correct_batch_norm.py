"""Batch norm correction: output statistics of the float model are kept, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lq_plugin import CalibrationError, QuantizationError, calibrate, prepare
from lq_plugin.model.graph.record import record
from lq_plugin.ptq.batch_norm.correct import correct_batch_norm
from lq_plugin.ptq.batch_norm.fold import find_batch_norm_pairs, fold_batch_norm


def stack(seed: int = 0) -> nn.Sequential:
    """Three convolutions with batch norms whose statistics are those of no data."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for c_in, c_out in ((3, 6), (6, 8), (8, 5)):
        bn = nn.BatchNorm2d(c_out)
        nn.init.normal_(bn.running_mean, std=0.3)
        nn.init.uniform_(bn.running_var, 0.5, 2.0)
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias, std=0.2)
        layers += [nn.Conv2d(c_in, c_out, 3, bias=False), bn, nn.ReLU()]
    return nn.Sequential(*layers).eval()


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def quantized(model: nn.Module, batches: list[Tensor], plan: str = "w2a4") -> nn.Module:
    result = copy.deepcopy(model)
    prepare(result, plan)
    calibrate(result, batches)
    return result


def output_statistics(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Mean and standard deviation of each channel behind each batch norm."""
    seen: dict[nn.Module, list[Tensor]] = {m: [] for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    hooks = [m.register_forward_hook(lambda m, args, y: seen[m].append(y)) for m in seen]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    joined = [torch.cat(outputs).double().transpose(0, 1).flatten(1) for outputs in seen.values()]
    return [torch.stack([y.mean(1), y.std(1)]) for y in joined]


def test_output_statistics_of_the_float_model_are_kept() -> None:
    model, batches = stack(), [images(16)]
    mine = quantized(model, batches)
    expected = output_statistics(model, batches)
    before = [(a - b).abs().max() for a, b in zip(output_statistics(mine, batches), expected, strict=True)]
    assert min(before) > 0.03
    result = correct_batch_norm(mine, batches)
    for a, b in zip(output_statistics(mine, batches), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert list(result.shifts) == ["1", "4", "7"]
    assert result.batches == 1


def test_stored_statistics_are_those_of_the_formula() -> None:
    # One layer, so that the float and the quantized input of its batch norm can be written down.
    model, batches = stack()[:2], [images(10, seed) for seed in range(3)]
    mine = quantized(model, batches)
    with torch.no_grad():
        floats, quants = (torch.cat([m[0](x) for x in batches]).double().numpy() for m in (model, mine))
    correct_batch_norm(mine, batches)
    mean_f, mean_q = (x.mean((0, 2, 3)) for x in (floats, quants))
    var_f, var_q = (x.var((0, 2, 3)) for x in (floats, quants))
    old_mean, old_var = (b.double().numpy() for b in (model[1].running_mean, model[1].running_var))
    a = ((var_f + 1e-5) / (var_q + 1e-5)) ** 0.5
    torch.testing.assert_close(
        mine[1].running_mean.double(), torch.from_numpy(mean_q - (mean_f - old_mean) / a), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(
        mine[1].running_var.double(), torch.from_numpy((old_var + 1e-5) / a**2 - 1e-5), atol=1e-6, rtol=1e-5
    )


def test_a_model_that_hardly_changed_hardly_changes() -> None:
    model, batches = stack(), list(images(8).split(2))
    mine = quantized(model, batches, "int16 per_channel / uint16 affine ema")
    shifts = correct_batch_norm(mine, batches).shifts
    assert max(s.mean_shift for s in shifts.values()) < 1e-3
    assert all(0.999 < low <= high < 1.001 for low, high in (s.variance_ratio for s in shifts.values()))
    # Statistics of these few images are far from the stored ones: re-estimating would have taken them.
    assert (images(8).mean() - model[1].running_mean).abs().max() > 0.1


def test_correcting_a_folded_model_equals_folding_a_corrected_one() -> None:
    # Weights per channel: folding scales a channel's levels with its weights.
    model, batches = stack(), list(images(16).split(8))
    plain = quantized(model, batches)
    correct_batch_norm(plain, batches)
    folded = copy.deepcopy(model)
    recording = record(folded, lambda: folded(batches[0]))
    pairs, _ = find_batch_norm_pairs(folded, recording)
    assert len(pairs) == 3
    fold_batch_norm(folded, pairs)
    folded = quantized(folded, batches)
    correct_batch_norm(folded, batches)
    x = images(4, seed=7)
    with torch.no_grad():
        # ε stands beside another variance in a folded layer, so the two gains differ by about ε / v.
        torch.testing.assert_close(folded(x), plain(x), atol=2e-3, rtol=2e-3)
        assert (folded(x) - quantized(model, batches)(x)).abs().max() > 0.05


class Twice(nn.Module):
    """One batch norm for two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Linear(4, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.idle = nn.BatchNorm1d(3)
        self.bare = nn.BatchNorm1d(6, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bare(self.bn(input=self.b(self.bn(self.a(x)).relu())))


def test_shared_idle_and_untracked_batch_norms() -> None:
    torch.manual_seed(0)
    model, batches = Twice().eval(), [torch.randn(32, 4), torch.randn(8, 4)]
    prepare(model, "w3a8")
    calibrate(model, batches)
    result = correct_batch_norm(model, batches)
    assert list(result.shifts) == ["bn"]
    assert result.shifts["bn"].elements == 2 * 40
    assert (result.never_called, result.without_statistics) == (("idle",), ("bare",))


def test_only_named_layers_change_and_modes_and_hooks_stay() -> None:
    model, batches = stack(), [images(8)]
    mine = quantized(model, batches)
    mine[4].train()
    correct_batch_norm(mine, iter(batches), layers=["4"])
    assert mine[4].training
    assert not mine[1].training
    assert not any(m._forward_pre_hooks for m in mine.modules())
    assert torch.equal(mine[1].running_mean, model[1].running_mean)
    assert not torch.equal(mine[4].running_mean, model[4].running_mean)
    with pytest.raises(QuantizationError, match=r"'5'"):
        correct_batch_norm(mine, batches, layers=["5"])


def test_refusals_change_nothing() -> None:
    model, batches = stack(), [images(8)]
    with pytest.raises(CalibrationError, match="prepare it first"):
        correct_batch_norm(model, batches)
    mine = quantized(model, batches)
    with pytest.raises(CalibrationError, match="0 batches"):
        correct_batch_norm(mine, [])
    with pytest.raises(CalibrationError, match=r"NaN or Inf at the input of '1'"):
        correct_batch_norm(mine, [batches[0], torch.full_like(batches[0], torch.nan)])
    prepared = copy.deepcopy(model)
    prepare(prepared, "w2a4")
    with pytest.raises(CalibrationError, match="calibrate first"):
        correct_batch_norm(prepared, batches)
    for changed in (mine, prepared):
        assert torch.equal(changed[1].running_mean, model[1].running_mean)
        assert torch.equal(changed[7].running_var, model[7].running_var)
        assert not any(m._forward_pre_hooks for m in changed.modules())


class Differs(nn.Module):
    """Calls its batch norm once more in one of the two passes."""

    def __init__(self, more_in_float):
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 3), nn.BatchNorm1d(3)
        self.more_in_float = more_in_float

    def forward(self, x):
        y = self.bn(self.fc(x))
        return self.bn(y) if self.more_in_float != self.fc.weight_quantizer.is_enabled else y


@pytest.mark.parametrize(
    ("more_in_float", "message"), [(True, "called it 1 times less"), (False, "called it more often")]
)
def test_passes_that_differ_are_refused(more_in_float, message):
    model, x = Differs(more_in_float).eval(), torch.randn(8, 4)
    prepare(model, "w4a8")
    calibrate(model, [x])
    mean = model.bn.running_mean.clone()
    with pytest.raises(CalibrationError, match=f"batch norm 'bn': the quantized pass {message}.*depends on its values"):
        correct_batch_norm(model, [x])
    assert torch.equal(model.bn.running_mean, mean)
