"""Two processes, one of which gets an empty batch: the run is that of one process on the joined batches."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from lq_plugin import PTQ, QAT
from lq_plugin.utilities.lightning_packages import PACKAGES

ROOT = Path(__file__).parents[2]
#: Every way a range is found: learned, estimated once, by moving average, live; and one format of blocks.
PLAN = {
    "rules": [
        {"match": "net.0", "weight": "int4 per_channel lsq", "input": "uint8 affine ema:0.5"},
        {"match": "net.3", "weight": "int4 mse", "input": "int8 lsq"},
        {"match": "net.5", "weight": "int8 per_channel", "input": "uint8 affine percentile:99.9"},
    ]
}
RATE = 1e-3


def batches() -> list[torch.Tensor]:
    """In the order of an epoch: rank 0 takes those of even number, rank 1 the others."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(4, 1, 4, 4, generator=generator) for _ in range(8)]
    made[1] = made[4] = made[1][:0]  # rank 1 has none for its first range, rank 0 none in the third step
    return made


def make_module(package: Any, rate: float) -> Any:
    class Sums(package.LightningModule):
        """Its loss is a sum, so that an empty batch has the gradient 0."""

        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 8), nn.ReLU(), nn.Linear(8, 4)
            )

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().sum()

        def validation_step(self, batch, batch_idx):
            self.net(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), rate)

    torch.manual_seed(0)
    return Sums()


def train_and_evaluate(name: str, folder: str, devices: int) -> tuple[Any, dict[str, Any]]:
    """A fit with QAT and an evaluation with PTQ; returns the Trainer and the states of both."""
    package = import_module(name)
    options = {"accelerator": "cpu", "devices": devices, "logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
    options |= {"strategy": "ddp" if devices > 1 else "auto", "default_root_dir": folder}
    given, states = batches(), {}
    if devices == 1:
        given = [torch.cat(given[start : start + 2]) for start in range(0, len(given), 2)]
    whole = loader = DataLoader(given, batch_size=None)
    if devices > 1:  # Lightning's own sampler would shuffle
        share = DistributedSampler(given, devices, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
        loader = DataLoader(given, batch_size=None, sampler=share)
    # The ranks' mean of sums is half of the sum.
    qat, ptq = QAT(PLAN, init_batches=1, dataloader=whole), PTQ(PLAN, calibration_batches=3, dataloader=whole)
    for callback, fn in ((qat, "fit"), (ptq, "validate")):
        module = make_module(package, RATE * devices)
        trainer = package.Trainer(callbacks=[callback], **options)
        if fn == "fit":
            trainer.fit(module, loader)
        else:
            trainer.validate(module, loader, verbose=False)
        states[fn] = module.state_dict()
    return trainer, states


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize("name", PACKAGES)
def test_an_empty_share_of_a_rank_moves_no_range_and_stops_nobody(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.lifecycle.test_empty_ranks", name, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    _, alone = train_and_evaluate(name, str(tmp_path), 1)
    for fn, wanted in alone.items():
        states = [rank[fn] for rank in ranks]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
        assert states[0].keys() == wanted.keys()
        for key, value in wanted.items():
            # A sum in another order may round to the next level of 4 bits.
            torch.testing.assert_close(
                states[0][key], value, rtol=2e-2, atol=2e-4, msg=lambda text, key=key, fn=fn: f"{fn} {key}: {text}"
            )
    low = "net.0.input_quantizer.running_min"
    assert torch.equal(ranks[0]["fit"][low], alone["fit"][low])


if __name__ == "__main__":
    package, folder = sys.argv[1:]
    trainer, states = train_and_evaluate(package, folder, 2)
    torch.save(states, f"{folder}/{trainer.global_rank}.pt")
