"""Operations that no layer owns: quantized where a rule asks for them by name, float otherwise."""

import contextlib
import copy
import pickle
from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lq_plugin import PlanError, QuantPlan, QuantSpec, Rule, calibrate, load_checkpoint, prepare, remove
from lq_plugin.demo.resnet import CifarResNet
from lq_plugin.model import quantized_operations, quantizers, record
from lq_plugin.model.calibrate import float_forward
from lq_plugin.model.operations.rules import names_operation
from lq_plugin.report.explain import explain

INT8 = "int8 minmax"


class Function(nn.Module):
    """Runs a function of itself and its inputs."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def only(*patterns, spec=INT8):
    return QuantPlan([Rule(pattern, input=spec) for pattern in patterns])


def prepared(model, plan, *inputs):
    """The model in evaluation mode, prepared and calibrated on these inputs, and its ledger."""
    model.eval()
    with torch.no_grad():
        recording = record(model, lambda: model(*inputs))
    ledger = prepare(model, plan, recording)
    calibrate(model, [inputs], lambda batch: model(*batch))
    ledger.add_recording(recording)
    return ledger


def calls_of(model, run):
    """Returns how often each quantizer runs."""
    calls = Counter()
    handles = [q.register_forward_hook(lambda q, *_: calls.update([q.name])) for q in quantizers(model)]
    run()
    for handle in handles:
        handle.remove()
    return dict(calls)


def native(x, quantizer):
    """torch's own fake quantization with the range of a quantizer."""
    return torch.fake_quantize_per_tensor_affine(x, quantizer.scale.item(), int(quantizer.zero_point.item()), -128, 127)


def by_name(model):
    return {q.name: q for q in quantizers(model)}


@pytest.mark.parametrize("training", [False, True])
def test_residual_add_equals_the_block_written_by_hand(training):
    torch.manual_seed(0)
    model, x = CifarResNet(8, 4), torch.randn(4, 3, 16, 16)
    ledger = prepared(model, only("layer?.0.add_0"), x)
    names = [f"layer{stage}.0.add_0" for stage in (1, 2, 3)]
    assert [entry.name for entry in ledger.quantized] == names
    assert {ledger[name].plan.input for name in names} == {QuantSpec.parse(INT8)}
    model.train(training)
    inputs = {}
    for name in names:
        block = model.get_submodule(name[:-6])
        block.register_forward_hook(lambda block, args, y, name=name: inputs.update({name: (args[0], y)}))
    twin = copy.deepcopy(model)  # batch norms move in training
    remove(twin)
    want_calls = {f"{name}.input_{i}": 1 for name in names for i in (0, 1)}
    assert calls_of(model, lambda: model(x)) == want_calls
    for name, (h, y) in inputs.items():
        block, held = twin.get_submodule(name[:-6]), by_name(model)
        main = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(h)))))
        if block.stride > 1:
            h = F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, 2 * h.shape[1] // 4, 2 * h.shape[1] // 4))
        want = F.relu(native(main, held[f"{name}.input_0"]) + native(h, held[f"{name}.input_1"]))
        assert torch.equal(y, want)


def attention(module, x):
    q, k, v = module.qkv(x).chunk(3, -1)
    scores = torch.softmax(q @ k.transpose(1, 2) / 4, -1)
    return module.out(scores @ v)


def test_products_with_gradients_equal_those_written_by_hand():
    torch.manual_seed(0)
    model, x = nn.Sequential(Function(attention, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8))), torch.randn(3, 5, 8)
    prepared(model, only("0.matmul_*"), x)
    held = by_name(model)

    def by_hand(inner, x):
        q, k, v = inner.qkv(x).chunk(3, -1)
        scores = native(q, held["0.matmul_0.input_0"]) @ native(k.transpose(1, 2), held["0.matmul_0.input_1"])
        probabilities = native(torch.softmax(scores / 4, -1), held["0.matmul_1.input_0"])
        return inner.out(probabilities @ native(v, held["0.matmul_1.input_1"]))

    got, want = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = model.train()(got)
    y.sum().backward()
    twin = copy.deepcopy(model)
    remove(twin)
    hand = by_hand(twin[0], want)
    assert torch.equal(y, hand)
    hand.sum().backward()
    torch.testing.assert_close(got.grad, want.grad)
    assert {str(axis) for axis in (held["0.matmul_0.input_0"].axis, held["0.matmul_0.input_1"].axis)} == {"-1", "-2"}


