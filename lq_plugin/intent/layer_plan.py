"""The plan of one layer: the specs of its tensors and their stages, and a check that the layer can take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lq_plugin.intent.formats import SLOTS
from lq_plugin.intent.ranges import range_kind
from lq_plugin.intent.schedule import Moment
from lq_plugin.intent.spec import PerBlock, PerChannel, PerGroup, PerMatrix, PerTensor, PerToken, QuantSpec


@dataclass(frozen=True)
class LayerInfo:
    """The properties of a layer that plans are checked against.

    Args:
        name: qualified name in the model.
        types: class names of the layer, most derived first.
        reduction: number of input channels of the weight, the dim that groups divide.
        slots: the tensors it has; an embedding has no float input.
        plain: a plain linear operation, whose output can be multiplied by a scale taken from its input.
        channel_axis: of its input and output, counted from the end; None if not known.
        matrix_rows: output channels of each matrix, where the weight is a stack of several: one for each expert.
    """

    name: str
    types: tuple[str, ...]
    reduction: int = 0
    slots: tuple[str, ...] = SLOTS
    plain: bool = True
    channel_axis: int | None = None
    matrix_rows: int | None = None


@dataclass(frozen=True)
class Stage:
    """The spec of one tensor from a moment of the training run on; None is float."""

    slot: str
    start: Moment | None
    spec: QuantSpec | None


@dataclass(frozen=True)
class LayerPlan:
    """The specs one layer gets; None stays float.

    Args:
        weight, input, output: the specs it ends with.
        stages: all stages, in order, of the tensors whose spec changes in training.
    """

    weight: QuantSpec | None = None
    input: QuantSpec | None = None
    output: QuantSpec | None = None
    stages: tuple[Stage, ...] = ()

    def stages_of(self, slot: str) -> list[tuple[Moment | None, QuantSpec | None]]:
        """Returns the specs of a tensor, each with the moment it comes into force, in order."""
        return [(stage.start, stage.spec) for stage in self.stages if stage.slot == slot] or [
            (None, getattr(self, slot))
        ]

    def __bool__(self) -> bool:
        return any((self.weight, self.input, self.output))


def layer_plan(name: str, chosen: Mapping[str, list[Stage]], faults: list[str]) -> LayerPlan:
    """Returns the plan of a layer.

    Args:
        name: of the layer, for messages.
        chosen: the stages of each tensor that the plan's rules lead to.
        faults: gets a message for each tensor whose last stage is float.
    """
    for slot, stages in chosen.items():
        if len(stages) > 1 and stages[-1].spec is None:
            faults.append(f"{name}: its {slot} ends float at {stages[-1].start}; stages lead to a quantized tensor")
    last: dict[str, Any] = {slot: stages[-1].spec for slot, stages in chosen.items()}
    return LayerPlan(**last, stages=tuple(stage for stages in chosen.values() if len(stages) > 1 for stage in stages))


def for_layer(layer: LayerInfo, slot: str, spec: QuantSpec) -> QuantSpec:
    """Returns a rule's spec as a layer has it: of a stack of matrices each has the scale that a tensor would have.

    Args:
        layer: that the rule matches.
        slot: `"weight"`, `"input"` or `"output"`.
        spec: of the rule.
    """
    stacked = slot == "weight" and layer.matrix_rows is not None and isinstance(spec.granularity, PerTensor)
    free = "granularity" in spec.kind.choices
    return spec.replace(granularity=PerMatrix(layer.matrix_rows)) if stacked and free else spec  # type: ignore[arg-type]


def as_written(spec: QuantSpec | None) -> QuantSpec | None:
    """Returns a layer's spec as rules for any layer write it: the inverse of `for_layer`."""
    if spec is None or not isinstance(spec.granularity, PerMatrix):
        return spec
    return spec.replace(granularity=PerTensor())


def layer_faults(layer: LayerInfo, plan: LayerPlan) -> list[str]:
    """Returns a message for everything in the plan, any stage of it, that the layer cannot take."""
    faults = [
        fault for slot in SLOTS for _, spec in plan.stages_of(slot) if spec for fault in _spec_faults(layer, slot, spec)
    ]
    return list(dict.fromkeys(faults))


