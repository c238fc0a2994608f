"""Parts of a quantized weight: integers of few bits, and a few float numbers.

`encode` takes a weight apart, `decode` puts it together, bit for bit. Every format stores exactly what
`lq_plugin.model.measure.cost` counts for it:

| format | codes (bits an element) | stored with them |
|---|---|---|
| int | level - quant_min (b) | scale; zero point - quant_min (b), where affine |
| int, integer scales | the same | scale - 1 (M), the float scale above |
| mx4, mx6, mx9 | level + 2^m - 1 (m + 1) | E + 127 (8) a block, τ (1) a pair |
| mxfp*, mxint8 | sign, index of the magnitude | E + 127 (8) a block |
| fp8 | the bits of the float (8) | scale |
| nvfp4 | the same | index of the E4M3 scale (8) a block, the tensor's scale |
| if4 | the same, or an integer of two's complement | the same; the scale's sign is set for integers |
| seq | 0, 1, 2, 3 or 0, 1, 2 from below (2) | scale |
| sign, bwn | 1 for +1 (1) | bwn: scale |
| twn, ttq | 0, 1, 2 for -, 0, + (2) | one or two scales |
| kmeans | index (b) | the centroids |
| q4_0, q8_0, tq2_0 | level - quant_min (b) | the bits of the float16 d (16) a block |
| tq1_0 | nothing (0) | five levels a byte, 52 bytes a block; the bits of d |
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin.errors import ExportError
from lq_plugin.export.packed_file import row_chunks
from lq_plugin.functional.grouping import blocks, unblocks
from lq_plugin.intent.spec import Granularity, PerBlock, PerMatrix, QuantSpec
from lq_plugin.layers import QuantizedLayer
from lq_plugin.quantizers.packed import PackedWeightQuantizer
from lq_plugin.quantizers.registry import (
    Part as Part,
    Parts as Parts,
    Statistics,
    Storage,
    Values,
    format_code,
    make_weight_quantizer,
)


def quantizer_in_force(layer: nn.Module) -> Any:
    """Returns the quantizer of a layer's weight; None where the weight is used as float."""
    quantizer = layer.weight_quantizer if isinstance(layer, QuantizedLayer) else None
    current = None if quantizer is None else quantizer.current
    return current if current is not None and current.is_enabled else None


def encode(quantizer: Any, weight: Tensor) -> Parts:
    """Returns the parts of a weight as its quantizer maps it in evaluation mode.

    Args:
        quantizer: calibrated.
        weight: `[C_out, C_in / groups, *kernel]`.

    Raises:
        ExportError: for what is evaluated with float weights, or was read from a packed file.
    """
    return encode_rows(quantizer, weight, statistics(quantizer, weight))


def statistics(quantizer: Any, weight: Tensor) -> Statistics:
    """Returns what the parts of some rows need from the whole weight; small, except the indices of a codebook.

    Raises:
        ExportError: see `encode`.
    """
    if isinstance(quantizer, PackedWeightQuantizer):
        raise ExportError(
            f"{quantizer.name} was read from a packed file, which holds its values and not its scales as parameters: "
            "export the model that it was packed from, or its checkpoint (lq_plugin.load_checkpoint)"
        )
    if (reason := nothing_stored(quantizer.spec)) is not None:
        raise ExportError(f"{quantizer.name} ({quantizer.spec}): {reason}")
    with torch.no_grad():
        return _storage(quantizer.spec).statistics(
            quantizer, blocks(weight.detach().float(), quantizer.spec.granularity)
        )


def encode_rows(quantizer: Any, weight: Tensor, found: Statistics, rows: slice = slice(None)) -> Parts:
    """Returns the parts of some rows of a weight; a part of the whole weight has size 1 along dim 0.

    Args:
        quantizer: calibrated.
        weight: the whole one.
        found: its `statistics`.
        rows: slice of output channels.
    """
    some, granularity = weight.detach()[rows].float(), quantizer.spec.granularity
    span = slice(*rows.indices(len(weight))[:2])
    mine = tuple(value[part_rows(granularity, len(value), len(weight), span)] for value in found)
    with torch.no_grad():
        parts = _storage(quantizer.spec).encode(quantizer, blocks(some, granularity), *mine)
        # Without what pads a ragged group.
        codes = unblocks(parts["codes"].values, tuple(some.shape), granularity)
    return parts | {"codes": Part(codes.reshape(some.shape), parts["codes"].bits)}


