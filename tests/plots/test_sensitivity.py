"""The map of sensitivities shows the numbers it is given."""

from __future__ import annotations

import numpy as np
import pytest

from lq_plugin import plots

VALUES = {"b.weight": {2: 1.5, 4: 0.02, 8: 1e-9}, "a.weight": {8: 0.0, 4: 0.3, 32: 0.0}}


def test_rows_keep_their_order_columns_are_sorted_and_each_cell_has_its_number() -> None:
    axes = plots.sensitivity_map(VALUES, "fisher").axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["b.weight", "a.weight"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2", "4", "8", "float"]
    written = {tuple(map(int, text.get_position()[::-1])): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "1.5", (0, 1): ".02", (0, 2): "1e-9", (1, 1): ".3", (1, 2): "0", (1, 3): "0"}
    (image,) = axes.get_images()
    drawn = image.get_array()
    assert drawn.mask.tolist() == [[False, False, False, True], [True, False, False, False]]
    # Six decades below the largest, the rest is drawn as that.
    np.testing.assert_allclose(drawn.compressed(), [1.5, 0.02, 1.5e-6, 0.3, 1.5e-6, 1.5e-6])


def test_the_darker_the_worse() -> None:
    image = plots.sensitivity_map({f"layer{i}": {2: 10.0**-i} for i in range(5)}).axes[0].get_images()[0]
    light = image.to_rgba(image.get_array())[:, 0, :3].sum(1)
    assert (np.diff(light) > 0).all()


def test_all_zero_and_very_many_rows_are_drawn() -> None:
    assert plots.to_png(plots.sensitivity_map({"a": {2: 0.0}})).startswith(b"\x89PNG")
    assert not plots.sensitivity_map({f"layer{i}": {2: 1.0} for i in range(200)}).axes[0].texts


@pytest.mark.parametrize(
    ("values", "message"), [({}, "no sensitivity"), ({"a": {2: -1.0}}, "not below 0"), ({"a": {2: np.nan}}, "finite")]
)
def test_what_cannot_be_drawn_is_refused(values: dict[str, dict[int, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.sensitivity_map(values)
