"""Table of what each export target holds: formats by layers, asked of the targets themselves."""

from __future__ import annotations

from torch import nn

from lq_plugin.export.target import TARGETS, Target
from lq_plugin.intent.formats import FORMATS
from lq_plugin.intent.spec import PerGroup, PerToken, QuantSpec

#: Granularities and ranges that integers are listed with, by slot.
_INTEGERS = {
    "weight": (
        "int8",
        "int8 per_channel",
        "int8 per_channel narrow",
        "int4 per_channel",
        "int4 group32",
        "int4 group16:4",
        "int2 per_channel",
    ),
    "input": (
        "uint8 affine ema",
        "int8 ema",
        "uint4 affine ema",
        "int8 per_channel",
        "int16 ema",
        "int8 group32:4",
        "uint8 affine dynamic",
        "int8 per_token affine dynamic",
    ),
}
#: A layer of each kind, of sizes that every group divides, by slot.
_LAYERS = {
    "weight": ("Linear", "Conv2d", "depthwise", "ConvTranspose2d", "Embedding"),
    "input": ("Linear", "Conv2d"),
}


def layers() -> dict[str, nn.Module]:
    """Returns a layer of each listed kind, without memory for its weights."""
    return {
        "Linear": nn.Linear(256, 256, device="meta"),
        "Conv2d": nn.Conv2d(256, 256, 3, device="meta"),
        "depthwise": nn.Conv2d(256, 256, 3, groups=256, device="meta"),
        "Embedding": nn.Embedding(256, 256, device="meta"),
        "ConvTranspose2d": nn.ConvTranspose2d(256, 256, 3, device="meta"),
    }


def specs(slot: str) -> list[QuantSpec]:
    """Returns the specs that the table lists for a slot: some integers, and one of each other format."""
    found = [QuantSpec.parse(text) for text in _INTEGERS[slot]]
    for name, kind in FORMATS.items():
        if name != "int" and slot in kind.slots:
            found.append(QuantSpec.parse(kind.spellings(name)[0]))
    return list(dict.fromkeys(found))


def held(target: Target, slot: str, spec: QuantSpec) -> list[str]:
    """Returns the kinds of layers whose tensor a target holds under a spec.

    Args:
        target: that is asked.
        slot: `"weight"`, `"input"` or `"output"`.
        spec: of the tensor.
    """
    kinds = layers()
    possible = [kind for kind in _LAYERS[slot] if _fits(spec, kinds[kind])]
    return [kind for kind in possible if target.refusal(slot, spec, kinds[kind]) is None]


def _fits(spec: QuantSpec, layer: nn.Module) -> bool:
    """Returns False where groups are larger than what they divide, as a filter's one channel, or tokens are no rows."""
    group = spec.granularity
    if isinstance(group, PerToken):
        return isinstance(layer, nn.Linear)
    channels = next(layer.parameters()).shape[1]
    return not isinstance(group, PerGroup) or group.ragged or channels % group.group_size == 0


def markdown() -> str:
    """Returns the tables of weights and of inputs."""
    parts = []
    for slot, title in (("weight", "Weights"), ("input", "Inputs of layers")):
        head = ["spec", *(f"`{name}`" for name in TARGETS)]
        lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        kinds = layers()
        for spec in specs(slot):
            possible = [kind for kind in _LAYERS[slot] if _fits(spec, kinds[kind])]
            cells = [_cell(held(target, slot, spec), possible) for target in TARGETS.values()]
            lines.append("| " + " | ".join([f"`{spec}`", *cells]) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cell(found: list[str], possible: list[str]) -> str:
    """Returns the kinds of layers in a word, where there is one.

    >>> _cell(["Linear"], ["Linear", "Conv2d"]), _cell(["Linear"], ["Linear"]), _cell([], ["Linear"])
    ('Linear', 'yes', 'no')
    """
    return "yes" if found == possible else ", ".join(found) or "no"
