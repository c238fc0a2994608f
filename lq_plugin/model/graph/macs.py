"""Multiply-accumulates (MACs) of one call, from shapes alone.

Counted are the products that a quantized kernel would execute: linear, convolution, recurrent
and attention products. Bias adds, norms, activations, residual adds and table look-ups are 0. Masks
of attention leave nothing out.

Independent check: twice the MACs of products equals `torch.utils.flop_counter`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import isqrt, prod
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lq_plugin.layers.registry import layer_channels, operation_of
from lq_plugin.model.graph.tensor_identity import tensors_of

Shape = tuple[int, ...]


def module_macs(module: nn.Module, input_shapes: Sequence[Shape], output_shapes: Sequence[Shape]) -> int:
    """MACs of one call of `module`; 0 for types that multiply nothing by a weight.

    * Linear, HF Conv1D: outputs · in_features
    * Conv: outputs · in_channels / groups · kernel
    * ConvTranspose: inputs · out_channels / groups · kernel
    * MultiheadAttention: the four projections, QKᵀ and the product with V
    * RNN, GRU, LSTM and their cells: steps · gates · hidden · (input + state), + the projection

    Args:
        module: that is called.
        input_shapes, output_shapes: of its tensors.
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
    if operation_of(module) == "product":
        return outputs * layer_channels(module)[0]
    return 0


