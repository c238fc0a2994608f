"""Models of every kind: all quantizers run, in training and in evaluation; switched off or removed, they are gone bit
for bit."""

import copy
import json
import re
from importlib.util import find_spec

import lightning as L
import pytest
import torch
from torch import nn

from benchmarks import lifecycle
from benchmarks.lifecycle_models import CASES, PLAN
from lq_plugin import QAT, PlanError, QuantizationError, QuantPlan, Rule, calibrate, load_checkpoint, prepare, remove
from lq_plugin.layers import QuantizedLayer
from lq_plugin.model import quantizers
from lq_plugin.model.calibrate import float_forward
from lq_plugin.model.graph.record import record
from lq_plugin.model.prepare import quantized_layers

OWN = [case for case in CASES if case.package is None]
# torch's own advice.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
]


def installed(case):
    """A test parameter; models of other libraries are slow, and skipped where the library is not installed."""
    missing = case.package is not None and find_spec(case.package) is None
    marks = (
        []
        if case.package is None
        else [pytest.mark.slow, pytest.mark.skipif(missing, reason=f"{case.package} is not installed")]
    )
    return pytest.param(case, marks=marks, id=case.name)


every_case = pytest.mark.parametrize("case", [installed(case) for case in CASES])


@every_case
def test_every_quantizer_runs_in_training_and_in_evaluation(case):
    module, ledger = lifecycle.student(case, quantized=True)
    inputs = lifecycle.inputs_of(case)
    with torch.no_grad(), float_forward(module):
        ledger.add_recording(record(module, lambda: module(*inputs)))
    calibrate(module, [inputs], lambda batch: module(*batch))
    assert ledger.quantized
    assert lifecycle.idle(module, ledger, inputs, training=False) == []
    assert lifecycle.idle(module, ledger, inputs, training=True) == []
    # What the ledger calls quantized is what holds quantizers, less what was seen idle; all else has its reason.
    # A table that several modules share is read where one of them is.
    held = dict(quantized_layers(module))
    read = {id(lifecycle.table_of(layer)) for name, layer in held.items() if ledger[name].calls}
    assert {entry.name for entry in ledger.quantized} == {
        name for name, layer in held.items() if id(lifecycle.table_of(layer)) in read
    }
    assert all(entry.reason for entry in ledger.left_float)


@every_case
def test_switched_off_or_removed_it_is_the_float_model(case):
    plain, _ = lifecycle.student(case)
    module, _ = lifecycle.student(case, quantized=True)
    inputs = lifecycle.inputs_of(case)
    with torch.no_grad():
        with lifecycle.ordinary_paths():
            want = plain(*inputs)
            with float_forward(module):
                assert torch.equal(module(*inputs), want)
        calibrate(module, [inputs], lambda batch: module(*batch))
        assert not torch.equal(module(*inputs), want)
        remove(module)
        assert torch.equal(module(*inputs), plain(*inputs))
    # Parametrized modules have each a class of their own.
    kinds = [
        [(name, type(m).__name__, type(m).__mro__[1:]) for name, m in net.named_modules()] for net in (module, plain)
    ]
    assert kinds[0] == kinds[1]
    mine, theirs = module.state_dict(), plain.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("case", OWN, ids=lambda case: case.name)
def test_removed_after_training_it_has_the_trained_weights(case, tmp_path):
    """Fit, remove, fit again: the weights stay what training made them, and the second fit starts anew."""
    module = lifecycle.fit(case, tmp_path / "model.ckpt")
    trained = {name: p.detach().clone() for name, p in module.named_parameters() if "quantizer" not in name}
    inputs = lifecycle.inputs_of(case)
    remove(module)
    assert not quantizers(module)
    now = dict(module.named_parameters())
    assert now.keys() == trained.keys()
    assert all(torch.equal(now[name], value) for name, value in trained.items())
    plain, _ = lifecycle.student(case)
    plain.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert torch.equal(module(*inputs), plain(*inputs))
    prepare(module, "w4a4")
    assert {q.spec.bit_width for q in quantizers(module)} == {4}


@pytest.mark.slow
@every_case
def test_the_whole_life(case, tmp_path):
    with lifecycle.quiet():
        row = lifecycle.measure(case, tmp_path)
    assert row["error"] is None
    assert row["disabled_bit_equal"] is True
    assert row["removed_bit_equal"] is True
    assert row["packed_bit_equal"] is True or row["packed_bit_equal"].startswith("refused")
    assert row["compile"] == "ok"
    # MobileNetV3 with random weights makes much of small errors: weights at 8 bits alone leave 33 dB, with activations
    # 24.
    assert row["sqnr_db"] >= (20 if case.name == "timm MobileNetV3" else 30)


