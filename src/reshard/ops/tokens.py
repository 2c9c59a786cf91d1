"""Which files a tokenizer is, and what they say of special tokens, for a config.json made without a reference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reshard.formats import huggingface, token_count

_FILE = re.compile(
    r"(?:tokenizer|special_tokens_map|added_tokens|vocab|merges|normalizer|tekken|chat_template).*"
    r"|.*\.(?:tiktoken|model|spm|jinja)"
)
_NAMES = ("bos_token", "eos_token", "pad_token")


def is_of_tokenizer(name: str) -> bool:
    """Whether a file beside a model is one that AutoTokenizer reads."""
    return _FILE.fullmatch(name) is not None


def special_tokens(directory: Path) -> dict[str, int | list[int]]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, as far as generation_config.json or the tokenizer tell.

    A file in place of a directory is a SentencePiece model. Raises Corrupt for files that are not JSON.
    """
    if directory.is_file():
        return {f"{name}_token_id": number for name, number in token_count.special_pieces(directory).items()}
    stated = _json(directory / "generation_config.json")
    found = {f"{name}_id": stated[f"{name}_id"] for name in _NAMES if _is_id(stated.get(f"{name}_id"))}
    settings = _json(directory / "tokenizer_config.json")
    texts = {f"{name}_id": _text(settings.get(name)) for name in _NAMES if f"{name}_id" not in found}
    wanted = {text for text in texts.values() if text}
    ids = _ids(_json(directory / "tokenizer.json"), wanted) if wanted else {}
    return found | {name: ids[text] for name, text in texts.items() if text in ids}


def _json(path: Path) -> Mapping[str, Any]:
    return huggingface.read_json(path) if path.is_file() else {}


def _is_id(value: Any) -> bool:
    """A token, or several of which each ends a text."""
    several = value if isinstance(value, list) else [value]
    return bool(several) and all(type(item) is int and item >= 0 for item in several)


def _text(token: Any) -> str:
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else ""


def _ids(tokenizer: Mapping[str, Any], wanted: set[str]) -> dict[str, int]:
    """The numbers of some tokens, by their text."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    found = {text: vocabulary[text] for text in wanted if text in vocabulary} if isinstance(vocabulary, Mapping) else {}
    for token in added if isinstance(added, list) else ():
        if isinstance(token, Mapping) and token.get("content") in wanted:
            found[str(token["content"])] = token.get("id")
    return {text: number for text, number in found.items() if type(number) is int}
