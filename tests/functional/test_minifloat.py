"""Small floats against torch's and ml_dtypes' casts, bit for bit, and their gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from lq_plugin.functional import minifloat
from lq_plugin.functional.minifloat import (
    E2M1,
    E4M3,
    INT8,
    Minifloat,
    fake_quantize_minifloat,
    round_to_minifloat,
    saturates,
)

NAMES = ("E4M3", "E5M2", "E3M2", "E2M3", "E2M1", "INT8")
ML_DTYPES = {
    "E4M3": "float8_e4m3fn",
    "E5M2": "float8_e5m2",
    "E3M2": "float6_e3m2fn",
    "E2M3": "float6_e2m3fn",
    "E2M1": "float4_e2m1fn",
}
every = pytest.mark.parametrize("name", NAMES)


def fmt_of(name: str) -> Minifloat:
    return getattr(minifloat, name)


def hard_inputs(fmt: Minifloat) -> torch.Tensor:
    """Every value, every tie and their float32 neighbours, beyond the ends, subnormal float32, random bits; both
    signs."""
    values = fmt.values().double()
    ties = torch.cat(
        [(values[1:] + values[:-1]) / 2, fmt.max_value + fmt.largest_step * torch.tensor([0.5, 1.0])]
    ).float()
    exact = torch.cat([fmt.values(), ties])
    around = [exact, torch.nextafter(exact, torch.tensor(torch.inf)), torch.nextafter(exact, torch.tensor(-torch.inf))]
    tiny = torch.tensor([0.0, 2.0**-149, 2.0**-127, 2.0**-126, 3.4e38, torch.inf])
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    sizes = torch.randn(100_000, generator=torch.Generator().manual_seed(1)) * fmt.max_value / 2
    noise = bits.view(torch.float32)
    x = torch.cat([*around, tiny, noise[~noise.isnan()], sizes])
    return torch.cat([x, -x])


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.equal(got.view(torch.int32), want.float().view(torch.int32))


@pytest.mark.parametrize(("name", "dtype"), [("E4M3", torch.float8_e4m3fn), ("E5M2", torch.float8_e5m2)])
def test_equals_torchs_cast(name, dtype):
    fmt = fmt_of(name)
    assert fmt.max_value == torch.finfo(dtype).max
    assert 2.0**fmt.min_exponent == torch.finfo(dtype).tiny
    x = hard_inputs(fmt)
    assert_same_bits(round_to_minifloat(x, fmt), x.clamp(-fmt.max_value, fmt.max_value).to(dtype))
    codes = torch.arange(256).to(torch.uint8).view(dtype).float()
    codes = codes[codes.isfinite() & ~codes.signbit()]
    assert torch.equal(fmt.values(), codes.sort().values)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_equals_ml_dtypes_cast(name):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = getattr(ml_dtypes, ML_DTYPES[name], None)
    if dtype is None:
        pytest.skip(f"this ml_dtypes has no {ML_DTYPES[name]}")
    fmt = fmt_of(name)
    assert float(ml_dtypes.finfo(dtype).max) == fmt.max_value
    x = hard_inputs(fmt)
    want = x.clamp(-fmt.max_value, fmt.max_value).numpy().astype(dtype).astype(np.float32)
    assert_same_bits(round_to_minifloat(x, fmt), torch.from_numpy(want))


def test_int8_is_the_integer_over_64():
    x = hard_inputs(INT8)
    assert_same_bits(round_to_minifloat(x, INT8), torch.round(x.double() * 64).clamp(-127, 127).div(64))
    assert torch.equal(INT8.values(), torch.arange(128) / 64)


@every
def test_against_a_search_of_the_values(name):
    fmt = fmt_of(name)
    x = hard_inputs(fmt)[::37]
    values = fmt.values().double()
    distance = (x.double().abs().clamp(max=fmt.max_value).unsqueeze(1) - values).abs()
    nearest = distance.min(1, keepdim=True).values
    tied = distance == nearest
    # Of two values at one distance the one with an even code wins; the codes are 0, 1, 2...
    even = tied & (torch.arange(len(values)) % 2 == 0)
    choice = torch.where(tied.sum(1) > 1, even.int().argmax(1), tied.int().argmax(1))
    assert torch.equal(round_to_minifloat(x, fmt).double().abs(), values[choice])
    assert torch.equal(round_to_minifloat(x, fmt).signbit(), x.signbit())


@every
def test_the_header_s_table(name):
    fmt = fmt_of(name)
    row = next(line for line in str(minifloat.__doc__).splitlines() if line.startswith(f"| {name} |"))
    exponent_bits, mantissa_bits, bias, largest, smallest, emax = (
        cell.strip() for cell in row.strip("|").split("|")[1:]
    )
    assert (fmt.exponent_bits, fmt.mantissa_bits, fmt.bias) == (int(exponent_bits), int(mantissa_bits), int(bias))
    numerator, _, denominator = largest.partition("/")
    assert fmt.max_value == float(numerator) / float(denominator or 1) == fmt.values().max()
    assert fmt.smallest == 2.0 ** int(smallest.removeprefix("2^")) == fmt.values()[1]
    assert fmt.max_exponent == int(emax)
    assert fmt.bit_width == {"E3M2": 6, "E2M3": 6, "E2M1": 4}.get(name, 8)


@every
def test_not_a_number_stays_and_the_input_is_not_written_to(name):
    x = torch.tensor([torch.nan, -torch.nan, 1.3, -torch.inf])
    before = x.clone()
    got = round_to_minifloat(x, fmt_of(name))
    assert got.isnan().tolist() == [True, True, False, False]
    assert got[3] == -fmt_of(name).max_value
    assert torch.equal(x.view(torch.int32), before.view(torch.int32))


@every
@given(value=st.floats(-1e5, 1e5, width=32))
def test_saturates_where_the_nearest_value_of_a_longer_format_is_beyond_the_largest(name, value):
    fmt = fmt_of(name)
    unlimited = Minifloat(fmt.exponent_bits + 4, fmt.mantissa_bits, fmt.bias, 2.0**40)
    x = torch.tensor([value])
    assert saturates(x, fmt).item() == (round_to_minifloat(x, unlimited).abs() > fmt.max_value).item()


def test_gradient_is_straight_through_below_saturation():
    torch.manual_seed(0)
    x = (10 * torch.randn(6, 50)).requires_grad_()
    scale = torch.rand(6, 1) + 0.5
    upstream = torch.randn_like(x)
    y = fake_quantize_minifloat(x, scale, 1 / scale, E2M1)
    y.backward(upstream)
    inside = (x.detach() / scale).abs() < 7.0
    assert 0 < inside.sum() < x.numel()
    assert torch.equal(x.grad, upstream * inside)
    assert torch.equal(y.detach(), round_to_minifloat(x.detach() * (1 / scale), E2M1) * scale)


def test_dtype_is_kept_and_only_the_input_is_saved():
    x = torch.randn(4, 32, dtype=torch.bfloat16, requires_grad=True)
    inverse = torch.ones(4, 1)
    y = fake_quantize_minifloat(x, torch.ones(4, 1), inverse, E4M3)
    assert y.dtype == torch.bfloat16
    saved = y.grad_fn.saved_tensors
    assert [t.data_ptr() for t in saved] == [x.data_ptr(), inverse.data_ptr()]
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
