"""A search space over patterns."""

import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution

from lq_plugin.errors import PlanError
from lq_plugin.intent.plan import LayerInfo, QuantPlan
from lq_plugin.search.space.patterns import PatternSpace

LAYERS = {
    "plan": {
        "rules": [{"match": "*", "weight": "int8", "input": "uint8 affine ema"}],
        "schedule": {"activations_start": "epoch 1"},
    },
    "rules": [
        {
            "match": "conv*",
            "weight": {"bit_widths": [2, 3, 4], "granularities": ["per_channel"], "ranges": ["mse", "minmax"]},
        },
        {"match": "type:Linear", "weight": "int4 group16", "input": ["uint4 affine ema", "float"]},
    ],
}


def test_one_parameter_for_all_layers_of_a_pattern():
    space = PatternSpace.parse(LAYERS)
    assert space.distributions == {
        "conv*.weight.bits": IntDistribution(2, 4),
        "conv*.weight.scheme": CategoricalDistribution(["int per_channel mse", "int per_channel minmax"]),
        "type:Linear.input": CategoricalDistribution(["uint4 affine ema", "float"]),
    }


def test_the_plan_of_some_values():
    params = {"conv*.weight.bits": 3, "conv*.weight.scheme": "int per_channel minmax", "type:Linear.input": "float"}
    plan = PatternSpace.parse(LAYERS).plan(params)
    assert plan == QuantPlan.from_dict(
        {
            "rules": [
                {"match": "*", "weight": "int8", "input": "uint8 affine ema"},
                {"match": "conv*", "weight": "int3 per_channel minmax"},
                {"match": "type:Linear", "weight": "int4 group16", "input": "float"},
            ],
            "schedule": {"activations_start": "epoch 1"},
        }
    )
    layers = [LayerInfo("conv1", ("Conv2d",), 4), LayerInfo("fc", ("Linear",), 32)]
    resolved = plan.resolve(layers)
    assert [str(resolved[name].weight) for name in ("conv1", "fc")] == ["int3 per_channel", "int4 group16"]
    assert resolved["fc"].input is None


def test_uniform_plans_from_wide_to_narrow():
    bits = [params["conv*.weight.bits"] for params in PatternSpace.parse(LAYERS).uniform()]
    assert bits == [4, 3, 2]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"weight": "int4"}, "nothing to choose"),
        ({"rules": [{"match": "a", "weight": ["int4", "int8"]}, {"match": "a", "input": "uint8"}]}, "'a' has 2 rules"),
        ({"weight": ["int4", "int8"], "tie": ["a.*"]}, "write a pattern that matches them all"),
    ],
)
def test_what_cannot_be_searched(layers, message):
    with pytest.raises(PlanError, match=message):
        PatternSpace.parse(layers)
