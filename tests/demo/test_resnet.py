"""The CIFAR ResNets: names, shapes, the shortcut's formula, loading, and a short training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning import Trainer
from safetensors.torch import load_file

from lq_plugin.demo.cifar10 import Cifar10DataModule, DataError
from lq_plugin.demo.resnet import BasicBlock, CifarResNet, LitClassifier, load_resnet


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_size_is_that_of_the_paper(depth: int, parameters: int) -> None:
    # Table 6 of the paper: 0.27M, 0.46M, 0.66M, 0.85M.
    assert sum(p.numel() for p in CifarResNet(depth).parameters()) == parameters


def test_keys_are_those_of_the_public_weights() -> None:
    keys = {key.rpartition(".")[0] for key in CifarResNet(20).state_dict()}
    blocks = {f"layer{s}.{i}.{part}" for s in (1, 2, 3) for i in range(3) for part in ("conv1", "bn1", "conv2", "bn2")}
    assert keys == {"conv1", "bn1", "linear"} | blocks


def test_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides() -> None:
    block = BasicBlock(4, 8, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 6, 6)
    expected = torch.zeros(2, 8, 3, 3)
    expected[:, 2:6] = x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("depth", [0, 2, 18, 21])
def test_impossible_depth(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"6n \+ 2 .* got {depth}"):
        CifarResNet(depth)


def test_loads_safetensors_and_the_public_pickles(data_folder: Path, tmp_path: Path) -> None:
    state = load_file(data_folder / "resnet20.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "resnet20.th")
    x = torch.rand(2, 3, 32, 32)
    model = load_resnet(data_folder / "resnet20.safetensors")
    assert not model.training
    assert torch.equal(model(x), load_resnet(tmp_path / "resnet20.th")(x))
    assert torch.equal(model.layer2[1].conv1.weight, state["layer2.1.conv1.weight"])


def test_weights_that_are_absent_or_of_another_depth(data_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no weights at .*(\n.*)*pytorch_resnet_cifar10"):
        load_resnet(tmp_path / "none.safetensors")
    with pytest.raises(RuntimeError, match=r"Missing key"):
        load_resnet(data_folder / "resnet20.safetensors", depth=32)


def test_trains_and_weighs_a_shorter_last_batch_by_its_size(data_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = Cifar10DataModule(data_folder, batch_size=20, held_out=32)
    model = LitClassifier(CifarResNet(8))
    before = model.net.linear.weight.detach().clone()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, datamodule=data)
    assert not torch.equal(before, model.net.linear.weight)
    (metrics,) = trainer.validate(model, datamodule=data, verbose=False)
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data.val_dataloader())
    assert metrics["val/acc"] == pytest.approx(right / 32)
