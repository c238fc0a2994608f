"""Option values of the commands that Hydra composes, each in process up to where a model would be loaded or trained."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lq_plugin.commands import export, search, sensitivity, train
from lq_plugin.commands.common import check_request
from lq_plugin.commands.options import SEARCH, SENSITIVITY, TRAIN
from lq_plugin.errors import QuantizationError
from tests.fuzz.mutate import EXTREMES, other_leaf
from tests.fuzz.settings import WORDS
from tests.fuzz.target import OTHER, SAME, Failure, Target


class Checked(BaseException):
    """All options were taken."""


def stop(*_: Any, **__: Any) -> Any:
    raise Checked


@contextlib.contextmanager
def stopping_at(place: Any, name: str) -> Iterator[None]:
    with mock.patch.object(place, name, stop):
        yield


def text_of(value: Any) -> str:
    """A value in Hydra's syntax, strings in quotes."""
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k or text_of(k)}: {text_of(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(text_of, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class Options(Target):
    """Overrides of one command; of the config nothing is changed but the command's own options."""

    config: str
    #: Overrides that are always there, and the keys, or the beginnings of keys, that are drawn from.
    base: tuple[str, ...] = ()
    keys: tuple[str, ...]
    share = 400
    legitimate = "another value that the option takes"
    #: Hydra's own words before the command starts; `use` lets no other pass.
    errors = (HydraException, OmegaConfBaseException)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.base = (*self.base, f"paths.log_dir={folder}", f"paths.output_dir={folder / 'out'}")
        plain: Any = OmegaConf.to_container(self.composed())
        self.leaves = [key for key in flat(plain) if key.startswith(self.keys) and "_target_" not in key]

    def unmutated(self) -> Any:
        return []

    def mutated(self, rng: random.Random) -> list[str]:
        found = []
        for _ in range(rng.choice([1, 1, 2])):
            key, value = rng.choice(self.leaves), other_leaf(rng, rng.choice([*EXTREMES, *WORDS]))
            kind = rng.randrange(8)
            if kind == 0:
                found.append(f"~{key}")
            elif kind == 1:
                found.append(f"{key}={value}")
            elif kind == 2:
                found.append(f"+{key}.x={text_of(value)}" if rng.random() < 0.5 else f"+{key}x={text_of(value)}")
            else:
                found.append(f"{key}={text_of(value)}")
        return found

    def composed(self, *overrides: str) -> DictConfig:
        with initialize_config_module("lq_plugin.conf", version_base="1.3"):
            return compose(self.config, [*self.base, *overrides], return_hydra_config=True)

    def use(self, case: list[str]) -> str:
        try:
            cfg = self.composed(*(text.replace("\0", "0") for text in case))
        except (ValueError, TypeError) as error:  # Hydra's: a number for a config group, one of thousands of digits
            raise HydraException(str(error)) from error
        HydraConfig.instance().set_config(cfg)
        OmegaConf.set_struct(cfg, False)
        cfg.pop("hydra")
        OmegaConf.set_struct(cfg, True)
        try:
            self.run(cfg)
        except Checked:
            return OTHER if case else SAME
        except InstantiationException as error:
            # Hydra's words around ours, or around Python's own of arguments and names.
            words = ("unexpected keyword argument", "missing 1 required", "Error locating target")
            if isinstance(error.__cause__, QuantizationError) or any(text in str(error) for text in words):
                raise
            raise Failure(f"{error}") from error
        except (HydraException, OmegaConfBaseException) as error:
            raise Failure(f"{type(error).__name__} in the command: {error}") from error
        finally:
            HydraConfig.instance().cfg = None
        raise Failure("it ran on to its end")

    def run(self, cfg: DictConfig) -> None:
        raise NotImplementedError


def flat(tree: Any, before: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        found.append(f"{before}{key}")
        if isinstance(value, dict):
            found += flat(value, f"{before}{key}.")
    return found


class Train(Options):
    name = "lq-train options"
    config = "train"
    base = ("+lq=qat", "logger=none", "trainer=cpu")
    keys = (
        "callbacks.lq_qat.",
        "seed",
        "fit",
        "validate",
        "test",
        "ckpt_path",
        "optimized_metric",
        "float_",
        "lq",
        "quantization",
    )

    def run(self, cfg: DictConfig) -> None:
        check_request(cfg, TRAIN)
        with stopping_at(train, "run_stages"), stopping_at(train, "train_float"):
            train.run(cfg)


class Search(Options):
    name = "lq-search options"
    config = "search"
    base = ("experiment=digits_search",)
    keys = ("search.", "seed", "worker", "float_")

    def run(self, cfg: DictConfig) -> None:
        check_request(cfg, SEARCH)
        with stopping_at(search, "load_model"):
            search.run(cfg)


class Sensitivity(Options):
    name = "lq-sensitivity options"
    config = "sensitivity"
    base = ("experiment=digits_search",)
    keys = (
        "search.space",
        "search.calibration_batches",
        "search.phases",
        "seed",
        "measures",
        "batches",
        "others",
        "float_",
    )

    def run(self, cfg: DictConfig) -> None:
        check_request(cfg, SENSITIVITY)
        with stopping_at(sensitivity, "load_model"):
            sensitivity.run(cfg)


class Export(Options):
    name = "lq-export options"
    config = "export"
    base = ("plan=w4a8", "verify=true")
    keys = (
        "seed", "to", "output", "ckpt_path", "float_checkpoint", "plan", "calibration_batches", "phases", "round_sums",
        "dynamic_dims", "smallest", "fp4", "signed", "verify", "runtime", "imports",
    )  # fmt: skip

    def run(self, cfg: DictConfig) -> None:
        with stopping_at(export, "instantiate"):
            export.run_export(cfg)


COMMANDS: tuple[Callable[[Path], Options], ...] = (Train, Search, Sensitivity, Export)
