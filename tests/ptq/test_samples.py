"""Samples of a unit: one record of all, within the budget of the cache."""

import pytest
import torch

from lq_plugin.ptq.layerwise.activation_cache import ActivationCache
from lq_plugin.ptq.reconstruction.samples import Samples

#: Two inputs and an output of 4 x 8 float32 each, and a constant.
RECORD = 3 * 4 * 8 * 4 + 8 * 4


def filled(cache, count=3, sizes=(4, 4, 4)):
    samples = Samples(cache, lambda inputs: [inputs[0] * 2])
    constant, records = torch.arange(8.0), []
    for size in sizes[:count]:
        x = torch.randn(size, 8)
        records.append((x + 1, x, x * 2))
        samples.add(((x + 1, constant, "mode"), (x,), [x * 2]))
    return samples, [torch.cat(parts) for parts in zip(*records, strict=True)]


@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 2, 5)])
def test_merged_it_is_all_records_one_behind_the_other(sizes):
    with ActivationCache() as cache:
        samples, (inputs, floats, targets) = filled(cache, sizes=sizes)
        samples.merge()
        (((x, constant, mode), (f,), (y,)),) = samples.records()
        assert torch.equal(x, inputs)
        assert torch.equal(f, floats)
        assert torch.equal(y, targets)
        assert (constant.tolist(), mode) == (list(range(8)), "mode")
        assert samples.sizes == [sum(sizes)]


def test_the_merged_record_counts_as_held():
    with ActivationCache() as cache:
        samples, merged = filled(cache)
        samples.merge()
        assert cache.in_memory == sum(t.nbytes for t in merged) + 8 * 4
        samples.clear()
        assert cache.in_memory == 0


@pytest.mark.parametrize(("budget", "merged"), [(6 * RECORD, True), (6 * RECORD - 1, False)])
def test_where_both_do_not_fit_it_stays_in_records(budget, merged):
    with ActivationCache(budget) as cache:
        samples, _ = filled(cache)
        samples.merge()
        assert len(samples.records()) == (1 if merged else 3)
    with ActivationCache(budget + RECORD) as cache:
        cache.put("of another", torch.zeros(RECORD // 4))
        samples, _ = filled(cache)
        samples.merge()
        assert len(samples.records()) == (1 if merged else 3)
        assert cache.in_memory <= cache.budget
