"""A model in one file, each quantized weight at its own number of bits.

The file is a safetensors file with two tensors, and JSON metadata:

    blob      uint8: bit planes of all whole numbers (`lq_plugin.export.bit_planes`), and raw float numbers
    table     uint8: zlib-compressed JSON: what lies where in the blob
    metadata  format, version, checksum of both and of the plan, plan (rules), bits of each layer, effective_bits

Small tensors would cost a header of a hundred bytes each as safetensors entries. Nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn

from lq_plugin.errors import ExportError, PlanError, raise_all
from lq_plugin.export.bit_planes import pack, packed_size, unpack
from lq_plugin.export.checks import check_folder, check_unchanged
from lq_plugin.export.codes import decode, encode
from lq_plugin.files import write_file
from lq_plugin.layers import CONTAINER, QuantizedLayer, computed_faults, weight_key
from lq_plugin.model.cost import cost
from lq_plugin.model.ledger import Ledger
from lq_plugin.model.operations import operations_in, quantized_operations
from lq_plugin.model.prepare import prepare, quantized_layers, quantizers
from lq_plugin.plan import QuantPlan, Rule
from lq_plugin.quantizers import WeightQuantizer
from lq_plugin.quantizers.packed import PackedWeightQuantizer
from lq_plugin.spec import QuantSpec

FORMAT, VERSION = "lq_plugin.packed", "1"
#: Of tensors that are no quantized weights: those whose numbers are bytes in memory.
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128", "bool",
        "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    )
}  # fmt: skip


def save_packed(model: nn.Module, path: str | Path) -> int:
    """Write a prepared and calibrated model.

    Args:
        model: prepared; it is not changed. What is in evaluation the quantized weight is what is stored.
        path: of the file, usually `.safetensors`.

    Returns:
        The size of the file, in bytes.

    Raises:
        ExportError: no folder for it; or listing every tensor that is not calibrated or not on its levels. No file is written then.

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
    check_folder(path)
    check_unchanged(model)
    layers = quantized_layers(model)
    if not layers:
        raise ExportError(f"{type(model).__name__} is not quantized: prepare and calibrate it, or load its checkpoint, first")
    missing = [f"{q.name} ({q.spec}) has no range" for q in quantizers(model) if q.needs_calibration and not q.is_calibrated]
    raise_all(ExportError, "cannot pack the model", missing + computed_faults(layers))
    blob = _Blob()
    packed: dict[str, Any] = {}
    weights: set[int] = set()
    faults: list[str] = []
    for name, layer in layers:
        if layer.weight_quantizer is not None:
            weights.add(id(layer.weight))
            try:
                packed[name] = _pack_weight(name, layer, blob, packed)
            except ExportError as error:
                faults.append(str(error))
    ours = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, WeightQuantizer))
    state: dict[str, Any] = {}
    seen: dict[int, str] = {}
    quantized = _weight_keys(model)
    for key, tensor in model.state_dict(keep_vars=True).items():
        # A quantized weight that a float module has, too (tied), is kept as float for that one.
        if key.startswith(ours) or (id(tensor) in weights and key in quantized):
            continue
        if (fault := _raw_fault(tensor)) is not None:
            faults.append(f"{key} {fault}")
            continue
        first = seen.setdefault(id(tensor), key)
        state[key] = state[first] if first in state else blob.add_raw(tensor)
    raise_all(ExportError, "cannot pack the model", faults)
    table = zlib.compress(json.dumps({"weights": packed, "state": state}, separators=(",", ":")).encode(), 9)
    # A model that is a layer itself has the name "", which is no pattern.
    rules = [
        Rule(name or "*", weight=p.weight or "float", input=p.input, output=p.output) for name, layer in layers if (p := layer.layer_plan)
    ]
    rules += [Rule(name, input=operation.plan.input) for name, operation in quantized_operations(model)]
    arrays = {"blob": np.frombuffer(bytes(blob.data), np.uint8), "table": np.frombuffer(table, np.uint8)}
    plan = json.dumps(QuantPlan(rules).to_dict(), separators=(",", ":"))
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "checksum": _checksum(arrays, plan),
        "plan": plan,
        "effective_bits": f"{cost(model).effective_bits:.6f}",
    }
    write_file(path, save(arrays, metadata), ExportError)
    return Path(path).stat().st_size


