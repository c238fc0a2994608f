"""The fake-quant flow of one layer as a graph, with what is quantized and what stays float."""

from __future__ import annotations

from typing import Any

from lq_plugin.intent.formats import GRADIENTS
from lq_plugin.intent.plan import LayerPlan
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.layers import CompoundWeight, QuantizedLayer
from lq_plugin.model.graph.record import Recording
from lq_plugin.model.graph.recording import Call
from lq_plugin.quantizers import SlotQuantizer
from lq_plugin.report.data import Flow, Node


def flow(
    name: str, module: Any, kind: str, plan: LayerPlan, recording: Recording | None = None, reason: str | None = None
) -> Flow:
    """Returns columns from left to right: source of the input, quantizers, operation, output, reader.

    Args:
        name: of the layer.
        module: prepared or float.
        kind: its float class.
        plan: specs of its tensors.
        recording: of one batch, for the operations before and after it.
        reason: why it, or a part of it, stays float.
    """
    before, after = _producer_and_readers(name, recording)
    nodes = [
        Node("source", "input", "float", before, 0, 0),
        Node("weight", "weight", "float", "trained as float" if plan.weight else "float32", 0, 1),
    ]
    edges = []
    for slot, source, row in (("input", "source", 0), ("weight", "weight", 1)):
        spec = getattr(plan, slot)
        if spec is None:
            edges.append([source, "operation"])
            continue
        nodes.append(_quantizer(module, slot, spec, plan, 1, row))
        edges += [[source, slot + "_quantizer"], [slot + "_quantizer", "operation"]]
    inner = module.remark if isinstance(module, CompoundWeight) else None
    does = "computes in float on quantized values" if plan else "computes in float"
    nodes.append(Node("operation", kind, "operation", inner or does, 2, 0))
    if getattr(module, "bias", None) is not None:
        nodes.append(Node("bias", "bias", "float", "float32", 1, 2))
        edges.append(["bias", "operation"])
    last = "operation"
    if plan.output is not None:
        nodes.append(_quantizer(module, "output", plan.output, plan, 3, 0))
        edges.append(["operation", "output_quantizer"])
        last = "output_quantizer"
    nodes.append(Node("output", "output", "float", after, 4, 0))
    edges.append([last, "output"])
    if reason:
        nodes.append(Node("reason", "stays float", "note", reason, 2, 2))
    return Flow(nodes, edges)


def _quantizer(module: Any, slot: str, spec: QuantSpec, plan: LayerPlan, column: int, row: int) -> Node:
    own = "the gradient of its format" if not spec.is_uniform else GRADIENTS[spec.gradient]
    found = "; its range is trained" if spec.learned else "; its range is found at run time" if spec.dynamic else ""
    details = [f"STE: {own}{found}"]
    stages = plan.stages_of(slot)
    if len(stages) > 1:
        details += [f"from {start or 'the start'}: {stage or 'float'}" for start, stage in stages]
    quantizer = getattr(module, f"{slot}_quantizer", None) if isinstance(module, QuantizedLayer) else None
    if isinstance(quantizer, SlotQuantizer) and (current := quantizer.current) is not None:
        if not current.is_enabled:
            details.append("switched off now")
        elif current.lacks_range:
            details.append("no range yet")
    return Node(f"{slot}_quantizer", str(spec), "quantizer", "; ".join(details), column, row)


def _producer_and_readers(name: str, recording: Recording | None) -> tuple[str, str]:
    calls = () if recording is None else recording.calls_of(name)
    if not calls:
        return "", ""
    assert recording is not None
    producer = recording.producer_of(calls[0]) if calls[0].inputs else None
    readers = [_title(call) for call in recording.consumers_of(calls[0])]
    more = f" and {len(readers) - 2} more" if len(readers) > 2 else ""
    times = f", called {len(calls)} times" if len(calls) > 1 else ""
    source = "model input" if producer is None else f"from {_title(producer)}"
    return source + times, f"to {', '.join(readers[:2])}{more}" if readers else ""


def _title(call: Call) -> str:
    if call.kind == "output":
        return "model output"
    return f"{call.name} ({call.op})" if call.kind == "module" else call.op
