"""The cost model against counts made by hand, and against what tensors really hold."""

from __future__ import annotations

import csv
import io
from math import ceil, prod

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import lq_plugin
from lq_plugin import PerChannel, PerGroup, PerTensor, QuantSpec
from lq_plugin.errors import PlanError, QuantizationError
from lq_plugin.export import save_packed
from lq_plugin.intent.plan import LayerPlan
from lq_plugin.model.graph.record import record
from lq_plugin.model.measure.cost import Cost, cost, plan_cost, spec_bits
from lq_plugin.quantizers import make_weight_quantizer

W4 = QuantSpec.parse("int4 per_channel")


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


def recorded(model: nn.Module, x: torch.Tensor):
    with torch.no_grad():
        return record(model.eval(), lambda: model(x))


@pytest.mark.parametrize(
    ("text", "shape", "bits"),
    [
        ("int4 group16", (8, 64), 8 * 64 * 6),  # 4 + 32 / 16, exactly
        ("int4 group16 affine", (8, 64), 8 * 64 * 4 + 8 * 4 * (32 + 4)),
        ("int4 group16 ragged", (8, 20), 8 * 20 * 4 + 8 * 2 * 32),
        ("int4 group16 ragged", (8, 20, 3, 3), 8 * 20 * 9 * 4 + 8 * 2 * 9 * 32),
        ("int8 per_channel", (8, 20, 3, 3), 8 * 180 * 8 + 8 * 32),
        ("uint2 per_channel affine", (8, 20), 8 * 20 * 2 + 8 * 34),
        ("int3", (8, 20), 8 * 20 * 3 + 32),
        ("int16", (1, 1), 16 + 32),
    ],
)
def test_spec_bits_by_hand(text: str, shape: tuple[int, ...], bits: int) -> None:
    assert spec_bits(QuantSpec.parse(text), shape) == bits


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    kernel=st.sampled_from([(), (3,), (2, 3)]),
    bit_width=st.integers(2, 16),
    affine=st.booleans(),
    granularity=st.sampled_from([PerTensor(), PerChannel(), PerGroup(4, ragged=True), PerGroup(16, ragged=True)]),
)
def test_spec_bits_counts_the_scales_that_a_quantizer_holds(
    rows, columns, kernel, bit_width, affine, granularity
) -> None:
    shape = (rows, columns, *kernel)
    spec = QuantSpec(bit_width=bit_width, affine=affine, granularity=granularity, range="mse")
    scales = make_weight_quantizer(spec, "w", shape).scale.numel()
    assert spec_bits(spec, shape) == prod(shape) * bit_width + scales * (32 + bit_width * affine)


def test_a_float_model_costs_what_its_state_holds() -> None:
    model = small()
    priced = cost(model)
    state = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert priced.bytes == priced.float_bytes == state
    assert (priced.effective_bits, priced.quantized_effective_bits, priced.compression) == (32.0, 32.0, 1.0)
    assert (priced.macs, priced.bops) == (None, None)
    assert [row.quantized for row in priced] == [False, False]


def test_a_quantized_model_by_hand() -> None:
    model = small()
    recording = recorded(model, torch.randn(2, 3, 8, 8))
    float_bytes = cost(model).float_bytes
    lq_plugin.prepare(model, {"rules": [{"match": "0", "weight": "int4 per_channel", "input": "uint8 affine"}]})
    priced = cost(model, recording)
    conv, linear = priced["0"], priced["4"]
    assert (conv.kind, conv.elements, conv.weight_bits, conv.input_bits) == ("Conv2d", 216, 4, 8)
    assert conv.effective_bits == 4 + 8 * 32 / 216
    assert conv.macs == 8 * 36 * 27
    assert conv.bops == conv.macs * 4 * 8
    # The input has a scale, a zero point and two flags.
    assert conv.bytes == ceil((216 * 4 + 8 * 32) / 8) + 4 + 4 + 2
    assert (linear.weight_bits, linear.input_bits, linear.effective_bits) == (32, 32, 32.0)
    assert linear.bops == 2880 * 32 * 32
    # Two biases and the batch norm's factors and offsets stay float.
    assert priced.effective_bits == (216 * 4 + 8 * 32 + 2880 * 32 + 34 * 32) / (216 + 2880 + 34)
    assert priced.quantizable_effective_bits == (216 * 4 + 8 * 32 + 2880 * 32) / (216 + 2880)
    assert priced.quantized_effective_bits == conv.effective_bits
    assert priced.bytes == float_bytes - 216 * 4 + conv.bytes + priced.table_bytes
    assert priced.float_bytes == float_bytes
    assert priced.compression == pytest.approx(float_bytes / priced.bytes)
    assert priced.macs == recording.total_macs / 2
    assert priced.bops == conv.bops + linear.bops
    with pytest.raises(KeyError):
        priced["1"]


