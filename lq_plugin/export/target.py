"""Export targets: the files and kernels that a quantized model can become, one class each, registered by name.

`lq-export`, the `Export` callback, `export_model`, `verify` and their error messages ask the registry. Nothing here
imports torch, so that a command refuses a request before torch is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from lq_plugin import extras
from lq_plugin.errors import ExportError, SpecError, did_you_mean, raise_all
from lq_plugin.export.request import Option, Request, option_faults
from lq_plugin.export.timing import Timing
from lq_plugin.intent.spec import QuantSpec


class Reader(NamedTuple):
    """Opened file.

    Args:
        run: maps the model's positional inputs to its outputs.
        inputs: number of tensors that the file takes; None: any number.
        outputs: takes from the model's outputs what `run` returns, where that is not all of them."""

    run: Callable[..., Any]
    inputs: int | None = None
    outputs: Callable[[Any], Any] = lambda outputs: outputs


@dataclass(frozen=True)
class Products:
    """Operations by which a runtime computes a file's matrix products and convolutions, with the number of each.

    Args:
        integer: sums of products of integers.
        floating: in floating point, also where integer weights are converted on the way."""

    integer: Mapping[str, int]
    floating: Mapping[str, int]

    @property
    def total(self) -> int:
        """Number of all products."""
        return sum(self.integer.values()) + sum(self.floating.values())


