"""Objects that a terminal shows as a table of text, and a notebook as one of HTML."""

from __future__ import annotations

from html import escape
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

#: Characters of a line where no terminal says how wide it is: a table in a string is not cut to 80.
WIDTH = 160


def new_table(title: str, footer: bool = False) -> Table:
    """Returns an empty table in the one style of this library; brackets in the title are no markup of rich."""
    return Table(title=Text(title), box=SIMPLE_HEAD, show_footer=footer, padding=(0, 1, 0, 0), title_justify="left")


class Shown:
    """Base of a class with a `table()`: `print` and `str` give it as text, rich draws it, a notebook shows it as HTML.

    >>> class Sizes(Shown):
    ...     def table(self) -> Table:
    ...         table = new_table("sizes")
    ...         table.add_column("layer")
    ...         table.add_row("conv<1>")
    ...         return table
    >>> str(Sizes()).split()
    ['sizes', 'layer', '────────', 'conv<1>']
    >>> "<td>conv&lt;1&gt;</td>" in Sizes()._repr_html_()
    True
    """

    def table(self) -> Table:
        """Returns the object as a table of rich."""
        raise NotImplementedError

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return as_text(self.table())

    def _repr_html_(self) -> str:
        return as_html(self.table())


def as_text(table: Table, width: int = WIDTH) -> str:
    """Returns a table as lines of text without colours or trailing spaces, at most `width` characters wide."""
    stream = StringIO()
    console = Console(file=stream, width=width, color_system=None, force_terminal=False, force_jupyter=False)
    # The title on its own: rich folds it at the width of the columns.
    title, table.title = table.title, None
    try:
        if title is not None:
            console.print(title, soft_wrap=True)
        console.print(table)
    finally:
        table.title = title
    # A name may hold any character: none of them commands the terminal.
    text = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in stream.getvalue())
    return "\n".join(line.rstrip() for line in text.rstrip("\n").split("\n"))


def as_html(table: Table) -> str:
    """Returns a table as HTML of its own, with title, header, rows and footer; all text is escaped."""
    columns = table.columns
    align = [f' style="text-align:{column.justify}"' if column.justify == "right" else "" for column in columns]

    def row(tag: str, cells: list[object]) -> str:
        return "<tr>" + "".join(f"<{tag}{a}>{_plain(c)}</{tag}>" for a, c in zip(align, cells, strict=True)) + "</tr>"

    body = zip(*(list(column.cells) for column in columns), strict=True)
    parts = ["<table>"]
    if table.title is not None:
        parts.append(f"<caption>{_plain(table.title)}</caption>")
    parts.append(f"<thead>{row('th', [column.header for column in columns])}</thead>")
    parts += ["<tbody>", *(row("td", list(cells)) for cells in body), "</tbody>"]
    if table.show_footer:
        parts.append(f"<tfoot>{row('th', [column.footer for column in columns])}</tfoot>")
    return "".join([*parts, "</table>"])


def _plain(cell: object) -> str:
    return escape(cell.plain if isinstance(cell, Text) else str(cell))


def short_number(value: float | None) -> str:
    """Returns a number in three digits, with the prefix of its size; nothing for None.

    >>> short_number(1_474_560), short_number(512)
    ('1.47 M', '512')
    """
    if value is None:
        return ""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