def test_a_plan_is_priced_alike_before_and_after_it_is_applied() -> None:
    for plan in (
        "w4 group16 ragged a8",
        "w3 mse a4 per_channel",
        "int2 per_channel lsq / uint4 lsq",
        "uint8 affine / float",
    ):
        model = small()
        recording = recorded(model, torch.randn(1, 3, 8, 8))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        layer_plans = {entry.name: entry.plan for entry in lq_plugin.prepare(small(), plan) if entry.plan}
        priced = plan_cost(model, layer_plans, recording)
        assert type(model[0]) is nn.Conv2d
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        lq_plugin.prepare(model, plan)
        assert cost(model, recording) == priced
        # A prepared model can be priced under another plan just as well.
        other = plan_cost(model, {"4": LayerPlan(weight=W4)}, recording)
        assert (other["0"].weight_bits, other["4"].weight_bits, other["4"].input_bits) == (32, 4, 32)


def test_a_shared_module_counts_once_and_its_calls_all() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.again = self.first

        def forward(self, x):
            return self.again(self.first(x))

    model = Twice()
    priced = cost(model, recorded(model, torch.randn(4, 8)))
    assert [(row.name, row.elements, row.macs) for row in priced] == [("first", 64, 2 * 64)]
    assert priced.bytes == (64 + 8) * 4


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


@pytest.mark.parametrize(
    ("embedding", "head", "bits"),
    [
        (W4, W4, 128 * 4 + 16 * 32),
        (W4, QuantSpec.parse("int8 per_channel"), 128 * 12 + 2 * 16 * 32),  # two specs: two sets of codes
        (None, W4, 128 * 36 + 16 * 32),  # the float table stays
        (None, None, 128 * 32),
        # Learned scales of two layers differ, and so do their codes.
        (QuantSpec.parse("int4 lsq"), QuantSpec.parse("int4 lsq"), 2 * (128 * 4 + 32)),
    ],
)
def test_a_tied_weight_counts_once(embedding: QuantSpec | None, head: QuantSpec | None, bits: int) -> None:
    priced = plan_cost(Tied(), {"embedding": LayerPlan(weight=embedding), "head": LayerPlan(weight=head)})
    assert [row.tied_to for row in priced] == [None, "embedding"]
    assert priced.effective_bits == bits / 128
    assert priced.bytes - priced.table_bytes == bits / 8
    assert priced.float_bytes == 128 * 4
    if embedding or head:
        assert priced.quantized_effective_bits == bits / 128


def test_embeddings_have_no_macs_and_functional_products_count_as_float() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(16, 8)
            self.query = nn.Linear(8, 8)

        def forward(self, tokens):
            x = self.embedding(tokens)
            return self.query(x) @ x.transpose(1, 2)

    model = Attention()
    recording = recorded(model, torch.zeros(1, 5, dtype=torch.long))
    plans = {"query": LayerPlan(weight=W4, input=QuantSpec.parse("uint8 affine"))}
    priced = plan_cost(model, plans, recording)
    assert [row.macs for row in priced] == [0, 5 * 64]
    assert priced.other_macs == 5 * 5 * 8
    assert priced.bops == 5 * 64 * 4 * 8 + 5 * 5 * 8 * 1024


def test_transposed_and_grouped_convolutions_have_scales_per_output_channel() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv1d(6, 12, 3, groups=3))
    plan = {"0": LayerPlan(weight=W4), "1": LayerPlan(weight=W4)}
    assert [row.storage_bits for row in plan_cost(model, plan)] == [4 * 3 * 9 * 4 + 6 * 32, 12 * 2 * 3 * 4 + 12 * 32]


def test_other_parts_are_counted_as_they_are_saved() -> None:
    model = nn.ModuleDict(
        {"linear": nn.Linear(4, 4), "attention": nn.MultiheadAttention(8, 2), "norm": nn.BatchNorm1d(4)}
    )
    model["linear"].register_buffer("cache", torch.zeros(1000), persistent=False)
    model["norm"].bfloat16()
    rest = 3 * 8 + 8 + 4  # biases of the attention and of the linear layer
    assert cost(model).other_bytes == rest * 4 + 4 * 4 * 2 + 8  # num_batches_tracked is int64
    assert [row.name for row in cost(model)] == ["linear", "attention.in_proj_weight", "attention.out_proj"]


def test_metrics_and_quantizers_do_not_enter_the_size() -> None:
    model = small()
    lq_plugin.prepare(model, "int4 per_channel lsq / uint8 lsq")
    assert cost(model).other_bytes == (8 * 4 + 8 + 10) * 4 + 8


