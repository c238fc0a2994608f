"""Parity certificates: what the runtime of an exported file computes, next to the model that it was made from."""

from __future__ import annotations

import functools
import json
import math
import platform
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lq_plugin.errors import ExportError
from lq_plugin.export.target import Products, Target, target_of
from lq_plugin.export.verify import Verification, arguments, tensors, verify
from lq_plugin.model.calibrate import evaluating
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.quantizers.base import Levels
from lq_plugin.utilities import hooks
from lq_plugin.utilities.files import write_file


@dataclass(frozen=True)
class LayerParity:
    """Input of one layer as the runtime computes it, next to the model's.

    Args:
        name: of the layer.
        largest_steps: largest difference, in steps of the input's quantizer; of FP8 in its largest, next to the bounds.
        differing: share of elements that differ by half a step or more, 0..1.
    """

    name: str
    largest_steps: float
    differing: float


@dataclass(frozen=True)
class Certificate:
    """Result of running a file in its runtime next to the model.

    Args:
        target, runtime: what wrote the file, and what ran it.
        file, bytes: name and size of the file.
        verification: of the outputs.
        layers: in the model's order, those whose inputs the runtime gives; empty where it gives none.
        products: how the runtime computes matrix products and convolutions; None where it does not say.
        metrics: what the module logs in validation, with the model's outputs and with the file's.
        versions: of the packages that took part.
        created: time in UTC, ISO 8601.
        processor: what the runtime ran on.
    """

    target: str
    runtime: str
    file: str
    bytes: int
    verification: Verification
    layers: tuple[LayerParity, ...] = ()
    products: Products | None = None
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    processor: str = ""

    @property
    def first_difference(self) -> str | None:
        """Name of the first layer whose input differs by more than one step, as a tie may; None where none does."""
        return next((layer.name for layer in self.layers if layer.largest_steps > 1.5), None)

    def summary(self) -> str:
        """Returns one line for a log."""
        found = self.verification
        nan = " (there is NaN in the outputs)" if math.isnan(found.largest_difference) else ""
        text = (
            f"{found.samples} samples: {'bit-equal' if found.bit_equal else 'not bit-equal'}, agreement "
            f"{found.agreement:.4f}, largest difference {found.largest_difference:.2g} of the largest output{nan}"
        )
        if self.products is not None:
            integer, total = sum(self.products.integer.values()), self.products.total
            text += f"; {self.runtime} computes {integer} of {total} products with integers"
        for name, value in self.metrics.get("file", {}).items():
            text += f"; {name} {self.metrics['model'][name]:.4f} in the model, {value:.4f} in the file"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, ready for JSON; NaN is null."""
        content = asdict(self) | {"first_difference": self.first_difference}
        return json.loads(json.dumps(content), parse_constant=lambda _: None)  # type: ignore[no-any-return]

    def write(self, path: str | Path) -> None:
        """Writes the certificate as JSON.

        Raises:
            ExportError: the file cannot be written.
        """
        write_file(path, json.dumps(self.to_dict(), indent=1) + "\n", ExportError)

    def faults(self, min_agreement: float) -> list[str]:
        """Returns why the file fails: fewer than `min_agreement` of the samples (0..1) have the model's class."""
        if self.verification.agreement >= min_agreement:
            return []
        first = self.first_difference
        where = "" if first is None else f"; the first layer whose input differs is {first}"
        return [
            f"{self.file} agrees with the model on {self.verification.agreement:.4f} of {self.verification.samples} "
            f"samples in {self.runtime}, asked for {min_agreement:g}{where}"
        ]


def certify(
    model: nn.Module,
    path: str | Path,
    inputs: Iterable[Any],
    fresh: Callable[[], nn.Module] | None = None,
    runtime: str | None = None,
    target: str | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
) -> Certificate:
    """Runs an exported file in its runtime next to the model, as a whole and layer by layer where the runtime allows.

    Args:
        model: the exported one.
        path: of the file.
        inputs: batches, each a tensor or a tuple of positional inputs.
        fresh: makes a float model, into which a packed file is read.
        runtime: that runs the file; None: the target's first.
        target: name of the target that wrote the file; None: by its suffix.
        metrics: of the model and of the file, see `file_metrics`.

    Raises:
        ExportError: see `verify`.
    """
    path, batches = Path(path), list(inputs)
    chosen = target_of(path, target)
    named = chosen.runtime_of(runtime)
    verification = verify(model, path, batches, fresh, runtime, target=chosen.name)
    run = chosen.layer_inputs(path, named)
    packages = ["lq_plugin", "torch", *chosen.packages, *([] if named is None else [named])]
    return Certificate(
        target=chosen.name,
        runtime=named or "torch",
        file=path.name,
        bytes=sum(file.stat().st_size for file in chosen.files(path)),
        verification=verification,
        layers=() if run is None else tuple(_compare_layers(model, run, batches)),
        products=chosen.products(path, named),
        metrics=metrics or {},
        versions={name: text for name in dict.fromkeys(packages) if (text := _version(name))},
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        processor=_processor(),
    )


