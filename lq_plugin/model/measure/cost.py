"""The cost of a plan: bits, bytes, multiply-accumulates and bit operations, layer by layer.

All counts follow from shapes and specs, so a plan is priced before anything is quantized.

    bytes               of the whole model as a packed file stores it: all weights, and all that stays float
    effective_bits      of a parameter of the whole model: quantized weights with their scales and zero points, float
                        parameters with the bits of their dtype; neither buffers nor ranges of activations
    quantizable_effective_bits, quantized_effective_bits
                        the same of the layers that can hold quantizers, and of those whose weight does
    macs, bops          of one input sample; of all samples of a batch there are as many times more
    cache_bytes         keys and values of one input sample, which a language model keeps while it writes

In storage a float number takes the bits of its dtype, a scale 32, a zero point the bit-width of its spec. Bit
operations (BOPs) are MACs · b_w · b_a, 32 bits of a float operand, as in Baskin et al., "UNIQ", 2018 (arXiv
1804.10969), without the accumulator term. `energy` is an estimate in microjoules, by the table of
`lq_plugin.model.measure.energy`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import nn
from torch.nn.parameter import is_lazy

from lq_plugin.errors import PlanError, QuantizationError, did_you_mean, raise_all
from lq_plugin.intent.plan import LayerPlan
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.layers import QuantizedLayer, weight_is_computed, weight_key, weight_of, weight_parts
from lq_plugin.layers.registry import canonical_of, layer_channels
from lq_plugin.model.graph.recording import Recording
from lq_plugin.model.measure.energy import FLOAT_BITS as FLOAT_BITS, mac_energy, read_energy
from lq_plugin.model.measure.other_work import other_work
from lq_plugin.model.measure.spec_bits import cache_bytes, spec_bits as spec_bits
from lq_plugin.model.operations.quantized import inner_operations, operations_of, quantized_operations
from lq_plugin.model.past_reads import weights_read_past_layers
from lq_plugin.model.survey import Survey, float_class, input_owner
from lq_plugin.quantizers import SlotQuantizer, make_activation_quantizer
from lq_plugin.utilities.csv_text import to_csv
from lq_plugin.utilities.shown import Shown, new_table, short_number

#: What the table of a packed file takes, about: the file's own head, each quantized weight, each other tensor.
_TABLE, _TABLE_WEIGHT, _TABLE_TENSOR = 450, 55, 12


@dataclass(frozen=True)
class CostRow:
    """One layer that can hold quantizers, quantized or not.

    Args:
        name, kind: of the layer; the kind is its float class.
        elements: of its weight.
        weight_bits: bits an element takes, 32 when float.
        storage_bits: bits the whole weight takes with scales and zero points; 0 when a tied one holds it.
        input_bits: bits of an element of its input, 32 when float.
        macs: for one input sample, all calls together; None without a recording.
        bytes: the weight with its scales and zero points, and all that quantizers of input and output hold.
        float_bytes: the weight as float.
        tied_to: the earlier layer that owns the same weight.
    """

    name: str
    kind: str
    elements: int
    weight_bits: int
    storage_bits: int
    input_bits: int
    macs: int | None
    bytes: int
    float_bytes: int
    tied_to: str | None = None

    @property
    def quantized(self) -> bool:
        """True if the weight is quantized."""
        return self.weight_bits != FLOAT_BITS

    @property
    def owned(self) -> int:
        """Elements that count in totals: those of a tied weight count once."""
        return 0 if self.tied_to else self.elements

    @property
    def effective_bits(self) -> float | None:
        """Bits an element takes, its share of scales and zero points included; None where a tied layer holds them."""
        return self.storage_bits / self.elements if self.storage_bits else None

    @property
    def bops(self) -> int | None:
        """Bit operations for one input sample: MACs · weight_bits · input_bits."""
        return None if self.macs is None else self.macs * self.weight_bits * self.input_bits

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the derived ones included."""
        return asdict(self) | {"effective_bits": self.effective_bits, "bops": self.bops}


