"""Base of the fuzzer's targets, and the ways in which one case ends."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from lq_plugin.errors import QuantizationError

#: How a case may end.
ERROR, SAME, OTHER = "own error", "same result", "other valid result"


class Failure(Exception):
    """Raised where something is read or refused that should not be."""


class Target:
    """One kind of input. Its constructor builds the unmutated one in `folder`.

    `errors` are, next to `QuantizationError`, what the docstring of the function in question promises.
    """

    name: str
    #: When another result than that of the unmutated input is right.
    legitimate: str
    #: Cases of 10,000.
    share: int
    errors: tuple[type[BaseException], ...] = ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def unmutated(self) -> Any:
        """Returns the input that `mutated` starts from, with which `use` returns `SAME`."""
        raise NotImplementedError

    def mutated(self, rng: random.Random) -> Any:
        """Returns an input after a few changes."""
        raise NotImplementedError

    def use(self, case: Any) -> str:
        """Gives the input to the library; returns `SAME` or `OTHER`.

        Raises:
            QuantizationError, or one of `errors`: it is refused.
            Failure: it is read as something that it does not say, or what should be untouched is changed.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Raises AssertionError, from what happened, unless the unmutated input gives its result: without that no
        mutation says much."""
        try:
            found = self.use(self.unmutated())
        except Exception as error:
            raise AssertionError(f"{self.name}: the unmutated input is refused") from error
        if found != SAME:
            raise AssertionError(f"{self.name}: the unmutated input ends as {found!r}")

    def outcome(self, rng: random.Random) -> str:
        try:
            return self.use(self.mutated(rng))
        except (QuantizationError, *self.errors) as error:
            str(error).encode("utf-8", "backslashreplace")
            if len(str(error)) > 250_000:
                raise Failure(f"a message of {len(str(error))} characters") from error
            return ERROR
