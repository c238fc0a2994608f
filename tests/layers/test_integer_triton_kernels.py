"""The Triton kernels of the integer forward pass: on a GPU where there is one, else in Triton's interpreter on CPU
tensors.

The references are the C++ kernels, sums in int64, and the dispatcher, which sees who waits for the device.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.layers.integer.function import IntegerProduct, Levels, Operands
from lq_plugin.layers.integer.kernels import IntegerKernels
from lq_plugin.layers.product import Convolution
from lq_plugin.native import NativeError

triton = pytest.importorskip("triton", reason="no Triton for this platform")
from lq_plugin.layers.integer import triton_arithmetic, triton_kernels  # noqa: E402
from lq_plugin.layers.integer.triton_arithmetic import TritonArithmetic  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BYTES = IntegerGrid(0, 255, True)
SIGNED = IntegerGrid(-128, 127)
GRIDS = [
    (BYTES, 3.0),
    (SIGNED, 0.0),
    (IntegerGrid(-7, 7), 0.0),
    (IntegerGrid(0, 3, True), 1.0),
    (IntegerGrid(-128, 127, True), -100.0),
]
# What the interpreter's numpy says of infinities, which are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture
def compiled():
    try:
        return IntegerKernels()
    except NativeError as error:
        pytest.skip(str(error))


def scalar(value):
    return torch.tensor([value], device=DEVICE)


def generated(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE)


@pytest.mark.parametrize("elements", [1, 15, 33, 5000])
@pytest.mark.parametrize(("grid", "zero_point"), GRIDS, ids=str)
def test_levels_bits_and_extremes_are_those_of_the_compiled_kernels(compiled, elements, grid, zero_point):
    x = generated(elements) * 2
    x[:4] = torch.tensor([torch.inf, -torch.inf, -0.0, 0.0065], device=DEVICE)[:elements]
    scale = scalar(0.013)
    seen, theirs = ([torch.tensor([start * torch.inf]) for start in (1, -1)] for _ in range(2))
    seen = [value.to(DEVICE) for value in seen]
    kernels = TritonArithmetic()
    q, mask, qparams = kernels.quantize(x, scale, scalar(zero_point), grid, True, tuple(seen))
    q2, mask2 = compiled.quantize(x.cpu(), scale.item(), zero_point, grid, True, tuple(theirs))
    assert torch.equal(q.cpu().int() + 128, q2.int())
    assert torch.equal(mask.cpu(), mask2)
    assert torch.equal(torch.cat(seen).cpu(), torch.cat(theirs))
    assert qparams.tolist() == [scale.item(), zero_point - grid.quant_min - 128]
    y = kernels.dequantize(q, qparams[:1], qparams[1:], torch.float32)
    assert torch.equal(y.cpu(), compiled.dequantize(q2, scale.item(), zero_point - grid.quant_min))
    mine = generated(elements)
    other = mine.cpu().clone()
    kernels.keep(mine, mask)
    compiled.keep(other, mask2)
    assert torch.equal(mine.cpu(), other)


@pytest.mark.parametrize("broken", [False, True])
def test_extremes_of_more_programs_than_one_look_takes(broken):
    lows, highs = generated(2, 1030)
    if broken:
        lows[1028] = highs[1028] = torch.nan
    low, high, qparams = scalar(-0.5), scalar(100.0), torch.empty(2, device=DEVICE)
    triton_kernels.settle[1,](
        scalar(0.1), scalar(3.0), qparams, lows, highs, low, high, 1030, -8.0, OBSERVED=True, BLOCK=1024
    )  # fmt: skip
    expected = (torch.nan, torch.nan, torch.nan) if broken else (lows.min().item(), 100.0, scalar(0.1).item())
    found = torch.cat([low, high, qparams]).cpu()
    torch.testing.assert_close(found, torch.tensor([*expected, 3 + 8 - 128]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("scales", [1, 5])
@pytest.mark.parametrize("shape", [(5, 7), (5, 3, 3, 2), (5, 2500)])
@pytest.mark.parametrize("grid", [SIGNED, IntegerGrid(-7, 7)], ids=str)
def test_weights_are_those_of_the_compiled_kernels(compiled, shape, scales, live, grid):
    w = generated(*shape)
    w[1] = 0
    given = torch.rand(scales) * 0.02 + 0.01
    theirs = given.clone()
    expected = compiled.quantize_weight(w.cpu(), theirs, grid, live)
    q, found, sums = TritonArithmetic().quantize_weight(w, given.to(DEVICE), grid, live)
    assert torch.equal(q.cpu(), expected)
    assert torch.equal(found.cpu(), theirs.expand(5))
    assert torch.equal(sums.cpu().long(), expected.flatten(1).long().sum(1))


def integers(x_shape, w_shape, zero_point):
    """Operands of scale 1 that use all of their levels, and the same in int64."""
    generator = torch.Generator().manual_seed(sum(x_shape))
    q = torch.randint(-128, 128, x_shape, generator=generator)
    w = torch.randint(-128, 128, w_shape, generator=generator)
    q.view(-1)[0], q.view(-1)[-1], w.view(-1)[0], w.view(-1)[-1] = -128, 127, -128, 127
    order = torch.channels_last if len(w_shape) == 4 else torch.contiguous_format
    kept = [value.to(DEVICE, torch.int8).contiguous(memory_format=order) for value in (q, w)]
    sums = w.flatten(1).sum(1).int().to(DEVICE)
    ones = torch.ones(w_shape[0], device=DEVICE)
    return (
        Operands(Levels(kept[0], None, ones[:1], scalar(float(zero_point))), kept[1], ones, None, sums),
        q - zero_point,
        w,
    )


@pytest.mark.parametrize("zero_point", [-128, -5, 127])
@pytest.mark.parametrize(("rows", "c_in", "c_out"), [(1, 1, 1), (3, 64, 10), (70, 40, 33), (5, 300, 17)])
def test_sums_of_a_linear_layer_are_exact(rows, c_in, c_out, zero_point):
    operands, x, w = integers((rows, c_in), (c_out, c_in), zero_point)
    y = TritonArithmetic().product(operands, None, None, torch.float32)
    assert torch.equal(y.cpu().long(), x @ w.t())


@pytest.mark.parametrize("enough", [1, 128])
def test_tiles_in_bands_and_large_ones(monkeypatch, enough):
    monkeypatch.setattr(triton_arithmetic, "_ENOUGH_TILES", enough)
    operands, x, w = integers((2, 330, 32), (150, 32), 7)
    assert torch.equal(TritonArithmetic().product(operands, None, None, torch.float32).cpu().long(), x @ w.t())


@pytest.mark.parametrize("zero_point", [-128, 31])
@pytest.mark.parametrize(
    ("x", "w", "stride", "padding", "dilation"),
    [
        ((2, 3, 6, 5), (5, 3, 3, 3), (1, 1), (1, 1), (1, 1)),  # a step of the sum runs over several taps
        ((2, 7, 9, 8), (17, 7, 4, 3), (2, 1), (0, 2), (1, 2)),
        ((1, 32, 7, 6), (4, 32, 3, 2), (2, 1), (1, 0), (1, 2)),  # over one
        ((1, 64, 4, 5), (8, 64, 3, 3), (1, 2), (2, 2), (2, 1)),
        ((2, 96, 3, 3), (3, 96, 3, 3), (1, 1), (0, 0), (1, 1)),
        ((2, 50, 5, 5), (20, 50, 1, 1), (2, 2), (0, 0), (1, 1)),  # there is one
        ((1, 64, 3, 4), (20, 64, 1, 1), (1, 1), (1, 2), (1, 1)),
        ((1, 1, 5, 5), (1, 1, 5, 5), (1, 1), (4, 4), (1, 1)),
    ],
)
def test_sums_of_a_convolution_are_exact(x, w, stride, padding, dilation, zero_point):
    operands, x, w = integers(x, w, zero_point)
    moves = Convolution(list(stride), list(padding), list(dilation), 1)
    y = TritonArithmetic().product(operands, None, moves, torch.float32)
    # Unfolding moves numbers; float64 holds them exactly. Padding has the real value 0.
    columns = F.unfold(x.double(), w.shape[2:], dilation, padding, stride).long()
    expected = (w.flatten(1) @ columns).view(y.shape)
    assert torch.equal(y.cpu().long(), expected)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scales_and_bias_act_in_float32_and_round_once(dtype):
    operands, x, w = integers((9, 20), (6, 20), 12)
    scales = torch.rand(6, device=DEVICE) + 0.1
    operands = operands._replace(levels=operands.levels._replace(scale=scalar(0.37)), weight_scale=scales)
    bias = generated(6)
    sums = (x @ w.t()).float().to(DEVICE)
    y = TritonArithmetic().product(operands, bias, None, dtype)
    assert torch.equal(y, (sums * (scalar(0.37) * scales) + bias).to(dtype))


class NoWaiting(TorchDispatchMode):
    """Raises where a tensor's value becomes a Python number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
        )
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    x, w, bias = generated(3, 20).requires_grad_(), generated(5, 20).requires_grad_(), generated(5)
    arithmetic = TritonArithmetic()
    with NoWaiting(), pytest.raises(AssertionError):
        x.sum().item()
    with NoWaiting():
        for live in (False, True):
            scales = torch.ones(1 if live else 5, device=DEVICE)
            seen = scalar(0.0), scalar(0.0)
            levels = arithmetic.levels(x, (scalar(0.1), scalar(3.0), BYTES), True, seen)
            operands = arithmetic.operands(levels, w, (scales, SIGNED, live, not live))
            IntegerProduct.apply(x, w, bias, operands, None, arithmetic).sum().backward()


