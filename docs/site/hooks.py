"""Pages of the site that are made from the repository and from the code, when MkDocs builds it.

- Pages of the repository (`PAGES`) and its scripts are taken over, with links that lead to their places on the site.
- `{{ name }}` and `{{ name words }}` in a page are replaced by what `BLOCKS` computes from the library.
- Formats without a page in docs/formats get one; `lq_plugin`'s public names get the API reference.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

import blocks
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
#: Markdown of the repository and its place on the site.
PAGES = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/README.md": "guide.md",
    "examples/formulas.md": "formulas.md",
    "examples/migration.md": "migration.md",
    "lq_plugin/ptq/README.md": "phases.md",
    "tests/LIFECYCLE.md": "promises.md",
}
#: Pages of the repository that stand inside one of the site.
PARTS = {"examples/runtimes.md": "targets.md"}
LANGUAGES = {".py": "python", ".sh": "sh", ".yaml": "yaml"}
_LINK = re.compile(r"(!?\[(?:[^\]\[]|\[[^\]]*\])*\])\(([^)\s]+)\)")
_BLOCK = re.compile(r"^\{\{ (\w+)(?: (.+?))? \}\}$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Fills the navigation's sections of formats and of the API."""
    for section in config.nav:
        if "Formats" in section:
            section["Formats"] = ["formats/index.md", *(f"formats/{page}.md" for page in blocks.format_pages())]
        if "API" in section:
            section["API"] = [{package: f"api/{package}.md"} for package in blocks.PACKAGES]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds what is made here."""
    made: dict[str, str | bytes] = {uri: taken_over(path) for path, uri in PAGES.items()}
    for script in scripts():
        made[site_uri(script)] = (
            f"# {script}\n\n```{LANGUAGES[Path(script).suffix]}\n{(ROOT / script).read_text()}```\n"
        )
    for picture in (ROOT / "examples" / "pictures").glob("*.png"):
        made[f"pictures/{picture.name}"] = picture.read_bytes()
    made |= {f"api/{package}.md": blocks.reference(package) for package in blocks.PACKAGES}
    known = {file.src_uri for file in files}
    for page, names in blocks.format_pages().items():
        if f"formats/{page}.md" not in known:
            made[f"formats/{page}.md"] = blocks.undocumented(names)
    made |= blocks.pictures()
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    # Reached by links of the guide, not by the navigation.
    config.not_in_nav = _unlisted()
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts in what the code says."""
    depth = page.file.src_uri.count("/")
    return _BLOCK.sub(lambda found: blocks.BLOCKS[found[1]](found[2] or "").replace("SITE/", "../" * depth), markdown)


def scripts() -> list[str]:
    """Returns the scripts and settings of examples/ that its guide links to, as paths in the repository."""
    linked = {
        path.removeprefix("./") for path in re.findall(r"\]\(([\w./]+)\)", (ROOT / "examples/README.md").read_text())
    }
    return sorted(f"examples/{path}" for path in linked if Path(path).suffix in LANGUAGES)


def site_uri(path: str) -> str | None:
    """Returns the place on the site of a file of the repository; None: it is not there."""
    if path.startswith("examples/pictures/"):
        return path.removeprefix("examples/")
    if path in PAGES | PARTS:
        return (PAGES | PARTS)[path]
    return f"code/{path.removeprefix('examples/').replace('/', '_')}.md" if path in scripts() else None


def taken_over(path: str) -> str:
    """Returns a page of the repository with links that lead somewhere on the site.

    What is not on the site is named, without a link.

    Args:
        path: in the repository.
    """

    def link(found: re.Match[str]) -> str:
        text, target = found[1], found[2]
        name, _, anchor = target.partition("#")
        if "://" in target or not name:
            return found[0]
        place = normpath(f"{Path(path).parent}/{name}")
        if not (ROOT / place).exists():
            raise FileNotFoundError(f"{path} links to {target}, which is not there")
        uri = site_uri(place)
        if uri is None:
            return f"{text[1:-1]} (`{place}`)" if text.strip("[]`") != place else f"`{place}`"
        there = relpath(uri, str(Path(PAGES[path]).parent))
        return f"{text}({there}{'#' + anchor if anchor else ''})"

    return _LINK.sub(link, (ROOT / path).read_text(encoding="utf-8"))


def _unlisted() -> Any:
    from pathspec import GitIgnoreSpec

    return GitIgnoreSpec.from_lines(["/code/"])
