"""A NeMo 1.0 YAML, read as data: every leaf with its line, interpolations resolved where the document alone can.

Hostile until proven otherwise. The events of the parser are counted before anything is built, tags are refused,
aliases are paid for as often as they are used; text, numbers, truth values, nulls, lists and mappings come out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from reshard.errors import Corrupt, InputError, NotFound
from reshard.storage import tar

_LIMIT_NBYTES = 1 << 20
_MAX_NUM_NODES = 50_000
_MAX_DEPTH = 32
_MAX_TEXT_NCHARS = 1 << 16
_MAX_NUM_REFERENCES = 16
_MAX_INTEGER = 1 << 62
_CORE = "tag:yaml.org,2002:"
_SECTIONS = ("trainer", "exp_manager", "model")
_STAGES = ("training", "fine_tuning", "peft")
"""What NVIDIA's launcher composes a YAML under, and what the YAML calls itself by for that."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A leaf of the document: a key whose value is no mapping, or an empty one."""

    path: tuple[str, ...]
    """The keys along the way, the first being `model`, `trainer`, `exp_manager` or another of the document's own."""
    written: Any
    """The value as the YAML has it."""
    value: Any
    """The value with its interpolations resolved, as far as they are."""
    line: int
    """Where the key stands, counted from 1."""
    unresolved: bool = False
    """Whether an interpolation is left in the value."""

    @property
    def key(self) -> str:
        """The dotted name; a part that is empty, or has a dot or quotes, stands in quotes."""
        return dotted(self.path)


@dataclass(frozen=True, slots=True)
class Document:
    """All settings of a YAML, in its order."""

    name: str
    """What to call it in messages."""
    settings: tuple[Setting, ...]
    """Its leaves."""
    is_model_config: bool = False
    """Whether the YAML is only what other YAMLs have under `model:`, as the `model_config.yaml` of a `.nemo` is."""
    by_key: Mapping[str, Any] = field(init=False)
    """The settings' values, by dotted name."""
    sections: frozenset[str] = field(init=False)
    """The dotted names of all mappings that have settings in them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_key", {s.key: s.value for s in self.settings})
        above = {dotted(s.path[:n]) for s in self.settings for n in range(1, len(s.path))}
        object.__setattr__(self, "sections", frozenset(above))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a setting, or `default`."""
        return self.by_key.get(key, default)

    def has(self, key: str) -> bool:
        """Whether there is a setting, or a section, of that name."""
        return key in self.by_key or key in self.sections


def dotted(path: tuple[str, ...]) -> str:
    """The name of a path: `model.optim.lr`. No two paths have the same."""
    return ".".join(part if part and not set('."') & set(part) else f'"{part}"' for part in path)


def read(path: Path) -> Document:
    """The settings of a YAML, or of the model_config.yaml in a `.nemo` archive or a folder.

    Raises NotFound, or InputError with the line of what is wrong.
    """
    path = _inside(path)
    if not path.is_file():
        said = "is a directory" if path.is_dir() else "no such file"
        raise NotFound(f"{path}: {said}", hint="give the YAML of a NeMo 1.0 run, or a .nemo archive")
    if path.stat().st_size > _LIMIT_NBYTES:
        raise InputError(
            f"{path} has {path.stat().st_size} bytes, a configuration has at most {_LIMIT_NBYTES}",
            hint="give the YAML of the run; of a .nemo archive, give the model_config.yaml inside it",
        )
    return parse(path.read_bytes(), str(path))


def _inside(path: Path) -> Path:
    """The model_config.yaml of an archive or a folder, where the path is one and has it."""
    folder = tar.at(path)
    if not folder.is_dir():
        return path
    inner = tar.names(folder)
    if len(inner) == 1 and (folder / inner[0]).is_dir():
        folder = folder / inner[0]
    return folder / "model_config.yaml" if (folder / "model_config.yaml").is_file() else path


def parse(text: bytes | str, name: str = "the configuration") -> Document:
    """The settings of a YAML text. Raises Corrupt or InputError with the line of what is wrong."""
    root = _composed(text, name)
    leaves = list(_Leaves(name).of(root))
    tree = _Tree(leaves)
    settings = tuple(tree.setting(path) for path in tree.raw)
    if _is_model_config(settings):
        return Document(
            name, tuple(Setting(("model", *s.path), s.written, s.value, s.line, s.unresolved) for s in settings), True
        )
    return Document(name, settings)


def _is_model_config(settings: tuple[Setting, ...]) -> bool:
    """Whether the top has what `model:` has, and none of the sections of a run."""
    top = {s.path[0] for s in settings}
    telling = {"num_layers", "hidden_size", "tensor_model_parallel_size", "mcore_gpt", "encoder_seq_length"}
    return not top & set(_SECTIONS) and (bool(top & telling) or any(part.startswith("dist_ckpt_") for part in top))


# ---------------------------------------------------------------------------------------------------------------- YAML


def _loader() -> Any:
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Resolver(yaml.resolver.Resolver):
    """Which plain words are numbers: PyYAML's rules, and `1e-5`, which OmegaConf takes for one too."""


