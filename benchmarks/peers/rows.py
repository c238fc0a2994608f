"""Rows of the accuracy benchmark that peers fill."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import PEERS
from benchmarks.peers.start import run_peer

#: A layer, of every peer unless its own default is also asked for.
ITERATIONS = 200


def measure_peers(
    names: Iterable[str],
    settings: Iterable[str],
    *,
    weights: Path,
    data: Path,
    seeds: int,
    images: int,
    default: bool = False,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Score peers, with the keys of the rows that `benchmarks.ptq_accuracy` makes of learned rounding.

    Args:
        names: keys of `PEERS`.
        settings: bits of weights and inputs, "W3A8".
        weights: file of the float weights.
        data: folder with the images.
        seeds: disjoint calibration sets to average over, each with a random seed of its own.
        images: of a calibration set; they are the first of the train split.
        default: also run the iterations that a peer does unless told otherwise.
        options: further fields of `Request`.
    """
    settings = list(settings)
    for name in names:
        peer = PEERS[name]
        for setting in settings:
            curve: list[list[float]] = []
            for iterations in (ITERATIONS, peer.default_iterations) if default else (ITERATIONS,):
                answers = [
                    run_peer(
                        name,
                        setting,
                        weights=weights,
                        data=data,
                        iterations=iterations,
                        calibration=(seed * images, (seed + 1) * images),
                        seed=seed,
                        **options,
                    )
                    for seed in range(seeds)
                ]
                scores = [answer["accuracy"] for answer in answers]
                seconds = statistics.median(answer["seconds"] for answer in answers)
                curve.append([iterations, round(statistics.mean(scores), 3), seconds])
            weight_bits, input_bits = setting[1:].split("A")
            yield {
                "bits": setting,
                "range": peer.range,
                "rounding": peer.rounding,
                "iterations": curve[-1][0],
                "accuracy": curve[-1][1],
                "seconds": curve[-1][2],
                "forward_pass_seconds": statistics.median(answer["forward_pass_seconds"] for answer in answers),
                "accuracies": scores,
                "curve": curve,
                "weight": f"int{weight_bits} per_channel {peer.range}",
                "input": f"uint{input_bits} affine {peer.input_range}",
                "packages": answers[-1]["packages"],
            }
