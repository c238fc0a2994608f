"""Sensitivity of weights from gradients of the float model's loss.

A sample's gradient is its own: of a batch's mean gradient only the part that all samples share would be left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lq_plugin.errors import QuantizationError, raise_all
from lq_plugin.intent.plan import LayerPlan
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.layers import QuantizedLayer, computed_faults
from lq_plugin.search.evaluation.evaluator import Evaluator
from lq_plugin.search.sensitivity.split import split
from lq_plugin.search.space.model_space import Choice, Unit

log = logging.getLogger(__name__)

#: Random vectors of Hutchinson's estimator, for each batch.
PROBES = 16

#: By measure, unit and choice.
Values = dict[str, dict[str, dict[str, float]]]


def by_gradients(
    evaluator: Evaluator,
    units: Sequence[Unit],
    data: Sequence[Any],
    measures: Sequence[str],
    loss: Callable[[Any], Tensor],
) -> Values:
    """Returns the gradient measures of weights; the quantizers of all layers are taken out.

    The errors ΔW of all choices are held in memory at once.

    Args:
        evaluator: calibrated.
        units: weights.
        data: batches.
        measures: of `"fisher"`, `"first_order"`, `"hessian"`; see `lq_plugin.search.sensitivity.measure`.
        loss: of a batch, the mean over its samples.

    Raises:
        QuantizationError: weights that are computed, which no gradient is kept of.
    """
    faults = computed_faults((name, evaluator.layers[name]) for unit in units for name in unit.layers)
    raise_all(QuantizationError, f"cannot measure {', '.join(measures)}; kl, sqnr and loss can", faults)
    changes = {unit.name: _changes(evaluator, unit) for unit in units}
    evaluator.apply({})
    layers = {unit.name: _distinct(evaluator, unit) for unit in units}
    weights = [layer.weight for same in layers.values() for layer in same]
    found: dict[str, dict[str, Tensor]] = {}
    with asking(weights), torch.enable_grad():
        if {"fisher", "first_order"} & set(measures):
            found["fisher"], found["first_order"] = _by_sample(
                weights, layers, changes, data, loss, "first_order" in measures
            )
        if "hessian" in measures:
            traces = dict(
                zip(layers, _traces(weights, [len(same) for same in layers.values()], data, loss), strict=True)
            )
            rows = {
                name: max(traces[name], 0.0) / change.shape[1] * change.square().sum(1)
                for name, change in changes.items()
            }
            found["hessian"] = rows
    texts = {unit.name: [str(choice) for choice in unit.choices] for unit in units}
    return {
        measure: {name: dict(zip(texts[name], map(float, row), strict=True)) for name, row in found[measure].items()}
        for measure in measures
    }


def _by_sample(
    weights: list[Tensor],
    layers: dict[str, list[QuantizedLayer]],
    changes: dict[str, Tensor],
    data: Sequence[Any],
    loss: Callable[[Any], Tensor],
    products: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns ½ Σ E[g²] ΔW² and E[(gᵀΔW)²] of each unit, one number for each choice `[choices]`."""
    square = {name: torch.zeros_like(change[0]) for name, change in changes.items()}
    first_order = {name: torch.zeros_like(change[:, 0]) for name, change in changes.items()}
    count = 0
    for sample in _samples(data, loss):
        gradients = iter(torch.autograd.grad(loss(sample), weights, allow_unused=True, materialize_grads=True))
        for name, same in layers.items():
            gradient = torch.cat([next(gradients).detach().flatten() for _ in same])
            square[name] += gradient.square()
            if products:
                first_order[name] += (changes[name] @ gradient).square()
        count += 1
    fisher = {name: 0.5 / count * (changes[name].square() @ value) for name, value in square.items()}
    return fisher, {name: value / count for name, value in first_order.items()}


def _samples(data: Sequence[Any], loss: Callable[[Any], Tensor]) -> Iterator[Any]:
    """Yields one sample after the other, or whole batches where the loss is not a mean over samples."""
    whole = data[0]
    parts = split(whole, 1)
    with torch.no_grad():
        expected = loss(whole)
        apart = torch.stack([loss(part) for part in parts]).mean()
    if len(parts) == 1 or not torch.allclose(apart, expected, rtol=1e-3, atol=1e-5):
        log.warning("the loss is no mean over samples: gradients are of whole batches, one sample each")
        yield from data
        return
    for batch in data:
        yield from split(batch, 1)


def _traces(weights: list[Tensor], sizes: list[int], data: Sequence[Any], loss: Callable[[Any], Tensor]) -> list[float]:
    """Returns the trace of each unit's Hessian block, E[zᵀHz] with random signs z; a unit is `sizes` weights."""
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(len(weights), dtype=torch.float64)
    for batch in data:
        gradients = torch.autograd.grad(
            loss(batch), weights, create_graph=True, allow_unused=True, materialize_grads=True
        )
        # Where the loss is linear, or does not depend on a weight, there is nothing to derive.
        curved = [gradient.requires_grad for gradient in gradients]
        for _ in range(PROBES if any(curved) else 0):
            signs = [(torch.randint(0, 2, g.shape, generator=generator) * 2 - 1).to(g) for g in gradients]
            outputs, vectors = (
                [t for t, kept in zip(given, curved, strict=True) if kept] for given in (gradients, signs)
            )
            products = torch.autograd.grad(
                outputs, weights, vectors, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            found += torch.stack([(z * hz).sum().double().cpu() for z, hz in zip(signs, products, strict=True)])
    return [float(part.sum()) / (PROBES * len(data)) for part in found.split(sizes)]


def _changes(evaluator: Evaluator, unit: Unit) -> Tensor:
    """Returns Q(W) - W of each choice, `[choices, elements]`."""
    rows = []
    for choice in unit.choices:
        if isinstance(choice, QuantSpec):
            evaluator.apply(together([(unit, choice)]))
        rows.append(
            torch.cat([
                (layer.quantized_weight() - layer.weight if isinstance(choice,
                QuantSpec) else torch.zeros_like(layer.weight)).flatten()
                for layer in _distinct(evaluator, unit)
            ])
        )  # fmt: skip
    return torch.stack(rows).detach()


def together(changes: Iterable[tuple[Unit, Choice]]) -> dict[str, LayerPlan]:
    """Returns specs by layer name with these choices and nothing else quantized."""
    specs: dict[str, dict[str, Any]] = {}
    for unit, choice in changes:
        for name in unit.layers if isinstance(choice, QuantSpec) else ():
            specs.setdefault(name, {})[unit.slot] = choice
    return {name: LayerPlan(**given) for name, given in specs.items()}


def _distinct(evaluator: Evaluator, unit: Unit) -> list[QuantizedLayer]:
    """Returns the unit's layers; of those that share a weight only the first."""
    layers = [evaluator.layers[name] for name in unit.layers]
    return list({id(layer.weight): layer for layer in reversed(layers)}.values())[::-1]


@contextmanager
def asking(tensors: Sequence[Tensor], wanted: bool = True) -> Iterator[None]:
    """A context in which these tensors require gradients, or do not; it restores them at its end."""
    before = [(tensor, tensor.requires_grad) for tensor in tensors]
    for tensor, _ in before:
        tensor.requires_grad_(wanted)
    try:
        yield
    finally:
        for tensor, was in before:
            tensor.requires_grad_(was)
