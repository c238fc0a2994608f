"""Stages of one tensor: who quantizes, who watches, what a state dict holds, and what earlier versions called it."""

import copy
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from lq_plugin import QuantizationError, QuantPlan, Rule, calibrate, load_checkpoint, prepare
from lq_plugin.export import load_packed, save_packed
from lq_plugin.functional.affine import fake_quantize
from lq_plugin.model.measure.fidelity import layer_fidelity, watching
from lq_plugin.model.prepare import quantizers
from lq_plugin.ptq.gptq.quantize import gptq
from lq_plugin.ptq.reconstruction.reconstruct import reconstruct
from lq_plugin.quantizers import Quantizer, StagedQuantizer, WeightQuantizer
from lq_plugin.quantizers.staged import Unquantized, present_keys

PLAN = QuantPlan([
    Rule("0", weight="int8 lsq", input="uint8 affine"),
    Rule("0", weight="int4 per_channel mse", input="uint6 affine ema", start="epoch 1"),
    Rule("0", weight="int2 per_channel lsq", input="uint4 affine", start="step 9"),
])  # fmt: skip


def model(plan: QuantPlan = PLAN) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    prepare(net, plan)
    calibrate(net, [torch.randn(64, 8)])
    return net


def of_earlier_version(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state as versions wrote it whose last stage held the others."""
    return {key.replace("_quantizer.last.", "_quantizer."): value for key, value in state.items()}


def test_the_wrapper_owns_a_quantizer_for_each_stage() -> None:
    net = model()
    staged = net[0].weight_quantizer
    assert isinstance(staged, StagedQuantizer)
    assert not isinstance(staged, Quantizer)
    assert [str(stage.spec) for stage in staged.stages()] == [
        "int8 lsq",
        "int4 per_channel mse",
        "int2 per_channel lsq",
    ]
    assert staged.current is staged.last
    assert staged.spec == staged.last.spec
    # No quantizer holds another one.
    assert all(len(list(q.modules())) == 1 for q in quantizers(net))
    assert [(stage.slot, str(stage.start)) for stage in net[0].layer_plan.stages][:3] == [
        ("weight", "None"), ("weight", "epoch 1"), ("weight", "step 9")
    ]  # fmt: skip
    assert not hasattr(net[2], "weight_quantizer")


@pytest.mark.parametrize(("moment", "index"), [((0, 0), 0), ((1, 4), 1), ((0, 9), 2), ((3, 30), 2)])
def test_the_stage_of_a_moment_quantizes_and_the_others_only_watch(moment: tuple[int, int], index: int) -> None:
    net = model().eval()
    staged, weight = net[0].weight_quantizer, net[0].weight
    moved = staged.set_stage(*moment)
    assert moved == (index != 2)
    assert not staged.set_stage(*moment)
    assert int(staged.stage) == index
    stage = staged.stages()[index]
    assert staged.current is stage
    scale, zero_point = stage.qparams(weight)
    by_hand = fake_quantize(weight, scale, zero_point, stage.spec.grid)
    assert torch.equal(net[0].quantized_weight(), by_hand)
    # In training every learned range takes part in the graph, those of other stages with weight 0.
    net.train()
    net[0].quantized_weight().square().sum().backward()
    learned = [s for s in staged.stages() if s.spec.learned]
    assert all(s.scale.grad is not None for s in learned)
    assert all(bool(s.scale.grad.any()) == (s is stage) for s in learned)


def test_all_stages_of_an_input_are_calibrated_and_observe() -> None:
    net = model()
    stages = net[0].input_quantizer.stages()
    assert [stage.is_calibrated for stage in stages] == [True, True, True]
    moving = stages[1]
    net.train()
    moving.observing = True
    x = torch.randn(5, 8) * 3
    net(x)
    assert moving.batch_max == x.max()
    assert moving.batch_min == x.min()
    assert net(torch.zeros(0, 8)).shape == (0, 3)
    assert moving.batch_max == x.max()


def test_a_float_stage_leaves_the_tensor_as_it_is() -> None:
    net = model(QuantPlan([Rule("0", weight="float"), Rule("0", weight="int4", start="step 3")]))
    staged = net[0].weight_quantizer
    assert isinstance(staged.stages()[0], Unquantized)
    staged.set_stage(0, 0)
    assert staged.current is None
    assert torch.equal(net[0].quantized_weight(), net[0].weight)
    assert [row.slot for row in layer_fidelity(net)] == ["weight"]


def test_state_dict_round_trip_and_that_of_earlier_versions() -> None:
    net, other = model(), model()
    net[0].weight_quantizer.set_stage(1, 0)
    with torch.no_grad():
        for q in quantizers(net):
            if hasattr(q, "scale"):
                q.scale.mul_(1.5)
    state = net.state_dict()
    assert {"0.weight_quantizer.stage", "0.weight_quantizer.last.scale", "0.weight_quantizer.earlier.1.scale"} <= set(
        state
    )
    old = of_earlier_version(state)
    kept = dict(old)
    assert "0.weight_quantizer.scale" in old
    for given in (state, old):
        fresh = copy.deepcopy(other)
        fresh.load_state_dict(given)
        assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())
        assert fresh[0].weight_quantizer.current is fresh[0].weight_quantizer.stages()[1]
    assert old.keys() == kept.keys(), "the caller's own is as it was"
    present = present_keys(list(old))
    assert {present[key] for key in old} == set(state)
    assert present_keys(list(state)) == {key: key for key in state}
    # A module of the user's own.
    assert present_keys(mine := ["vq_quantizer.stage", "vq_quantizer.codebook"]) == {key: key for key in mine}


def test_load_checkpoint_takes_both(tmp_path: object) -> None:
    net = model()
    net[0].weight_quantizer.set_stage(1, 0)
    for name, state in (("now", net.state_dict()), ("then", of_earlier_version(net.state_dict()))):
        path = f"{tmp_path}/{name}.pt"
        torch.save(state, path)
        fresh = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        load_checkpoint(fresh, path, PLAN)
        x = torch.randn(4, 8)
        assert torch.equal(fresh.eval()(x), net.eval()(x))


def test_a_float_checkpoint_loses_the_ranges_and_keeps_the_stage() -> None:
    net = model()
    net[0].weight_quantizer.set_stage(1, 0)
    floats = {key: value for key, value in net.state_dict().items() if "_quantizer" not in key}
    net.load_state_dict(floats)
    staged = net[0].weight_quantizer
    assert not any(stage.is_calibrated for stage in staged.stages())
    assert staged.current is staged.stages()[1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_copies_and_averages_are_in_the_same_stage(copied) -> None:
    net = model()
    net[0].weight_quantizer.set_stage(0, 0)
    other, x = copied(net).eval(), torch.randn(4, 8)
    assert torch.equal(other(x), net.eval()(x))
    # Written in place, as weight averages do.
    net[0].weight_quantizer.stage.fill_(1)
    assert net[0].weight_quantizer.current is net[0].weight_quantizer.stages()[1]
    assert other[0].weight_quantizer.current is other[0].weight_quantizer.stages()[0]


def test_a_pickle_of_an_earlier_version_is_refused_by_name() -> None:
    quantizer = WeightQuantizer(PLAN.rules[0].weight, "0.weight", (6, 8))
    with pytest.raises(QuantizationError, match=r"0\.weight was pickled with its stages by an earlier version"):
        WeightQuantizer.__new__(WeightQuantizer).__setstate__({**quantizer.__dict__, "starts": (None,)})


def test_learned_and_chosen_roundings_are_those_of_the_stage_in_force() -> None:
    x = torch.randn(64, 8)
    for rounding in (gptq, partial(reconstruct, iterations=30)):
        net = model()
        for slot in ("weight", "input"):
            getattr(net[0], f"{slot}_quantizer").set_stage(1, 0)
        before, staged = net[0].weight.detach().clone(), net[0].weight_quantizer
        result = rounding(net, [x])
        assert net[0].weight_quantizer is staged
        assert not staged.last.is_fixed
        # Learned rounding is put back where nearest rounding was better.
        if rounding is gptq or all(unit.kept for unit in result.units.values()):
            assert staged.current.is_fixed
            assert not torch.equal(net[0].weight, before)
            assert torch.equal(net[0].quantized_weight(), net[0].weight)


def test_optimizers_number_the_ranges_as_before() -> None:
    """The last stage's before those of the earlier ones: the states of optimizers hold their numbers alone."""
    names = [name for name, _ in model()[0].named_parameters()]
    assert names == ["weight", "bias", "weight_quantizer.last.scale", "weight_quantizer.earlier.0.scale"]


def test_the_stage_in_force_is_measured() -> None:
    net = model().eval()
    net[0].input_quantizer.set_stage(1, 0)
    with watching(net) as measured:
        net(torch.randn(16, 8))
    assert [name for name, errors in measured.items() if errors.elements] == ["0.input (stage 1)"]


@pytest.mark.parametrize("moment", [(0, 0), (1, 0), (0, 9)])
def test_a_packed_file_holds_the_stage_in_force(moment: tuple[int, int], tmp_path: object) -> None:
    net, x = model().eval(), torch.randn(16, 8)
    for quantizer in (net[0].weight_quantizer, net[0].input_quantizer):
        quantizer.set_stage(*moment)
    before = list(net.state_dict())
    path = f"{tmp_path}/net.safetensors"
    save_packed(net, path)
    fresh = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    load_packed(fresh, path)
    assert list(net.state_dict()) == before
    assert torch.equal(fresh.eval()(x), net(x))
    for slot in ("weight", "input"):
        assert getattr(fresh[0], f"{slot}_quantizer").spec == getattr(net[0], f"{slot}_quantizer").current.spec


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_a_distributed_checkpoint_holds_every_stage(tmp_path: Path) -> None:
    net, again = model(), model()
    net[0].weight_quantizer.set_stage(1, 4)
    with torch.no_grad():
        for quantizer in quantizers(net):
            quantizer.scale.mul_(1.5)
    dcp.save(net.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    state = again.state_dict()
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    again.load_state_dict(state)
    assert int(again[0].weight_quantizer.stage) == 1
    x = torch.randn(4, 8)
    assert torch.equal(again.eval()(x), net.eval()(x))
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in again.state_dict().items())
