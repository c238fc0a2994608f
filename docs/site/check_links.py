"""Checks that every link, picture and script of the built site leads to a file of it, and every anchor to an element.

python docs/site/check_links.py site
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The targets that a page names, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = {"", "__top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value and tag != "base":
                self.targets.append(value)
            if name in ("id", "name") and value:
                self.anchors.add(value)


def faults(site: Path) -> list[str]:
    """Returns what leads nowhere, and what a page would load from elsewhere."""
    pages = {path: _Page(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for target in page.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            place = (path.parent / unquote(url.path)).resolve() if url.path and not url.path.startswith("/") else path
            # The page for missing addresses has absolute links.
            if path.name == "404.html":
                continue
            if place.is_dir():
                place = place / "index.html"
            known = place in pages
            if not place.is_file() or (known and url.fragment not in pages[place].anchors | _themes(url.fragment)):
                found.append(f"{path.relative_to(site)}: {target}")
    return found


def _themes(fragment: str) -> set[str]:
    """The theme's own words for a picture that only light or only dark pages show."""
    return {fragment} if fragment.startswith("only-") else set()


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    wrong = faults(folder)
    pages = sum(1 for _ in folder.rglob("*.html"))
    sys.stdout.write("\n".join([*wrong, f"{pages} pages, {len(wrong)} links that lead nowhere\n"]))
    sys.exit(bool(wrong) or not pages)
