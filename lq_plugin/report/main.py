"""`lq-report` and `lq-explain`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from lq_plugin.errors import QuantizationError
from lq_plugin.plan import QuantPlan

if TYPE_CHECKING:
    from lq_plugin.report.data import ReportData


def report(arguments: Sequence[str] | None = None) -> int:
    """`lq-report RUN_OR_STUDY [OTHER]`: write `report.html`, then PNG and SVG files of its figures.

    Returns:
        0, or 2 when there is nothing to report on.
    """
    parser = argparse.ArgumentParser("lq-report", description="One static page of a run, a study, or two side by side.")
    parser.add_argument(
        "source", nargs="+", metavar="RUN_OR_STUDY", help="report.json, a folder of a run or search, or a storage's URL"
    )
    parser.add_argument("-o", "--output", type=Path, help="the page; report.html in the (first) folder when left out")
    parser.add_argument("--study", help="which study, where a storage holds several")
    parser.add_argument(
        "--pictures", type=Path, help="folder of the PNG and SVG files; figures beside the page when left out"
    )
    parser.add_argument("--no-pictures", action="store_true", help="write the page alone")
    parser.add_argument("--layers", type=int, default=4, help="pictures of the largest so many layers (default 4)")
    args = parser.parse_args(arguments)
    if len(args.source) > 2:
        parser.error(f"one report, or two side by side; got {len(args.source)}")
    console, started = Console(), time.perf_counter()
    try:
        from lq_plugin.report.load import load_report
        from lq_plugin.report.page import write_page

        reports = [load_report(source, args.study) for source in args.source]
        if len({found.title for found in reports}) < len(reports):
            # Two runs of one model: what tells them apart is where they lie.
            reports = [
                replace(r, title=f"{r.title}, {Path(source).name}")
                for r, source in zip(reports, args.source, strict=True)
            ]
        first = Path(args.source[0])
        folder = first if first.is_dir() else first.parent if first.exists() else Path()
        page = write_page(reports, args.output or folder / "report.html")
        size = page.stat().st_size / 1e6
        console.print(Text(f"{page.resolve()}  ({size:.2f} MB, {time.perf_counter() - started:.1f} s)"), soft_wrap=True)
        if not args.no_pictures:
            pictures: Path = args.pictures or page.parent / "figures"
            for data, name in zip(reports, "AB", strict=False):
                target = pictures if len(reports) == 1 else pictures / name
                written = _drawn(data, target, args.layers)
                console.print(Text(f"{target.resolve()}  ({len(written)} files)"), soft_wrap=True)
    except QuantizationError as error:
        return _failed("lq-report", error)
    return 0


def explain(arguments: Sequence[str] | None = None) -> int:
    """`lq-explain PLAN MODEL`: what each layer would get, before anything is trained; `--defaults`: what the words of a
    plan stand for.

    Returns:
        0, or 2 when the plan does not fit.
    """
    parser = argparse.ArgumentParser("lq-explain", description="What a plan would do to a model: a dry run.")
    parser.add_argument("--defaults", action=_Defaults, help="print what the words of a plan stand for, and exit")
    parser.add_argument("plan", help='a plan\'s file, or its short string: "w4a8"')
    parser.add_argument(
        "model", help="module:callable, or the name of a Hydra config in the group `model`; the code it names is run"
    )
    parser.add_argument("arguments", nargs="*", metavar="key=value", help="arguments of the model")
    parser.add_argument("--config-dir", type=Path, help="folder with your own Hydra configs")
    parser.add_argument("--shape", help="of one batch, 1,3,32,32: the float model runs once, for MACs and BOPs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args(arguments)
    try:
        # A plan that cannot be read is said before torch is there.
        plan = QuantPlan.parse(args.plan)
        import torch

        from lq_plugin.report.explain import explain as dry_run
        from lq_plugin.report.models import build_model, zeros

        model = build_model(args.model, args.arguments, args.config_dir).eval()
        batch = None if args.shape is None else zeros(args.shape)
        with torch.no_grad():
            found = dry_run(plan, model, None if batch is None else lambda: model(batch))
    except QuantizationError as error:
        return _failed("lq-explain", error)
    if args.json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=1) + "\n")
        return 0
    console = Console()
    console.print(found.table())
    console.print(found.summary(), soft_wrap=True)
    console.print()
    console.print(Text("schedule", style="bold"))
    console.print(found.timeline(), soft_wrap=True)
    return 0


def _drawn(data: ReportData, folder: Path, layers: int) -> list[Path]:
    from lq_plugin.report.pictures import write_pictures

    try:
        return write_pictures(data, folder, max_layers=layers)
    except QuantizationError:
        raise
    except Exception as error:
        # In a report that was edited, any list may have any length.
        raise QuantizationError(
            f"the figures of {data.title!r} cannot be drawn, was its report edited? {type(error).__name__}: {error}"
        ) from error


class _Defaults(argparse.Action):
    """Like `--version`: no other argument is needed."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from lq_plugin.report.defaults import markdown

        sys.stdout.write(markdown())
        parser.exit()


def _failed(command: str, error: QuantizationError) -> int:
    Console(stderr=True).print(Text(f"{command}: {error}"), soft_wrap=True)
    return 2


def report_main() -> None:
    """Entry point."""
    sys.exit(report())


def explain_main() -> None:
    """Entry point."""
    sys.exit(explain())
