"""Packed files: a model in one file, each quantized weight at its own number of bits (`lq_plugin.export.packed_file`).

A weight is written and read a chunk of rows at a time, so that neither takes much more memory than the model itself.
Nothing in a file is executed, and everything in it is checked against the model before the model is touched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from lq_plugin.errors import ExportError, PlanError, raise_all
from lq_plugin.export.codes import chunks, decode, encode_rows, layout, part_rows, statistics
from lq_plugin.export.faults import shared_faults
from lq_plugin.export.packed_file import DTYPES, PackedReader, PackedWriter
from lq_plugin.export.packed_model import PackedModel
from lq_plugin.export.request import Request
from lq_plugin.intent.plan import QuantPlan, Rule
from lq_plugin.layers import CONTAINER, QuantizedLayer, weight_key
from lq_plugin.model.calibrate import evaluating
from lq_plugin.model.graph.record import without_compile
from lq_plugin.model.ledger import Ledger
from lq_plugin.model.measure.cost import cost
from lq_plugin.model.operations.quantized import operations_in, quantized_operations
from lq_plugin.model.past_reads import weights_read_past_layers
from lq_plugin.model.prepare import prepare, quantized_layers, remove
from lq_plugin.model.raw_reads import noting_raw_reads
from lq_plugin.model.unreached import unreached
from lq_plugin.quantizers import WeightQuantizer
from lq_plugin.quantizers.staged import stages_in_force
from lq_plugin.utilities.files import replacing

log = logging.getLogger(__name__)


def save_packed(model: nn.Module, path: str | Path, inputs: Sequence[Any] | None = None) -> int:
    """Writes a prepared and calibrated model to a packed file.

    Args:
        model: prepared and calibrated; it is not changed. The file holds the quantized weights of evaluation, and where
            specs change in training those in force. Where the model's own code reads a weight past its layer
            (`F.linear(x, self.embedding.weight)`), the file holds its float values as well, which a warning says.
        path: of the file, usually `.safetensors`.
        inputs: positional arguments of its forward, as an example. The model runs on them, so that a weight is also
            found to be read past its layer by a name made at run time, out of a list, or by compiled code; `calibrate`
            has looked at its first batch in the same way.

    Returns:
        The size of the file, in bytes.

    Raises:
        ExportError: listing every reason, such as tensors that are not calibrated or not on their levels. No file is
            written then.

    >>> import tempfile, lq_plugin
    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> _ = lq_plugin.prepare(net, "w4a8")
    >>> _ = lq_plugin.calibrate(net, [torch.randn(16, 64)])
    >>> path = tempfile.mkdtemp() + "/net.safetensors"
    >>> size = save_packed(net, path)
    >>> other = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> x = torch.randn(2, 64)
    >>> _ = load_packed(other, path)
    >>> torch.equal(other(x), net.eval()(x))
    True
    """
    raise_all(
        ExportError, "cannot pack the model", shared_faults(Request(path=Path(path), model=model, settled="ranges"))
    )
    if inputs is not None:
        with torch.no_grad(), evaluating(model), without_compile(), noting_raw_reads(model):
            model(*inputs)
    with stages_in_force(model):
        return _save(model, path)


def _save(model: nn.Module, path: str | Path) -> int:
    layers = quantized_layers(model)
    silent = unreached(model)
    plans = {name: layer.layer_plan for name, layer in layers if name not in silent}
    # A model that is a layer itself has the name "", which is no pattern.
    rules = [
        Rule(name or "*", weight=p.weight or "float", input=p.input, output=p.output) for name, p in plans.items() if p
    ]
    rules += [
        Rule(name, input=operation.quantizers()[0].spec)
        for name, operation in quantized_operations(model)
        if name not in silent and operation.quantizers()
    ]
    plan, bits = json.dumps(QuantPlan(rules).to_dict(), separators=(",", ":")), cost(model).effective_bits

    state = model.state_dict()
    # Dense size: sparse tensors, refused below, have no `nbytes`.
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    limit = 2**16 * (len(state) + 1) + 2 * sum(value.numel() * value.element_size() for value in tensors)

    def write(stream: BinaryIO) -> int:
        writer = PackedWriter(stream, plan, bits, limit)
        return writer.finish(_add_content(model, writer))

    with replacing(path, ExportError) as stream:
        if stream.seekable():
            return write(stream)
        with tempfile.TemporaryFile() as whole:  # a pipe
            size = write(cast(BinaryIO, whole))
            whole.seek(0)
            shutil.copyfileobj(whole, stream)
            return size


def _add_content(model: nn.Module, writer: PackedWriter) -> dict[str, Any]:
    """Writes every tensor; returns the table of contents."""
    weights: dict[str, Any] = {}
    digests: dict[bytes, str] = {}
    quantized: set[int] = set()
    faults: list[str] = []
    silent = unreached(model)
    for name, layer in quantized_layers(model):
        if layer.weight_quantizer is not None and name not in silent:
            quantized.add(id(layer.weight))
            try:
                weights[name] = _add_weight(name, layer, writer, digests)
            except ExportError as error:
                faults.append(str(error))
    without = {id(quantizer) for group in silent.values() for quantizer in group}
    # The file holds weights as they are used; layers that no batch has reached are float.
    modules = model.named_modules(remove_duplicate=False)
    ours = tuple(f"{name}." for name, m in modules if isinstance(m, WeightQuantizer) or id(m) in without)
    state: dict[str, Any] = {}
    seen: dict[int, str] = {}
    keys = _weight_keys(model) - _read_as_float(model)
    for key, tensor in model.state_dict(keep_vars=True).items():
        # A quantized weight that a float module also has (tied), or that the model reads itself, is stored as float as
        # well.
        if key.startswith(ours) or (id(tensor) in quantized and key in keys):
            continue
        if (fault := _raw_fault(tensor)) is not None:
            faults.append(f"{key} {fault}")
            continue
        first = seen.setdefault(id(tensor), key)
        state[key] = state[first] if first in state else writer.add(tensor)
    raise_all(ExportError, "cannot pack the model", faults)
    return {"weights": weights, "state": state}


def _add_weight(name: str, layer: QuantizedLayer, writer: PackedWriter, digests: dict[bytes, str]) -> dict[str, Any]:
    """Writes a weight in chunks of rows, each compared with the quantizer's values; returns its table entry."""
    quantizer = cast(Any, layer.weight_quantizer).current
    weight, spec = type(layer).canonical(layer, layer.weight), quantizer.spec
    shape, before = tuple(weight.shape), writer.size
    found = statistics(quantizer, weight)
    training = quantizer.training
    quantizer.eval()
    with torch.no_grad():
        wanted = quantizer.quantize_values(weight)
    quantizer.train(training)
    places = {
        key: writer.reserve(size, "float32" if bits is None else bits)
        for key, (size, bits) in layout(spec, shape).items()
    }
    digest = hashlib.blake2b(f"{spec} {shape}".encode())
    for rows in chunks(spec, shape):
        parts = encode_rows(quantizer, weight, found, rows)
        decoded = decode(spec, tuple(parts["codes"].values.shape), {key: part.values for key, part in parts.items()})
        if not torch.equal(decoded.to(wanted.dtype), wanted[rows]):
            raise ExportError(f"{name}.weight ({spec}): its codes do not give its values back")
        for key, part in parts.items():
            first = part_rows(spec.granularity, places[key][1][0], shape[0], rows).start
            if first or rows.start == 0:  # else one for the whole weight, which is there
                digest.update(writer.write_rows(places[key], part.values, first))
    same = digests.setdefault(digest.digest(), name)
    if same != name:
        writer.drop(before)
        return {"tied": same}
    return {"spec": str(spec), "shape": list(shape), "parts": places}


