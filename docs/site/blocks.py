"""Parts of the code that the site's pages show: tables, pictures of levels, the API reference."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import levels

from lq_plugin import QuantPlan, QuantSpec
from lq_plugin.export.target import TARGETS, Target, markdown as targets_table
from lq_plugin.intent.formats import FORMATS
from lq_plugin.intent.granularity import PerGroup
from lq_plugin.intent.plan import FLOAT
from lq_plugin.model.measure.cost import spec_bits
from lq_plugin.report.defaults import markdown as defaults_table

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: Packages of the API reference, and what each is for.
PACKAGES = {
    "lq_plugin": "Callbacks, plans and the four functions for work without Lightning.",
    "lq_plugin.callbacks": "All callbacks, with what they have in common.",
    "lq_plugin.intent": "Specs, plans and schedules: plain values, without torch.",
    "lq_plugin.search": "The search over bits, its spaces and results.",
    "lq_plugin.export": "Files for runtimes, and the check that they are right.",
    "lq_plugin.report": "The report page and its data.",
    "lq_plugin.model": "A whole model: prepare, calibrate, measure, remove.",
    "lq_plugin.ptq": "Algorithms after training, as phases.",
    "lq_plugin.ranges": "Range estimators, and the door for your own.",
    "lq_plugin.quantizers": "Quantizer modules, and the door for a format of your own.",
    "lq_plugin.functional": "The arithmetic, as functions on tensors.",
    "lq_plugin.plots": "Figures for papers and loggers.",
    "lq_plugin.errors": "What is raised on bad input.",
}
#: Where the names of a package without such a list stand.
_NAMES = {
    "lq_plugin.callbacks": ["QuantizationCallback", "QAT", "PTQ", "Export", "QuantMonitor", "Distillation"],
    "lq_plugin.intent": ["QuantPlan", "Rule", "QuantSpec", "Schedule", "PerTensor", "PerChannel", "PerGroup", "Format"],
    "lq_plugin.ptq": ["PhaseContext", "register_phase", "run_phases"],
    "lq_plugin.model": [
        "prepare", "calibrate", "remove", "load_checkpoint", "record", "Ledger", "Entry", "Statistics",
        "collect_statistics", "quantized_layers", "quantizers",
    ],
}  # fmt: skip
_HOMES = {
    "lq_plugin.callbacks": ["base", "qat", "ptq", "export", "monitor", "distill"],
    "lq_plugin.intent": ["plan", "spec", "schedule", "granularity", "formats"],
}


@cache
def _own_pages() -> dict[str, tuple[str, ...]]:
    """The pages of docs/formats by name, with the formats that each is about."""
    found = {}
    for path in sorted((DOCS / "formats").glob("*.md")):
        if named := re.findall(r"^\{\{ facts (.+) \}\}$", path.read_text(), re.MULTILINE):
            found[path.stem] = tuple(word for words in named for word in words.split())
    order = list(FORMATS)
    return dict(sorted(found.items(), key=lambda page: order.index(_format(page[1][0]))))


def format_pages() -> dict[str, tuple[str, ...]]:
    """Returns the pages of formats by name, with the spellings that each is about; every format has one."""
    pages = _own_pages()
    covered = {_format(word) for words in pages.values() for word in words}
    return pages | {name: kind.spellings(name)[:1] for name, kind in FORMATS.items() if name not in covered}


def undocumented(words: tuple[str, ...]) -> str:
    """Returns the page of a format that has none of its own: what its declaration says."""
    listed = " ".join(words)
    return f"# {listed}\n\n{{{{ facts {listed} }}}}\n\n{{{{ formulas {listed} }}}}\n\n{{{{ levels {listed} }}}}\n"


def _spec(text: str) -> QuantSpec:
    return QuantSpec.parse(text)


def _format(text: str) -> str:
    return _spec(text).format_name


def facts(words: str) -> str:
    """Returns the table of some formats: bits with everything stored, what shares a scale, for which tensors."""
    rows = [
        "| write | bits of an element | stored, 64 × 512 weights | one scale for | tensors |",
        "|---|---|---|---|---|",
    ]
    for word in words.split():
        spec = _spec(word)
        stored = f"{spec_bits(spec, (64, 512)) / (64 * 512):.4g}" if "weight" in spec.kind.slots else "–"
        shared = spec.granularity
        scale = f"{shared.group_size} elements" if isinstance(shared, PerGroup) else _SHARED[type(shared).__name__]
        rows.append(f"| `{word}` | {spec.bit_width} | {stored} | {scale} | {', '.join(spec.kind.slots)} |")
    said = [f"* `{name}`: {FORMATS[name].summary}." for name in dict.fromkeys(map(_format, words.split()))]
    return "\n".join([*rows, "", *said])


_SHARED = {"PerTensor": "tensor", "PerChannel": "output channel"}


def formulas(words: str) -> str:
    """Returns the rows of examples/formulas.md whose spec is of these formats."""
    wanted = {_format(word) for word in words.split()}
    page = (ROOT / "examples" / "formulas.md").read_text(encoding="utf-8")
    rows = [
        line for line in page.splitlines() if (found := re.match(r"\| `([^`]+)` \|", line)) and _is_of(found[1], wanted)
    ]
    return "\n".join(["| write | formula | code | source |", "|---|---|---|---|", *rows]) if rows else ""


def _is_of(text: str, wanted: set[str]) -> bool:
    try:
        rule = QuantPlan.parse(text).rules[0]
    except ValueError:
        return False
    return any(spec not in (None, FLOAT) and spec.format_name in wanted for spec in (rule.weight, rule.input))  # type: ignore[union-attr]


def pictures_of(words: str) -> str:
    """Returns the pictures of some specs, separated by ` | `, one for light and one for dark pages."""
    lines = []
    for text in words.split(" | "):
        lines += [f"![Levels of {text}](SITE/{_picture(text, theme)}#only-{theme})" for theme in levels.COLOURS]
    return "\n".join(lines)


def pictures() -> dict[str, str | bytes]:
    """Returns all pictures of levels that pages ask for, by their place on the site."""
    asked = [
        words
        for path in DOCS.rglob("*.md")
        for words in re.findall(r"^\{\{ levels (.+) \}\}$", path.read_text(), re.MULTILINE)
    ]
    own = _own_pages()
    asked += [" | ".join(words) for page, words in format_pages().items() if page not in own]
    specs = dict.fromkeys(text for words in asked for text in words.split(" | "))
    return {_picture(text, theme): levels.draw(text, theme) for text in specs for theme in levels.COLOURS}


def _picture(text: str, theme: str) -> str:
    return f"levels/{re.sub(r'[^a-z0-9]+', '_', text)}_{theme}.svg"


def formats_table(_: str) -> str:
    """Returns the table of all formats with their pages."""
    home = {_format(word): page for page, words in format_pages().items() for word in words}
    rows = [
        f"| [`{'`, `'.join(kind.spellings(name))}`]({home[name]}.md) | {kind.summary} |"
        for name, kind in FORMATS.items()
    ]
    return "\n".join(["| write | |", "|---|---|", *rows])


def target_details(_: str) -> str:
    """Returns what each target's files hold, as the registry has it."""
    rows = ["| target | weights | inputs | options | runtimes |", "|---|---|---|---|---|"]
    for target in TARGETS.values():
        anything = type(target).spec_fault is Target.spec_fault
        specs = ["every spec" if anything else _list(target.takes.get(slot, ())) for slot in ("weight", "input")]
        options = _list([option.name for option in target.options])
        rows.append(f"| `{target.name}` | {specs[0]} | {specs[1]} | {options} | {_list(target.runtimes)} |")
    return "\n".join(rows)


