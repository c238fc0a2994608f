"""`lq-report`: one static page of a run, of a search, or of two next to each other."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lq_plugin.commands.console import failed, say
from lq_plugin.errors import QuantizationError
from lq_plugin.extras import need_packages

if TYPE_CHECKING:
    from lq_plugin.report.data import ReportData


def report(arguments: Sequence[str] | None = None) -> int:
    """`lq-report RUN_OR_STUDY [OTHER]`: writes `report.html`, then PNG and SVG files of its figures.

    Returns:
        0, or 2 when there is nothing to report on.
    """
    parser = argparse.ArgumentParser(
        "lq-report", description="One static page of a run, a study, or two next to each other."
    )
    parser.add_argument(
        "source", nargs="+", metavar="RUN_OR_STUDY", help="report.json, a folder of a run or search, or a storage's URL"
    )
    parser.add_argument("-o", "--output", type=Path, help="the page; report.html in the (first) folder when left out")
    parser.add_argument("--study", help="which study, where a storage holds several")
    parser.add_argument(
        "--pictures", type=Path, help="folder of the PNG and SVG files; figures next to the page when left out"
    )
    parser.add_argument("--no-pictures", action="store_true", help="write the page alone")
    parser.add_argument(
        "--layers", type=int, default=4, help="number of layers, the largest first, that get pictures (default 4)"
    )
    parser.add_argument("--version", action="version", version=f"lq_plugin {version('lq_plugin')}")
    args = parser.parse_args(arguments)
    if len(args.source) > 2:
        parser.error(f"one report, or two next to each other; got {len(args.source)}")
    console, started = Console(), time.perf_counter()
    try:
        if not args.no_pictures:
            need_packages("lq-report with figures (--no-pictures leaves them out)", "matplotlib")
        from lq_plugin.commands.report_sources import load_report
        from lq_plugin.report.page import write_page

        reports = [load_report(source, args.study) for source in args.source]
        if len({found.title for found in reports}) < len(reports):
            # Two runs of one model are told apart by their folders.
            reports = [
                replace(r, title=f"{r.title}, {Path(source).name}")
                for r, source in zip(reports, args.source, strict=True)
            ]
        first = Path(args.source[0])
        folder = first if first.is_dir() else first.parent if first.exists() else Path()
        page = write_page(reports, args.output or folder / "report.html")
        size = page.stat().st_size / 1e6
        say(console, f"{page.resolve()}  ({size:.2f} MB, {time.perf_counter() - started:.1f} s)")
        if not args.no_pictures:
            pictures: Path = args.pictures or page.parent / "figures"
            for data, name in zip(reports, "AB", strict=False):
                target = pictures if len(reports) == 1 else pictures / name
                written = _drawn(data, target, args.layers)
                say(console, f"{target.resolve()}  ({len(written)} files)")
    except QuantizationError as error:
        return failed("lq-report", error)
    return 0


def _drawn(data: ReportData, folder: Path, layers: int) -> list[Path]:
    from lq_plugin.report.pictures import write_pictures

    try:
        return write_pictures(data, folder, max_layers=layers)
    except QuantizationError:
        raise
    except Exception as error:
        # Lists of an edited report may have any length.
        raise QuantizationError(
            f"the figures of {data.title!r} cannot be drawn, was its report edited? {type(error).__name__}: {error}"
        ) from error


def main() -> None:
    """Runs `lq-report` with the arguments of the command line."""
    sys.exit(report())
