"""Kinds of the options of each command, checked before anything is imported, made or trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lq_plugin.commands.verification import is_verify
from lq_plugin.errors import did_you_mean
from lq_plugin.utilities.hydra_files import plain


class Kind(NamedTuple):
    """Kind of an option: in words, a test of a value, and True where the option has to be in the config."""

    words: str
    fits: Callable[[Any], bool]
    needed: bool = True


def integer(least: int, most: int | None = None) -> Kind:
    """Returns the kind of integers within these limits."""

    def fits(value: Any) -> bool:
        return type(value) is int and value >= least and (most is None or value <= most)

    return Kind(f"an integer, {least} or more" + ("" if most is None else f", {most} at most"), fits)


def optional(kind: Kind) -> Kind:
    """Returns the kind of what is null or of another kind."""
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.fits(value))


ANY = Kind("anything", lambda value: True)  # what reads it checks it
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str) and value != "")
NODE = Kind("a mapping", lambda value: isinstance(value, Mapping))
GROUP = Kind(
    "a mapping of names to mappings",
    lambda value: value is None or (isinstance(value, Mapping) and all(map(NODE.fits, value.values()))),
    needed=False,
)
NAMES = Kind("a name or a list of names", lambda value: isinstance(value, str | Sequence))
MODULES = Kind("a list of modules", lambda value: isinstance(value, list) and all(map(TEXT.fits, value)), needed=False)
SEED = integer(0, 2**32 - 1)

VERIFY = Kind("true or false, or a mapping of run (true or false) and min_agreement (0..1, or null)", is_verify)

_COMMON = {
    "model": NODE, "trainer": NODE, "paths.output_dir": TEXT, "float_checkpoint": optional(TEXT), "imports": MODULES,
}  # fmt: skip
_TRAINED = _COMMON | {"data": NODE, "float_epochs": integer(0)}

TRAIN = _TRAINED | {
    "seed": optional(SEED), "fit": FLAG, "validate": FLAG, "test": FLAG, "ckpt_path": optional(TEXT),
    "optimized_metric": optional(TEXT), "callbacks": GROUP, "logger": GROUP,
}  # fmt: skip
#: Options of `lq_plugin.search.search` that it checks itself.
SEARCHED = (
    "metric", "mode", "cost", "constraints", "n_trials", "study_name", "uniform", "seeds", "sensitivity",
    "sensitivity_batches", "pairs", "latency", "heartbeat", "max_failures", "fidelity", "promote_within",
    "promote_first", "pruner", "confirm", "calibration_batches", "phases", "target", "score", "dashboard",
)  # fmt: skip
SEARCH = _TRAINED | {
    "seed": SEED, "worker": integer(0), "search.space": NODE, "search.sampler": NODE, "search.storage": ANY,
    "search.progress": FLAG, "search.trial_runs": FLAG, **{f"search.{name}": ANY for name in SEARCHED},
}  # fmt: skip
SENSITIVITY = _TRAINED | {
    "seed": SEED, "measures": NAMES, "batches": integer(1), "others": TEXT, "search.space": NODE,
    "search.calibration_batches": integer(1), "search.phases": ANY, "search.target": optional(TEXT),
}  # fmt: skip
EXPORT = _COMMON | {
    "seed": optional(SEED), "to": TEXT, "output": optional(TEXT), "ckpt_path": optional(TEXT), "plan": ANY,
    "calibration_batches": integer(1), "phases": ANY, "verify": VERIFY, "runtime": optional(TEXT),
    "verify_batches": integer(1),
}  # fmt: skip

#: Keys at the top of a config that no option stands for: other groups, and what only interpolations and Hydra read.
_OTHER_KEYS = ("task_name", "search", "paths", "lq", "quantization", "callbacks", "logger", "hydra")


def kind_faults(cfg: DictConfig, kinds: Mapping[str, Kind]) -> list[str]:
    """Returns what is wrong with the options of a command: those that are missing, of another kind, or not resolved.

    >>> kind_faults(OmegaConf.create({"seed": -1, "fit": True}), {"seed": SEED, "fit": FLAG, "test": FLAG})
    ['seed is an integer, 0 or more, 4294967295 at most, got -1', 'test is missing: it is true or false']
    """
    faults = []
    for key, kind in kinds.items():
        parent, _, name = key.rpartition(".")
        try:
            node = OmegaConf.select(cfg, parent) if parent else cfg
            if not OmegaConf.is_dict(node) or name not in node:
                faults += [f"{key} is missing: it is {kind.words}"] * kind.needed
            elif not kind.fits(value := plain(node[name])):
                faults.append(f"{key} is {kind.words}, got {value!r}")
        except OmegaConfBaseException as error:
            faults.append(f"{key} cannot be read: {error}")
    return faults


def stray_keys(cfg: DictConfig, kinds: Mapping[str, Kind]) -> tuple[list[str], list[str]]:
    """Finds keys that the command does not read, which an experiment's file may hold and Hydra accepts.

    Args:
        cfg: composed.
        kinds: of the command's options.

    Returns:
        Faults: a file that is no experiment of this command, and names that differ from an option by a typing error;
        and warnings: names of something else. A key that an interpolation or another command reads is neither.

    >>> stray_keys(OmegaConf.create({"seed": 1, "float_epoch": 3, "tags": ["a"], "width": 8}), TRAIN)[0]
    ["float_epoch is no option. Did you mean 'float_epochs'?"]
    """
    known = {key.partition(".")[0] for key in kinds} | {*_OTHER_KEYS}
    inside = {key.partition(".")[2] for key in kinds if key.startswith("search.")}
    every = [key for options in (TRAIN, SEARCH, SENSITIVITY, EXPORT) for key in options]
    everywhere = {*every, *(key.partition(".")[0] for key in every)}
    text = str(OmegaConf.to_container(cfg, resolve=False))
    found = {str(key): known for key in cfg if key not in known}
    if inside and OmegaConf.is_dict(searched := cfg.get("search")):
        found |= {f"search.{key}": {f"search.{name}" for name in inside} for key in searched if key not in inside}
    faults: list[str] = []
    warnings: list[str] = []
    for key, valid in found.items():
        if key == "experiment" and OmegaConf.is_dict(cfg[key]):
            keys = ", ".join(map(str, cfg[key]))
            faults.append(
                f"the experiment's keys ({keys}) are below `experiment`, where nothing reads them: the first line of "
                "its file has to be `# @package _global_`"
            )
        # An experiment may serve several commands.
        elif key not in everywhere and re.search(rf"\$\{{[^}}]*(?<!\w){re.escape(key)}(?!\w)", text) is None:
            near = did_you_mean(key, valid, limit=1)
            (faults if near else warnings).append(f"{key} is no option{'.' * bool(near)}{near}")
    return faults, warnings