_Resolver.add_implicit_resolver(
    f"{_CORE}float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+\Z"), list("-+0123456789")
)

_PLAIN = _Resolver()


def _plain_tag(text: str) -> str:
    """What a word without quotes is."""
    return str(_PLAIN.resolve(yaml.ScalarNode, text, (True, False)))  # type: ignore[no-untyped-call]


def _composed(text: bytes | str, name: str) -> yaml.MappingNode:
    """The nodes of the one document, after its events were counted."""
    try:
        _count_events(text, name)
        root = yaml.compose(text, Loader=_loader())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(f"{name} is not YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise InputError(
            f"{name} holds no settings: a mapping with trainer, exp_manager and model is expected",
            hint="give the YAML of a NeMo 1.0 run, or the model_config.yaml of a .nemo archive",
        )
    return root


def _count_events(text: bytes | str, name: str) -> None:
    """Refuse a document whose size or depth no configuration has; nothing is built meanwhile."""
    depth = 0
    for num_events, event in enumerate(yaml.parse(text, Loader=_loader())):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise InputError(f"{name}, {_where(event)}: nested deeper than {_MAX_DEPTH} levels")
        if num_events > 2 * _MAX_NUM_NODES:
            raise InputError(f"{name}, {_where(event)}: more than {_MAX_NUM_NODES} values, which no configuration has")


def _where(event: Any) -> str:
    return f"line {event.start_mark.line + 1}"


@dataclass(slots=True)
class _Leaves:
    """The walk over the nodes; aliases count as often as they are used."""

    name: str
    num_nodes: int = 0

    def of(
        self, node: yaml.MappingNode, above: tuple[str, ...] = (), depth: int = 1
    ) -> Iterator[tuple[tuple[str, ...], Any, int]]:
        """(path, value, line) of every leaf."""
        self._visit(node, depth)
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self._key(key_node, line)
            if key in seen:
                raise InputError(
                    f"{self.name}, line {line}: {dotted((*above, key))} is set twice, first in line {seen[key]}",
                    hint="keep the one that is meant: which of them a loader takes depends on the loader",
                )
            seen[key] = line
            if isinstance(value_node, yaml.MappingNode) and value_node.value:
                yield from self.of(value_node, (*above, key), depth + 1)
            else:
                yield (*above, key), self._value(value_node, depth + 1), line

    def _visit(self, node: yaml.Node, depth: int) -> None:
        self.num_nodes += 1
        if self.num_nodes > _MAX_NUM_NODES:
            raise InputError(
                f"{self.name}, {_where(node)}: aliases make more than {_MAX_NUM_NODES} values of it",
                hint="write the values out instead of repeating aliases of aliases",
            )
        if depth > _MAX_DEPTH:
            raise InputError(f"{self.name}, {_where(node)}: an alias nests it deeper than {_MAX_DEPTH} levels")
        own = (yaml.MappingNode, "map") if isinstance(node, yaml.MappingNode) else (yaml.SequenceNode, "seq")
        if isinstance(node, own[0]) and node.tag != f"{_CORE}{own[1]}":
            raise self._tagged(node)

    def _key(self, node: yaml.Node, line: int) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise InputError(f"{self.name}, line {line}: a list or a mapping cannot be the name of a setting")
        if node.tag == f"{_CORE}merge":
            raise InputError(
                f"{self.name}, line {line}: the merge key << is not read", hint="write the merged settings out"
            )
        self._scalar(node)
        return str(node.value)

    def _value(self, node: yaml.Node, depth: int) -> Any:
        self._visit(node, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(child, depth + 1) for child in node.value]
        if isinstance(node, yaml.MappingNode):
            return {self._key(k, k.start_mark.line + 1): self._value(v, depth + 1) for k, v in node.value}
        return self._scalar(node)

    def _scalar(self, node: yaml.Node) -> Any:
        text = str(node.value)
        if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"{self.name}, {_where(node)}: {text[:40]!r} is no text: it has half a character")
        tag = node.tag
        if tag == f"{_CORE}str" and getattr(node, "style", None) in (None, ""):
            tag = _plain_tag(text)
        try:
            match tag.removeprefix(_CORE):
                case "null":
                    return None
                case "bool":
                    return yaml.SafeLoader.bool_values[text.lower()]
                case "int":
                    return _integer(tag, text)
                case "float":
                    return yaml.constructor.SafeConstructor().construct_yaml_float(yaml.ScalarNode(tag, text))
                case "str" | "timestamp" | "value":
                    return text
        except (ValueError, KeyError) as error:
            raise InputError(f"{self.name}, {_where(node)}: {text[:40]!r} is no {tag.removeprefix(_CORE)}") from error
        raise self._tagged(node)

    def _tagged(self, node: yaml.Node) -> InputError:
        return InputError(
            f"{self.name}, {_where(node)}: the tag {str(node.tag)[:80]!r} is refused: it stands for an object",
            hint="settings are data: write the plain value in its place",
        )


