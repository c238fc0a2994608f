"""Plans that strangers wrote: data, never code, and every fault is one of the library's errors."""

import itertools
import pickle
import random
import time

import pytest
import yaml
from hypothesis import given, strategies as st
from torch import nn

from lq_plugin import PlanError, QuantizationError, QuantPlan, QuantSpec, prepare
from lq_plugin.model import quantizers

PLAN = """\
# A plan with a little of everything.
rules:
  - match: "*"
    weight: int4 group16:4 mse
    input: {bit_width: 8, signed: false, affine: true, range: "percentile:99.9", granularity: per_tensor}
  - {match: "re:layer[12].*", weight: int8 per_channel:0 octav stochastic:7}
  - match: type:Linear
    weight: &w int3 per_channel lsq narrow
    input: uint8 affine ema:0.99
    output: float
  - {match: fc, weight: *w, start: epoch 2}
  - {match: "layer1.?", weight: "kmeans2:linear", input: "mxfp4:rceil"}
schedule: {weights_start: step 100, activations_start: epoch 1, observer_freeze: 900, batch_norm_freeze: epoch 3}
"""
#: What a mutation writes into a plan: YAML's own syntax, words of plans, numbers at the limits.
TOKENS = [
    "[", "]", "{", "}", "- ", ": ", ",", "*", "&a ", "*a", "!!", "!!python/name:os.system ", "!!binary ", "!!set ", "|",
    ">", "'", '"', "#",
    "\n", "\t", "\0", "\ufeff", "\U0001f600", "<<: ", "? ", "~", "null", "true",
    ".nan", ".inf", "-.inf", "1e400", "0x", "0b", "-1", "2024-13-45",
    "12:60:61",
    "9" * 50, "9" * 5000, "int", "int0", "int17", "uint4", "group0", "group-1", "per_channel:-9", "percentile:",
    "stochastic:²",
    "re:(", "re:a{9999999999}", "type:", "match", "weight", "rules", "schedule", "_target_: os.system", "epoch",
    "step -1", "float", "٤",
]  # fmt: skip


def mutated(rng: random.Random) -> bytes:
    """The plan after one to eight changes: bytes flipped, parts cut out, doubled, moved, tokens put in."""
    data = bytearray(PLAN.encode())
    for _ in range(rng.randint(1, 8)):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        b = min(b, a + rng.choice([1, 4, 40]))
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[rng.randrange(len(data))] = rng.randrange(256)
        elif kind == 1:
            del data[a:b]
        elif kind == 2:
            data[a:a] = data[a:b] * rng.choice([1, 2, 50])
        elif kind == 3:
            data[rng.randrange(len(data) + 1) : 0] = data[a:b]
        else:
            data[a:b] = rng.choice(TOKENS).encode()
        data = data or bytearray(b"x")
    return bytes(data)


def fuzz(path, seeds):
    """Returns the number of mutated plans that are read; the others end in an error that names the file."""
    read = 0
    for seed in seeds:
        data = mutated(random.Random(seed))
        path.write_bytes(data)
        try:
            plan = QuantPlan.parse(path)
        except QuantizationError:
            pass
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}\n{data!r}") from error
        else:
            read += 1
            assert QuantPlan.from_dict(yaml.safe_load(plan.to_yaml())) == plan
        assert path.read_bytes() == data
    return read


def test_mutated_plan_files_end_in_a_plan_or_an_error_of_the_library(tmp_path):
    read = fuzz(tmp_path / "plan.yaml", range(500))
    assert 10 < read < 490  # the mutations are neither harmless nor all fatal


@pytest.mark.slow
def test_ten_thousand_mutated_plan_files(tmp_path):
    assert fuzz(tmp_path / "plan.yaml", range(500, 10_500)) > 100


WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "int4",
            "uint8",
            "per_channel",
            "per_tensor",
            "group16:4:channel",
            "affine",
            "narrow",
            "ragged",
            "ema:0.9",
            "lsq",
            "pact",
        ]
    ),
    st.sampled_from(
        [
            "mx6",
            "mxfp4",
            "nvfp4",
            "bwn",
            "xnor",
            "twn:exact",
            "ttq",
            "kmeans3",
            "stochastic",
            "mad",
            "float",
            "w4a8",
            "/",
            "mse",
        ]
    ),
    st.from_regex(r"(u?int|group|kmeans|per_channel:|percentile:|stochastic:|w|a)\d{0,30}", fullmatch=True),
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4), WORDS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.text(max_size=6), st.integers()), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = [
    "format",
    "bit_width",
    "signed",
    "affine",
    "narrow_range",
    "granularity",
    "range",
    "rounding",
    "gradient",
    "surplus",
]


def ends_well(function, value):
    try:
        return function(value)
    except QuantizationError:
        return None


@given(
    st.one_of(
        st.lists(WORDS, max_size=6).map(" ".join),
        st.dictionaries(st.sampled_from(FIELDS), st.one_of(ANYTHING, WORDS)),
        ANYTHING,
    )
)
def test_any_spec_is_read_or_refused(value):
    spec = ends_well(QuantSpec.parse, value)
    if spec is not None:
        assert QuantSpec.parse(str(spec)) == spec
        assert spec.seed >= 0