class Target(ABC):
    """Base class of export targets; see `register_target` for a complete one.

    `faults` is the only place that refuses. It is asked with whatever is known: the options before anything is built,
    the plan before training, the model before it is written.
    """

    #: The word for it: `lq-export to=NAME`.
    name: ClassVar[str]
    #: The end of its files' names; None: it changes a model in this process and writes no file.
    suffix: ClassVar[str | None]
    #: Whether it writes a folder of files, with the suffix "", and not one file.
    writes_folder: ClassVar[bool] = False
    #: Whether a path that ends in the suffix chooses it; False: only its name does.
    by_suffix: ClassVar[bool] = True
    #: One line for listings.
    summary: ClassVar[str]
    #: Packages that are needed to write a file.
    packages: ClassVar[tuple[str, ...]] = ()
    #: Packages that run a file, the default first; none: torch runs it.
    runtimes: ClassVar[tuple[str, ...]] = ()
    #: Those of the runtimes in which single layers are timed, for tables of latencies.
    timings: ClassVar[Mapping[str, Timing]] = {}
    options: ClassVar[tuple[Option, ...]] = ()
    #: Whether the model runs on an example input to be written.
    needs_inputs: ClassVar[bool] = False
    #: Whether biases next to integer weights and inputs are int32 in its files: PTQ for it rounds the model's own.
    integer_biases: ClassVar[bool] = False
    #: Whether a tensor has one grid in its files, whoever reads it: PTQ for it shares the ranges of its quantizers.
    one_grid: ClassVar[bool] = False
    #: Specs that its files hold for each tensor of a layer, the usual one first; messages name the nearest.
    takes: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    #: Whether its files may hold activations whose range is found at run time (`int8 dynamic`); otherwise `spec_fault`
    #: is not asked about them.
    takes_dynamic: ClassVar[bool] = False

    def faults(self, request: Request) -> list[str]:
        """Returns everything known to keep a request from being carried out."""
        faults = option_faults(self.options, request.options)
        # Of targets that share an option, the first one is named.
        targets = [self, *reversed(TARGETS.values())]
        known = {option.name: (target, option) for target in targets for option in target.options}
        valid = [option.name for option in self.options]
        for name, value in request.options.items():
            if name not in known:
                listed = ", ".join(valid) or "none"
                faults.append(f"{self.name} has no option {name!r}; valid: {listed}.{did_you_mean(name, valid)}")
            elif name not in valid and not known[name][1].is_default(value):
                faults.append(f"{name} is an option of {known[name][0].name}, not of {self.name}")
        if request.path is not None and self.suffix is not None and not str(request.path).endswith(self.suffix):
            faults.append(f"{request.path}: a file of {self.name} ends in {self.suffix}")
        if request.path is not None and self.writes_folder and request.path.suffix in _suffixes().values():
            faults.append(f"{request.path}: {self.name} writes a folder, give it a name without {request.path.suffix}")
        return faults if faults or request.model is None else self.model_faults(request)

    def model_faults(self, request: Request) -> list[str]:
        """Returns what keeps `request.model` from being stored; a target adds what its files cannot hold."""
        from lq_plugin.export.faults import shared_faults, spec_faults

        return shared_faults(request, self.writes_folder) + spec_faults(request, self.refusal, self.nearest)

    def refusal(self, slot: str, spec: QuantSpec, layer: Any) -> str | None:
        """Returns `spec_fault`, or why a range that is found at run time is refused.

        Args:
            slot, spec, layer: as `spec_fault` has them.
        """
        if spec.dynamic and not self.takes_dynamic:
            return f"its range is found at run time, {self.name} holds fixed ones"
        return self.spec_fault(slot, spec, layer)

    def spec_fault(self, slot: str, spec: QuantSpec, layer: Any) -> str | None:
        """Returns why its files cannot hold a tensor under a spec; None: they can.

        It is asked before training, for each tensor of each layer, and by the table of what targets support.

        Args:
            slot: `"weight"`, `"input"` or `"output"`; operands of operations are inputs.
            spec: of that tensor.
            layer: a layer, float or quantized, or a quantized operation: for its kind and shapes, not its values.
        """
        return None

    def own_spec(self, slot: str, spec: QuantSpec) -> QuantSpec:
        """Returns a spec on the target's own grid, for plans that name the target; another format is for `nearest`.

        Args:
            slot: `"weight"`, `"input"` or `"output"`.
            spec: of that tensor, as a plan has it.
        """
        return spec

    def nearest(self, slot: str, spec: QuantSpec, layer: Any) -> QuantSpec | None:
        """Returns the spec among those in `takes` that the layer's tensor can have and that is nearest to `spec`.

        Args:
            slot: `"weight"`, `"input"` or `"output"`.
            spec: that the target does not take.
            layer: float or quantized.
        """
        return nearest_spec(self.takes.get(slot, ()), spec, lambda other: self.refusal(slot, other, layer))

    @abstractmethod
    def write(self, request: Request) -> int:
        """Writes `request.path`, or changes `request.model` in place; returns the size of what it wrote, in bytes."""

    def files(self, path: Path) -> list[Path]:
        """Returns the files that `write` makes of `path`: itself, or all files of a folder."""
        return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]

    def open(self, path: Path, runtime: str | None, fresh: Callable[[], Any] | None) -> Reader:
        """Opens a file for `verify`.

        Args:
            path: of the file.
            runtime: one of `runtimes`; None where there are none.
            fresh: makes a float model, where a file is read into one.

        Raises:
            ExportError: it cannot be opened.
        """
        raise ExportError(f"{path}: a file of {self.name} cannot be run")

    def float_model(self, path: Path, fresh: Callable[[], Any] | None) -> Any:
        """Returns a new float model, into which `open` reads a file; an ExportError where nothing makes one."""
        if fresh is None:
            raise ExportError(f"{path} is read into a float model: give verify(..., fresh=lambda: MyModule())")
        return fresh()

    def layer_inputs(self, path: Path, runtime: str | None) -> Callable[..., Mapping[str, Any]] | None:
        """Returns a function of the positional inputs that gives what each layer reads, dequantized, as a tensor.

        It is asked by `certify`. None: the runtime shows its results alone.

        Args:
            path: of the file.
            runtime: one of `runtimes`; None where there are none.
        """
        return None

    def products(self, path: Path, runtime: str | None) -> Products | None:
        """Returns how the runtime computes the products of a file; None: it does not say.

        Args:
            path: of the file.
            runtime: one of `runtimes`; None where there are none.
        """
        return None

    def needs_batches(self, options: Mapping[str, Any]) -> bool:
        """Returns True where these options want calibration batches."""
        return False

    def settings(self, request: Request) -> dict[str, Any]:
        """Returns the value of every option."""
        return {option.name: request.options.get(option.name, option.default) for option in self.options}

    def need_packages(self, what: str, runtime: str | None = None) -> None:
        """Refuses to begin `what` without the packages that write a file, and run it where a runtime is named.

        Raises:
            MissingPackageError: naming them, and the extra that brings them.
        """
        extras.need_packages(what, *self.packages, *([] if runtime is None else [runtime]))

    def runtime_of(self, given: str | None) -> str | None:
        """Returns the runtime that reads its files: the given one, or the default; None where torch does.

        Raises:
            ExportError: no runtime of that name, or not one of this target.
        """
        known = list(dict.fromkeys(name for target in TARGETS.values() for name in target.runtimes))
        if given is not None and (given not in known or (self.runtimes and given not in self.runtimes)):
            valid = self.runtimes or known
            raise ExportError(f"runtime is {' or '.join(valid)}, got {given!r}.{did_you_mean(str(given), valid)}")
        return (given or self.runtimes[0]) if self.runtimes else None


