"""A headless Chromium for tests of a page: Debian's (`apt-get install chromium`), Chrome, or Playwright's own."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOW = "apt-get install chromium (or playwright install chromium), and pip install playwright"


def why_not() -> str | None:
    """Returns the reason why there is no browser here, or None."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return f"NO BROWSER TEST WAS RUN: playwright is not installed: {HOW}"
    return None if executable() or own() else f"NO BROWSER TEST WAS RUN: there is no Chromium: {HOW}"


def executable() -> str | None:
    """The system's Chromium."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def own() -> bool:
    """Returns whether Playwright has downloaded its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        return Path(playwright.chromium.executable_path).exists()


class Page:
    """A page that is open, and all that went wrong in it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.faults: list[str] = []
        self.requests: list[str] = []
        page.on(
            "console", lambda m: self.faults.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: self.faults.append(f"exception: {error}"))
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, path: Path, fragment: str = "") -> Any:
        self.page.goto(f"file://{path}{fragment}")
        self.page.wait_for_selector("html[data-ready=true]", timeout=20_000)
        return self.page

    def undrawn(self) -> list[str]:
        """Figures that take up room and show nothing."""
        return self.page.evaluate(
            """() => {
                const shows = (plot) => plot.querySelectorAll("svg path, svg rect, svg circle, svg line, svg text").length > 0;
                return [...document.querySelectorAll("[data-figure]")].filter((f) => f.getClientRects().length)
                    .filter((f) => !f.dataset.drawn || [...f.querySelectorAll(".plot")].some((plot) => !shows(plot)))
                    .map((f) => f.dataset.figure);
            }"""
        )

    def settle(self, seconds: float = 15.0) -> None:
        """Wait until every figure that can be seen is drawn."""
        until = time.monotonic() + seconds
        while self.undrawn() and time.monotonic() < until:
            self.page.wait_for_timeout(50)

    def wait_for_text(self, selector: str, text: str) -> None:
        """Wait until the element says this: a layer is shown with an event of the browser, after the click has
        returned."""
        from playwright.sync_api import expect

        expect(self.page.locator(selector)).to_have_text(text, timeout=15_000)

    def sideways(self) -> float:
        """Pixels that the page is wider than the window."""
        return self.page.evaluate("() => document.documentElement.scrollWidth - innerWidth")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser to open pages in."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # A test machine is often root in a container, where Chromium has no sandbox.
        browser = playwright.chromium.launch(executable_path=executable(), args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()
