"""Elements that share a scale, compared with plain indexing."""

import itertools

import pytest
import torch
from hypothesis import given, strategies as st

from lq_plugin.functional.grouping import block_mask, blocks, scale_shape, to_rows, unblocks
from lq_plugin.intent.spec import PerChannel, PerGroup, PerTensor

shapes = st.one_of(st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.integers(1, 5)] * 4))


@given(shapes, st.integers(1, 6))
def test_group_round_trip_and_membership(shape, size):
    granularity = PerGroup(size, ragged=True)
    x = torch.randn(shape)
    grouped = blocks(x, granularity)
    assert torch.equal(unblocks(grouped, shape, granularity), x)
    scales = scale_shape(shape, granularity)
    rows = to_rows(grouped, scales)
    assert rows.shape == (torch.Size(scales).numel(), size)
    # Row by row, by hand: output channel, group, kernel position.
    mask = block_mask(shape, granularity)
    masked = to_rows(torch.ones_like(grouped, dtype=torch.bool) if mask is None else mask, scales)
    index = 0
    for o in range(shape[0]):
        for g in range(-(-shape[1] // size)):
            for position in itertools.product(*map(range, shape[2:])):
                want = x[(o, slice(g * size, (g + 1) * size), *position)]
                assert torch.equal(rows[index][masked[index]], want)
                index += 1
    assert index == rows.shape[0]


@pytest.mark.parametrize("axis", [0, 1, -1, 2])
def test_per_channel_rows(axis):
    x = torch.randn(2, 3, 4, 5)
    shape = scale_shape(x.shape, PerChannel(axis))
    rows = to_rows(x, shape)
    for channel in range(x.shape[axis]):
        assert torch.equal(rows[channel].sort().values, x.select(axis, channel).flatten().sort().values)


def test_one_channel_is_one_row():
    assert to_rows(torch.randn(1, 3, 2), scale_shape((1, 3, 2), PerChannel(0))).shape == (1, 6)
    assert to_rows(torch.randn(4, 3), scale_shape((4, 3), PerTensor())).shape == (1, 12)


def test_a_group_of_a_billion_takes_no_more_than_the_row():
    x, huge = torch.randn(3, 5, 2), PerGroup(10**9, ragged=True)
    assert blocks(x, huge).numel() <= 3 * 32 * 2
    assert torch.equal(unblocks(blocks(x, huge), x.shape, huge), x)
    assert scale_shape(x.shape, huge) == (3, 1, 1, 2)
