"""Parameters that a module's own code multiplies: experts as 3-D parameters, routers, projections."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lq_plugin
from lq_plugin import PerMatrix, PerTensor, QuantPlan, Rule, calibrate, prepare
from lq_plugin.errors import ExportError, PlanError
from lq_plugin.export import export_model, load_packed, save_packed
from lq_plugin.layers import register_products
from lq_plugin.layers.compound.products_in_code import products_in_code
from lq_plugin.model.calibrate import float_forward
from lq_plugin.model.graph.record import record
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.model.survey import Survey
from lq_plugin.report import model_report
from lq_plugin.search.space.space import Space

EXPERTS, INPUTS, HIDDEN, TOKENS = 4, 32, 48, 10


class Mixture(nn.Module):
    """Every token goes to every expert; weights `[experts, in, out]`."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.router = nn.Parameter(torch.randn(EXPERTS, INPUTS) * INPUTS**-0.5)
        self.up = nn.Parameter(torch.randn(EXPERTS, INPUTS, HIDDEN) * INPUTS**-0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INPUTS) * HIDDEN**-0.5)
        self.bias = nn.Parameter(torch.zeros(INPUTS))

    def forward(self, x):
        each = x.unsqueeze(0).expand(EXPERTS, -1, -1)
        if self.way == "bmm":
            y = torch.bmm(torch.relu(torch.bmm(each, self.up)), self.down)
        elif self.way == "einsum":
            hidden = torch.relu(torch.einsum("eti,eih->eth", each, self.up))
            y = torch.einsum("eth,ehi->eti", hidden, self.down)
        elif self.way == "operator":
            y = torch.relu(each @ self.up) @ self.down
        elif self.way == "loop":
            y = torch.stack([torch.relu(x @ up) @ down for up, down in zip(self.up, self.down, strict=True)])
        elif self.way == "linear":
            y = torch.stack([self.of_one(x, self.up[e].t(), self.down[e].T) for e in range(EXPERTS)])
        else:
            y = (self.down.mT @ torch.relu(self.up.transpose(1, 2) @ each.mT)).mT
        probabilities = F.linear(x, self.router).softmax(-1)
        return torch.einsum("te,eti->ti", probabilities, y) + self.bias

    @staticmethod
    def of_one(x, up, down):
        return F.linear(torch.relu(F.linear(x, up)), down)


WAYS = ("bmm", "einsum", "operator", "loop", "linear", "left")


def mixture(way="bmm"):
    torch.manual_seed(0)
    return Mixture(way).eval()


def tokens():
    return torch.randn(TOKENS, INPUTS, generator=torch.Generator().manual_seed(1))


def rounded(values, scale, low, high, zero_point=0.0):
    """Integer rounding in float64."""
    q = np.clip(np.rint(values / scale) + zero_point, low, high)
    return (q - zero_point) * scale


def range_of(model, key):
    quantizer = model.quantized_weights[key].input_quantizer
    scale, zero_point = quantizer.qparams()
    return float(scale), float(zero_point)


def dense(model, x, weight_of):
    """The mixture at int8 inputs in numpy, one expert after another, with the ranges that calibration has found."""
    x = x.double().numpy()

    def read(values, key):
        scale, zero_point = range_of(model, key)
        return rounded(values, scale, 0, 255, zero_point)

    logits = read(x, "router") @ weight_of(model.router.double().detach().numpy()[None], False)[0].T
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    up, down = (weight_of(getattr(model, key).double().detach().numpy(), True) for key in ("up", "down"))
    y = np.zeros_like(x)
    for expert in range(EXPERTS):
        hidden = np.maximum(read(x, "up") @ up[expert], 0)
        y += shares[:, expert : expert + 1] * (read(hidden, "down") @ down[expert])
    return y


def per_tensor(stack, inputs_first):
    """int4 with a scale for each matrix."""
    return np.stack([rounded(w, max(w.max() / 7, -w.min() / 8), -8, 7) for w in stack])


