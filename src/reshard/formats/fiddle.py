"""Fiddle's JSON of calls that are still to be made: what NeMo 2 keeps of a model, its trainer and its tokenizer.

    root         {"type": "ref", "key": "trainer_context_1"}
    objects      by key: {"type": class, "items": [[path element, value], ...], "metadata": value, "paths": [...]}
    refcounts    how often each object is referred to
    version      "0.0.1"

    a value is   {"type": "leaf", "value": None, a bool, number or string}
                 {"type": "pyref", "module": "torch", "name": "bfloat16"}     a class, function or constant
                 {"type": "ref", "key": "llama_config_1"}                     an object
                 a bare JSON value, where no path leads to it (inside of metadata)

Loading such a file with Fiddle imports every `pyref` and calls what stands in `fn_or_cls`. Here nothing is imported:
`loads` gives `Call` and `Symbol`, which are names and arguments.

Source: fiddle 0.2 to 0.3.1 `_src/experimental/serialization.py`, `_src/config.py`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from reshard.errors import Corrupt, Unsupported

VERSION = "0.0.1"

LIMIT_NBYTES = 16 << 20
"""Of a file; real ones have some 30 KiB."""
_MAX_DEPTH = 64
_MAX_NUM_VALUES = 1 << 17
"""Of a file, objects counted once."""


@dataclass(frozen=True, slots=True)
class Symbol:
    """What a module has under a name."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """`torch.nn.functional.silu`."""
        return f"{self.module}.{self.name}"

    @classmethod
    def of(cls, path: str) -> Symbol:
        """By path, where the name has no dots."""
        module, _, name = path.rpartition(".")
        return cls(module, name)


@dataclass(frozen=True, slots=True)
class Call:
    """A class or function with the arguments that it is to be called with."""

    target: Symbol
    arguments: Mapping[str, Value] = field(default_factory=dict)

    def get(self, name: str) -> Value:
        """An argument; None where it was not given."""
        return self.arguments.get(name)


Value: TypeAlias = Any
"""None, a bool, int, float, str, Symbol or Call; a list, tuple or dict of them."""


# -------------------------------------------------------------------------------------------------------- writing

_CONFIG = Symbol("fiddle._src.config", "Config")
_METADATA = Symbol("fiddle._src.config", "BuildableTraverserMetadata")
_BUILTIN: Mapping[type, Symbol] = {kind: Symbol("builtins", kind.__name__) for kind in (tuple, list, dict)}


def dumps(root: Call) -> str:
    """The text of the file that Fiddle writes for a call."""
    writer = _Writer()
    reference = writer.value(root, "<root>")
    document = {
        "root": reference, "objects": writer.objects, "refcounts": dict(writer.counts), "version": VERSION,
    }  # fmt: skip
    return json.dumps(document)


class _Writer:
    """The objects of a file, inner ones before those that hold them, as Fiddle numbers them."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.counts: Counter[str] = Counter()

    def value(self, value: Value, path: str | None) -> Any:
        """How a value stands in its object; `path` leads to it from the root, and None to metadata."""
        match value:
            case Symbol():
                return _pyref(value) | ({} if path is None else {"paths": [path]})
            case Call():
                return self._call(value, path)
            case dict():
                items = [[f"Key(key={key!r})", self.value(v, _inside(path, f"[{key!r}]"))] for key, v in value.items()]
                return self._object(dict, items, self.value(tuple(value), None), path)
            case list() | tuple():
                items = [[f"Index(index={i})", self.value(v, _inside(path, f"[{i}]"))] for i, v in enumerate(value)]
                return self._object(type(value), items, None, path)
            case None | bool() | int() | float() | str():
                return value if path is None else {"type": "leaf", "value": value, "paths": [path]}
        raise Unsupported(f"{path}: Fiddle's files have no {type(value).__name__}")

    def _call(self, call: Call, path: str | None) -> Any:
        items = [[f"Attr(name={n!r})", self.value(v, _inside(path, f".{n}"))] for n, v in call.arguments.items()]
        about = {
            "fn_or_cls": call.target, "argument_names": tuple(call.arguments), "argument_tags": {},
            "argument_history": {},
        }  # fmt: skip
        metadata = self._refer(
            "buildable_traverser_metadata",
            _pyref(_METADATA),
            [[f"Attr(name={n!r})", self.value(v, None)] for n, v in about.items()],
            _pyref(_METADATA),
            None,
        )
        return self._refer(_snake_case(call.target.name), _pyref(_CONFIG), items, metadata, path)

    def _object(self, kind: type, items: list[Any], metadata: Any, path: str | None) -> Any:
        if kind is tuple and not items:  # Python has but one of it, so Fiddle never refers to it
            return {"type": _pyref(_BUILTIN[kind]), "items": [], "metadata": metadata} | (
                {} if path is None else {"paths": [path]}
            )
        return self._refer(kind.__name__, _pyref(_BUILTIN[kind]), items, metadata, path)

    def _refer(self, hint: str, kind: Any, items: list[Any], metadata: Any, path: str | None) -> Any:
        number = 1
        while f"{hint}_{number}" in self.objects:
            number += 1
        key = f"{hint}_{number}"
        paths = {} if path is None else {"paths": [path]}
        self.objects[key] = {"type": kind, "items": items, "metadata": metadata} | paths
        self.counts[key] += 1
        return {"type": "ref", "key": key}


