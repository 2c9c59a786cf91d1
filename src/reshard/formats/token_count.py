"""How many tokens there are in a tokenizer's files, and which of them are no text, without a tokenizer.

tokenizer.model   SentencePiece: a protobuf whose field 1 is repeated, a piece each: text in field 1, kind in field 3
tokenizer.json    `model.vocab`, a dict or a list, and `added_tokens`, with their numbers
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
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
    try:
        return sum(key == _PIECE for key, _ in _fields(data)) or None
    except ValueError:
        return None


def special_pieces(path: Path) -> dict[str, int]:
    """`bos`, `eos` and `pad` of a SentencePiece model, as far as it has them; nothing where it is no such file."""
    if not _is_there(path):
        return {}
    data = path.read_bytes()
    texts = dict(_SPECIAL.values())
    found: dict[bytes, int] = {}
    try:
        for spec in _each(data, _TRAINER):
            texts |= _picked(spec, texts)
        for number, piece in enumerate(_each(data, _PIECE)):
            said = _picked(piece, (_PIECE, _KIND))
            if said.get(_KIND) == _CONTROL and said.get(_PIECE) in texts.values():
                found[said[_PIECE]] = number
    except ValueError:
        return {}
    return {name: found[texts[key]] for name, (key, _) in _SPECIAL.items() if texts[key] in found}


def _each(data: bytes, wanted: int) -> Iterator[memoryview]:
    return (inner for key, inner in _fields(data) if key == wanted)


def _picked(data: memoryview, wanted: Container[int]) -> dict[int, bytes]:
    """The last of each field that is wanted."""
    return {key: bytes(inner) for key, inner in _fields(data) if key in wanted}


_PIECE, _TRAINER, _KIND, _CONTROL = 0x0A, 0x12, 0x18, b"\x03"
"""Fields 1, a piece with its text in field 1, and 2, how it was trained; field 3 of a piece, a number."""
_SPECIAL = {"bos": (46 << 3 | 2, b"<s>"), "eos": (47 << 3 | 2, b"</s>"), "pad": (48 << 3 | 2, b"<pad>")}
"""The field of `TrainerSpec` with the text of each, and that text where the field is not there."""


def _fields(data: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    """(key, bytes) of each field of a protobuf. Raises ValueError for what is none."""
    view, place = memoryview(data), 0
    while place < len(view):
        key, place = _varint(view, place)
        start = place
        match key & 7:
            case 0:
                _, place = _varint(view, place)
            case 1:
                place += 8
            case 2:
                nbytes, start = _varint(view, place)
                place = start + nbytes
            case 5:
                place += 4
            case _:
                raise ValueError(f"no field starts with {key}")
        if place > len(view):
            raise ValueError("a field ends behind the data")
        yield key, view[start:place]


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
