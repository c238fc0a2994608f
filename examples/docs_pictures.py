"""The pictures of the README, made anew: `make docs-pictures`.

The report page of a finished demo is opened in a headless Chromium at 1280 px in light colours, as a reader
would see it; the Pareto picture is the one that the search wrote.

    python -m examples.docs_pictures runs/docs --output examples/pictures
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tests.report.browser import Page, chromium, why_not

WIDTH = 1280
#: Bytes of a picture.
LARGEST = 300_000


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="what `python -m lq_plugin.demo` wrote")
    parser.add_argument(
        "--output", type=Path, default=Path("examples/pictures"), help="folder of the PNG files (default: %(default)s)"
    )
    parser.add_argument("--layer", default="block.conv1", help="the layer whose page is shown (default: %(default)s)")
    args = parser.parse_args(arguments)
    if reason := why_not():
        sys.exit(reason)
    args.output.mkdir(parents=True, exist_ok=True)
    taken = screenshots((args.run / "report.html").resolve(), args.layer)
    taken["pareto"] = (args.run / "search" / "pareto.png").read_bytes()
    written = []
    for name, png in taken.items():
        path = args.output / f"{name}.png"
        path.write_bytes(small(png))
        written.append(path)
        sys.stdout.write(f"{path} ({path.stat().st_size:,} bytes)\n")
    return written


def screenshots(page: Path, layer: str) -> dict[str, bytes]:
    """The upper part of a report page, one layer's page and the search."""
    with chromium() as browser:
        context = browser.new_context(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        window = Page(context.new_page())
        shown = window.open(page)
        window.settle()
        taken = {"report": shown.screenshot(full_page=True, clip=_from_to(shown, "html", "#training"))}
        shown.click(f".layer[data-layer='{layer}']")
        window.settle()
        taken["layer"] = shown.screenshot(full_page=True, clip=_from_to(shown, "#layer", "#layer .view"))
        shown.keyboard.press("Escape")
        window.settle()
        taken["study"] = shown.screenshot(
            full_page=True, clip=_from_to(shown, "#study", "#study [data-figure=parallel]")
        )
        if window.faults:
            sys.exit("\n".join(window.faults))
        return taken


def _from_to(page: Any, first: str, last: str) -> dict[str, float]:
    """Returns what the page shows from the top of one part to the bottom of another, with a margin."""
    top, bottom = (page.locator(part).first.evaluate("e => e.getBoundingClientRect()") for part in (first, last))
    scrolled = page.evaluate("scrollY")
    return {"x": 0.0, "y": top["top"] + scrolled, "width": float(WIDTH), "height": bottom["bottom"] - top["top"] + 8}


def small(png: bytes) -> bytes:
    """Returns a picture no wider than the page, and in few colours where it would be large."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    for shown in (image, image.quantize(256, Image.Quantize.FASTOCTREE)):
        stream = io.BytesIO()
        shown.save(stream, "png", optimize=True)
        if stream.tell() < LARGEST:
            break
    return stream.getvalue()


if __name__ == "__main__":
    main()
