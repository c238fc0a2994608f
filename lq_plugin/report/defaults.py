"""The meaning of a plan's words without further options, read from the specs and quantizers themselves."""

from __future__ import annotations

from lq_plugin.intent.formats import FORMATS
from lq_plugin.intent.plan import FLOAT, QuantPlan
from lq_plugin.intent.spec import PerBlock, PerChannel, PerGroup, PerMatrix, PerTensor, PerToken, QuantSpec
from lq_plugin.quantizers import make_activation_quantizer
from lq_plugin.quantizers.registry import format_code
from lq_plugin.ranges.estimators.percentile import DEFAULT_PERCENTILE

COLUMNS = ("write", "levels", "one scale for", "zero point", "range", "rounding, gradient")
#: The short plans; the formats follow.
_SHORT = ("w4", "a8", "a8 dynamic", "a8 per_token dynamic")


def default_rows() -> list[tuple[str, ...]]:
    """Returns one row for each word, in `COLUMNS`.

    >>> default_rows()[0]
    ('`w4`', '-8..7', 'output channel', 'no', 'minmax, at each step', 'nearest, clipped')
    """
    return [_row(text) for text in (*_SHORT, *_written())]


def _written() -> list[str]:
    """Returns the spelling of the formats, as they stand in a plan; what follows a slash is for inputs."""
    found: list[str] = []
    for name, kind in FORMATS.items():
        shown = kind.spellings(name) if kind.defaults is None else kind.defaults
        found += [text if "weight" in kind.slots or text[0] == "/" else f"/ {text}" for text in shown]
    return found


def markdown() -> str:
    """Returns the table and the options, as README has them."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row) + " |" for row in default_rows()]
    options = ", ".join(f"`{word}` is `{full}`" for word, full in _options().items())
    return "\n".join([*lines, "", f"Without their options {options}."]) + "\n"


def _row(text: str) -> tuple[str, ...]:
    rule = QuantPlan.parse(text).rules[0]
    spec = rule.input if rule.weight in (None, FLOAT) else rule.weight
    assert isinstance(spec, QuantSpec)
    if spec.is_uniform:
        levels = f"{spec.grid.quant_min}..{spec.grid.quant_max}"
    else:
        levels = f"{spec.bit_width} bit{'s' * (spec.bit_width > 1)}"
    found = spec.range
    if "range" not in spec.kind.choices:
        found = "learned" if spec.learned else "of the values"
    elif spec is rule.weight and spec.range == "minmax":
        found += ", at each step"
    gradient = spec.gradient if spec.is_uniform else "its own"
    zero_point = "yes" if spec.has_grid and spec.grid.affine else "no"
    return f"`{text}`", levels, _shared(spec), zero_point, found, f"{spec.rounding}, {gradient}"


def _shared(spec: QuantSpec) -> str:
    match spec.granularity:
        case PerTensor():
            return "tensor"
        case PerChannel():
            return "output channel"
        case PerGroup(group_size=size):
            return f"{size} elements"
        case PerToken():
            return "row"
        case PerBlock(size=size):
            return f"{size} x {size} elements"
        case PerMatrix():
            return "matrix"


def _options() -> dict[str, str]:
    moving = make_activation_quantizer(QuantSpec.parse("uint8 affine ema"), "", 1, 1)
    group = QuantSpec.parse("int4 group16:4").granularity
    assert isinstance(group, PerGroup)
    return {
        "ema": f"ema:{moving.momentum:g}",
        "percentile": f"percentile:{DEFAULT_PERCENTILE:g}",
        "stochastic": f"stochastic:{QuantSpec.parse('int4 stochastic').seed}",
        "group16:4": f"group16:4:{group.coarse}",
        **{
            text: f"{text}:{options}"
            for text in _written()
            if (options := format_code(QuantSpec.parse(text.removeprefix("/ "))).default_options)
        },
    }
