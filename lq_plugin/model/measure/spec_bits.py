"""Bits that a tensor takes under a spec, and those of the keys and values that a language model keeps."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from lq_plugin.functional.grouping import scale_shape
from lq_plugin.intent.plan import LayerPlan
from lq_plugin.intent.spec import PerGroup, QuantSpec
from lq_plugin.model.graph.numbering import ATTENTION, CACHED, part_of
from lq_plugin.model.graph.recording import Recording
from lq_plugin.model.measure.energy import FLOAT_BITS
from lq_plugin.quantizers import make_activation_quantizer


def spec_bits(spec: QuantSpec, weight_shape: tuple[int, ...]) -> int:
    """Bits that a weight takes under `spec`, its scales and zero points included.

    Args:
        spec: how it is quantized.
        weight_shape: `[C_out, C_in / groups, *kernel]`; a ragged last group has a scale of its own.

    >>> spec_bits(QuantSpec.parse("int4 group16"), (64, 64)) / 64**2  # 4 + 32 / 16
    6.0
    >>> spec_bits(QuantSpec.parse("int4 per_channel affine"), (1, 18))  # 18 · 4 + 32 + 4
    108
    >>> spec_bits(QuantSpec.parse("int4 group16:4"), (64, 64)) / 64**2  # 4 + 4 / 16, and one float scale
    4.2578125
    >>> [spec_bits(QuantSpec.parse(name), (64, 64)) / 64**2 for name in ("mx9", "mx6", "mx4")]
    [9.0, 6.0, 4.0]
    >>> names = ("mxfp4", "nvfp4", "sign", "bwn", "twn", "kmeans2")
    >>> [spec_bits(QuantSpec.parse(name), (64, 64)) / 64**2 for name in names]
    [4.25, 4.5078125, 1.0, 1.5, 2.0078125, 2.03125]
    >>> [spec_bits(QuantSpec.parse(name), (64, 512)) / 64 / 512 for name in ("q4_0", "q8_0", "tq2_0", "tq1_0")]
    [4.5, 8.5, 2.0625, 1.6875]
    """
    stored = spec.bit_width if spec.kind.code_bits is None else spec.kind.code_bits
    scales = prod(scale_shape(weight_shape, spec.granularity))
    return prod(weight_shape) * stored + _qparams_bits(spec, scales, weight_shape[0])


def _qparams_bits(spec: QuantSpec, scales: int, channels: int = 1) -> int:
    zero_points = scales * spec.bit_width if spec.affine else 0
    group = spec.granularity
    if (bits := spec.kind.scale_bits) is not None:
        tables = scales * FLOAT_BITS * 2**spec.bit_width if spec.kind.codebook else 0
        return scales * bits + tables + spec.kind.tensor_bits
    if isinstance(group, PerGroup) and group.scale_bits is not None:
        return scales * group.scale_bits + FLOAT_BITS * (channels if group.coarse == "channel" else 1) + zero_points
    return scales * FLOAT_BITS + zero_points


def cache_bytes(recording: Recording, plans: Mapping[str, LayerPlan] | None = None) -> int | None:
    """Returns the bytes of the keys and values of one input sample, which a cache keeps while a text grows.

    They are what torch's attention kernel gets, float numbers of 32 bits. Scales and zero points that are found at run
    time count, those that are calibrated are part of the model.

    Args:
        recording: of one batch.
        plans: by name of recorded operation; None: everything is float.

    Returns:
        None where the kernel never ran.
    """
    plans, bits = plans or {}, 0
    calls = [call for call in recording.functional_calls if call.op == ATTENTION and len(call.operands) == 3]
    for call in calls:
        for part, place in CACHED.items():
            shape = call.inputs[place].shape
            rows, columns = prod(shape[:-1]), shape[-1]
            spec = plans.get(part_of(call.name, part), LayerPlan()).input or plans.get(call.name, LayerPlan()).input
            bits += rows * columns * FLOAT_BITS if spec is None else _cached_bits(spec, rows, columns)
    return round(bits / 8 / recording.samples) if calls else None


def _cached_bits(spec: QuantSpec, rows: int, columns: int) -> int:
    group = spec.granularity
    if not make_activation_quantizer(spec, "", 1, -1).needs_calibration:
        return spec_bits(spec, (rows, columns))
    # Of two levels of scales that of the tensor is calibrated; those of blocks are found at run time.
    blocks = prod(scale_shape((rows, columns), group)) if isinstance(group, PerGroup) else 0
    of_block = group.scale_bits if isinstance(group, PerGroup) and group.scale_bits else spec.kind.scale_bits or 0
    return rows * columns * spec.bit_width + blocks * of_block
