"""Lines that a command prints: where a file is, and why a request is refused."""

from rich.console import Console
from rich.text import Text

from lq_plugin.errors import QuantizationError


def say(console: Console, text: str) -> None:
    """Prints a line as it is; bytes of a file's name that are no text are shown by their numbers."""
    console.print(Text(text.encode("utf-8", "backslashreplace").decode()), soft_wrap=True)


def failed(command: str, error: QuantizationError) -> int:
    """Prints `error` on stderr; returns the exit status, 2."""
    say(Console(stderr=True), f"{command}: {error}")
    return 2