def test_json_has_the_promised_form(tmp_path, capsys, monkeypatch):
    """A model that fails is listed with its message, and the others go on."""
    monkeypatch.setattr(lifecycle, "compiles", lambda *_: "ok")
    broken = lifecycle.Case("broken", lambda: nn.Identity(), CASES[0].inputs)
    monkeypatch.setattr(lifecycle, "CASES", (*CASES, broken))
    out = tmp_path / "out.json"
    lifecycle.main(["--json", str(out), "--models", "broken", "Conv1d"])
    second, first = json.loads(out.read_text())["results"]
    listed = lifecycle.__doc__.partition("(`w8a8`):")[2].partition("A model that fails")[0]
    promised = re.findall(r"^    (\w+) ", listed, re.MULTILINE)
    keys = ["model", *promised, "error"]
    assert list(first) == list(second) == keys
    assert first["error"].startswith(
        "PlanError: nothing to quantize in Student, the plan matches no layer: it has no layers with weights"
    )
    assert second["error"] is None
    assert (second["layers"], second["weight_coverage"], second["checkpoint"]) == (3, 1.0, True)
    assert "broken: PlanError" in capsys.readouterr().out


def case_named(name):
    return next(case for case in CASES if case.name == name)


def test_tied_weights_stay_tied(tmp_path):
    """The embedding and the head quantize one parameter, each with its own specs."""
    module = lifecycle.fit(case_named("Embedding, tied head"), tmp_path / "model.ckpt")
    net = module.model
    assert net.head.weight is net.embedding.weight
    copied = copy.deepcopy(net)
    assert copied.head.weight is copied.embedding.weight
    assert torch.equal(net.head.quantized_weight(), net.embedding.quantized_weight())


def test_a_shared_module_has_one_set_of_quantizers():
    module, ledger = lifecycle.student(case_named("shared modules"), quantized=True)
    assert module.model.layer is module.model.again
    assert len(quantizers(module)) == 4
    assert [entry.name for entry in ledger.quantized] == ["model.layer", "model.head"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lazy_modules_are_refused_until_they_have_a_shape(trainer):
    """A Trainer never quantizes around them in silence."""
    case = case_named("lazy modules")
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.LazyConv2d(8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(10)
    )
    module = lifecycle.Student(model)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*lifecycle.inputs_of(case), torch.randn(32, 10)), 8
    )
    with pytest.raises(QuantizationError, match=r"'model\.1' \(LazyConv2d\) is not initialized"):
        trainer(QAT(PLAN)).fit(module, loader)
    with pytest.raises(PlanError, match="run one batch through the model before"):
        prepare(nn.Sequential(nn.LazyLinear(3)), PLAN)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
def test_lora_both_ways(tmp_path):
    """LoRA, then quantized: base and adapters, with trainable scales where weights are. The other way round the scales
    are frozen."""
    case = case_named("LoRA, then quantized")
    module, _ = lifecycle.student(case)
    prepare(module, "w4 lsq a4 lsq")
    for name, layer in quantized_layers(module):
        scales = [p.requires_grad for q in quantizers(layer) for p in q.parameters()]
        assert len(scales) == 3
        assert set(scales) == {"lora" in name}, name
    case = case_named("quantized, then LoRA")
    module = lifecycle.Student(case.build())
    prepare(module, "w4 lsq a4 lsq")
    module.model = case.adapt(module.model)
    plan = QuantPlan([*QuantPlan.parse("w4 lsq a4 lsq").rules, Rule("*.lora_*", weight="float", input="float")])
    before = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    inputs = lifecycle.inputs_of(case)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*inputs, torch.randn(32, 10)), 8)
    trainer = L.Trainer(
        callbacks=[QAT(plan)], max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    after = dict(module.named_parameters())
    assert any("scale" in name for name in before)
    frozen = [name for name in before if "scale" not in name and "zero_point" not in name]
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert not any(isinstance(m, QuantizedLayer) for name, m in module.named_modules() if "lora" in name)
    trainer.save_checkpoint(tmp_path / "lora.ckpt")
    fresh, _ = lifecycle.student(case)
    fresh.model = case.adapt(case.build())
    load_checkpoint(fresh, tmp_path / "lora.ckpt")
    with torch.no_grad():
        assert torch.equal(fresh.eval()(*inputs), module.eval()(*inputs))