def _integer(tag: str, text: str) -> int:
    """A whole number. Raises ValueError where no setting can mean it."""
    value = int(yaml.constructor.SafeConstructor().construct_yaml_int(yaml.ScalarNode(tag, text)))
    if abs(value) >= _MAX_INTEGER:
        raise ValueError(f"{text[:40]} has more than 62 bits")
    return value


# ------------------------------------------------------------------------------------------------------ interpolations


class _Unresolved(Exception):
    """An interpolation that the document alone does not answer."""


@dataclass(slots=True)
class _Tree:
    """The leaves, and what their interpolations come to."""

    leaves: list[tuple[tuple[str, ...], Any, int]]
    raw: dict[tuple[str, ...], tuple[Any, int]] = field(init=False)
    sections: frozenset[str] = field(init=False)
    done: dict[tuple[str, ...], Any] = field(init=False, default_factory=dict)
    busy: list[tuple[str, ...]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.raw = {path: (value, line) for path, value, line in self.leaves}
        self.sections = frozenset(path[0] for path in self.raw if path)

    def setting(self, path: tuple[str, ...]) -> Setting:
        """The leaf at a path."""
        written, line = self.raw[path]
        try:
            return Setting(path, written, self._resolved(path), line)
        except _Unresolved:
            return Setting(path, written, written, line, unresolved=True)

    def _resolved(self, path: tuple[str, ...]) -> Any:
        if path not in self.done:
            if path in self.busy or len(self.busy) > _MAX_DEPTH:
                raise _Unresolved
            self.busy.append(path)
            try:
                self.done[path] = self._value(self.raw[path][0], path)
            finally:
                self.busy.pop()
        return self.done[path]

    def _value(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, list):
            return [self._element(item, path) for item in value]
        return self._text(value, path) if isinstance(value, str) and "${" in value else value

    def _element(self, value: Any, path: tuple[str, ...]) -> Any:
        """Of a list. What it refers to is a scalar, or lists of lists could grow without bounds."""
        if isinstance(value, list | dict):
            if "${" in repr(value):
                raise _Unresolved
            return value
        found = self._value(value, path)
        if isinstance(found, list) or (isinstance(value, str) and "${." in value):
            raise _Unresolved
        return found

    def _text(self, text: str, path: tuple[str, ...]) -> Any:
        if "\\" in text or len(text) > _MAX_TEXT_NCHARS or text.count("${") > _MAX_NUM_REFERENCES:
            raise _Unresolved
        parts: list[Any] = []
        at = 0
        while (start := text.find("${", at)) >= 0:
            end = _closing(text, start + 2)
            parts += [text[at:start]] * (start > at) + [self._reference(text[start + 2 : end], path)]
            at = end + 1
        parts += [text[at:]] * (at < len(text))
        if len(parts) == 1:
            return parts[0]
        if any(isinstance(part, list | dict) for part in parts):
            raise _Unresolved
        joined = "".join(map(str, parts))
        if len(joined) > _MAX_TEXT_NCHARS:
            raise _Unresolved
        return joined

    def _reference(self, body: str, path: tuple[str, ...]) -> Any:
        """What stands in `${...}`: `model.x`, `.x`, or one of the resolvers that NeMo 1's scripts register."""
        called = re.match(r"\s*(\w+)\s*:", body)
        if called:
            return self._called(called[1], body[called.end() :], path)
        if "${" in body:
            body = str(self._text(body, path))
        name = body.strip()
        up = len(name) - len(name.lstrip("."))
        if up > len(path) or not re.fullmatch(r"[\w.\-@/]+", name[up:]):
            raise _Unresolved
        target = (path[: len(path) - up] if up else ()) + tuple(name[up:].split("."))
        if target not in self.raw and not up and target[0] in _STAGES and target[0] not in self.sections:
            target = target[1:]
        if target not in self.raw:
            raise _Unresolved
        return self._resolved(target)

    def _called(self, name: str, arguments: str, path: tuple[str, ...]) -> Any:
        values = [self._argument(word, path) for word in _split(arguments)]
        if len(values) == 2 and all(type(v) is int and abs(v) < _MAX_INTEGER for v in values):
            left, right = values
            if name == "multiply":
                return left * right
            if name == "sum":
                return left + right
            if name == "int_div" and right:
                return left // right
        raise _Unresolved

    def _argument(self, word: str, path: tuple[str, ...]) -> Any:
        value = self._text(word.strip(), path) if "${" in word else word.strip()
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d{1,18}", value):
            return int(value)
        return value


def _closing(text: str, at: int) -> int:
    """Where the brace that was opened just before `at` closes."""
    depth = 1
    while at < len(text):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return at
        at += 1
    raise _Unresolved


def _split(arguments: str) -> list[str]:
    """At the commas that stand in no braces."""
    words, depth, start = [], 0, 0
    for at, character in enumerate(arguments):
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            words.append(arguments[start:at])
            start = at + 1
    return [*words, arguments[start:]]
