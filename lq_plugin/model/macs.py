"""Multiply-accumulates (MACs) of one call, from shapes alone.

Counted are the products that a quantized kernel would execute: linear, convolution, recurrent
and attention products. Bias adds, norms, activations, residual adds and table look-ups are 0.

Independent check: twice the MACs of products equals `torch.utils.flop_counter`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Shape = tuple[int, ...]


def is_hf_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`, a Linear with weight `[in, out]`.

    Told by its type name and weight, so that transformers need not be installed.
    """
    weight = getattr(module, "weight", None)
    return any(base.__name__ == "Conv1D" for base in type(module).__mro__) and isinstance(weight, Tensor) and weight.dim() == 2


def module_macs(module: nn.Module, input_shapes: Sequence[Shape], output_shapes: Sequence[Shape]) -> int:
    """MACs of one call of `module`; 0 for types that multiply nothing by a weight.

    * Linear, HF Conv1D: outputs · in_features
    * Conv: outputs · in_channels / groups · kernel
    * ConvTranspose: inputs · out_channels / groups · kernel
    * MultiheadAttention: the four projections, QKᵀ and the product with V
    * RNN, GRU, LSTM and their cells: steps · gates · hidden · (input + state), + the projection
    """
    if not input_shapes or not output_shapes:
        return 0
    outputs = prod(output_shapes[0])
    if isinstance(module, nn.MultiheadAttention):
        return _attention_module_macs(module, input_shapes)
    if isinstance(module, nn.RNNBase):
        return _recurrent_macs(module, input_shapes[0])
    if isinstance(module, nn.RNNCellBase):
        gates = {nn.LSTMCell: 4, nn.GRUCell: 3}
        factor = next((n for kind, n in gates.items() if isinstance(module, kind)), 1)
        return prod(input_shapes[0][:-1]) * factor * module.hidden_size * (module.input_size + module.hidden_size)
    if isinstance(module, nn.Linear):
        return outputs * module.in_features
    if isinstance(module, nn.Bilinear):
        return outputs * (module.in1_features + 1) * module.in2_features
    if isinstance(module, _ConvTransposeNd):
        return prod(input_shapes[0]) * (module.out_channels // module.groups) * prod(module.kernel_size)
    if isinstance(module, _ConvNd):
        return outputs * (module.in_channels // module.groups) * prod(module.kernel_size)
    if is_hf_conv1d(module):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return outputs * weight.shape[0]
    return 0


def weight_macs(module: nn.Module, input_shapes: Sequence[Shape]) -> dict[str, int]:
    """The share of each weight in one call of a module that holds several, by the weight's key; empty for other modules.

    For recurrent modules the shares are all of `module_macs`; of attention, the products QKᵀ and with V are left.
    """
    if not input_shapes:
        return {}
    if isinstance(module, nn.RNNBase):
        steps = prod(input_shapes[0][:-1])
        names = [name for name in module._flat_weights_names if name.startswith("weight_")]
        return {name: steps * getattr(module, name).numel() for name in names}
    if isinstance(module, nn.MultiheadAttention):
        query, key, embed = input_shapes[0], input_shapes[min(1, len(input_shapes) - 1)], module.embed_dim
        per_row = {"q": prod(query[:-1]) * embed, "k": prod(key[:-1]) * module.kdim, "v": prod(key[:-1]) * module.vdim}
        shares = {f"{which}_proj_weight": rows * embed for which, rows in per_row.items()}
        return ({"in_proj_weight": sum(shares.values())} if module._qkv_same_embed_dim else shares) | {
            "out_proj": prod(query[:-1]) * embed * embed
        }
    return {}


def _recurrent_macs(module: nn.RNNBase, input_shape: Shape) -> int:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    directions = 2 if module.bidirectional else 1
    state = module.proj_size or module.hidden_size
    per_step = 0
    for layer in range(module.num_layers):
        features = module.input_size if layer == 0 else state * directions
        per_step += directions * gates * module.hidden_size * (features + state)
        per_step += directions * module.hidden_size * module.proj_size
    # [L, N, I], [N, L, I], unbatched [L, I] and packed [sum of lengths, I] alike.
    return prod(input_shape[:-1]) * per_step


def _attention_module_macs(module: nn.MultiheadAttention, shapes: Sequence[Shape]) -> int:
    query, key = shapes[0], shapes[1] if len(shapes) > 1 else shapes[0]
    length_axis = 1 if module.batch_first and len(query) == 3 else 0
    batch = query[1 - length_axis] if len(query) == 3 else 1
    extra = (module.bias_k is not None) + module.add_zero_attn
    return _attention_macs(batch, query[length_axis], key[length_axis], extra, module.embed_dim, module.kdim, module.vdim)


def _attention_macs(batch: int, queries: int, keys: int, extra: int, embed: int, kdim: int, vdim: int) -> int:
    projections = 2 * queries * embed * embed + keys * (kdim + vdim) * embed
    return batch * (projections + 2 * queries * (keys + extra) * embed)


def functional_macs(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    """MACs of a functional call by its bare name (`"matmul"`, `"conv2d"`, ...); 0 for an unlisted one."""
    count = _FUNCTIONAL.get(op)
    return count(args, kwargs, output) if count else 0


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, *names: str) -> Any:
    return args[position] if position < len(args) else next(kwargs[name] for name in names if name in kwargs)


def _matmul(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    return output.numel() * _argument(args, kwargs, 0, "input", "self").shape[-1]


def _addmm(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    return output.numel() * _argument(args, kwargs, 1, "mat1", "mat", "batch1").shape[-1]


def _linear(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    return output.numel() * _argument(args, kwargs, 1, "weight").shape[-1]


def _convolution(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    return output.numel() * prod(_argument(args, kwargs, 1, "weight").shape[1:])


def _conv_transpose(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    return _argument(args, kwargs, 0, "input").numel() * prod(_argument(args, kwargs, 1, "weight").shape[1:])


def _dot_product_attention(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    query, key = _argument(args, kwargs, 0, "query"), _argument(args, kwargs, 1, "key")
    # Heads and batch are read off the output: with grouped queries the key has fewer heads.
    return prod(output.shape[:-1]) * key.shape[-2] * (query.shape[-1] + output.shape[-1])


def _multi_head_attention(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    query, key, value = (_argument(args, kwargs, i, name) for i, name in enumerate(("query", "key", "value")))
    batch = query.shape[1] if query.dim() == 3 else 1
    return _attention_macs(batch, query.shape[0], key.shape[0], 0, query.shape[-1], key.shape[-1], value.shape[-1])


def _einsum(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    """Product of all index sizes for each operand after the first: exact for two operands."""
    operands = [t for a in args[1:] for t in (a if isinstance(a, (list, tuple)) else [a])]
    sizes: dict[str, int] = {}
    for term, operand in zip(args[0].replace(" ", "").partition("->")[0].split(","), operands, strict=True):
        head, dots, tail = term.partition("...")
        hidden = operand.dim() - len(head) - len(tail) if dots else 0
        # Broadcast dims are aligned at the right, as everywhere in torch.
        labels = [*head, *(f"...{hidden - i}" for i in range(hidden)), *tail]
        for label, size in zip(labels, operand.shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), size)
    return prod(sizes.values()) * (len(operands) - 1)


_FUNCTIONAL: dict[str, Callable[[tuple[Any, ...], Mapping[str, Any], Tensor], int]] = {
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _addmm),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose),
    "linear": _linear,
    "einsum": _einsum,
    "scaled_dot_product_attention": _dot_product_attention,
    "multi_head_attention_forward": _multi_head_attention,
}
#: Functional calls that multiply and accumulate.
PRODUCTS = frozenset(_FUNCTIONAL)