def test_cat_and_functional_layers_quantize_each_activation():
    def forward(m, x, y):
        joined = torch.cat([x, F.linear(y, m.inner.weight), x + 1], dim=1)
        return torch.cat((joined, joined), -1) * joined.new_ones(())

    torch.manual_seed(0)
    model = Function(forward, inner=nn.Linear(4, 4))
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    ledger = prepared(model, only("cat_0", "linear_0"), x, y)
    assert sorted(by_name(model)) == ["cat_0.input_0", "cat_0.input_1", "cat_0.input_2", "linear_0.input_0"]
    held = by_name(model)
    inner = F.linear(native(y, held["linear_0.input_0"]), model.inner.weight)
    parts = [native(t, held[f"cat_0.input_{i}"]) for i, t in enumerate((x, inner, x + 1))]
    with torch.no_grad():
        assert torch.equal(model(x, y), torch.cat([torch.cat(parts, 1)] * 2, -1))
    assert ledger["cat_1"].reason == "functional cat: no rule asks for it by name"
    assert not ledger["cat_1"].quantized


needs_transformers = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed"),
]


def language_model(kind, implementation):
    import transformers

    torch.manual_seed(0)
    sizes = {
        "Bert": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 16,
        },
        "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0},
    }[kind]
    config = getattr(transformers, f"{kind}Config")(vocab_size=32, **sizes)
    config._attn_implementation = implementation
    return Function(
        lambda m, ids, mask: m.net(input_ids=ids, attention_mask=mask).last_hidden_state,
        net=getattr(transformers, f"{kind}Model")(config),
    )