def _spec_faults(layer: LayerInfo, slot: str, spec: QuantSpec) -> list[str]:
    where = f"{layer.name}: {slot} spec '{spec}'"
    if slot not in spec.kind.slots:
        return [f"{layer.name}: '{spec}' is for {' and '.join(spec.kind.slots)}, not for its {slot}"]
    if slot == "weight":
        return _weight_faults(layer, spec)
    faults = []
    if slot not in range_kind(spec.range_name).slots:
        faults.append(f"{where}: range {spec.range!r} is for weights; activations take ema, minmax, mse, lsq, ...")
    if spec.kind.scales_output and not layer.plain:
        faults.append(
            f"{layer.name}: input '{spec}' scales the output of plain Linear and Conv layers without groups, got "
            f"{layer.types[0]}"
        )
    if isinstance(channel := spec.granularity, PerChannel) and not _may_be_channel_axis(
        channel.axis, layer.channel_axis
    ):
        faults.append(
            f"{where}: the channels are on axis {layer.channel_axis}, got axis {channel.axis}; per_channel without a "
            "number means that one"
        )
    if isinstance(spec.granularity, PerBlock):
        faults.append(
            f"{where}: squares of a weight have scales; activations take group{spec.granularity.size} dynamic"
        )
    if isinstance(spec.granularity, PerMatrix):
        faults.append(f"{where}: matrices of a weight have scales; activations take per_tensor")
    if isinstance(spec.granularity, PerToken) and layer.channel_axis not in (None, -1):
        faults.append(
            f"{where}: per_token is of layers with their channels last, these are on axis {layer.channel_axis}; write "
            "per_tensor"
        )
    group = spec.granularity
    if isinstance(group, PerGroup) and "granularity" in spec.kind.choices and not spec.dynamic:
        if group.scale_bits is None or group.coarse != "tensor":
            faults.append(
                f"{where}: groups of activations get their scales at run time: write group16:4, for integer ones under "
                "a fixed float scale, or 'group16 dynamic'"
            )
        if spec.affine:
            faults.append(f"{where}: groups of activations have no zero point; use int or uint without affine")
    return faults


def _may_be_channel_axis(axis: int | None, channels: int | None) -> bool:
    """Returns whether an axis can be the `channels` of a tensor not yet seen, with or without a batch.

    >>> [_may_be_channel_axis(axis, -3) for axis in (1, 0, -3, 7, -1)], _may_be_channel_axis(7, -1)
    ([True, True, True, False, False], True)
    """
    if axis is None or channels is None or axis == channels:
        return True
    # What has its channels last takes any number of dims in front.
    return axis >= 0 and (channels == -1 or axis <= 1)


def _weight_faults(layer: LayerInfo, spec: QuantSpec) -> list[str]:
    faults = []
    if isinstance(group := spec.granularity, PerGroup) and layer.reduction % group.group_size and not group.ragged:
        way_out = "" if spec.kind.codebook else f"; '{group} ragged' allows a shorter last group"
        faults.append(
            f"{layer.name}: group size {group.group_size} does not divide its {layer.reduction} input channels{way_out}"
        )
    if "weight" not in range_kind(spec.range_name).slots:
        faults.append(
            f"{layer.name}: weight range {spec.range!r} is for activations; weights take minmax, mse, octav, lsq, ..."
        )
    if isinstance(block := spec.granularity, PerBlock) and (layer.matrix_rows or 0) % block.size:
        faults.append(
            f"{layer.name}: a square of {block.size} would hold rows of two experts, with {layer.matrix_rows} rows each"
        )
    if isinstance(stack := spec.granularity, PerMatrix) and stack.rows != layer.matrix_rows:
        found = "is one matrix" if layer.matrix_rows is None else f"has some of {layer.matrix_rows}"
        faults.append(
            f"{layer.name}: '{spec}' is of matrices of {stack.rows} rows, its weight {found}: write per_tensor"
        )
    if isinstance(channel := spec.granularity, PerChannel) and channel.axis not in (None, 0):
        faults.append(f"{layer.name}: a weight keeps its output-channel axis (0), got axis {channel.axis}")
    return faults