@given(st.lists(WORDS, max_size=6).map(" ".join))
def test_any_short_plan_is_read_or_refused(text):
    plan = ends_well(QuantPlan.parse, text.replace(".y", ""))
    assert plan is None or QuantPlan.from_dict(plan.to_dict()) == plan


RULE = st.dictionaries(
    st.sampled_from(["match", "weight", "input", "output", "start", "_target_"]), st.one_of(WORDS, ANYTHING)
)


@given(
    st.one_of(
        ANYTHING,
        st.fixed_dictionaries(
            {"rules": st.one_of(ANYTHING, st.lists(RULE, max_size=3))}, optional={"schedule": ANYTHING}
        ),
    )
)
def test_any_mapping_is_a_plan_or_refused(value):
    plan = ends_well(QuantPlan.parse, value)
    if plan is not None:
        ends_well(lambda p: prepare(nn.Sequential(nn.Linear(16, 4), nn.Conv1d(4, 4, 1)), p), plan)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested deeper|nesting depth"),  # newer versions of PyYAML have a limit of their own
        ("rules: " + "{a: " * 5_000, "nested deeper"),
        ("- " * 50_000, "nested deeper"),
        ("rules: &a [*a]", "contains itself"),
        ("rules: [{match: '*', weight: &a {range: *a}}]", "contains itself"),
        ("rules: [{match: 2024-13-45, weight: int4}]", "month must be in"),
        ("rules: 0x_", "not plain YAML"),
        ("rules: [{match: '*', weight: int" + "9" * 5000 + "}]", "valid: int8, uint8"),
        ("rules: [{match: '*', weight: {bit_width: " + "9" * 5000 + "}}]", "not plain YAML"),
        ("rules: [{match: '*', weight: int4 stochastic:²}]", "an integer"),
        ("rules: [{match: 're:a{9999999999}', weight: int4}]", "no regular expression"),
        ("rules: [{match: 're:" + "(" * 5000 + ")" * 5000 + "', weight: int4}]", "at most 2000 characters"),
        ("rules: [{match: '*', weight: {signed: flase}}]", "signed must be true or false, got 'flase'"),
        ("rules: \0", "not plain YAML"),
    ],
    ids=lambda value: value[:24],
)
def test_hostile_files_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=message) as caught:
        QuantPlan.parse(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize(
    "where",
    ["rules: *z", "rules: [{match: '*', weight: *z}]", "rules: [{match: '*', weight: {range: *z}}]", "schedule: *z"],
)
def test_yaml_bombs_do_not_grow(tmp_path, where):
    """Each line stands for nine of the one before: a kilobyte that means 9²⁵ values."""
    names = [chr(97 + i) for i in range(26)]
    lines = [f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in itertools.pairwise(names)]
    path = tmp_path / "plan.yaml"
    path.write_text("\n".join(["a: &a [x, x, x, x, x, x, x, x, x]", *lines, where]))
    start = time.process_time()
    with pytest.raises(PlanError, match="nested deeper|contains itself|stand for more than") as caught:
        QuantPlan.parse(path)
    assert time.process_time() - start < 20
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize(
    "text",
    [
        "_target_: pathlib.Path.touch\nrules: [{match: '*', weight: int4}]",
        "rules: [{match: '*', weight: int4, _target_: os.system}]",
        "rules: [{match: '*', weight: {_target_: os.system, command: 'touch SPOILED'}}]",
        "rules: [{match: '*', weight: int4}]\nschedule: {_target_: os.system, command: 'touch SPOILED'}",
        "rules: !!python/object/apply:os.system ['touch SPOILED']",
        "rules: !!python/object/new:os.system ['touch SPOILED']",
        "!!python/object/apply:os.system ['touch SPOILED']",
        "rules: [{match: !!python/name:os.system , weight: int4}]",
    ],
)
def test_a_plan_never_instantiates_anything(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    text = text.replace("SPOILED", str(tmp_path / "spoiled"))
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"_target_|not plain YAML"):
        QuantPlan.parse(path)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


class Bomb:
    """Object whose loading by pickle would run code."""

    def __reduce__(self):
        return eval, ("open('spoiled', 'w')",)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_no_plan(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "plan.yaml"
    path.write_bytes(pickle.dumps(Bomb(), protocol))
    with pytest.raises(PlanError, match=r"plan\.yaml"):
        QuantPlan.parse(path)
    assert not (tmp_path / "spoiled").exists()


def many(rules, names):
    return "rules:\n" + "".join(
        f"- {{match: '{names(i)}', weight: int{2 + i % 7} per_channel}}\n" for i in range(rules)
    )


@pytest.mark.parametrize("rules", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_very_many_rules(tmp_path, rules):
    """The last rule of each layer wins, as with three; none that fits is an error of readable length."""
    path = tmp_path / "plan.yaml"
    path.write_text(many(rules, lambda i: i % 50))
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(50)))
    ledger = prepare(net, path)
    assert len(ledger.quantized) == 50
    assert [q.spec.bit_width for q in quantizers(net)] == [2 + (rules - 50 + i) % 7 for i in range(50)]
    path.write_text(many(rules, lambda i: f"layer{i}"))
    with pytest.raises(PlanError, match=rf"(?s){rules} faults.*and {rules - 50} more") as caught:
        prepare(nn.Sequential(nn.Linear(8, 8)), path)
    assert len(str(caught.value)) < 50_000