def load_packed(model: nn.Module, path: str | Path) -> Ledger:
    """Read a packed file into a float model of the same class; it computes what the saved one did, bit for bit.

    Args:
        model: float, of the class that was saved, on any device. It is left in evaluation mode.
        path: written by `save_packed`.

    Returns:
        The ledger.

    Raises:
        ExportError: no such file, no packed file, a damaged one, or one of another model. Nothing in it is executed.
    """
    metadata, blob, table = _read(Path(path))
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ExportError(f"{type(model).__name__} is on the meta device, where nothing can be read to: call model.to_empty(device='cpu')")
    try:
        plan = QuantPlan.from_dict(json.loads(metadata["plan"]))
        content = json.loads(zlib.decompress(table.tobytes()))
        weights, state = content["weights"], content["state"]
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise ExportError(f"{path} is damaged: {error}") from error
    try:
        ledger = prepare(model, plan, operations_in(state) or None)
    except PlanError as error:
        raise ExportError(f"{path} is of another model: {error}") from error
    reader = _Reader(blob, str(path))
    layers = dict(quantized_layers(model))
    faults = [f"it has no layer {name!r}" for name in weights if name not in layers]
    values: dict[str, Tensor] = {key: reader.raw(entry) for key, entry in state.items()}
    keys: dict[int, list[str]] = {}
    for key, tensor in model.named_parameters(remove_duplicate=False):
        keys.setdefault(id(tensor), []).append(key)
    for name, entry in weights.items():
        if name not in layers:
            continue
        layer = layers[name]
        shape = tuple(layer.canonical(layer.weight).shape)
        source = weights[entry["tied"]] if "tied" in entry else entry
        if tuple(source["shape"]) != shape:
            faults.append(f"{name}.weight has shape {list(shape)} here and {source['shape']} in the file")
            continue
        spec = QuantSpec.parse(source["spec"])
        weight = decode(spec, shape, {part: reader.part(place) for part, place in source["parts"].items()})
        quantizer = PackedWeightQuantizer(spec, f"{name}.weight", shape)
        tied = keys[id(layer.weight)]
        known = next((values[key] for key in tied if key in values), None)
        if known is None:
            known = layer.from_canonical(weight)
        elif not torch.equal(layer.canonical(known), weight):
            quantizer.hold(weight)
        values |= dict.fromkeys(tied, known)
        layer.weight_quantizer = quantizer.to(layer.weight.device)
    raise_all(ExportError, f"{path} is of another model", faults)
    expected = {key for key in model.state_dict() if ".weight_quantizer." not in f".{key}"}
    raise_all(ExportError, f"{path} is of another model", _key_faults(model, values, expected, set(values) - set(state)))
    model.load_state_dict(values, strict=False)
    model.eval()
    return ledger


def _raw_fault(value: Any) -> str | None:
    """Why an entry of a state dict cannot be stored as its bytes; None: it can."""
    if not isinstance(value, Tensor):
        return (
            f"is a {type(value).__name__} (get_extra_state), a packed file holds tensors: make it a buffer, or what the class is built with"
        )
    if value.layout != torch.strided or str(value.dtype).removeprefix("torch.") not in _DTYPES:
        return f"is a tensor of {value.dtype} ({value.layout}), a packed file holds dense ones of {', '.join(_DTYPES)}"
    return None


def _weight_keys(model: nn.Module) -> set[str]:
    """Keys in the state dict of what is read through a weight quantizer."""
    keys = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLayer) and module.weight_quantizer is not None:
            keys.add(weight_key(name.replace(f"{CONTAINER}.", ""), module))
    return keys


def _key_faults(model: nn.Module, values: Mapping[str, Tensor], expected: set[str], unpacked: set[str]) -> list[str]:
    here = model.state_dict()
    faults = [f"the file lacks {key!r}" for key in sorted(expected - set(values))]
    faults += [f"{key!r} is only in the file" for key in sorted(set(values) - set(here))]
    both = [key for key in values if key in here]
    faults += [
        f"{key} has shape {list(here[key].shape)} here and {list(values[key].shape)} in the file"
        for key in both if here[key].shape != values[key].shape
    ]  # fmt: skip
    # Weights are unpacked to float32 whatever the model's precision.
    kinds = {(here[key].dtype, values[key].dtype): key for key in both if key not in unpacked and here[key].dtype != values[key].dtype}
    return faults + [
        f"{key} is {theirs} in the file and {ours} here, which would round anew: load it into a model of {theirs}, and convert that"
        for (ours, theirs), key in kinds.items()
    ]


