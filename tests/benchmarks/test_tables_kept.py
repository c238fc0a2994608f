"""Tables of times, memory, searches and files in benchmarks/README say what the committed results say.

They cannot be had again in a test: times are of a machine, searches take hours. `test_tables_again` computes rows of
those that can.
"""

from __future__ import annotations

import re

import pytest

from tests.benchmarks.test_tables import BENCHMARKS, ROOT, results

MODELS = {"ResNet-20": "r20", "ResNet-18": "r18", "encoder": "encoder"}
STEPS = {
    "QAT(plan)": "lq native",
    "QAT(plan), LQ_NATIVE=0": "lq pure",
    "the same, LQ_NATIVE=0": "lq pure",
    "LQ_NATIVE=0": "lq pure",
    'QAT(plan, forward="integer")': "lq integer",
    "QAT(plan) in torch.compile": "lq compiled",
    "float": "float",
    "float in torch.compile": "float compiled",
    "float, channels last": "float channels_last",
    "torch.ao": "torch.ao",
    "torchao pt2e": "torchao pt2e",
    "torchao MXTensor": "torchao MXTensor",
    "Brevitas, its first 300 steps": "brevitas collecting",
    "Brevitas, later": "brevitas learned",
}
RUNTIMES = {
    "ONNX Runtime": "onnxruntime",
    "OpenVINO": "openvino",
    "ExecuTorch": "executorch",
    "LiteRT": "ai_edge_litert",
}


def with_head(*head: str, number: int = 0) -> list[list[str]]:
    """The rows of the table with this head, without marks of bold and code; `number`: which one of several."""
    text = re.sub(r"[*`]", "", (ROOT / BENCHMARKS).read_text(encoding="utf-8"))
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        first, _, *rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in block.splitlines()]
        if tuple(first) == head:
            found.append(rows)
    return found[number]


@pytest.mark.parametrize(
    ("name", "head", "number", "setting"),
    [
        ("qat_step", ("", ""), 0, None),
        ("qat_step_avx2", ("W4A8",), 0, "W4A8"),
        ("qat_step_avx2", ("threads", "", ""), 0, None),
        ("qat_step_formats", ("", ""), 1, None),
    ],
)
def test_steps(name: str, head: tuple[str, ...], number: int, setting: str | None) -> None:
    measured = {
        (row.get("threads", 1), row["setting"], row["implementation"], row["model"]): row["ratio"]
        for row in results(name)["results"]
    }
    rows = with_head(*head, *MODELS, number=number)
    assert rows
    for row in rows:
        *before, label = row[:-3]
        threads = int(before.pop(0)) if head[0] == "threads" else 1
        (given,) = [setting] if setting else before
        for model, cell in zip(MODELS.values(), row[-3:], strict=True):
            ratio = measured.get((threads, given, STEPS[label], model))
            assert cell == ("" if ratio is None else f"{ratio:.2f}"), (row, model)


def test_bytes_saved_for_backward() -> None:
    measured = {
        (row["implementation"], row["model"]): row["saved_mb"]
        for row in results("qat_step")["results"]
        if row["setting"] == "W8A8"
    }
    for label, *cells in with_head("saved for backward, MB", *MODELS):
        for model, cell in zip(MODELS.values(), cells, strict=True):
            assert cell == f"{measured[STEPS[label], model]:.0f}", (label, model)


def test_exported_models_without_vnni() -> None:
    columns = [("ONNX Runtime", bits) for bits in ("int8", "int4", "int2")]
    columns += [("OpenVINO", bits) for bits in ("int8", "int4")]
    measured = {
        (row["case"], row["runtime"], row["setting"]): row["over_best_float"]
        for row in results("deploy_avx2")["results"]
    }
    rows = with_head("", "ONNX Runtime int8", "int4", "int2", "OpenVINO int8", "int4", number=1)
    for case, (_, *cells) in zip(("r20_b1", "r20_b128", "r18_b1", "r18_b16"), rows, strict=True):
        said = [f"{measured[case, RUNTIMES[runtime], bits]:.2f}" for runtime, bits in columns]
        assert cells == said, case


def test_hypervolumes() -> None:
    found = results("search")["hypervolume"]
    trials = ("25", "50", "100", "200", "400", "700", "1000")
    for label, *cells in with_head("hypervolume after", *trials):
        curve = found[{"ours": "ours", "plain TPE": "tpe", "NSGA-II": "nsga2"}[label]]
        assert cells == [f"{curve[count]:.3f}" if count in curve else "" for count in trials], label


