"""The commands with the oldest versions that pyproject.toml allows: a QAT, a PTQ, a search of two trials, a report.

make test-minimum           # makes .venv-minimum, runs all, writes tests/minimum/results.md
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from importlib.metadata import requires, version
from pathlib import Path

RESULTS = Path(__file__).with_name("results.md")
SMALL = ["float_epochs=1", "model.width=8"]
#: W&B in two of them: its tables, artifact, and a run for each trial.
JOBS = {
    "QAT": ["lq-train", "experiment=digits_qat", *SMALL, "trainer.max_epochs=1", "paths.output_dir={0}/qat"],
    "PTQ, W&B": ["lq-train", "experiment=digits_ptq", *SMALL, "logger=wandb", "paths.output_dir={0}/ptq"],
    "search, W&B": [
        "lq-search", "experiment=digits_search", *SMALL, "search.n_trials=2", "search.seeds=0",
        "search.calibration_batches=1",
        "search.constraints=['effective_bits <= 6']", "logger=wandb", "paths.output_dir={0}/search",
    ],
    "report": ["lq-report", "{0}/search"],
}  # fmt: skip


def oldest() -> dict[str, str]:
    """The oldest version of each requirement of the library and its demo."""
    # What was installed is asked, not pyproject.toml: Python 3.10 reads no TOML.
    declared = [
        line.partition(";")[0] for line in requires("lq_plugin") or () if "extra ==" not in line or '"demo"' in line
    ]
    found = {line: (re.match(r"[\w-]+", line), re.search(r">=([\d.]+)", line)) for line in declared}
    if without := [line for line, (_, minimum) in found.items() if minimum is None]:
        sys.exit(f"no oldest version in {', '.join(without)}")
    return {name[0]: minimum[1] for name, minimum in found.values() if name and minimum}


def run(job: str, folder: str) -> str:
    """Returns the outcome of one job's command, and shows the end of its output where it failed."""
    command, *arguments = (part.format(folder) for part in JOBS[job])
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    path = Path(sys.executable).with_name(command)
    done = subprocess.run([str(path), *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(f"{job}: {command} {' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}\n")
    return "ok" if done.returncode == 0 else f"FAILED, status {done.returncode}"


def main() -> int:
    if "--requirements" in sys.argv:
        sys.stdout.writelines(f"{name}=={minimum}\n" for name, minimum in oldest().items())
        return 0
    with tempfile.TemporaryDirectory() as folder:
        outcomes = {job: run(job, folder) for job in JOBS}
    today = datetime.now(timezone.utc).date()
    head = f"Python {sys.version.split()[0]}, {today}. Made by `make test-minimum`.\n"
    jobs = ["| job | result |\n|---|---|", *(f"| {job} | {outcome} |" for job, outcome in outcomes.items())]
    versions = ["\n| package | oldest declared | installed |\n|---|---|---|"]
    versions += [f"| {name} | {minimum} | {version(name)} |" for name, minimum in oldest().items()]
    table = "\n".join(["# The oldest versions that pyproject.toml allows\n", head, *jobs, *versions]) + "\n"
    RESULTS.write_text(table)
    sys.stdout.write(table)
    return 0 if set(outcomes.values()) == {"ok"} else 1


if __name__ == "__main__":
    sys.exit(main())