COMPILE = """
import itertools, re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lq_plugin.layers.integer import triton_kernels as k

fp32 = ["scale_at", "zero_at", "lows_at", "highs_at", "qparams_at", "given_at", "weight_scale_at", "low_at", "high_at"]
kinds = {**dict.fromkeys(fp32, "*fp32"), "quant_min": "fp32", "quant_max": "fp32", "mask_at": "*i16", "q_at": "*i8", "sums_at": "*i32"}
variants = [(k.quantize, 4, {"MASKED": True, "BLOCK": 2048}), (k.settle, 4, {"OBSERVED": True, "BLOCK": 1024})]
variants.append((k.dequantize, 4, {"BLOCK": 2048}))
for live, together in ((True, False), (True, True), (False, False)):
    variants.append((k.quantize_rows, 4, {"LIVE": live, "TOGETHER": together, "BLOCK": 512}))
# A size of 1 is a constant of its own: all of these are for a linear layer, and more for one of one input and output.
ones = ("height", "width", "out_height", "out_width", "kernel_width", "stride_y", "stride_x", "dilation_y", "dilation_x")
linear = dict.fromkeys(ones, 1)
smallest = {**linear, **dict.fromkeys(("columns", "depth", "channels"), 1)}
modes = ((k.MIXED, True, False, {}), (k.WITHIN_TAP, True, True, {}), (k.ONE_TAP, False, True, linear), (k.ONE_TAP, False, False, smallest))
for taps, padded, even, ones in modes:
    for rows, columns, depth, warps in TILES:
        how = {**ones, "TAPS": taps, "PADDED": padded, "EVEN": even, "BIASED": True, "BAND": 8}
        variants.append((k.multiply, warps, {**how, "ROWS": rows, "COLUMNS": columns, "DEPTH": depth}))
for target, dtype, (kernel, warps, constants) in itertools.product((80, 90), DTYPES, variants):
    names, product = kernel.arg_names, kernel is k.multiply
    floats = ["x_at", "y_at", "bias_at", *([] if product else ["w_at"]), *(["low_at", "high_at"] if kernel is k.quantize_rows else [])]
    tensors = {"w_at": "*i8", **kinds, **dict.fromkeys(floats, f"*{dtype}")}
    # What is in none of them is a size.
    signature = {name: "constexpr" if name in constants else tensors.get(name, "i32") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    # So it is where the sizes of a layer are multiples of 16.
    aligned = [name for name in ("q_at", "w_at", "depth", "columns", "channels") if product and name not in constants]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    options = {"enable_fp_fusion": False, "num_warps": warps, "num_stages": 4}
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    words = set(re.findall("[a-z0-9_.:]+", made.asm["ptx"]))
    divisions = sorted(word for word in words if word.startswith(("div.", "rcp.")) and word.endswith("f32"))
    products = sorted({word.split(".")[0] for word in words if "mma" in word and ".s32.s8.s8" in word})
    copies = "async" if product and any(word.startswith("cp.async.c") for word in words) else "odd" if "depth" in constants else "-"
    fused = "fma" if "fma.rn.f32" in words else "-"
    print(kernel.__name__, target, made.metadata.shared, fused, copies, "+".join(products) or "-", *divisions)
"""