def per_channel(stack, inputs_first):
    axis = 1 if inputs_first else 2
    scale = np.maximum(stack.max(axis, keepdims=True) / 7, -stack.min(axis, keepdims=True) / 8)
    return rounded(stack, scale, -8, 7)


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_to_multiply_are_seen_and_give_one_result(way):
    plain, x = mixture(way), tokens()
    expected = plain(x)
    recorded = record(plain, lambda: plain(x), samples=1)
    ledger = lq_plugin.prepare(plain, "w8a8")
    with torch.no_grad(), float_forward(plain):
        assert torch.equal(plain(x), expected)  # switched off
        ledger.add_recording(record(plain, lambda: plain(x), samples=1))
    by_hand = {"router": TOKENS * EXPERTS * INPUTS} | dict.fromkeys(("up", "down"), TOKENS * EXPERTS * INPUTS * HIDDEN)
    assert {key: ledger[key].macs for key in by_hand} == {key: recorded.macs[key] for key in by_hand} == by_hand
    assert all(ledger[key].all_quantized and ledger[key].reason is None for key in by_hand)
    assert ledger.weight_coverage == 1
    lq_plugin.calibrate(plain, [x])
    other = mixture("bmm")
    lq_plugin.prepare(other, "w8a8")
    lq_plugin.calibrate(other, [x])
    torch.testing.assert_close(plain(x), other(x), rtol=1e-5, atol=1e-6)
    lq_plugin.remove(plain)
    assert torch.equal(plain(x), expected)
    assert type(plain) is Mixture
    assert set(plain._modules) == set()
    assert not {"up", "down", "router"} & set(plain.__dict__)


@pytest.mark.parametrize(
    ("plan", "weight_of"),
    [("int4 per_tensor / uint8 affine", per_tensor), ("int4 per_channel / uint8 affine", per_channel)],
)
@pytest.mark.parametrize("way", ["bmm", "loop"])
def test_a_dense_loop_over_experts_in_numpy(way, plan, weight_of):
    model, x = mixture(way), tokens()
    lq_plugin.prepare(model, plan)
    lq_plugin.calibrate(model, [x])
    torch.testing.assert_close(
        model(x).double().detach(), torch.from_numpy(dense(model, x, weight_of)), rtol=2e-5, atol=2e-6
    )


FORMATS = (
    "int8 per_tensor / uint8 affine", "int4 per_channel mse", "int4 group16 / int8 per_token dynamic",
    "int3 lsq per_tensor / int8 lsq", "mxfp4 / mxfp8_e4m3", "mx6", "nvfp4", "fp8 / fp8", "fp8 block16",
    "twn / int8", "ttq", "kmeans2", "kmeans3 per_channel", "seq mse", "bwn", "sign", "q4_0", "int4 group16:4:channel",
)  # fmt: skip


@pytest.mark.parametrize("plan", FORMATS)
def test_an_expert_is_quantized_as_a_linear_layer_with_its_weight(plan):
    """Formats with one scale for a whole tensor above others (nvfp4) have one for the stack, see the guide."""
    model, x = mixture(), tokens()
    with torch.no_grad():
        model.up *= torch.tensor([1.0, 0.3, 3.0, 0.01]).view(-1, 1, 1)  # experts of their own sizes
    lq_plugin.prepare(model, plan)
    lq_plugin.calibrate(model, [x])
    stack = model.quantized_weights["up"].quantized_weight().detach()
    assert stack.shape == model.up.shape
    for expert in range(EXPERTS) if "nvfp4" not in plan else ():
        linear = nn.Sequential(nn.Linear(INPUTS, HIDDEN, bias=False))
        linear[0].weight.data = model.up[expert].t().detach().clone()
        lq_plugin.prepare(linear, plan)
        lq_plugin.calibrate(linear, [x])
        torch.testing.assert_close(stack[expert].t(), linear[0].quantized_weight().detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("plan", FORMATS)
def test_checkpoints_packed_files_and_copies(plan, tmp_path):
    model, x = mixture(), tokens()
    lq_plugin.prepare(model, plan)
    lq_plugin.calibrate(model, [x])
    expected = model(x)
    save_packed(model, tmp_path / "model.safetensors")
    fresh = Mixture("bmm")
    load_packed(fresh, tmp_path / "model.safetensors")
    assert torch.equal(fresh(x), expected)
    again = Mixture("bmm")
    lq_plugin.prepare(again, plan)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), expected)
    copied = copy.deepcopy(model)
    lq_plugin.remove(model)
    assert torch.equal(copied(x), expected)
    assert copied.quantized_weights["up"].weight is copied.up


