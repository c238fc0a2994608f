"""Pictures without pyplot, and placing labels."""

from __future__ import annotations

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from matplotlib.figure import Figure
from scipy.optimize import LinearConstraint, minimize

from lq_plugin import plots
from lq_plugin.plots.style import spread
from lq_plugin.utilities.brief import short


def test_neither_pyplot_nor_matplotlibs_settings_are_touched(tmp_path) -> None:
    before = dict(matplotlib.rcParams)
    figure = plots.weight_box_plot(torch.randn(4, 9))
    path = plots.save(figure, tmp_path / "deep" / "box.png")
    assert dict(matplotlib.rcParams) == before
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    code = (
        "import sys, torch; from lq_plugin import plots;"
        "plots.to_png(plots.weight_box_plot(torch.randn(4, 9)));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_equal_data_makes_equal_bytes() -> None:
    weight = torch.randn(4, 9)
    assert plots.to_png(plots.weight_box_plot(weight)) == plots.to_png(plots.weight_box_plot(weight))
    assert isinstance(plots.weight_box_plot(weight), Figure)


@settings(max_examples=80, deadline=None)
@given(
    wanted=st.lists(st.floats(-1.0, 2.0), min_size=1, max_size=12),
    gap=st.floats(0.01, 0.5),
)
def test_labels_keep_their_distance_order_and_place(wanted: list[float], gap: float) -> None:
    placed = spread(wanted, gap, 0.0, 1.0)
    room = min(gap, 1.0 / max(len(wanted) - 1, 1))
    assert all(-1e-9 <= x <= 1 + 1e-9 for x in placed)
    assert all(b - a >= room - 1e-9 for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False))
    order = np.argsort(wanted, kind="stable")
    assert list(np.argsort([placed[i] for i in order], kind="stable")) == list(range(len(wanted)))


@pytest.mark.parametrize("seed", range(5))
def test_labels_are_as_near_as_can_be(seed: int) -> None:
    wanted = np.sort(np.random.default_rng(seed).uniform(-0.2, 1.0, 5))
    difference = np.diff(np.eye(5), axis=0)
    best = minimize(
        lambda x: ((x - wanted) ** 2).sum(),
        np.linspace(0, 1, 5),
        jac=lambda x: 2 * (x - wanted),
        bounds=[(0, 1)] * 5,
        constraints=LinearConstraint(difference, 0.15, np.inf),
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert np.allclose(spread(list(wanted), 0.15, 0.0, 1.0), best.x, atol=1e-4)


def test_long_names_lose_their_middle() -> None:
    name = "model.backbone.stages.3.blocks.11.attention.projection"
    assert len(short(name, 20)) == 20
    assert short(name, 20).endswith("projection")
    assert short("conv1") == "conv1"