def timed_runtimes() -> dict[str, Target]:
    """Returns the runtimes in which single layers can be timed, each with the target whose files are."""
    return {runtime: target for target in reversed(TARGETS.values()) for runtime in target.timings}


def nearest_spec(known: Sequence[str], spec: QuantSpec, fault: Callable[[QuantSpec], str | None]) -> QuantSpec | None:
    """Returns the first spec without a fault whose bits, then whose granularity are the nearest; None: all have one.

    It finds its range and rounds as `spec` does, where it can; such specs come before others.

    Args:
        known: specs to choose from.
        spec: that is to be replaced.
        fault: says why a spec will not do.

    >>> str(nearest_spec(("int8 per_channel", "int4 group64"), QuantSpec.parse("int3 group32 mse"), lambda other: None))
    'int4 group64 mse'
    """
    fit = []
    for other in map(QuantSpec.parse, known):
        try:
            alike = other.replace(range=spec.range, rounding=spec.rounding, gradient=spec.gradient)
        except SpecError:  # its format has no such choice
            alike = other
        fit += [candidate for candidate in dict.fromkeys((alike, other)) if fault(candidate) is None][:1]

    def distance(other: QuantSpec) -> tuple[bool, bool, int, bool]:
        bits, granularity = abs(other.bit_width - spec.bit_width), type(other.granularity)
        named = other.format_name != spec.format_name
        return named, other.range != spec.range, bits, granularity is not type(spec.granularity)

    return min(fit, key=distance, default=None)


#: By name; `register_target` adds to it.
TARGETS: dict[str, Target] = {}

_Kind = TypeVar("_Kind", bound=type[Target])


def register_target(kind: _Kind) -> _Kind:
    """Class decorator: makes a target known to `lq-export`, `Export`, `export_model` and `verify`.

    A target takes one file. `faults` has already passed when `write` is called. A command finds the target when its
    module is imported: `lq-export imports=[my_project.npz] to=npz ...`.

    >>> import tempfile
    >>> import numpy, torch, lq_plugin
    >>> from lq_plugin.export import Target, export_model, register_target
    >>> from lq_plugin.export.codes import encode
    >>> from lq_plugin.model import quantized_layers

    >>> @register_target
    ... class NPZ(Target):
    ...     name, suffix, summary = "npz", ".npz", "integer codes of the weights, for numpy"
    ...
    ...     takes = {"weight": ("int8 per_channel", "int4 per_channel")}
    ...
    ...     def spec_fault(self, slot, spec, layer):
    ...         return None if spec.format_name == "int" else "only integers are codes"
    ...
    ...     def write(self, request):
    ...         layers = quantized_layers(request.model)
    ...         codes = {name: encode(layer.weight_quantizer, layer.weight)["codes"].values for name, layer in layers}
    ...         numpy.savez(request.path, **{name: value.numpy() for name, value in codes.items()})
    ...         return request.path.stat().st_size

    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> _ = lq_plugin.prepare(net, "int4 per_channel")
    >>> _ = lq_plugin.calibrate(net, ())
    >>> path = tempfile.mkdtemp() + "/net.npz"
    >>> _ = export_model(net, path)
    >>> numpy.load(path)["0"].shape
    (4, 8)
    >>> _ = TARGETS.pop("npz")

    Raises:
        ExportError: another target has the name.
    """
    known = TARGETS.get(kind.name)
    if known is not None and (type(known).__module__, type(known).__qualname__) != (kind.__module__, kind.__qualname__):
        raise ExportError(f"there is an export target {kind.name!r} already: {type(known).__module__}")
    TARGETS[kind.name] = kind()
    return kind