def test_gradients_pass_straight_through_to_experts_with_tokens():
    model, x = mixture("loop"), tokens()
    lq_plugin.prepare(model, "w4a8")
    lq_plugin.calibrate(model, [x])
    model.train()
    model(x).pow(2).sum().backward()
    assert model.up.grad.abs().sum((1, 2)).min() > 0
    with torch.no_grad():
        quantized = {key: part.quantized_weight().clone() for key, part in model.quantized_weights.items()}
    other = mixture("loop").train()
    with torch.no_grad():
        for key, value in quantized.items():
            getattr(other, key).copy_(value)
    # Each product has the gradient of the float product on the same numbers: here of the weights alone.
    lq_plugin.prepare(other, "int16 / uint8 affine")
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "input_quantizer" in k}, strict=False)
    other.requires_grad_(True)
    other(x).pow(2).sum().backward()
    torch.testing.assert_close(model.up.grad, other.up.grad, rtol=1e-2, atol=1e-3)


class Routed(nn.Module):
    """The tokens of one expert after another, weights `[experts, out, in]`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 16))

    def forward(self, x, counts):
        parts = x.split(counts)
        return torch.cat([F.linear(part, self.weight[expert]) for expert, part in enumerate(parts)])


def test_experts_without_tokens_move_no_range():
    model, x = Routed().eval(), torch.randn(6, 16)
    lq_plugin.prepare(model, "w8a8")
    with pytest.raises(Exception, match="no range yet"):
        model(x, [6, 0, 0])
    lq_plugin.calibrate(model, [x], run=lambda batch: model(batch, [6, 0, 0]))
    before = range_of(model, "weight")
    model.train()
    assert model(x[:0], [0, 0, 0]).shape == (0, 8)
    assert range_of(model, "weight") == before
    model.eval()
    assert torch.isfinite(model(x, [0, 2, 4])).all()


def test_rules_name_parameters():
    model = nn.Sequential(mixture(), nn.Linear(INPUTS, 4))
    rules = [
        Rule("*", weight="int8"),
        Rule("*.up", weight="int4 group16"),
        Rule("*.router", weight="float"),
    ]
    ledger = lq_plugin.prepare(model, QuantPlan(rules))
    assert str(ledger["0.up"].plan.weight) == "int4 group16"
    assert str(ledger["0.down"].plan.weight) == f"int8 matrix{INPUTS}"
    assert not ledger["0.router"].quantized
    x = tokens()
    ledger.add_recording(record(model, lambda: model(x), samples=1))
    assert ledger["0.router"].macs == TOKENS * EXPERTS * INPUTS
    assert ledger["0"].reason == "no product in its code is seen to multiply these parameters"
    assert ledger["0"].parameters == INPUTS  # the bias


def test_refusals_name_the_layer():
    with pytest.raises(PlanError, match="up: a square of 20 would hold rows of two experts, with 48 rows each"):
        lq_plugin.prepare(mixture(), "fp8 block20")
    with pytest.raises(PlanError, match="'int8 matrix20' is of matrices of 20 rows"):
        lq_plugin.prepare(mixture(), "int8 matrix20")
    with pytest.raises(PlanError, match="its weight is one matrix"):
        lq_plugin.prepare(nn.Linear(4, 4), "int8 matrix2")
    with pytest.raises(PlanError, match="activations take per_tensor"):
        lq_plugin.prepare(mixture(), "int8 / int8 matrix48")


class Hidden(nn.Module):
    """Its product is not in sight: the weight has another shape there."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 16))

    def forward(self, x):
        return torch.einsum("tki,koi->to", x.view(-1, 2, 16), self.weight)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(2, 4, 8))
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x + self.positions[0])


