"""The pages of the guide and the README: their code is that of tested scripts or runs, their links and numbers hold."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shlex
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml

from benchmarks.qsnr import COLUMNS, DATA, ROWS, quantized
from lq_plugin import QAT, QuantPlan, QuantSpec, calibrate, prepare
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.model.measure.cost import spec_bits
from lq_plugin.ptq.phases import PHASES
from tests.examples.conftest import EXAMPLES
from tests.examples.test_migration import FAST

ROOT = EXAMPLES.parent
PAGES = [ROOT / "README.md", *sorted(EXAMPLES.glob("*.md"))]
SOURCES = "\n".join(
    path.read_text(encoding="utf-8") for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("cluster/**/*.yaml")]
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(path: Path, kind: str) -> list[str]:
    return [text for language, text in BLOCK.findall(path.read_text(encoding="utf-8")) if language == kind]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_kinds_of_blocks(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    for target in targets:
        name, _, anchor = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        assert page.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target
    assert {language for language, _ in BLOCK.findall(text)} <= {"python", "sh", "yaml", "diff", "text"}


def test_the_guide_shows_code_of_its_scripts() -> None:
    found = blocks(EXAMPLES / "README.md", "python") + blocks(EXAMPLES / "README.md", "yaml")
    assert len(found) >= 7
    for text in found:
        assert text in SOURCES, text


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(path: Path) -> None:
    commands = {entry.name for entry in entry_points(group="console_scripts") if entry.value.startswith("lq_plugin.")}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in "\n".join(blocks(path, "sh")).splitlines():
        words = [word for word in shlex.split(line, comments=True) if "=" not in word or word.startswith("-")]
        if not words:
            continue
        if words[0] in ("python", "make") or words[0].startswith("examples/"):
            if words[1:2] == ["-m"]:
                assert importlib.util.find_spec(words[2]), line
                continue
            script = words[0] if words[0].startswith("examples/") else words[1]
            known = script in targets if words[0] == "make" else (ROOT / script).is_file() or script == "src/train.py"
            assert known, line
        else:
            assert words[0] in commands or words[0] == "pip", line


def test_every_script_stands_in_the_guide() -> None:
    guide = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".md")} - {
        "README.md",
        "docs_pictures.py",
    }
    assert {name for name in scripts if f"]({name})" not in guide} == set()


def test_plans_of_the_readme_can_be_read() -> None:
    for text in blocks(ROOT / "README.md", "yaml"):
        assert QuantPlan.parse(yaml.safe_load(text)).rules
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| write | get |")[2].partition("\n\n")[0]
    written = [
        plan for cell in re.findall(r"^\| (.*?) \|", table, re.MULTILINE) for plan in re.findall(r"`([^`]+)`", cell)
    ]
    assert len(written) > 12
    for plan in written:
        assert plan == "plan.yaml" or QuantPlan.parse(plan).rules, plan
    named = re.findall(r"^\| `(\w+)`(?:, `(\w+)`)? \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(PHASES) <= {name for pair in named for name in pair}


def brief_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Trainer takes few batches; loggers and checkpoints stay as the page has them."""
    whole = lightning.Trainer.__init__
    short = {name: value for name, value in FAST.items() if name not in ("logger", "enable_checkpointing")}

    def brief(self: Any, *args: Any, **options: Any) -> None:
        whole(self, *args, **(options | short))

    monkeypatch.setattr(lightning.Trainer, "__init__", brief)


@pytest.mark.filterwarnings("ignore:QuantMonitor. the Trainer has no logger", "ignore:.*weights_only.*")
def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    brief_trainers(monkeypatch)
    torch.manual_seed(0)
    batches = [torch.rand(8, 1, 8, 8)]
    Path("plan.yaml").write_text("rules: [{match: '*', weight: int4, input: uint8 affine ema}]\n")
    trained = DigitsCNN(width=4)
    trainer = lightning.Trainer(callbacks=[QAT("w4a8")], **FAST)
    trainer.fit(trained, datamodule=DigitsDataModule())
    trainer.save_checkpoint("quantized.ckpt")
    found = blocks(ROOT / "README.md", "python")
    assert len(found) >= 4
    for text in found:
        model = DigitsCNN(width=4)
        if "prepare(" not in text:
            prepare(model, "sign / sign" if "use_xnor" in text else "w4a8")
            calibrate(model, batches)
        space: dict[str, Any] = {"model": model, "x": torch.rand(2, 1, 8, 8), "batches": batches}
        space["MyModule"] = partial(DigitsCNN, width=4)
        space["Trainer"] = partial(lightning.Trainer, **FAST)
        exec("from lq_plugin import *", space)
        exec(text, space)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    written = re.findall(r"^\| `(runs/[^`]+)` \|", page, re.MULTILINE)
    assert len(written) == 3
    assert all((tmp_path / name).exists() for name in written)
    assert (tmp_path / "runs/first/quant/report.html").is_file()


