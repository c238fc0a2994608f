"""Entries of a packed file, compared with the model that is to be filled from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin.errors import ExportError, SpecError, raise_all
from lq_plugin.export.codes import any_code_is_finite, chunks, decode, layout, part_rows
from lq_plugin.export.packed_file import DTYPES, PackedReader
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.layers import QuantizedLayer
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.quantizers import Quantizer
from lq_plugin.quantizers.packed import PackedWeightQuantizer

#: Bytes of the table of contents for each name in the model; a name itself may have some hundred.
_PER_NAME, _AT_LEAST = 2048, 2**16


class PackedModel:
    """Entries of a packed file for one model: `check` before anything changes, then `fill`.

    Args:
        file: open.
        model: not prepared yet, or with the file's plan.

    Raises:
        ExportError: the table cannot be read.
    """

    def __init__(self, file: PackedReader, model: nn.Module) -> None:
        self.file, self.model = file, model
        names = len(model.state_dict()) + sum(1 for _ in model.modules())
        content = file.content(_AT_LEAST + _PER_NAME * names)
        tables = [content.get(key) if isinstance(content, dict) else None for key in ("weights", "state")]
        if not all(isinstance(table, dict) and all(isinstance(value, kind) for value in table.values()) for table,
        kind in zip(
            tables, (dict, list), strict=True
        )):  # fmt: skip
            raise file.damaged("its table of contents has no weights or no state")
        self.weights: dict[str, dict[str, Any]] = tables[0]  # type: ignore[assignment]
        self.state: dict[str, list[Any]] = tables[1]  # type: ignore[assignment]
        self.layers: dict[str, QuantizedLayer] = {}
        self.specs: dict[str, QuantSpec] = {}

    def check(self) -> None:
        """Refuses whatever does not fit the prepared model; reads a chunk at a time.

        Raises:
            ExportError: listing every fault.
        """
        self.layers = dict(quantized_layers(self.model))
        faults = [f"{key}: {fault}" for key, place in self.state.items() if (fault := self.file.fault(place))]
        faults += [
            fault
            for name, entry in self.weights.items()
            if name in self.layers
            for fault in self._weight_faults(name, entry)
        ]
        raise_all(ExportError, f"{self.file.path} is of another model, or damaged", faults)
        faults = [f"it has no layer {name!r}" for name in self.weights if name not in self.layers]
        raise_all(ExportError, f"{self.file.path} is of another model", faults + list(self._key_faults()))
        faults = [fault for name in self.specs for fault in self._value_faults(name)]
        raise_all(ExportError, f"{self.file.path} is damaged", faults + list(self._quantizer_faults()))

    def _source(self, name: str) -> str:
        """Returns the layer that holds a layer's parts: itself, or one with the same weight."""
        return str(self.weights[name].get("tied", name))

    def _weight_faults(self, name: str, entry: dict[str, Any]) -> Iterator[str]:
        source = self.weights.get(self._source(name), {})
        if not isinstance(source.get("parts"), dict) or not isinstance(source.get("shape"), list):
            yield f"{name}.weight has no parts"
            return
        layer = self.layers[name]
        if layer.weight_quantizer is None:
            yield f"{name}.weight is quantized in the file, its plan leaves it float"
            return
        shape = tuple(type(layer).canonical(layer, layer.weight).shape)
        if source["shape"] != list(shape):
            yield f"{name}.weight has shape {list(shape)} here and {str(source['shape'])[:100]} in the file"
            return
        try:
            spec = QuantSpec.parse(source["spec"])
            wanted = layout(spec, shape)
        except (SpecError, ExportError, TypeError, AttributeError, KeyError) as error:
            yield f"{name}.weight: {error}"
            return
        if set(source["parts"]) != set(wanted):
            yield f"{name}.weight ({spec}) has the parts {', '.join(wanted)}, got {', '.join(source['parts'])[:200]}"
            return
        for key, (size, bits) in wanted.items():
            place, kind = source["parts"][key], "float32" if bits is None else bits
            if (fault := self.file.fault(place)) is not None:
                yield f"{name}.weight, {key}: {fault}"
            elif place[1] != list(size) or place[2] != kind:
                found = f"got {place[1]} of {place[2]}"
                yield f"{name}.weight ({spec}), {key}: {list(size)} of {kind} (bits) are wanted, {found}"
        self.specs[name] = spec

    def _key_faults(self) -> Iterator[str]:
        """Yields differences between names, shapes and dtypes of the file and of the model."""
        here = self.model.state_dict()
        weights = {id(self.layers[name].weight) for name in self.specs}
        named = self.model.named_parameters(remove_duplicate=False)
        unpacked = {key for key, parameter in named if id(parameter) in weights}
        found = {*self.state, *unpacked}
        expected = {key for key in here if ".weight_quantizer." not in f".{key}"}
        yield from (f"the file lacks {key!r}" for key in sorted(expected - found))
        yield from (f"{key!r} is only in the file" for key in sorted(found - set(here)))
        kinds: dict[tuple[torch.dtype, torch.dtype], str] = {}
        for key, (_, shape, kind) in self.state.items():
            if key not in here:
                continue
            if not isinstance(here[key], Tensor) or not isinstance(kind, str):
                yield f"{key} is no tensor of its own in the file, or here"
            elif list(here[key].shape) != shape:
                yield f"{key} has shape {list(here[key].shape)} here and {shape} in the file"
            elif here[key].dtype != DTYPES[kind]:
                kinds[here[key].dtype, DTYPES[kind]] = key
        for (ours, theirs), key in kinds.items():
            advice = f"which would round anew: load it into a model of {theirs}, and convert that"
            yield f"{key} is {theirs} in the file and {ours} here, {advice}"

    def _value_faults(self, name: str) -> Iterator[str]:
        """Yields scales that are invalid and codes that stand for no number."""
        spec, places = self.specs[name], self.weights[self._source(name)]["parts"]
        if "tied" in self.weights[name]:
            return
        for key, place in places.items():
            if isinstance(place[2], str):
                values = self.file.read(place)
                if not values.isfinite().all():
                    yield f"{name}.weight, {key}: NaN or Inf"
                elif "range" in spec.kind.choices and not (values > 0).all():
                    yield f"{name}.weight, {key}: scales of 0 or less"
        if not any_code_is_finite(spec):
            try:
                shape = tuple(places["codes"][1])
                finite = all(self._decoded(name, rows).isfinite().all() for rows in chunks(spec, shape))
            except IndexError:
                finite = False
            if not finite:
                yield f"{name}.weight: codes that {spec} has no number for"

    def _quantizer_faults(self) -> Iterator[str]:
        """Yields invalid ranges of activations."""
        owners = {name: module for name, module in self.model.named_modules() if isinstance(module, Quantizer)}
        for key, place in self.state.items():
            owner, _, attribute = key.rpartition(".")
            if owner not in owners or not DTYPES[place[2]].is_floating_point:
                continue
            values = self.file.read(place)
            if not values.isfinite().all():
                yield f"{key}: NaN or Inf"
            elif attribute == "scale" and not owners[owner].spec.learned and not (values > 0).all():
                yield f"{key}: scales of 0 or less"

    def _decoded(self, name: str, rows: slice) -> Tensor:
        places = self.weights[self._source(name)]["parts"]
        length = places["codes"][1][0]
        granularity = self.specs[name].granularity
        parts = {
            key: self.file.read_rows(place, part_rows(granularity, place[1][0], length, rows))
            for key, place in places.items()
        }
        return decode(self.specs[name], tuple(parts["codes"].shape), parts)

    @torch.no_grad()
    def fill(self) -> None:
        """Writes everything into the model: parameters in place, the rest as `load_state_dict` does."""
        tensors = dict(self.model.named_parameters(remove_duplicate=False)) | dict(
            self.model.named_buffers(remove_duplicate=False)
        )
        # A module that has several names has its state under each.
        modules = self.model.named_modules(remove_duplicate=False)
        ours = tuple(f"{name}." for name, module in modules if isinstance(module, Quantizer))
        small: dict[str, Tensor] = {}
        filled: set[int] = set()
        for key, place in self.state.items():
            if key in tensors and not key.startswith(ours):
                tensors[key].copy_(self.file.read(place))
                filled.add(id(tensors[key]))
            else:
                small[key] = self.file.read(place)
        for name, spec in self.specs.items():
            layer = self.layers[name]
            weight = type(layer).canonical(layer, layer.weight)
            quantizer = PackedWeightQuantizer(spec, f"{name}.weight", tuple(weight.shape))
            if id(layer.weight) not in filled:
                for rows in chunks(spec, tuple(weight.shape)):
                    weight[rows] = self._decoded(name, rows).to(weight.device)
                if weight.data_ptr() != layer.weight.data_ptr():  # a stack of transposed matrices has no such view
                    layer.weight.copy_(type(layer).from_canonical(layer, weight))
                filled.add(id(layer.weight))
            elif not all(
                torch.equal(weight[rows].cpu(), self._decoded(name, rows)) for rows in chunks(spec, tuple(weight.shape))
            ):
                # The values of the parameter are another one's, which it is tied to.
                quantizer.hold(torch.cat([self._decoded(name, rows) for rows in chunks(spec, tuple(weight.shape))]))
            layer.weight_quantizer = quantizer.to(layer.weight.device)
        self.model.load_state_dict(small, strict=False)
