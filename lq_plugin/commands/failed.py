"""Error message of a command whose request is refused."""

from rich.console import Console
from rich.text import Text

from lq_plugin.errors import QuantizationError


def failed(command: str, error: QuantizationError) -> int:
    """Prints `error` on stderr; returns the exit status, 2."""
    Console(stderr=True).print(Text(f"{command}: {error}"), soft_wrap=True)
    return 2