def load_packed(model: nn.Module, path: str | Path) -> Ledger:
    """Reads a packed file into a float model of the same class; its outputs are bit-equal to the saved model's.

    Args:
        model: float, of the class that was saved, on any device. It is left in evaluation mode.
        path: written by `save_packed`.

    Returns:
        The ledger.

    Raises:
        ExportError: no such file, no packed file, a damaged one, or one of another model. The model is unchanged then.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ExportError(
            f"{type(model).__name__} is on the meta device, where nothing can be read to: call "
            "model.to_empty(device='cpu')"
        )
    with PackedReader(Path(path)) as file:
        try:
            plan = QuantPlan.from_dict(json.loads(file.metadata["plan"]))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise file.damaged(str(error)) from error
        packed = PackedModel(file, model)
        prepared = bool(quantized_layers(model))
        try:
            shapes = {key: () if file.fault(place) else place[1] for key, place in packed.state.items()}
            ledger = prepare(model, plan, operations_in(shapes))
            packed.check()
        except BaseException as error:
            if not prepared:
                remove(model)
            if isinstance(error, PlanError):
                raise ExportError(f"{path} is of another model: {error}") from error
            raise
        packed.fill()
    model.eval()
    return ledger


def _raw_fault(value: Any) -> str | None:
    """Returns why an entry of a state dict cannot be stored as its bytes, or None."""
    if not isinstance(value, Tensor):
        return (
            f"is a {type(value).__name__} (get_extra_state), a packed file holds tensors: "
            "make it a buffer, or what the class is built with"
        )
    if value.layout != torch.strided or str(value.dtype).removeprefix("torch.") not in DTYPES:
        return f"is a tensor of {value.dtype} ({value.layout}), a packed file holds dense ones of {', '.join(DTYPES)}"
    return None


def _read_as_float(model: nn.Module) -> set[str]:
    """Returns keys of weights that the model's own code reads as float and that are not on their levels."""
    silent, found = unreached(model), set()
    layers = {weight_key(name, layer): layer for name, layer in quantized_layers(model) if name not in silent}
    with torch.no_grad(), evaluating(model):
        for key, where in weights_read_past_layers(model).items():
            if key in layers and not torch.equal(layers[key].quantized_weight(), layers[key].weight):
                log.warning(
                    "%s is read by %s past its layer, where it is float: the file holds it twice, quantized and float",
                    key,
                    where,
                )
                found.add(key)
    return found


def _weight_keys(model: nn.Module) -> set[str]:
    """Returns the state dict's keys of weights that are read through a quantizer."""
    keys = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLayer) and module.weight_quantizer is not None:
            keys.add(weight_key(name.replace(f"{CONTAINER}.", ""), module))
    return keys
