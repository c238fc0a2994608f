"""Products that an ExecuTorch program computes with integers, read from the file itself."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lq_plugin.export.target import Products

#: XNNPACK's nodes, and portable kernels, that multiply.
_DELEGATED = ("XNNConv2d", "XNNDepthwiseConv2d", "XNNConvTranspose2d", "XNNFullyConnected", "XNNBatchMatrixMultiply")
_INTEGERS = ("xnn_datatype_qint", "xnn_datatype_qcint")
#: Of signed bytes whose scale is found at run time.
_TOKENS = "xnn_datatype_qdint8"
_PORTABLE = ("aten::convolution", "aten::linear", "aten::addmm", "aten::mm", "aten::bmm")


def executorch_products(path: Path) -> Products:
    """Returns the products of a program: integer ones read signed bytes, with weights of such.

    Args:
        path: of the file.
    """
    from executorch.exir._serialize._program import deserialize_pte_binary

    program = deserialize_pte_binary(path.read_bytes()).program
    plan = program.execution_plan[0]
    found: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for delegate in plan.delegates:
        if delegate.id == "XnnpackBackend":
            for name, types in _nodes(bytes(program.backend_delegate_data[delegate.processed.index].data)):
                if name in _DELEGATED:
                    found[_of_integers(types)][name] += 1
    for chain in plan.chains:
        for instruction in chain.instructions:
            index = getattr(instruction.instr_args, "op_index", None)
            if index is not None and plan.operators[index].name in _PORTABLE:
                found[False][plan.operators[index].name] += 1
    return Products(dict(found[True]), dict(found[False]))


def _of_integers(types: list[str]) -> bool:
    """Returns True for a product of integers: next to tokens its weight is one of channels, its bias and result float.

    Args:
        types: of the tensors that it reads and writes.
    """
    weights = any(kind.startswith("xnn_datatype_qcint") for kind in types)
    return (_TOKENS in types and weights) or all(kind.startswith(_INTEGERS) for kind in types)


def _nodes(payload: bytes) -> Iterator[tuple[str, list[str]]]:
    """Yields the nodes of a delegate: the name, and the types of all tensors that it reads and writes."""
    graph = _graph(payload)
    types = {}
    for value in graph["xvalues"]:
        tensor = value["xvalue_union"].get("tensor_value", value["xvalue_union"])
        types[tensor["id_out"]] = tensor["datatype"]
    for node in graph["xnodes"]:
        ends = {key: index for key, index in node["xnode_union"].items() if key.endswith("_id")}
        yield node["xnode_union_type"], [types[index] for index in ends.values() if index in types]


def _graph(payload: bytes) -> Any:
    """Returns XNNPACK's graph in a delegate's payload, by the schema that executorch brings along.

    Its Python has no public reader of it (1.5.1).
    """
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader, _get_schema_bytes
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "schema.fbs").write_bytes(_get_schema_bytes())
        content = payload[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size]
        (folder / "graph.bin").write_bytes(content)
        _flatc_decompile(name, str(folder / "schema.fbs"), str(folder / "graph.bin"), ["--raw-binary"])
        # flatc writes -inf and inf, the bounds of a float result, where JSON's readers know -Infinity and Infinity.
        text = re.sub(r"(?m)(: *-?)inf\b(?=,?$)", r"\1Infinity", (folder / "graph.json").read_text(encoding="utf-8"))
        return json.loads(text)