def _list(words: Any) -> str:
    return ", ".join(f"`{word}`" for word in words) or "–"


def included(path: str) -> str:
    """Returns a page's text without its title."""
    return (ROOT / path).read_text(encoding="utf-8").partition("\n")[2]


def section(title: str) -> str:
    """Returns the text under a title of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"README.md has no section {title!r}")
    return found[1].strip()


def drawing(name: str) -> str:
    """Returns an SVG of docs/drawings to stand in the page, where it has the page's colours."""
    return f"<div>{(DOCS / 'drawings' / f'{name}.svg').read_text()}</div>"


def reference(package: str) -> str:
    """Returns the API page of a package."""
    parts = [f"# {package}", PACKAGES[package]]
    for name in names(package):
        parts.append(f"::: {address(package, name)}")
    return "\n\n".join(parts) + "\n"


def names(package: str) -> list[str]:
    """Returns the public names of a package: classes and functions."""
    module = importlib.import_module(package)
    if package in _NAMES:
        return _NAMES[package]
    if package == "lq_plugin.errors":
        return [
            name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, Exception)
        ]
    listed = getattr(module, "__all__", None) or re.findall(r"\b(\w+) as \1\b", Path(str(module.__file__)).read_text())
    return [name for name in dict.fromkeys(listed) if _is_ours(getattr(module, name))]


def _is_ours(value: Any) -> bool:
    return (
        callable(value)
        and str(getattr(value, "__module__", "")).startswith("lq_plugin")
        and hasattr(value, "__qualname__")
    )


def address(package: str, name: str) -> str:
    """Returns the import path of the file that defines a name."""
    for home in [package, *(f"{package}.{room}" for room in _HOMES.get(package, []))]:
        value = getattr(importlib.import_module(home), name, None)
        if value is not None:
            return f"{value.__module__}.{value.__qualname__}"
    raise AttributeError(f"{package} has no {name}")


BLOCKS: dict[str, Callable[[str], str]] = {
    "defaults": lambda _: defaults_table(),
    "drawing": drawing,
    "facts": facts,
    "formats": formats_table,
    "formulas": formulas,
    "include": included,
    "levels": pictures_of,
    "readme": section,
    "target_details": target_details,
    "targets": lambda _: targets_table(),
}
