"""GGUF file of a prepared language model: metadata, vocabulary, and every tensor in its type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lq_plugin.errors import ExportError
from lq_plugin.export.codes import quantizer_in_force
from lq_plugin.export.gguf_file.architecture import LanguageModel, language_models, reordered, rope_theta
from lq_plugin.export.gguf_file.blocks import stored
from lq_plugin.export.gguf_file.types import FLOATS, TYPES
from lq_plugin.export.gguf_file.vocabulary import add_vocabulary, tokenizer_folder
from lq_plugin.utilities.files import replacing

_LARGEST_F16 = 65504.0


class FileTensor(NamedTuple):
    """Tensor of a file.

    Args:
        name: in llama.cpp.
        values: float32, or bytes of whole rows.
        type: name in `gguf.GGMLQuantizationType`.
    """

    name: str
    values: NDArray[Any]
    type: str


def write_gguf(model: nn.Module, path: Path, floats: str = "f16", tokenizer: str | None = None) -> int:
    """Writes the language model in a module; returns the size of the file in bytes.

    Args:
        model: prepared and calibrated; its faults have been asked for.
        path: of the file.
        floats: type of matrices that stay float: `f16`, `bf16` or `f32`. Norms and biases are always F32.
        tokenizer: folder with a `tokenizer.json`; None: the one that the model was loaded from, or a stand-in.

    Raises:
        ExportError: float values beyond float16, a tokenizer that llama.cpp has no equal of, or no place to write.
    """
    import gguf

    (language,) = language_models(model)
    folder = tokenizer_folder(tokenizer, language.config)
    tensors = list(_tensors(language, floats))
    with replacing(path, ExportError) as stream:
        writer = gguf.GGUFWriter(stream.name, language.architecture.name)
        _add_metadata(writer, language, tensors)
        add_vocabulary(writer, folder, language.config)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.type]
            values = tensor.values
            if values.dtype != np.uint8:
                values = gguf.quants.quantize(values, kind)
            writer.add_tensor(tensor.name, values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path.stat().st_size


def _tensors(language: LanguageModel, floats: str) -> Iterator[FileTensor]:
    """Yields the tensors; a tied output that is stored like the embedding is left out, as llama.cpp expects."""
    module = language.module
    parameters = dict(module.named_parameters(remove_duplicate=False))
    first: dict[int, str | None] = {}
    for key, name in language.names().items():
        owner, _, slot = key.rpartition(".")
        layer = module.get_submodule(owner)
        quantizer = quantizer_in_force(layer) if slot == "weight" else None
        spec = None if quantizer is None else str(quantizer.spec)
        if first.setdefault(id(parameters[key]), spec) == spec and name == "output.weight" and _is_tied(module):
            continue
        heads = language.heads(key)
        if quantizer is None:
            values = parameters[key].detach().float().cpu().numpy()
            kind = "F32" if values.ndim == 1 else FLOATS[floats]
            if kind == "F16" and np.abs(values).max(initial=0.0) > _LARGEST_F16:
                raise ExportError(f"{language.prefix}{key} has numbers beyond {_LARGEST_F16:g}, the largest of f16")
            rows = values
        else:
            weight = stored(quantizer, parameters[key])
            rows, kind = weight.rows, weight.type
            if weight.scale is not None:
                scale = np.array([weight.scale], np.float32)
                yield FileTensor(f"{cast(str, name).removesuffix('weight')}scale", scale, "F32")
        yield FileTensor(cast(str, name), rows if heads is None else np.ascontiguousarray(reordered(rows, heads)), kind)
    factors = language.rope_factors()
    if not np.allclose(factors, 1.0, rtol=1e-5):
        yield FileTensor("rope_freqs.weight", factors, "F32")


def _is_tied(module: nn.Module) -> bool:
    head, embedding = module.lm_head, module.get_input_embeddings()  # type: ignore[operator]
    return head.weight is embedding.weight  # type: ignore[union-attr]


def _add_metadata(writer: Any, language: LanguageModel, tensors: list[FileTensor]) -> None:
    import gguf

    config = language.config
    writer.add_name(type(language.module).__name__)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(language.head_dim)
    writer.add_value_length(language.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(language.head_dim)
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_vocab_size(config.vocab_size)
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.type] += tensor.values.nbytes if tensor.values.ndim > 1 else 0
    ((most, _),) = sizes.most_common(1)
    files = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}
    writer.add_file_type(gguf.LlamaFileType[files.get(most, f"MOSTLY_{most}")])
    if sizes.keys() & {kind.name for kind in TYPES.values()}:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
