"""The Triton kernels against the torch operations they stand for: on a GPU where there is one, else in Triton's
interpreter on the CPU.

The interpreter truncates to bfloat16 where a GPU rounds to it, so that dtype waits for a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import lightning
import pytest
import torch

from lq_plugin import QAT
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.functional.affine import fake_quantize, fake_quantize_observed, fake_quantize_to_extremes
from lq_plugin.functional.lsq import fake_quantize_learned
from lq_plugin.intent.spec import IntegerGrid
from lq_plugin.native import NativeError, switch as switch_module, use_native
from lq_plugin.native.layouts import Layout
from lq_plugin.native.switch import active

triton = pytest.importorskip("triton", reason="no Triton for this platform")
from lq_plugin.native.triton_kernels import TritonKernels, _take_in  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
GRIDS = [IntegerGrid(-128, 127), IntegerGrid(-8, 7, True), IntegerGrid(0, 15), IntegerGrid(0, 1)]
# Shape of x, shape of the scale: tensor, channels first and last, groups; rows that fill no word and rows of several
# tiles.
CASES = [
    ((300,), (1,)),
    ((), ()),
    ((3, 5000), (3, 1)),
    ((2, 5, 33, 7), (5, 1, 1)),
    ((2, 5, 3, 7), (1, 1, 1, 1)),
    ((7, 33), (33,)),
    ((4, 2, 16, 9), (4, 2, 1, 9)),
]
# What the interpreter's numpy says of infinities, which are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch):
    """The interpreter's tensors are on the CPU."""
    kernels = TritonKernels()
    monkeypatch.setattr(switch_module, "_compiled", lambda: kernels)
    switch_module.active.cache_clear()
    yield
    switch_module.active.cache_clear()


def numbers(shape, special=True):
    """Halves of a step, values outside, zeros of both signs and, where wanted, what is no number."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * 3
    flat = x.view(-1)
    flat[::7] = flat[::7].round() / 4
    for at, value in enumerate(
        (-0.0, -1e-30, 1e-40, 3e38, -3e38, *((torch.nan, torch.inf, -torch.inf) if special else ()))
    ):
        flat[(at + 1) % flat.numel()] = value
    return x.to(DEVICE)


def both(function, *tensors):
    """Value and gradients of `function` with the kernels and by torch operations."""
    results = []
    for on in (True, False):
        with use_native(on):
            copies = [t.detach().clone().requires_grad_() for t in tensors]
            y = function(*copies)
            y.backward(torch.linspace(-1, 2, y.numel(), device=DEVICE).to(y.dtype).view(y.shape))
            results.append([y.detach(), *(t.grad for t in copies)])
    return zip(*results, strict=True)


def same(mine, theirs):
    """Equal numbers and NaNs. The sign of a zero that was clipped at zero is torch's own whim: it depends on the place
    in a register."""
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("shape", "sizes"), CASES)
def test_fake_quantize(shape, sizes, grid):
    x = numbers(shape)
    scale = torch.rand(sizes, device=DEVICE) + 0.3
    zero_point = torch.ones_like(scale) if grid.affine else torch.zeros_like(scale)
    with use_native(True):
        assert isinstance(active("cuda" if DEVICE == "cuda" else "cpu"), TritonKernels)
    (mine, theirs), (slope, their_slope) = both(lambda v: fake_quantize(v, scale, zero_point, grid), x)
    same(mine, theirs)
    # The gradient of a NaN is whatever torch's registers make of it.
    same(slope.masked_fill(x.isnan(), 0), their_slope.masked_fill(x.isnan(), 0))


@pytest.mark.parametrize("band", ["paper", "rounded"])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(("shape", "sizes"), [case for case in CASES if case[1] not in ((33,), (4, 2, 1, 9))])
def test_learned(shape, sizes, negative, band):
    x = numbers(shape, special=False)
    scale = (torch.rand(sizes, device=DEVICE) + 0.3) * (-1 if negative else 1)
    function = partial(fake_quantize_learned, grid=IntegerGrid(-8, 7, True), gradient_factor=0.3, band=band)
    results = both(function, x.clamp(-40, 40), scale, scale.new_full(sizes, 2.6))
    for name, (mine, theirs) in zip(("y", "x", "scale", "zero point"), results, strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=0 if name in "yx" else 1e-6, atol=0 if name in "yx" else 1e-6, msg=name
        )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("shape", "sizes"), [((3, 5000), (3, 1)), ((6, 2, 3, 3), (6, 1, 1, 1)), ((5, 40), (1, 1)), ((4, 4, 16), (4, 4, 1))]
)
def test_to_extremes(shape, sizes, grid):
    x = numbers(shape, special=False).clamp(-40, 40)
    x[0] *= 0
    for mine, theirs in both(lambda v: fake_quantize_to_extremes(v, sizes, grid), x):
        same(mine, theirs)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("elements", [1, 100, 5000])
def test_observed(elements, broken):
    x = torch.randn(elements, device=DEVICE) * 3
    if broken:
        x[-1] = torch.nan
    seen = []

    def observed(v):
        seen.append((torch.tensor([-0.5], device=DEVICE), torch.tensor([0.5], device=DEVICE)))
        one = torch.ones(1, device=DEVICE)
        return fake_quantize_observed(v, one / 2, one * 0, IntegerGrid(-8, 7), *seen[-1])

    (mine, theirs), _ = both(observed, x)
    same(mine, theirs)
    for mine, theirs in zip(*seen, strict=True):
        same(mine, theirs)


def test_extremes_of_more_tiles_than_one_look_takes():
    x = torch.randn(2048 * 1030, device=DEVICE)
    lows, highs = x.view(-1, 2048).aminmax(dim=1)
    low, high = torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    _take_in[1,](low, high, lows, highs, lows.numel(), BLOCK=1024)
    assert (low, high) == (x.min(), x.max())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("learned", [False, True])
def test_half_precision_rounds_once(dtype, learned):
    x = (torch.randn(3, 100) * 3).to(DEVICE, dtype)
    one = torch.ones(1, device=DEVICE)
    kernels = TritonKernels()
    y, mask = kernels.fake_quantize(x, one * 0.3, one * 0, (-8, 7), Layout(1, 1, 300, 1), masked=True, learned=learned)
    with use_native(False):
        same(y, fake_quantize(x, one * 0.3, one * 0, IntegerGrid(-8, 7)))
    gradient = torch.randn_like(x)
    passed = kernels.mask_gradient(gradient, mask, Layout(1, 1, 300, 1))
    inside = (x.float() * (one / (one * 0.3))).round().clamp(-8, 7) == (x.float() * (one / (one * 0.3))).round()
    same(passed, gradient.where(inside, 0))


def test_second_derivatives_pass_the_same_elements():
    outcomes = []
    for on in (True, False):
        with use_native(on):
            x = torch.linspace(-3, 3, 40, device=DEVICE).requires_grad_()
            one = torch.ones(1, device=DEVICE)
            (first,) = torch.autograd.grad(
                (fake_quantize(x, one * 0.2, one * 0, IntegerGrid(-8, 7)) ** 3).sum(), x, create_graph=True
            )
            first.pow(2).sum().backward()
            outcomes.append((first.detach(), x.grad))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize("recipe", ["w4a8", "lsq"])
def test_a_model_trains_to_the_same_weights(recipe, tmp_path):

    outcomes = []
    for on in (True, False):
        with use_native(on):
            torch.manual_seed(0)
            model = DigitsCNN(width=4)
            plan = "int4 per_channel lsq / uint8 affine lsq" if recipe == "lsq" else recipe
            trainer = lightning.Trainer(
                max_steps=3, callbacks=[QAT(plan)], accelerator="gpu" if DEVICE == "cuda" else "cpu", devices=1,
                logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                default_root_dir=tmp_path,
                num_sanity_val_steps=0, limit_val_batches=0,
            )  # fmt: skip
            trainer.fit(model, datamodule=DigitsDataModule(batch_size=8))
            outcomes.append({name: value.cpu() for name, value in model.state_dict().items()})
    mine, theirs = outcomes
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=0 if recipe != "lsq" else 1e-5, atol=0 if recipe != "lsq" else 1e-6, msg=name
        )


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "lq_plugin.native.triton_kernels", None)
    switch_module._in_triton.cache_clear()
    with pytest.raises(NativeError, match="pip install triton"):
        switch_module._in_triton()
    with use_native(None):
        assert active("cuda") is None


COMPILE = """
import itertools, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lq_plugin.native import triton_kernels as k