def test_what_is_no_matrix_product_stays_float_with_a_reason():
    for module in (Hidden(), Table()):
        assert products_in_code(type(module)) == {}
    ledger = lq_plugin.prepare(nn.Sequential(Table(), nn.Linear(8, 8)), "w8")
    assert ledger["0"].reason == "no quantized form of this layer type"
    assert ledger["0"].parameters == 64


def test_a_class_says_what_cannot_be_seen():
    source = "def forward(self, x):\n    return x @ self.matrix\n"
    content: dict = {}
    exec(source, content)  # no source to read
    kind = type("Unseen", (nn.Module,), {"forward": content["forward"]})

    def build():
        module = kind()
        module.matrix = nn.Parameter(torch.randn(16, 8))
        return module.eval()

    with pytest.raises(PlanError, match="nothing to quantize"):
        lq_plugin.prepare(build(), "w8a8")
    with pytest.raises(ValueError, match="a layout is"):
        register_products(kind, matrix="xy")
    register_products(kind, matrix="io")
    model, x = build(), torch.randn(4, 16)
    lq_plugin.prepare(model, "w8a8")
    lq_plugin.calibrate(model, [x])
    part = model.quantized_weights["matrix"]
    assert torch.equal(model(x), part.quantized_input(x) @ part.quantized_weight())
    assert part.weight_quantizer.shape == (8, 16)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.run = 3

    def forward(self, x):
        return x @ self.w


def test_names_that_quantized_modules_use_are_a_reason():
    ledger = lq_plugin.prepare(nn.Sequential(Named(), nn.Linear(4, 4)), "w8")
    assert "run have names that quantized modules use" in ledger["0"].reason


def test_named_operations_beside_own_weights():
    model, x = mixture("operator"), tokens()
    expected = model(x)
    plan = QuantPlan([Rule("*", weight="int8", input="uint8 affine"), Rule("einsum_0", input="int8")])
    lq_plugin.prepare(model, plan, record(model, lambda: model(x)))
    lq_plugin.calibrate(model, [x])
    assert {q.name for q in model.modules() if hasattr(q, "spec")} >= {"einsum_0.input_0", "up.input"}
    assert not torch.equal(model(x), expected)
    lq_plugin.remove(model)
    assert torch.equal(model(x), expected)
    assert type(model) is Mixture


def test_a_report_and_a_search_space_know_matrices():
    model, x = mixture(), tokens()
    choices = ["int4 per_tensor", "int8 per_tensor"]
    bound = Space(weight=choices, input=["int8"]).bind(Survey.of(model).infos())
    params = bound.params(QuantPlan.parse("int4 per_tensor / int8"))
    plans = bound.layer_plans(params)
    assert bound.params(bound.plan(params)) == params
    assert plans["up"].weight.granularity == PerMatrix(HIDDEN)
    assert isinstance(plans["router"].weight.granularity, PerTensor)
    lq_plugin.prepare(model, "int4 per_tensor mse / uint8 affine")
    lq_plugin.calibrate(model, [x])
    report = model_report(model, run=lambda: model(x))
    views = {layer.name: layer.views[0].what for layer in report.model.layers}
    assert views["up"].startswith("matrix ")
    assert views["up"].endswith(f" of {EXPERTS}")