def tokens():
    ids = torch.randint(0, 32, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return ids, mask


@pytest.mark.parametrize("implementation", [pytest.param(name, marks=needs_transformers) for name in ("eager", "sdpa")])
@pytest.mark.parametrize("kind", ["Bert", "GPT2"])
def test_attention_of_transformers(kind, implementation, monkeypatch):
    """Q, K, V and, where they are computed, probabilities; against torch's functions replaced by quantizing ones."""
    model, inputs = language_model(kind, implementation), tokens()
    op = {"eager": "matmul", "sdpa": "scaled_dot_product_attention"}[implementation]
    ledger = prepared(model, only(f"type:{op}"), *inputs)
    found = [entry for entry in ledger if entry.functional and entry.kind == op]
    assert len(found) == (4 if implementation == "eager" else 2)
    inside = "functional scaled_dot_product_attention: a parameter, or what it computes inside, stays float"
    assert {entry.reason for entry in found} == {None if implementation == "eager" else inside}
    assert all(entry.quantized and entry.macs for entry in found)
    assert all(entry.reason for entry in ledger.left_float)
    names = [f"{entry.name}.input_{i}" for entry in found for i in range(2 if op == "matmul" else 3)]
    held = by_name(model)
    assert list(held) == names
    assert calls_of(model, lambda: model(*inputs)) == dict.fromkeys(names, 1)
    with torch.no_grad():
        got = model(*inputs)
    assert calls_of(model.train(), lambda: model(*inputs)) == dict.fromkeys(names, 1)
    model.eval()

    place, original = (torch, torch.matmul) if op == "matmul" else (F, F.scaled_dot_product_attention)
    waiting = [[held.pop(f"{entry.name}.input_{i}") for i in range(2 if op == "matmul" else 3)] for entry in found]
    remove(model)

    def quantizing(*args, **kwargs):
        chosen = waiting.pop(0)
        names = ("query", "key", "value")[len(args) :] if op != "matmul" else ()
        operands = [*args[: len(chosen)], *(kwargs.pop(name) for name in names)]
        return original(*map(native, operands, chosen), *args[len(chosen) :], **kwargs)

    with torch.no_grad():
        want_float = model(*inputs)
        monkeypatch.setattr(place, op, quantizing)
        want = model(*inputs)
    assert not waiting
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert (want - want_float).abs().max() > 1e-5


def test_layers_alone_are_meant_by_a_star_and_by_patterns_that_match_layers():
    torch.manual_seed(0)
    model, x = CifarResNet(8, 4), torch.randn(1, 3, 8, 8)
    ledger = prepared(model, QuantPlan.parse("w8 a8 minmax"), x)
    assert not quantized_operations(model)
    assert "forward" not in model.layer1[0].__dict__
    add = ledger["layer1.0.add_0"]
    assert (add.quantized, add.reason) == (False, "functional add: no rule asks for it by name")


def test_what_names_an_operation():
    assert all(
        map(names_operation, ["add_0", "a.b.matmul_12", "*.cat_?", "type:bmm", r"re:.*\.(add|mul)_\d", "h.[01].add_*"])
    )
    assert not any(
        map(names_operation, ["*", "layer1.*", "add", "type:Linear", "padding_0", "my_add_0", "re:.*conv.*"])
    )


@pytest.mark.parametrize("look", [prepare, explain])
@pytest.mark.parametrize(("got", "near"), [("key", "keys"), ("prod", "product"), ("hardswis", "hardswish")])
def test_a_mistyped_operation_is_named_with_what_is_near(look, got, near):
    plan = {"rules": [{"match": "*", "weight": "int8"}, {"match": f"type:{got}", "input": "int8"}]}
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(PlanError, match=f"'type:{got}' matches no layer") as caught:
        look(net, plan) if look is prepare else look(plan, net)
    assert f"type:{got}: operations have types also. Did you mean '{near}'" in str(caught.value)
    with pytest.raises(PlanError, match="Did you mean 'Linear'") as caught:
        prepare(net, {"rules": [{"match": "type:Liner", "weight": "int8"}]})
    assert "operations" not in str(caught.value)


def test_disabled_removed_copied_and_pickled():
    torch.manual_seed(0)
    model = CifarResNet(8, 4)
    plan = QuantPlan([*QuantPlan.parse("w8 a8 minmax").rules, Rule("*.add_0", input=INT8)])
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        float_answer = model.eval()(x)
        keys, hooks = (
            set(model.state_dict()),
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        )
        prepared(model, plan, x)
        answer = model(x)
        assert not torch.equal(answer, float_answer)
        with float_forward(model):
            assert torch.equal(model(x), float_answer)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), answer)
            by_name(twin)["layer1.0.add_0.input_0"].scale.mul_(3)
            assert not torch.equal(twin(x), answer)
            assert torch.equal(model(x), answer)
            remove(twin)
            assert torch.equal(twin(x), float_answer)
        remove(model)
        assert torch.equal(model(x), float_answer)
    assert set(model.state_dict()) == keys
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_checkpoint_says_which_operations_it_has(tmp_path):
    torch.manual_seed(0)
    model, x = CifarResNet(8, 4), torch.randn(2, 3, 8, 8)
    plan = QuantPlan([Rule("*", weight="int8"), Rule("layer1.*.add_*", input=INT8)])
    prepared(model, plan, x)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert sum("quantized_operations.add_0.input_1_quantizer.scale" in key for key in model.state_dict()) == 1
    fresh = CifarResNet(8, 4).eval()
    load_checkpoint(fresh, tmp_path / "model.pt", plan)
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))
    assert {name for name, _ in quantized_operations(fresh)} == {"layer1.0.add_0"}


def test_a_recording_of_another_model_changes_nothing():
    model, x = nn.Sequential(CifarResNet(8, 4)), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        recording = record(model.eval(), lambda: model(x))
    other = CifarResNet(8, 4)
    with pytest.raises(
        PlanError, match=r"operations of another model: (?s:.*)0.layer1.0.add_0: there is no module '0.layer1.0'"
    ):
        prepare(other, only("*.add_0"), recording)
    assert not quantizers(other)


def test_preparing_again_changes_nothing_and_another_plan_is_refused():
    model, x = CifarResNet(8, 4), torch.randn(1, 3, 8, 8)
    plan = only("*.add_0")
    prepared(model, plan, x)
    before = list(by_name(model).values())
    assert len(prepare(model, plan).quantized) == 3
    assert all(a is b for a, b in zip(before, by_name(model).values(), strict=True))
    with pytest.raises(PlanError, match="prepared with another plan already"):
        prepare(model, "w8a8")
    with pytest.raises(PlanError, match=r"prepared with another plan already \(3 layers differ, first layer1.0.add_0"):
        prepare(model, only("*.add_0", spec="int4 minmax"))


