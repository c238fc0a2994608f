"""Registrations of a test are gone after it: other tests list what the library brings."""

import pytest

from lq_plugin.intent import ranges as range_names
from lq_plugin.intent.formats import FORMATS
from lq_plugin.layers import registry as layers
from lq_plugin.quantizers import learned_ranges, registry as formats
from lq_plugin.ranges import registry as ranges
from lq_plugin.report import registry as pictures

#: Each registers what it adds when it is run: pytest's search for doctests must not.
collect_ignore = ["codes_target.py", "power_of_two.py"]


@pytest.fixture(autouse=True)
def registries_as_they_were(monkeypatch):
    tables = [
        FORMATS,
        formats._CODE,
        range_names.RANGES,
        range_names._KINDS,
        ranges._ESTIMATORS,
        learned_ranges._LEARNED,
        layers._REGISTRY,
        layers._SHADOWED,
        pictures.PICTURES,
        pictures.LAYER_PICTURES,
    ]
    kept = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, kept, strict=True):
        table.clear()
        table.update(before)