number = dict.fromkeys(["rows", "length", "parts", "outer", "run", "inner", "number"], "i32")
fp32 = ["scale_at", "zero_at", "low_at", "high_at", "lows_at", "highs_at"]
kinds = {**number, **dict.fromkeys(fp32, "*fp32"), "mask_at": "*i16", "slope_at": "*fp64", "shift_at": "*fp64",
         "quant_min": "fp32", "quant_max": "fp32"}
tile = {"ROWS": 4, "COLUMNS": 512}
plain = {**tile, "MASKED": True, "IN_COLUMNS": False, "LEARNED": False, "OBSERVED": False, "FROM_EXTREMES": False, "AFFINE": False}
variants = [(k._forward, {**plain, **more}) for more in (
    {}, {"IN_COLUMNS": True}, {"LEARNED": True}, {"OBSERVED": True}, {"FROM_EXTREMES": True}, {"FROM_EXTREMES": True, "AFFINE": True})]
learned = {**tile, "NEEDS_X": True, "NEEDS_SHIFT": True}
variants += [(k._learned_backward, {**learned, "ROUNDED": rounded}) for rounded in (False, True)]
variants += [(k.mask_gradient, tile), (k._take_in, {"BLOCK": 1024})]
for dtype, (kernel, constants) in itertools.product(("fp32", "bf16", "fp16"), variants):
    tensors = {**kinds, **dict.fromkeys(["x_at", "y_at", "gradient_at", "result_at"], f"*{dtype}")}
    signature = {name: "constexpr" if name in constants else tensors[name] for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    text = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=k._OPTIONS).asm["ptx"]
    divisions = sorted({word for word in text.split() if word.startswith(("div.", "rcp.")) and word.endswith("f32")})
    print(kernel.__name__, dtype, "fma" if "fma.rn.f32" in text else "-", *divisions)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(triton.backends.backends.get("nvidia"), "compiler"),
    reason="this Triton has no compiler for NVIDIA GPUs",
)
def test_compiles_for_gpus_with_every_operation_rounded(tmp_path):
    """Without a GPU, to machine code for one: no product is fused with a sum, no quotient is approximate."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 30
    for line in lines:
        kernel, _, fused, *divisions = line.split()
        assert fused == "-", line
        assert divisions == ([] if kernel in ("mask_gradient", "_take_in") else ["div.rn.f32"]), line
