"""What the words of a plan stand for when nothing else is said: read off the specs and quantizers themselves."""

from __future__ import annotations

from lq_plugin.functional import ttq, twn
from lq_plugin.intent.plan import FLOAT, QuantPlan
from lq_plugin.intent.spec import PerChannel, PerGroup, PerTensor, QuantSpec
from lq_plugin.quantizers import make_activation_quantizer, make_weight_quantizer
from lq_plugin.quantizers.blockwise import element_and_mode
from lq_plugin.ranges.estimators.percentile import DEFAULT_PERCENTILE

COLUMNS = ("write", "levels", "one scale for", "zero point", "range", "rounding, gradient")
#: As they stand in a plan; what follows a slash is for inputs.
_WRITTEN = ("w4", "a8", "int4", "/ uint8", "sign", "bwn", "twn", "ttq", "kmeans2", "mx6", "mxfp4", "nvfp4")


def default_rows() -> list[tuple[str, ...]]:
    """One row for each word, in `COLUMNS`.

    >>> default_rows()[0]
    ('`w4`', '-8..7', 'output channel', 'no', 'minmax, at each step', 'nearest, clipped')
    """
    return [_row(text) for text in _WRITTEN]


def markdown() -> str:
    """The table and the options, as README has them."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row) + " |" for row in default_rows()]
    options = ", ".join(f"`{word}` is `{full}`" for word, full in _options().items())
    return "\n".join([*lines, "", f"Without their options {options}."]) + "\n"


def _row(text: str) -> tuple[str, ...]:
    rule = QuantPlan.parse(text).rules[0]
    spec = rule.input if rule.weight in (None, FLOAT) else rule.weight
    assert isinstance(spec, QuantSpec)
    if spec.has_grid and spec.format_name == "int":
        levels = f"{spec.grid.quant_min}..{spec.grid.quant_max}"
    else:
        levels = f"{spec.bit_width} bit{'s' * (spec.bit_width > 1)}"
    found = spec.range
    if spec.format_name != "int":
        found = "learned" if spec.learned else "of the values"
    elif spec is rule.weight and spec.range == "minmax":
        found += ", at each step"
    gradient = spec.gradient if spec.format_name == "int" else "its own"
    return f"`{text}`", levels, _shared(spec), "yes" if spec.affine else "no", found, f"{spec.rounding}, {gradient}"


def _shared(spec: QuantSpec) -> str:
    match spec.granularity:
        case PerTensor():
            return "tensor"
        case PerChannel():
            return "output channel"
        case PerGroup(group_size=size):
            return f"{size} elements"


def _options() -> dict[str, str]:
    moving = make_activation_quantizer(QuantSpec.parse("uint8 affine ema"), "", 1, 1)
    table = make_weight_quantizer(QuantSpec.parse("kmeans2"), "", (4, 4))
    group = QuantSpec.parse("int4 group16:4").granularity
    assert isinstance(group, PerGroup)
    after = "reassign" if table.reassign else "fixed"
    return {
        "ema": f"ema:{moving.momentum:g}",
        "percentile": f"percentile:{DEFAULT_PERCENTILE:g}",
        "stochastic": f"stochastic:{QuantSpec.parse('int4 stochastic').seed}",
        "group16:4": f"group16:4:{group.coarse}",
        "twn": f"twn:{twn.THRESHOLD:g}",
        "ttq": f"ttq:{ttq.THRESHOLD:g}",
        "kmeans2": f"kmeans2:{table.method}:{table.gradient}:{after}",
        "mxfp4": f"mxfp4:{element_and_mode(QuantSpec.parse('mxfp4'))[1]}",
    }
