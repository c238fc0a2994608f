"""PTQ at size: time and memory of each step on a Llama-like model with random weights, next to llm-compressor.

    python -m benchmarks.scale --json out.json
    python -m benchmarks.scale --sizes 300m 1.1b --threads 2

Weights int4 in groups of 128 (`--spec`), without `lm_head`, as llm-compressor's W4A16 has them. For each size a process
of its own runs the steps one after another: `prepare`, `calibrate` (ranges of weights, `--spec` names the estimator),
`gptq`, `pack` to a file, and `load` of that file. `passes` is the time of a step over one forward pass on the same
tokens; `over_model` its peak of resident memory, less what the process had before the model was made, over the model's
bytes in float32. `decibels` is the signal over the error of the decoder's last hidden states, after nearest rounding
(`calibrate`) and after GPTQ, on sequences that were not calibrated on. llm-compressor runs in its own environment
(`python -m benchmarks.peers install llmcompressor`), its GPTQ with the same group size, dampening, order of columns
and sequences of tokens. Its ranges are those of the largest magnitude (its default), ours by least squared error;
`gptq_over_llmcompressor` sets both steps of ours, `calibrate` and `gptq`, next to it, which does both in one. Linux
only: peaks are read from /proc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import common
from benchmarks.peers.environments import is_installed, python
from benchmarks.peers.start import ROOT, environment
from benchmarks.scale_models import SIZES

PEERS = ("llmcompressor",)
SPEC = "int4 group128 mse"
#: Activations that GPTQ keeps in memory, in bytes; what is more goes to disk.
CACHE = 2**22


def run(size: str, spec: str, threads: int, steps: list[str]) -> dict[str, Any]:
    """Each step, in this process."""
    import torch

    from benchmarks.scale_models import decibels, hidden_states, make, measured, sequences, status
    from lq_plugin import QuantPlan, Rule, calibrate, prepare
    from lq_plugin.export import load_packed, save_packed
    from lq_plugin.ptq.gptq import gptq

    torch.set_num_threads(threads)
    sized = SIZES[size]
    batches, held = sequences(sized), sequences(sized, 1)
    plan = QuantPlan([Rule("*.layers.*_proj", weight=spec)])
    _warm_up(plan)
    before = status("VmRSS")
    model = make(sized)
    reference, model_bytes = hidden_states(model, held), 4 * sum(p.numel() for p in model.parameters())
    one = min((measured(lambda: hidden_states(model, batches)) for _ in range(3)), key=lambda row: row["seconds"])
    rows: dict[str, dict[str, float]] = {"forward": one}
    calls: dict[str, Any] = {
        "prepare": lambda: prepare(model, plan),
        "calibrate": lambda: calibrate(model, batches),
        "gptq": lambda: gptq(model, batches, lambda batch: model.model(input_ids=batch), cache_bytes=CACHE),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        other: list[Any] = []
        calls["pack"] = lambda: save_packed(model, path)
        calls["load"] = lambda: load_packed(other[0], path)
        for step in steps:
            if step == "load":
                other.append(make(sized))
            rows[step] = measured(calls[step])
            if step in ("calibrate", "gptq"):
                rows[step]["decibels"] = decibels(reference, hidden_states(model, held))
    for row in rows.values():
        row["passes"] = row["seconds"] / one["seconds"]
        row["over_model"] = (row["peak_bytes"] - before) / model_bytes
    return {"size": size, "spec": spec, "parameters": model_bytes // 4, "before_bytes": before, "steps": rows}


def _warm_up(plan: Any) -> None:
    """Load the modules and kernels of a first call, which do not grow with a model."""
    from benchmarks.scale_models import make, sequences
    from lq_plugin import calibrate, prepare
    from lq_plugin.export import load_packed, save_packed
    from lq_plugin.ptq.gptq import gptq

    size = SIZES["12m"]._replace(layers=1, sequences=1, tokens=64)
    model, batches = make(size), sequences(size)
    prepare(model, plan)
    calibrate(model, batches)
    gptq(model, batches, lambda batch: model.model(input_ids=batch))
    with tempfile.TemporaryDirectory() as folder:
        save_packed(model, Path(folder, "model.safetensors"))
        load_packed(make(size), Path(folder, "model.safetensors"))


def in_a_process(command: list[str], threads: int, peer: bool) -> dict[str, Any]:
    """Returns what a new process says in its last line.

    Args:
        command: after the interpreter.
        threads: of torch.
        peer: whether its environment is that of a peer: of this one's Python nothing then.
    """
    # Blocks of memory that are freed go back at once, so that a peak is one of memory in use.
    variables = environment(threads) | {"MALLOC_MMAP_THRESHOLD_": "65536", "TOKENIZERS_PARALLELISM": "false"}
    program = str(python(PEERS[0])) if peer else sys.executable
    done = subprocess.run([program, *command], cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    steps = ["prepare", "calibrate", "gptq", "pack", "load"]
    parser = common.parser(__doc__, data=False)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["60m"], help="of the model (default: 60m)")
    parser.add_argument("--spec", default=SPEC, help=f"of the weights (default: {SPEC!r})")
    parser.add_argument("--steps", nargs="+", choices=steps, default=steps, help="in this order (default: all)")
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=[name for name in PEERS if is_installed(name)],
        help="next to ours (default: those that are installed)",
    )  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    if arguments is None and sys.argv[1:2] == ["--one"]:
        sys.stdout.write(json.dumps(run(**json.loads(sys.argv[2]))) + "\n")
        return {}
    options = parse(arguments)
    common.start(options)
    results: dict[str, Any] = {"results": []}
    for size in options.sizes:
        task = {"size": size, "spec": options.spec, "threads": options.threads, "steps": options.steps}
        found = in_a_process(["-m", "benchmarks.scale", "--one", json.dumps(task)], options.threads, peer=False)
        for name in options.peers:
            theirs = in_a_process(
                [f"benchmarks/peers/{name}_scale.py", size, str(options.threads)], options.threads, True
            )
            found[name] = theirs
            if {"calibrate", "gptq"} <= found["steps"].keys():
                mine = [found["steps"][step] for step in ("calibrate", "gptq")]
                found[f"gptq_over_{name}"] = {
                    key: (max if key == "peak_bytes" else sum)(row[key] for row in mine) / theirs["gptq"][key]
                    for key in ("seconds", "cpu_seconds", "peak_bytes")
                }
        results["results"].append(found)
        Console().print(table(found))
        common.write_json(options.json, results, ("transformers",))
    return results


def table(found: dict[str, Any]) -> Table:
    title = f"{found['size']}: {found['parameters'] / 1e6:.0f} M parameters, {found['spec']}"
    shown = Table("", "seconds", "forward passes", "peak, MB", "peak over the model", "dB", title=title)
    rows = {**found["steps"], **{f"{name} gptq": found[name]["gptq"] for name in PEERS if name in found}}
    for name, row in rows.items():
        over, decibels = row.get("over_model"), row.get("decibels")
        shown.add_row(
            name, f"{row['seconds']:.2f}", f"{row['passes']:.2f}", f"{row['peak_bytes'] / 1e6:.0f}",
            "" if over is None else f"{over:.2f}", "" if decibels is None else f"{decibels:.2f}",
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    main()