def test_plans_next_to_those_of_modelopt() -> None:
    found = results("search_affine")
    names = ("ours", "refine", "modelopt", "greedy", "uniform")
    head = ("surrogate, 200 trials", "tpe, 200 trials", "ModelOpt, 61 plans", "greedy path, 139 plans")
    *rows, (_, *volumes) = with_head("at most", *head, "best uniform plan")
    assert [label for label, *_ in rows] == ["4.0 bits", "3.5 bits", "3.0 bits"]
    for label, *cells in rows:
        assert cells == [f"{found['best_at'][label.split()[0]][name]:.2f}" for name in names], label
    counts = ("200", "200", "61", "139", "7")
    curves = found["hypervolume"]
    assert volumes == [f"{curves[name][count]:.3f}" for name, count in zip(names, counts, strict=True)]


def test_fronts_that_are_known() -> None:
    found = results("search_enumerated")["enumerated"]["summary"]
    rows = with_head("", "40 trials", "100 trials", "hypervolume, 40", "hypervolume, 100")
    names = {"surrogate": "surrogate", "tpe after seeds": "refine", "plain TPE": "tpe", "NSGA-II": "nsga2"}
    assert [label for label, *_ in rows] == list(names)
    for label, *cells in rows:
        kept = found[names[label]]
        said = [
            ", ".join(f"{kept[f'{what}_{which}'][mark]:.{digits}f}" for which in ("median", "least"))
            for what, digits in (("share_of_front", 2), ("hypervolume", 4))
            for mark in (0, 1)
        ]
        assert cells == said, label
    text = re.sub(r"\s+", " ", (ROOT / BENCHMARKS).read_text(encoding="utf-8"))
    for label, name in (("`surrogate`", "surrogate"), ("`tpe` after seeds", "refine"), ("plain TPE", "tpe")):
        volumes = results("search_deep")["deep"][name]["hypervolume"]
        assert f"{label} {', '.join(f'{volume:.3f}' for volume in volumes)}" in text


def test_calibration() -> None:
    measured = {row["model"]: row["over_forward_pass"] for row in results("calibration")["results"]}
    rows = with_head("forward passes", *MODELS)
    for label, *cells in rows:
        key = label.replace("ours, ", "lq ").replace("statistics alone", "collect").replace("all seven", "all")
        for model, cell in zip(MODELS.values(), cells, strict=True):
            ratio = measured[model].get(key)
            assert cell == ("" if ratio is None else f"{ratio['ratio']:.2f}"), (label, model)
    shown = {label.split(", ")[1] for label, *_ in rows if label.startswith("ours")}
    assert {"kl", "mse", "octav", "all seven"} <= shown


def test_files_in_their_runtimes() -> None:
    found = [row for row in results("targets")["results"] if row["target"] != "tensorrt"]  # read by ONNX Runtime, too
    head = "model", "runtime", "within one step", "agreement", "integer products", "accuracy, model's", "over its float"
    assert len(with_head(*head)) == sum(row["model"] != "llama" for row in found)
    measured = {(row["model"], row["plan"], row["runtime"], row["target"] == "openvino"): row for row in found}
    for case, runtime, within, agreement, integer, accuracy, over_float in with_head(*head):
        row = measured[(*case.split(), RUNTIMES[runtime.removesuffix(", .xml")], runtime.endswith(", .xml"))]
        assert within == f"{100 * row['within_one_step']:.2f} %", (case, runtime)
        assert agreement == f"{100 * row['agreement']:.2f} %"
        assert integer == f"{row['integer']} of {row['products']}"
        both = f"{row['accuracy']:.1f}, {row['model_accuracy']:.1f}" if "accuracy" in row else ""
        assert accuracy == both
        assert over_float == f"{row['over_float']:.2f}"


def test_the_pretrained_transformer() -> None:
    found = results("ptq_transformer")["results"]
    measured = {(row["plan"], row["method"]): row for row in found}
    rows = with_head("plan", "method", "accuracy", "loss", "divergence", "won back")
    assert len(rows) == len(found)
    for plan, method, accuracy, loss, divergence, won in rows:
        row = measured[plan, method]
        assert (accuracy, loss) == (f"{row['accuracy']:.2f}", f"{row['loss']:.4f}")
        assert divergence == (f"{1000 * row['divergence']:.3f}" if row["divergence"] else "0")
        if won:
            nearest = measured[plan, "nearest"]["divergence"]
            assert won == f"{100 * (1 - row['divergence'] / nearest):.0f} %"
    static, dynamic = (measured[f"W8A8 {ranges}", "nearest"]["divergence"] for ranges in ("static", "dynamic"))
    assert dynamic < 0.5 * static
    for method in ("gptaq", "gptq sweeps", "gptaq sweeps"):
        assert measured["W4 g32", method]["divergence"] < 0.4 * measured["W4 g32", "nearest"]["divergence"]


PEERS = {"ours": "brecq", "AIMET": "aimet adaround", "Brevitas": "brevitas learned round"}


