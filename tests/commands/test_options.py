"""Options of the commands: what is missing or of another kind is said at once, by the name that the user gives it."""

import re
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from lq_plugin.commands.common import check_request
from lq_plugin.commands.explain import explain
from lq_plugin.commands.options import EXPORT, SEARCH, SENSITIVITY, TRAIN, kind_faults, stray_keys
from lq_plugin.commands.report import report
from lq_plugin.errors import QuantizationError

KINDS = {"train": TRAIN, "search": SEARCH, "sensitivity": SENSITIVITY, "export": EXPORT}


def composed(name: str, *overrides: str) -> Any:
    with initialize_config_module("lq_plugin.conf", version_base="1.3"):
        return compose(name, ["paths.output_dir=out", *overrides])


def loose(name: str, content: dict[str, Any]) -> Any:
    """Returns the command's config with what an experiment's file holds, which Hydra adds as it is."""
    cfg = composed(name)
    OmegaConf.set_struct(cfg, False)
    return OmegaConf.merge(cfg, content)


@pytest.mark.parametrize("name", KINDS)
def test_the_configs_themselves_have_no_faults(name):
    assert kind_faults(composed(name), KINDS[name]) == []


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("train", ["experiment=digits_qat", "logger=wandb"]),
        ("train", ["experiment=digits_ptq", "logger=tensorboard"]),
        ("train", ["experiment=digits_ptq", "logger=mlflow"]),
        ("search", ["experiment=digits_search", "logger=csv"]),
        ("search", []),
        ("sensitivity", ["experiment=digits_search"]),
    ],
)
def test_keys_of_the_experiments_are_read(name, overrides):
    assert stray_keys(composed(name, *overrides), KINDS[name]) == ([], [])


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


def test_a_misspelt_key_of_an_experiment_is_refused():
    cfg = loose("train", {"float_epoch": 3})
    with pytest.raises(QuantizationError, match=r"float_epoch is no option\. Did you mean 'float_epochs'\?"):
        check_request(cfg, TRAIN)
    cfg = loose("search", {"search": {"n_trails": 3}})
    with pytest.raises(QuantizationError, match=r"search\.n_trails is no option\. Did you mean 'search\.n_trials'\?"):
        check_request(cfg, SEARCH)


def test_an_experiment_without_its_package_line_is_refused():
    cfg = loose("train", {"experiment": {"seed": 3, "float_epochs": 1}})
    with pytest.raises(QuantizationError, match=r"keys \(seed, float_epochs\).*first line.*# @package _global_"):
        check_request(cfg, TRAIN)


def test_a_key_that_nothing_reads_is_a_warning_and_one_that_is_referred_to_is_not(caplog):
    own: dict[str, Any] = {
        "tags": ["mine"], "width": 4, "depth": {"n": 2}, "float_epochs_most": 3, "optimize_metric": "val/acc",
        "model": {"width": "${width}"}, "task_name": "${depth.n}", "float_epochs": "${oc.select:float_epochs_most,5}",
        "optimized_metric": "${ optimize_metric }",
    }  # fmt: skip
    check_request(loose("train", own), TRAIN)
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage().startswith("tags is no option, and nothing in the config refers to it")


@pytest.mark.parametrize("name", ["train", "search", "sensitivity"])
def test_no_option_of_another_command_is_a_typing_error(name):
    others = {key.partition(".")[0]: 1 for kinds in KINDS.values() for key in kinds}
    cfg = loose(name, {k: 1 for k in others if k not in composed(name)})
    assert stray_keys(cfg, KINDS[name])[0] == []


def test_arguments_that_are_no_names_are_told_in_words(capsys):
    assert report(["x" * 5000]) == 2
    assert "there is no" in capsys.readouterr().err
    for model in (":", ".x:y", "3", "torch.nn:Linear"):
        assert explain(["w4a8", model, "in_features=-1", "out_features=2"]) == 2
        assert capsys.readouterr().err.startswith("lq-explain: ")
