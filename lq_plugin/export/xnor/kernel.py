"""Matrix products of -1 and +1 by exclusive or and bit count, in C++ compiled on first use.

    dot(a, b) = K - 2 · popcount(a ⊕ b),       a bit is 1 for +1

The variant (AVX-512 VPOPCNTDQ, AVX2, portable) is chosen at run time from what the processor has. Results are integers
below 2^24, so that every variant gives the same ones. Source: `lq_plugin/native/xnor.cpp`.

Reference: Rastegari et al., "XNOR-Net", ECCV 2016 (arXiv 1603.05279), section 3.2.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Tensor

from lq_plugin.errors import ExportError
from lq_plugin.native.build import NativeError
from lq_plugin.native.variants import NUMBER, POINTER, SIZE, CompiledKernels, address

#: Bits of a word, and outputs that are interleaved.
WORD, LANES = 64, 8


def pack_signs(x: Tensor) -> Tensor:
    """Returns signs along the last dim as int64 words: bit k % 64 of word k // 64 is 1 where x ≥ 0.

    >>> pack_signs(torch.tensor([[1.0, -1.0, 0.0]]))
    tensor([[5]])
    """
    words = -(-x.shape[-1] // WORD)
    bits = torch.nn.functional.pad((x >= 0).long(), (0, words * WORD - x.shape[-1]))
    return (bits.reshape(*x.shape[:-1], words, WORD) << torch.arange(WORD)).sum(-1)


def unpack_signs(words: Tensor, elements: int) -> Tensor:
    """Returns -1 and +1, float32: the inverse of `pack_signs`.

    >>> unpack_signs(torch.tensor([[5]]), 3)
    tensor([[ 1., -1.,  1.]])
    """
    bits = (words.unsqueeze(-1) >> torch.arange(WORD)) & 1
    return bits.flatten(-2)[..., :elements].float() * 2 - 1


def interleave(words: Tensor) -> Tensor:
    """Returns words `[outputs, words]` in the kernel's order of weights: `[ceil(outputs / 8), words, 8]`."""
    padded = torch.nn.functional.pad(words, (0, 0, 0, -len(words) % LANES))
    return padded.reshape(-1, LANES, words.shape[1]).transpose(1, 2).contiguous()


class Kernel(CompiledKernels):
    """Compiled library."""

    source = "xnor"
    functions: ClassVar = {
        "lq_xnor_pack": [POINTER, POINTER, SIZE, SIZE, NUMBER],
        "lq_xnor_linear": [*[POINTER] * 5, *[SIZE] * 3, NUMBER, NUMBER],
        "lq_xnor_matmul": [*[POINTER] * 5, *[SIZE] * 4, NUMBER, NUMBER],
    }

    def pack(self, x: Tensor) -> Tensor:
        """Returns `pack_signs` of a float32 tensor on the CPU."""
        x = x.contiguous()
        elements = x.shape[-1]
        words = x.new_empty((*x.shape[:-1], -(-elements // WORD)), dtype=torch.int64)
        self._library.lq_xnor_pack(x.data_ptr(), words.data_ptr(), x.numel() // elements, elements, self._number)
        return words

    def matmul(
        self,
        x: Tensor,
        weights: Tensor,
        outputs: int,
        elements: int,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Returns dot(x, w) · scale + bias, rounded after each of them, float32 `[rows, outputs]`.

        Args:
            x: words `[rows, words]`.
            weights: from `interleave`.
            outputs: rows of the weights.
            elements: -1s and +1s in a row.
            scale, bias: float32 `[outputs]`.
        """
        y = torch.empty(len(x), outputs)
        self._library.lq_xnor_matmul(
            x.data_ptr(), weights.data_ptr(), address(scale), address(bias), y.data_ptr(),
            len(x), x.shape[1], outputs, elements, self._number, torch.get_num_threads(),
        )  # fmt: skip
        return y

    def linear(
        self, x: Tensor, weights: Tensor, outputs: int, scale: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Returns `matmul` of the signs of float32 x `[..., elements]`, packed in the same call: `[..., outputs]`.

        Args:
            x: float32.
            weights: from `interleave`.
            outputs: rows of the weights.
            scale, bias: float32 `[outputs]`.
        """
        x = x.contiguous()
        elements = x.shape[-1]
        rows = x.numel() // elements
        y = torch.empty(rows, outputs)
        self._library.lq_xnor_linear(
            x.data_ptr(), weights.data_ptr(), address(scale), address(bias), y.data_ptr(),
            rows, elements, outputs, self._number, torch.get_num_threads(),
        )  # fmt: skip
        return y if x.ndim == 2 else y.view(*x.shape[:-1], outputs)


@functools.cache
def kernel(variant: str | None = None) -> Kernel:
    """Returns the kernel, compiled on first use and kept (`lq_plugin.native.build`).

    Raises:
        ExportError: without a C++ compiler, saying so, and for a variant that the processor does not run.
    """
    try:
        return Kernel(variant)
    except NativeError as error:
        raise ExportError(f"the XNOR kernel: {error}") from error