def _compare_layers(
    model: nn.Module, run: Callable[..., Mapping[str, Tensor]], batches: Iterable[Any]
) -> Iterator[LayerParity]:
    """Yields the parity of each layer whose quantized input the model computes once a pass, and the runtime gives."""
    held = {name: layer for name, layer in quantized_layers(model) if layer.input_quantizer is not None}
    largest: dict[str, float] = {}
    differing: dict[str, list[int]] = {}
    seen: dict[str, list[tuple[Tensor, Levels | None]]] = {}

    def note(name: str, quantizer: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen[name].append((output, quantizer.current.levels(inputs[0])))

    handles = [
        hooks.after(layer.input_quantizer, functools.partial(note, name))
        for name, layer in held.items()
        if layer.input_quantizer is not None
    ]
    try:
        with evaluating(model), torch.no_grad():
            for index, batch in enumerate(batches):
                args = arguments(model, batch, None, None, f"batch {index}")
                seen.update({name: [] for name in held})
                model(*args)
                for name, theirs in run(*args).items():
                    if len(passes := seen.get(name, [])) != 1:
                        continue
                    ((mine, levels),) = passes
                    if levels is None or mine.shape != theirs.shape:
                        continue
                    steps = ((mine.cpu() - theirs).double().abs() / levels.step.cpu()).nan_to_num(torch.inf)
                    largest[name] = max(largest.get(name, 0.0), float(steps.max()) if steps.numel() else 0.0)
                    count = differing.setdefault(name, [0, 0])
                    count[0] += int((steps >= 0.5).sum())
                    count[1] += steps.numel()
    finally:
        for handle in handles:
            handle.remove()
    for name in held:
        if name in largest:
            different, total = differing[name]
            yield LayerParity(name, largest[name], different / max(total, 1))


@dataclass(eq=False)
class Calls:
    """Number of calls so far."""

    number: int = 0


@contextmanager
def computed_by(
    module: nn.Module, target: Target, path: Path, runtime: str | None, fresh: Callable[[], nn.Module] | None = None
) -> Iterator[Calls]:
    """A context in which a module's `forward` is computed by an exported file; yields the number of its calls so far.

    Args:
        module: the exported one.
        target: that wrote the file.
        path: of the file.
        runtime: that runs it; None: the target's first.
        fresh: makes a float model, into which a packed file is read.
    """
    run, taken, _ = target.open(path, target.runtime_of(runtime), fresh)
    forward = module.forward
    calls = Calls()
    # A run that puts the module's Python state back would put back the count also.
    counted = weakref.ref(calls)

    def by_the_file(*args: Any) -> Any:
        if (count := counted()) is not None:
            count.number += 1
        outputs = list(tensors(run(*arguments(module, list(args), None, taken, "forward"))))
        # The file has no structure of its own: it is the model's, on the same batch.
        leaves, structure = tree_flatten(forward(*args))
        places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if len(places) != len(outputs):
            raise ExportError(f"{path} has {len(outputs)} outputs, {type(module).__name__}.forward {len(places)}")
        for index, output in zip(places, outputs, strict=True):
            leaves[index] = output
        return tree_unflatten(leaves, structure)

    module.__dict__["forward"] = hooks.StandIn(forward, by_the_file)
    try:
        yield calls
    finally:
        del module.__dict__["forward"]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    sets = [word for flag, word in _INSTRUCTIONS.items() if flag in flags]
    return ", ".join([names[0] if names else platform.processor() or platform.machine(), *sets])


#: Instructions that decide which integer kernels a runtime takes, by their names in /proc/cpuinfo.
_INSTRUCTIONS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "VNNI", "amx_int8": "AMX"}
