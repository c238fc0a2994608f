"""The error of a quantized tensor: signal to quantization noise ratio, share of clipped elements."""

from __future__ import annotations

import torch
from torch import Tensor


def energy(x: Tensor) -> Tensor:
    """Returns the sum of squares, float64 `[]`: in float32, a billion squares lose the small ones."""
    if x.device.type == "mps":  # has no float64
        x = x.cpu()
    return x.detach().float().square().sum(dtype=torch.float64)


def decibel(signal: Tensor, noise: Tensor) -> Tensor:
    """Returns 10 log10(signal / noise) of two energies; inf without noise, even without a signal."""
    return torch.where(noise == 0, torch.inf, 10.0 * torch.log10(signal / noise))


def sqnr_db(x: Tensor, x_hat: Tensor) -> Tensor:
    """Returns the signal to quantization noise ratio over all elements, 10 log10(sum x² / sum (x - x̂)²) dB.

    Args:
        x, x_hat: original and quantized tensor of one shape.

    Returns:
        float64 `[]`; inf where nothing is lost, -inf for noise on an all-zero tensor.

    Raises:
        ValueError: when the shapes differ.

    >>> sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5]))
    tensor(20., dtype=torch.float64)
    """
    if x.shape != x_hat.shape:
        raise ValueError(f"x and x_hat must have one shape, got {list(x.shape)} and {list(x_hat.shape)}")
    return decibel(energy(x), energy(x.detach().float() - x_hat.detach().float()))


def clipped_count(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Returns the number of elements of `x` outside `[lo, hi]`, int64 `[]`.

    Args:
        x: any shape.
        lo, hi: bounds that broadcast against `x`.
    """
    return ((x < lo) | (x > hi)).sum()


def clipping_share(x: Tensor, lo: Tensor, hi: Tensor) -> float:
    """Returns the share of the elements of `x` outside `[lo, hi]`, 0..1.

    Args:
        x: any shape.
        lo, hi: bounds that broadcast against `x`.

    Raises:
        ValueError: when there are no elements.

    >>> clipping_share(torch.tensor([-3.0, 0.0, 1.0, 2.0]), torch.tensor(-1.0), torch.tensor(1.0))
    0.5
    """
    if not x.numel():
        raise ValueError("there is no share of 0 elements")
    return int(clipped_count(x, lo, hi)) / x.numel()