def numbers(cell: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\.?\d*", cell.replace("*", ""))]


def table(title: str) -> list[list[str]]:
    """Rows of the first table behind a title of the benchmarks' page, or of the README."""
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("benchmarks/README.md", "README.md")]
    lines = next(page for page in pages if f"\n{title}\n" in page).partition(f"\n{title}\n")[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_summary_is_of_the_benchmarks() -> None:
    (w4, w2, searched, step, speed) = table("## What it keeps, costs and gains")[1:]
    ranges = {(r["bits"], r["range"]): r["accuracy"] for r in result("ptq_accuracy")["results"]}
    assert numbers(w4[1]) == [ranges["W4A8", "mse"]]
    learned = {(r["bits"], r["rounding"]): r["accuracy"] for r in result("ptq_rounding")["results"]}
    assert numbers(w2[1]) + numbers(w2[2]) == [learned["W2A8", "brecq"], learned["W2A8", "nearest"]]
    best = result("search")["best_at"]["3.5"]
    assert numbers(searched[1]) + numbers(searched[2]) == [best["ours"], best["uniform"]]
    measured = [r for r in result("qat_step")["results"] if (r["model"], r["setting"]) == ("r18", "W8A8")]
    steps = {r["implementation"]: r["ratio"] for r in measured}
    shown = [steps["lq native"], steps["torch.ao"], steps["brevitas learned"]]
    assert [numbers(step[1])[0], *numbers(step[2])] == [round(ratio, 2) for ratio in shown]
    faster = {(r["case"], r["runtime"], r["setting"]): r["over_best_float"] for r in result("deploy")["results"]}
    assert numbers(speed[1]) == [round(faster["r18_b1", "onnxruntime", "int8"], 1)]


def test_the_ranges_table_is_that_of_the_benchmark() -> None:
    head, *rows = table("## Accuracy without training")
    measured = {(r["bits"], r["range"]): r["accuracy"] for r in result("ptq_accuracy")["results"]}
    for row in rows:
        for bits, cell in zip(head[1:], row[1:], strict=True):
            assert numbers(cell) == [measured[bits, row[0].strip("`")]], (row[0], bits)


def test_the_low_bit_table_is_that_of_the_benchmark() -> None:
    content = result("low_bit")
    measured = {r["format"]: r for r in content["results"]} | {r["spec"]: r for r in content["results"] if r["spec"]}
    for name, bits, accuracy, _below in table("## Training at one and two bits")[1:]:
        row = measured[name.strip("`")]
        assert numbers(accuracy) == [row["accuracy"]], name
        assert numbers(bits)[0] == pytest.approx(row["effective_bits"], abs=0.011), name


def test_the_format_table_is_what_its_specs_compute() -> None:
    samples = {
        kind: DATA[kind]((ROWS, COLUMNS), torch.Generator().manual_seed(0)).double()
        for kind in ("gaussian", "laplace", "relu")
    }
    for title, bits, *cells in table("## What the formats keep")[1:]:
        specs = [QuantSpec.parse(text) for text in re.findall(r"`(.+?)`", title)]
        assert numbers(bits) == pytest.approx([spec_bits(specs[0], (ROWS, COLUMNS)) / (ROWS * COLUMNS)], abs=0.01), (
            title
        )
        for (kind, x), cell in zip(samples.items(), cells, strict=True):
            error = x - quantized(x.float(), specs[-1] if kind == "relu" else specs[0])
            assert numbers(cell) == pytest.approx(
                [10 * math.log10(x.square().sum() / error.square().sum())], abs=0.0501
            ), (title, kind)


STEPS = {
    "`QAT(plan)`": "lq native",
    "the same, `LQ_NATIVE=0`": "lq pure",
    '`QAT(plan, forward="integer")`': "lq integer",
    "`QAT(plan)` in torch.compile": "lq compiled",
    "float in torch.compile": "float compiled",
    "float, channels last": "float channels_last",
    "torch.ao": "torch.ao",
    "torchao pt2e": "torchao pt2e",
    "Brevitas, its first 300 steps": "brevitas collecting",
    "Brevitas, later": "brevitas learned",
}


def test_the_step_table_is_that_of_the_benchmark() -> None:
    measured = {(r["model"], r["setting"], r["implementation"]): r for r in result("qat_step")["results"]}
    rows = table("## What training costs")[1:]
    assert [row[0] for row in rows] == list(STEPS)
    for name, *cells in rows:
        for model, cell in zip(("r20", "r18", "encoder"), cells, strict=True):
            ratio = measured.get((model, "W8A8", STEPS[name]), {}).get("ratio")
            assert numbers(cell) == ([] if ratio is None else [round(ratio, 2)]), (name, model)


def test_the_table_under_autocast_is_that_of_the_benchmark() -> None:
    measured = {(r["model"], r["setting"], r["implementation"]): r for r in result("qat_step_bf16")["results"]}
    rows = table("### Under bf16 autocast")[1:]
    assert len(rows) == 8
    for setting, name, *cells in rows:
        for model, cell in zip(("r20", "r18", "encoder"), cells, strict=True):
            row = measured.get((model, setting, STEPS.get(name, name)), {})
            said = [] if row.get("ratio") is None else [round(row["ratio"], 2), round(row["saved_mb"])]
            assert numbers(cell) == said, (setting, name, model)


def test_the_table_of_exported_models_is_that_of_the_benchmark() -> None:
    measured = {(r["case"], r["runtime"], r["setting"]): r["over_best_float"] for r in result("deploy")["results"]}
    columns = [
        ("onnxruntime", "int8"),
        ("onnxruntime", "int4"),
        ("onnxruntime", "int2"),
        ("openvino", "int8"),
        ("openvino", "int4"),
    ]
    for case, (_, *cells) in zip(
        ("r20_b1", "r20_b128", "r18_b1", "r18_b16"), table("## What inference gains")[1:], strict=True
    ):
        assert [numbers(cell) for cell in cells] == [[round(measured[(case, *column)], 1)] for column in columns], case


def test_the_search_table_is_that_of_the_benchmark() -> None:
    content = result("search")
    for size, *cells in table("## What a search finds")[1:]:
        best = content["best_at"][f"{numbers(size)[0]:.1f}"]
        assert [numbers(cell) for cell in cells] == [[best[name]] for name in ("ours", "greedy", "uniform")], size
    found = content["hypervolume"]
    assert found["ours"]["25"] > max(found["tpe"]["1000"], found["nsga2"]["1000"]), (
        "what the sentence above the table says"
    )
