"""Types of GGUF, by the formats that are computed on their grids. Nothing here imports torch."""

from __future__ import annotations

from typing import NamedTuple


class BlockType(NamedTuple):
    """Type of GGUF.

    Args:
        name: in `gguf.GGMLQuantizationType`.
        elements: of a block; a row has whole blocks.
    """

    name: str
    elements: int


#: By format.
TYPES = {
    "q4_0": BlockType("Q4_0", 32),
    "q8_0": BlockType("Q8_0", 32),
    "tq2_0": BlockType("TQ2_0", 256),
    "tq1_0": BlockType("TQ1_0", 256),
    "mxfp4": BlockType("MXFP4", 32),
    "nvfp4": BlockType("NVFP4", 64),
}
#: Of matrices that stay float, by the word of the option `floats`.
FLOATS = {"f16": "F16", "bf16": "BF16", "f32": "F32"}
