"""Hydra's sweep syntax as Optuna parameters."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lq_plugin.errors import QuantizationError
from lq_plugin.search.sweep.overrides import JobOverrides


@pytest.mark.parametrize(
    ("text", "distribution"),
    [
        ("interval(0.5, 2)", FloatDistribution(0.5, 2.0)),
        ("tag(log, interval(1e-5, 0.1))", FloatDistribution(1e-5, 0.1, log=True)),
        ("int(interval(1, 4))", IntDistribution(1, 4)),
        ("tag(log, int(interval(1, 64)))", IntDistribution(1, 64, log=True)),
        # As Python's: the end is not in it.
        ("range(2, 10, 2)", IntDistribution(2, 8, step=2)),
        ("range(5, 1, -2)", IntDistribution(3, 5, step=2)),
        ("range(0, 1, 0.25)", FloatDistribution(0.0, 0.75, step=0.25)),
        ("8,16.5,true,null,abc", CategoricalDistribution([8, 16.5, True, None, "abc"])),
        ("1,2", CategoricalDistribution([1, 2])),
        ("choice([1,2],{a:1})", CategoricalDistribution(["[1,2]", "{a:1}"])),
    ],
)
def test_distributions(text, distribution):
    assert JobOverrides.parse({"a.b": text}, []).distributions == {"a.b": distribution}


@pytest.mark.parametrize(
    "text", ["8,1,true,null,abc,'a, b=[c]',[1,2],{a:1},1e-3,'7'", "int(interval(1,3))", "tag(log,interval(1e-9,1))"]
)
def test_overrides_mean_the_value(text):
    """Hydra reads the override of each value as what the choice said."""
    jobs = JobOverrides.parse({}, [f"+a={text}"])
    ((name, distribution),) = jobs.distributions.items()
    assert name == "a"
    categorical = isinstance(distribution, CategoricalDistribution)
    values = distribution.choices if categorical else [distribution.low, distribution.high]
    (original,) = OverridesParser.create().parse_overrides([f"+a={text}"])
    meant = [*map(original._convert_value, original.sweep_iterator())] if categorical else values
    for value, wanted in zip(values, meant, strict=True):
        (line,) = jobs.overrides({"a": value})
        (read,) = OverridesParser.create().parse_overrides([line])
        assert read.get_key_element() == "+a"
        assert read.value() == wanted
        assert type(read.value()) is type(wanted)


def test_the_command_line_wins():
    jobs = JobOverrides.parse({"a": "1,2", "b": 3, "c": "x,y"}, ["a=5", "b=range(0,3)", "~d", "+e='p q'"])
    assert set(jobs.distributions) == {"b", "c"}
    assert jobs.overrides({"b": 2, "c": "y"}) == ["a=5", "~d", "+e='p q'", "c=y", "b=2"]


def test_all_faults_at_once():
    with pytest.raises(QuantizationError, match=r"2 faults\n.*a=range\(3, 3\): the range is empty\n.*b is swept twice"):
        JobOverrides.parse({"a": "range(3, 3)", "b": "1,2", "+b": "3,4"}, [])
