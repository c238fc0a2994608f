"""One forward pass as plain data: calls, their order, shapes and MACs, and who feeds whom."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from lq_plugin.errors import QuantizationError, did_you_mean
from lq_plugin.model.graph.macs import Shape
from lq_plugin.model.graph.numbering import ATTENTION, CACHED, part_of, product_factors
from lq_plugin.model.graph.op_names import UNARY, UNARY_MODULES

#: Names without underscores, so that a module type and a function compare equal.
_ACTIVATIONS = frozenset(
    ("relu", "relu6", "gelu", "silu", "swish", "mish", "sigmoid", "logsigmoid", "hardsigmoid", "tanh", "hardtanh",
    "tanhshrink",
     "hardswish", "leakyrelu", "prelu", "rrelu", "elu", "celu", "selu", "glu", "softplus", "softsign", "softshrink",
     "hardshrink",
     "threshold", "softmax", "logsoftmax", "softmin")
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Origin of one input of a call.

    Args:
        shape: of the input.
        producer: position of the call that made it; None for a model input, parameter or constant.
        output: which output of the producer.
        direct: it is that very output, with no view or copy between.
        parameters: qualified names, when it is a parameter or buffer (several when tied).
    """

    shape: Shape
    producer: int | None
    output: int
    direct: bool
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Call:
    """One call, in the order in which calls returned.

    Args:
        position: index in `Recording.calls`.
        kind: `"module"` (opaque module), `"functional"` (arithmetic worth quantizing), `"other"`
            (any other tensor operation), `"weight"` (product of a weight that a module's own code reads), `"output"`
            (what the model returned).
        name: qualified module name, that of the weight, or `<enclosing module>.<op>_<index>`; the index counts within
            one call of the enclosing module, so it names the place in the code.
        op: type name of the module, or the name of the function.
        repeat: 0 for the first call of that name, 1 for the second, ...
        inputs: one `Source` a tensor argument, in order, keywords last.
        output_shapes: one a tensor in the result, however nested.
        macs: multiply-accumulates of this call.
        weight_macs: the share of each weight, by its key, where the module holds several (LSTM, attention).
        passthrough: hands its input on unchanged (`nn.Identity`, `nn.Flatten`): no consumer of it.
        operands: indices of the inputs of a functional call, or of a function of one activation, that can be quantized.
        pads_zeros: it is `pad` with zeros, not with another number or by reflection.
    """

    position: int
    kind: Literal["module", "functional", "other", "weight", "output"]
    name: str
    op: str
    repeat: int
    inputs: tuple[Source, ...]
    output_shapes: tuple[Shape, ...]
    macs: int = 0
    passthrough: bool = False
    weight_macs: tuple[tuple[str, int], ...] = ()
    operands: tuple[int, ...] = ()
    pads_zeros: bool = False

    @property
    def fully_quantizable(self) -> bool:
        """True if quantizers of its operands leave no factor of its product float.

        A parameter among them has none; an operation on three tensors or more (attention) also multiplies its own
        results. A product inside of a module has the call of the module, and no others among its operands.
        """
        if self.kind == "module":
            return True
        factors = product_factors(self.op, len(self.inputs))
        return len(factors) == 2 and set(factors) <= set(self.operands)

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Names that the plan gives the weights of a module with several."""
        return tuple(f"{self.name}.{key}" if self.name else key for key, _ in self.weight_macs)

    @property
    def input_shapes(self) -> tuple[Shape, ...]:
        return tuple(source.shape for source in self.inputs)

    @property
    def is_activation(self) -> bool:
        """True for a pointwise nonlinearity or a softmax, by its name."""
        return self.op.lower().replace("_", "") in _ACTIVATIONS


@dataclass(frozen=True)
class Recording:
    """One forward pass as plain data: picklable, without tensors.

    Args:
        calls: every call, in order.
        uncalled: opaque modules with parameters that never ran.
        samples: of the input that the pass was made with.
    """

    calls: tuple[Call, ...]
    uncalled: tuple[str, ...] = ()
    samples: int = 1

    @property
    def module_calls(self) -> tuple[Call, ...]:
        """Calls of opaque modules, in order."""
        return tuple(call for call in self.calls if call.kind == "module")

    @property
    def functional_calls(self) -> tuple[Call, ...]:
        """Products and meetings of activations outside opaque modules, in order."""
        return tuple(call for call in self.calls if call.kind == "functional")

    @property
    def unary_calls(self) -> dict[str, tuple[str, Call]]:
        """Activation functions and means: what they compute, and the call, by the name that rules have for them.

        That of `act = nn.Hardswish()` is `act.hardswish_0`, which its forward calls.
        """
        found = {}
        for call in self.calls:
            if call.kind == "module" and (op := UNARY_MODULES.get(call.op)) is not None:
                found[".".join(filter(None, (call.name, f"{op}_0")))] = op, call
            elif call.op in UNARY and call.operands:
                found[call.name] = call.op, call
        return found

    @property
    def attention_calls(self) -> dict[str, tuple[str, Call]]:
        """Calls of torch's attention kernel, by the names that rules have for `probabilities`, `keys` and `values`."""
        calls = [call for call in self.functional_calls if call.op == ATTENTION and len(call.operands) == 3]
        return {part_of(call.name, part): (part, call) for call in calls for part in ("probabilities", *CACHED)}

    @property
    def total_macs(self) -> int:
        """MACs of the whole pass, all samples together."""
        return sum(call.macs for call in self.calls)

    @cached_property
    def sample_macs(self) -> dict[str, int]:
        """`macs` for one input sample: the mean over the samples of the pass, rounded to an integer."""
        return {name: (2 * macs + self.samples) // (2 * self.samples) for name, macs in self.macs.items()}

    @cached_property
    def macs(self) -> dict[str, int]:
        """Returns the MACs of the pass by name of module, weight or functional call, summed over its calls.

        Those of a weight are its alone.
        """
        total: Counter[str] = Counter()
        weights = [call for call in self.calls if call.kind == "weight"]
        for call in (*self.module_calls, *weights, *self.functional_calls):
            total[call.name] += call.macs - sum(macs for _, macs in call.weight_macs)
            for name, (_, macs) in zip(call.weight_names, call.weight_macs, strict=True):
                total[name] += macs
        return dict(total)

    @cached_property
    def _by_name(self) -> dict[str, list[Call]]:
        named: dict[str, list[Call]] = {}
        for call in self.calls:
            for name in (call.name, *call.weight_names):
                named.setdefault(name, []).append(call)
        return named

    @cached_property
    def _consumers(self) -> dict[int, list[tuple[int, Call]]]:
        edges: dict[int, list[tuple[int, Call]]] = {}
        for call in self.calls:
            for source in call.inputs if not call.passthrough else ():
                if source.producer is not None:
                    edges.setdefault(source.producer, []).append((source.output, call))
        return edges

    def calls_of(self, name: str) -> tuple[Call, ...]:
        """Returns all calls of a module, a functional name or the module with that weight; empty when it never ran."""
        return tuple(self._by_name.get(name, ()))

    @cached_property
    def _readers(self) -> dict[str, str]:
        calls = [call for call in self.calls if call.kind in ("functional", "other", "module")]
        return {name: call.name for call in reversed(calls) for source in call.inputs for name in source.parameters}

    @cached_property
    def parameter_readers(self) -> dict[str, str]:
        """Names of calls that read a parameter or buffer of another module, by the tensor's name."""
        return {name: call.name for call in self.calls for source in call.inputs for name in source.parameters}

    def reader_of(self, name: str) -> str | None:
        """Returns the call that reads in float the weight of a layer which never ran itself; None without one."""
        if self.calls_of(name):
            return None
        keys = (name, f"{name}.weight" if name else "weight")
        return next((self._readers[key] for key in keys if key in self._readers), None)

    def producer_of(self, call: Call | str, index: int = 0) -> Call | None:
        """The call that made input `index` of `call`, looking through views.

        None for a model input, a parameter or a constant.

        Raises:
            QuantizationError: a name that ran never or more than once, or an input that is not there.
        """
        call = self._single(call)
        if not 0 <= index < len(call.inputs):
            raise QuantizationError(f"{call.name!r} has {len(call.inputs)} tensor inputs, asked for number {index}")
        producer = call.inputs[index].producer
        return None if producer is None else self.calls[producer]

    def consumers_of(self, call: Call | str, output: int | None = None) -> tuple[Call, ...]:
        """Distinct calls that read output `output` of `call` (None: any output), in order.

        The model's own output counts, as a call of kind `"output"`.

        Raises:
            QuantizationError: a name that ran never or more than once.
        """
        edges = self._consumers.get(self._single(call).position, [])
        return tuple(dict.fromkeys(consumer for index, consumer in edges if output in (None, index)))

    def following_activation(self, name: str) -> Call | None:
        """The activation (ReLU, GELU, ...) that alone reads the output of `name`, or None.

        A name that ran several times must be followed by the same kind of activation each time; the first is returned.

        Raises:
            QuantizationError: `name` never ran.
        """
        found: list[Call] = []
        for call in self.calls_of(name) or (self._single(name),):
            consumers = self.consumers_of(call)
            if len(consumers) != 1 or not consumers[0].is_activation:
                return None
            found.append(consumers[0])
        return found[0] if len({call.op for call in found}) == 1 else None

    def _single(self, call: Call | str) -> Call:
        if isinstance(call, Call):
            return call
        calls = self.calls_of(call)
        if len(calls) == 1:
            return calls[0]
        if not calls:
            raise QuantizationError(f"{call!r} was not called in the recorded pass.{did_you_mean(call, self._by_name)}")
        raise QuantizationError(f"{call!r} was called {len(calls)} times: pass one of calls_of({call!r})")
