"""Multiply-accumulates against formulas written out by hand and torch's own FLOP counter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from lq_plugin.model.graph.record import Recording, record
from tests.models import Attention, Function, MobileNet, resnet20


def run(model: nn.Module, *inputs) -> Recording:
    with torch.no_grad():
        return record(model.eval(), lambda: model(*inputs))


def resnet20_macs() -> int:
    total = 32 * 32 * 16 * 27
    for channels, size, before in ((16, 32, 16), (32, 16, 16), (64, 8, 32)):
        total += size * size * channels * 9 * (before + 5 * channels)
    return total + 64 * 10


def test_resnet20_macs_by_hand():
    recording = run(resnet20(), torch.randn(1, 3, 32, 32))
    assert recording.total_macs == resnet20_macs() == 40_551_040
    assert recording.macs["conv1"] == 442_368
    assert recording.macs["layer2.0.conv1"] == 16 * 16 * 32 * 16 * 9
    assert recording.macs["layer2.0.bn1"] == 0


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Linear(5, 7), (2, 3, 5), 2 * 3 * 7 * 5),
        (nn.Linear(5, 7, bias=False), (5,), 35),
        (nn.Conv1d(4, 6, 3, groups=2), (2, 4, 10), 2 * 6 * 8 * 2 * 3),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 5, 5), 2 * 8 * 25 * 9),
        (nn.Conv2d(4, 6, (1, 3), stride=2, dilation=2), (1, 4, 9, 9), 6 * 5 * 3 * 4 * 3),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), 3 * 27 * 2 * 8),
        (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (2, 4, 5), 2 * 4 * 5 * 3 * 3),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 4 * 25 * 6 * 4),
        (nn.ConvTranspose3d(2, 4, 2, groups=2), (1, 2, 3, 3, 3), 2 * 27 * 2 * 8),
        (nn.Conv2d(4, 6, 3), (4, 7, 7), 6 * 25 * 4 * 9),
        (nn.LSTM(5, 6), (3, 2, 5), 3 * 2 * 4 * 6 * (5 + 6)),
        (nn.LSTM(5, 6, num_layers=2, bidirectional=True), (3, 2, 5), 3 * 2 * 2 * 4 * 6 * ((5 + 6) + (12 + 6))),
        (
            nn.LSTM(5, 6, proj_size=2, num_layers=2, batch_first=True),
            (3, 2, 5),
            6 * (24 * (5 + 2) + 6 * 2 + 24 * (2 + 2) + 6 * 2),
        ),
        (nn.GRU(5, 6), (3, 5), 3 * 3 * 6 * 11),
        (nn.RNN(5, 6), (3, 2, 5), 6 * 6 * 11),
        (nn.LSTMCell(5, 6), (2, 5), 2 * 4 * 6 * 11),
        (nn.GRUCell(5, 6), (5,), 3 * 6 * 11),
    ],
    ids=lambda value: repr(value) if isinstance(value, nn.Module) else None,
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_module_macs_by_hand(module: nn.Module, shape, macs: int):
    (call,) = run(nn.Sequential(module), torch.randn(shape)).module_calls
    assert (call.name, call.macs, call.input_shapes[0]) == ("0", macs, shape)


def test_embedding_has_no_macs_and_still_a_call():
    recording = run(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2)), torch.tensor([[1, 2, 3]]))
    assert recording.macs == {"0": 0, "1": 3 * 4 * 2}
    assert recording.producer_of("1").name == "0"


def test_packed_sequence_counts_real_steps():
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(4, 2, 5), torch.tensor([4, 1]))
    (call,) = run(nn.Sequential(nn.LSTM(5, 6)), packed).module_calls
    assert call.macs == 5 * 24 * 11


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_weights_of_one_module_share_its_macs():
    model = nn.Sequential(nn.LSTM(5, 6, proj_size=2, bidirectional=True))
    recording = run(model, torch.randn(3, 2, 5))
    (call,) = recording.module_calls
    one = {"weight_ih_l0": 6 * 24 * 5, "weight_hh_l0": 6 * 24 * 2, "weight_hr_l0": 6 * 6 * 2}
    assert dict(call.weight_macs) == one | {f"{name}_reverse": macs for name, macs in one.items()}
    assert recording.macs == {"0": 0} | {f"0.{name}": macs for name, macs in call.weight_macs}
    assert recording.calls_of("0.weight_hr_l0_reverse") == (call,)


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_macs(batch_first: bool):
    model = Function(
        lambda m, q, k, v: m.attn(q, k, v)[0], attn=nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=batch_first)
    )
    sizes = [(3, 7, 8), (3, 11, 6), (3, 11, 5)]
    q, k, v = (torch.randn(s if batch_first else (s[1], s[0], s[2])) for s in sizes)
    recording = run(model, q, k, v)
    (call,) = recording.module_calls
    assert call.name == "attn"
    assert call.macs == 3 * (7 * 8 * 8 + 11 * 6 * 8 + 11 * 5 * 8 + 2 * 7 * 11 * 8 + 7 * 8 * 8)
    product = 3 * 7 * 11 * 8
    rows = {"q": 7 * 8, "k": 11 * 6, "v": 11 * 5}
    shares = {f"attn.{which}_proj_weight": 3 * size * 8 for which, size in rows.items()}
    products = {"attn": 0, "attn.matmul_0": product, "attn.matmul_1": product}
    assert recording.macs == products | {"attn.out_proj": 3 * 7 * 8 * 8} | shares
    assert recording.functional_calls == ()  # out_proj and the products are inside
    assert recording.uncalled == ()


class Conv1D(nn.Module):
    """Linear layer with an `[in, out]` weight, as transformers has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"


