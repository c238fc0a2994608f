"""Folding: same function, same keys, bit-equal way back; and every unsafe pair refused with its reason."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from lq_plugin.errors import QuantizationError
from lq_plugin.model.graph.record import record
from lq_plugin.ptq.batch_norm.fold import Pair, find_batch_norm_pairs, fold_batch_norm
from tests.models import Function, MobileNet, PreActivation, SharedConv, TwoConsumers, randomize, resnet20


def find(model: nn.Module, *inputs):
    with torch.no_grad():
        return find_batch_norm_pairs(model, record(model.eval(), lambda: model(*inputs)))


def reason(model: nn.Module, *inputs) -> str:
    """The reason of the only refusal; no pair was found."""
    pairs, refused = find(model, *inputs)
    assert pairs == []
    (refusal,) = refused
    assert str(refusal) == f"{refusal.name!r}: {refusal.reason}"
    return refusal.reason


def conv_bn(**kwargs) -> nn.Sequential:
    return randomize(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, **kwargs)))


def behind(producer: nn.Module, bn: nn.Module) -> nn.Sequential:
    return randomize(nn.Sequential(producer, bn))


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))

FOLDABLE = {
    "resnet20": (lambda: resnet20(8), (3, 3, 32, 32), 19),
    "mobilenet": (MobileNet, (3, 3, 16, 16), 10),
    "preactivation": (PreActivation, (2, 8, 6, 6), 1),
    "linear": (lambda: behind(nn.Linear(5, 7), nn.BatchNorm1d(7)), (4, 5), 1),
    "linear_no_bias": (lambda: behind(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7, eps=1e-3)), (4, 5), 1),
    "conv1d": (lambda: behind(nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)), (2, 4, 9), 1),
    "conv3d": (lambda: behind(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), (2, 2, 4, 4, 4), 1),
    "conv_transpose1d_groups": (lambda: behind(nn.ConvTranspose1d(6, 4, 3, groups=2), nn.BatchNorm1d(4)), (2, 6, 5), 1),
    "conv_transpose2d": (lambda: behind(nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)), (2, 4, 5, 5), 1),
    "conv_transpose3d": (
        lambda: behind(nn.ConvTranspose3d(4, 8, 2, groups=4, bias=False), nn.BatchNorm3d(8)),
        (1, 4, 3, 3, 3),
        1,
    ),
    "sync_batch_norm": (lambda: behind(nn.Conv2d(3, 6, 3), nn.SyncBatchNorm(6)), (2, 3, 8, 8), 1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FOLDABLE)
def test_folded_model_computes_the_same(name: str, dtype: torch.dtype):
    build, shape, count = FOLDABLE[name]
    torch.manual_seed(0)
    model = randomize(build()).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    pairs, refused = find(model, x)
    assert len(pairs) == count
    before = {key: value.clone() for key, value in model.state_dict().items()}
    identities = {
        name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers(), *model.named_modules())
    }
    with torch.no_grad():
        expected = model(x)
    folded = fold_batch_norm(model, pairs)

    exact = dtype == torch.float64
    tolerance = 1e-10 if exact else 1e-5
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert {
        name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers(), *model.named_modules())
    } == identities
    assert list(model.state_dict()) == list(before)
    assert max(folded.relative_errors().values()) < (1e-14 if exact else 2e-7)
    for pair in pairs:
        bn = model.get_submodule(pair.batch_norm)
        assert bool((bn.weight == 1).all())
        assert bool((bn.running_mean == 0).all())
        assert not torch.equal(before[f"{pair.producer}.weight"], model.get_submodule(pair.producer).weight)

    plain = build().to(dtype).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(plain(x), model(x))

    folded.undo()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert len(refused) + count == sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def test_weight_against_numpy():
    model = conv_bn(eps=1e-3)
    arrays = {key: value.numpy().astype(np.float64).copy() for key, value in model.state_dict().items()}
    fold_batch_norm(model, [Pair("0", "1")])
    scale = arrays["1.weight"] / np.sqrt(arrays["1.running_var"] + 1e-3)
    after = {key: value.numpy() for key, value in model.state_dict().items()}
    np.testing.assert_array_equal(
        after["0.weight"], (arrays["0.weight"] * scale[:, None, None, None]).astype(np.float32)
    )
    np.testing.assert_array_equal(after["0.bias"], (arrays["0.bias"] * scale).astype(np.float32))
    np.testing.assert_array_equal(
        after["1.bias"], (arrays["1.bias"] - arrays["1.running_mean"] * scale).astype(np.float32)
    )
    np.testing.assert_array_equal(after["1.running_var"], np.float32(1 - 1e-3))
    assert after["1.num_batches_tracked"] == arrays["1.num_batches_tracked"]


def test_resnet20_pairs():
    pairs, refused = find(randomize(resnet20(4)), torch.randn(1, 3, 32, 32))
    assert refused == []
    blocks = [f"layer{s}.{b}." for s in (1, 2, 3) for b in (0, 1, 2)]
    assert pairs == [Pair("conv1", "bn1"), *(Pair(f"{b}conv{i}", f"{b}bn{i}") for b in blocks for i in (1, 2))]


def test_recorded_in_training_mode_finds_the_same():
    model, x = resnet20(4).train(), torch.randn(2, 3, 32, 32)
    pairs, refused = find_batch_norm_pairs(model, record(model, lambda: model(x)))
    assert (len(pairs), refused) == (19, [])


def test_folding_a_folded_pair_changes_nothing():
    model = conv_bn().double()
    pairs, _ = find(model, IMAGE.double())
    fold_batch_norm(model, pairs)
    once = copy.deepcopy(model.state_dict())
    fold_batch_norm(model, pairs)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, once[key], rtol=1e-12, atol=0)


# --- what must not be folded -----------------------------------------------------------------------


def channels_last_head() -> nn.Module:
    """A linear layer's [N, L, C] with L == C: equal sizes on the wrong axis."""
    return behind(nn.Linear(5, 4), nn.BatchNorm1d(4))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    return model


