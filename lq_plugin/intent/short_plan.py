"""Plans in one line: `w4a8`, `w4 group16 mse a8 percentile:99.9`, `w4a16`.

`w` and `a` (or `W` and `A`) are followed by a number of bits, and by the words of a spec, which belong to the one in
front of them. Words after both in one, as in `w4a8 lsq`, could belong to either: they are accepted if that makes no
difference or if only one of the two can have them, and refused otherwise. `a16`, or `a` alone, leaves inputs float:
weight-only quantization.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lq_plugin.errors import PlanError, QuantizationError
from lq_plugin.intent.formats import RANGES
from lq_plugin.intent.layer_plan import LayerInfo, LayerPlan, layer_faults
from lq_plugin.intent.ranges import range_kind
from lq_plugin.intent.spec import QuantSpec

#: `QuantSpec`s by the tensors of a layer.
Specs = dict[str, Any]
_SLOTS = {"w": "weight", "a": "input"}
_FLOAT = ("a", "a16")


def is_short(text: str) -> bool:
    """Returns True if a plan's text begins like a short plan and not like a spec."""
    return re.match(r"\s*[wa]\d", text, re.IGNORECASE) is not None


def read_short(text: str) -> Specs:
    """Returns the specs that a short plan stands for.

    Raises:
        PlanError: a tensor named twice, ambiguous words, or nothing quantized.
        SpecError: unknown words.

    >>> read_short("W4A8")
    {'weight': QuantSpec('int4 per_channel'), 'input': QuantSpec('uint8 affine ema')}
    >>> read_short("w4a16 mse")
    {'weight': QuantSpec('int4 per_channel mse')}
    """
    groups: list[tuple[list[str], list[str]]] = []
    for word in text.split():
        if is_short(word):
            groups.append((re.split(r"(?<=\d)(?=[wa](?:\d|$))", word, flags=re.IGNORECASE), []))
        else:
            groups[-1][1].append(word)
    named = [head[0].lower() for heads, _ in groups for head in heads]
    if twice := [name for name in _SLOTS if named.count(name) > 1]:
        raise PlanError(f"{text!r} sets the {_SLOTS[twice[0]]} a second time")
    specs: Specs = {}
    for heads, words in groups:
        specs |= _read(heads, words) if len(heads) == 1 or not words else _read_together(heads, words)
    if not specs:
        raise PlanError(
            f"{text!r} quantizes nothing: a16 leaves inputs float; 16-bit integers are 'float / uint16 affine ema'"
        )
    return specs


def _read(heads: Sequence[str], words: Sequence[str]) -> Specs:
    """Returns the specs of heads that share all of the words."""
    found = ((_SLOTS[head[0].lower()], _spec(head, words)) for head in heads)
    return {slot: spec for slot, spec in found if spec is not None}


def _read_together(heads: list[str], words: list[str]) -> Specs:
    """Returns the specs of two heads in one word, with the words after it."""
    after = " ".join(words)
    first, last = heads
    ways: dict[str, Specs] = {}
    faults: list[QuantizationError] = []
    for written, for_first, for_last in (
        (f"{first} {after} {last} {after}", words, words),
        (f"{first} {last} {after}", [], words),
        (f"{first} {after} {last}", words, []),
    ):
        try:
            specs = _read([first], for_first) | _read([last], for_last)
            if wrong := layer_faults(LayerInfo("", ("layer",)), LayerPlan(**specs)):
                raise PlanError(wrong[0].lstrip(": "))
        except QuantizationError as error:
            faults.append(error)
            continue
        # Words for the first alone are what is meant if the last cannot have them; people write words for both after
        # both, except for per_channel, which belongs to weights.
        if not ways or (specs not in ways.values() and (for_last or "per_channel" in words)):
            ways[written] = specs
    if not ways:
        raise faults[0]
    if len(ways) > 1:
        readings = " or ".join(map(repr, ways))
        raise PlanError(f"the words after {first + last!r} can be read in two ways: write {readings}")
    return next(iter(ways.values()))


def _spec(head: str, words: Sequence[str]) -> QuantSpec | None:
    """Returns the spec of `w4 mse` or `a8`; error messages quote these words, not those that they stand for."""
    kind, bits = head[0].lower(), head[1:]
    written = " ".join([head, *words])
    if head.lower() in _FLOAT:
        if words:
            raise PlanError(
                f"{written!r}: {head} leaves inputs float; 16-bit integers are written '... / uint16 affine "
                f"{' '.join(words)}'"
            )
        return None
    if not bits.isdecimal():
        raise PlanError(f"{head!r}: {head[0]!r} is followed by a number of bits; words stand apart: '{head[0]}4 mse'")
    named = [name for word in words if (name := word.partition(":")[0]) in RANGES]
    if kind == "w":
        words = [
            f"int{bits}",
            *([] if any(word.startswith(("per_", "group")) for word in words) else ["per_channel"]),
            *words,
        ]
    elif any(range_kind(name).non_negative for name in named):  # its zero is fixed
        words = [f"uint{bits}", *words]
    else:
        # Asymmetric and unsigned: the one grid that fits ReLU outputs and signed inputs alike.
        words = [f"uint{bits}", *([] if "affine" in words else ["affine"]), *([] if named else ["ema"]), *words]
    return QuantSpec.parse(" ".join(words), written=written)
