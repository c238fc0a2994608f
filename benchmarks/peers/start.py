"""Starts a peer and reads what it answers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import PeerError, python, require
from benchmarks.peers.request import Request

ROOT = Path(__file__).parents[2]


def run_peer(name: str, setting: str, *, weights: Path, data: Path, **options: Any) -> dict[str, Any]:
    """Quantize with a peer, in a process of its own.

    Args:
        name: a key of `PEERS`.
        setting: bits of weights and inputs, "W3A8".
        weights: file of the float weights.
        data: folder with the images.
        options: further fields of `Request`.

    Returns:
        `accuracy` in percent on the scored images; `seconds` from the float model to the quantized one,
        `forward_pass_seconds` of the float model over the calibration images, both of that process; `packages`,
        versions by name.

    Raises:
        PeerError: when it is not installed or fails, with the end of what it wrote.
    """
    require([name])
    request = Request(str(weights.resolve()), str(data.resolve()), setting, **options)
    command = [str(python(name)), "-m", "benchmarks.peers.runner", name]
    where: Any = {"cwd": ROOT, "env": environment(request.threads)}
    done = subprocess.run(command, input=request.to_json(), capture_output=True, text=True, **where)
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-25:])
        raise PeerError(f"{name} failed at {setting} with exit code {done.returncode}:\n{tail}")
    return json.loads(done.stdout)


def environment(threads: int) -> dict[str, str]:
    """Variables of a peer's process: nothing of this one's Python, and this repository to import from."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
