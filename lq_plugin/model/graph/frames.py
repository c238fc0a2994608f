"""Content of a recording while a pass runs: values that storages hold, and modules that run inside each other."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from lq_plugin.model.graph.numbering import Numbering
from lq_plugin.model.graph.recording import Source


class Value(NamedTuple):
    """The value that a storage holds now; `holder` keeps its key from being given to another."""

    holder: Any
    producer: int | None
    output: int
    geometry: tuple[Any, ...] | None
    activation: bool


class Frame(NamedTuple):
    """A call of a module that runs, or of what is around the model."""

    module: nn.Module | None
    name: str
    opaque: bool
    numbering: Numbering
    inputs: list[Tensor]
    sources: tuple[Source, ...]
    versions: list[int | None]
