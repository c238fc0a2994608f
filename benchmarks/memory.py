"""Peaks of memory next to the model: packing, loading, k-means, learned rounding and GPTQ, over sizes of layers.

Each measurement is a process of its own: two linear layers of n x n, the peak of resident memory over what the process
had before, as a multiple of one layer's float32 weight. `--beside REV` measures the same with the package as it was at
a commit, in a worktree. Linux only: peaks are read from /proc.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

FORMATS = ("int4 per_channel mse", "int8 per_tensor", "int4 group16:4", "mx6", "nvfp4", "twn", "kmeans4")
#: Of a layer's float32 weight; None: `cache_bytes` and a layer's own work.
LIMITS = {"pack": 1.5, "load": 1.5, "calibrate": 3.0}


def status(key: str) -> int:
    """Bytes of a field of this process's memory."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def peak_of(work: Callable[[], Any]) -> tuple[int, float]:
    """The largest resident memory while something runs, over what was resident before, and its seconds."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = status("VmRSS"), time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return status("VmHWM") - before, seconds


def measure(kind: str, spec: str, size: int, cache_bytes: int = 0) -> dict[str, float]:
    """One measurement, in this process."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        # The modules and kernels that a first call loads do not grow with a layer.
        work(kind, spec, 64, 0, Path(folder))()
        peak, seconds = peak_of(work(kind, spec, size, cache_bytes, Path(folder)))
    return {"bytes": peak, "layers": peak / (4 * size * size), "seconds": seconds}


def work(kind: str, spec: str, size: int, cache_bytes: int, folder: Path) -> Callable[[], Any]:
    """Returns what is measured, with all that it needs made before."""
    import torch
    from torch import nn

    from lq_plugin import QuantPlan, Rule, calibrate, prepare
    from lq_plugin.export import load_packed, save_packed

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)).eval()

    model, other, path = net(), net(), folder / f"{size}.safetensors"
    x = torch.randn(16, size)
    prepare(model, QuantPlan([Rule("*", weight=spec)]))
    if kind == "calibrate":
        return lambda: calibrate(model, [x])
    calibrate(model, [x])
    if kind == "pack":
        return lambda: save_packed(model, path)
    if kind == "load":
        save_packed(model, path)
        return lambda: load_packed(other, path)
    return _rounding(kind, model, size, cache_bytes)


def _rounding(kind: str, model: Any, size: int, cache_bytes: int) -> Callable[[], Any]:
    """Learned rounding or GPTQ on batches that are made as they are read, four times `cache_bytes` of them."""
    import torch

    # By the names that earlier builds know as well.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        gptq = import_module("lq_plugin.model.gptq").gptq
        reconstruct = import_module("lq_plugin.model.reconstruct").reconstruct

    rows = 256
    count = max(4 * cache_bytes // (4 * rows * size), 1)

    def batches() -> Any:
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(rows, size, generator=generator) for _ in range(count))

    if kind == "reconstruct":
        return lambda: reconstruct(model, batches(), by="layer", iterations=5, cache_bytes=cache_bytes)
    return lambda: gptq(
        model, batches(), **({"cache_bytes": cache_bytes} if "cache_bytes" in gptq.__kwdefaults__ else {})
    )


def in_a_process(task: dict[str, Any], source: Path | None) -> dict[str, float]:
    """One measurement in a new process, with the package of a folder; None: this one."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    if source is not None:
        environment["PYTHONPATH"] = str(source)
    command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(task)]
    done = subprocess.run(command, env=environment, cwd=source, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{task}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def tasks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns what is to be measured."""
    found: list[dict[str, Any]] = []
    for size in options.sizes:
        for spec in options.formats:
            found += [{"kind": kind, "spec": spec, "size": size} for kind in ("pack", "load")]
        found.append({"kind": "calibrate", "spec": "kmeans4", "size": size})
    found += [
        {"kind": kind, "spec": "int4 per_channel mse", "size": 1024, "cache_bytes": 2**25}
        for kind in ("reconstruct", "gptq")
    ]
    return found


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        sys.stdout.write(json.dumps(measure(**json.loads(sys.argv[2]))) + "\n")
        return
    from benchmarks import common

    parser = common.parser(__doc__, data=False)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[1024, 2048, 4096], metavar="N", help="of the layers (%(default)s)"
    )
    parser.add_argument(
        "--formats", nargs="+", default=FORMATS, metavar="SPEC", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--beside", metavar="REV", help="measure a commit of this repository as well")
    options = parser.parse_args()
    common.start(options)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder, "tree") if options.beside else None
        if other is not None:
            subprocess.run(
                ["git", "worktree", "add", "--detach", str(other), options.beside], check=True, capture_output=True
            )
        try:
            for task in tasks(options):
                row = (
                    task | {"now": in_a_process(task, None)} | ({"beside": in_a_process(task, other)} if other else {})
                )
                rows.append(row)
                line = f"{task['kind']:12} {task['spec']:22} {task['size']:5}  {row['now']['layers']:6.2f} layers"
                line += f" {row['now']['bytes'] / 2**20:8.1f} MiB {row['now']['seconds']:6.1f} s"
                line += f"   {options.beside}: {row['beside']['layers']:6.2f} layers" if other else ""
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
                common.write_json(
                    options.json, {"limits": LIMITS, "beside": options.beside, "rows": rows}, ("safetensors",)
                )
        finally:
            if other is not None:
                subprocess.run(["git", "worktree", "remove", "--force", str(other)], check=True)


if __name__ == "__main__":
    main()
