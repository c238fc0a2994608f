from __future__ import annotations

from typing import Any

import optuna
import pytest
import yaml
from hypothesis import given, strategies as st
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, IntDistribution

from lq_plugin.errors import PlanError, QuantizationError, SpecError
from lq_plugin.intent.plan import LayerInfo, QuantPlan
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.search import Space, SpaceRule, parse_choices
from lq_plugin.search.space.model_space import Unit

CONV = ("Conv2d", "_ConvNd")
LAYERS = [
    LayerInfo("stem", CONV, reduction=3),
    LayerInfo("block.0.conv", CONV, reduction=16),
    LayerInfo("block.1.conv", CONV, reduction=24),
    LayerInfo("embed", ("Embedding",), reduction=32, slots=("weight", "output")),
    LayerInfo("head", ("Linear",), reduction=32),
]
BITS = {"bit_widths": [2, 3, 4], "granularities": ["per_channel", "per_tensor"], "ranges": ["mse", "minmax"]}


def spec(text: str) -> QuantSpec:
    return QuantSpec.parse(text)


def test_a_product_keeps_the_written_order_with_bits_fastest() -> None:
    assert [str(c) for c in parse_choices(BITS)] == [
        *("int2 per_channel mse", "int3 per_channel mse", "int4 per_channel mse"),
        *("int2 mse", "int3 mse", "int4 mse"),
        *("int2 per_channel", "int3 per_channel", "int4 per_channel"),
        *("int2", "int3", "int4"),
    ]


def test_a_product_takes_scalars_and_the_other_fields_of_a_spec() -> None:
    assert parse_choices(
        {"bit_widths": 4, "granularities": "per_tensor", "ranges": "mse", "signed": False, "affine": True}
    ) == (spec("uint4 affine mse"),)


def test_lists_mix_specs_products_and_float_and_drop_what_is_written_twice() -> None:
    choices = parse_choices(["float", {"bit_widths": [2, 4]}, "int4", spec("int8")])
    assert choices == ("float", spec("int2"), spec("int4"), spec("int8"))


