"""Training steps of a peer in its own environment, one at a time: `PeerStep` here, `main` there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.peers.environments import PeerError, python, require
from benchmarks.peers.start import ROOT, environment


class PeerStep:
    """What `benchmarks.qat_step_models.Step` is, with the model in a process of a peer's environment.

    Args:
        peer: a key of `PEERS`; its module there has a function `training(model, setting, variant)`.
        variant: what that function takes.
        model: a key of `benchmarks.qat_step_models.MODELS`.
        setting: "W8A8", ...
        threads: of torch.

    Raises:
        PeerError: when it is not installed or fails.
    """

    def __init__(self, peer: str, variant: str, model: str, setting: str, threads: int) -> None:
        require([peer])
        command = [str(python(peer)), "-m", "benchmarks.peers.training", peer, variant, model, setting, str(threads)]
        # A file, not a pipe: nobody reads along.
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, text=True, cwd=ROOT, env=environment(threads), **pipes)
        self._ask("saved")  # waits until it is ready

    def seconds(self, clock: str) -> float:
        """Time of one step, there."""
        return float(self._ask(clock))

    def saved(self) -> tuple[int, int]:
        """See `benchmarks.qat_step_models.saved_bytes`."""
        all_bytes, without = self._ask("saved")
        return all_bytes, without

    def _ask(self, question: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.process.wait()
            self.errors.seek(0)
            tail = "\n".join(self.errors.read().splitlines()[-25:])
            self.close()
            raise PeerError(f"{' '.join(map(str, self.process.args))} failed:\n{tail}")  # type: ignore[arg-type]
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()
        self.errors.close()


def main(peer: str, variant: str, model: str, setting: str, threads: str) -> None:
    """Answers each line of stdin with a line of JSON: a clock with the seconds of a step, "saved" with bytes."""
    # Libraries print on stdout, too: from here on that goes to stderr.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        import importlib

        import torch

        from benchmarks.qat_step_models import Step, load

        torch.set_num_threads(int(threads))
        float_model, batch = load(model, "cpu")
        step = Step(importlib.import_module(f"benchmarks.peers.{peer}_training").training(float_model, setting, variant), batch)
        for line in sys.stdin:
            question = line.strip()
            answers.write(json.dumps(step.saved() if question == "saved" else step.seconds(question)) + "\n")
            answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
