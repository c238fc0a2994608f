"""Milliseconds of each layer on the runtime that will run the model, for each spec: a cost that a search can minimize.

Every layer is exported alone with each pair of specs that leads to another kernel, and timed; equal layers are timed
once, and a file keeps the times. The prediction for a model is the float model's time, with each float layer's time
exchanged for that of the quantized layer:

    t(plan) = t(float) + Σ_layer [t(layer, specs) - t(layer, float)]

It does not count what a runtime fuses across layers; `model_latency` measures the whole model, for comparison.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin.errors import ExportError, raise_all
from lq_plugin.export.onnx_file.float_model import float_copy
from lq_plugin.export.options import LatencyOptions
from lq_plugin.export.target import timed_runtimes
from lq_plugin.export.timing import Timing
from lq_plugin.intent.plan import LayerPlan, QuantPlan, Rule
from lq_plugin.intent.spec import PerChannel, PerGroup, QuantSpec
from lq_plugin.model.calibrate import calibrate
from lq_plugin.model.prepare import prepare, quantized_layers
from lq_plugin.utilities import hooks
from lq_plugin.utilities.files import make_folder, temporary_folder, write_file

log = logging.getLogger(__name__)

_FLOAT = "float"
#: Ends the kind of an input whose range is found at run time.
_DYNAMIC = " dynamic"
_WARM_UP = 3
#: Between two lines of progress.
_SECONDS = 5.0


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of one run of a model by layer, for `options.batch` samples together.

    Args:
        options: of the measurement.
        float_model: of the whole float model.
        layers: by layer and `pair` of its specs; `"float"` is the float layer.
        left_out: layers that cannot be timed alone, with the reason; they always count as float.
    """

    options: LatencyOptions
    float_model: float
    layers: Mapping[str, Mapping[str, float]]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def predict(self, plans: Mapping[str, LayerPlan]) -> float:
        """Returns the milliseconds of the model for one sample under layer plans by name (`QuantPlan.resolve`).

        Raises:
            ExportError: a pair of specs that was not measured.
        """
        total = self.float_model
        for name, plan in plans.items():
            row = self.layers.get(name)
            if row is None or not plan:
                continue
            # Tables of earlier versions have the bits of the plan, and one entry for ranges of both kinds.
            keys = [_kind(plan, self.options), pair(plan).replace(_DYNAMIC, "")]
            if (key := next((key for key in keys if key in row), None)) is None:
                raise ExportError(f"the latency of {name} was not measured for '{keys[0]}'; measured: {', '.join(row)}")
            total += row[key] - row[_FLOAT]
        # Layers alone are slower than inside a model, where a runtime fuses them.
        return max(total, 0.0) / self.options.batch


def pair(plan: LayerPlan, smallest: int = 2) -> str:
    """Returns the part of a layer's specs that decides its speed: the containers of weight and input.

    Args:
        plan: of the layer.
        smallest: bits of the smallest integers that a file has.

    >>> pair(LayerPlan(weight=QuantSpec.parse("int3 per_channel mse"), input=QuantSpec.parse("uint8 affine")))
    'int4 per_channel / 8 bit'
    >>> pair(LayerPlan(weight=QuantSpec.parse("mxfp4"))), pair(LayerPlan())
    ('mxfp4 / float', 'float')
    """
    if not plan:
        return _FLOAT
    return f"{_weight_kind(plan.weight, smallest)} / {_input_kind(plan.input)}"


def _weight_kind(spec: QuantSpec | None, smallest: int) -> str:
    if spec is None:
        return _FLOAT
    if not spec.is_uniform:
        return spec.format_name
    bits = next(bits for bits in (2, 4, 8, 16) if max(spec.bit_width, smallest) <= bits)
    group = spec.granularity
    scales = (
        f"group{group.group_size}"
        if isinstance(group, PerGroup)
        else "per_channel"
        if isinstance(group, PerChannel)
        else "per_tensor"
    )
    return f"int{bits} {scales}{' affine' * spec.grid.affine}"


def _input_kind(spec: QuantSpec | None) -> str:
    if spec is None:
        return _FLOAT
    bits = 8 if spec.grid.levels <= 256 else 16
    # Fewer levels than the type has are clipped to first.
    clipped = " clipped" * (spec.grid.levels not in (256, 65536))
    return f"{bits} bit{clipped}{' per_channel' * isinstance(spec.granularity, PerChannel)}{_DYNAMIC * spec.dynamic}"


