"""QuantSpec: strings, mappings and dataclasses are the same thing; what is impossible is refused with a full list."""

import copy
import pickle

import pytest
from hypothesis import given, strategies as st

from lq_plugin import PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, SpecError
from lq_plugin.intent.spec import RANGES

granularities = st.one_of(
    st.just(PerTensor()),
    st.builds(PerChannel, st.one_of(st.none(), st.integers(-3, 3))),
    st.just(PerToken()),
    st.builds(PerGroup, st.integers(1, 512), st.booleans()),
    st.builds(PerGroup, st.integers(1, 512), st.booleans(), st.integers(1, 16), st.sampled_from(["tensor", "channel"])),
)
FIXED = [name for name in RANGES if name not in ("lsq", "pact", "dynamic")]
fixed = st.sampled_from([*FIXED, "ema:0.9", "percentile:99.99", "aciq:gauss"])
ranges = st.one_of(fixed, st.just("dynamic"))


@st.composite
def specs(draw):
    bits = draw(st.integers(2, 16))
    signed = draw(st.booleans())
    granularity = draw(granularities)
    integer_scales = isinstance(granularity, PerGroup) and granularity.scale_bits is not None
    return QuantSpec(
        bit_width=bits,
        signed=signed,
        affine=draw(st.booleans()),
        narrow_range=signed and draw(st.booleans()),
        granularity=granularity,
        range="dynamic" if isinstance(granularity, PerToken) else draw(fixed if integer_scales else ranges),
    )


@given(specs())
def test_string_round_trip(spec):
    assert QuantSpec.parse(str(spec)) == spec
    assert hash(QuantSpec.parse(str(spec))) == hash(spec)


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("int8", -128, 127),
        ("int4 narrow", -7, 7),
        ("uint4", 0, 15),
        ("int1", -1, 0),
        ("uint1", 0, 1),
        ("int16", -32768, 32767),
    ],
)
def test_grid(text, low, high):
    grid = QuantSpec.parse(text).grid
    assert (grid.quant_min, grid.quant_max) == (low, high)
    assert grid.levels == high - low + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int0", "1..16, got 0"),
        ("int17", "1..16, got 17"),
        ("int1 narrow", "single level 0"),
        ("uint4 narrow", "unsigned format has none"),
        ("int4 group0", "positive int, got 0"),
        ("int4 minmx", "Did you mean 'minmax'"),
        ("int4 mse kl", "'kl' sets range a second time"),
        ("int4 group16:0", "scale_bits of a group must be 1..16"),
        ("int4 group16:4:row", "per 'tensor' or 'channel', got 'row'"),
        ("int4 group16:4 lsq", "learns float scales"),
        ("int4 ragged", "belongs to a group size"),
        ("per_channel", "no format"),
        ("int4 percentile:101", "50..100"),
        ("int4 ema:x", "0..1"),
        ("int4 mse:3", "takes no option"),
        ("kmeans2:", "'' is no option"),
        ("int4 pact", "non-negative"),
        ("int1 lsq", "positive level"),
        ("int4 aciq:cauchy", "gauss or laplace"),
    ],
)
def test_impossible_spec_says_why(text, message):
    with pytest.raises(SpecError, match=message):
        QuantSpec.parse(text)


def test_all_faults_at_once():
    with pytest.raises(SpecError) as caught:
        QuantSpec(bit_width=0, range="mean", rounding="up", granularity="rows")
    for part in ("got 0", "'mean'", "'up'", "'rows'", "4 faults"):
        assert part in str(caught.value)


def test_mapping_and_wrong_types():
    assert QuantSpec.parse({"bit_width": 4, "granularity": "per_channel", "range": "mse"}) == QuantSpec.parse(
        "int4 per_channel mse"
    )
    with pytest.raises(SpecError, match="Did you mean 'bit_width'"):
        QuantSpec.parse({"bitwidth": 4})
    with pytest.raises(SpecError, match="got int"):
        QuantSpec.parse(4)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="must be an int, got True"):
        QuantSpec(bit_width=True)


def test_replace_is_checked():
    with pytest.raises(SpecError, match="1..16"):
        QuantSpec.parse("int4").replace(bit_width=99)


def test_a_spec_that_was_used_is_pickled_copied_and_compared_as_a_fresh_one() -> None:
    fresh, used = QuantSpec.parse("int4 per_channel mse"), QuantSpec.parse("int4 per_channel mse")
    assert (used.grid.quant_max, used.stochastic) == (7, False)
    for other in (used, pickle.loads(pickle.dumps(used)), copy.deepcopy(used)):
        assert (other, hash(other), str(other), other.grid) == (fresh, hash(fresh), str(fresh), fresh.grid)
    assert used.replace(bit_width=2).grid.quant_max == 1
    assert used.replace(rounding="stochastic:3").stochastic