def test_other_libraries_that_learn_to_round() -> None:
    columns = ("W4A8", "W4A4", "W3A8", "W2A8")
    found = {(row["rounding"], row["bits"]): row for row in results("ptq_rounding_peers")["results"]}
    table = with_head("", *columns, "forward passes")
    assert len(table) == 4
    for label, *cells, passes in table:
        rows = [found[PEERS[label.split()[0].strip(",")], bits] for bits in columns]
        iterations = next(int(word) for word in re.findall(r"\b\d+\b", label) if int(word) in (100, 200, 300))
        points = [next(point for point in row["curve"] if point[0] == iterations) for row in rows]
        assert cells == [f"{accuracy:.2f}" for _, accuracy, _ in points], label
        spread = [seconds / row["forward_pass_seconds"] for (*_, seconds), row in zip(points, rows, strict=True)]
        assert passes == f"{min(spread):.0f} to {max(spread):.0f}", label


def test_the_low_bit_column_below_float() -> None:
    content = results("low_bit")
    for name, _, accuracy, below in with_head("format", "bits a weight", "accuracy", "below float"):
        assert below == ("" if name == "float" else f"{content['float'] - float(accuracy):.2f}"), name


def test_seq_and_gptq_at_size() -> None:
    content = results("low_bit_seq")
    measured = [
        [
            row["spec"],
            f"{row['effective_bits']:.2f}",
            f"{row['accuracy']:.2f}",
            f"{content['float'] - row['accuracy']:.2f}",
        ]
        for row in content["results"]
        if row["spec"] is not None
    ]
    assert with_head("levels", "bits a weight", "accuracy", "below float") == measured
    head = (
        "parameters", "tokens", "CPU time over llm-compressor's", "peak memory over its", "hidden states, dB", "its",
        "ranges by mse, forward passes",
    )  # fmt: skip
    rows = with_head(*head)
    for row, found in zip(rows, results("scale")["results"], strict=True):
        over, steps = found["gptq_over_llmcompressor"], found["steps"]
        assert row[0] == f"{found['parameters'] / 1e6:,.0f} M"
        assert row[2:] == [
            f"{over['cpu_seconds']:.2f}", f"{over['peak_bytes']:.2f}", f"{steps['gptq']['decibels']:.2f}",
            f"{found['llmcompressor']['gptq']['decibels']:.2f}", f"{steps['calibrate']['passes']:.2f}",
        ]  # fmt: skip


def test_numbers_in_sentences() -> None:
    text = re.sub(r"[*`]", "", (ROOT / BENCHMARKS).read_text(encoding="utf-8"))
    resnet56 = {row["bits"]: row["accuracy"] for row in results("ptq_rounding_resnet56")["results"]}
    assert f"W4A4 {resnet56['W4A4']:.2f}, W2A8 {resnet56['W2A8']:.2f}" in text
    paper, rounded = (row["accuracy"] for row in results("low_bit_lsq")["results"])
    assert f"lsq, the paper's, {paper:.2f}," in text
    assert f"lsq:rounded {rounded:.2f};" in text
    page = results("see")["page"]
    assert f"has {page['bytes'] / 1e6:.1f} MB and is written in {page['seconds']:.1f} s" in text
    passes = results("ptq_accuracy")["calibration"]["all_estimators_over_forward_pass"]["ratio"]
    assert f"of {passes:.1f} forward passes" in text
    ratios = {
        kind: [row["ratio"] for row in results("ranges")["rows"] if f": {kind} " in row["name"]]
        for kind in ("count", "activation", "weight")
    }
    count, activation, weight = (f"{min(found):.2f} to {max(found):.2f}" for found in ratios.values())
    assert f"takes {count}, a range of an activation {activation}, the ranges" in text
    assert f"64 channels {weight}." in text
    uniform, greedy = (
        results("search")["hypervolume"]["uniform"]["7"],
        results("search")["hypervolume"]["greedy"]["115"],
    )
    assert f"reaches {greedy:.3f} with its 115 plans, the seven uniform plans {uniform:.3f}" in text


def test_recurrent_layers() -> None:
    names = {
        "torch's cells in a Python loop, float": "cells",
        "our loop, float": "loop",
        "weights of 8 bits, in torch's kernel": "w8",
        "sequences and hidden state as well": "w8a8",
        "also cell state (16 bits) and gates": "all",
    }
    ratios = {(row["kind"], row["name"]): f"{row['ratio']:.2f}" for row in results("recurrent")["results"]}
    rows = with_head("step", "LSTM", "GRU")
    assert [row[0] for row in rows] == list(names)
    for label, *cells in rows:
        assert cells == [ratios[kind, names[label]] for kind in ("LSTM", "GRU")], label


def test_set_up() -> None:
    found = results("set_up")["results"]
    for name, *cells in with_head("make demo", "now", "earlier"):
        key = {"CPU of both, s": "cpu"}.get(name, name.partition(",")[0])
        scale, digits = (1e9, 2) if name.endswith("GB") else (1, 0)
        assert cells == [f"{found[when][key] / scale:.{digits}f}" for when in ("now", "earlier")], name
