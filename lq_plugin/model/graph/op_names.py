"""Names of torch functions: which read metadata, which copy, and one name for all spellings of an operation."""

from __future__ import annotations

import re

#: Calls that read shapes and flags, not values.
METADATA = frozenset(
    ("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "data_ptr",
    "untyped_storage",
     "is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_same_size", "get_device", "has_names",
     "requires_grad_",
     "retain_grad", "register_hook", "result_type", "__len__", "__repr__", "__deepcopy__")
)  # fmt: skip
#: The same values elsewhere: the producer passes through.
COPIES = frozenset(
    ("contiguous", "clone", "reshape", "flatten", "ravel", "to", "type", "float", "double", "half", "bfloat16",
    "type_as",
     "cuda", "cpu", "detach")
)  # fmt: skip
#: Two activations meet here, so a quantized model needs a scale for it.
ELEMENTWISE = frozenset(("add", "sub", "mul"))
#: Functions of one activation that integer runtimes round before, by torch's module of the same function. Those that
#: clip (ReLU, ReLU6) are computed with the layer before.
UNARY_MODULES = {
    "Hardswish": "hardswish", "Hardsigmoid": "hardsigmoid", "SiLU": "silu", "GELU": "gelu", "Sigmoid": "sigmoid",
    "Tanh": "tanh", "Mish": "mish", "AvgPool2d": "avg_pool2d", "AdaptiveAvgPool2d": "adaptive_avg_pool2d",
}  # fmt: skip
UNARY = frozenset((*UNARY_MODULES.values(), "mean"))
SYNONYMS = {
    "multiply": "mul", "subtract": "sub", "rsub": "sub", "concat": "cat", "concatenate": "cat",
    "linalg_matmul": "matmul", "linalg_vecdot": "vecdot", "linalg_multi_dot": "multi_dot", "chain_matmul": "multi_dot",
    # transformers' own kernel of the same product, where torch's cannot be compiled.
    "grouped_mm_fallback": "grouped_mm",
}  # fmt: skip
OPERATOR = re.compile(r"__([ir]?)(add|sub|mul|matmul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)__$")


def normalize(name: str) -> tuple[str, bool]:
    """Bare name of an operation and whether it writes to its first argument.

    >>> normalize("__iadd__"), normalize("relu_"), normalize("__rmatmul__"), normalize("concat")
    (('add', True), ('relu', True), ('matmul', False), ('cat', False))
    """
    if operator := OPERATOR.match(name):
        return operator[2], operator[1] == "i"
    in_place = name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))
    bare = name.strip("_")
    return SYNONYMS.get(bare, bare), in_place
