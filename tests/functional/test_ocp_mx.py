"""MXFP8, MXFP6, MXFP4 and MXINT8 against torchao, the specification in plain Python, and known signal to noise
ratios."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, strategies as st

from lq_plugin.functional.error import sqnr_db
from lq_plugin.functional.grouping import blocks, unblocks
from lq_plugin.functional.minifloat import E2M1, INT8, Minifloat
from lq_plugin.functional.ocp_mx import ELEMENTS, MODES, fake_quantize_mx, mx_scale
from lq_plugin.intent.spec import PerGroup

GROUP = PerGroup(32, ragged=True)
formats = pytest.mark.parametrize("name", ELEMENTS)
#: Modes that look at the largest magnitude alone.
FROM_LARGEST = tuple(mode for mode in MODES if mode != "mse")
modes = pytest.mark.parametrize("mode", FROM_LARGEST)


def log2_floor(a: Fraction) -> int:
    e = a.numerator.bit_length() - a.denominator.bit_length()
    return e if Fraction(2) ** e <= a else e - 1


def log2_ceil(a: Fraction) -> int:
    e = log2_floor(a)
    return e if Fraction(2) ** e == a else e + 1


def exponent_by_the_text(a: float, fmt: Minifloat, mode: str) -> int:
    if a == 0:
        return -127
    exact, emax = Fraction(a), log2_floor(Fraction(fmt.max_value))
    if mode == "floor":
        e = log2_floor(exact) - emax
    elif mode == "ceil":
        e = log2_ceil(exact) - emax
    elif mode == "rceil":
        e = log2_ceil(exact / Fraction(fmt.max_value))
    else:
        unit = Fraction(2) ** (log2_floor(exact) - fmt.mantissa_bits)
        e = log2_floor(unit * math.floor(exact / unit + Fraction(1, 2))) - emax
    return max(-127, min(127, e))


def element_by_the_text(v: Fraction, fmt: Minifloat) -> Fraction:
    e = max(log2_floor(abs(v)), 1 - fmt.bias) if v else 1 - fmt.bias
    step = Fraction(2) ** (e - fmt.mantissa_bits)
    return max(-Fraction(fmt.max_value), min(Fraction(fmt.max_value), round(v / step) * step))


def one_block(values: list[float]) -> torch.Tensor:
    return torch.tensor(values + (32 - len(values)) * [0.0]).reshape(1, 1, 32)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=6),
    st.sampled_from(sorted(ELEMENTS)),
    st.sampled_from(FROM_LARGEST),
)
def test_equals_the_specification_in_exact_fractions(values, name, mode):
    fmt = ELEMENTS[name]
    x = one_block(values)
    e = exponent_by_the_text(max(map(abs, values)), fmt, mode)
    assert mx_scale(x, fmt, mode).item() == 2.0**e
    got = fake_quantize_mx(x, fmt, mode)[0, 0, : len(values)].tolist()
    for value, mine in zip(values, got, strict=True):
        want = element_by_the_text(Fraction(value) / Fraction(2) ** e, fmt) * Fraction(2) ** e
        if abs(want) < 2**128:
            assert mine == want
        else:  # documented: rounded beyond the largest float32
            assert mine == math.copysign(math.inf, value)


@modes
@pytest.mark.parametrize("name", [name for name in ELEMENTS if name != "mxint8"])  # torchao has no MXINT8
@pytest.mark.filterwarnings("ignore")
def test_equals_torchao(name, mode):
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    element = {
        "mxfp8_e4m3": torch.float8_e4m3fn,
        "mxfp8_e5m2": torch.float8_e5m2,
        "mxfp6_e3m2": "fp6_e3m2",
        "mxfp6_e2m3": "fp6_e2m3",
        "mxfp4": getattr(torch, "float4_e2m1fn_x2", None),
    }[name]
    torch.manual_seed(0)
    # Blocks from 2^-60 to 2^60. torchao differs by design, or lack of it, beyond: it divides by 2^-126 where X is
    # 2^-127 (and by 1 with rceil) but multiplies by X, so that blocks of subnormals and X itself do not agree with each
    # other.
    x = torch.randn(2000, 64) * 2.0 ** torch.randint(-60, 60, (2000, 1))
    x[:5] = 0.0
    x[5:40, 0] = 2.0 ** torch.arange(-17, 18)  # amax at powers of two, and next to them
    x[5:40, 1:] = 0.0
    x[40:75] = x[5:40] * (2 - 2**-23)
    kind = getattr(mx_tensor.ScaleCalculationMode, mode.upper())
    scale, data = mx_tensor.to_mx(x, element, 32, kind)
    want = mx_tensor.to_dtype(data, scale, element, 32, torch.float32)
    got = unblocks(fake_quantize_mx(blocks(x, GROUP), ELEMENTS[name], mode), x.shape, GROUP)
    mine = mx_scale(blocks(x, GROUP), ELEMENTS[name], mode).squeeze(2)
    assert torch.equal(mine, scale.view(torch.uint8).int().sub(127).double().exp2().float())
    assert torch.equal(got, want)


@formats
def test_what_the_modes_promise(name):
    torch.manual_seed(0)
    fmt = ELEMENTS[name]
    x = torch.randn(3000, 1, 32) * torch.exp2(6 * torch.randn(3000, 1, 1))
    amax = x.abs().amax(2, keepdim=True)
    scales = {mode: mx_scale(x, fmt, mode) for mode in MODES}
    assert (amax <= scales["rceil"] * fmt.max_value).all()
    assert (amax > scales["rceil"] / 2 * fmt.max_value).all()  # and it is the smallest
    assert (amax <= scales["ceil"] * 2.0**fmt.max_exponent).all()
    assert (scales["floor"] <= scales["even"]).all()
    assert (scales["even"] <= scales["ceil"]).all()


@formats
def test_modes_where_the_largest_magnitude_needs_no_rounding(name):
    fmt = ELEMENTS[name]
    for exponent in (-20, 0, 13):
        largest, power = one_block([-fmt.max_value * 2.0**exponent]), one_block([2.0 ** (fmt.max_exponent + exponent)])
        assert mx_scale(largest, fmt, "floor").item() == mx_scale(largest, fmt, "rceil").item() == 2.0**exponent
        assert mx_scale(power, fmt, "floor").item() == mx_scale(power, fmt, "ceil").item() == 2.0**exponent


@formats
def test_values_of_mode_floor_are_fixed_points(name):
    torch.manual_seed(0)
    x = torch.randn(3000, 1, 32) * torch.exp2(6 * torch.randn(3000, 1, 1))
    y = fake_quantize_mx(x, ELEMENTS[name])
    assert torch.equal(mx_scale(y, ELEMENTS[name]), mx_scale(x, ELEMENTS[name]))
    assert torch.equal(fake_quantize_mx(y, ELEMENTS[name]), y)


def test_mode_even_rounds_the_largest_magnitude_half_up():
    # In E2M1, 1.75 is half way between 1.5 and 2.
    below = math.nextafter(1.75, 0) - 1e-7
    assert mx_scale(one_block([1.75]), E2M1, "even").item() == 0.5
    assert mx_scale(one_block([below]), E2M1, "even").item() == 0.25


@formats
@modes
def test_the_ends_of_float32(name, mode):
    fmt = ELEMENTS[name]
    assert mx_scale(one_block([0.0]), fmt, mode).item() == 2.0**-127
    assert mx_scale(one_block([2.0**-149]), fmt, mode).item() == 2.0**-127
    assert torch.equal(fake_quantize_mx(one_block([0.0, -0.0]), fmt, mode), torch.zeros(1, 1, 32))
    infinite = fake_quantize_mx(one_block([math.inf, -1.0]), fmt, mode)[0, 0]
    assert infinite[0] > 1e38
    assert infinite[2:].eq(0).all()
    two = torch.cat([one_block([math.nan, 1.0]), one_block([1.0])])
    got = fake_quantize_mx(two, fmt, mode)
    assert got[0].isnan().all()
    assert got[1].isfinite().all()


def test_ragged_kernels_and_shapes():
    torch.manual_seed(0)
    x = torch.randn(5, 40, 3, 3)
    y = fake_quantize_mx(blocks(x, GROUP), E2M1)
    assert mx_scale(blocks(x, GROUP), E2M1).shape == (5, 2, 1, 3, 3)
    flat = x.movedim(1, -1).reshape(-1, 40)
    want = unblocks(fake_quantize_mx(blocks(flat, GROUP), E2M1), flat.shape, GROUP)
    assert torch.equal(unblocks(y, x.shape, GROUP), want.reshape(5, 3, 3, 40).movedim(-1, 1))


def test_gradient_stops_where_an_element_saturates():
    x = one_block([7.9, 6.9, 7.0, -7.5, 5.1, 0.01]).requires_grad_()
    fake_quantize_mx(x, E2M1, "floor").sum().backward()
    assert x.grad[0, 0, :6].tolist() == [0, 1, 0, 0, 1, 1]
    x.grad = None
    fake_quantize_mx(x, E2M1, "rceil").sum().backward()
    assert x.grad.eq(1).all()


def test_mxint8_leaves_out_minus_128():
    x = one_block([-1.999, 1.999])
    assert fake_quantize_mx(x, INT8)[0, 0, :2].tolist() == [-127 / 64, 127 / 64]


@pytest.mark.parametrize(("mode", "gauss", "laplace"), [("floor", 18.8, 17.9), ("rceil", 18.75, 17.6)])
def test_known_signal_to_noise_ratios_of_mxfp4(mode, gauss, laplace):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(16384, 2, 32, generator=generator)
    double_exponential = torch.empty_like(normal).exponential_(generator=generator) * normal.sign()
    for x, want in ((normal, gauss), (double_exponential, laplace)):
        assert sqnr_db(x, fake_quantize_mx(x, E2M1, mode)).item() == pytest.approx(want, abs=0.07)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="one of floor, rceil, ceil, even"):
        mx_scale(one_block([1.0]), E2M1, "round")


@formats
def test_least_error_takes_the_best_of_three_exponents(name):
    """Errors in exact fractions; the float ones decide otherwise only between candidates that are as good."""
    fmt = ELEMENTS[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 1, 32, generator=generator) * torch.exp2(20 * torch.randn(200, 1, 1, generator=generator))
    x[:3] = 0.0
    x[3, 0, 1:] = 0.0
    x[4] = 0.3
    x[4, 0, 0] = 4.0  # one element saturates at 3, so that 31 are rounded by half the steps
    floor, chosen = mx_scale(x, fmt), mx_scale(x, fmt, "mse")
    shifts = torch.log2(chosen / floor).flatten().int().tolist()
    assert shifts[:3] == [0, 0, 0], "a block of zeros"
    for block, scale, shift in zip(x[:, 0].tolist(), floor.flatten().tolist(), shifts, strict=True):
        errors = {}
        for candidate in (0, -1, 1):
            step = Fraction(scale) * Fraction(2) ** candidate
            errors[candidate] = sum(
                (element_by_the_text(Fraction(v) / step, fmt) * step - Fraction(v)) ** 2 for v in block
            )
        best = min(errors.values())
        assert errors[shift] <= best * (1 + Fraction(1, 10**5))
        if errors[0] == best:
            assert shift == 0, "the specification's is preferred"
    if name == "mxfp4":
        assert set(shifts) == {-1, 0, 1}
    y = fake_quantize_mx(x, fmt, "mse")
    assert torch.equal(y[:3], x[:3])
    assert sqnr_db(x, y) >= sqnr_db(x, fake_quantize_mx(x, fmt))


def test_least_error_at_the_ends_of_float32():
    x = torch.zeros(5, 1, 32)
    x[0, 0, 0], x[1, 0, :2], x[2, 0, 0] = torch.inf, torch.tensor([3e38, -1e38]), torch.nan
    x[3, 0, 0], x[4, 0, :2] = 2.0**-149, torch.tensor([1e-38, 3e-39])
    y = fake_quantize_mx(x, E2M1, "mse")
    assert y[2].isnan().all()
    assert not y[[0, 1, 3, 4]].isnan().any()
    assert torch.equal(mx_scale(x, E2M1, "mse")[[0, 3]], mx_scale(x, E2M1)[[0, 3]])


def test_least_error_has_the_known_signal_to_noise_ratios():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(16384, 2, 32, generator=generator)
    double_exponential = torch.empty_like(normal).exponential_(generator=generator) * normal.sign()
    for x, least, floor in ((normal, 19.0, 18.85), (double_exponential, 18.2, 18.05)):
        assert sqnr_db(x, fake_quantize_mx(x, E2M1, "mse")) > least
        assert sqnr_db(x, fake_quantize_mx(x, E2M1)) < floor
