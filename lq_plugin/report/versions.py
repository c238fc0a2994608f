"""Converts reports of earlier versions of the library to the present format.

Version 1 counted MACs and BOPs of a whole batch, effective bits of the layers that can hold quantizers alone, and one
coverage for weights and compute. What has another meaning now is left out, or gets the name of what it is.
"""

from __future__ import annotations

from typing import Any

#: Names of what version 1 called otherwise.
_RENAMED = {"effective_bits": "quantizable_effective_bits", "bops": "batch_bops"}


def from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of a report of version 1 as one of version 2.

    >>> totals = {"effective_bits": 4.2, "macs": 9}
    >>> from_version_1({"model": {"coverage": 1.0, "totals": totals, "layers": [], "ledger": [{"macs": 9}]}})
    {'model': {'totals': {'quantizable_effective_bits': 4.2}, 'layers': [], 'ledger': [{'macs': None}]}}
    """
    content = dict(content)
    if isinstance(model := content.get("model"), dict):
        model = {key: value for key, value in model.items() if key != "coverage"}
        totals = {
            name: value for name, value in dict(model.get("totals") or {}).items() if name not in ("macs", "bops")
        }
        model["totals"] = {_RENAMED.get(name, name): value for name, value in totals.items()}
        model["layers"] = [
            {key: value for key, value in row.items() if key not in ("macs", "bops")}
            for row in model.get("layers") or ()
        ]
        if "ledger" in model:
            model["ledger"] = [row | {"macs": None} for row in model["ledger"]]
        content["model"] = model
    if isinstance(study := content.get("study"), dict):
        study = study | {"cost": _RENAMED.get(study.get("cost", ""), study.get("cost"))}
        study["costs"] = [_RENAMED.get(name, name) for name in study.get("costs") or ()]
        study["trials"] = [
            trial
            | {"numbers": {_RENAMED.get(name, name): value for name, value in dict(trial.get("numbers") or {}).items()}}
            for trial in study.get("trials") or ()
        ]
        content["study"] = study
    return content
