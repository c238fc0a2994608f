"""Certificates of exported files, as a page shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lq_plugin.errors import QuantizationError
from lq_plugin.report.codec import decode
from lq_plugin.report.data import FileReport

#: What the name of a certificate ends in; before it stands that of the file.
SUFFIX = ".certificate.json"

_OF_FILE = ("file", "bytes", "target", "runtime", "metrics", "first_difference", "created", "processor", "versions")
_OF_OUTPUTS = ("samples", "agreement", "within_one_step", "largest_steps")


def load_certificate(path: Path) -> FileReport:
    """Returns what a page shows of a certificate that `lq_plugin.export.certificate` wrote.

    Raises:
        QuantizationError: it cannot be read, or is no certificate.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise QuantizationError(f"cannot read the certificate {path}: {error}") from error
    found = content.get("verification") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise QuantizationError(f"{path} is no certificate of lq_plugin: it has no verification")
    plain: dict[str, Any] = {name: content[name] for name in _OF_FILE if name in content}
    plain |= {name: found[name] for name in _OF_OUTPUTS if name in found}
    products = content.get("products")
    if isinstance(products, dict):
        counts = {name: sum(dict(products.get(name) or {}).values()) for name in ("integer", "floating")}
        plain |= {"integer": counts["integer"], "products": sum(counts.values())}
    return decode(FileReport, plain, str(path))
