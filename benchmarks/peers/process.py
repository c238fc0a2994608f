"""A process of a peer's environment that answers questions one at a time: `PeerProcess` here, `serve` there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import PeerError, python, require
from benchmarks.peers.start import ROOT, environment


class AnsweringProcess:
    """A process that calls `serve`, waited for until it has said that it is ready.

    Args:
        command: its command line.
        cwd: folder that it runs in.
        env: its environment.

    Raises:
        PeerError: when it fails, with the end of what it wrote.
    """

    def __init__(self, command: list[str], cwd: Path, env: Mapping[str, str]) -> None:
        # A file, not a pipe: nobody reads along.
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, text=True, cwd=cwd, env=env, **pipes)
        self.names: list[str] = self.ask("")

    def ask(self, question: str) -> Any:
        """Returns the process's answer."""
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


class PeerProcess(AnsweringProcess):
    """A process in a peer's environment.

    Args:
        peer: a key of `PEERS`.
        module: of this repository, whose `__main__` calls `serve`.
        arguments: of its command line.
        threads: of torch.

    Raises:
        PeerError: when it is not installed or fails, with the end of what it wrote.
    """

    def __init__(self, peer: str, module: str, arguments: tuple[str, ...], threads: int) -> None:
        require([peer])
        super().__init__([str(python(peer)), "-m", module, *arguments, str(threads)], ROOT, environment(threads))


def serve(make: Callable[[], dict[str, Callable[[], Any]]]) -> None:
    """Answers each line of stdin with a line of JSON: what the function of that name returns; an empty line with the
    names."""
    # Libraries also print on stdout: from here on that goes to stderr.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        functions = make()
        for line in sys.stdin:
            question = line.strip()
            answers.write(json.dumps(functions[question]() if question else list(functions)) + "\n")
            answers.flush()
