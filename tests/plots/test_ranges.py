"""The activation histogram: its counts, its thresholds, its labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lq_plugin import plots
from lq_plugin.errors import CalibrationError
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.ranges import Histogram, Sample, compare_ranges


def histogram(x: torch.Tensor, rows: int = 1) -> Histogram:
    collected = Histogram(rows=rows, max_samples=None)
    collected.update(x)
    return collected


def bars(figure) -> tuple[np.ndarray, np.ndarray]:
    patch = figure.axes[0].patches[0]
    return patch.get_data().values, patch.get_data().edges


def names(figure) -> list:
    return figure.axes[0].texts


def thresholds(figure) -> list[float]:
    """Returns the places of lines from bottom to top."""
    return sorted({float(line.get_xdata()[0]) for line in figure.axes[0].lines if list(line.get_ydata()) == [0, 1]})


DATA = {
    "relu": torch.relu(torch.randn(20000, generator=torch.Generator().manual_seed(0))),
    "laplace": torch.randn(20000, generator=torch.Generator().manual_seed(1)).pow(3),
    "outlier": torch.cat([torch.rand(5000, generator=torch.Generator().manual_seed(2)), torch.tensor([50.0])]),
    "negative": -torch.rand(5000, generator=torch.Generator().manual_seed(3)),
}


@pytest.mark.parametrize("spec", ["uint4 affine", "int8"])
@pytest.mark.parametrize("data", DATA)
def test_every_estimator_is_drawn_and_no_label_overlaps(data: str, spec: str) -> None:
    collected = histogram(DATA[data])
    figure = plots.activation_histogram(collected, spec, "conv.input", in_force=(-0.5, 1.5))
    table = compare_ranges(collected.sample(), spec)
    expected = set()
    for entry in [*table.entries(), type("InForce", (), {"minimum": -0.5, "maximum": 1.5})]:
        expected |= {entry.maximum} | ({entry.minimum} if entry.minimum < 0 and DATA[data].min() < 0 else set())
    assert thresholds(figure) == pytest.approx(sorted(expected))
    assert {text.get_text().removesuffix(" →") for text in names(figure)} == {*table.ranges, "in force"}
    bold = [text.get_text() for text in names(figure) if text.get_fontweight() == "bold"]
    assert bold == [table.best]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in names(figure)]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    # All of it is inside the picture.
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(box) for box in boxes)


def test_counts_are_the_datas() -> None:
    x = DATA["laplace"]
    counts, edges = bars(plots.activation_histogram(histogram(x), "int8"))
    exact = np.histogram(x.numpy(), edges)[0]
    assert counts.sum() == pytest.approx(len(x), rel=0.01)
    # Bins of the statistics straddle those of the picture: compare what is below each edge.
    assert np.abs(np.cumsum(counts) - np.cumsum(exact)).max() < 0.02 * len(x)


def test_counts_of_exact_values() -> None:
    x = torch.tensor([[0.0, 0.5, 1.0, 1.0]])
    counts, edges = bars(plots.activation_histogram(Sample.from_tensor(x), "uint8"))
    assert counts.sum() == 3  # zeros, a quarter of all, are counted in the note
    assert counts[-1] == 2
    assert (edges[0], edges[-1]) == (0.0, 1.0)


def test_zeros_of_a_relu_do_not_hide_the_rest() -> None:
    x = DATA["relu"]
    figure = plots.activation_histogram(histogram(x), "uint4 affine")
    counts, _ = bars(figure)
    assert counts.sum() == pytest.approx(float((x > 0).sum()), rel=0.01)
    notes = [text.get_text() for text in figure.legends[0].get_texts()]
    assert notes[-1] == f"{float((x == 0).float().mean()):.0%} exact zeros, not drawn"
    assert figure.axes[0].get_yscale() == "log"


def test_one_channel_of_many() -> None:
    x = torch.randn(3, 4000) * torch.tensor([[1.0], [5.0], [2.0]])
    collected = histogram(x, rows=3)
    furthest = plots.activation_histogram(collected, QuantSpec.parse("int8 per_channel"), "fc.input")
    assert "channel 1 of 3" in furthest._suptitle.get_text()
    chosen = plots.activation_histogram(collected, "int8 per_channel", "fc.input", row=2)
    assert bars(chosen)[1][-1] == pytest.approx(float(x[2].max()))


def test_estimators_can_be_chosen_and_nothing_is_an_error() -> None:
    figure = plots.activation_histogram(histogram(DATA["relu"]), "uint4", ranges=["mse", "percentile:99"])
    assert {text.get_text() for text in names(figure)} == {"mse", "percentile:99"}
    with pytest.raises(CalibrationError):
        plots.activation_histogram(Histogram(), "uint4")
    constant = plots.activation_histogram(histogram(torch.zeros(10)), "uint4 affine")
    assert plots.to_png(constant)
