"""New figures of a report from outside the package: one of the whole report, one of each layer."""

import matplotlib.image
import pytest
from torch import nn

from lq_plugin import prepare
from lq_plugin.errors import QuantizationError
from lq_plugin.plots.style import new_figure, styled
from lq_plugin.report import model_report, register_layer_picture, register_picture, write_pictures
from lq_plugin.report.data import ReportData


@styled
def bytes_by_layer(report):
    """Bars of the bytes that each layer takes."""
    if report.model is None:
        return None
    figure, axes = new_figure(6.0, 3.0)
    axes.barh([layer.name for layer in report.model.layers], [layer.bytes for layer in report.model.layers])
    return figure


@styled
def weight_shape(layer):
    """A bar for each dim of a layer's weight."""
    figure, axes = new_figure(2.0, 2.0)
    axes.bar(range(len(layer.shape)), layer.shape)
    return figure


@pytest.fixture
def report():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    prepare(model, "w4")
    return model_report(model)


def test_new_figures_are_written_with_those_of_the_library(report, tmp_path):
    register_picture("bytes")(bytes_by_layer)
    register_layer_picture("shape")(weight_shape)
    written = write_pictures(report, tmp_path, formats=["png"])
    assert {path.stem for path in written} == {"bits", "sqnr", "layer_0", "layer_2", "bytes", "shape_0", "shape_2"}
    pixels = matplotlib.image.imread(tmp_path / "shape_0.png")
    assert pixels.shape[0] == pixels.shape[1], "the figure is square"


def test_a_registered_name_replaces_the_figure_of_the_library(report, tmp_path):
    register_picture("bits")(bytes_by_layer)
    drawn = []
    register_layer_picture("layer")(lambda layer: drawn.append(layer.name))
    register_picture("sqnr")(lambda report: None)
    (written,) = write_pictures(report, tmp_path, formats=["svg"], max_layers=1)
    assert written.name == "bits.svg"
    assert drawn == ["0"], "the largest layer"


def test_a_report_without_values_has_no_figures_and_another_result_is_refused(tmp_path):
    register_picture("bytes")(bytes_by_layer)
    assert write_pictures(ReportData("empty"), tmp_path) == []
    register_picture("text")(lambda report: report.title)
    with pytest.raises(QuantizationError, match="picture 'text' is a matplotlib Figure or None, got str"):
        write_pictures(ReportData("empty"), tmp_path)
