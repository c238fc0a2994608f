"""Freezing survives train(); re-estimated statistics equal numpy's over everything that was seen."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings, strategies as st
from torch import nn

from lq_plugin.errors import CalibrationError, QuantizationError
from lq_plugin.ptq.batch_norm.reestimate import freeze_batch_norm, reestimate_batch_norm
from tests.models import Function, SharedConv, randomize, resnet20


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def net(**kwargs) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, **kwargs),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
    )


# --- freezing --------------------------------------------------------------------------------------


def test_freeze_keeps_statistics_and_trains_the_affine():
    model = randomize(net()).train()
    frozen = freeze_batch_norm(model)
    assert len(frozen) == 2
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()  # after a validation epoch
    frozen.apply()
    frozen.apply()
    assert flags(model) == {"": True, "0": True, "1": False, "2": True, "3": True, "4": True, "5": False}
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for bn in (model[1], model[5]):
        assert bool(bn.weight.grad.abs().sum() > 0)
        assert bool(bn.bias.grad.abs().sum() > 0)


def test_context_manager_releases_also_on_exception():
    model = net().train()

    def use() -> None:
        with freeze_batch_norm(model):
            assert not model[1].training
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert all(flags(model).values())


def test_release_follows_the_parent_and_respects_other_freezing():
    model = net().train()
    model[5].eval()  # the user's own
    frozen = freeze_batch_norm(model)
    frozen.release()
    assert (model[1].training, model[5].training) == (True, False)
    model = net().eval()
    frozen = freeze_batch_norm(model)  # frozen while in eval mode, released while training
    model.train()
    frozen.apply()
    frozen.release()
    assert all(flags(model).values())
    frozen.apply()
    model.eval()
    frozen.release()  # released during validation
    assert not any(flags(model).values())


def test_freeze_some_layers_a_root_and_no_instance_norm():
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True), nn.SyncBatchNorm(3), nn.GroupNorm(1, 3)
    )
    freeze_batch_norm(model)
    assert [m.training for m in model] == [False, True, False, True]
    model.train()
    freeze_batch_norm(model, ["2"])
    assert [m.training for m in model] == [True, True, False, True]
    with pytest.raises(QuantizationError, match=r"2 faults(.|\n)*'1'(.|\n)*'9'"):
        freeze_batch_norm(model, ["1", "2", "9"])
    root = nn.BatchNorm1d(2)
    with freeze_batch_norm(root):
        assert not root.training
    assert root.training


# --- re-estimating ---------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 6), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
    offset=st.sampled_from([0.0, 1e3]),
)
def test_statistics_equal_numpy_over_all_elements(sizes: list[int], seed: int, offset: float):
    """Ragged batches and a large mean: averages of averages, or E[x²] - E[x]², would fail."""
    generator = torch.Generator().manual_seed(seed)
    batches = [
        torch.randn(n, 3, 2, 5, generator=generator, dtype=torch.float64) * (i + 1) + offset
        for i, n in enumerate(sizes)
    ]
    model = nn.Sequential(nn.BatchNorm2d(3)).double()
    report = reestimate_batch_norm(model, batches, model)
    everything = np.concatenate([b.numpy() for b in batches]).transpose(1, 0, 2, 3).reshape(3, -1)
    np.testing.assert_allclose(model[0].running_mean, everything.mean(1), rtol=1e-10)
    np.testing.assert_allclose(model[0].running_var, everything.var(1, ddof=1), rtol=1e-10)
    shift = report.shifts["0"]
    assert (report.batches, shift.elements) == (len(sizes), everything.shape[1])
    assert shift.mean_shift == pytest.approx(np.abs(everything.mean(1)).max() / np.sqrt(1 + 1e-5), rel=1e-9)
    ratios = (everything.var(1, ddof=1) + 1e-5) / (1 + 1e-5)
    assert shift.variance_ratio == pytest.approx((ratios.min(), ratios.max()), rel=1e-9)


def test_one_batch_equals_a_training_step_with_momentum_one():
    torch.manual_seed(0)
    model, x = resnet20(4).double(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    reference = copy.deepcopy(model)
    for m in reference.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
    reference.train()(x)
    report = reestimate_batch_norm(model, [x], model)
    assert len(report.shifts) == 19
    wanted = reference.state_dict()
    for key, value in model.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(value, wanted[key], rtol=1e-10, atol=1e-12)


def test_flags_momentum_and_counter_are_restored_and_dropout_stays_off():
    model = net(momentum=0.3).train()
    model[4].eval()
    model(torch.randn(2, 3, 8, 8))
    before, state = flags(model), {k: v.clone() for k, v in model.state_dict().items()}
    seen = []

    def run(x):
        seen.append(flags(model))
        assert not torch.is_grad_enabled()
        return model(x)

    identities = [id(t) for t in model.buffers()]
    report = reestimate_batch_norm(model, (torch.randn(4, 3, 8, 8) for _ in range(3)), run)
    assert seen == [{"": False, "0": False, "1": True, "2": False, "3": False, "4": False, "5": True}] * 3
    assert flags(model) == before
    assert model[1].momentum == 0.3
    assert [id(t) for t in model.buffers()] == identities
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
    assert changed == {"1.running_mean", "1.running_var", "5.running_mean", "5.running_var"}
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert (report.batches, report.never_called) == (3, ())


def test_shared_layers_pool_all_calls_and_idle_ones_are_listed():
    bn = nn.BatchNorm1d(2).double()
    idle, plain = nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False)
    model = Function(lambda m, x: m.plain((m.bn(x), m.bn(input=x + 10))[1].float()), bn=bn, idle=idle, plain=plain)
    x = torch.randn(5, 2, dtype=torch.float64)
    report = reestimate_batch_norm(model, [x], model)
    torch.testing.assert_close(bn.running_mean, x.mean(0) + 5)
    assert report.shifts["bn"].elements == 10
    assert (report.never_called, report.without_statistics) == (("idle",), ("plain",))
    assert torch.equal(idle.running_var, torch.ones(2))
    assert int(bn.num_batches_tracked) == 0


def test_only_the_chosen_layers():
    model = randomize(SharedConv())
    before = copy.deepcopy(model.state_dict())
    report = reestimate_batch_norm(model, [torch.randn(2, 8, 4, 4)], model, layers=["bn2"])
    assert list(report.shifts) == ["bn2"]
    assert torch.equal(model.bn1.running_mean, before["bn1.running_mean"])
    assert not torch.equal(model.bn2.running_mean, before["bn2.running_mean"])


def test_empty_and_unusable_data_leave_everything_as_it_was():
    model = randomize(net()).train()
    state, before = copy.deepcopy(model.state_dict()), flags(model)

    def fails(x):
        model(x)
        raise KeyError("run")

    nan = torch.randn(2, 3, 8, 8)
    nan[0, 0] = float("nan")
    for batches, run, error, text in (
        ([], model, CalibrationError, "got no batch"),
        ([torch.randn(2, 3, 8, 8), nan], model, CalibrationError, "'1' was given NaN or Inf"),
        ([torch.randn(2, 3, 8, 8)], fails, KeyError, "run"),
    ):
        with pytest.raises(error, match=text):
            reestimate_batch_norm(model, batches, run)
        assert flags(model) == before
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert all(not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_pooled_in_float32(dtype: torch.dtype):
    """Under mixed precision the statistics are float32: a variance of 300² does not even fit float16."""
    x = (300 * torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))).to(dtype)
    model = nn.Sequential(nn.BatchNorm1d(1))
    reestimate_batch_norm(model, [x[:300], x[300:]], model)
    torch.testing.assert_close(model[0].running_var, x.double().var(0).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(model[0].running_mean, x.double().mean(0).float(), rtol=1e-5, atol=0)


def test_inference_mode_and_a_later_training_step():
    model = net()
    with torch.inference_mode():
        reestimate_batch_norm(model, [torch.randn(2, 3, 8, 8)], model)
    assert not any(t.is_inference() for t in model.buffers())
    model.train()(torch.randn(2, 3, 8, 8)).sum().backward()


def test_a_model_without_batch_norm_needs_no_batch():
    report = reestimate_batch_norm(
        nn.Sequential(nn.InstanceNorm1d(2, track_running_stats=True)), [], lambda batch: None
    )
    assert (report.batches, report.shifts) == (0, {})


def _rank(rank: int, path: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{path}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    data = torch.randn(10, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = nn.Sequential(nn.BatchNorm1d(3)).double()
    reestimate_batch_norm(model, [data[:7]] if rank == 0 else [data[7:]], model)
    torch.testing.assert_close(model[0].running_mean, data.mean(0))
    torch.testing.assert_close(model[0].running_var, data.var(0))
    torch.save(model.state_dict(), f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_pool_their_data(tmp_path: Path):
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
