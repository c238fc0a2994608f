"""The Hessian H = 2 X Xᵀ of a layer's inputs, and 2 (X̃ - X) Xᵀ with the float model's inputs X̃, batch by batch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from lq_plugin.functional.gptq import column_parts, float32_products
from lq_plugin.functional.unfold import unfold_columns
from lq_plugin.layers import CompoundWeight, QuantizedLayer
from lq_plugin.layers.base import scales_output
from lq_plugin.layers.registry import known_operation, operation_of
from lq_plugin.model.ranks import average
from lq_plugin.model.survey import float_class

#: Elements of unfolded inputs that are held at a time.
_CHUNK = 2**24
#: Samples whose products are summed in float32, on CPUs; such sums are added up in float64.
_SAMPLES = 1024


class InputHessian:
    """Sums 2 X Xᵀ over the inputs of one linear, convolution or weight of a module, as its input quantizer gives them.

    A column of X is what the weight's rows are multiplied with: of a convolution, what an output position reads. Rows
    of X belong to columns of the weight. The sum is float64 whatever precision the model runs in: no autocast and no
    TF32 get at it. Of what goes into it, products of float32 inputs may be rounded to float32, to some 1e-7 of the
    diagonal.

    Args:
        layer: one that `why_no_hessian` has nothing against.
        asymmetric: sum 2 X̃ Xᵀ also.
        exact: all products in float64, in twice the time.

    Attributes:
        total: `[groups, columns, columns]`, for the weight's columns; above the diagonal once it is asked for.
        mixed: 2 X̃ Xᵀ, of the same shape; None where it is not summed.
        count: samples, the columns of X, in this process.
    """

    def __init__(self, layer: QuantizedLayer, asymmetric: bool = False, exact: bool = True) -> None:
        self.layer, self.exact = layer, exact or asymmetric or _device(layer.weight).type != "cpu"
        # Each expert of a stack has inputs of its own, and so have query, key and value.
        self.groups = layer.matrices if isinstance(layer, CompoundWeight) else int(getattr(layer, "groups", 1))
        columns = type(layer).canonical(layer, layer.weight)[0].numel()
        self.count = 0
        self.total = torch.zeros(self.groups, columns, columns, dtype=torch.float64, device=_device(layer.weight))
        self.mixed = torch.zeros_like(self.total) if asymmetric else None

    def add(self, x: Tensor, float_input: Tensor | None = None) -> None:
        """Adds one call's input.

        Args:
            x: of the quantized model.
            float_input: the float model's in the same call, where `mixed` is summed.
        """
        x = self.layer.quantized_input(x.detach())
        if not x.numel():  # an expert without tokens, a batch without images
            return
        x = x.to(_device(x))
        floats = None if float_input is None else self._chunks(float_input.detach().to(x.device))
        for index, chunk in enumerate(self._chunks(x)):
            columns = self._columns(self._cast(chunk))
            self.count += columns.shape[2]
            self._add_squares(self.total, columns)
            if self.mixed is not None and floats is not None:
                self.mixed.baddbmm_(self._columns(floats[index].double()), columns.mT, alpha=2.0)

    def add_rows(self, group: int, x: Tensor) -> None:
        """Adds inputs of one matrix of a stack.

        Args:
            group: number of the matrix.
            x: `[rows, in]` as its input quantizer gives them.
        """
        for rows in x.detach().to(_device(x)).split(max(1, _CHUNK // x.shape[1])):
            self.count += len(rows)
            self._add_squares(self.total[group].unsqueeze(0), self._cast(rows).t().unsqueeze(0))

    def _cast(self, x: Tensor) -> Tensor:
        return x.double() if self.exact or x.dtype == torch.float64 else x.float()

    def _add_squares(self, total: Tensor, columns: Tensor) -> None:
        """Adds 2 X Xᵀ of `[groups, columns, samples]` on the diagonal and below it, in steps of `column_parts`."""
        for part in column_parts(total.shape[-1]):
            mine = total[:, part, : part.stop]
            if columns.dtype == torch.float64:
                mine.baddbmm_(columns[:, part], columns[:, : part.stop].mT, alpha=2.0)
                continue
            # Memory that is there already: a sum of two dtypes makes a copy of one.
            single, double = (held[: mine.numel()].view(mine.shape) for held in self._scratch)
            with float32_products():
                for some in columns.split(_SAMPLES, dim=-1):
                    product = torch.bmm(some[:, part], some[:, : part.stop].mT, out=single)
                    mine.add_(double.copy_(product), alpha=2.0)

    @functools.cached_property
    def _scratch(self) -> tuple[Tensor, Tensor]:
        size = self.total[:, column_parts(self.total.shape[-1])[0]].numel()
        single, double = (self.total.new_empty(size, dtype=dtype) for dtype in (torch.float32, torch.float64))
        return single, double

    def mean_over_ranks(self) -> tuple[Tensor, Tensor | None]:
        """Returns H and 2 (X̃ - X) Xᵀ, or None, as means over all processes, `[groups, columns, columns]`."""
        for part in column_parts(self.total.shape[-1]):
            self.total[:, : part.start, part] = self.total[:, part, : part.start].mT
        average([self.total] if self.mixed is None else [self.total, self.mixed])
        return self.total, None if self.mixed is None else self.mixed - self.total

    def _chunks(self, x: Tensor) -> tuple[Tensor, ...]:
        if not isinstance(self.layer, _ConvNd):
            x = x.reshape(-1, x.shape[-1])
            chunks: tuple[Tensor, ...] = x.split(max(1, _CHUNK // x.shape[1]))
            return chunks
        x = x if x.dim() == len(self.layer.kernel_size) + 2 else x.unsqueeze(0)
        # At most: with stride 1.
        chunks = x.split(max(1, _CHUNK // (x[0].numel() * self.layer.weight[0, 0].numel())))
        return chunks

    def _columns(self, x: Tensor) -> Tensor:
        """X as `[groups, columns, samples]`."""
        conv = self.layer
        if not isinstance(conv, _ConvNd):
            return x.mT.unsqueeze(0)
        if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
            x = F.pad(x, [size for size in reversed(conv.padding) for _ in range(2)])
        else:
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        return unfold_columns(x, conv.kernel_size, conv.stride, conv.dilation, conv.groups)


def why_no_hessian(layer: QuantizedLayer) -> str | None:
    """Returns why a layer is no product of its weight with columns of its input; None when it is."""
    kind = float_class(layer)
    operation = operation_of(layer)
    if operation == "transposed convolution":
        return "a transposed convolution is not unfolded to a matrix product"
    if operation is None:
        return f"{kind.__name__} is no product of a weight and an input"
    if known_operation(layer) is None:
        return f"{kind.__name__} has a forward of its own, which may do more than multiply"
    if scales_output(layer.input_quantizer):
        return "its input's scale (XNOR-Net) is multiplied to each output"
    return None


def _device(x: Tensor) -> torch.device:
    # mps has no float64.
    return torch.device("cpu") if x.device.type == "mps" else x.device
