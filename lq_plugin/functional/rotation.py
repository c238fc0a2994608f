"""Orthogonal matrices that spread what few channels hold over all of them.

A Hadamard matrix has entries of one magnitude, so that a single outlier becomes 1 / √n of itself in each channel. They
are built by Sylvester's doubling from Paley's first construction: for a prime q ≡ 3 (mod 4) with the quadratic
character χ, the matrix [[1, 1ᵀ], [-1, χ(j - i) + I]] of size q + 1 has orthogonal rows.

Reference: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS 2024 (arXiv 2404.00456),
section 2; Paley, "On orthogonal matrices", Journal of Mathematics and Physics 12, 1933.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(size: int) -> Tensor | None:
    """Returns a matrix of ±1 `[size, size]` with orthogonal columns, the first of ones; None where none is known.

    Sizes are powers of two times 1 or q + 1 for primes q ≡ 3 (mod 4): 12, 20, 24, 32, 44, ...

    >>> hadamard(2).tolist(), hadamard(6)
    ([[1.0, 1.0], [1.0, -1.0]], None)
    """
    rest, doublings = size, 0
    power_of_two = size & (size - 1) == 0
    while rest % 2 == 0 and (power_of_two or not _paley_fits(rest)):
        rest, doublings = rest // 2, doublings + 1
    if rest != 1 and not _paley_fits(rest):
        return None
    h = torch.ones(1, 1, dtype=torch.float64) if rest == 1 else _paley(rest)
    double = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(doublings):
        h = torch.kron(double, h)
    rows: Tensor = h * h[:, :1]
    return rows


def _paley_fits(size: int) -> bool:
    q = size - 1
    return q > 2 and q % 4 == 3 and all(q % divisor for divisor in range(3, int(q**0.5) + 1, 2))


def _paley(size: int) -> Tensor:
    q = size - 1
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0, *(1.0 if i in squares else -1.0 for i in range(1, q))], dtype=torch.float64)
    index = torch.arange(q)
    h = torch.ones(size, size, dtype=torch.float64)
    h[1:, 0] = -1.0
    h[1:, 1:] = character[(index[None] - index[:, None]) % q] + torch.eye(q, dtype=torch.float64)
    return h


def random_rotation(size: int, generator: torch.Generator, kind: str | None = None, keep_mean: bool = False) -> Tensor:
    """Returns an orthogonal matrix Q `[size, size]`, float64.

    A Hadamard matrix with random signs, H diag(±1), or where none of the size is known a matrix that is uniformly
    random among the orthogonal ones. With `keep_mean` Q 1 = 1, so that x Q has the mean of x: H diag(1, ±1, ...) Hᵀ, or
    a random one of the complement of 1.

    Args:
        size: n.
        generator: of the random numbers, on the CPU.
        kind: "hadamard" or "orthogonal"; None: Hadamard where there is one.
        keep_mean: for streams that layer norms read.

    Raises:
        ValueError: a Hadamard matrix of a size for which none is known.
    """
    h = None if kind == "orthogonal" else hadamard(size)
    if h is None and kind == "hadamard":
        raise ValueError(f"no Hadamard matrix of size {size} is known here; kind='orthogonal' has any size")
    if h is not None:
        signs = 2.0 * torch.randint(0, 2, (size,), generator=generator).double() - 1.0
        if not keep_mean:
            spread: Tensor = h * signs / size**0.5
            return spread
        signs[0] = 1.0
        kept: Tensor = (h * signs) @ h.T / size
        return kept
    if not keep_mean:
        return _uniform(size, generator)
    # The first column of a QR decomposition is 1 / √n up to its sign, the others span what is orthogonal to it.
    basis = torch.eye(size, dtype=torch.float64)
    basis[:, 0] = 1.0
    complement = torch.linalg.qr(basis)[0][:, 1:]
    turned: Tensor = complement @ _uniform(size - 1, generator) @ complement.T + 1.0 / size
    return turned


def _uniform(size: int, generator: torch.Generator) -> Tensor:
    """Returns a matrix of the Haar measure: QR of normal numbers, with the signs of R's diagonal (Mezzadri, 2007)."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    signed: Tensor = q * r.diagonal().sign()
    return signed