def _pack_weight(name: str, layer: QuantizedLayer, blob: _Blob, packed: Mapping[str, Any]) -> dict[str, Any]:
    quantizer = cast(Any, layer.weight_quantizer).current
    if quantizer is None:
        raise ExportError(f"{name}.weight is float at this stage of its plan")
    weight = layer.canonical(layer.weight)
    parts = encode(quantizer, weight)
    training = quantizer.training
    quantizer.eval()
    with torch.no_grad():
        wanted = quantizer.quantize_values(weight)
    quantizer.train(training)
    shape = tuple(weight.shape)
    decoded = decode(quantizer.spec, shape, {key: part.values for key, part in parts.items()})
    if not torch.equal(decoded.to(wanted.dtype), wanted):
        raise ExportError(f"{name}.weight ({quantizer.spec}): its codes do not give its values back")
    places = {key: blob.add(part.values, part.bits) for key, part in parts.items()}
    entry = {"spec": str(quantizer.spec), "shape": list(shape), "parts": places}
    for other, existing in packed.items():
        if blob.same(entry, existing):
            blob.undo(entry)
            return {"tied": other}
    return entry


class _Blob:
    """Bytes to be written. An entry is [offset, shape, bits], or [offset, shape, dtype]."""

    def __init__(self) -> None:
        self.data = bytearray()

    def add(self, values: Tensor, bits: int | None) -> list[Any]:
        if bits is None:
            return self.add_raw(values.float())
        return self._append(pack(values.cpu().numpy(), bits).tobytes(), [list(values.shape), bits])

    def add_raw(self, values: Tensor) -> list[Any]:
        plain = values.detach().cpu().contiguous()
        content = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        return self._append(content, [list(plain.shape), str(plain.dtype).removeprefix("torch.")])

    def _append(self, content: bytes, what: list[Any]) -> list[Any]:
        place = [len(self.data), *what]
        self.data += content
        return place

    def same(self, entry: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether two weights are the same in every bit: tied ones with one spec."""
        if "tied" in other or (entry["spec"], entry["shape"]) != (other["spec"], other["shape"]):
            return False
        return all(self._bytes(entry["parts"][key]) == self._bytes(other["parts"][key]) for key in entry["parts"])

    def undo(self, entry: Mapping[str, Any]) -> None:
        """Take the last entry back."""
        del self.data[min(place[0] for place in entry["parts"].values()) :]

    def _bytes(self, place: list[Any]) -> bytes:
        return bytes(self.data[place[0] : place[0] + _size(place)])


def _size(place: list[Any]) -> int:
    _, shape, kind = place
    count = int(np.prod(shape, dtype=np.int64))
    return packed_size(count, kind) if isinstance(kind, int) else count * _DTYPES[kind].itemsize


class _Reader:
    """Tensors out of a blob."""

    def __init__(self, blob: NDArray[np.uint8], path: str) -> None:
        self.blob, self.path = blob, path

    def part(self, place: list[Any]) -> Tensor:
        _, shape, kind = place
        if not isinstance(kind, int):
            return self.raw(place)
        codes = unpack(self._slice(place), kind, int(np.prod(shape, dtype=np.int64)))
        return torch.from_numpy(codes).reshape(shape)

    def raw(self, place: list[Any]) -> Tensor:
        _, shape, kind = place
        content = torch.from_numpy(self._slice(place).copy())
        return content.view(_DTYPES[kind]).reshape(shape) if content.numel() else torch.empty(shape, dtype=_DTYPES[kind])

    def _slice(self, place: list[Any]) -> NDArray[np.uint8]:
        start, size = place[0], _size(place)
        if not 0 <= start <= start + size <= self.blob.size:
            raise ExportError(f"{self.path} is damaged: {size} bytes at {start} of a blob of {self.blob.size}")
        return self.blob[start : start + size]


def _read(path: Path) -> tuple[dict[str, str], NDArray[np.uint8], NDArray[np.uint8]]:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ExportError(f"{path} is a safetensors file, but no packed model of lq_plugin; load_checkpoint reads state dicts")
            if metadata.get("version") != VERSION:
                raise ExportError(f"{path} has version {metadata.get('version')!r} of the packed format, this lq_plugin reads {VERSION!r}")
            arrays = {name: file.get_tensor(name) for name in ("blob", "table")}
    except OSError as error:
        raise ExportError(f"cannot open {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        advice = "; it looks like a checkpoint, which load_checkpoint reads" if zipfile.is_zipfile(path) else ""
        raise ExportError(f"{path} is no packed file, or a damaged one: {error}{advice}") from error
    if _checksum(arrays, metadata.get("plan", "")) != metadata.get("checksum"):
        raise ExportError(f"{path} is damaged: its checksum does not fit its content")
    return metadata, arrays["blob"], arrays["table"]


def _checksum(arrays: Mapping[str, NDArray[np.uint8]], plan: str) -> str:
    digest = hashlib.blake2b(plan.encode(), digest_size=16)
    for name in ("blob", "table"):
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
