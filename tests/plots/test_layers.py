"""Pictures of a model show what the numbers say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from torch import nn

import lq_plugin
from lq_plugin import plots
from lq_plugin.model.measure.cost import Cost, cost
from lq_plugin.model.measure.fidelity import FidelityRow, layer_fidelity
from lq_plugin.plots.style import VERMILION


def texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def overlaps(figure, labels) -> list[tuple[str, str]]:
    """Pairs of texts that share a part of the picture."""
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in labels if text.get_text()]
    return [(a, b) for i, (a, box) in enumerate(boxes) for b, other in boxes[i + 1 :] if box.overlaps(other)]


def test_box_plot_draws_quartiles_and_ranges() -> None:
    weight = torch.randn(6, 4, 3, 3)
    low, high = weight.flatten(1).amin(1) / 2, weight.flatten(1).amax(1) / 2
    figure = plots.weight_box_plot(weight, low, high, "conv1.weight", "int4")
    axes = figure.axes[0]
    q1, q3 = np.percentile(weight.flatten(1).numpy(), [25, 75], axis=1)
    boxes = [patch for patch in axes.patches if patch.get_height() > 0]
    assert [box.get_y() for box in boxes] == pytest.approx(q1, abs=1e-5)
    assert [box.get_y() + box.get_height() for box in boxes] == pytest.approx(q3, abs=1e-5)
    drawn = [
        c for c in axes.collections if isinstance(c, LineCollection) and tuple(c.get_color()[0]) == to_rgba(VERMILION)
    ]
    heights = [[segment[0][1] for segment in c.get_segments()] for c in drawn]
    assert heights[0] == pytest.approx(low.numpy(), abs=1e-6)
    assert heights[1] == pytest.approx(high.numpy(), abs=1e-6)
    assert axes.get_title(loc="left") == "conv1.weight   int4"


@pytest.mark.parametrize("channels", [1, 72, 73, 700])
def test_box_plot_of_any_number_of_channels(channels: int) -> None:
    weight = torch.randn(channels, 16)
    figure = plots.weight_box_plot(weight, torch.tensor(-1.0), torch.tensor(1.0))
    left, right = figure.axes[0].get_xlim()
    assert left < 0
    assert right > channels - 1
    assert not overlaps(figure, figure.axes[0].get_xticklabels())
    low, high = figure.axes[0].get_ylim()
    assert low < weight.min()
    assert high > weight.max()


def test_box_plot_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"fc: bounds .* 4 channels, got 3"):
        plots.weight_box_plot(torch.randn(4, 2), torch.zeros(3), name="fc")
    with pytest.raises(ValueError, match="no values"):
        plots.weight_box_plot(torch.randn(0, 2))


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 2))
    rules = [
        {"match": "*", "weight": "int4 group4", "input": "uint8 affine percentile:95"},
        {"match": "3", "weight": "float"},
    ]
    lq_plugin.prepare(model, {"rules": rules})
    lq_plugin.calibrate(model, [torch.randn(64, 8)])
    return model


def test_bits_per_layer(model: nn.Sequential) -> None:
    figure = plots.bits_per_layer(cost(model))
    axes = figure.axes[0]
    widths = [patch.get_x() + patch.get_width() for patch in axes.patches]
    assert widths == [4, 4, 32, 12, 12, 32]  # plain bits, then with scales: 4 + 32 / 4
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2", "3"]
    assert texts(figure)[:3] == ["12.00", "12.00", "float"]
    inputs = next(line for line in axes.lines if len(line.get_xdata()))
    assert list(inputs.get_xdata()) == [8, 8, 8]
    with pytest.raises(ValueError, match="no layer"):
        plots.bits_per_layer(Cost(()))


def test_sqnr_per_layer(model: nn.Sequential) -> None:
    rows = layer_fidelity(model, lambda: model(torch.randn(64, 8)))
    figure = plots.sqnr_per_layer(rows)
    points = {line.get_label(): line.get_xdata() for line in figure.axes[0].lines}
    assert list(points["weight"]) == [row.sqnr_db for row in rows if row.slot == "weight"]
    assert list(points["input"]) == [row.sqnr_db for row in rows if row.slot == "input"]
    assert any(text.startswith("clipped input") for text in texts(figure))
    with pytest.raises(ValueError, match="no layer"):
        plots.sqnr_per_layer([FidelityRow("a", "weight", "int4")])


def test_many_layers_stay_readable() -> None:
    rows = [FidelityRow(f"model.blocks.{i}.attention.projection", "weight", "int4", float(i), 0.01) for i in range(120)]
    figure = plots.sqnr_per_layer(rows)
    assert not overlaps(figure, figure.axes[0].get_yticklabels())
    assert not overlaps(figure, figure.axes[0].texts)
    # What all names share says nothing.
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][:2] == [
        "0.attention.projection",
        "1.attention.projection",
    ]


def test_shortened_names_stay_different() -> None:
    middle = "a.very.long.path.to.the.layer"
    rows = [FidelityRow(f"first.{i}.{middle}.{middle}.conv", "weight", "int4", 1.0) for i in range(3)]
    rows += [FidelityRow(f"{middle}.{i}.{middle}.conv", "weight", "int4", 1.0) for i in range(3)]
    labels = [label.get_text() for label in plots.sqnr_per_layer(rows).axes[0].get_yticklabels()]
    assert len(set(labels)) == 6
