"""Phases of PTQ do to a LightningModule what their functions do to a plain model, in the order they are given."""

import copy

import lightning as L
import pytest
import torch
from torch import nn

from lq_plugin import PTQ, calibrate, prepare
from lq_plugin.callbacks import PHASES
from lq_plugin.errors import PlanError
from lq_plugin.model.calibrate import float_forward
from lq_plugin.model.graph.record import record
from lq_plugin.ptq.batch_norm.fold import find_batch_norm_pairs, fold_batch_norm
from lq_plugin.ptq.bias_correction.correct import bias_correct
from lq_plugin.ptq.equalization.equalize import equalize
from lq_plugin.ptq.gptq.quantize import gptq
from lq_plugin.ptq.reconstruction.reconstruct import reconstruct
from lq_plugin.ptq.smooth_quant.smooth import smooth_quant
from tests.callbacks.conftest import Data, Module
from tests.models import randomize

PLAN = "int4 per_channel mse"


def chain():
    layers = [
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.Conv2d(6, 8, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))


def by_hand(module, batches):
    """Fold, equalize, calibrate on a copy; and the recording."""
    net = copy.deepcopy(module.net).eval().requires_grad_(False)
    prepare(net, PLAN)
    with float_forward(net), torch.no_grad():
        recording = record(net, lambda: net(batches[0]))
    fold_batch_norm(net, find_batch_norm_pairs(net, recording)[0])
    assert equalize(net, recording, iterations=3).pairs
    calibrate(net, batches)
    return net


@pytest.mark.parametrize(
    "last", ["bias_correct", {"gptq": {"act_order": False}}, {"reconstruct": {"iterations": 5, "by": "layer"}}]
)
def test_phases_do_what_their_functions_do(trainer, last):
    module, data = Module(), Data()
    module.net = chain()
    randomize(module)
    batches = [batch[0] for batch in data.train_dataloader()][:2]
    net = by_hand(module, batches)
    if last == "bias_correct":
        bias_correct(net, batches)
    elif "gptq" in last:
        assert len(gptq(net, batches, act_order=False).layers) == 4
    else:
        reconstruct(net, batches, by="layer", iterations=5)
    phases = ["fold_batch_norm", {"equalize": {"iterations": 3}}, "calibrate", last]
    trainer(PTQ(PLAN, phases=phases, calibration_batches=2)).validate(module, datamodule=data, verbose=False)
    state = module.net.state_dict()
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_the_datamodule_is_set_up_for_a_fit_once_a_run(trainer):
    class Staged(Data):
        def __init__(self):
            super().__init__()
            self.stages = []

        def setup(self, stage):
            self.stages.append(stage)

    data, phases = Staged(), ["reestimate_batch_norm", "equalize", "calibrate", "correct_batch_norm"]
    runner = trainer(PTQ("w8a8", calibration_batches=1, phases=phases, recalibrate=True))
    for _ in range(2):
        runner.validate(Module(), datamodule=data, verbose=False)
    assert data.stages == 2 * ["validate", "fit"]


def test_smooth_quant_does_what_its_function_does(trainer):
    module, data = Module(), Data()
    module.net = nn.Sequential(nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 4))
    randomize(module)
    batches = [batch[0] for batch in data.train_dataloader()][:2]
    net = copy.deepcopy(module.net).eval().requires_grad_(False)
    prepare(net, PLAN)
    with float_forward(net), torch.no_grad():
        recording = record(net, lambda: net(batches[0]))
    assert smooth_quant(net, batches, recording, alpha=0.7).pairs
    calibrate(net, batches)
    ptq = PTQ(PLAN, phases=[{"smooth_quant": {"alpha": 0.7}}, "calibrate"], calibration_batches=2)
    trainer(ptq).validate(module, datamodule=data, verbose=False)
    assert all(torch.equal(value, module.net.state_dict()[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ("calibrate", r"phases are a list, got 'calibrate': write \['calibrate'\]; valid: fold_batch_norm, "),
        ({"reconstruct": {}}, "phases are a list, got {'reconstruct': {}}"),
        (
            [["calibrate"]],
            r"a phase is a name or a mapping of its name to options, got \['calibrate'\]; valid: fold_batch_norm, ",
        ),
        ([None], "a phase is a name or a mapping of its name to options, got None"),
        (
            ["calibrate", {"reconstruct": 300}],
            "phase 'reconstruct': its options are a mapping of names to values, got 300",
        ),
        (
            ["calibrate", {"reconstruct": {"iteration": 3}}],
            "phase 'reconstruct' has no options 'iteration'; valid: iterations, batch_size, .*, by. Did you mean "
            "'iterations'",
        ),
        (
            ["calibrate", {"gptq": {"a": 1, "b": 2}}],
            "phase 'gptq' has no options 'a', 'b'; valid: dampening, act_order, block_columns",
        ),
        (
            [{"smooth_quant": {"alfa": 0.5}}, "calibrate"],
            "phase 'smooth_quant' has no options 'alfa'; valid: alpha. Did you mean 'alpha'",
        ),
    ],
)
def test_wrong_phases_and_options_are_named(phases, message):
    with pytest.raises(PlanError, match=message):
        PTQ("w8a8", phases=phases)


def test_options_are_checked_at_once():
    with pytest.raises(PlanError, match="phase 'smooth_quant': alpha is a share in 0..1, got 2"):
        PTQ("w8a8", phases=[{"smooth_quant": {"alpha": 2}}, "calibrate"])
    with pytest.raises(
        PlanError, match=r"(?s)phase 'gptq': .*dampening must not be negative.*act_order is true or false, got 'no'"
    ):
        PTQ("w8a8", phases=["calibrate", {"gptq": {"dampening": -1, "act_order": "no"}}])


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (["fold_batch_norm"], "lack 'calibrate'"),
        (["calibrate", "equalize"], "put equalize before calibrate"),
        (["equalize", "fold_batch_norm", "calibrate"], "put equalize after fold_batch_norm"),
        (["bias_correct", "calibrate"], "put bias_correct after calibrate"),
        (["calibrate", "bias_correct", "correct_batch_norm"], "use bias_correct or correct_batch_norm, not both"),
        (["calibrate", "calibrate"], "calibrate is named twice"),
        (["fold_batch_norm", "reestimate_batch_norm", "calibrate"], "put reestimate_batch_norm before fold_batch_norm"),
        (["calibrte"], "Did you mean 'calibrate'"),
    ],
)
def test_orders_that_cannot_be_are_refused_with_the_reason(phases, message):
    with pytest.raises(PlanError, match=message):
        PTQ("w8a8", phases=phases)


def test_every_phase_stands_alone_beside_calibrate():
    for name in PHASES:
        order = (
            [name, "calibrate"] if "calibrate" in PHASES[name].before or not PHASES[name].after else ["calibrate", name]
        )
        PTQ("w8a8", phases=list(dict.fromkeys(order)))


class SaveRank(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_validation_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), f"{self.folder}/{trainer.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("last", [{"reconstruct": {"iterations": 20}}, "gptq", "bias_correct"])
def test_processes_end_with_the_same_model(tmp_path, last):
    ptq = PTQ(PLAN, phases=["fold_batch_norm", "calibrate", last], calibration_batches=2)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_spawn", callbacks=[ptq, SaveRank(str(tmp_path))], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    module = Module()
    before = copy.deepcopy(module.net.state_dict())
    trainer.validate(module, datamodule=Data(), verbose=False)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["net.fc.bias"], before["fc.bias"]) or not torch.equal(
        first["net.fc.weight"], before["fc.weight"]
    )
