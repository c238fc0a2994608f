"""The Pareto picture."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st
from matplotlib.text import Text

from lq_plugin import plots

POINTS = [(2.0, 0.10), (3.0, 0.80), (4.0, 0.93), (4.2, 0.90), (5.0, 0.93), (6.0, 0.95), (8.0, 0.951)]


@settings(max_examples=100, deadline=None)
@given(
    points=st.lists(st.tuples(st.integers(1, 6).map(float), st.integers(0, 6).map(float)), min_size=1, max_size=20),
    maximize=st.booleans(),
)
def test_front_is_what_nothing_beats(points: list[tuple[float, float]], maximize: bool) -> None:
    sign = 1 if maximize else -1

    def beaten(point: tuple[float, float]) -> bool:
        return any(x <= point[0] and sign * y >= sign * point[1] and (x, y) != point for x, y in points)

    front = [points[i] for i in plots.pareto_front(points, maximize)]
    assert front == sorted(set(front))
    assert set(front) == {point for point in points if not beaten(point)}


def test_picture_has_front_references_and_float() -> None:
    references = {
        "uniform W3A8 per channel": (2.0, 0.92),
        "W8A8": (8.2, 0.95),
        "W4A8": (4.2, 0.91),
        "W4A4": (4.2, 0.905),
    }
    references["W4A8 mse"] = (4.25, 0.908)
    figure = plots.pareto(POINTS, references, float_metric=0.96, metric="val/acc")
    axes = figure.axes[0]
    trials, front = (c.get_offsets().tolist() for c in axes.collections[:2])
    assert [tuple(p) for p in trials] == POINTS
    assert [tuple(p) for p in front] == [(2.0, 0.10), (3.0, 0.80), (4.0, 0.93), (6.0, 0.95), (8.0, 0.951)]
    assert {tuple(c.get_offsets().tolist()[0]) for c in axes.collections[2:]} == set(references.values())
    labels = [text for text in axes.texts if text.get_text() in references]
    assert {text.get_text() for text in labels} == set(references)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in labels]  # without the leader lines
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    inside = axes.get_window_extent()
    assert all(
        inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1 for box in boxes
    )
    low, high = axes.get_ylim()
    assert low < 0.905
    assert high > 0.96
    hidden = sum(p[1] < low for p in POINTS)
    assert hidden >= 1
    assert any(text.get_text() == f"{hidden} trials below the picture" for text in axes.texts)
    assert any(text.get_text() == "float 0.96" for text in axes.texts)


def test_a_reference_beyond_the_picture_is_named_there() -> None:
    axes = plots.pareto(POINTS, {"uniform 2 bits": (2.0, 0.10), "W4A8": (4.2, 0.91)}, metric="val/acc").axes[0]
    texts = {text.get_text() for text in axes.texts}
    assert texts == {"W4A8", "2 trials, uniform 2 bits below the picture"}
    low, high = axes.get_ylim()
    assert 0.80 < low < 0.90 < 0.951 < high


def test_smaller_may_be_better() -> None:
    figure = plots.pareto([(4.0, 2.0), (5.0, 1.0), (6.0, 30.0)], metric="perplexity", maximize=False)
    assert [tuple(p) for p in figure.axes[0].collections[1].get_offsets().tolist()] == [(4.0, 2.0), (5.0, 1.0)]


def test_one_point_and_none() -> None:
    assert plots.to_png(plots.pareto([(4.0, 0.5)]))
    with pytest.raises(ValueError, match="no points"):
        plots.pareto([])
    with pytest.raises(ValueError, match="finite"):
        plots.pareto([(4.0, float("nan"))])
