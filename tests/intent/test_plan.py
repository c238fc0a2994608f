"""QuantPlan: short strings, YAML and Python agree; rules resolve in order; a plan that does not fit lists
everything."""

import pytest
from hypothesis import given, strategies as st
from omegaconf import OmegaConf

from lq_plugin import PlanError, QuantPlan, QuantSpec, Rule
from lq_plugin.intent.plan import LayerInfo
from tests.intent.test_spec import specs

LAYERS = [
    LayerInfo("conv1", ("Conv2d",), 3),
    LayerInfo("layer1.0.conv1", ("Conv2d",), 16),
    LayerInfo("layer1.0.conv2", ("Conv2d",), 16),
    LayerInfo("embed", ("Embedding",), 16, slots=("weight", "output")),
    LayerInfo("fc", ("MyLinear", "Linear"), 64),
]


@pytest.mark.parametrize(
    ("text", "weight", "activation"),
    [
        ("w4a8", "int4 per_channel", "uint8 affine ema"),
        ("w4", "int4 per_channel", None),
        ("a8", None, "uint8 affine ema"),
        ("w4a8 minmax", "int4 per_channel", "uint8 affine"),
        ("w4 group16 mse a8 percentile:99.9", "int4 group16 mse", "uint8 affine percentile:99.9"),
        ("w2 per_tensor lsq a4 lsq", "int2 per_tensor lsq", "uint4 affine lsq"),
        ("w4a4 pact", "int4 per_channel", "uint4 pact"),
        ("W4A8", "int4 per_channel", "uint8 affine ema"),
        ("W8 mse A4", "int8 per_channel mse", "uint4 affine ema"),
        ("w4a16", "int4 per_channel", None),
        ("w4a", "int4 per_channel", None),
        ("w4a16 mse", "int4 per_channel mse", None),
        ("w4 group16 a16", "int4 group16", None),
        ("w4a8 ema:0.9", "int4 per_channel", "uint8 affine ema:0.9"),  # no weight has a moving average
        ("w4a8 group16", "int4 group16", "uint8 affine ema"),  # no input has groups with float scales
        ("int4 per_channel mse / uint8 affine", "int4 per_channel mse", "uint8 affine"),
        ("int4 group16", "int4 group16", None),
        ("float / uint8", "float", "uint8"),
    ],
)
def test_short_forms(text, weight, activation):
    def read(value):
        return value if value in (None, "float") else QuantSpec.parse(value)

    plan = QuantPlan.parse(text)
    assert plan == QuantPlan([Rule("*", weight=read(weight), input=read(activation))])


rules = st.builds(
    Rule,
    match=st.sampled_from(["*", "conv1", "layer1.*", "type:Linear", r"re:layer1\..*"]),
    weight=st.one_of(st.none(), st.just("float"), specs()),
    input=st.one_of(st.none(), st.just("float"), specs()),
    output=st.one_of(st.none(), specs()),
)
moments = st.one_of(
    st.integers(0, 10**6), st.builds("{} {}".format, st.sampled_from(["epoch", "step"]), st.integers(0, 99))
)


@given(
    st.lists(rules, min_size=1, max_size=6),
    st.fixed_dictionaries({}, optional={"weights_start": moments, "batch_norm_freeze": moments}),
)
def test_yaml_round_trip(tmp_path_factory, rules, schedule):
    plan = QuantPlan(rules, schedule)
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    plan.to_yaml(path)
    assert QuantPlan.parse(str(path)) == plan
    assert QuantPlan.parse(OmegaConf.create(plan.to_dict())) == plan


def test_later_rules_win_field_by_field():
    plan = QuantPlan(
        [
            Rule("*", weight="int4 per_channel", input="uint8 affine"),
            Rule("type:Conv2d", weight="int8"),
            Rule("re:conv\\d", input="float"),
            Rule("type:Linear", weight="float"),
        ]
    )
    got = plan.resolve(LAYERS)
    assert str(got["conv1"].weight) == "int8"
    assert got["conv1"].input is None
    assert str(got["layer1.0.conv1"].input) == "uint8 affine"  # a regex must match the whole name
    assert got["fc"].weight is None
    assert str(got["fc"].input) == "uint8 affine"
    assert got["embed"].input is None  # an embedding has no float input