def _pyref(symbol: Symbol) -> dict[str, str]:
    return {"type": "pyref", "module": symbol.module, "name": symbol.name}


def _inside(path: str | None, element: str) -> str | None:
    return None if path is None else path + element


def _snake_case(name: str) -> str:
    """`LlamaConfig` as `llama_config`."""
    return re.sub(r"(?<=[^_A-Z])(?=[A-Z])", "_", name).lower()


# -------------------------------------------------------------------------------------------------------- reading


def loads(text: bytes | str, said: str) -> Call:
    """The call that a file holds, with nothing in it imported.

    An object that is no call, list, tuple or dict is a `Call` of its class, by its items. `said` opens the messages.
    Raises Corrupt for what is no such file, Unsupported for one that is too large.
    """
    if len(text) > LIMIT_NBYTES:
        raise Unsupported(f"{said} has {len(text)} bytes, such files have some thousands")
    try:
        document = json.loads(text)
        root = _Reader(document).value(document["root"], 0)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"{said} is not a file of Fiddle's: {type(error).__name__}: {error!s:.200}") from error
    if not isinstance(root, Call):
        raise Corrupt(f"{said} holds a {type(root).__name__}, a call was expected")
    return root


class _Reader:
    """Values of a document. Objects are made once, however often they are referred to."""

    def __init__(self, document: Any) -> None:
        self._objects: Mapping[str, Any] = dict(document["objects"])
        self._made: dict[str, Value] = {}
        self._open: set[str] = set()
        self._left = _MAX_NUM_VALUES

    def value(self, item: Any, depth: int) -> Value:
        self._left -= 1
        if depth > _MAX_DEPTH or self._left < 0:
            raise ValueError("there is no end to its objects")
        if not isinstance(item, Mapping):
            if isinstance(item, list):
                raise ValueError("a list stands where a value should")
            return item
        kind = item["type"]
        if kind == "leaf":
            return _leaf(item["value"])
        if kind == "pyref":
            return _symbol(item)
        if kind == "ref":
            return self._referred(str(item["key"]), depth)
        return self._object(item, depth)

    def _referred(self, key: str, depth: int) -> Value:
        if key in self._open:
            raise ValueError(f"{key!s:.100} holds itself")
        if key not in self._made:
            self._open.add(key)
            self._made[key] = self._object(self._objects[key], depth + 1)
            self._open.remove(key)
        return self._made[key]

    def _object(self, item: Mapping[str, Any], depth: int) -> Value:
        kind = _symbol(item["type"])
        values = [(_element(name), self.value(child, depth + 1)) for name, child in item["items"]]
        if kind == _BUILTIN[list]:
            return [value for _, value in values]
        if kind == _BUILTIN[tuple]:
            return tuple(value for _, value in values)
        if kind == _BUILTIN[dict]:
            return dict(values)
        if kind.module.startswith("fiddle.") and kind != _METADATA:  # Config, Partial, ArgFactory
            about = self.value(item["metadata"], depth + 1)
            if not isinstance(about, Call) or not isinstance(about.get("fn_or_cls"), Symbol):
                raise ValueError(f"a {kind.name!s:.100} does not say what it calls")
            return Call(about.get("fn_or_cls"), dict(values))
        return Call(kind, dict(values))


def _symbol(item: Any) -> Symbol:
    module, name = item["module"], item["name"]
    if item["type"] != "pyref" or not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a class is not named by module and name")
    return Symbol(module, name)


def _leaf(value: Any) -> Value:
    if isinstance(value, dict | list):
        raise ValueError("a leaf that has parts")
    return value


_ELEMENT = re.compile(r"(?:Attr\(name|Key\(key|Index\(index)=(?P<quote>['\"]?)(?P<name>.*)(?P=quote)\)", re.DOTALL)


def _element(text: Any) -> str:
    """The name that a path element has: `Attr(name='config')` is `config`."""
    match = _ELEMENT.fullmatch(text)
    return match["name"] if match else str(text)