class Curved(nn.Module):
    """Activation functions as a module, as one that writes in place, and as a function."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.act, self.here = nn.Hardswish(), nn.SiLU(inplace=True)

    def forward(self, x):
        return F.relu(self.c(self.here(self.b(self.act(self.a(x)))))).tanh() + F.gelu(x)


def test_inputs_of_activation_functions():
    """By hand: what a function reads is rounded; ReLU, which is computed with the layer before, has no name."""
    torch.manual_seed(0)
    model, x = Curved(), torch.randn(16, 6)
    plain = copy.deepcopy(model).eval()
    ledger = prepared(model, only("type:hardswish", "here.silu_0", "tanh_*"), x)
    names = ["act.hardswish_0", "here.silu_0", "tanh_0"]
    assert [entry.name for entry in ledger.quantized] == names
    q = [by_name(model)[f"{name}.input_0"] for name in names]
    y = F.silu(native(plain.b(F.hardswish(native(plain.a(x), q[0]))), q[1]))
    y = native(F.relu(plain.c(y)), q[2]).tanh() + F.gelu(x)
    torch.testing.assert_close(model(x), y)
    again = Curved().eval()
    prepare(again, only("type:hardswish", "here.silu_0", "tanh_*"), record(again, lambda: again(x)))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    with pytest.raises(PlanError, match=r"'relu_0' matches no layer"):
        prepare(Curved(), only("relu_0"), record(plain, lambda: plain(x)))
    remove(model)
    assert torch.equal(model(x), plain(x))
    assert model.state_dict().keys() == plain.state_dict().keys()


def in_place(m, x):
    y = alias = m.lin(x)
    y.add_(x)
    y += x
    return alias * 1.0


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (only("*.adds_0"), r"'\*.adds_0' matches no layer"),
        (
            only("add_7"),
            r"'add_7' matches no layer and no operation of the recorded batch; operations: add_0, add_1.* Did you mean",
        ),
        (QuantPlan([Rule("add_1", weight="int8")]), "'add_1': an operation has no weight to quantize"),
        (only("add_1", spec="int8 per_channel minmax"), "has a scale for each channel"),
        (only("add_1", spec="xnor"), "input 'xnor' scales the output of plain Linear"),
    ],
)
def test_faults_change_nothing(plan, message):
    model, x = Function(in_place, lin=nn.Linear(4, 4)), torch.randn(2, 4)
    with torch.no_grad():
        recording = record(model.eval(), lambda: model(x))
    with pytest.raises(PlanError, match=message):
        prepare(model, plan, recording)
    assert not quantizers(model)
    assert "forward" not in model.__dict__


def test_operations_are_known_from_a_recording_only():
    with pytest.raises(
        PlanError,
        match=r"operations are known from a recorded batch only: .*prepare\(model, plan, lq_plugin.model.record",
    ):
        prepare(CifarResNet(8, 4), only("*.add_0"))


@pytest.mark.parametrize("spec", [INT8, "int8 group2:4", "mx9"])
def test_in_place_operations_still_write_to_their_first_operand(spec):
    """Every holder of that tensor sees the result, as without quantizers."""
    torch.manual_seed(0)
    model, x = Function(in_place, lin=nn.Linear(4, 4)), torch.randn(2, 4)
    prepared(model, only("add_*", spec=spec), x)
    held = by_name(model)
    with torch.no_grad():
        once = held["add_0.input_0"](model.lin(x)) + held["add_0.input_1"](x)
        want = held["add_1.input_0"](once) + held["add_1.input_1"](x)
        assert not torch.equal(want, model.lin(x) + x + x)
    got = model(x)
    assert torch.equal(got, want)
    got.sum().backward()
    if spec == INT8:
        assert torch.equal(model.lin.weight.grad[0], x.sum(0))


def test_results_written_elsewhere():
    def forward(m, x):
        torch.add(x, m.lin(x), out=m.result)
        return m.result

    torch.manual_seed(0)
    model, x = Function(forward, lin=nn.Linear(4, 4)), torch.randn(2, 4)
    model.result = torch.empty(2, 4)
    prepared(model, only("add_0"), x)
    held = by_name(model)
    with torch.no_grad():
        assert torch.equal(model(x), native(x, held["add_0.input_0"]) + native(model.lin(x), held["add_0.input_1"]))


def test_noise_that_only_training_adds_does_not_shift_the_names():
    def forward(m, x):
        if m.training:
            x = x + torch.randn_like(x) * 0.0
        return m.lin(x) + x

    model, x = Function(forward, lin=nn.Linear(4, 4)), torch.randn(2, 4)
    prepared(model, only("add_0"), x)
    assert calls_of(model, lambda: model.train()(x)) == {"add_0.input_0": 1, "add_0.input_1": 1}
    with torch.no_grad():
        held, y = by_name(model), model.lin(x)
        assert torch.equal(model(x), native(y, held["add_0.input_0"]) + native(x, held["add_0.input_1"]))


def test_calls_inside_submodules_recursion_and_exceptions_are_not_counted():
    def inner(m, x):
        if m.fail:
            raise ValueError("caught")
        return x + x

    def forward(m, x, depth=1):
        if depth:
            x = m(x, 0)
        with contextlib.suppress(ValueError):
            x = m.inner(x)
        return x + m.lin(x)

    model = Function(forward, inner=Function(inner), lin=nn.Linear(4, 4))
    model.inner.fail = False
    x = torch.randn(2, 4)
    prepared(model, only("add_0"), x)
    for fail in (False, True):
        model.inner.fail = fail
        assert calls_of(model, lambda: model(x)) == {"add_0.input_0": 2, "add_0.input_1": 2}
    model.inner.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("caught")), prepend=True)
    assert calls_of(model, lambda: model(x)) == {"add_0.input_0": 2, "add_0.input_1": 2}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is (deprecated|not supported)")
def test_scripted_submodules():
    model = Function(lambda m, x: m.lin(x) + x, lin=torch.jit.script(nn.Linear(4, 4)))
    x = torch.randn(2, 4)
    prepared(model, only("add_0"), x)
    assert calls_of(model, lambda: model(x)) == {"add_0.input_0": 1, "add_0.input_1": 1}
    remove(model)
    assert not nn.modules.module._has_any_global_hook()


def test_an_interrupt_leaves_nothing_behind():
    def forward(m, x):
        x = m.lin(x)
        if m.stop:
            raise KeyboardInterrupt
        return x + x

    model, x = Function(forward, lin=nn.Linear(4, 4)), torch.randn(2, 4)
    model.stop = False
    prepared(model, only("add_0"), x)
    model.stop = True
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert torch.equal(x + x, 2 * x)
    model.stop = False
    assert calls_of(model, lambda: model(x)) == {"add_0.input_0": 1, "add_0.input_1": 1}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_see_a_batch_once(reentrant):
    """Recomputed in the backward pass, a block has the same names, and its observers the same extremes."""
    states = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        block = Function(lambda m, x: m.lin(x) + x, lin=nn.Linear(4, 4))
        run = (lambda m, x: checkpoint(m.block, x, use_reentrant=reentrant)) if wrapped else (lambda m, x: m.block(x))
        model, x = Function(run, block=block), torch.randn(2, 4, requires_grad=True)
        prepared(model, only("block.add_0", spec="uint8 affine ema"), x)
        for q in quantizers(model.train()):
            q.observing = True
        model(x).sum().backward()
        states.append([(q.batch_min, q.batch_max) for q in quantizers(model)] + [(x.grad, block.lin.weight.grad)])
    assert all(torch.equal(a, b) for one, two in zip(*states, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
def test_compiled_it_computes_the_same_beside_its_graph():
    """A module with quantized operations runs in Python; the others around it are compiled."""
    torch.manual_seed(0)
    block = Function(lambda m, x: m.lin(x) + x, lin=nn.Linear(4, 4))
    model, x = nn.Sequential(nn.Linear(4, 4), block, nn.Linear(4, 4)), torch.randn(2, 4)
    prepared(model, QuantPlan([Rule("*", weight="int8", input=INT8), Rule("*.add_0", input=INT8)]), x)
    torch.compiler.reset()
    try:
        with torch.no_grad():
            want = model(x)
            assert torch.equal(torch.compile(model, backend="eager")(x), want)
            torch.compiler.reset()
            with pytest.raises(Exception, match="modules with quantized operations run outside of compiled graphs"):
                torch.compile(model, backend="eager", fullgraph=True)(x)
    finally:
        torch.compiler.reset()


def test_modules_added_later_are_watched_when_prepared_again():
    def forward(m, x):
        return m.lin(x) + x

    def adapter(m, x):
        return m.base(x) + m.low(x)

    model, x = Function(forward, lin=nn.Linear(4, 4)), torch.randn(2, 4)
    plan = only("add_0")
    prepared(model, plan, x)
    model.lin = Function(adapter, base=model.lin, low=nn.Linear(4, 4))
    prepare(model, plan)
    held, inner = by_name(model), model.lin(x)
    with torch.no_grad():
        assert torch.equal(model(x), native(inner, held["add_0.input_0"]) + native(x, held["add_0.input_1"]))
