"""Tables of benchmarks/README about PTQ say what the committed results say, and rows of them can be had again.

The other tables are compared in tests/examples/test_pages.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ptq_accuracy
from lq_plugin.demo.cifar10 import DataError, load_images, normalize
from lq_plugin.demo.resnet import load_resnet

ROOT = Path(__file__).parents[2]
Rows = list[dict[str, str]]


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def tables(page: str) -> list[Rows]:
    """All tables of a page, their cells by column; marks of bold and code are left out."""
    text = re.sub(r"[*`]", "", (ROOT / page).read_text(encoding="utf-8"))
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def table(page: str, *columns: str, number: int = 0) -> Rows:
    """The table with these columns; `number`: which one of several."""
    return [rows for rows in tables(page) if tuple(rows[0]) == columns][number]


BENCHMARKS = "benchmarks/README.md"
WIDTHS = ("W4A8", "W3A8", "W2A8")


LABELS = {
    "nearest": ("nearest", None),
    "by block, 300 (default)": ("brecq", 300),
    "by block, 300 iterations": ("brecq", 300),
    "by layer, 300 (one seed)": ("adaround", 300),
    "by layer, 300 iterations": ("adaround", 300),
    "gptq": ("gptq", 0),
    "gptaq": ("gptaq", 0),
}


@pytest.mark.parametrize(
    ("name", "columns", "number"),
    [
        ("ptq_rounding", ("W4A8", "W4A4", "W3A8", "W2A8"), 0),
        ("ptq_rounding_vit", WIDTHS, 0),
        ("ptq_gptaq_vit", WIDTHS, 1),
    ],
)
def test_the_accuracy_of_every_rounding(name: str, columns: tuple[str, ...], number: int) -> None:
    measured = results(name)["results"]
    accuracy = {(row["rounding"], row.get("iterations"), row["bits"]): row["accuracy"] for row in measured}
    curves = {(row["rounding"], row["bits"]): dict(point[:2] for point in row.get("curve", ())) for row in measured}
    for row in table(BENCHMARKS, "rounding", *columns, number=number):
        for bits in columns:
            said = row[bits].partition(",")[0]
            if row["rounding"] in LABELS:
                assert said == f"{accuracy[(*LABELS[row['rounding']], bits)]:.2f}", (row["rounding"], bits)
            else:
                iterations = int(row["rounding"].split()[2])
                assert said == f"{curves['brecq', bits][iterations]:.2f}", (row["rounding"], bits)


def test_the_accuracy_of_formats_and_the_share_won_back() -> None:
    rows = table(BENCHMARKS, "model", "format", "nearest", "gptq", "gptaq", "by block, 300")
    assert len(rows) == 4
    for row in rows:
        found = results("ptq_formats_resnet" if row["model"].startswith("ResNet") else "ptq_formats_vit")
        nearest = next(
            r["accuracy"] for r in found["results"] if (r["bits"], r["rounding"]) == (row["format"], "nearest")
        )
        assert row["nearest"] == f"{nearest:.2f}"
        for column, rounding in (("gptq", "gptq"), ("gptaq", "gptaq"), ("by block, 300", "brecq")):
            said, _, share = row[column].partition(" (")
            if not said:
                continue
            accuracy = next(
                r["accuracy"] for r in found["results"] if (r["bits"], r["rounding"]) == (row["format"], rounding)
            )
            assert said == f"{accuracy:.2f}"
            if share:
                assert share == f"{100 * (accuracy - nearest) / (found['float'] - nearest):.0f} %)"


@pytest.fixture(scope="module")
def cifar() -> Any:
    """The float ResNet-20, calibration batches and test images of the benchmark, where the data is."""
    options = ptq_accuracy.parse([])
    try:
        images, labels = load_images(options.data, "test")
        train, _ = load_images(options.data, "train", 0, ptq_accuracy.CALIBRATION_IMAGES)
    except DataError as error:
        pytest.skip(f"needs CIFAR-10 and the weights: {error}")
    batches = list(normalize(train).split(ptq_accuracy.BATCH_SIZE))
    return load_resnet(options.data / options.weights, 20), batches, (normalize(images), labels)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "range_name"), [("W4A8", "mse"), ("W3A8", "percentile"), ("W2A8", "kl")])
def test_rows_of_the_accuracy_table_can_be_had_again(bits: str, range_name: str, cifar: Any) -> None:
    model, calibration, (images, labels) = cifar
    said = {row["range"]: row for row in table(BENCHMARKS, "range", *ptq_accuracy.BITS)}[range_name][bits]
    quantized = ptq_accuracy.quantized(model, *ptq_accuracy.specs(bits, range_name), calibration)
    # Convolutions of other processors sum in another order: near ties round the other way.
    assert ptq_accuracy.accuracy(quantized, images, labels) == pytest.approx(float(said), abs=0.3)
