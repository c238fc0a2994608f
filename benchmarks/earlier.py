"""Other commits of this repository, measured in the same run as the present one."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.peers.process import AnsweringProcess
from benchmarks.peers.start import ROOT, environment
from benchmarks.qat_step_models import in_precision

_STEP = """
import sys
from typing import Any
from functools import partial
from benchmarks.peers.process import serve

def make():
    import torch
    from benchmarks.qat_step_models import CLOCKS
    from benchmarks.qat_step_rivals import IMPLEMENTATIONS

    implementation, model, setting, precision, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    step = in_precision(IMPLEMENTATIONS[implementation](model, setting, "cpu"), precision)
    return {clock: partial(step.seconds, clock) for clock in CLOCKS}

# A commit may not have it.
PRECISION
serve(make)
"""


@contextmanager
def tree_of(revision: str | None) -> Iterator[Path | None]:
    """Checks a commit out into a temporary folder; None for None."""
    if revision is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), revision], check=True, capture_output=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True)


class StepOf(AnsweringProcess):
    """Training steps of the library in a folder, in a process of its own; see `benchmarks.qat_step_models.Step`.

    Args:
        tree: of the repository; None: this one.
        implementation: a key of `benchmarks.qat_step_rivals.IMPLEMENTATIONS` there.
        model: a key of `benchmarks.qat_step_models.MODELS` there.
        setting: "W8A8", ...
        threads: of torch.
        precision: one of `benchmarks.qat_step_models.PRECISIONS` here.

    Raises:
        PeerError: when it fails.
    """

    def __init__(
        self,
        tree: Path | None,
        implementation: str,
        model: str,
        setting: str,
        threads: int,
        precision: str = "32-true",
    ) -> None:
        tree = ROOT if tree is None else tree
        code = _STEP.replace("PRECISION", inspect.getsource(in_precision))
        command = [sys.executable, "-c", code, implementation, model, setting, precision, str(threads)]
        super().__init__(command, tree, {**environment(threads), "PYTHONPATH": str(tree)})

    def seconds(self, clock: str) -> float:
        """Time of one step, there."""
        return float(self.ask(clock))
