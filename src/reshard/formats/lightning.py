"""`meta.pt`, which Lightning and NeMo 2 lay beside the shards of a DCP: everything of a checkpoint that is no tensor.

    {"epoch", "global_step", "loops", "callbacks", "hyper_parameters", "hparams_type", ...}

The model's configuration is `meta["cfg"]` in scripts that put it there, else what the LightningModule saved as its
hyper-parameters: NeMo's ModelPT under `hyper_parameters["cfg"]`, others as `hyper_parameters` itself. Objects stay
inert: an OmegaConf DictConfig keeps its keys in the attribute `_content`, and is written as the object that it was.

Source: lightning 2.4 `strategies/{fsdp,model_parallel}.py`, omegaconf 2.3 `dictconfig.py`, NeMo 2.4
`core/classes/modelPT.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reshard.errors import NotFound, Unsupported, listed
from reshard.formats import torch_save
from reshard.storage.unpickle import Global, Inert

FILE_NAME = "meta.pt"
_PLACES = (("cfg",), ("hyper_parameters", "cfg"), ("hyper_parameters",))
"""Where a configuration may be, first choice first."""
_NEVER_CARRIED = frozenset(
    {
        "os",
        "posix",
        "nt",
        "subprocess",
        "sys",
        "builtins",
        "__builtin__",
        "shutil",
        "socket",
        "pty",
        "runpy",
        "importlib",
        "code",
        "codeop",
        "commands",
        "pdb",
        "multiprocessing",
        "ctypes",
        "webbrowser",
        "operator",
        "functools",
    }
)
"""Modules whose functions are no configuration: calling one when the output is loaded is all they would be for."""
_HARMLESS_CALLS = frozenset(
    {
        "dict",
        "list",
        "tuple",
        "set",
        "frozenset",
        "int",
        "float",
        "complex",
        "str",
        "bytes",
        "bytearray",
        "bool",
        "object",
        "slice",
        "range",
        "partial",
        "getattr",
        "reduce_ex",
        "unicode",
        "long",
    }
)


@dataclass(frozen=True, slots=True)
class Config:
    """A configuration found in a meta.pt."""

    file: torch_save.File
    value: Any
    """Inert."""
    key: str
    """Where it was, such as `hyper_parameters.cfg`."""


def find_config(directory: Path, key: str | None) -> Config | None:
    """The configuration in a directory's meta.pt; None without a file or a configuration.

    `key` names another place, with dots. Raises NotFound when that is not there, Unsupported when the configuration
    holds a call that nobody would put into one.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        if key is not None:
            raise NotFound(f"{directory} has no {FILE_NAME} to take {key!r} from")
        return None
    file = torch_save.read(path)
    for place in [tuple(key.split("."))] if key is not None else _PLACES:
        value = _at(file.value, place)
        if value is not None:
            _refuse_calls(path, value)
            return Config(file, value, ".".join(place))
    if key is None:
        return None
    raise NotFound(f"{path} has no {key!r}", hint=f"it has the keys {listed(_keys(file.value))}")


def _at(value: Any, place: tuple[str, ...]) -> Any:
    for key in place:
        children = _children(value)
        if children is None or key not in children:
            return None
        value = children[key]
    return value


def _children(value: Any) -> Mapping[Any, Any] | None:
    """The items of a mapping, or of an inert DictConfig, namespace or dataclass."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, Inert):
        content = value.attr("_content")
        state = content if isinstance(content, dict) else value.state
        return state if isinstance(state, dict) else None
    return None


def _keys(value: Any) -> list[str]:
    return [str(key) for key in _children(value) or ()]


def _refuse_calls(path: Path, value: Any) -> None:
    bad = {f"{g.module}.{g.name}" for g in _called(value) if g.module.partition(".")[0] in _NEVER_CARRIED}
    bad = {name for name in bad if name.rpartition(".")[2] not in _HARMLESS_CALLS}
    if bad:
        raise Unsupported(
            f"{path}: the configuration calls {listed(sorted(bad))} when it is loaded, so it is not carried",
            hint="name another place with --cfg-key, or merge to .safetensors, which holds no objects",
        )


def _called(root: Any) -> Iterator[Global]:
    """Every class or function that loading a value calls."""
    stack, seen = [root], set()
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Inert):
            yield value.maker
            yield value.cls
            stack += [*value.args, *(value.kwargs or {}).values(), *(change for _, change in value.changes)]
        elif isinstance(value, Mapping):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            stack += value
