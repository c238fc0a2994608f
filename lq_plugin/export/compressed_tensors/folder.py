"""Folders of compressed-tensors: config, weights and tokenizer files, written by transformers itself."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from lq_plugin.errors import ExportError
from lq_plugin.export.compressed_tensors.adapters import FOLDER, open_adapted
from lq_plugin.export.compressed_tensors.experts import expert_tensors, is_stack, stacks_of
from lq_plugin.export.compressed_tensors.schemes import scheme_of
from lq_plugin.export.compressed_tensors.source import experts_of, must_be_dequantized
from lq_plugin.export.compressed_tensors.weights import layer_tensors
from lq_plugin.intent.formats import SLOTS
from lq_plugin.layers import CONTAINER, QuantizedLayer
from lq_plugin.model.prepare import quantized_layers
from lq_plugin.model.unreached import unreached
from lq_plugin.utilities.files import replacing_folder

#: Files of tokenizers and processors: what they are called in a folder of transformers.
_BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip


def write_folder(source: Any, path: Path, adapted: Any = None) -> int:
    """Writes a quantized transformers model as a folder; returns the size of its files in bytes.

    Args:
        source: `PreTrainedModel`, calibrated, without faults; it is not changed.
        path: of the folder.
        adapted: `PeftModel` whose adapters are written next to it; None: there are none.
    """
    with replacing_folder(path, ExportError) as folder:
        with _config_of_folder(source):
            source.save_pretrained(folder, state_dict=_tensors(source))
        origin = Path(source.name_or_path or "/no/folder")
        for name in _BESIDE:
            if (origin / name).is_file():
                shutil.copyfile(origin / name, folder / name)
        if adapted is not None:
            adapted.save_pretrained(folder / FOLDER)
        for file in folder.rglob("*.safetensors"):
            # safetensors makes files that only their owner can read.
            shutil.copymode(folder / "config.json", file)
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def open_folder(path: Path) -> nn.Module:
    """Returns the model in a folder, as transformers loads it, with the adapters next to it in PEFT's layers.

    Raises:
        ExportError: it is no folder of a transformers model.
    """
    import transformers

    try:
        kind = json.loads((path / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError) as fault:
        raise ExportError(f"{path} is no folder of a transformers model: {fault!r}") from fault
    if not isinstance(kind, str) or not hasattr(transformers, kind):
        raise ExportError(f"{path}: transformers has no architecture {kind!r}")
    model: nn.Module = getattr(transformers, kind).from_pretrained(path, dtype="auto", local_files_only=True)
    return open_adapted(model.eval(), path / FOLDER) if (path / FOLDER).is_dir() else model.eval()


def quantization_config(source: nn.Module) -> dict[str, Any]:
    """Returns `quantization_config` of `config.json`, checked by compressed-tensors.

    Layers of one scheme are a group. Where all linear layers that are not ignored are in one, it is called by their
    class: vLLM then finds them also where it has fused some.
    """
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig

    groups: list[tuple[dict[str, Any], list[str]]] = []
    stored, stacks = _stored_layers(source), stacks_of(source)
    # Other parts of an expert's name are not those of the file.
    own = sorted({name.split(".")[-2] for name in stacks})
    names = {name: [name] for name in stored} | {name: [_inside(each) for each in own] for name in list(stacks)[:1]}
    for name, layer in (stored | stacks).items():
        quantizers: tuple[Any, Any] = layer.weight_quantizer, layer.input_quantizer
        specs = [None if quantizer is None else quantizer.current.spec for quantizer in quantizers]
        scheme = scheme_of(cast(Any, specs[0]), specs[1])
        group = next((names for known, names in groups if known == scheme), None)
        if group is None:
            groups.append((scheme, group := []))
        group += names.get(name, [])
    if len(groups) == 1:
        groups = [(groups[0][0], ["Linear"])]
    linear = [name for name, module in source.named_modules() if isinstance(module, nn.Linear)]
    # Experts are linear layers in the file, vLLM would take them for quantized ones. Their module's path is another one
    # there, its own name is the same.
    experts = sorted({name.split(".")[-2] for name in experts_of(source) if name not in stacks})
    formats = {scheme["format"] for scheme, _ in groups}
    config = QuantizationConfig.model_validate(
        {
            "config_groups": {
                f"group_{index}": {**scheme, "targets": names} for index, (scheme, names) in enumerate(groups)
            },
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "ignore": [
                *(name for name in linear if name not in stored),
                *map(_inside, experts),
            ],
        }
    )
    fields: dict[str, Any] = {"version": compressed_tensors.__version__, **config.model_dump(mode="json")}
    return fields | ({"dequantize": True} if must_be_dequantized(source) else {})


def _inside(name: str) -> str:
    """Returns the rule for all layers in modules of this name."""
    return rf"re:.*\.{re.escape(name)}(\..*)?$"


def _stored_layers(source: nn.Module) -> dict[str, QuantizedLayer]:
    """Returns the layers with a quantized weight, without those that no batch has reached."""
    silent = unreached(source)
    return {
        name: layer
        for name, layer in quantized_layers(source)
        if layer.weight_quantizer is not None and name not in silent and not is_stack(layer)
    }


def _shares_quantized_weights(source: nn.Module) -> bool:
    """Returns True where a quantized weight is also that of another layer: the two are stored apart then."""
    stored = [layer.weight for layer in _stored_layers(source).values()]
    names = list(source.named_parameters(remove_duplicate=False))
    return any(sum(parameter is weight for _, parameter in names) > 1 for weight in stored)


def _tensors(source: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of the folder by name."""
    layers = quantized_layers(source)
    quantizers = tuple(f"{name}.{slot}_quantizer." for name, _ in layers for slot in SLOTS)
    stacks = stacks_of(source)
    tensors = expert_tensors(source) | {
        key: value
        for key, value in source.state_dict().items()
        if not key.startswith(quantizers) and f".{CONTAINER}." not in key and key not in stacks
    }
    for name, layer in _stored_layers(source).items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": value for part, value in layer_tensors(layer).items()}
    return tensors


@contextmanager
def _config_of_folder(source: Any) -> Iterator[None]:
    """Gives a model the config of its folder while it is saved."""
    kept = source.config
    source.config = copy.deepcopy(kept)
    try:
        source.config.quantization_config = quantization_config(source)
        if _shares_quantized_weights(source):
            source.config.tie_word_embeddings = False
            source.config.get_text_config().tie_word_embeddings = False
        yield
    finally:
        source.config = kept
