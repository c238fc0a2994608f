"""LSTM, GRU and RNN by numpy, one sample and one step at a time, as torch's documentation writes them.

Written on its own: nothing of the library computes here. Quantizers are functions of an array.
"""

from __future__ import annotations

import numpy as np


def rounded(quantizer):
    """The rounding of a calibrated integer quantizer of activations, from its scale, zero point and levels."""
    scale, zero = np.float32(quantizer.scale.item()), np.float32(quantizer.zero_point.item())
    low, high = quantizer.spec.grid.quant_min, quantizer.spec.grid.quant_max

    def apply(x):
        steps = np.rint(x.astype(np.float32) * (np.float32(1) / scale))
        return (np.clip(steps, low - zero, high - zero) * scale).astype(x.dtype)

    return apply


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Sample:
    """One recurrent module on one sample.

    Args:
        module: for its sizes and biases.
        weights: as the forward pass uses them, by name.
        quantizers: of what is computed inside, by the name of the weight that reads it or of the operation.
    """

    def __init__(self, module, weights, quantizers):
        self.module, self.quantizers = module, quantizers
        self.weights = {name: value.detach().numpy() for name, value in module.named_parameters()}
        self.weights |= {name: value.detach().numpy() for name, value in weights.items()}

    def through(self, name, x):
        return self.quantizers[name](x) if name in self.quantizers else x

    def step(self, x, h, c, suffix):
        w = self.weights
        read = self.through(f"weight_hh{suffix}", h)
        a, b = w[f"weight_ih{suffix}"] @ x, w[f"weight_hh{suffix}"] @ read
        if self.module.bias:
            a, b = a + w[f"bias_ih{suffix}"], b + w[f"bias_hh{suffix}"]
        gates = lambda value: self.through(f"gates{suffix}", value)  # noqa: E731
        if self.module.mode == "LSTM":
            i, f, g, o = np.split(a + b, 4)
            i, f, g, o = gates(sigmoid(i)), gates(sigmoid(f)), gates(np.tanh(g)), gates(sigmoid(o))
            c = self.through(f"cell{suffix}", f * c + i * g)
            h = o * np.tanh(c)
            if self.module.proj_size:
                h = w[f"weight_hr{suffix}"] @ self.through(f"weight_hr{suffix}", h)
        elif self.module.mode == "GRU":
            (r, z, n), (r_h, z_h, n_h) = np.split(a, 3), np.split(b, 3)
            r, z = gates(sigmoid(r + r_h)), gates(sigmoid(z + z_h))
            n = gates(np.tanh(n + r * n_h))
            h = (1 - z) * n + z * h
        else:
            h = np.tanh(a + b) if self.module.mode == "RNN_TANH" else np.maximum(a + b, 0)
        return self.through(f"hidden{suffix}", h), c

    def run(self, x, h, c):
        """Outputs `[L, features]` and last states of `x` `[L, features]`, from states `[layers · directions, size]`."""
        last_h, last_c = [], []
        x = self.through("weight_ih_l0", x)
        for layer in range(self.module.num_layers):
            x = self.through(f"weight_ih_l{layer}", x) if layer else x
            outputs = []
            for direction in range(2 if self.module.bidirectional else 1):
                suffix = f"_l{layer}" + "_reverse" * direction
                number = len(last_h)
                state = self.through(f"hidden{suffix}", h[number]), self.through(f"cell{suffix}", c[number])
                found = []
                for step in x[::-1] if direction else x:
                    state = self.step(step, *state, suffix)
                    found.append(state[0])
                outputs.append(np.stack(found[::-1] if direction else found))
                last_h.append(state[0])
                last_c.append(state[1])
            x = np.concatenate(outputs, -1)
        return x, np.stack(last_h), np.stack(last_c)