def latency_table(
    model: nn.Module,
    inputs: Sequence[Tensor],
    plans: Iterable[Mapping[str, LayerPlan]],
    options: LatencyOptions | None = None,
) -> LatencyTable:
    """Measures the layers of a float model under all specs that plans may give them.

    Args:
        model: float, or prepared: then its float copy is measured.
        inputs: positional arguments of its forward, one sample or more each; dim 0 becomes `options.batch`.
        plans: layer plans by name.
        options: runtime, batch and rounds; None: the defaults.

    Returns:
        The measured times, in milliseconds.

    Raises:
        ExportError: specs that cannot be exported, all of them at once.

    >>> from lq_plugin.intent.spec import QuantSpec
    >>> net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8)).eval()
    >>> int8 = LayerPlan(weight=QuantSpec.parse("int8 per_channel"), input=QuantSpec.parse("uint8 affine"))
    >>> table = latency_table(net, [torch.randn(1, 64)], [{"0": int8}], LatencyOptions(rounds=3))
    >>> list(table.layers["0"]), table.predict({}) == table.float_model
    (['float', 'int8 per_channel / 8 bit'], True)
    """
    options = options or LatencyOptions()
    model = float_copy(model)
    batch = [_resized(x, options.batch) for x in inputs]
    wanted: dict[str, dict[str, LayerPlan]] = {}
    for plan in plans:
        for name, layer_plan in plan.items():
            wanted.setdefault(name, {_FLOAT: LayerPlan()}).setdefault(_kind(layer_plan, options), layer_plan)
    seen = _inputs_of_layers(model, batch, wanted)
    left_out = {name: "it is no module of its own, or no batch reached it" for name in wanted if name not in seen}
    whole = f"model {hashlib.sha256(f'{model} {[tuple(x.shape) for x in batch]}'.encode()).hexdigest()[:16]}"
    keys: dict[str, dict[str, str]] = {}
    faults: list[str] = []
    with temporary_folder("latency") as folder:
        timer = _Timer(options, Path(folder))
        for name, example in seen.items():
            keys[name] = {kind: f"{model.get_submodule(name)}; {tuple(example.shape)}; {kind}" for kind in wanted[name]}
        models = {whole, *(key for row in keys.values() for key in row.values())}
        new = len(models - timer.known.keys())
        log.info(
            "latency: %d layers: %d models to time, %d known; %s", len(keys), new, len(models) - new, options.place
        )
        progress = _Progress("exported", new)
        progress.step(timer.add(whole, model, batch))
        for name, row in keys.items():
            layer = nn.Sequential(model.get_submodule(name))
            graph = model_graph(layer, [seen[name]], options)
            for kind, key in row.items():
                try:
                    progress.step(timer.add(key, layer, [seen[name]], wanted[name][kind], graph))
                except ExportError as error:
                    faults.append(f"{name} under '{kind}': {error}")
        raise_all(ExportError, "latency cannot be measured", faults)
        times = timer.measure()
    layers = {name: {kind: times[key] for kind, key in row.items()} for name, row in keys.items()}
    return LatencyTable(options, times[whole], layers, left_out)


def model_graph(model: nn.Module, inputs: Sequence[Tensor], options: LatencyOptions) -> Callable[[], Any]:
    """Returns a function that makes once what files of a model under several plans share, for `model_latency`.

    Args:
        model, inputs, options: see `latency_table`.
    """
    batch = [_resized(x, options.batch) for x in inputs]
    return functools.cache(functools.partial(_timing(options).shared, model, batch))


def _kind(plan: LayerPlan, options: LatencyOptions) -> str:
    return pair(plan, _timing(options).smallest_of(plan))


def _timing(options: LatencyOptions) -> Timing:
    return timed_runtimes()[options.runtime].timings[options.runtime]


def model_latency(
    model: nn.Module,
    inputs: Sequence[Tensor],
    options: LatencyOptions | None = None,
    graph: Callable[[], Any] | None = None,
) -> float:
    """Returns the milliseconds of a whole model for one sample of a batch; never from the cache.

    Args:
        model: float, or prepared and calibrated.
        inputs, options: see `latency_table`.
        graph: `model_graph` of the same weights, where several plans are measured; None: it is made for this one.

    Raises:
        ExportError: a model that cannot be exported.
    """
    options = replace(options or LatencyOptions(), cache=None)
    with temporary_folder("latency") as folder:
        timer = _Timer(options, Path(folder))
        timer.add("model", model, [_resized(x, options.batch) for x in inputs], graph=graph)
        return timer.measure()["model"] / options.batch