def test_everything_wrong_is_listed_with_near_names():
    plan = QuantPlan(
        [
            Rule("*", weight="int4 group16"),
            Rule("layer1", weight="int8"),
            Rule("layer1.0.cnv1", weight="int8"),
            Rule("type:Conv3d", weight="int8"),
            Rule("fc", weight="int8 ema", input="int8 group16"),
            Rule("embed", weight="int8 per_channel:1"),
        ]
    )
    with pytest.raises(PlanError) as caught:
        plan.resolve(LAYERS, others={"layer1": "Sequential", "bn1": "BatchNorm2d"})
    message = str(caught.value)
    for part in (
        "Did you mean 'layer1.*'?",
        "Did you mean 'layer1.0.conv1'",
        "types in the model: Conv2d",
        "conv1: group size 16 does not divide its 3 input channels",
        "weight range 'ema' is for activations",
        "groups of activations get their scales at run time",
        "keeps its output-channel axis (0), got axis 1",
        "7 faults",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rules: []", "at least one rule"),
        ("rules: 3", "must be a list"),
        ("[1, 2]", "holds a mapping"),
        ("rules: [{match: '*', weights: int4}]", "Did you mean 'weight'"),
        ("rules: [{weight: int4}]", "no 'match'"),
        ("rules: [{match: 're:(', weight: int4}]", "no regular expression"),
        ("rules: [{match: '*', weight: int4}]\nschedule: {weights_start: soon}", "got 'soon'"),
        ("rule: [{match: '*'}]", "Did you mean 'rules'"),
        ("rules: !!python/object/apply:os.system ['true']", "not plain YAML"),
        ("rules: [", "not plain YAML"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "plan.yaml"
    path.write_text(content)
    with pytest.raises(PlanError, match=message) as caught:
        QuantPlan.parse(path)
    assert "rules: []" in content or str(path) in str(caught.value)


def test_missing_file_and_wrong_type():
    with pytest.raises(PlanError, match="cannot open the plan file 'nowhere.yaml'"):
        QuantPlan.parse("nowhere.yaml")
    with pytest.raises(PlanError, match="got int"):
        QuantPlan.parse(3)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="write 'w4a8'"):
        QuantPlan.parse("four bits")
    with pytest.raises(PlanError, match="1..16, got 0"):
        QuantPlan.parse("w0a8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w99a8", "spec 'w99': impossible QuantSpec: bit_width must be 1..16, got 99"),
        ("w4 a8 mxe", "cannot read the spec 'a8 mxe': unknown word 'mxe'"),
        ("w4x a8", "'w4x': 'w' is followed by a number of bits; words stand apart: 'w4 mse'"),
        ("w4a8mse", "'a8mse': 'a' is followed by a number of bits"),
        ("a8 a4", "'a8 a4' sets the input a second time"),
    ],
)
def test_errors_quote_what_was_written(text, message):
    with pytest.raises(PlanError) as caught:
        QuantPlan.parse(text)
    assert f"cannot read the plan {text!r}: {message}" in str(caught.value)
    assert "uint8 affine ema" not in str(caught.value)
    assert "rule" not in str(caught.value), "no rule was written"


@pytest.mark.parametrize(
    ("text", "readings"),
    [
        ("w8a8 per_tensor", ("w8 per_tensor a8 per_tensor", "w8 a8 per_tensor")),
        ("w4a8 lsq", ("w4 lsq a8 lsq", "w4 a8 lsq")),
        ("w4a8 per_channel", ("w4 per_channel a8 per_channel", "w4 per_channel a8")),
        ("W4A4 mse stochastic", ("W4 mse stochastic A4 mse stochastic", "W4 A4 mse stochastic")),
    ],
)
def test_words_that_could_belong_to_either_are_refused_with_both_readings(text, readings):
    with pytest.raises(PlanError, match="two ways") as caught:
        QuantPlan.parse(text)
    for reading in readings:
        assert repr(reading) in str(caught.value)
        QuantPlan.parse(reading)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a16", "quantizes nothing"),
        ("w8 a16 ema", "16-bit integers are written '... / uint16 affine ema'"),
        ("w4a8 mxe", "unknown word"),
    ],
)
def test_float_inputs_take_no_words(text, message):
    with pytest.raises(PlanError, match=message):
        QuantPlan.parse(text)


def test_a_file_that_was_cut_off_is_no_smaller_plan(tmp_path):
    layers = [
        {"match": f"layer{i}.conv", "weight": "int4 per_channel mse", "input": "uint4 affine ema"} for i in range(2)
    ]
    plan = QuantPlan.parse(
        {"rules": [{"match": "*", "weight": "int8"}, *layers], "schedule": {"observer_freeze": "epoch 5"}}
    )
    path = tmp_path / "plan.yaml"
    text = plan.to_yaml(path)
    for length in range(len(text) - 1):  # all but the last line break
        path.write_text(text[:length])
        with pytest.raises(PlanError, match="plan.yaml"):
            QuantPlan.parse(path)
    path.write_text(text[:-1])
    assert QuantPlan.parse(path) == plan
    path.write_text("# trial 7\n" + text.replace("int8", "int6") + "\n# edited by hand\n")
    assert str(QuantPlan.parse(path).rules[0].weight) == "int6"


def test_files_written_by_hand_need_no_mark(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("---\nrules: [{match: '*', weight: int8}]\n")
    assert QuantPlan.parse(path) == QuantPlan.parse("int8")


def test_short_strings_in_any_order_and_with_the_words_they_have_by_themselves():
    assert QuantPlan.parse("a8w4") == QuantPlan.parse("w4a8") == QuantPlan.parse("w4 per_channel a8 affine")


def test_what_is_no_mapping_is_no_plan():
    with pytest.raises(PlanError, match="a plan is a mapping with 'rules', got list"):
        QuantPlan.from_dict([])  # type: ignore[arg-type]
