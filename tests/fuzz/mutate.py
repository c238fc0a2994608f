"""Structural mutations of plain values: mappings, lists, numbers and texts, as they stand in files and options."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

#: What takes the place of any value.
EXTREMES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 17, 255, 2**31, -(2**31), 2**63, 2**64, 10**40, 0.0, -0.0, 0.5, -0.5, 1e-45,
    1e-300, 1e300,
    math.nan, math.inf, -math.inf, "", " ", "x", "nan", "-1", "1e400", "null", "٤", "²", "\0", "\udc80", "\u2028",
    "=1+1", "[/red]",
    "$x^{$", "%s", "{}", "../..", "re:(", "re:(a+)+$", "re:a{9999999999}", "type:", "*", "?", "**", "x" * 3000,
    "9" * 5000,
    "float", "int4", "int0", "int17", "uint8 affine", "group16", "per_channel", "mse", "lsq", "mxfp4", "_target_",
    "builtins.object",
    "lq_plugin.nowhere", [], [None], [[]], [1, 2], {}, {"": None}, {"_target_": "nowhere.Nothing"}, {"match": "*"},
)  # fmt: skip

Path = tuple[Any, ...]


def places(tree: Any, path: Path = ()) -> list[Path]:
    """Returns where every value below `tree` stands, as keys and indices."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in items for found in ((*path, key), *places(value, (*path, key)))]


def at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def other_text(rng: random.Random, text: str) -> str:
    """Returns a text with a part cut out, doubled, or replaced by a token."""
    start = rng.randrange(len(text) + 1)
    end = min(len(text), start + rng.choice([1, 1, 3, 10]))
    token = rng.choice([value for value in EXTREMES if isinstance(value, str)])
    return text[:start] + rng.choice(["", text[start:end] * 2, token, text[start:end].upper()]) + text[end:]


def other_number(rng: random.Random, number: Any) -> Any:
    changed: Any = rng.choice(
        [
            -number,
            number + 1,
            number - 1,
            number * 2,
            number * 2**20,
            number * 10**9,
            float(number),
            str(number),
            [number],
        ]
    )
    return changed


def other_leaf(rng: random.Random, value: Any) -> Any:
    if isinstance(value, str) and rng.random() < 0.5:
        return other_text(rng, value)
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return other_number(rng, value)
    return copy.deepcopy(rng.choice(EXTREMES))


def mutated(
    rng: random.Random, tree: Any, leaf: Callable[[random.Random, Any], Any] = other_leaf, words: Sequence[Any] = ()
) -> Any:
    """Returns a copy of a tree after one to three changes.

    Args:
        rng: seeded.
        tree: mappings and lists around any leaves; it stays as it is.
        leaf: another value for one that is neither a mapping nor a list.
        words: of the tree's own kind, which take the place of values and keys as well.
    """
    root = [copy.deepcopy(tree)]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        # Deep trees have most of their values in the leaves: half of the changes are near the root.
        every = places(root[0], (0,))
        shallow = [path for path in every if len(path) <= 4]
        path = rng.choice(rng.choice([every, shallow or every]) or [(0,)])
        parent, key = at(root, path[:-1]), path[-1]
        kind = rng.choice(["delete", "leaf", "leaf", "leaf", "word", "double", "swap", "copy", "nest", "rename"])
        other = rng.choice(every or [(0,)])
        if kind == "delete" and len(path) > 1:
            del parent[key]
        elif kind == "word" and words:
            parent[key] = copy.deepcopy(rng.choice(words))
        elif kind == "double" and isinstance(parent, list) and len(path) > 1:
            parent.insert(key, copy.deepcopy(parent[key]))
        elif kind == "swap" and len(path) > 1:
            sibling = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            parent[key], parent[sibling] = parent[sibling], parent[key]
        elif kind == "copy":
            parent[key] = copy.deepcopy(at(root, other))
        elif kind == "nest":
            parent[key] = rng.choice([[parent[key]], {"x": parent[key]}, nested(parent[key], 30)])
        elif kind == "rename" and isinstance(parent, dict):
            texts = [value for value in EXTREMES if isinstance(value, str)]
            parent[rng.choice([other_text(rng, str(key)), rng.choice(texts)])] = parent.pop(key)
        elif isinstance(parent[key], dict | list):
            parent[key] = copy.deepcopy(rng.choice(EXTREMES))
        else:
            parent[key] = leaf(rng, parent[key])
    return root[0]
