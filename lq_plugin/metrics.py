"""Distance of a quantized tensor or model from its float reference, as torchmetrics `Metric`s.

All take `update(preds, target)`: `preds` from the quantized side, `target` from the float side, of one
shape. States are sums, so that batches, and ranks under DDP, give what one call on all data would give.
Sums are float64: 1e9 squares added in float32 lose the noise. Devices without float64 (MPS) refuse them.
They are not added in place, so that a module moved to bfloat16 with its metrics still sums in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lq_plugin.errors import QuantizationError


class _Comparison(Metric):
    """Base of the metrics: counts what was seen, and refuses what cannot be compared."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sums("count", dtype=torch.int64)

    def _add_sums(self, *names: str, dtype: torch.dtype = torch.float64) -> None:
        for name in names:
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def _check(self, preds: Tensor, target: Tensor) -> None:
        if preds.shape != target.shape:
            raise QuantizationError(
                f"{type(self).__name__}: preds and target must have one shape, got {tuple(preds.shape)} and "
                f"{tuple(target.shape)}"
            )

    def _require_data(self) -> None:
        # The count is synchronised first: a rank without data is no error while another has some.
        if self.count == 0:
            raise QuantizationError(
                f"{type(self).__name__}: nothing to compute from, update() was never called with data"
            )


class SQNR(_Comparison):
    r"""Signal to quantization noise ratio in dB: :math:`10 \log_{10} \frac{\sum x^2}{\sum (x - \hat x)^2}`.

    `target` is x, `preds` is x̂, both of any one shape, over everything seen since the last reset. Equal
    tensors, also all-zero ones, give inf; noise on an all-zero signal gives -inf; NaN in the data gives NaN.

    Raises:
        QuantizationError: when the shapes differ, and from `compute` when nothing was seen.

    >>> metric = SQNR()
    >>> metric(torch.tensor([1.0, 2.1, 2.9]), torch.tensor([1.0, 2.0, 3.0]))
    tensor(28.4510, dtype=torch.float64)
    """

    signal: Tensor
    noise: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sums("signal", "noise")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds a batch; `preds` quantized, `target` float."""
        self._check(preds, target)
        x = target.detach().double()
        self.signal = self.signal + x.square().sum()
        self.noise = self.noise + (x - preds.detach().double()).square_().sum()
        self.count += x.numel()

    def compute(self) -> Tensor:
        """The ratio in dB, float64 `[]`."""
        self._require_data()
        # 0 / 0 would be NaN: nothing to distort and nothing distorted is perfect.
        return torch.where(self.noise == 0, torch.inf, 10 * torch.log10(self.signal / self.noise))


class OutputCosine(_Comparison):
    r"""Cosine similarity of quantized and float tensors: :math:`\frac{\sum x \hat x}{\|x\| \|\hat x\|}`, in -1..1.

    A cosine is blind to a wrong scale: read it together with `SQNR`, never alone. Two zero vectors have the
    cosine 1, one zero vector 0.

    Args:
        per_sample: dim 0 counts samples; each is flattened and the mean of their cosines is given. Otherwise
            everything seen since the last reset is one long vector.

    Raises:
        QuantizationError: when the shapes differ, when there is no sample dim, and from `compute` when
            nothing was seen.

    >>> metric = OutputCosine()
    >>> metric(torch.tensor([[1.0, 0.0], [2.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    tensor(0.5000, dtype=torch.float64)
    >>> metric = OutputCosine(per_sample=False)
    >>> metric(torch.tensor([[1.0, 0.0], [2.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    tensor(0.7698, dtype=torch.float64)
    """

    total: Tensor
    preds_square: Tensor
    target_square: Tensor

    def __init__(self, per_sample: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.per_sample = per_sample
        # Sum of the samples' cosines, or the dot product of everything.
        self._add_sums("total", *(() if per_sample else ("preds_square", "target_square")))

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds a batch; `preds` quantized, `target` float, `[N, ...]`."""
        self._check(preds, target)
        if self.per_sample and target.ndim == 0:
            raise QuantizationError("OutputCosine(per_sample=True) takes [N, ...], got a tensor without dims")
        x, y = preds.detach().double(), target.detach().double()
        if not self.per_sample:
            self.total = self.total + (x * y).sum()
            self.preds_square = self.preds_square + x.square().sum()
            self.target_square = self.target_square + y.square().sum()
            self.count += x.numel()
        elif x.numel():
            x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
            self.total = self.total + _cosine((x * y).sum(1), x.square().sum(1), y.square().sum(1)).sum()
            self.count += len(x)

    def compute(self) -> Tensor:
        """The cosine, float64 `[]`."""
        self._require_data()
        if self.per_sample:
            return self.total / self.count
        return _cosine(self.total, self.preds_square, self.target_square)


def _cosine(dot: Tensor, x_square: Tensor, y_square: Tensor) -> Tensor:
    both_zero = (x_square == 0) & (y_square == 0)
    one_zero = (x_square == 0) | (y_square == 0)
    # Two roots, not the root of the product, which overflows at norms of 1e154.
    cosine = dot / (x_square.sqrt() * y_square.sqrt())
    # Rounding may leave -1..1 by an ulp.
    return torch.where(both_zero, 1.0, torch.where(one_zero, 0.0, cosine.clamp(-1.0, 1.0)))


class PredictionAgreement(_Comparison):
    r"""Share of predictions that the quantized model shares with the float one, in 0..1.

    `preds` and `target` are both scores (logits or probabilities); a prediction is the class of the
    highest score, the first one on ties.

    Args:
        dim: the class dim: 1 for `[N, C, ...]`, -1 for the `[N, T, C]` of language models.

    Raises:
        QuantizationError: when the shapes differ, when there is no such dim, when scores are NaN, and from
            `compute` when nothing was seen.

    >>> metric = PredictionAgreement()
    >>> metric(torch.tensor([[0.1, 0.9], [0.6, 0.4]]), torch.tensor([[0.3, 0.7], [0.2, 0.8]]))
    tensor(0.5000, dtype=torch.float64)
    """

    equal: Tensor

    def __init__(self, dim: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dim = dim
        self._add_sums("equal", dtype=torch.int64)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds a batch of scores; `preds` quantized, `target` float."""
        self._check(preds, target)
        if not -target.ndim <= self.dim < target.ndim:
            raise QuantizationError(
                f"PredictionAgreement(dim={self.dim}): scores of shape {tuple(target.shape)} have no such dim"
            )
        if target.numel() == 0:
            return
        # argmax takes a NaN for the highest score: two broken models would agree.
        if preds.isnan().any() or target.isnan().any():
            raise QuantizationError("PredictionAgreement: scores hold NaN")
        same = preds.argmax(self.dim) == target.argmax(self.dim)
        self.equal += same.sum()
        self.count += same.numel()

    def compute(self) -> Tensor:
        """The share, float64 `[]`."""
        self._require_data()
        return self.equal.double() / self.count