def test_hugging_face_conv1d_is_a_leaf():
    recording = run(nn.Sequential(Conv1D(6, 4)), torch.randn(2, 3, 4))
    assert recording.macs == {"0": 2 * 3 * 4 * 6}
    assert recording.functional_calls == ()


PRODUCT_CASES = {
    "matmul": (lambda m, x: x @ x.transpose(-1, -2), (2, 3, 4, 5)),
    "bmm": (lambda m, x: torch.bmm(x, x.transpose(1, 2)), (2, 3, 4)),
    "mm": (lambda m, x: torch.mm(x, x.t()), (3, 4)),
    "einsum": (lambda m, x: torch.einsum("bhid,bhjd->bhij", x, x), (2, 3, 4, 5)),
    "linear": (lambda m, x: F.linear(x, torch.ones(7, 5)), (2, 5)),
    "conv1d": (lambda m, x: F.conv1d(x, torch.ones(6, 2, 3), groups=2), (2, 4, 9)),
    "conv2d": (lambda m, x: F.conv2d(input=x, weight=torch.ones(6, 4, 3, 3)), (2, 4, 9, 9)),
    "conv_transpose2d": (lambda m, x: F.conv_transpose2d(x, torch.ones(4, 6, 3, 3)), (2, 4, 5, 5)),
    "scaled_dot_product_attention": (lambda m, x: F.scaled_dot_product_attention(x, x, x), (2, 3, 4, 8)),
    "addmm": (lambda m, x: torch.addmm(torch.zeros(6), x, torch.ones(4, 6)), (3, 4)),
    "baddbmm": (lambda m, x: torch.baddbmm(torch.zeros(1), x, x.transpose(1, 2)), (2, 3, 4)),
}


@pytest.mark.parametrize("op", PRODUCT_CASES)
def test_functional_products_match_torch_flop_counter(op: str):
    function, shape = PRODUCT_CASES[op]
    x = torch.randn(shape)
    recording = run(Function(function), x)
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        function(None, x)
    (call,) = recording.functional_calls
    assert (call.name, call.op) == (f"{op}_0", op)
    assert 2 * call.macs == flops.get_total_flops() > 0


