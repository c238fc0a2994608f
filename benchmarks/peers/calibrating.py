"""Calibration by a peer in its own environment: `PeerCalibration` here, `main` there."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.process import PeerProcess, serve


class PeerCalibration(PeerProcess):
    """Ranges of a float model's tensors, found by a peer.

    Args:
        peer: a key of `PEERS`; its module there has a function `calibration(model, batches)`.
        model: a key of `benchmarks.calibration_models.MODELS`.
        data: folder with the images.
        batches: of calibration data.
        threads: of torch.

    Raises:
        PeerError: when it is not installed or fails.
    """

    def __init__(self, peer: str, model: str, data: Path, batches: int, threads: int) -> None:
        super().__init__(
            peer, "benchmarks.peers.calibrating", (peer, model, str(data.resolve()), str(batches)), threads
        )

    def calls(self) -> dict[str, Callable[[], Any]]:
        """By name, what finds all ranges from nothing."""
        return {name: partial(self.ask, name) for name in self.names}


def main(peer: str, model: str, data: str, batches: str, threads: str) -> None:
    """Each way of the peer to calibrate."""

    def make():  # type: ignore[no-untyped-def]
        # First of all: it can have to see to what it and others import.
        peers_own = importlib.import_module(f"benchmarks.peers.{peer}_calibration")

        import torch

        from benchmarks.calibration_models import load

        torch.set_num_threads(int(threads))
        return peers_own.calibration(*load(model, Path(data), int(batches)))

    serve(make)


if __name__ == "__main__":
    main(*sys.argv[1:])