@pytest.mark.parametrize(
    "plan", ["w4", "w4a8", "w2 group16 a8 per_channel", "int4 per_channel lsq / uint4 lsq", "mxfp4 / mxfp8", "twn"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_the_size_of_the_packed_file(plan: str, dtype: torch.dtype, tmp_path) -> None:
    model = nn.Sequential(
        nn.Conv2d(16, 96, 3), nn.BatchNorm2d(96), nn.ReLU(), nn.Conv2d(96, 96, 3), nn.Flatten(), nn.Linear(1536, 40)
    ).to(dtype)
    lq_plugin.prepare(model, plan)
    lq_plugin.calibrate(model, [torch.randn(2, 16, 8, 8, dtype=dtype)])
    assert cost(model).bytes == pytest.approx(save_packed(model, tmp_path / "model.safetensors"), rel=0.02)


def test_what_stays_float_counts_in_effective_bits() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = nn.Linear(8, 4, bias=False), nn.Parameter(torch.zeros(4, 8, 8))

        def forward(self, x):
            return torch.einsum("nd,edf,ne->nf", x, self.experts, self.router(x))

    model = Experts()
    lq_plugin.prepare(model, "int8 per_channel")
    priced = cost(model)
    assert priced.quantizable_effective_bits == priced.quantized_effective_bits == 8 + 4 * 32 / 32
    assert priced.effective_bits == (32 * 8 + 4 * 32 + 256 * 32) / (32 + 256)
    assert cost(Experts().bfloat16()).effective_bits == 16


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_work_is_of_one_sample(batch: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    recording = recorded(model, torch.randn(batch, 3, 4, 4))
    pairs = record(model, lambda: model(torch.randn(2 * batch, 3, 4, 4)), samples=batch)
    lq_plugin.prepare(model, "w4a8")
    priced = cost(model, recording)
    assert (priced.macs, priced.bops) == (4 * 4 * 27 + 32, (4 * 4 * 27 + 32) * 4 * 8)
    assert cost(model, pairs).macs == 2 * priced.macs


def test_operands_of_operations_have_the_bits_of_their_rule() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.table = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 6))

        def forward(self, x):
            y = self.linear(x)
            z = y @ y.transpose(1, 2)  # [N, 5, 5]
            return nn.functional.scaled_dot_product_attention(y, y, y), z, y @ self.table

    model = Model()
    run = recorded(model, torch.randn(2, 5, 8))
    rules = [
        {"match": "linear", "weight": "int4", "input": "uint8 affine"},
        {"match": "*matmul_*", "input": "uint4 affine"},
    ]
    ledger = lq_plugin.prepare(
        model, {"rules": [*rules, {"match": "scaled_dot_product_attention_0", "input": "uint8 affine"}]}, run
    )
    ledger.add_recording(run)
    linear, scores, table, attention = 5 * 64, 5 * 5 * 8, 5 * 8 * 6, 2 * 5 * 5 * 8
    priced = cost(model, run)
    assert priced.macs == linear + scores + table + attention
    # What no rule names and what attention computes inside are float.
    assert priced.bops == linear * 4 * 8 + scores * 4 * 4 + table * 32 * 32 + attention * 8 * 32
    assert ledger.compute_coverage == (linear + scores) / priced.macs
    assert ledger.weight_coverage == 64 / (64 + 48)


def test_a_weight_that_is_read_past_its_layer_is_stored_in_float_as_well(tmp_path) -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)

        def forward(self, x):
            return self.b(nn.functional.linear(x, self.a.weight))

    model = Past()
    run = recorded(model, torch.randn(3, 8))
    ledger = lq_plugin.prepare(model, "int4 per_channel")
    ledger.add_recording(run)
    assert (ledger["a"].quantized, ledger["a"].reason) == (
        False,
        "never called in the recorded batch: linear_0 reads its weight, in float",
    )
    assert ledger.weight_coverage == 32 / (64 + 32)
    # With a recorded batch or without, and for a plan that is not applied.
    bits = 64 * (32 + 4) + 8 * 32 + 32 * 4 + 4 * 32
    assert [priced.effective_bits for priced in (cost(model), cost(model, run))] == [bits / 96] * 2
    assert (
        plan_cost(Past(), {entry.name: entry.plan for entry in ledger if entry.plan}, run).effective_bits == bits / 96
    )
    lq_plugin.calibrate(model, [])
    assert cost(model).bytes == pytest.approx(save_packed(model, tmp_path / "past.safetensors"), rel=0.1), (
        "a file of a few hundred bytes"
    )


def test_faults_are_named() -> None:
    with pytest.raises(PlanError, match=r"no quantizable layer 'o'(.|\n)*'5'"):
        plan_cost(small(), {"o": LayerPlan(weight=W4), "5": LayerPlan(weight=W4)})
    with pytest.raises(QuantizationError, match=r"0\.weight has no shape yet"):
        cost(nn.Sequential(nn.LazyLinear(4)))


def test_rows_as_csv() -> None:
    model = small()
    lq_plugin.prepare(model, "w4 group16 ragged")
    priced = cost(model, recorded(model, torch.randn(1, 3, 8, 8)))
    rows = list(csv.DictReader(io.StringIO(priced.to_csv())))
    assert [row["name"] for row in rows] == ["0", "4"]
    assert [float(row["effective_bits"]) for row in rows] == [row.effective_bits for row in priced]
    assert [int(row["bops"]) for row in rows] == [row.bops for row in priced]
    assert priced.totals()["bytes"] == priced.bytes
    assert Cost(()).to_csv().strip() == "name"
    assert (Cost(()).effective_bits, Cost(()).compression, len(Cost(()))) == (32.0, 1.0, 0)