#: Function, its name in the ledger, shapes of what it gets, MACs by hand.
HAND_CASES = {
    "F.grouped_mm": (lambda x, w: F.grouped_mm(x, w, offs=OFFSETS), "grouped_mm", [(8, 16), (4, 16, 32)], 8 * 16 * 32),
    "cut along K": (lambda x, w: F.grouped_mm(x, w, offs=OFFSETS), "grouped_mm", [(16, 8), (8, 32)], 16 * 8 * 32),
    "3-D x 2-D": (lambda x, w: F.grouped_mm(x, w, offs=OFFSETS), "grouped_mm", [(4, 24, 16), (16, 8)], 24 * 16 * 8),
    "addbmm": (lambda x, w: torch.addbmm(torch.zeros(8, 32), x, w), "addbmm", [(4, 8, 16), (4, 16, 32)],
    4 * 8 * 16 * 32),
    "F.bilinear": (lambda x, y, w: F.bilinear(x, y, w), "bilinear", [(8, 16), (8, 10), (4, 16, 10)],
    8 * 4 * (16 * 10 + 10)),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=1), "tensordot", [(8, 16), (16, 32)], 8 * 16 * 32),
    "two dims": (lambda x, w: torch.tensordot(x, w, ([1, 2], [2, 0])), "tensordot", [(2, 3, 5), (5, 7, 3)],
    2 * 3 * 5 * 7),
    "linalg.matmul": (lambda x, w: torch.linalg.matmul(x, w), "matmul", [(8, 16), (16, 32)], 8 * 16 * 32),
    "linalg.vecdot": (lambda x, w: torch.linalg.vecdot(x, w), "vecdot", [(8, 16), (8, 16)], 8 * 16),
    "multi_dot": (lambda *m: torch.linalg.multi_dot(m), "multi_dot", [(8, 16), (16, 32), (32, 8)],
    16 * 32 * 8 + 8 * 16 * 8),
    "vectors": (lambda *m: torch.linalg.multi_dot(m), "multi_dot", [(16,), (16, 32), (32,)], 16 * 32 + 16),
    "convolution": (
        lambda x, w: torch.convolution(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 2),
        "convolution", [(2, 4, 8, 8), (6, 2, 3, 3)], 2 * 6 * 36 * 2 * 9,
    ),
    "transposed": (
        lambda x, w: torch.convolution(x, w, None, [2], [0], [1], True, [0], 1), "convolution", [(2, 4, 5), (4, 6, 3)],
        2 * 4 * 5 * 6 * 3,
    ),
    "conv_tbc": (lambda x, w: torch.conv_tbc(x, w, torch.zeros(5)), "conv_tbc", [(7, 2, 4), (3, 4, 5)],
    5 * 2 * 5 * 3 * 4),
    "cdist": (lambda x, y: torch.cdist(x, y), "cdist", [(3, 8, 16), (3, 5, 16)], 3 * 8 * 5 * 16),
    "cdist, p = 1": (lambda x, y: torch.cdist(x, y, p=1), "cdist", [(8, 16), (5, 16)], 0),
    "flex_attention": (lambda q, k: flex_attention(q, k, k), "flex_attention", [(1, 2, 16, 32), (1, 2, 16, 32)],
    2 * 16 * 16 * (32 + 32)),
}  # fmt: skip
OFFSETS = torch.tensor([2, 4, 6, 8], dtype=torch.int32)


@pytest.mark.parametrize("case", HAND_CASES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_products_beside_a_hand_count(case: str):
    function, op, shapes, macs = HAND_CASES[case]
    recording = run(Function(lambda m, *xs: function(*xs)), *map(torch.randn, shapes))
    (call,) = recording.functional_calls
    assert (call.name, call.op, call.macs) == (f"{op}_0", op, macs)


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
def test_chain_matmul_is_multi_dot():
    recording = run(Function(lambda m, x: torch.chain_matmul(x, torch.ones(3, 4), torch.ones(4, 5))), torch.randn(2, 3))
    assert [(call.op, call.macs) for call in recording.functional_calls] == [("multi_dot", 2 * 3 * 4 + 2 * 4 * 5)]


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("ij,jk->ik", [(2, 3), (3, 4)], 24),
        ("...ij,...jk", [(5, 2, 3), (7, 1, 3, 4)], 7 * 5 * 24),
        ("i,i->", [(6,), (6,)], 6),
        ("bi,ij,j->b", [(8, 16), (16, 32), (32,)], 8 * 16 * 32 + 8 * 32),
        ("ij,jk,kl", [(2, 3), (3, 4), (4, 5)], 2 * 3 * 4 + 2 * 4 * 5),
        # The sums over i and j come first.
        ("bi,bj->b", [(8, 16), (8, 32)], 8),
        ("bij->bi", [(2, 3, 4)], 0),
    ],
)
def test_einsum_macs(equation: str, shapes, macs: int):
    recording = run(Function(lambda m, *xs: torch.einsum(equation, *xs)), *map(torch.randn, shapes))
    assert recording.total_macs == macs


def test_whole_models_match_torch_flop_counter():
    for model, x in ((MobileNet(), torch.randn(2, 3, 16, 16)), (Attention(), torch.randn(2, 5, 16))):
        recording = run(model, x)
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            model(x)
        assert 2 * recording.total_macs == flops.get_total_flops()