def tied_bn() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.GroupNorm(1, 3))
    model[1].bias = model[2].bias
    return model


def hidden_view() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3))
    model.register_buffer("snapshot", model[0].weight.detach()[1:])
    return model


def broken_statistics() -> nn.Module:
    model = conv_bn()
    model[1].running_var[2] = float("nan")
    return model


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6))


def pruned() -> nn.Module:
    model = conv_bn()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def penalty(m, x):
    return m.bn(m.conv(x)).mean() + m.conv.weight.square().sum()


def layers(**more: nn.Module) -> dict[str, nn.Module]:
    return {"conv": nn.Conv2d(3, 6, 3), "bn": nn.BatchNorm2d(6), **more}


REFUSED = {
    "relu_between": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)), "made by '1' (ReLU)"),
    "relu_in_place": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(6)),
    "made by '1' (ReLU)"),
    "functional_in_place": (lambda: Function(lambda m, x: m.bn(m.conv(x).add_(1)), **layers()), "made by 'other_add_0' "
    "(add)"),
    "input": (lambda: nn.Sequential(nn.BatchNorm2d(3)), "not made by a layer"),
    "two_consumers": (lambda: Function(lambda m, x: m.bn(y := m.conv(x)) + y, **layers()), "has 2 consumers: 'bn', "
    "'add_0'"),
    "output_too": (lambda: Function(lambda m, x: (m.bn(y := m.conv(x)), y), **layers()), "has 2 consumers: 'bn', "
    "'output'"),
    "read_out": (lambda: Function(lambda m, x: (y := m.conv(x), y.tolist(), m.bn(y))[2], **layers()),
    "2 consumers: 'tolist_0', 'bn'"),
    "view_consumer": (lambda: Function(lambda m, x: m.bn(y := m.conv(x)).sum() + y[:, 0].exp().sum(), **layers()),
    "has 2 consumers"),
    "bn_twice": (lambda: Function(lambda m, x: m.bn(m.bn(m.conv(x))), **layers()), "it was called 2 times"),
    "bn_unused": (lambda: Function(lambda m, x: m.conv(x), **layers()), "not called in the recorded pass"),
    "functional_conv": (lambda: Function(lambda m, x: m.bn(F.conv2d(x, m.conv.weight)), **layers()),
    "made by 'conv2d_0' (conv2d)"),
    "functional_use_of_weight": (lambda: Function(penalty, **layers()), "'conv.weight' is also read by 'square_0'"),
    "functional_use_of_gamma": (
        lambda: Function(lambda m, x: m.bn(m.conv(x)).sum() + m.bn.weight.abs().sum(), **layers()),
        "'bn.weight' is also read by 'abs_0'"
    ),
    "tied": (tied, "'0.weight' is shared with '2.weight'"),
    "tied_bn": (tied_bn, "'1.bias' is shared with '2.bias'"),
    "hidden_view": (hidden_view, "'0.weight' is shared with 'snapshot'"),
    "no_affine": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False)), "affine=False"),
    "no_statistics": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)),
    "track_running_stats=False"),
    "nan_statistics": (broken_statistics, "NaN or Inf"),
    "permuted": (lambda: Function(lambda m, x: m.bn(m.conv(x).transpose(1, 2)), **layers()),
    "reshaped, cast or sliced"),
    "cast": (lambda: Function(lambda m, x: m.bn(m.conv(x).double().float()), **layers()), "reshaped, cast or sliced"),
    "spectral_norm": (spectral, "weight of '0' (ParametrizedConv2d) is computed"),
    "pruned": (pruned, "weight of '0' (Conv2d) is computed"),
    "other_layer": (lambda: nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(3)), "made by '0' (MaxPool2d)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str):
    build, part = REFUSED[name]
    assert part in reason(build(), IMAGE)


