"""The tables of README and benchmarks/README say what the committed results say, and rows of them can be had again."""

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


def test_the_accuracy_of_every_range() -> None:
    found = results("ptq_accuracy")["results"]
    accuracy = {(row["range"], row["bits"]): row["accuracy"] for row in found if row["rounding"] == "nearest"}
    rows = table(BENCHMARKS, "range", *ptq_accuracy.BITS)
    assert len(rows) == 7
    for row in rows:
        for bits in ptq_accuracy.BITS:
            assert row[bits] == f"{accuracy[row['range'], bits]:.2f}", (row["range"], bits)


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


def test_the_accuracy_of_few_bits() -> None:
    measured = {row["format"]: row for row in results("low_bit")["results"]}
    rows = table(BENCHMARKS, "format", "bits a weight", "accuracy", "below float")
    assert [row["format"] for row in rows] == [measured[name]["spec"] or name for name in measured]
    for row, found in zip(rows, measured.values(), strict=True):
        assert row["accuracy"] == f"{found['accuracy']:.2f}"
        assert row["below float"] in ("", f"{measured['float']['accuracy'] - found['accuracy']:.2f}")
        assert float(row["bits a weight"]) == pytest.approx(found["effective_bits"], abs=0.005)


STEPS = {
    "QAT(plan)": "lq native",
    "the same, LQ_NATIVE=0": "lq pure",
    "QAT(plan), LQ_NATIVE=0": "lq pure",
    'QAT(plan, forward="integer")': "lq integer",
    "QAT(plan) in torch.compile": "lq compiled",
    "float in torch.compile": "float compiled",
    "float, channels last": "float channels_last",
    "torchao pt2e": "torchao pt2e",
    "torch.ao": "torch.ao",
    "Brevitas, its first 300 steps": "brevitas collecting",
    "Brevitas, later": "brevitas learned",
}
MODELS = {"ResNet-20": "r20", "ResNet-18": "r18", "encoder": "encoder"}


def test_the_cost_of_a_step() -> None:
    ratio = {
        (row["implementation"], row["model"]): row["ratio"]
        for row in results("qat_step")["results"]
        if row["setting"] == "W8A8"
    }
    for row in table(BENCHMARKS, "W8A8", *MODELS):
        for model, key in MODELS.items():
            expected = ratio.get((STEPS[row["W8A8"]], key))
            assert row[model] == ("" if expected is None else f"{expected:.2f}"), (row["W8A8"], model)


def test_the_speed_of_files() -> None:
    speed = {(r["case"], r["runtime"], r["setting"]): r["over_best_float"] for r in results("deploy")["results"]}
    cases = {
        "ResNet-20, 1 image": "r20_b1",
        "ResNet-20, 128": "r20_b128",
        "ResNet-18 at 224, 1 image": "r18_b1",
        "ResNet-18 at 224, 16": "r18_b16",
    }
    columns = ("", "ONNX Runtime int8", "int4", "int2", "OpenVINO int8", "int4")
    lines = (ROOT / BENCHMARKS).read_text(encoding="utf-8").partition(f"| {' | '.join(columns)} |")[2].splitlines()[2:6]
    kinds = [("onnxruntime", "int8"), ("onnxruntime", "int4"), ("onnxruntime", "int2")]
    kinds += [("openvino", "int8"), ("openvino", "int4")]
    for line in lines:
        name, *cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        assert cells == [f"{speed[(cases[name], *kind)]:.1f}" for kind in kinds], name


def test_the_plans_of_searches() -> None:
    best = results("search")["best_at"]
    rows = table(BENCHMARKS, "at most", "ours, 200 trials", "greedy path", "best uniform plan")
    for row in rows:
        found = best[row["at most"].split()[0]]
        assert [row["ours, 200 trials"], row["greedy path"], row["best uniform plan"]] == [
            f"{found[name]:.2f}" for name in ("ours", "greedy", "uniform")
        ]


def test_the_summary_of_the_readme() -> None:
    """Its figures stand in the tables of the benchmarks, which the tests above compare with the results."""
    accuracy = {row["range"]: row for row in table(BENCHMARKS, "range", *ptq_accuracy.BITS)}
    rounding = {row["rounding"]: row for row in table(BENCHMARKS, "rounding", "W4A8", "W4A4", "W3A8", "W2A8")}
    (front,) = (
        row
        for row in table(BENCHMARKS, "at most", "ours, 200 trials", "greedy path", "best uniform plan")
        if row["at most"] == "3.5 bits"
    )
    steps = {row["W8A8"]: row["ResNet-18"] for row in table(BENCHMARKS, "W8A8", *MODELS)}
    speed = next(
        row["over_best_float"]
        for row in results("deploy")["results"]
        if (row["case"], row["runtime"], row["setting"]) == ("r18_b1", "onnxruntime", "int8")
    )
    learned = rounding["by block, 300 (default)"]["W2A8"].partition(",")[0]
    peers = f"{steps['torch.ao']} torch.ao, {steps['Brevitas, later']} Brevitas"
    expected = [
        (accuracy["mse"]["W4A8"] + " %", f"{results('ptq_accuracy')['float']:.2f} % float"),
        (learned + " %", rounding["nearest"]["W2A8"] + " % to nearest"),
        (front["ours, 200 trials"] + " %", front["best uniform plan"] + " %, the best uniform plan"),
        (steps["QAT(plan)"] + " of the float step", peers),
        (f"{speed:.1f} times faster", "the best float runtime, with VNNI"),
    ]
    rows = table("README.md", "", "here", "to compare with")
    assert [(row["here"], row["to compare with"]) for row in rows] == expected


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