def test_onnx_refuses_stacks_of_matrices(tmp_path):
    model, x = mixture(), tokens()
    lq_plugin.prepare(model, "int8 per_channel")
    lq_plugin.calibrate(model, [x])
    with pytest.raises(ExportError, match="not those that Mixture keeps otherwise: leave it float"):
        export_model(model, tmp_path / "model.onnx", inputs=(x,))
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does so
@pytest.mark.parametrize("way", ["bmm", "einsum"])
def test_torch_compile(way):
    model, x = mixture(way), tokens()
    lq_plugin.prepare(model, "w8a8")
    lq_plugin.calibrate(model, [x])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))


class _Case(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.u = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16, 16))
        self.linear, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)


class Recomputed(_Case):
    def part(self, x):
        return torch.relu(x @ self.w) @ self.u

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.part, x, use_reentrant=False)


class Updated(_Case):
    def forward(self, x):
        y = x @ self.w.t()
        with torch.no_grad():
            self.w.mul_(0.9)
            self.u[0] += 1.0
        return y @ self.u


class Renormed(_Case):
    def forward(self, x):
        self.w.data = torch.renorm(self.w.data, 2, 0, 1.0)
        return F.linear(x, self.w)


class Codebook(_Case):
    def forward(self, x):
        return self.w[(x @ self.w.t()).argmax(-1)]


class TiedTable(_Case):
    def forward(self, x):
        return self.norm(self.linear(self.w[x.argmax(-1)])) @ self.w.t()


class Returned(_Case):
    def forward(self, x):
        return x @ self.w, self.w


class Kept(_Case):
    def forward(self, x):
        self.last = self.w.detach()
        return x @ self.w


class Handed(_Case):
    def forward(self, x):
        queries = self.linear(self.w)
        return F.softmax(queries @ x.mT, -1) @ x


class Merged(_Case):
    def forward(self, x):
        return F.linear(x, self.linear.weight + self.w @ self.u)


class Method(_Case):
    def encode(self, x):
        return self.linear(x) @ self.w

    def forward(self, x):
        return self.encode(x)


class Memory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.keys, self.values = nn.Parameter(torch.randn(10, 16)), nn.Parameter(torch.randn(10, 16))

    def forward(self, x):
        return F.softmax(self.linear(x) @ self.keys.t(), -1) @ self.values


@pytest.mark.parametrize(
    "kind",
    [Recomputed, Updated, Renormed, Codebook, TiedTable, Returned, Kept, Handed, Merged, Method, Memory],
)
def test_parameters_that_are_more_than_factors_of_products_stay_float(kind: type[nn.Module]) -> None:
    """An alias of the quantized values would leave the product, or a write be lost."""
    x = torch.randn(8, 16)
    net, other = kind(), kind()
    other.load_state_dict(net.state_dict())
    prepare(net, "int8 / uint8 affine")
    own = {"w", "u", "keys", "values"}
    assert own.isdisjoint(name for name, _ in quantized_layers(net))
    calibrate(net, [x])
    other(x)  # as the calibration did
    for _ in range(2):
        net(x)
        other(x)
    for name in own & dict(net.named_parameters()).keys():
        torch.testing.assert_close(net.get_parameter(name), other.get_parameter(name))
    copy.deepcopy(net)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16))

    def forward(self, x, again=True):
        y = x @ self.w
        return y + self(x.flip(0), False) @ self.w if again else y


def test_a_module_that_calls_itself() -> None:
    net, x = Twice(), torch.randn(8, 16)
    prepare(net, "int8")
    (layer,) = (layer for _, layer in quantized_layers(net))
    w = layer.quantized_weight()
    torch.testing.assert_close(net(x), x @ w + (x.flip(0) @ w) @ w)


def test_exports_that_would_lose_an_input_are_refused() -> None:
    net, x = Twice(), torch.randn(8, 16)
    prepare(net, "w8a8")
    calibrate(net, [x])
    with pytest.raises(Exception, match="torch.export does not see the quantized inputs of w"):
        torch.export.export(net.eval(), (x, False), strict=False)