def test_refused_shared_conv_preactivation_and_two_consumers():
    x = torch.randn(2, 8, 6, 6)
    pairs, refused = find(SharedConv(), x)
    assert pairs == []
    assert [r.reason for r in refused] == ["'conv' (Conv2d) was called 2 times"] * 2
    pairs, refused = find(PreActivation(), x)
    assert pairs == [Pair("conv1", "bn2")]
    assert (refused[0].name, refused[0].reason) == ("bn1", "its input is not made by a layer")
    assert "2 consumers" in reason(TwoConsumers(), x)


def test_refused_channels_on_another_axis():
    assert "not dim 1" in reason(channels_last_head(), torch.randn(3, 4, 5))
    # An unbatched [C, L] is read by BatchNorm1d as [N, C].
    assert "not dim 1" in reason(behind(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)), torch.randn(3, 4))
    sliced = Function(lambda m, x: m.bn(m.conv(x)[:, :3]), conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(3))
    assert "sliced in between" in reason(sliced, IMAGE)


def test_recording_of_a_module_under_two_names_is_no_sharing():
    """One module reachable twice is one module; its calls are counted."""
    model = conv_bn()
    model.alias = model[0]
    wrapped = Function(lambda m, x: m.inner[1](m.inner[0](x)), inner=model)
    assert find(wrapped, IMAGE)[0] == [Pair("inner.0", "inner.1")]


# --- forwards of others ----------------------------------------------------------------------------


class StandardizedConv(nn.Conv2d):
    def forward(self, x):
        weight = self.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


class SamePadConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


