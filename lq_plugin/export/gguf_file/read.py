"""GGUF files read back: by the package gguf into a float model, and by llama.cpp as log-probabilities."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lq_plugin.errors import ExportError, raise_all
from lq_plugin.export.gguf_file.architecture import architecture_faults, language_models, original_order


class GGUFTensors:
    """Tensors of a file, each dequantized when it is asked for.

    Args:
        path: of the file.

    Raises:
        ExportError: it is no GGUF file, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        if not path.is_file():
            raise ExportError(f"cannot open {path}: there is no such file")
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, KeyError, IndexError, OSError, OverflowError, UnicodeError) as error:
            raise ExportError(f"{path} is no GGUF file, or a damaged one: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def field(self, key: str) -> Any:
        """Returns a value of the metadata.

        Raises:
            ExportError: there is no such key.
        """
        if key not in self._reader.fields:
            raise ExportError(f"{self.path} has no {key!r}")
        return self._reader.fields[key].contents()

    def plain_token(self) -> int:
        """Returns the first token that is ASCII text, neither half a character nor the end of a text."""
        import gguf

        names, kinds = (self.field(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
        end = self.field("tokenizer.ggml.eos_token_id")
        normal = [index for index, kind in enumerate(kinds) if kind == gguf.TokenType.NORMAL and index != end]
        return next((index for index in normal if names[index].isascii() and names[index].isprintable()), 0)

    def types(self) -> dict[str, str]:
        """Returns the type of each tensor by name."""
        return {name: tensor.tensor_type.name for name, tensor in self._tensors.items()}

    def values(self, name: str) -> NDArray[np.float32]:
        """Returns a tensor in float32, multiplied by its scale where it has one.

        Raises:
            ExportError: there is no such tensor.
        """
        import gguf

        if name not in self._tensors:
            raise ExportError(f"{self.path} has no tensor {name!r}")
        tensor = self._tensors[name]
        values: NDArray[np.float32] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        scale = self._tensors.get(f"{name.removesuffix('weight')}scale")
        return values if scale is None or not name.endswith(".weight") else values * scale.data


def load_gguf(model: nn.Module, path: Path) -> None:
    """Fills the parameters of a float model with those of a file.

    Args:
        model: of the class and the shapes that the file was written from.
        path: of the file.

    Raises:
        ExportError: no GGUF file, or one of another model.
    """
    raise_all(ExportError, f"cannot read {path} into {type(model).__name__}", architecture_faults(model))
    (language,) = language_models(model)
    tensors = GGUFTensors(path)
    if "output.weight" in tensors:
        head: Any = language.module.lm_head
        head.weight = nn.Parameter(head.weight.detach().clone())  # it may be tied, and stored otherwise here
    found: dict[nn.Parameter, Tensor] = {}
    faults = []
    for key, known in language.names().items():
        parameter = language.module.get_parameter(key)
        name = str(known)  # without a name it would be among the faults
        if name == "output.weight" and name not in tensors:
            name = "token_embd.weight"
        if name not in tensors:
            faults.append(f"the file lacks {name!r}, for {key}")
            continue
        values, heads = tensors.values(name), language.heads(key)
        if values.shape != tuple(parameter.shape):
            faults.append(f"{key} has shape {list(parameter.shape)} here and {list(values.shape)} in the file")
            continue
        found[parameter] = torch.from_numpy(np.array(values if heads is None else original_order(values, heads)))
    raise_all(ExportError, f"{path} is of another model", faults)
    with torch.no_grad():
        for parameter, value in found.items():
            parameter.copy_(value)


def logits_of(output: Any) -> Tensor:
    """Returns the logits of a model's output: a tensor, what is called so in it, or the first of several."""
    logits = getattr(output, "logits", output)
    found: Tensor = logits[0] if isinstance(logits, (tuple, list)) else logits
    return found


def llama_log_probabilities(path: Path, tokens: Tensor) -> Tensor:
    """Returns what llama.cpp gives for the next token after each prefix, float32 `[N, L, vocabulary]`.

    Every prefix is computed anew: this is for a few short texts.

    Args:
        path: of the file.
        tokens: integers `[N, L]`.

    Raises:
        ExportError: llama.cpp does not load the file, or does not answer.
    """
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx = 32 * math.ceil((tokens.shape[1] + 2) / 32)
    settings.n_parallel = 1
    settings.warmup = False
    settings.verbosity = -1
    settings.cpuparams.n_threads = torch.get_num_threads()
    settings.cpuparams_batch.n_threads = torch.get_num_threads()
    tensors = GGUFTensors(path)
    size, drawn = len(tensors.field("tokenizer.ggml.tokens")), tensors.plain_token()
    try:
        server = xllamacpp.Server(settings)
    except RuntimeError as error:
        raise ExportError(f"llama.cpp does not load {path}: {error}") from error
    texts = tokens.tolist()
    rows = [[_next_token(server, text[:length], size, drawn) for length in range(1, len(text) + 1)] for text in texts]
    return torch.tensor(np.array(rows), dtype=torch.float32)


def _next_token(server: Any, prompt: list[int], size: int, drawn: int) -> NDArray[np.float64]:
    # Half a character is answered without probabilities. They are those before the bias, which has another token drawn.
    request = {
        "prompt": prompt, "n_predict": 1, "temperature": 0.0, "n_probs": size, "cache_prompt": False,
        "logit_bias": [[drawn, 1000.0]],
    }  # fmt: skip
    answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
    if not answer.get("choices"):
        raise ExportError(f"llama.cpp does not answer: {str(answer)[:300]}")
    found = np.full(size, -np.inf)
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found
