"""A new PTQ phase from outside the package: in a Trainer, on a plain model, and in the config of a search."""

import copy
import re
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

import lq_plugin.ptq
from lq_plugin import PTQ
from lq_plugin.callbacks import PHASES, register_phase as register_in_callbacks
from lq_plugin.errors import PlanError
from lq_plugin.ptq import register_phase, run_phases
from lq_plugin.search import Evaluator
from tests.callbacks.conftest import Data, Module


def check_share(share=0.5):
    """The options of the phase, refused before any work."""
    if not 0 < share <= 1:
        raise ValueError(f"share lies between 0 and 1, got {share!r}")


def shrink_biases(context):
    """Multiplies each bias by `share`; returns the mean output of the quantized model before."""
    outputs = []
    for batch in context.batches:
        outputs.append(context.run(batch).mean())
    layers = [module for module in context.model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for layer in layers:
        if layer.bias is not None:
            layer.bias.data *= context.options.get("share", 0.5)
    context.say("biases are smaller now")
    return torch.stack(outputs).mean()


@pytest.fixture(params=[register_phase, register_in_callbacks])
def phase(request):
    """The name of the phase; either door opens."""
    register_phase = request.param
    register_phase("shrink_biases", check_share, after={"calibrate": "it looks at the quantized model"})(shrink_biases)
    yield {"shrink_biases": {"share": 0.25}}
    del PHASES["shrink_biases"]


class Counts(Module):
    """Counts its validation samples in place, as metrics do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def validation_step(self, batch, batch_idx):
        self.seen += len(batch[0])
        super().validation_step(batch, batch_idx)
        return self(batch[0])


def test_trainer_and_plain_model_do_the_same(phase, tmp_path):
    L.seed_everything(0, verbose=False)
    module, data = Counts(), Data()
    net, bias = copy.deepcopy(module.net).eval(), module.net.fc.bias.detach().clone()
    ptq = PTQ("w4a8", phases=["calibrate", phase], calibration_batches=2)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[ptq], default_root_dir=tmp_path, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.validate(module, datamodule=data, verbose=False)
    assert torch.equal(module.net.fc.bias, bias * 0.25)
    assert module.seen == 32, "the batches of the phase leave no trace"

    batches = [batch[0] for batch in data.train_dataloader()][:2]
    context = run_phases(net, "w4a8", iter(batches), ["calibrate", phase])
    assert torch.equal(net.fc.bias, bias * 0.25)
    assert torch.equal(context.results["shrink_biases"], ptq.results["shrink_biases"])
    with torch.no_grad():
        net.load_state_dict(net.state_dict() | {"fc.bias": bias, "conv.bias": net.conv.bias * 4})
        assert torch.allclose(context.results["shrink_biases"], torch.stack([net(x).mean() for x in batches]).mean())
    assert context.ledger["fc"].quantized


def test_options_and_order_are_checked_everywhere(phase):
    def in_trainer(phases):
        PTQ("w4a8", phases=phases)

    def in_search(phases):
        Evaluator(Module(), Data(), phases=phases)

    def without_lightning(phases):
        run_phases(nn.Sequential(nn.Linear(2, 2)), "w4a8", [torch.ones(1, 2)], phases)

    for door in (in_trainer, in_search, without_lightning):
        with pytest.raises(PlanError, match="put shrink_biases after calibrate: it looks at the quantized model"):
            door([phase, "calibrate"])
        with pytest.raises(PlanError, match="has no options 'shar'; valid: share. Did you mean 'share'"):
            door(["calibrate", {"shrink_biases": {"shar": 1}}])
        with pytest.raises(PlanError, match="phase 'shrink_biases': share lies between 0 and 1, got 2"):
            door(["calibrate", {"shrink_biases": {"share": 2}}])
    Evaluator(Module(), Data(), phases=["calibrate", phase])


def test_map_names_every_phase_and_its_code_runs():
    page = (Path(lq_plugin.ptq.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)`", page, re.MULTILINE) == [
        "reestimate_batch_norm", "fold_batch_norm", "equalize", "rotate", "smooth_quant", "calibrate",
        "correct_batch_norm", "bias_correct", "gptq", "reconstruct", "share_grids", "round_biases",
    ]  # fmt: skip
    assert set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == set(PHASES)
    model, batches = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), [torch.randn(16, 4)]
    model[0].bias.data.fill_(9.0)
    names = {"model": copy.deepcopy(model), "batches": batches}
    try:
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(block, names)
        context = run_phases(model, "w4a8", batches, ["calibrate", {"clamp_biases": {"limit": 2.0}}])
    finally:
        PHASES.pop("clamp_biases", None)
    assert torch.equal(model[0].bias, torch.full((8,), 2.0))
    assert torch.equal(context.results["clamp_biases"][0], model(batches[0]))