@dataclass(frozen=True)
class Cost(Shown):
    """The cost of a model: one row a layer, and what is outside of them; prints as a table.

    Args:
        rows: layers that can hold quantizers, in the model's order.
        other_bytes: everything else that is saved: biases, norms, other layers, persistent buffers.
        other_parameters, other_parameter_bits: how many parameters there are outside of the rows, and what they take.
        table_bytes: about what a packed file needs to say where everything is; 0 of a float model.
        other_macs, other_bops, other_energy: outside the rows, those of functional calls above all.
        cache_bytes: of keys and values, see `cache_bytes`; None without a recording, or without torch's attention.
    """

    rows: tuple[CostRow, ...]
    other_bytes: int = 0
    other_parameters: int = 0
    other_parameter_bits: int = 0
    table_bytes: int = 0
    other_macs: int | None = None
    other_bops: int | None = None
    other_energy: float | None = None
    cache_bytes: int | None = None

    def __iter__(self) -> Iterator[CostRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> CostRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    @property
    def effective_bits(self) -> float:
        """Mean bits of a parameter of the model, scales and zero points included, and all that stays float."""
        return _mean_bits(self.rows, self.other_parameters, self.other_parameter_bits)

    @property
    def quantizable_effective_bits(self) -> float:
        """Mean bits of a weight element over the layers that can hold quantizers, float ones included."""
        return _mean_bits(self.rows)

    @property
    def quantized_effective_bits(self) -> float:
        """Mean bits of a weight element over the quantized weights; 32 when there is none."""
        owners = {row.tied_to or row.name for row in self.rows if row.quantized}
        return _mean_bits([row for row in self.rows if row.name in owners or row.tied_to in owners])

    @property
    def bytes(self) -> int:
        """Size of the model's packed file, in bytes; of a float model that of all its tensors."""
        return self.other_bytes + self.table_bytes + sum(row.bytes for row in self.rows)

    @property
    def float_bytes(self) -> int:
        """Size of the float model, in bytes."""
        return self.other_bytes + sum(row.float_bytes for row in self.rows)

    @property
    def compression(self) -> float:
        """Size of the float model over size of this one."""
        return self.float_bytes / self.bytes if self.bytes else 1.0

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates for one input sample; None without a recording."""
        return None if self.other_macs is None else self.other_macs + sum(row.macs or 0 for row in self.rows)

    @property
    def bops(self) -> int | None:
        """Bit operations for one input sample, float operations as 32 x 32 bit; None without a recording."""
        return None if self.other_bops is None else self.other_bops + sum(row.bops or 0 for row in self.rows)

    @property
    def energy(self) -> float | None:
        """Microjoules for one input sample, see `lq_plugin.model.measure.energy`; None without a recording."""
        if self.other_energy is None:
            return None
        work = sum((row.macs or 0) * mac_energy(row.weight_bits, row.input_bits) for row in self.rows)
        weights = self.other_parameter_bits + sum(row.storage_bits for row in self.rows)
        return work + self.other_energy + read_energy(weights)

    def table(self) -> Table:
        """Returns the rows as a table, the totals of the whole model below them."""
        title = f"{self.bytes:,} bytes, {self.compression:.2f} times smaller than float ({self.float_bytes:,})"
        table = new_table(title, footer=True)
        table.add_column("layer", "whole model", overflow="fold")
        table.add_column("kind")
        elements = self.other_parameters + sum(row.owned for row in self.rows)
        totals = f"{elements:,}", "", "", f"{self.effective_bits:.2f}", f"{self.bytes:,}", short_number(self.bops)
        numbers = ["elements", "bits", "input bits", "eff. bits", "bytes", *["BOPs/sample"] * (self.bops is not None)]
        for column, total in zip(numbers, totals, strict=False):
            table.add_column(column, total, justify="right")
        for row in self.rows:
            bits = f"of {row.tied_to}" if row.effective_bits is None else f"{row.effective_bits:.2f}"
            cells = [row.name or row.kind, row.kind, f"{row.elements:,}", str(row.weight_bits), str(row.input_bits)]
            table.add_row(*map(Text, [*cells, bits, f"{row.bytes:,}", short_number(row.bops)][: len(table.columns)]))
        return table

    def totals(self) -> dict[str, float | int | None]:
        """The totals by name."""
        bits = ("effective_bits", "quantizable_effective_bits", "quantized_effective_bits")
        names = (*bits, "bytes", "float_bytes", "compression", "macs", "bops")
        cache = {} if self.cache_bytes is None else {"cache_bytes": self.cache_bytes}
        return {name: getattr(self, name) for name in names} | cache

    def records(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries."""
        return [row.to_dict() for row in self.rows]

    def to_csv(self) -> str:
        """The rows as CSV text with a header."""
        return to_csv(self.records(), list(self.rows[0].to_dict()) if self.rows else ["name"])


def cost(model: nn.Module, recording: Recording | None = None) -> Cost:
    """The cost of a model as it is prepared; a float model costs the bits of its dtype.

    Args:
        model: prepared or float.
        recording: of one batch, for MACs and BOPs; they are those of one of its samples.

    Raises:
        QuantizationError: lazy modules that have no shape yet.

    >>> import lq_plugin
    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> cost(net).effective_bits
    32.0
    >>> _ = lq_plugin.prepare(net, "w4 group16")
    >>> cost(net)["0"].weight_bits, cost(net).quantizable_effective_bits, round(cost(net).effective_bits, 2)
    (4, 6.0, 6.4)
    """
    survey = Survey.of(model)
    plans = {name: layer.layer_plan for name, layer in survey.candidates.items() if isinstance(layer, QuantizedLayer)}
    plans |= {name: operation.plan for name, operation in quantized_operations(model)}
    past = weights_read_past_layers(model)
    return _price(
        model,
        survey,
        plans,
        recording,
        {name for name, layer in survey.candidates.items() if weight_key(name, layer) in past},
    )


def plan_cost(
    model: nn.Module,
    layer_plans: Mapping[str, LayerPlan],
    recording: Recording | None = None,
    survey: Survey | None = None,
) -> Cost:
    """Returns what a model would cost under these plans. The model is only looked at, prepared or float.

    Args:
        model: any module.
        layer_plans: specs by name of layer, as `QuantPlan.resolve` gives them, or of recorded operation; what is left
            out is float.
        recording: of one batch, for MACs and BOPs.
        survey: of this model, where many plans are priced; taken anew when None.

    Raises:
        PlanError: naming each plan whose layer is not there.
        QuantizationError: lazy modules that have no shape yet.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> plan_cost(net, {"0": LayerPlan(weight=QuantSpec.parse("int8"))})["0"].weight_bits
    8
    """
    survey = survey or Survey.of(model)
    recorded = {} if recording is None else operations_of(recording)
    operations = {*inner_operations(model), *recorded}
    unknown = [name for name in layer_plans if name not in survey.candidates and name not in operations]
    faults = [f"no quantizable layer {name!r}.{did_you_mean(name, survey.candidates)}" for name in unknown]
    raise_all(PlanError, "cannot price the plan", faults)
    return _price(model, survey, layer_plans, recording)


def _price(
    model: nn.Module,
    survey: Survey,
    plans: Mapping[str, LayerPlan],
    recording: Recording | None,
    past: Collection[str] = (),
) -> Cost:
    """The cost under these plans; weights of the layers `past` are also read in float, and so stored twice."""
    rows: list[CostRow] = []
    owners: dict[int, str] = {}
    stored: set[tuple[int, Any]] = set()
    parts = {id(part) for module in survey.candidates.values() for part in weight_parts(module)}
    rest = _Rest.of(model, parts, tuple(f"{name}." for name in survey.aside))
    for name, module in survey.candidates.items():
        plan = plans.get(name, LayerPlan())
        weight = weight_of(module)
        # A weight that is computed is another tensor each time.
        identity = id(module if weight_is_computed(module) else weight)
        tied_to = owners.setdefault(identity, name)
        # Tied layers share their codes where they share the spec; a learned scale belongs to one layer.
        key = (identity, (plan.weight, name) if plan.weight and plan.weight.learned else plan.weight)
        read = plans.get(input_owner(name, module), LayerPlan()).input
        bits = 0 if key in stored else _weight_bits(module, plan.weight)
        stored.add(key)
        in_float = name in past or (recording is not None and recording.reader_of(name) is not None)
        if in_float and (identity, None) not in stored:
            bits += _weight_bits(module, None)
            stored.add((identity, None))
            rest.tensors += 1
        ranges, tensors = _activation_state(module, plan)
        rest.tensors += tensors + (plan.weight is None)
        rows.append(
            CostRow(
                name=name,
                kind=float_class(module).__name__,
                elements=weight.numel(),
                weight_bits=plan.weight.bit_width if plan.weight else FLOAT_BITS,
                storage_bits=bits,
                input_bits=read.bit_width if read else FLOAT_BITS,
                macs=None if recording is None else recording.sample_macs.get(name, 0),
                bytes=_bytes(bits) + ranges,
                float_bytes=0 if tied_to != name else weight.numel() * weight.element_size(),
                tied_to=tied_to if tied_to != name else None,
            )
        )
    quantized = sum(row.quantized for row in rows)
    table = _TABLE + _TABLE_WEIGHT * quantized + _TABLE_TENSOR * rest.tensors if any(plans.values()) else 0
    work = None if recording is None else other_work(survey, plans, recording)
    return Cost(
        tuple(rows),
        rest.bytes,
        rest.parameters,
        rest.parameter_bits,
        table,
        None if work is None else sum(product.macs for product in work),
        None if work is None else sum(product.bops for product in work),
        None if work is None else sum(product.energy for product in work),
        None if recording is None else cache_bytes(recording, plans),
    )


def _weight_bits(module: nn.Module, spec: QuantSpec | None) -> int:
    weight = weight_of(module)
    if spec is None:
        return weight.numel() * weight.element_size() * 8
    return spec_bits(spec, tuple(canonical_of(module, weight.detach()).shape))


def _activation_state(module: nn.Module, plan: LayerPlan) -> tuple[int, int]:
    """Bytes and number of the tensors that the quantizers of input and output hold."""
    size = count = 0
    for slot, channels in zip(("input", "output"), layer_channels(module), strict=True):
        for _, spec in plan.stages_of(slot):
            if spec is not None:
                more = _range_state(spec, channels)
                size, count = size + more[0], count + more[1]
    return size, count


@lru_cache(maxsize=4096)
def _range_state(spec: QuantSpec, channels: int) -> tuple[int, int]:
    return _state_size(make_activation_quantizer(spec, "", channels, -1))


def _state_size(module: nn.Module) -> tuple[int, int]:
    state = list(module.state_dict().values())
    return sum(tensor.numel() * tensor.element_size() for tensor in state), len(state)


@dataclass
class _Rest:
    """Parameters and persistent buffers outside the layers' weights and quantizers, each counted once."""

    bytes: int = 0
    parameters: int = 0
    parameter_bits: int = 0
    tensors: int = 0

    @classmethod
    def of(cls, model: nn.Module, weights: set[int], aside: tuple[str, ...]) -> _Rest:
        """Counts a model's rest; what is `aside` is saved with the model, and is no part of it otherwise."""
        rest, seen = cls(), set(weights)
        for name, module in model.named_modules():
            if isinstance(module, SlotQuantizer):
                continue
            saved = {
                key: buffer for key, buffer in module._buffers.items() if key not in module._non_persistent_buffers_set
            }
            for key, tensor in (*module._parameters.items(), *saved.items()):
                if tensor is None or id(tensor) in seen:
                    continue
                if is_lazy(tensor):
                    raise QuantizationError(f"{name}.{key} has no shape yet: run one batch through the model first")
                seen.add(id(tensor))
                size = tensor.numel() * tensor.element_size()
                rest.bytes += size
                rest.tensors += 1
                if key in module._parameters and not f"{name}.".startswith(aside):
                    rest.parameters += tensor.numel()
                    rest.parameter_bits += 8 * size
        for _, operation in quantized_operations(model):
            size, tensors = _state_size(operation)
            rest.bytes, rest.tensors = rest.bytes + size, rest.tensors + tensors
        return rest


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _mean_bits(rows: list[CostRow] | tuple[CostRow, ...], others: int = 0, other_bits: int = 0) -> float:
    elements = sum(row.owned for row in rows) + others
    return (sum(row.storage_bits for row in rows) + other_bits) / elements if elements else float(FLOAT_BITS)
