"""Vocabulary of a GGUF file: from the `tokenizer.json` of a model's folder, or a stand-in without text.

llama.cpp has two kinds of byte pair encoding that these models use. Byte-level BPE ("gpt2") has merges, and splits text
by one of the regular expressions it knows by name. SentencePiece's ("llama") merges the pair with the highest score; as
a score each token gets minus the rank of the merge that makes it, which is the same order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lq_plugin.errors import ExportError

#: Regular expressions of `tokenizer.json` by their name in llama.cpp; the one of GPT-2 is built into `ByteLevel`.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}
#: Score of a token that no merge makes: after all of them.
_LAST = -1e6


def tokenizer_folder(given: str | None, config: Any) -> Path | None:
    """Returns the folder with the tokenizer: the given one, or the one that the model was loaded from; None: neither.

    Raises:
        ExportError: the given one has no `tokenizer.json`.
    """
    if given is not None:
        if not (Path(given) / "tokenizer.json").is_file():
            raise ExportError(f"tokenizer={given}: there is no tokenizer.json in this folder")
        return Path(given)
    source = getattr(config, "_name_or_path", "") or ""
    return Path(source) if source and (Path(source) / "tokenizer.json").is_file() else None


def add_vocabulary(writer: Any, folder: Path | None, config: Any) -> None:
    """Writes the tokens of a vocabulary, their merges or scores, and the special ones.

    Without a folder the tokens are called `<0>`, `<1>`, ..., and prompts are numbers: llama.cpp loads a file without
    tokens, and the first prompt ends its process (xllamacpp 2026.10.11549). A text cannot be read with them.

    Args:
        writer: `gguf.GGUFWriter`.
        folder: with `tokenizer.json`; None: the stand-in.
        config: of the model.

    Raises:
        ExportError: a tokenizer that llama.cpp has no equal of, or of another model.
    """
    size = config.vocab_size
    if folder is None:
        _add_stand_in(writer, size, config)
        return
    import gguf

    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = content.get("model", {})
    if model.get("type") != "BPE":
        raise ExportError(f"{folder}: its tokenizer is {model.get('type')!r}, llama.cpp reads byte pair encodings here")
    tokens: dict[str, int] = dict(model["vocab"])
    added = {entry["content"]: entry for entry in content.get("added_tokens", [])}
    tokens |= {token: entry["id"] for token, entry in added.items()}
    if len(tokens) > size or max(tokens.values()) >= size:
        raise ExportError(f"{folder}: its tokenizer has {max(tokens.values()) + 1} tokens, the model {size}")
    by_index = {index: token for token, index in tokens.items()}
    names = [by_index.get(index, f"[PAD{index}]") for index in range(size)]
    pieces = bool(model.get("byte_fallback"))
    kinds = gguf.TokenType
    types = []
    for index, name in enumerate(names):
        entry = added.get(name)
        if index not in by_index:
            types.append(kinds.UNUSED)
        elif pieces and name == model.get("unk_token"):
            types.append(kinds.UNKNOWN)
        elif entry is not None:
            types.append(kinds.CONTROL if entry.get("special") else kinds.USER_DEFINED)
        elif pieces and name.startswith("<0x") and len(name) == 6:
            types.append(kinds.BYTE)
        else:
            types.append(kinds.NORMAL)
    special = gguf.SpecialVocab(folder, load_merges=not pieces, n_vocab=size)
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        ranks = {"".join(pair): rank for rank, pair in enumerate(map(_pair, model["merges"]))}
        writer.add_token_scores([float(-ranks[name]) if name in ranks else _LAST for name in names])
        writer.add_add_space_prefix(_adds_a_space(content))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(content.get("pre_tokenizer"), folder))
    writer.add_token_list(names)
    writer.add_token_types(types)
    # Where the tokenizer adds nothing: llama.cpp's own choice depends on the kind.
    special.add_special_token = {"bos": False, "eos": False} | special.add_special_token
    special.add_to_gguf(writer, quiet=True)


def _add_stand_in(writer: Any, size: int, config: Any) -> None:
    import gguf

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"<{index}>" for index in range(size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["< 0"])  # it wants some
    ends = config.eos_token_id
    end = ends[0] if isinstance(ends, list) else ends
    # Without one llama.cpp would stop at the token that ends a text of GPT-2.
    writer.add_eos_token_id(end if isinstance(end, int) and 0 <= end < size else size - 1)
    writer.add_add_bos_token(False)


def _pair(merge: Any) -> tuple[str, str]:
    """Returns the two halves of a merge: one text with a space in it, or a list."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _adds_a_space(content: dict[str, Any]) -> bool:
    """Returns True where a space is put in front of a text."""
    parts = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return '"Prepend"' in parts or '"prepend_scheme": "first"' in parts or '"prepend_scheme": "always"' in parts


def _split_name(rules: Any, folder: Path) -> str:
    """Returns llama.cpp's name for how a text is split before it is merged."""
    steps = rules.get("pretokenizers", [rules]) if isinstance(rules, dict) else []
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, **others}] if others.get("use_regex", True):
            return "gpt-2"
        case [{"type": "Split", "pattern": {"Regex": pattern}}, {"type": "ByteLevel"}] if pattern in SPLITS:
            return SPLITS[pattern]
    raise ExportError(
        f"{folder}: how its tokenizer splits a text is none of {', '.join(['gpt-2', *SPLITS.values()])} in llama.cpp: "
        f"{json.dumps(rules)[:300]}"
    )