def target_of(path: str | Path | None = None, name: str | None = None) -> Target:
    """Returns the target that writes a file: the one of that name, or the one whose suffix the path ends in.

    Raises:
        ExportError: there is none, or it writes no file.

    >>> target_of("model.onnx").name, target_of("model.bin", "onix")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    lq_plugin.errors.ExportError: there is no export target 'onix'; valid: ... Did you mean 'onnx'?
    """
    if name is None:
        chosen = _suffixes()
        found = [known for known, suffix in chosen.items() if str(path).endswith(suffix)]
        if len(found) != 1:
            among = f"; name one of {', '.join(found)}" if found else ""
            listed = " or ".join(f"{suffix} ({known})" for known, suffix in chosen.items())
            raise ExportError(f"a model is exported to a file that ends in {listed}, got {str(path)!r}{among}")
        return TARGETS[found[0]]
    if name not in TARGETS:
        written = [target.name for target in TARGETS.values() if target.suffix is not None]
        near = did_you_mean(str(name).lower(), written)
        raise ExportError(f"there is no export target {name!r}; valid: {', '.join(written)}.{near}")
    target = TARGETS[name]
    if target.suffix is None:
        raise ExportError(f"{name} writes no file, it changes a model in this process: {target.summary}")
    return target


def _suffixes() -> dict[str, str]:
    """Returns the suffixes that choose a target, by its name."""
    return {target.name: target.suffix for target in TARGETS.values() if target.by_suffix and target.suffix}


def markdown() -> str:
    """Returns the table of the targets, as README shows it."""
    kinds = {"": "a folder", None: "this process"}
    rows = [
        f"| {kinds.get(target.suffix, f'`{target.suffix}`')} | `{target.name}` | {target.summary} |"
        for target in TARGETS.values()
    ]
    return "\n".join(["| file | target | |", "|---|---|---|", *rows])


def export_model(
    model: Any,
    path: str | Path,
    inputs: Sequence[Any] | None = None,
    batches: Sequence[Any] | None = None,
    target: str | None = None,
    **options: Any,
) -> int:
    """Writes a prepared and calibrated model to a file of any target.

    Args:
        model: prepared and calibrated; it is not changed.
        path: of the file.
        inputs: positional arguments of its forward, as an example, for targets that run the model.
        batches: calibration batches, for options that want them.
        target: its name; None: the one that the path's suffix belongs to.
        options: of the target, by name.

    Returns:
        The size of the file, in bytes.

    Raises:
        ExportError: listing everything that keeps the file from being written.
        MissingPackageError: a package that the target needs.
    """
    chosen = target_of(path, target)
    chosen.need_packages(f"export_model({str(path)!r})")
    request = Request(options, Path(path), model, "ranges", inputs, batches)
    faults = chosen.faults(request)
    if chosen.needs_inputs and inputs is None:
        faults.append(f"{chosen.name} runs the model on an example: give inputs=(x,)")
    raise_all(ExportError, "cannot export the model", faults)
    return chosen.write(request)
