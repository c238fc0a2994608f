"""Converts Hydra's sweep syntax to Optuna parameters, and their values to overrides.

model.net.width: choice(8, 16, 32)                    categorical
model.optimizer.lr: tag(log, interval(1e-4, 1e-1))    float, on a log scale
trainer.max_epochs: range(2, 10, 2)                   integer: 2, 4, 6, 8
int(interval(1, 4))                                   integer: 1, 2, 3, 4
model: glob(resnet*)                                  the options of a config group
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, QuotedString, RangeSweep
from hydra.errors import HydraException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lq_plugin.errors import QuantizationError, raise_all
from lq_plugin.search.shared.database import quiet


@dataclass(frozen=True)
class Parameter:
    """A parameter that a sweep varies.

    Args:
        key: as the override has it, with its prefix: `"+model.width"`.
        distribution: what Optuna samples from.
        choices: of a categorical one, each value with its text in an override.
    """

    key: str
    distribution: BaseDistribution
    choices: tuple[tuple[Any, str], ...] = ()

    @property
    def name(self) -> str:
        """Name of the Optuna parameter: the key without its prefix."""
        return self.key.lstrip("+")

    def override(self, value: Any) -> str:
        """Returns the override that sets this value."""
        # Also by type: 1 == True.
        texts = [text for choice, text in self.choices if type(choice) is type(value) and choice == value]
        return f"{self.key}={texts[0] if self.choices else repr(value)}"


@dataclass(frozen=True)
class JobOverrides:
    """The overrides of each job: those that all jobs share, and one value of each parameter."""

    fixed: tuple[str, ...]
    parameters: tuple[Parameter, ...]

    @classmethod
    def parse(
        cls, params: Mapping[str, Any], arguments: Iterable[str], config_loader: ConfigLoader | None = None
    ) -> JobOverrides:
        """Reads the sweeper's `params` and the command line, which wins.

        Args:
            params: override values by key.
            arguments: overrides.
            config_loader: lists the options of config groups, for `glob`.

        Raises:
            QuantizationError: listing each sweep without a value, and each key that is set twice.

        >>> job = JobOverrides.parse({"lr": "tag(log, interval(0.001, 0.1))"}, ["width=8,16", "epochs=3"])
        >>> job.distributions["lr"]
        FloatDistribution(high=0.1, log=True, low=0.001, step=None)
        >>> job.distributions["width"]
        CategoricalDistribution(choices=(8, 16))
        """
        lines = [f"{key}={'null' if value is None else value}" for key, value in params.items()]
        parser = OverridesParser.create(config_loader=config_loader)
        faults: list[str] = []
        fixed: dict[str, str] = {}
        swept: dict[str, Parameter] = {}
        try:
            overrides = parser.parse_overrides([*lines, *arguments])
        except HydraException as error:
            raise QuantizationError(f"cannot sweep: {error}") from error
        for override in overrides:
            key = override.get_key_element()
            fixed.pop(key, None)
            swept.pop(key, None)
            if not override.is_sweep_override():
                fixed[key] = override.input_line or ""
                continue
            try:
                swept[key] = _parameter(override)
            except ValueError as error:
                faults.append(f"{override.input_line}: {error}")
        names = [parameter.name for parameter in swept.values()]
        faults += [
            f"{name} is swept twice, with and without a '+'" for name in dict.fromkeys(names) if names.count(name) > 1
        ]
        raise_all(QuantizationError, "cannot sweep", faults)
        return cls(tuple(fixed.values()), tuple(swept.values()))

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The distribution of every parameter, by name."""
        return {parameter.name: parameter.distribution for parameter in self.parameters}

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """Returns the overrides of one job."""
        return [*self.fixed, *(parameter.override(params[parameter.name]) for parameter in self.parameters)]


def _parameter(override: Override) -> Parameter:
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        log = "log" in value.tags
        if isinstance(value.start, int) and isinstance(
            value.end, int
        ):  # int(interval(1, 4)); without the cast they are floats
            return Parameter(key, IntDistribution(value.start, value.end, log=log))
        return Parameter(key, FloatDistribution(value.start, value.end, log=log))
    if isinstance(value, RangeSweep):
        numbers = sorted(value.range())
        if not numbers:
            raise ValueError("the range is empty")
        low, high, log = numbers[0], numbers[-1], "log" in value.tags
        with quiet():
            if isinstance(low, int) and isinstance(high, int):
                return Parameter(key, IntDistribution(low, high, log=log, step=1 if log else abs(int(value.step))))
            return Parameter(key, FloatDistribution(low, high, log=log, step=None if log else abs(float(value.step))))
    choices = tuple(
        (_native(item), text)
        for item, text in zip(override.sweep_iterator(), override.sweep_string_iterator(), strict=True)
    )
    if not choices:
        raise ValueError("there is nothing to choose from")
    return Parameter(key, CategoricalDistribution([choice for choice, _ in choices]), choices)


def _native(item: Any) -> Any:
    """Returns a value as Optuna stores it: plain values unchanged, lists and mappings as text."""
    if isinstance(item, QuotedString):
        return item.text
    return item if isinstance(item, str | int | float | bool | None) else Override._get_value_element_as_str(item)
