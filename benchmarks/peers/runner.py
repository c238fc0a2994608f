"""The process in a peer's environment: `python -m benchmarks.peers.runner NAME`, request on stdin, one line of JSON on
stdout."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
from importlib.metadata import version
from typing import Any


def main() -> None:
    # Libraries print on stdout while they are imported, too: from here on that goes to stderr.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)
        answer.write(json.dumps(run(sys.argv[1], sys.stdin.read())) + "\n")


def run(name: str, text: str) -> dict[str, Any]:
    """Load the peer, then model and images; quantize; score. See `benchmarks.peers.start.run_peer`."""
    # First: a peer may have to prepare what the others import.
    peer = importlib.import_module(f"benchmarks.peers.{name}")

    import torch

    from benchmarks.common import Stopwatch
    from benchmarks.peers.request import Request
    from lq_plugin.demo.cifar10 import load_images, normalize
    from lq_plugin.demo.resnet import load_resnet

    request = Request.from_json(text)
    torch.set_num_threads(request.threads)
    model = load_resnet(request.weights, request.depth)
    batches = list(normalize(load_images(request.data, "train", *request.calibration)[0]).split(request.batch_size))
    images, labels = load_images(request.data, *request.scored)

    def forward_pass() -> float:
        with Stopwatch() as watch, torch.inference_mode():
            for batch in batches:
                model(batch)
        return watch.seconds

    forward_pass()
    # Before and after, since other processes come and go meanwhile.
    passes = [forward_pass(), forward_pass()]
    torch.manual_seed(request.seed)
    with Stopwatch() as watch:
        quantized = peer.quantize(model, batches, request)
    passes.append(forward_pass())
    with torch.inference_mode():
        right = sum(
            int((quantized(normalize(x)).argmax(1) == y).sum())
            for x, y in zip(images.split(250), labels.split(250), strict=True)
        )
    return {
        "accuracy": 100.0 * right / len(labels),
        "seconds": watch.seconds,
        "forward_pass_seconds": statistics.median(passes),
        "packages": {package: version(package) for package in ("torch", *peer.PACKAGES)},
    }


if __name__ == "__main__":
    main()
