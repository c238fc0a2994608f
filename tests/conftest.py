"""Settings for every test: no window, no network, no thread pools fighting over two cores."""

import os
import sys
from collections.abc import Iterator

os.environ["MPLBACKEND"] = "Agg"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter, on CPU tensors. It reads this when it is first imported, by whatever
    # test.
    os.environ["TRITON_INTERPRET"] = "1"

# Examples are timed by wall clock, which other processes share.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


@pytest.fixture(autouse=True)
def no_run_of_wandb_left_open() -> Iterator[None]:
    """A run that a test leaves open would take the records of the next test in this process."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()
        pytest.fail("this test left a run of W&B open")
