"""`lq-explain`: dry run of a plan on a model, before anything is trained."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lq_plugin.commands.console import failed
from lq_plugin.errors import QuantizationError
from lq_plugin.export.planned import plan_for, refuse_for_target
from lq_plugin.intent.plan import QuantPlan


def explain(arguments: Sequence[str] | None = None) -> int:
    """`lq-explain PLAN MODEL`: prints each layer's specs.

    `--defaults` prints the meaning of a plan's words, `--targets` what each export target holds.

    Returns:
        0, or 2 when the plan does not fit.
    """
    parser = argparse.ArgumentParser("lq-explain", description="Dry run of a plan on a model.")
    parser.add_argument("--defaults", action=_Print, help="print the meaning of the words of a plan, and exit")
    parser.add_argument("--targets", action=_Print, help="print which formats each export target holds, and exit")
    parser.add_argument("plan", help='a plan\'s file, or its short string: "w4a8"')
    parser.add_argument(
        "model", help="module:callable, or the name of a Hydra config in the group `model`; the code it names is run"
    )
    parser.add_argument("arguments", nargs="*", metavar="key=value", help="arguments of the model")
    parser.add_argument("--config-dir", type=Path, help="folder with your own Hydra configs")
    parser.add_argument("--shape", help="of one batch, 1,3,32,32: the float model runs once, for MACs and BOPs")
    parser.add_argument("--target", help="export target that the plan is for: its grid, and what its files cannot hold")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--version", action="version", version=f"lq_plugin {version('lq_plugin')}")
    args = parser.parse_args(arguments)
    try:
        # A plan that cannot be read is refused before torch is imported.
        plan = plan_for(QuantPlan.parse(args.plan), args.target)
        import torch

        from lq_plugin.report.explain import explain as dry_run
        from lq_plugin.report.models import build_model, zeros

        model = build_model(args.model, args.arguments, args.config_dir).eval()
        batch = None if args.shape is None else zeros(args.shape)

        def forward() -> None:
            try:
                model(batch)
            except Exception as error:
                name = f"{type(model).__name__} on zeros of shape {args.shape}"
                raise QuantizationError(f"{name} raised {type(error).__name__}: {error}") from error

        with torch.no_grad():
            found = dry_run(plan, model, None if batch is None else forward)
        if plan.target is not None:
            from lq_plugin.model import prepare

            # Operations that a plan names are in the recording of the dry run.
            prepare(model, plan, found.recording)
            refuse_for_target(model, plan)
    except QuantizationError as error:
        return failed("lq-explain", error)
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


class _Print(argparse.Action):
    """Option like `--version`, with which no other argument is needed: prints a table."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        if self.dest == "targets":
            from lq_plugin.export.support import markdown
        else:
            from lq_plugin.report.defaults import markdown
        sys.stdout.write(markdown())
        parser.exit()


def main() -> None:
    """Runs `lq-explain` with the arguments of the command line."""
    sys.exit(explain())
