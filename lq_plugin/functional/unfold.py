"""The inputs of a convolution as the columns of a matrix product."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def unfold_columns(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int = 1
) -> Tensor:
    """Returns the inputs of each output position of a convolution, in any number of spatial dims.

    Args:
        x: `[N, C, *spatial]`, padded already.
        kernel_size, stride, dilation: one number a spatial dim.
        groups: of the convolution.

    Returns:
        `[groups, C / groups · kernel elements, N · positions]`: what `weight.reshape(groups, C_out / groups, -1)` is
        multiplied with for the convolution. One copy of the elements; only views come before it.

    >>> import torch
    >>> unfold_columns(torch.arange(4.0).reshape(1, 1, 4), [2], [1], [1])
    tensor([[[0., 1., 2.],
             [1., 2., 3.]]])
    """
    dims = len(kernel_size)
    windows = x
    for dim, (size, step, spread) in enumerate(zip(kernel_size, stride, dilation, strict=True)):
        windows = windows.unfold(2 + dim, spread * (size - 1) + 1, step)[..., ::spread]
    # [N, groups, C / groups, *positions, *kernel]
    windows = windows.reshape(x.shape[0], groups, x.shape[1] // groups, *windows.shape[2:])
    positions, kernel = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
    windows = windows.permute(1, 2, *kernel, 0, *positions)
    return windows.reshape(groups, windows.shape[1 : 2 + dims].numel(), -1)