def compile_all(tmp_path, tiles, dtypes):
    """Without a GPU, to machine code for one: no product is fused with a sum, no quotient is approximate, int8 products
    on tensor cores."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = COMPILE.replace("TILES", repr(tiles)).replace("DTYPES", repr(dtypes))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(dtypes) * (6 + 4 * len(tiles))
    for line in lines:
        kernel, target, shared, fused, copies, products, *divisions = line.split()
        assert fused == "-", line
        assert divisions == (["div.rn.f32"] if kernel in ("quantize", "quantize_rows") else []), line
        # The least that a GPU of this generation lets a program have.
        assert int(shared) <= 99 * 1024, line
        if kernel == "multiply":
            assert copies in ("async", "odd"), line  # tiles are fetched ahead, but for sizes that allow no wide loads
            assert products == ("mma" if target == "80" else "wgmma"), line


needs_compiler = pytest.mark.skipif(
    not hasattr(triton.backends.backends.get("nvidia"), "compiler"),
    reason="this Triton has no compiler for NVIDIA GPUs",
)


@pytest.mark.slow
@needs_compiler
def test_compiles_for_gpus(tmp_path):
    compile_all(tmp_path, [(64, 32, 64, 4)], ["fp32"])


@needs_compiler
@pytest.mark.slow
def test_compiles_for_gpus_in_every_size_and_dtype(tmp_path):
    tiles = [
        (height, width, depth, warps) for height, width, warps in triton_arithmetic._PRODUCT_TILES for depth in (32, 64)
    ]
    compile_all(tmp_path, [*tiles, (64, 16, 64, 4), (128, 16, 64, 8)], ["fp32"])
    compile_all(tmp_path, [(128, 128, 64, 8)], ["fp16", "bf16"])
