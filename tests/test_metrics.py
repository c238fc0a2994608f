"""Metrics against numpy, batch-wise against joint, and two processes against one."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lq_plugin.errors import QuantizationError
from lq_plugin.metrics import SQNR, OutputCosine, PredictionAgreement

METRICS = {
    "sqnr": lambda: SQNR(),
    "cosine": lambda: OutputCosine(),
    "cosine_total": lambda: OutputCosine(per_sample=False),
    "agreement": lambda: PredictionAgreement(),
}


def np_sqnr(preds: np.ndarray, target: np.ndarray) -> float:
    preds, target = preds.astype(np.float64), target.astype(np.float64)
    return 10 * np.log10((target**2).sum() / ((target - preds) ** 2).sum())


def np_cosine(preds: np.ndarray, target: np.ndarray) -> float:
    pairs = zip(
        preds.reshape(len(preds), -1).astype(np.float64),
        target.reshape(len(target), -1).astype(np.float64),
        strict=True,
    )
    return float(np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]))


def np_cosine_total(preds: np.ndarray, target: np.ndarray) -> float:
    return np_cosine(preds.reshape(1, -1), target.reshape(1, -1))


def np_agreement(preds: np.ndarray, target: np.ndarray) -> float:
    return float((preds.argmax(1) == target.argmax(1)).mean())


REFERENCES = {"sqnr": np_sqnr, "cosine": np_cosine, "cosine_total": np_cosine_total, "agreement": np_agreement}


def noisy(samples: int = 37, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(samples, 5, 3, generator=generator)
    return target + 0.3 * torch.randn(target.shape, generator=generator), target


@pytest.mark.parametrize("name", METRICS)
def test_equals_numpy(name: str) -> None:
    preds, target = noisy()
    assert float(METRICS[name]()(preds, target)) == pytest.approx(
        REFERENCES[name](preds.numpy(), target.numpy()), rel=1e-12
    )


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_batches_of_any_size_equal_one_call(name: str, sizes: list[int], seed: int) -> None:
    preds, target = noisy(sum(sizes), seed)
    metric = METRICS[name]()
    for a, b in zip(preds.split(sizes), target.split(sizes), strict=True):
        metric.update(a, b)
    assert float(metric.compute()) == pytest.approx(float(METRICS[name]()(preds, target)), rel=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_a_distorted_tensor_scores_lower_and_reset_forgets_it(name: str) -> None:
    preds, target = noisy()
    metric = METRICS[name]()
    assert float(metric(-preds, target)) < float(METRICS[name]()(preds, target))
    metric.reset()
    assert float(metric(preds, target)) == float(METRICS[name]()(preds, target))


@pytest.mark.parametrize("name", METRICS)
def test_nothing_seen_is_an_error(name: str) -> None:
    metric = METRICS[name]()
    with (
        pytest.warns(UserWarning, match="before the ``update``"),
        pytest.raises(QuantizationError, match=r"nothing to compute"),
    ):
        metric.compute()
    metric.update(torch.zeros(0, 5), torch.zeros(0, 5))
    with pytest.raises(QuantizationError, match=type(metric).__name__):
        metric.compute()


@pytest.mark.parametrize("name", METRICS)
def test_shapes_must_agree(name: str) -> None:
    with pytest.raises(QuantizationError, match=r"\(2, 3\) and \(3, 2\)"):
        METRICS[name]().update(torch.zeros(2, 3), torch.zeros(3, 2))


@pytest.mark.parametrize("name", METRICS)
def test_no_graph_is_kept(name: str) -> None:
    preds, target = noisy()
    metric = METRICS[name]()
    metric.update(preds.requires_grad_(), target.requires_grad_())
    assert not metric.compute().requires_grad


@pytest.mark.parametrize("name", METRICS)
def test_sums_stay_exact_in_a_module_of_low_precision(name: str) -> None:
    preds, target = noisy(1000)
    module = nn.Module()
    module.metric = METRICS[name]()
    module.to(torch.bfloat16)
    for a, b in zip(preds.split(50), target.split(50), strict=True):
        module.metric.update(a, b)
    assert float(module.metric.compute()) == pytest.approx(REFERENCES[name](preds.numpy(), target.numpy()), rel=1e-9)


def test_sqnr_of_perfect_and_of_silent_tensors() -> None:
    x, zero = torch.tensor([1.0, -2.0]), torch.zeros(2)
    assert SQNR()(x, x) == torch.inf
    assert SQNR()(zero, zero) == torch.inf
    assert SQNR()(x, zero) == -torch.inf
    assert SQNR()(torch.tensor([1.0, torch.nan]), x).isnan()


def test_sqnr_sees_noise_far_below_float32() -> None:
    # 1e8 + 1e-4: a float32 sum of squares would lose every one of these.
    target = torch.full((1000,), 1e4)
    preds = target.clone()
    preds[0] += 2.0**-6
    assert float(SQNR()(preds, target)) == pytest.approx(10 * np.log10(1e11 / 2.0**-12), rel=1e-12)


def test_sqnr_grows_six_decibels_a_bit() -> None:
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    values = [float(SQNR()((x * 2**bits).round() / 2**bits, x)) for bits in (4, 5, 6)]
    assert np.diff(values) == pytest.approx([6.02, 6.02], abs=0.05)


def test_cosine_is_blind_to_scale_and_defined_for_zeros() -> None:
    x, zero = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)
    for per_sample in (True, False):
        assert OutputCosine(per_sample)(7 * x, x) == pytest.approx(1.0, abs=1e-15)
        assert OutputCosine(per_sample)(-x, x) == pytest.approx(-1.0, abs=1e-15)
        assert OutputCosine(per_sample)(zero, x) == 0.0
        assert OutputCosine(per_sample)(zero, zero) == 1.0
    assert OutputCosine()(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 2.0])) == 0.0
    with pytest.raises(QuantizationError, match="without dims"):
        OutputCosine().update(torch.tensor(1.0), torch.tensor(1.0))


def test_agreement_takes_any_class_dim() -> None:
    preds, target = noisy(8)  # [8, 5, 3]
    last = PredictionAgreement(dim=-1)(preds, target)
    assert float(last) == float((preds.argmax(-1) == target.argmax(-1)).double().mean())
    assert float(last) == float(PredictionAgreement()(preds.transpose(1, 2), target.transpose(1, 2)))
    with pytest.raises(QuantizationError, match="no such dim"):
        PredictionAgreement().update(torch.zeros(3), torch.zeros(3))


def test_agreement_refuses_nan() -> None:
    # argmax calls NaN the highest score: two broken models would agree.
    broken = torch.full((2, 3), torch.nan)
    with pytest.raises(QuantizationError, match="NaN"):
        PredictionAgreement().update(broken, broken)


def test_metrics_work_in_a_collection() -> None:
    preds, target = noisy()
    values = MetricCollection({name: make() for name, make in METRICS.items()})(preds, target)
    assert {name: float(value) for name, value in values.items()} == {
        name: float(make()(preds, target)) for name, make in METRICS.items()
    }


#: Samples of the two processes: uneven, and none in the second.
SHARES = ((30, 7), (37, 0))


def _compute_in_process(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        preds, target = noisy()
        results = {}
        for share in SHARES:
            start = sum(share[:rank])
            mine = slice(start, start + share[rank])
            for name, make in METRICS.items():
                metric: Metric = make()
                metric.update(preds[mine], target[mine])
                results[f"{name}/{share}"] = float(metric.compute())
        torch.save(results, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_compute_in_process, args=(port, str(tmp_path)), nprocs=2)
    preds, target = noisy()
    for rank in (0, 1):
        results = torch.load(tmp_path / f"{rank}.pt")
        for share in SHARES:
            for name, make in METRICS.items():
                assert results[f"{name}/{share}"] == pytest.approx(float(make()(preds, target)), rel=1e-12), (
                    name,
                    share,
                    rank,
                )
