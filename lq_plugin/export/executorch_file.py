"""ExecuTorch programs: a `.pte` file whose integer operations are delegated to XNNPACK.

XNNPACK has integer kernels of signed bytes only; unsigned activations of a plan are written 128 lower, which is the
same real grid. Operations that it computes in float (hard-swish, pools with windows, softmax) stand between a
dequantize and a quantize node, also in the delegate.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lq_plugin.errors import ExportError
from lq_plugin.export.integer_program.build import integer_program
from lq_plugin.export.integer_program.form import IntegerForm
from lq_plugin.export.integer_program.pieces import example, in_pieces
from lq_plugin.export.quiet import quiet
from lq_plugin.export.target import Reader
from lq_plugin.model.copies import copy_model
from lq_plugin.utilities.files import replacing

#: Operations of which `executorch.backends.xnnpack` 1.5.1 has integer kernels (its `partition.config`).
XNNPACK = IntegerForm(
    "XNNPACK",
    frozenset({
        "aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor", "aten.mean.dim", "aten.cat.default",
    }),
    fused=frozenset({"aten.relu.default", "aten.hardtanh.default"}),
)  # fmt: skip

#: Programs of this process that may still run.
_OPEN: WeakSet[Any] = WeakSet()


def export_executorch(
    model: nn.Module, inputs: Sequence[Any], path: str | Path, batches: Sequence[Any] | None = None, batch: int = 1
) -> int:
    """Writes a prepared and calibrated model as an ExecuTorch program for XNNPACK.

    Args:
        model: with specs that the target `executorch` takes; it is not changed.
        inputs: positional arguments of its forward, as an example.
        path: of the file.
        batches: calibration batches, see `integer_program`.
        batch: samples that the program takes at a time; 0: tensors of the example's shapes.

    Returns:
        The size of the file, in bytes.

    Raises:
        ExportError: see `integer_program`; or XNNPACK does not take a layer as integers. No file is written then.
    """
    program = integer_program(model, example(inputs, batch), batches, XNNPACK)
    with quiet("torch", "executorch"):
        content = lowered(program).to_executorch().buffer
    with replacing(path, ExportError) as stream:
        stream.write(content)
    return len(content)


def float_executorch(model: nn.Module, inputs: Sequence[Any], path: str | Path) -> int:
    """Writes a float model as an ExecuTorch program for XNNPACK, as its users would: to compare a quantized one with.

    Args:
        model: float; it is not changed.
        inputs: positional arguments of its forward; the program takes tensors of these shapes.
        path: of the file.

    Returns:
        The size of the file, in bytes.
    """
    with quiet("torch", "executorch"), torch.no_grad():
        content = lowered(torch.export.export(copy_model(model).eval(), tuple(inputs))).to_executorch().buffer
    with replacing(path, ExportError) as stream:
        stream.write(content)
    return len(content)


def lowered(program: Any) -> Any:
    """Returns an integer program as ExecuTorch's edge program, its operations delegated to XNNPACK.

    Raises:
        ExportError: naming the operations that XNNPACK leaves to float kernels, though their weights are integers.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    left = [
        f"{node.name} {tuple(node.meta['val'].shape)}"
        for node in edge.exported_program().graph.nodes
        if node.op == "call_function" and "dequantize_per_channel" in str(node.target)
    ]
    if left:
        raise ExportError(
            f"XNNPACK does not compute {len(left)} weights as integers: {', '.join(left)}; leave them float"
        )
    return edge


def use_threads(count: int) -> None:
    """Lets all programs of this process run on so many threads, those that are opened from now on.

    Args:
        count: of threads, at least 1.

    Raises:
        ExportError: programs are open that were made for another number; they would crash.
    """
    from executorch.extension.pybindings import portable_lib

    # It warns that both functions may change; there is no other way.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if (now := portable_lib._threadpool_get_thread_count()) == count:
            return
        if _OPEN:
            raise ExportError(
                f"ExecuTorch has one number of threads for a process: {len(_OPEN)} open programs run on {now}, and "
                f"{count} were asked for. Choose the number before a program is opened"
            )
        portable_lib._unsafe_reset_threadpool(count)


def open_executorch(path: Path, threads: int | None = None) -> Reader:
    """Returns a reader of a program that runs it in ExecuTorch's runtime.

    Args:
        path: of the file.
        threads: see `use_threads`; None: as many as before, at first ExecuTorch's choice.

    Raises:
        ExportError: it is no program, or `use_threads` refuses.
    """
    from executorch.runtime import Runtime, Verification

    if threads is not None:
        use_threads(threads)
    try:
        program = Runtime.get().load_program(path, verification=Verification.InternalConsistency)
    except RuntimeError as error:
        raise ExportError(f"{path} is no ExecuTorch program: {error}") from error
    method = program.load_method("forward")
    assert method is not None
    _OPEN.add(method)
    count = method.metadata.num_inputs()
    sizes = method.metadata.input_tensor_meta(0).sizes() if count else ()

    def run(*args: Any) -> list[Tensor]:
        given = [x.detach().cpu().contiguous() for x in tree_leaves(args) if isinstance(x, Tensor)]
        # The next call writes to the memory of these results.
        return [torch.as_tensor(y).clone() for y in method.execute(given)]

    return Reader(in_pieces(run, sizes[0] if sizes else None), count)
