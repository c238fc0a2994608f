"""A new range estimator comes in by one decorated function, and is then a range like any other."""

import pytest
import torch
from torch import nn

from lq_plugin import QuantPlan, QuantSpec, SpecError, calibrate, prepare
from lq_plugin.export import load_packed, save_packed
from lq_plugin.intent.ranges import number_in, one_of
from lq_plugin.ranges import Sample, compare_ranges, estimate_range, register_range
from lq_plugin.report import model_report
from lq_plugin.search import Space


@pytest.fixture(autouse=True)
def share():
    """Bounds at a share of the extremes: `share:0.25`, a half without an option."""

    @register_range("share", "a share of the extremes; share:0.25 sets it", option=number_in(0.1, 1.0))
    def share(sample, grid, option):
        factor = float(option or 0.5)
        return sample.minimum * factor, sample.maximum * factor

    return share


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))


def test_a_spec_names_it_and_its_option_is_checked():
    for text in ("int4 per_channel share", "int4 share:0.25"):
        assert str(QuantSpec.parse(text)) == text
    with pytest.raises(SpecError, match=r"range 'share:2': the option must be a number in 0\.1\.\.1"):
        QuantSpec.parse("int4 share:2")
    with pytest.raises(SpecError, match="the option must be a number"):
        estimate_range("share:much", Sample.from_tensor(torch.ones(1, 2)), QuantSpec.parse("int4").grid)
    with pytest.raises(SpecError, match="unknown word 'shore'; .*Did you mean 'share'"):
        QuantSpec.parse("int4 shore")
    assert str(QuantPlan.parse("w4 share a8 share:0.75").rules[0].input) == "uint8 affine share:0.75"


def test_a_range_without_options_takes_none():
    register_range("whole", "all of the values")(lambda sample, grid, option: (sample.minimum, sample.maximum))
    with pytest.raises(SpecError, match="range 'whole' takes no option, got 'x'"):
        QuantSpec.parse("int4 whole:x")
    register_range("sided", "one side", option=one_of("low", "high"))(
        lambda sample, grid, option: (sample.minimum, sample.maximum)
    )
    with pytest.raises(SpecError, match="the option must be low or high"):
        QuantSpec.parse("int4 sided:both")


@pytest.mark.parametrize("name", ["Share", "two words", "mse", "per_tensor", "int", "nearest"])
def test_a_name_with_another_meaning_is_refused(name):
    with pytest.raises(SpecError, match=r"named by|already registered|has a meaning"):
        register_range(name, "something else")(lambda sample, grid, option: (sample.minimum, sample.maximum))


def test_weights_and_activations_are_clipped_there(tmp_path):
    model, x = net(), torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    prepare(model, "int8 share:0.25 / int8 share")
    calibrate(model, [x])
    weight, scale = model[0].weight.detach(), model[0].weight_quantizer.scale.item()
    # By hand: the step that reaches the wider of both bounds on the levels -128..127.
    assert scale == pytest.approx(max(weight.max().item() / 127, -weight.min().item() / 128) * 0.25, rel=1e-6)
    seen = model[0].input_quantizer.scale.item()
    assert seen == pytest.approx(max(x.max().item() / 127, -x.min().item() / 128) * 0.5, rel=1e-6)
    save_packed(model.eval(), tmp_path / "net.safetensors")
    other = net()
    load_packed(other, tmp_path / "net.safetensors")
    assert torch.equal(other.eval()(x), model(x))


def test_comparisons_reports_and_searches_show_it():
    table = compare_ranges(Sample.from_tensor(torch.linspace(-1, 3, 64).unsqueeze(0)), "int4")
    assert table.ranges[-1] == "share"
    assert [float(bound) for bound in table.bounds["share"]] == [-0.5, 1.5]
    model = net()
    prepare(model, "int4 per_channel share / int8 share")
    report = model_report(model, statistics=calibrate(model, [torch.randn(64, 16)]))
    for layer in report.model.layers:
        assert layer.views
        for view in layer.views:
            assert "share" in [mark.label for mark in view.marks]
    space = Space(weight={"bit_widths": 4, "ranges": ["mse", "share:0.25"]})
    assert [str(choice) for choice in space.weight] == ["int4 mse", "int4 share:0.25"]


def test_one_that_is_not_to_be_compared_is_not():
    register_range("slow", "takes minutes", compared=False)(
        lambda sample, grid, option: (sample.minimum, sample.maximum)
    )
    assert "slow" not in compare_ranges(Sample.from_tensor(torch.randn(1, 16)), "int4").ranges
