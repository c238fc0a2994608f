"""Language models that llama.cpp knows, as transformers builds them: their names, their shapes, and what differs.

llama.cpp's `llama` turns neighbouring elements of a head by RoPE where transformers turns elements half a head apart:
rows of Q and K are put in that order (`permute` of `convert_hf_to_gguf.py`). Its `qwen2` and `qwen3` turn as
transformers does.
Frequencies that are scaled (Llama 3.1, linear) are stored as factors, which `llama` divides its own by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn


class Architecture(NamedTuple):
    """Architecture of llama.cpp.

    Args:
        name: in `gguf.MODEL_ARCH_NAMES`.
        neighbours: RoPE turns neighbouring elements.
        factors: it reads factors of the frequencies.
    """

    name: str
    neighbours: bool = False
    factors: bool = False


#: By transformers' `model_type`.
ARCHITECTURES = {
    "llama": Architecture("llama", True, True),
    "mistral": Architecture("llama", True, True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
}
_KNOWN = f"causal language models of transformers ({', '.join(ARCHITECTURES)})"


@dataclass(frozen=True)
class LanguageModel:
    """Language model in a module.

    Args:
        prefix: of its names in that module, with its dot.
        module: the model itself.
    """

    prefix: str
    module: nn.Module

    @property
    def config(self) -> Any:
        """Its transformers config."""
        return self.module.config

    @property
    def architecture(self) -> Architecture:
        """The architecture that computes it."""
        return ARCHITECTURES[self.config.model_type]

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        size = getattr(self.config, "head_dim", None)
        return int(size or self.config.hidden_size // self.config.num_attention_heads)

    def names(self) -> dict[str, str | None]:
        """Returns the name in a file of each parameter, a tied one included; None: it has none."""
        import gguf

        kind = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[self.architecture.name]
        table = gguf.get_tensor_name_map(kind, self.config.num_hidden_layers)
        keys = [name for name, _ in self.module.named_parameters(remove_duplicate=False)]
        # Of quantizers: trained scales of formats that no file holds.
        own = [name for name in keys if "_quantizer." not in name]
        return {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in own}

    def heads(self, name: str) -> int | None:
        """Returns the heads whose rows RoPE wants in another order; None: the rows of this tensor stay."""
        if not self.architecture.neighbours:
            return None
        counts = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        return next((count for part, count in counts.items() if f".{part}." in name), None)

    def rope_factors(self) -> NDArray[np.float32]:
        """Returns the frequencies of plain RoPE over the model's own, `[head_dim / 2]`."""
        own = self.rotary.inv_freq.detach().float().cpu().numpy().astype(np.float64)
        plain = rope_theta(self.config) ** -(np.arange(len(own)) / len(own))
        ratio: NDArray[np.float32] = (plain / own).astype(np.float32)
        return ratio

    @property
    def rotary(self) -> Any:
        """Its module of rotary embeddings."""
        return self.module.model.rotary_emb  # type: ignore[union-attr]


def rope_theta(config: Any) -> float:
    """Returns the base of RoPE's frequencies, wherever this version of transformers keeps it."""
    parameters = getattr(config, "rope_parameters", None) or {}
    base: Any = parameters.get("rope_theta") or getattr(config, "rope_theta", 10000.0)
    return float(base)


def reordered(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Returns rows of Q or K in the order in which RoPE turns neighbours: 0, n/2, 1, n/2 + 1, ... of each head.

    >>> reordered(np.arange(8), 2)
    array([0, 2, 1, 3, 4, 6, 5, 7])
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def original_order(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Returns the rows that `reordered` was given."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def language_models(model: nn.Module) -> list[LanguageModel]:
    """Returns the causal language models in a module that an architecture computes, each once."""
    found = []
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        is_known = getattr(config, "model_type", None) in ARCHITECTURES
        if is_known and isinstance(getattr(module, "lm_head", None), nn.Linear) and hasattr(module, "model"):
            found.append(LanguageModel(f"{name}." if name else "", module))
    return found


def architecture_faults(model: nn.Module) -> list[str]:
    """Returns why llama.cpp does not compute what a module computes."""
    kind, found = type(model).__name__, language_models(model)
    if not found:
        return [f"{kind}: a GGUF file holds {_KNOWN}, and here is none"]
    if len(found) > 1:
        listed = ", ".join(each.prefix.removesuffix(".") for each in found)
        return [f"{kind} has {len(found)} language models ({listed}), a GGUF file holds one"]
    (language,) = found
    config = language.config
    others = [
        name
        for name, _ in model.named_parameters()
        if not name.startswith(language.prefix) and "_quantizer." not in name
    ]
    faults = []
    if others:
        faults.append(f"{others[0]} is a parameter outside of the language model, for which a GGUF file has no place")
    if config.hidden_act != "silu":
        faults.append(f"hidden_act is {config.hidden_act!r}, llama.cpp computes silu there")
    if getattr(config, "sliding_window", None) and config.sliding_window < config.max_position_embeddings:
        faults.append(
            f"its attention sees {config.sliding_window} tokens (config.sliding_window), in llama.cpp's "
            f"{language.architecture.name!r} all {config.max_position_embeddings}: set max_position_embeddings to the "
            "window"
        )
    return faults + _rope_faults(language) + _name_faults(language)


def _rope_faults(language: LanguageModel) -> list[str]:
    rotary, name = language.rotary, language.architecture.name
    kind = getattr(rotary, "rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        return [f"its RoPE is {kind!r}, the frequencies of a file are 'default', 'linear' or 'llama3'"]
    if len(rotary.inv_freq) * 2 != language.head_dim:
        return [f"its RoPE turns {len(rotary.inv_freq) * 2} of {language.head_dim} elements of a head, not all"]
    if kind != "default" and not language.architecture.factors:
        return [f"its RoPE is {kind!r}, and llama.cpp's {name!r} reads no factors of frequencies"]
    return []


def _name_faults(language: LanguageModel) -> list[str]:
    unknown = [name for name, known in language.names().items() if known is None]
    where = f"llama.cpp's {language.architecture.name!r}"
    return [f"{language.prefix}{name} has no name in {where}" for name in unknown[:5]]
