"""Orthogonal matrices for rotations: orthogonal, of one magnitude, keeping the mean where asked."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from lq_plugin.functional.rotation import hadamard, random_rotation


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 24, 40, 48, 64, 96, 256, 576, 768])
def test_hadamard_matrices_are_of_signs_and_orthogonal(size: int) -> None:
    h = hadamard(size)
    assert h is not None
    entries = h.numpy()
    assert set(np.unique(entries)) <= {-1.0, 1.0}
    assert np.array_equal(entries.T @ entries, size * np.eye(size))
    assert (entries[:, 0] == 1).all()


def test_powers_of_two_are_sylvester_s() -> None:
    h = hadamard(16)
    assert h is not None
    assert np.array_equal(h.numpy(), scipy.linalg.hadamard(16))


@pytest.mark.parametrize("size", [3, 6, 10, 36, 52, 100])
def test_sizes_without_a_known_one_say_so(size: int) -> None:
    assert hadamard(size) is None
    with pytest.raises(ValueError, match=f"no Hadamard matrix of size {size} is known here; kind='orthogonal'"):
        random_rotation(size, torch.Generator(), "hadamard")


@pytest.mark.parametrize("keep_mean", [False, True])
@pytest.mark.parametrize("kind", [None, "orthogonal"])
@pytest.mark.parametrize("size", [2, 6, 12, 64])
def test_rotations_are_orthogonal_and_spread_one_channel(size: int, kind: str | None, keep_mean: bool) -> None:
    q = random_rotation(size, torch.Generator().manual_seed(5), kind, keep_mean).numpy()
    again = random_rotation(size, torch.Generator().manual_seed(5), kind, keep_mean).numpy()
    other = random_rotation(size, torch.Generator().manual_seed(6), kind, keep_mean).numpy()
    assert np.array_equal(q, again)
    assert size == 2 or not np.allclose(q, other)
    assert np.allclose(q.T @ q, np.eye(size), atol=1e-12)
    if keep_mean:
        x = np.random.default_rng(0).normal(size=(5, size))
        assert np.allclose((x @ q).mean(1), x.mean(1), atol=1e-12)
    elif kind is None and hadamard(size) is not None:
        assert np.allclose(np.abs(q), size**-0.5)
    if size == 64:
        assert np.abs(q).max() < 0.6
