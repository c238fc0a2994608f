"""Regular expressions over layer names in polynomial time, whoever wrote them.

Python's engine tries one way after the other: `(a|a)*b` takes hours on forty letters. Here all ends that a part of the
pattern can
reach from a position are found at once, and remembered. Sets of positions are the bits of a number. The syntax is
Python's, without what needs more than that: backreferences, conditions on groups, possessive and atomic groups.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from lq_plugin.errors import PlanError

try:
    from re import _constants as _code, _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_constants as _code
    import sre_parse as _parser

#: No pattern over names is longer, or nested deeper.
MAX_LENGTH, MAX_DEPTH = 2000, 40
#: Steps that one name may take: a second or so. Patterns that people write take a few hundred.
MAX_STEPS = 1_000_000
_REFUSED = {
    "GROUPREF": "a backreference",
    "GROUPREF_EXISTS": "a condition on a group",
    "ATOMIC_GROUP": "an atomic group",
}
_REFUSED |= {"POSSESSIVE_REPEAT": "a possessive repeat"}
_CATEGORIES = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": lambda c: c.isalnum() or c == "_"}


def name_pattern(text: str) -> Callable[[str], bool]:
    """Compiles a regular expression to a test of whole names, which takes polynomial time on any name.

    Raises:
        PlanError: no regular expression, longer than `MAX_LENGTH`, deeper than `MAX_DEPTH`, or one that would need
            another engine. The test itself raises it after `MAX_STEPS`.

    >>> early = name_pattern(r"layer[12]\\.(?!0).*")
    >>> early("layer1.3.conv"), early("layer1.0.conv"), name_pattern("(a|a)*b")("a" * 60)
    (True, False, False)
    """
    if len(text) > MAX_LENGTH:
        raise PlanError(f"a regular expression over names has at most {MAX_LENGTH} characters, got {len(text)}")
    try:
        re.compile(text)
        tree = _parser.parse(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise PlanError(f"{text!r} is no regular expression: {error}") from None
    _refuse(tree, text)
    ignore_case = bool(tree.state.flags & re.IGNORECASE)
    return lambda name: bool(_Match(name, ignore_case).ends(tree, 0) >> len(name))


def _refuse(tree: Any, text: str, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise PlanError(f"a regular expression over names is nested at most {MAX_DEPTH} deep: {text[:40]!r}...")
    for code, argument in tree:
        if (name := str(code)) in _REFUSED:
            raise PlanError(f"{text!r}: patterns over names have no {_REFUSED[name].split(' ', 1)[1]}s")
        if name == "SUBPATTERN" and (argument[1] or argument[2]):
            raise PlanError(f"{text!r}: flags stand at the start of a pattern over names: (?i)...")
        for part in _parts(argument):
            _refuse(part, text, depth + 1)


def _parts(argument: Any) -> Iterable[Any]:
    """Returns the patterns inside an operation."""
    if isinstance(argument, _parser.SubPattern):
        yield argument
    elif isinstance(argument, (tuple, list)):
        for item in argument:
            yield from _parts(item)


class _Match:
    """One name, and for each part of the pattern and each start the positions where a match can end."""

    def __init__(self, name: str, ignore_case: bool) -> None:
        self.name, self.fold = name, str.lower if ignore_case else str
        self.known: dict[tuple[int, int], int] = {}
        self.steps = 0

    def ends(self, tree: Any, start: int) -> int:
        """Returns the positions where a match of a sequence that begins at `start` can end."""
        reached = 1 << start
        for operation in tree:
            reached = self._each(reached, self._operation, operation)
        return reached

    def _operation(self, operation: Any, start: int) -> int:
        key = id(operation), start
        if key not in self.known:
            code, argument = operation
            self.known[key] = getattr(self, "_" + str(code).lower())(argument, start)
        return self.known[key]

    def _each(self, positions: int, step: Callable[[Any, int], int], part: Any) -> int:
        """Returns all ends of `part` from any of the positions."""
        reached = 0
        while positions:
            lowest = positions & -positions
            reached |= step(part, lowest.bit_length() - 1)
            positions ^= lowest
            self.steps += 1
        if self.steps > MAX_STEPS:
            raise PlanError(
                f"a regular expression of the plan takes more than {MAX_STEPS:,} steps on the name {self.name[:60]!r}"
            )
        return reached

    def _one(self, position: int, fits: Callable[[str], bool]) -> int:
        return 2 << position if position < len(self.name) and fits(self.name[position]) else 0

    def _literal(self, letter: int, position: int) -> int:
        return self._one(position, lambda c: self.fold(c) == self.fold(chr(letter)))

    def _not_literal(self, letter: int, position: int) -> int:
        return self._one(position, lambda c: self.fold(c) != self.fold(chr(letter)))

    def _any(self, _: None, position: int) -> int:
        return self._one(position, lambda c: c != "\n")

    def _in(self, choices: Any, position: int) -> int:
        negated = choices[0][0] is _code.NEGATE

        def fits(c: str) -> bool:
            cases = {c, c.lower(), c.upper()} if self.fold is str.lower else {c}
            return any(_one_of(choices[negated:], case) for case in cases) != negated

        return self._one(position, fits)

    def _branch(self, argument: Any, position: int) -> int:
        reached = 0
        for tree in argument[1]:
            reached |= self.ends(tree, position)
        return reached

    def _subpattern(self, argument: Any, position: int) -> int:
        return self.ends(argument[-1], position)

    def _max_repeat(self, argument: Any, position: int) -> int:
        least, most, tree = argument
        reached = 1 << position
        # After as many rounds as there are positions nothing new is reached, whatever the number says.
        for _ in range(min(least, len(self.name) + 1)):
            reached = self._each(reached, self.ends, tree)
        new, rounds = reached, 0
        while new and rounds < most - least:
            new = self._each(new, self.ends, tree) & ~reached
            reached |= new
            rounds += 1
        return reached

    _min_repeat = _max_repeat

    def _assert(self, argument: Any, position: int) -> int:
        direction, tree = argument
        if direction > 0:
            return (self.ends(tree, position) > 0) << position
        return any(self.ends(tree, start) >> position & 1 for start in range(position + 1)) << position

    def _assert_not(self, argument: Any, position: int) -> int:
        return self._assert(argument, position) ^ 1 << position

    def _at(self, where: Any, position: int) -> int:
        size = len(self.name)
        before, after = (0 <= p < size and _CATEGORIES["WORD"](self.name[p]) for p in (position - 1, position))
        last = position == size or (position == size - 1 and self.name[position] == "\n")
        found = {
            _code.AT_BEGINNING: position == 0,
            _code.AT_BEGINNING_STRING: position == 0,
            _code.AT_END: last,
            _code.AT_END_STRING: position == size,
            _code.AT_BOUNDARY: before != after,
            _code.AT_NON_BOUNDARY: before == after,
        }
        return found[where] << position


def _one_of(choices: Any, c: str) -> bool:
    for code, argument in choices:
        if code is _code.LITERAL and ord(c) == argument:
            return True
        if code is _code.RANGE and argument[0] <= ord(c) <= argument[1]:
            return True
        if code is _code.CATEGORY:
            _, *negated, kind = str(argument).split("_")
            if _CATEGORIES[kind](c) != bool(negated):
                return True
    return False
