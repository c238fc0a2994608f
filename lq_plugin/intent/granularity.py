"""Granularity of the scales: what shares one, from a whole tensor down to short groups along the reduction dim."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""

    def __str__(self) -> str:
        return "per_tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale per slice along `axis`, the axis that is kept.

    `axis=None` is the layer's own channel axis: output channels of a weight, dim 1 of a
    convolution's input, the last dim of a linear layer's input.
    """

    axis: int | None = None

    def __str__(self) -> str:
        return "per_channel" if self.axis is None else f"per_channel:{self.axis}"


@dataclass(frozen=True)
class PerGroup:
    """One scale per `group_size` consecutive elements along the reduction dim.

    The reduction dim is the input-channel dim: a Linear weight `[O, I]` has `I / group_size`
    scales per row; a convolution weight `[O, I, kh, kw]` has them separately for each `(kh, kw)`.
    `ragged=True` allows a last group with fewer elements.

    With `scale_bits` the scales of the groups are integers of that many bits under one float scale, per tensor or,
    with `coarse="channel"`, per output channel (VS-Quant's two levels): `group16:4`, `group16:4:channel`.
    """

    group_size: int
    ragged: bool = False
    scale_bits: int | None = None
    coarse: str = "tensor"

    def __str__(self) -> str:
        scales = "" if self.scale_bits is None else f":{self.scale_bits}"
        coarse = "" if self.coarse == "tensor" else f":{self.coarse}"
        return f"group{self.group_size}{scales}{coarse}" + (" ragged" if self.ragged else "")


@dataclass(frozen=True)
class PerToken:
    """One scale for each row along the last dim: each token of `[batch, tokens, channels]`.

    The rows are known at run time only, so that it belongs to the range `dynamic`.
    """

    def __str__(self) -> str:
        return "per_token"


@dataclass(frozen=True)
class PerBlock:
    """One scale for each square of `size` output and `size` input channels of a weight.

    All kernel positions of a convolution share it. The last square along either dim may be smaller.
    """

    size: int

    def __str__(self) -> str:
        return f"block{self.size}"


@dataclass(frozen=True)
class PerMatrix:
    """One scale for each matrix of a stack, `rows` output channels each: the weights of one expert.

    It is what `per_tensor` becomes for a weight that holds several matrices.
    """

    rows: int

    def __str__(self) -> str:
        return f"matrix{self.rows}"


Granularity: TypeAlias = PerTensor | PerChannel | PerGroup | PerToken | PerBlock | PerMatrix

_CHANNEL = re.compile(r"per_channel(:(?P<axis>-?\d{1,9}))?$")
_GROUP = re.compile(r"group(?P<size>-?\d{1,9})(:(?P<scale_bits>\d{1,9})(:(?P<coarse>\w+))?)?$")
_BLOCK = re.compile(r"block(?P<size>-?\d{1,9})$")
_MATRIX = re.compile(r"matrix(?P<rows>-?\d{1,9})$")


def spelled_granularity(word: str) -> Granularity | None:
    """Returns the granularity that a word spells, as `str` writes it; None: no granularity.

    >>> spelled_granularity("group16:4"), spelled_granularity("int4")
    (PerGroup(group_size=16, ragged=False, scale_bits=4, coarse='tensor'), None)
    """
    if word in ("per_tensor", "per_token"):
        return PerTensor() if word == "per_tensor" else PerToken()
    if match := _CHANNEL.match(word):
        return PerChannel(int(match["axis"]) if match["axis"] else None)
    if match := _GROUP.match(word):
        scale_bits = int(match["scale_bits"]) if match["scale_bits"] else None
        return PerGroup(int(match["size"]), False, scale_bits, match["coarse"] or "tensor")
    if match := _BLOCK.match(word):
        return PerBlock(int(match["size"]))
    if match := _MATRIX.match(word):
        return PerMatrix(int(match["rows"]))
    return None
