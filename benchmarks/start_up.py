"""Addition of this package to the start of a program: CPU seconds of new processes, with compiled kernels cached.

    python -m benchmarks.start_up --json out.json

`import`: `from lq_plugin import QAT` over `import torch, lightning`. `first step`: from there to the end of one
training step of a small network, quantized (W8A8) over float. Processes run in turn; medians of `--rounds`. Bytecode is
cached in a folder of its own, as in every installed package: with `PYTHONDONTWRITEBYTECODE` set each start compiles all
modules again, which takes three times as long as to load them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from rich.console import Console

from benchmarks import common

_PROGRAM = """
import sys, time
import torch, lightning
from torch import nn
torch.set_num_threads(1)
start = time.process_time()
if sys.argv[1] == "lq":
    from lq_plugin import QAT, QuantPlan, calibrate, prepare
    from lq_plugin.model import commit_observers, quantizers
imported = time.process_time()
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
x = torch.randn(4, 3, 8, 8)
if sys.argv[1] == "lq":
    prepare(net, QuantPlan.parse("w8a8"))
    calibrate(net, [x])
net.train()
nn.functional.cross_entropy(net(x), torch.arange(4)).backward()
torch.optim.SGD(net.parameters(), 0.1).step()
if sys.argv[1] == "lq":
    commit_observers(quantizers(net))
print(imported - start, time.process_time() - imported)
"""


def seconds(kind: str, bytecode: str) -> tuple[float, float]:
    """CPU seconds of the import and of what follows, in a new process; `kind` is "lq" or "float"."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPYCACHEPREFIX": bytecode, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", _PROGRAM, kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind}: {done.stderr[-2000:]}")
    imported, step = map(float, done.stdout.split())
    return imported, step


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = common.parser(__doc__, data=False)
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="processes of each kind (default: 9)")
    options = parser.parse_args(arguments)
    common.start(options)
    found: dict[str, list[tuple[float, float]]] = {"lq": [], "float": []}
    with tempfile.TemporaryDirectory() as bytecode:
        for index in range(options.rounds + 1):
            for kind, times in found.items():
                times.append(seconds(kind, bytecode))
                if index == 0:
                    times.clear()  # its bytecode and kernels were compiled
    medians = {
        kind: [statistics.median(column) for column in zip(*times, strict=True)] for kind, times in found.items()
    }
    results = {"import": medians["lq"][0], "first step": medians["lq"][1] - medians["float"][1]}
    console = Console()
    for name, value in results.items():
        console.print(f"{name:12} {value:.3f} s of CPU more")
    common.write_json(options.json, {"results": results, "all": found})
    return results


if __name__ == "__main__":
    main()
