"""Lines of a command reach the terminal, whatever a file is called."""

import io
import os

from rich.console import Console

from lq_plugin.commands.console import say


def test_a_name_that_is_no_text_is_shown_by_its_bytes():
    written = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    say(Console(file=written, width=20), os.fsdecode(b"runs/\xff[bold]/a long name of a page.html"))
    written.flush()
    assert written.buffer.getvalue() == b"runs/\\udcff[bold]/a long name of a page.html\n"