def weight_macs(module: nn.Module, input_shapes: Sequence[Shape]) -> dict[str, int]:
    """Returns each weight's (and product's) share in one call of a module that holds several, by its key.

    Empty for other modules.

    They are all of `module_macs`. Of attention, QKᵀ is `matmul_0` and the product with V `matmul_1`.
    """
    if not input_shapes:
        return {}
    if isinstance(module, nn.RNNBase):
        steps = prod(input_shapes[0][:-1])
        names = [name for name in module._flat_weights_names if name.startswith("weight_")]
        return {name: steps * getattr(module, name).numel() for name in names}
    if isinstance(module, nn.RNNCellBase):
        rows = prod(input_shapes[0][:-1])
        return {name: rows * getattr(module, name).numel() for name in ("weight_ih", "weight_hh")}
    if isinstance(module, nn.MultiheadAttention):
        query, key, embed = input_shapes[0], input_shapes[min(1, len(input_shapes) - 1)], module.embed_dim
        per_row = {"q": prod(query[:-1]) * embed, "k": prod(key[:-1]) * module.kdim, "v": prod(key[:-1]) * module.vdim}
        shares = {f"{which}_proj_weight": rows * embed for which, rows in per_row.items()}
        extra = (module.bias_k is not None) + module.add_zero_attn
        length_axis = 1 if module.batch_first and len(query) == 3 else 0
        product = prod(query[:-1]) * (key[length_axis] + extra) * embed
        return ({"in_proj_weight": sum(shares.values())} if module._qkv_same_embed_dim else shares) | {
            "out_proj": prod(query[:-1]) * embed * embed,
            "matmul_0": product,
            "matmul_1": product,
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
    return _attention_macs(
        batch, query[length_axis], key[length_axis], extra, module.embed_dim, module.kdim, module.vdim
    )


def _attention_macs(batch: int, queries: int, keys: int, extra: int, embed: int, kdim: int, vdim: int) -> int:
    projections = 2 * queries * embed * embed + keys * (kdim + vdim) * embed
    return batch * (projections + 2 * queries * (keys + extra) * embed)


def functional_macs(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    """MACs of a functional call by its bare name (`"matmul"`, `"conv2d"`, ...); 0 for an unlisted one.

    Args:
        op: the name, without underscores around it.
        args, kwargs: of the call.
        output: its result.
    """
    count = _FUNCTIONAL.get(op)
    return count(args, kwargs, output) if count else 0


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, *names: str) -> Any:
    return args[position] if position < len(args) else next(kwargs[name] for name in names if name in kwargs)


def _matmul(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    count: int = output.numel() * _argument(args, kwargs, 0, "input", "self").shape[-1]
    return count


def _addmm(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    count: int = output.numel() * _argument(args, kwargs, 1, "mat1", "mat", "batch1").shape[-1]
    return count


def _linear(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    count: int = output.numel() * _argument(args, kwargs, 1, "weight").shape[-1]
    return count


def _convolution(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    count: int = output.numel() * prod(_argument(args, kwargs, 1, "weight").shape[1:])
    return count


def _conv_transpose(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    count: int = _argument(args, kwargs, 0, "input").numel() * prod(_argument(args, kwargs, 1, "weight").shape[1:])
    return count


def _dot_product_attention(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    query, key = _argument(args, kwargs, 0, "query"), _argument(args, kwargs, 1, "key")
    # Heads and batch are read off the output: with grouped queries the key has fewer heads.
    count: int = prod(output.shape[:-1]) * key.shape[-2] * (query.shape[-1] + output.shape[-1])
    return count


def _multi_head_attention(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    query, key, value = (_argument(args, kwargs, i, name) for i, name in enumerate(("query", "key", "value")))
    batch = query.shape[1] if query.dim() == 3 else 1
    return _attention_macs(batch, query.shape[0], key.shape[0], 0, query.shape[-1], key.shape[-1], value.shape[-1])


def _grouped_mm(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    """Counts each row with the matrix of its group.

    Of two matrices that are both cut along the inner dim, each slice counts once.
    """
    first, second = (
        _argument(args, kwargs, 0, "mat_a", "self", "input"),
        _argument(args, kwargs, 1, "mat_b", "mat2", "weight"),
    )
    rows = first.shape[0] * second.shape[1] if first.dim() == second.dim() == 2 else output.numel()
    count: int = rows * first.shape[-1]
    return count


def _addbmm(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    batch = _argument(args, kwargs, 1, "batch1")
    count: int = output.numel() * batch.shape[0] * batch.shape[-1]
    return count


def _any_convolution(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    return (_conv_transpose if _argument(args, kwargs, 6, "transposed") else _convolution)(args, kwargs, output)


def _conv_tbc(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    count: int = output.numel() * prod(_argument(args, kwargs, 1, "weight").shape[:2])
    return count


def _bilinear(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    weight = _argument(args, kwargs, 2, "weight")
    count: int = output.numel() * (weight.shape[1] + 1) * weight.shape[2]
    return count


def _tensordot(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    # Contracted indices are in both operands and not in the output: |a| · |b| = |output| · contracted².
    sizes = _argument(args, kwargs, 0, "a").numel() * _argument(args, kwargs, 1, "b").numel()
    return output.numel() * isqrt(sizes // output.numel()) if output.numel() else 0


def _vecdot(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    dim = kwargs.get("dim", -1)
    count: int = output.numel() * max(_argument(args, kwargs, i, name).shape[dim] for i, name in enumerate(("x", "y")))
    return count


def _cdist(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    """The product of the Euclidean distance, ‖x‖² + ‖y‖² - 2 x·y; other distances multiply nothing."""
    p = args[2] if len(args) > 2 else kwargs.get("p", 2.0)
    return output.numel() * _argument(args, kwargs, 0, "x1").shape[-1] if p == 2 else 0


def _chain(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    """A chain of matrices in its cheapest order, which is the one that torch takes."""
    matrices = list(tensors_of((args, kwargs)))
    sizes = [1 if matrices[0].dim() == 1 else matrices[0].shape[0]]
    sizes += [matrix.shape[0] for matrix in matrices[1:]] + [1 if matrices[-1].dim() == 1 else matrices[-1].shape[1]]

    @cache
    def cheapest(first: int, last: int) -> int:
        cuts = (
            cheapest(first, cut) + cheapest(cut + 1, last) + sizes[first] * sizes[cut + 1] * sizes[last + 1]
            for cut in range(first, last)
        )
        return min(cuts, default=0)

    return cheapest(0, len(matrices) - 1)


def _einsum(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> int:
    """Products from left to right, torch's order without `opt_einsum`.

    For each: the sizes of all indices of the two operands, but those that one of them has alone and nobody reads later:
    these are summed before the two meet.
    """
    operands = list(tensors_of(args[1:]))
    inputs, arrow, result = args[0].replace(" ", "").partition("->")
    terms = [_einsum_labels(term, operand.dim()) for term, operand in zip(inputs.split(","), operands, strict=True)]
    sizes: dict[str, int] = {}
    for labels, operand in zip(terms, operands, strict=True):
        for label, size in zip(labels, operand.shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), size)
    occurring = [label for labels in terms for label in labels]
    kept = {
        label
        for label in occurring
        if (label in result if arrow else occurring.count(label) == 1) or label.startswith("...")
    }
    held, total = set(terms[0]), 0
    for index, labels in enumerate(terms[1:], 2):
        later = kept.union(*terms[index:])
        met = {label for label in held.union(labels) if label in later or (label in held and label in labels)}
        total += prod(sizes[label] for label in met)
        held = met & later
    return total


def _einsum_labels(term: str, dims: int) -> list[str]:
    """One label a dim; those of an ellipsis are aligned at the right, as everywhere in torch."""
    head, dots, tail = term.partition("...")
    hidden = dims - len(head) - len(tail) if dots else 0
    return [*head, *(f"...{hidden - i}" for i in range(hidden)), *tail]


_FUNCTIONAL: dict[str, Callable[[tuple[Any, ...], Mapping[str, Any], Tensor], int]] = {
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _addmm),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose),
    **dict.fromkeys(("scaled_dot_product_attention", "flex_attention"), _dot_product_attention),
    "linear": _linear,
    "grouped_mm": _grouped_mm,
    "addbmm": _addbmm,
    "convolution": _any_convolution,
    "conv_tbc": _conv_tbc,
    "bilinear": _bilinear,
    "tensordot": _tensordot,
    "vecdot": _vecdot,
    "cdist": _cdist,
    "multi_dot": _chain,
    "einsum": _einsum,
    "multi_head_attention_forward": _multi_head_attention,
}
#: Functional calls that multiply and accumulate.
PRODUCTS = frozenset(_FUNCTIONAL)
