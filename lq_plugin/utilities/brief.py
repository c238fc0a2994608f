"""Names and numbers in few characters, for tables and pictures."""

from __future__ import annotations


def short(name: str, limit: int = 34) -> str:
    """Returns a layer's name, without its middle when it is long.

    >>> short("model.backbone.stages.3.blocks.11.attention.projection", 24)
    'model.bac…ion.projection'
    """
    if len(name) <= limit:
        return name
    head = (limit - 1) * 2 // 5
    return f"{name[:head]}…{name[-(limit - 1 - head) :]}"


def two_digits(value: float) -> str:
    """Returns two significant digits in at most five characters.

    >>> [two_digits(x) for x in (0.0, 0.0123, 1.234, 123.4, 3.2e-7)]
    ['0', '.012', '1.2', '123', '3e-7']
    """
    if value == 0:
        return "0"
    if value >= 99.5 or value < 0.00095:
        return f"{value:.0f}" if 99.5 <= value < 9999.5 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.2g}".removeprefix("0") if value < 1 else f"{value:.2g}"
