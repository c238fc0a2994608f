"""Bit planes against numpy's own bit packing of the binary digits."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from lq_plugin.export.bit_planes import pack, packed_size, unpack


@given(st.integers(1, 16), st.integers(0, 70), st.integers(0, 2**32 - 1))
def test_round_trip_and_size(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, count)
    packed = pack(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.size == packed_size(count, bits) == bits * ((count + 7) // 8)
    np.testing.assert_array_equal(unpack(packed, bits, count), codes)


def test_layout_is_plane_after_plane():
    # Lowest bits of 5, 2, 7 are 1, 0, 1; the middle ones 0, 1, 1; the highest 1, 0, 1.
    assert pack(np.array([5, 2, 7]), 3).tolist() == [0b10100000, 0b01100000, 0b10100000]


@pytest.mark.parametrize("codes", [[4], [-1]])
def test_numbers_that_do_not_fit_are_refused(codes):
    with pytest.raises(ValueError, match=r"numbers of 2 bits lie in 0\.\.3"):
        pack(np.array(codes), 2)
    with pytest.raises(ValueError, match="take 2 bytes, got 1"):
        unpack(np.zeros(1, np.uint8), 2, 3)
