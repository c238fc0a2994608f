"""One worker of a small search in a process of its own: `python -m tests.search.worker URL N_TRIALS WORKER
SECONDS_PER_TRIAL [HANG]`.

It hangs in evaluation number HANG, from 0.
"""

import sys
import time

import torch

from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.search import search
from lq_plugin.search.evaluation.evaluator import Evaluator
from tests.search.conftest import CPU

SPACE = {"weight": {"bit_widths": [2, 3, 4, 5, 6, 7, 8], "granularities": ["per_channel"], "ranges": ["minmax"]}}


def main(url: str, n_trials: int, worker: int, seconds: float, hang: int = -1) -> None:
    torch.manual_seed(0)
    evaluate, count = Evaluator.evaluate_layers, iter(range(1000))

    def slowly(self, layer_plans):
        time.sleep(1000 if next(count) == hang else seconds)
        return evaluate(self, layer_plans)

    Evaluator.evaluate_layers = slowly
    data = DigitsDataModule(batch_size=120)
    search(
        DigitsCNN(), data, SPACE, "val/acc", n_trials, storage=url, worker=worker, heartbeat=1, progress=False,
        trainer=CPU,
        calibration_batches=1, seeds=0,
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), *map(int, sys.argv[5:]))