@pytest.mark.parametrize(
    ("value", "messages"),
    [
        ({"bit_widths": [0, 4, 99]}, ["got 0", "got 99"]),
        ({"bit_width": [4]}, ["unknown key 'bit_width'", "Did you mean 'bit_widths'", "needs bit_widths"]),
        (["int4 per_chanel", "int4 mze"], ["per_chanel", "mze"]),
        ([], ["no choices"]),
        ({"bit_widths": []}, ["no choices"]),
        ({"bit_widths": [1, 2], "ranges": ["lsq"]}, ["lsq"]),
        ({"bit_widths": 2.5}, ["got 2.5"]),
    ],
)
def test_every_impossible_choice_is_named(value: object, messages: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        parse_choices(value)  # type: ignore[arg-type]
    assert all(message in str(caught.value) for message in messages), caught.value


def test_faults_of_a_space_are_listed_together() -> None:
    with pytest.raises(QuantizationError) as caught:
        Space(weight="int99", input="uint8 mze")
    assert "weight" in str(caught.value)
    assert "input" in str(caught.value)
    with pytest.raises(PlanError, match=r"unknown key 'weigth'.*Did you mean 'weight'"):
        Space.parse({"weigth": "int4"})
    with pytest.raises(PlanError, match="without 'match'"):
        Space(weight="int4", rules=[{"weight": "int8"}])
    with pytest.raises(PlanError, match="regular expression"):
        SpaceRule("re:(", weight="int8")


def test_yaml_and_python_are_the_same_space() -> None:
    text = """
    weight: {bit_widths: [2, 3, 4], granularities: [per_channel, per_tensor], ranges: [mse, minmax]}
    input: uint8 affine mse
    rules: [{match: stem, weight: int8 per_channel}]
    tie: ["block.*"]
    """
    written = Space(
        weight=BITS, input="uint8 affine mse", rules=[SpaceRule("stem", weight="int8 per_channel")], tie=["block.*"]
    )
    assert Space.parse(OmegaConf.create(text)) == written


def test_two_parameters_a_tensor_and_none_for_what_is_fixed() -> None:
    space = Space(weight=BITS, input="uint8 affine mse", rules=[SpaceRule("stem", weight="int8")]).bind(LAYERS)
    assert set(space.distributions) == {
        f"{n}.weight.{p}" for n in ("block.0.conv", "block.1.conv", "embed", "head") for p in ("bits", "scheme")
    }
    assert space.distributions["head.weight.bits"] == IntDistribution(2, 4)
    assert space.distributions["head.weight.scheme"].choices == (  # type: ignore[attr-defined]
        *("int per_channel mse", "int per_tensor mse", "int per_channel minmax", "int per_tensor minmax"),
    )
    assert space.size == 12**4
    plans = space.layer_plans(space.uniform(3))
    assert (plans["stem"].weight, plans["stem"].input) == (spec("int8"), spec("uint8 affine mse"))
    assert (plans["embed"].weight, plans["embed"].input) == (spec("int3 per_channel mse"), None)


def test_bits_without_an_even_step_are_categorical_with_one_they_are_numbers() -> None:
    def bits(widths: list[int]) -> object:
        return Space(weight={"bit_widths": widths}).bind(LAYERS).distributions["head.weight.bits"]

    assert bits([2, 4, 8]) == CategoricalDistribution([2, 4, 8])
    assert bits([8, 4, 6]) == IntDistribution(4, 8, step=2)


def test_choices_that_are_no_product_are_one_categorical() -> None:
    space = Space(weight=["int4 mse", "int2", "float"]).bind(LAYERS[-1:])
    assert space.distributions == {"head.weight": CategoricalDistribution(["int4 mse", "int2", "float"])}
    assert not space.layer_plans({"head.weight": "float"})["head"]
    assert space.plan({"head.weight": "int2"}).rules[0].weight == spec("int2")
    assert space.layer_plans(space.uniform(8))["head"].weight == spec("int4 mse")


def test_group_sizes_that_do_not_divide_are_left_out_for_that_layer_only() -> None:
    space = Space(weight={"bit_widths": [4, 8], "granularities": ["group16", "group16 ragged", "per_tensor"]}).bind(
        LAYERS[:3]
    )
    assert "group size 16 does not divide its 3 input channels" in space.excluded["stem.weight"][0]
    assert set(space.excluded) == {"stem.weight", "block.1.conv.weight"}
    choices = {unit.name: [str(c) for c in unit.choices] for unit in space.units}
    assert choices["stem.weight"] == ["int4 group16 ragged", "int8 group16 ragged", "int4", "int8"]
    assert len(choices["block.0.conv.weight"]) == 6


def test_a_layer_without_any_possible_choice_is_an_error_with_the_reason() -> None:
    with pytest.raises(PlanError, match=r"stem\.weight has no possible choice: .*group size 16") as caught:
        Space(weight="int4 group16").bind(LAYERS[:3])
    assert "block.1.conv" in str(caught.value)


def test_patterns_that_match_nothing_name_near_ones() -> None:
    with pytest.raises(PlanError, match="search space: 2 faults") as caught:
        Space(weight=BITS, rules=[SpaceRule("hed", weight="int8")], tie=["blok.*"]).bind(LAYERS)
    assert "'hed' matches no layer" in str(caught.value)
    assert "Did you mean 'head'?" in str(caught.value)
    assert "'blok.*' matches no layer" in str(caught.value)


def test_nothing_to_choose_is_an_error() -> None:
    with pytest.raises(PlanError, match="nothing to choose"):
        Space(weight="int4").bind(LAYERS)
    with pytest.raises(PlanError, match="nothing to choose"):
        Space().bind(LAYERS)


def test_tied_layers_share_what_they_have_in_common() -> None:
    space = Space(weight={"bit_widths": [2, 4], "granularities": ["group16", "per_tensor"]}, tie=["block.*"]).bind(
        LAYERS
    )
    unit = next(u for u in space.units if u.name == "block.*.weight")
    assert unit.layers == ("block.0.conv", "block.1.conv")
    assert unit.choices == (spec("int2"), spec("int4"))
    plans = space.layer_plans({**space.uniform(2), "block.*.weight.bits": 4})
    assert plans["block.0.conv"] == plans["block.1.conv"]
    assert plans["block.0.conv"].weight == spec("int4")
    different = QuantPlan.parse(
        {"rules": [{"match": "*", "weight": "int2"}, {"match": "block.0.conv", "weight": "int4"}]}
    )
    with pytest.raises(PlanError, match=r"block\.\*\.weight ties"):
        space.params(different)


def test_ties_that_overlap_or_have_nothing_in_common_are_errors() -> None:
    rules = [SpaceRule("block.0.conv", weight=["int2", "int3"]), SpaceRule("block.1.conv", weight=["int4", "int8"])]
    with pytest.raises(PlanError, match="nothing in common"):
        Space(weight=BITS, rules=rules, tie=["block.*"]).bind(LAYERS)
    with pytest.raises(PlanError, match="tied by 2 patterns"):
        Space(weight=BITS, tie=["block.*", "type:Conv2d"]).bind(LAYERS)


def test_names_with_glob_characters_get_rules_of_their_own() -> None:
    layers = [LayerInfo("a[0]", ("Linear",), 8), LayerInfo("a0", ("Linear",), 8)]
    space = Space(weight=["int2", "int4"]).bind(layers)
    params = {"a[0].weight.bits": 2, "a0.weight.bits": 4}
    assert space.plan(params).resolve(layers) == space.layer_plans(params)


def test_uniform_takes_the_nearest_bits_a_layer_may_have_and_the_scheme_written_first() -> None:
    space = Space(weight=BITS, rules=[SpaceRule("head", weight=["int8", "int4 mse", "int2", "int2 mse"])]).bind(LAYERS)
    plans = space.layer_plans(space.uniform(3))
    assert plans["head"].weight == spec("int4 mse")
    assert space.layer_plans(space.uniform(2))["head"].weight == spec("int2")
    assert space.bit_widths == [2, 3, 4, 8]


SPACE = Space(
    weight={"bit_widths": [2, 3, 4, 8], "granularities": ["per_channel", "group8 ragged"], "ranges": ["mse", "minmax"]},
    input=["uint8 affine mse", "float"],
    output={"bit_widths": [4, 8], "ranges": ["mse"]},
    rules=[SpaceRule("head", output="float"), SpaceRule("type:Embedding", weight=["int8", "int4 mse", "float"])],
    tie=["block.*"],
).bind(LAYERS)


@given(st.data())
def test_params_plans_and_yaml_stand_for_the_same(data: st.DataObject) -> None:
    params = {}
    for name, distribution in SPACE.distributions.items():
        if isinstance(distribution, IntDistribution):
            params[name] = data.draw(st.sampled_from(range(distribution.low, distribution.high + 1, distribution.step)))
        elif isinstance(distribution, CategoricalDistribution):
            params[name] = data.draw(st.sampled_from(distribution.choices))
    layer_plans = SPACE.layer_plans(params)
    plan = SPACE.plan(params)
    assert plan.resolve(LAYERS) == layer_plans
    assert SPACE.params(plan) == params
    assert QuantPlan.from_dict(yaml.safe_load(plan.to_yaml())) == plan


def test_a_plan_outside_of_the_space_is_refused() -> None:
    with pytest.raises(PlanError, match=r"stem\.weight: 'int5' is not in the search space"):
        SPACE.params(QuantPlan.parse("int5"))


def test_suggest_asks_for_each_parameter_once() -> None:
    trial = optuna.trial.FixedTrial(SPACE.uniform(4))
    assert SPACE.suggest(trial) == SPACE.uniform(4)  # type: ignore[arg-type]


def test_equal_spaces_have_equal_descriptions_and_others_do_not() -> None:
    first = Space(weight=BITS).bind(LAYERS).describe()
    assert first == Space(weight=list(parse_choices(BITS))).bind(LAYERS).describe()
    assert first != Space(weight=BITS, rules=[SpaceRule("head", weight="int8")]).bind(LAYERS).describe()
    assert first != Space(weight=BITS, tie=["block.*"]).bind(LAYERS).describe()


def test_a_plan_is_made_once_for_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    space = Space(weight=["int4", "int8"]).bind([LayerInfo("a", ("Linear",)), LayerInfo("b", ("Linear",))])
    made: list[Any] = []
    original = Unit.choice
    monkeypatch.setattr(Unit, "choice", lambda unit, params: made.append(unit.name) or original(unit, params))
    params = space.uniform(4)
    made.clear()
    first = space.layer_plans(params)
    assert made == ["a.weight", "b.weight"]
    again = space.layer_plans(dict(reversed(list(params.items()))))
    assert again == first
    assert len(made) == 2
    again.clear()
    assert space.layer_plans(params) == first
