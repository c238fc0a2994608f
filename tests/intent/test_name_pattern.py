"""Patterns over names against Python's own engine, and on what that one does not come to an end with."""

import re
import time

import pytest
from hypothesis import given, settings, strategies as st

from lq_plugin import PlanError, QuantPlan, Rule
from lq_plugin.intent.name_pattern import name_pattern

letters = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", "[a-c1]", r"\d", r"\W", "^", "$", r"\b", "1"])
repeats = st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?", "{2,}", "+?"])


def larger(inner):
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, repeats).map(lambda pair: f"({pair[0]}){pair[1]}"),
        st.tuples(st.sampled_from(["?=", "?!"]), inner).map(lambda pair: f"({pair[0]}{pair[1]})"),
        st.sampled_from(["(?<=a)", "(?<!b)", "(?<=[a1]b)"]),
    )


@settings(max_examples=200, deadline=None)
@given(
    pattern=st.recursive(letters, larger, max_leaves=8),
    names=st.lists(st.text("ab1.cA", max_size=7), min_size=4, max_size=4),
)
def test_same_names_as_pythons_engine(pattern, names):
    for flags in ("", "(?i)"):
        ours, theirs = name_pattern(flags + pattern), re.compile(flags + pattern)
        assert [ours(name) for name in names] == [theirs.fullmatch(name) is not None for name in names]


@pytest.mark.parametrize(
    "pattern", [r"layer[123]\.\d+\.(conv|bn)\d", r"(?!head|fc).*", r"blocks\.(?:[0-9]|1[01])\.mlp\..*(?<!bias)"]
)
def test_patterns_that_people_write(pattern):
    names = [
        "layer1.0.conv1",
        "layer4.0.conv1",
        "head",
        "fc.0",
        "blocks.11.mlp.fc1",
        "blocks.12.mlp.fc1",
        "blocks.3.mlp.bias",
        "",
    ]
    assert [name_pattern(pattern)(name) for name in names] == [
        re.fullmatch(pattern, name) is not None for name in names
    ]


@pytest.mark.parametrize(
    "pattern", ["(a|a)*b", "((a*)*)*b", "((((a|b)+)+)+)+c", "(a?){80}a{80}b", "(?=(a+)+b).*", "(.*a){12}b"]
)
def test_no_pattern_takes_exponential_time(pattern):
    started = time.process_time()
    assert not name_pattern(pattern)("a" * 80)
    assert time.process_time() - started < 5.0


def test_work_is_bounded(monkeypatch):
    monkeypatch.setattr("lq_plugin.intent.name_pattern.MAX_STEPS", 50_000)
    with pytest.raises(PlanError, match="more than 50,000 steps on the name 'aaa"):
        name_pattern("(?:(?:a?){300}){300}b")("a" * 300)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(a)\1", "no backreferences"),
        (r"(?P<x>a)(?P=x)", "no backreferences"),
        (r"(a)?(?(1)b|c)", "no conditions on a groups|no condition"),
        ("(?i:a)b", "flags stand at the start"),
        ("a" * 2001, "at most 2000 characters"),
        ("(", "no regular expression"),
        ("(" * 300 + "a" + ")" * 300, "at most 40 deep"),
        ("(" * 5000 + ")" * 5000, "at most 2000"),
    ],
)
def test_what_needs_another_engine_is_refused_when_the_rule_is_made(pattern, message):
    with pytest.raises(PlanError, match=message):
        Rule("re:" + pattern, weight="int8")
    with pytest.raises(PlanError, match=message):
        QuantPlan.parse({"rules": [{"match": "re:" + pattern, "weight": "int8"}]})