def chunks(spec: QuantSpec, shape: tuple[int, ...]) -> Iterator[slice]:
    """Yields slices of a weight's rows that are written and read at a time: whole squares or matrices with a scale."""
    return row_chunks(shape, _rows_together(spec.granularity))


def _rows_together(granularity: Granularity) -> int:
    """Returns the rows that share a scale."""
    if isinstance(granularity, PerBlock):
        return granularity.size
    return granularity.rows if isinstance(granularity, PerMatrix) else 1


def part_rows(granularity: Granularity, length: int, total: int, rows: slice) -> slice:
    """Returns the rows of a part that some rows of the weight need.

    Args:
        granularity: of the weight.
        length: rows of the part: as many as the weight has, one for each row of squares or matrix, or its own.
        total: rows of the weight.
        rows: of the weight; those of squares and matrices begin with a whole one.

    >>> part_rows(PerBlock(128), 3, 300, slice(128, 300)), part_rows(PerBlock(128), 300, 300, slice(128, 300))
    (slice(1, 3, None), slice(128, 300, None))
    """
    if length == total:
        return rows
    together = _rows_together(granularity)
    if isinstance(granularity, (PerBlock, PerMatrix)) and length == -(-total // together):
        return slice(rows.start // together, -(-rows.stop // together))
    return slice(0, length)


@functools.lru_cache(256)
def layout(spec: QuantSpec, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """Returns the shape and the bits of each part of a weight `[C_out, ...]`, as `encode` makes them; no bits: float32.

    >>> layout(QuantSpec.parse("int4 group16"), (8, 40))
    {'codes': ((8, 40), 4), 'scale': ((8, 3, 1), None)}

    Raises:
        ExportError: a spec whose weights are not stored.
    """
    if "weight" not in spec.kind.slots:
        raise ExportError(f"'{spec}' is no format of weights")
    matrix = spec.granularity.rows if isinstance(spec.granularity, PerMatrix) else 1
    rows = matrix * (1 if shape[0] == matrix else 2)
    probe = torch.zeros(rows, *shape[1:])
    parts = encode(make_weight_quantizer(spec, "weight", tuple(probe.shape)), probe)

    def count(part: Part) -> int:
        found = part.values.shape[0]
        if isinstance(spec.granularity, PerBlock) and found == 1:
            return -(-shape[0] // spec.granularity.size)
        if matrix > 1 and found == rows // matrix:
            return shape[0] // matrix
        return shape[0] if found == rows else found

    return {key: ((count(part), *part.values.shape[1:]), part.bits) for key, part in parts.items()}


def any_code_is_finite(spec: QuantSpec) -> bool:
    """Returns True where every code decodes to a finite value, given finite scales."""
    return _storage(spec).finite_codes


def nothing_stored(spec: QuantSpec) -> str | None:
    """Returns the reason why `encode` refuses such weights, whatever their values, or None.

    >>> nothing_stored(QuantSpec.parse("sign:float_eval stochastic")), nothing_stored(QuantSpec.parse("sign"))
    ('it is evaluated with float weights, there is nothing to store', None)
    """
    storage = format_code(spec).storage
    return f"format {spec.format_name!r} has no stored form" if storage is None else storage.fault(spec)


def decode(spec: QuantSpec, shape: tuple[int, ...], parts: Values) -> Tensor:
    """Returns the weight `[C_out, C_in / groups, *kernel]` in float32.

    Args:
        spec: of the weight.
        shape: of the weight.
        parts: values by name, as `encode` makes them; integers are int32.
    """
    values = _storage(spec).decode(spec, {**parts, "codes": blocks(parts["codes"], spec.granularity)})
    return unblocks(values, shape, spec.granularity)


def _storage(spec: QuantSpec) -> Storage:
    storage = format_code(spec).storage
    if storage is None:
        raise ExportError(f"{spec}: format {spec.format_name!r} has no stored form")
    return storage
