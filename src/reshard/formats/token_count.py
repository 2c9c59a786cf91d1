"""How many tokens there are in a tokenizer's files, without a tokenizer.

tokenizer.model   SentencePiece: a protobuf whose field 1 is repeated, a piece each
tokenizer.json    `model.vocab`, a dict or a list, and `added_tokens`, with their numbers
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LIMIT_NBYTES = 256 << 20
"""Of a tokenizer's file; the largest have some 30 MiB."""


def count(path: Path) -> int | None:
    """The tokens of a file, or of a directory's `tokenizer.json` or `tokenizer.model`; None where none can be told."""
    if path.is_dir():
        return next(
            (count(path / name) for name in ("tokenizer.json", "tokenizer.model") if _is_there(path / name)), None
        )
    if not _is_there(path):
        return None
    return of_bytes(path.read_bytes())


def of_bytes(data: bytes) -> int | None:
    """The tokens of one file's bytes, whichever kind it is; None where none can be told."""
    return _of_pieces(data) or _of_json(data)


def _is_there(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= LIMIT_NBYTES


def _of_json(data: bytes) -> int | None:
    """None where numbers are left out between tokens: tokens may have any number then."""
    try:
        document = json.loads(data)
        vocab = document["model"]["vocab"]
        numbers = set(vocab.values() if isinstance(vocab, Mapping) else range(len(vocab)))
        numbers |= {token["id"] for token in document.get("added_tokens") or ()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    return len(numbers) if numbers == set(range(len(numbers))) and numbers else None


def _of_pieces(data: bytes) -> int | None:
    pieces, place = 0, 0
    while place < len(data):
        key, place = _varint(data, place)
        match key & 7:
            case 0:
                _, place = _varint(data, place)
            case 1:
                place += 8
            case 2:
                nbytes, place = _varint(data, place)
                place += nbytes
            case 5:
                place += 4
            case _:
                return None
        pieces += key == 0x0A  # field 1, of some length
    return pieces if pieces and place == len(data) else None


def _varint(data: Any, place: int) -> tuple[int, int]:
    """(value, the place behind it); a value beyond all bounds where the bytes end first."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            break
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    return 1 << 62, len(data) + 1
