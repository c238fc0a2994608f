"""Runs with learned ranges in stages that earlier builds began go on: their optimizers have a group more."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lq_plugin.quantizers.staged import present_keys
from tests.compatibility.learned_stages import fit

WRITTEN = Path(__file__).parent / "written"
#: Weight decay of the weights, of ranges of last stages, and of those before, which 0.1 let decay.
DECAYS = [0.1, 0.0, 0.1]


def decays(trainer) -> list[float]:
    return [group["weight_decay"] for group in trainer.optimizers[0].param_groups]


@pytest.mark.parametrize("build", ["f9de5cb", "f9207d8"])
def test_an_interrupted_run_goes_on_in_its_own_groups(build: str, tmp_path: Path) -> None:
    again = fit(2, WRITTEN / f"learned_stages-{build}.ckpt")
    assert decays(again) == DECAYS
    again.save_checkpoint(tmp_path / "again.ckpt")
    assert decays(fit(3, tmp_path / "again.ckpt")) == DECAYS


def test_its_second_epoch_is_that_of_the_earlier_build() -> None:
    wanted = load_file(WRITTEN / "learned_stages-f9207d8.safetensors")
    names = present_keys(list(wanted))
    found = fit(2, WRITTEN / "learned_stages-f9207d8.ckpt").lightning_module.state_dict()
    assert set(names.values()) == set(found)
    for name, value in wanted.items():
        torch.testing.assert_close(found[names[name]], value, rtol=1e-5, atol=1e-6)


def test_a_new_run_lets_no_learned_range_decay() -> None:
    assert decays(fit(1)) == [0.1, 0.0]
