"""Masks for passwords of storages and keys of services, in everything that is written, shown or sent.

>>> masked({"url": "postgresql://me:s3cret@host/db", "connect_args": {"password": "s3cret"}, "note": "with s3cret"})
{'url': 'postgresql://me:***@host/db', 'connect_args': {'password': '***'}, 'note': 'with ***'}
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import unquote, unquote_plus

MASK = "***"
#: A key that holds a password, alone or at the end of a name: `connect_args.password`, `db_passwd`, `wandb_api_key`.
_KEY = r"(?:password|passwd|passphrase|pwd|(?:api|access)[_-]?(?:key|token)|auth[_-]?token|client[_-]?secret)"
_IS_KEY = re.compile(rf"(?:^|[._-]|ssl){_KEY}$", re.IGNORECASE)
#: `scheme://user:password@host`; up to the last @, since a password may hold one that should have been written %40.
_IN_AUTHORITY = re.compile(r"://[^:/@\s]*:(.*)@", re.DOTALL)
#: `?password=...` of a URL, `connect_args.password=...` of an override, `{password: ...}` of a mapping in one.
_AS_KEY = re.compile(rf"{_KEY}['\"]?\s*[=:]\s*['\"]?([^&\s,;'\"}}\])]+)", re.IGNORECASE)
#: A name in a command line that may hold a key of a service: `--wandb-api-key`, `logger.token`, `HF_TOKEN`. Counts and
#: other classes of tokens have other names (`max_tokens`, `tokenizer`, `pad_token_id`).
_SECRET_NAME = (
    r"[\w.-]*(?:keys?|token|secrets?|credentials?|password|passwd|passphrase|pwd"
    r"|(?:secret|credentials?|password)[_.-][\w.-]*)"
)
_IS_SECRET_OPTION = re.compile(rf"-+{_SECRET_NAME}", re.IGNORECASE)
_IS_SECRET_WORD = re.compile(rf"([+~-]*{_SECRET_NAME}[=:])(.+)", re.IGNORECASE | re.DOTALL)
#: The same inside of a word: `logger={api_key: abc}`, `https://host/?token=abc`.
_SECRET_INSIDE = re.compile(rf"((?<![\w.-]){_SECRET_NAME}['\"]?\s*[=:]\s*['\"]?)([^&\s,;'\"}}\])]+)", re.IGNORECASE)
#: Shorter ones are only taken out of texts that show where a password stands: they may be part of any word.
_UNMISTAKABLE = 6


def passwords_in(value: Any) -> set[str]:
    """Returns the passwords in nested mappings and lists, as they stand there and decoded (%40 is @)."""
    found: set[str] = set()
    if isinstance(value, str):
        found.update(_IN_AUTHORITY.findall(value), _AS_KEY.findall(value))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if _IS_KEY.search(str(key)) and isinstance(inner, str | int):
                found.add(str(inner))
            else:
                found |= passwords_in(inner)
    elif isinstance(value, list | tuple):
        found.update(*map(passwords_in, value))
    # An interpolation is a name, not a password.
    found = {text for text in found if text and text != MASK and not (text.startswith("${") and text.endswith("}"))}
    return found | {unquote(text) for text in found} | {unquote_plus(text) for text in found}


def without(value: Any, passwords: Collection[str]) -> Any:
    """Returns a copy of nested mappings and lists with `***` in place of these passwords."""
    if isinstance(value, Mapping):
        return {key: without(inner, passwords) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without(inner, passwords) for inner in value]
    if isinstance(value, int) and not isinstance(value, bool) and str(value) in passwords:
        return MASK
    if isinstance(value, str):
        # The longest first: one may be part of another.
        for password in sorted(passwords, key=len, reverse=True):
            if value == password or len(password) >= _UNMISTAKABLE or "://" in value or _AS_KEY.search(value):
                value = value.replace(password, MASK)
    return value


def masked(value: Any) -> Any:
    """Returns nested mappings and lists, or a text, without the passwords that stand in them."""
    return without(value, passwords_in(value))


def masked_words(words: Sequence[str]) -> list[str]:
    """Returns the words of a command line without passwords, and without the values of keys, tokens and secrets.

    Rather a harmless value too many than a key: `sort_key=name` loses its value also.

    >>> masked_words(["train", "--api-key", "abc", "logger.token=abc", "max_tokens=9", "logger={api_key: abc, id: 1}"])
    ['train', '--api-key', '***', 'logger.token=***', 'max_tokens=9', 'logger={api_key: ***, id: 1}']
    """
    found: list[str] = []
    secrets = passwords_in(list(words))
    for index, word in enumerate(words):
        before = words[index - 1] if index else ""
        if _IS_SECRET_OPTION.fullmatch(before) and not word.startswith("--"):
            secrets.add(word)
            found.append(MASK)
        elif whole := _IS_SECRET_WORD.fullmatch(word):
            secrets.add(whole[2])
            found.append(whole[1] + MASK)
        else:
            secrets.update(value for _, value in _SECRET_INSIDE.findall(word))
            found.append(_SECRET_INSIDE.sub(rf"\g<1>{MASK}", word))
    # Long ones wherever else they stand.
    return [without(word, secrets - {MASK}) for word in found]