class _Progress:
    """Log of progress, every few seconds and at the end."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.said = time.monotonic()

    def step(self, count: int = 1) -> None:
        self.done += count
        if count and (self.done == self.total or time.monotonic() - self.said >= _SECONDS):
            self.said = time.monotonic()
            log.info("latency: %s %d of %d", self.what, self.done, self.total)


class _Timer:
    """Models to be timed in turn, with the times that a cache knows already."""

    def __init__(self, options: LatencyOptions, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.target, self.timing = timed_runtimes()[options.runtime], _timing(options)
        self.cache = None if options.cache is None else Path(options.cache)
        self.known: dict[str, float] = self._read().get(options.place, {})
        self.runs: dict[str, Callable[[], Any]] = {}

    def add(
        self,
        key: str,
        model: nn.Module,
        inputs: list[Tensor],
        plan: LayerPlan | None = None,
        graph: Callable[[], Any] | None = None,
    ) -> bool:
        """Adds a model, its first layer quantized by a plan; returns False where the time under this key is known.

        Args:
            key: that identifies model, input and specs.
            model: float, or quantized without a plan.
            inputs: positional arguments.
            plan: of the first layer; None: the model is timed as it is.
            graph: `model_graph`, where several keys share it; None: of this model.
        """
        if key in self.known or key in self.runs:
            return False
        if plan is not None:
            model = float_copy(model)
        if plan:
            specs = {slot: spec for slot in ("weight", "input") if (spec := getattr(plan, slot)) is not None}
            own = {slot: str(self.target.own_spec(slot, spec)) for slot, spec in specs.items()}
            prepare(model, QuantPlan([Rule("0", **own)]))
            calibrate(model, [inputs], run=lambda batch: model(*batch))
        path = self.folder / f"{len(self.runs)}{self.timing.suffix}"
        write = self.timing.write if quantized_layers(model) else self.timing.write_float
        write(model, inputs, path, graph or functools.partial(self.timing.shared, model, inputs))
        self.runs[key] = self.timing.open(path, inputs, self.options.threads)
        return True

    def measure(self) -> dict[str, float]:
        """Returns the median milliseconds of every key, cached ones included."""
        times: dict[str, list[float]] = {key: [] for key in self.runs}
        rounds = _WARM_UP + self.options.rounds
        progress = _Progress(f"timed {len(self.runs)} models, rounds", rounds)
        for index in range(rounds if self.runs else 0):
            for key, run in self.runs.items():
                before = time.perf_counter()
                run()
                if index >= _WARM_UP:
                    times[key].append((time.perf_counter() - before) * 1e3)
            progress.step()
        self.known |= {key: statistics.median(values) for key, values in times.items()}
        if self.cache is not None and times:
            self._write(self.cache)
        return self.known

    def _read(self) -> dict[str, dict[str, float]]:
        if self.cache is None or not self.cache.exists():
            return {}
        try:
            content = json.loads(self.cache.read_text())
            return {
                str(place): {str(key): float(value) for key, value in rows.items()} for place, rows in content.items()
            }
        except (ValueError, AttributeError, TypeError) as error:
            raise ExportError(f"{self.cache} is no file of latencies: {error}") from error

    def _write(self, path: Path) -> None:
        # Another process may have measured something else meanwhile.
        content = self._read()
        content[self.options.place] = content.get(self.options.place, {}) | self.known
        make_folder(path.parent, ExportError)
        write_file(path, json.dumps(content, indent=1), ExportError)


def _resized(x: Tensor, batch: int) -> Tensor:
    """Returns the first `batch` samples, repeated where there are fewer."""
    return x.detach().cpu()[torch.arange(batch) % len(x)].contiguous()


def _inputs_of_layers(model: nn.Module, inputs: list[Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Returns the first input of each of these modules."""
    modules = dict(model.named_modules())
    seen: dict[str, Tensor] = {}

    def kept(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.setdefault(name, args[0].detach().clone())

        return keep

    handles = [hooks.before(modules[name], kept(name)) for name in names if name in modules]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen
