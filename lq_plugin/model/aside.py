"""Modules that a model carries along and are no part of it: metrics with a network, frozen losses and teachers.

A plan means the model. Nothing inside of these is quantized or counted, unless a rule has their name in its pattern:
`lpips.*`, `re:lpips\\.net\\..*`, not `*` or `type:Conv2d`. A teacher that takes over its student's parameters (a mean
teacher) needs one: it follows a quantized student only if it has the same quantizers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.loss import _Loss

from lq_plugin.intent.formats import SLOTS
from lq_plugin.intent.plan import QuantPlan, Rule
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.layers import QuantizedLayer


def set_aside(model: nn.Module, patterns: Iterable[str] = ()) -> dict[str, str]:
    """The modules of `model` that are no part of it, the outermost by name, and what they are.

    One that holds quantizers already is a part of it: a rule has named it.

    Args:
        model: any module; it is no metric or teacher itself.
        patterns: of the rules that quantize something.

    >>> class Distilled(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.student, self.teacher = nn.Linear(4, 2), nn.Linear(4, 2).requires_grad_(False)
    >>> set_aside(Distilled()), set_aside(Distilled(), ["*", "teacher"])
    ({'teacher': 'a frozen teacher'}, {})
    """
    # Where nobody has imported it, nothing is a metric.
    metric: Any = getattr(sys.modules.get("torchmetrics"), "Metric", ())
    trained = any(parameter.requires_grad for parameter in model.parameters())
    found: dict[str, str] = {}
    texts = list(patterns)
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside):
            continue
        if (what := _what(name, module, metric, trained)) is None:
            continue
        inside += (f"{name}.",)
        held = any(isinstance(part, QuantizedLayer) for part in module.modules())
        if not held and not any(names(text, name) for text in texts):
            found[name] = what
    return found


def names(pattern: str, name: str) -> bool:
    """Returns whether a rule's pattern has the name of a module in it.

    >>> [names(pattern, "val.lpips") for pattern in ("val.lpips.*", r"re:.*val\\.lpips.*", "*", "val.*", "type:Conv2d")]
    [True, True, False, False, False]
    """
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", pattern.replace("\\", "")) is not None


def quantizes(rule: Rule) -> bool:
    """Returns whether a rule has a spec other than `float`."""
    return any(isinstance(getattr(rule, slot), QuantSpec) for slot in SLOTS)


def quantizing(plan: QuantPlan) -> list[str]:
    """The patterns of the rules that quantize something."""
    return [rule.match for rule in plan.rules if quantizes(rule)]


def _what(name: str, module: nn.Module, metric: Any, trained: bool) -> str | None:
    if isinstance(module, metric):
        return "a metric"
    frozen = trained and all(not parameter.requires_grad for parameter in module.parameters())
    if not frozen or next(module.parameters(), None) is None:
        # Where the whole model is frozen, that says nothing about its parts.
        return None
    if isinstance(module, _Loss):
        return "a frozen loss network"
    return "a frozen teacher" if "teacher" in name.rpartition(".")[2].lower() else None