class BatchNormAct(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class BatchNormSquared(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + x


class Failing(nn.Conv2d):
    def forward(self, x):
        if self.weight.dtype == torch.float64:
            raise TypeError("float only")
        return super().forward(x)


def test_custom_forwards_are_tried_out():
    assert find(behind(SamePadConv(3, 6, 2), BatchNormAct(6)), IMAGE)[0] == [Pair("0", "1")]
    assert "forward of StandardizedConv computes something else" in reason(
        behind(StandardizedConv(3, 6, 3), nn.BatchNorm2d(6)), IMAGE
    )
    assert "forward of BatchNormSquared computes something else" in reason(
        behind(nn.Conv2d(3, 6, 3), BatchNormSquared(6)), IMAGE
    )
    assert "forward of Failing raised TypeError('float only')" in reason(
        behind(Failing(3, 6, 3), nn.BatchNorm2d(6)), IMAGE
    )
    model = behind(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    model[0].forward = lambda x: F.conv2d(x, torch.ones(6, 3, 3, 3))  # float weights, whatever the module holds
    assert "could not be tried out" in reason(model, IMAGE)


@pytest.mark.parametrize("base", [nn.Conv2d, SamePadConv])
def test_a_swapped_class_counts_as_the_float_class_it_stands_for(base: type[nn.Conv2d]):
    class QuantizedConv2d(base):
        float_class = base

        def forward(self, x):
            return super().forward(x).round() if self.on else super().forward(x)

    model = behind(base(3, 6, 3), nn.BatchNorm2d(6))
    model[0].__class__ = QuantizedConv2d
    model[0].on = False
    with torch.no_grad():
        recording = record(model, lambda: model(IMAGE))
    model[0].on = True
    assert find_batch_norm_pairs(model, recording) == ([Pair("0", "1")], [])


# --- the object ------------------------------------------------------------------------------------


def test_inference_mode_frozen_parameters_and_a_later_training_step():
    model = conv_bn()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        expected = model(IMAGE)
        folded = fold_batch_norm(model, find(model, IMAGE)[0])
        torch.testing.assert_close(model(IMAGE), expected, rtol=1e-5, atol=1e-5)
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
    model(IMAGE).sum().backward()
    assert model[1].weight.grad is not None
    folded.undo()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_freeze_holds_against_train():
    model, other = conv_bn(), nn.BatchNorm2d(3)
    whole = nn.Sequential(other, model)
    folded = fold_batch_norm(whole, [Pair("1.0", "1.1")])
    frozen = folded.freeze()
    whole.train()
    frozen.apply()
    assert (whole.training, other.training, model[1].training) == (True, True, False)
    statistics = model[1].running_mean.clone()
    whole(IMAGE)
    assert torch.equal(model[1].running_mean, statistics)
    frozen.release()
    assert model[1].training


def test_relative_errors_see_a_change():
    model = conv_bn()
    folded = fold_batch_norm(model, [Pair("0", "1")])
    assert 0 < folded.relative_errors()[Pair("0", "1")] < 2e-7
    with torch.no_grad():
        model[1].bias[3] += 0.5
    assert folded.relative_errors()[Pair("0", "1")] > 1e-2


def test_folded_objects_pickle():
    model = conv_bn()
    folded = fold_batch_norm(model, [Pair("0", "1")])
    buffer = io.BytesIO()
    torch.save(folded, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    again.undo()
    assert again.pairs == folded.pairs


def test_all_faults_at_once_and_nothing_changed():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(4))
    before = copy.deepcopy(model.state_dict())
    pairs = [Pair("0", "1"), Pair("0", "3"), Pair("2", "1"), Pair("0", "nine"), Pair("0", "2")]
    with pytest.raises(QuantizationError) as error:
        fold_batch_norm(model, pairs)
    text = str(error.value)
    for part in (
        "'0' has 6 output channels, it has 4",
        "'2' is a ReLU, not a linear or convolution",
        "has no 'nine'",
        "'2' is a ReLU, not a batch norm",
        "'0' is the producer of 4 pairs",
        "'1' is the batch_norm of 2 pairs",
    ):
        assert part in text
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_overflow_of_half_precision_is_refused_before_anything_changes():
    model = conv_bn().half()
    with torch.no_grad():
        model[1].running_var.fill_(0.0)
        model[1].weight.fill_(6e4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QuantizationError, match=r"not finite in torch\.float16"):
        fold_batch_norm(model, [Pair("0", "1")])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float64(dtype: torch.dtype):
    model = conv_bn().to(dtype)
    exact = copy.deepcopy(model).double()
    fold_batch_norm(model, [Pair("0", "1")])
    fold_batch_norm(exact, [Pair("0", "1")])
    assert torch.equal(model[0].weight, exact[0].weight.to(dtype))
