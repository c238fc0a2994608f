"""Training steps of a peer in its own environment: `PeerStep` here, `main` there."""

from __future__ import annotations

import importlib
import sys
from functools import partial

from benchmarks.peers.process import PeerProcess, serve


class PeerStep(PeerProcess):
    """A `benchmarks.qat_step_models.Step` with the model in a process of a peer's environment.

    Args:
        peer: a key of `PEERS`; its module there has a function `training(model, setting, variant)`.
        variant: what that function takes.
        model: a key of `benchmarks.qat_step_models.MODELS`.
        setting: "W8A8", ...
        threads: of torch.
        precision: one of `benchmarks.qat_step_models.PRECISIONS`.

    Raises:
        PeerError: when it is not installed or fails.
    """

    def __init__(
        self, peer: str, variant: str, model: str, setting: str, threads: int, precision: str = "32-true"
    ) -> None:
        super().__init__(peer, "benchmarks.peers.training", (peer, variant, model, setting, precision), threads)

    def seconds(self, clock: str) -> float:
        """Time of one step, there."""
        return float(self.ask(clock))

    def saved(self) -> tuple[int, int]:
        """See `benchmarks.qat_step_models.saved_bytes`."""
        all_bytes, without = self.ask("saved")
        return all_bytes, without


def main(peer: str, variant: str, model: str, setting: str, precision: str, threads: str) -> None:
    """Steps by either clock, and the bytes that one keeps."""

    def make():  # type: ignore[no-untyped-def]
        import torch

        from benchmarks.qat_step_models import CLOCKS, Step, in_precision, load

        torch.set_num_threads(int(threads))
        float_model, batch = load(model, "cpu")
        quantized = importlib.import_module(f"benchmarks.peers.{peer}_training").training(float_model, setting, variant)
        step = in_precision(Step(quantized, batch), precision)
        return {"saved": step.saved, **{clock: partial(step.seconds, clock) for clock in CLOCKS}}

    serve(make)


if __name__ == "__main__":
    main(*sys.argv[1:])
