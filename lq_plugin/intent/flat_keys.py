"""A plan as one flat mapping, for tools that compare runs by their parameters."""

from __future__ import annotations

from lq_plugin.intent.formats import SLOTS
from lq_plugin.intent.plan import FLOAT, QuantPlan
from lq_plugin.intent.spec import QuantSpec


def layer_keys(plan: QuantPlan) -> dict[str, str | int]:
    """Returns what a plan asks for each of its patterns, one key for each property of a tensor.

    A search's plans have a rule for each layer. A tensor that stays float has 32 bits and no other key.

    >>> plan = QuantPlan.parse({"rules": [{"match": "fc", "weight": "int4 mse", "input": "float"}]})
    >>> layer_keys(plan)
    {'bits.fc': 4, 'format.fc': 'int4', 'granularity.fc': 'per_tensor', 'range.fc': 'mse', 'input_bits.fc': 32}
    """
    found: dict[str, str | int] = {}
    for rule in plan.rules:
        for slot in SLOTS:
            spec, before = getattr(rule, slot), "" if slot == "weight" else f"{slot}_"
            if spec == FLOAT:
                found[f"{before}bits.{rule.match}"] = 32
            elif isinstance(spec, QuantSpec):
                values: dict[str, str | int] = {
                    "bits": spec.bit_width,
                    "format": str(spec).split()[0],
                    "granularity": str(spec.granularity),
                    "range": spec.range,
                }
                found |= {f"{before}{key}.{rule.match}": value for key, value in values.items()}
    return found
