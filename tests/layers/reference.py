"""Quantization by numpy and by torch's own operator, for layers that hold several weights."""

import copy

import numpy as np
import torch


def quantized_rows(weight, bits):
    """Symmetric full-range quantization of `[C_out, C_in]` with one scale a row."""
    w = weight.detach().numpy()
    high = 2 ** (bits - 1)
    scale = np.maximum(w.max(1).clip(0) / np.float32(high - 1), (-w.min(1)).clip(0) / np.float32(high))
    q = np.clip(np.rint(w * (np.float32(1) / scale)[:, None]), -high, high - 1)
    return torch.from_numpy(q * scale[:, None])


def with_quantized_weights(module, bits, paths=None):
    """A copy of a float module; every matrix in it (or those of `paths`) is replaced by its quantized values."""
    twin = copy.deepcopy(module)
    for path, parameter in twin.named_parameters():
        if parameter.dim() == 2 and "bias" not in path and (paths is None or path in paths):
            with torch.no_grad():
                parameter.copy_(quantized_rows(parameter, bits))
    return twin


def quantized_uint8(x, seen):
    """`x` on the affine 8-bit grid of the smallest and largest value in `seen`."""
    low, high = seen.min().clamp(max=0), seen.max().clamp(min=0)
    scale = (high / 255 - low / 255).item()
    return torch.fake_quantize_per_tensor_affine(x, scale, round(-low.item() / scale), 0, 255)
