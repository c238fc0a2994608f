"""Options of the commands: what is missing or of another kind is said at once, by the name that the user gives it."""

import re
from typing import Any

import pytest
from hydra import compose, initialize_config_module

from lq_plugin.commands.common import check_request
from lq_plugin.commands.explain import explain
from lq_plugin.commands.options import EXPORT, SEARCH, SENSITIVITY, TRAIN, kind_faults
from lq_plugin.commands.report import report
from lq_plugin.errors import QuantizationError

KINDS = {"train": TRAIN, "search": SEARCH, "sensitivity": SENSITIVITY, "export": EXPORT}


def composed(name: str, *overrides: str) -> Any:
    with initialize_config_module("lq_plugin.conf", version_base="1.3"):
        return compose(name, ["paths.output_dir=out", *overrides])


@pytest.mark.parametrize("name", KINDS)
def test_the_configs_themselves_have_no_faults(name):
    assert kind_faults(composed(name), KINDS[name]) == []


@pytest.mark.parametrize(
    ("name", "override", "fault"),
    [
        (
            "train",
            "seed=-18446744073709551616",
            "seed is an integer, 0 or more, 4294967295 at most, or null, got -18446",
        ),
        ("train", "imports=json", "imports is a list of modules, got 'json'"),
        ("train", "fit=1", "fit is true or false, got 1"),
        ("train", "float_epochs=2.5", "float_epochs is an integer, 0 or more, got 2.5"),
        ("train", "~trainer", "trainer is missing: it is a mapping"),
        ("train", "callbacks.progress_bar=3", "callbacks is a mapping of names to mappings, got {"),
        (
            "train",
            "optimized_metric=${nowhere}",
            "optimized_metric cannot be read: Interpolation key 'nowhere' not found",
        ),
        ("search", "~search.metric", "search.metric is missing"),
        ("search", "float_checkpoint=256", "float_checkpoint is a text, or null, got 256"),
        ("search", "worker=true", "worker is an integer, 0 or more, got True"),
        ("sensitivity", "batches=0", "batches is an integer, 1 or more, got 0"),
        ("sensitivity", "search.space=2", "search.space is a mapping, got 2"),
        ("export", "~seed", "seed is missing: it is an integer"),
        ("export", "+seed.x=-1", "seed is an integer, 0 or more, 4294967295 at most, or null, got {'x': -1}"),
    ],
)
def test_an_option_that_is_missing_or_of_another_kind_is_named(name, override, fault):
    (found,) = kind_faults(composed(name, override), KINDS[name])
    assert re.match(re.escape(fault), found), found


def test_all_faults_are_said_at_once():
    cfg = composed("train", "seed=x", "fit=maybe", "test=3")
    with pytest.raises(QuantizationError, match=r"(?s)3 faults.*seed is.*fit is.*test is"):
        check_request(cfg, TRAIN)
    with pytest.raises(QuantizationError, match="there is no such file"):
        check_request(composed("train", f"float_checkpoint={'x' * 5000}"), TRAIN)


def test_arguments_that_are_no_names_are_told_in_words(capsys):
    assert report(["x" * 5000]) == 2
    assert "there is no" in capsys.readouterr().err
    for model in (":", ".x:y", "3", "torch.nn:Linear"):
        assert explain(["w4a8", model, "in_features=-1", "out_features=2"]) == 2
        assert capsys.readouterr().err.startswith("lq-explain: ")
