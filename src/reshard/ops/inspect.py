"""inspect: what a path is, whether it is whole, and what to type next. Reads headers only."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reshard.core.checkpoint import Checkpoint
from reshard.errors import Incomplete, InputError, ReshardError, Unsupported, command
from reshard.formats import open_found
from reshard.formats.detect import MODEL, Found, find, numbered
from reshard.storage import tar
from reshard.storage.files import Files
from reshard.storage.torch_zip import open_archive
from reshard.storage.unpickle import Global, globals_in, is_known

if TYPE_CHECKING:
    from reshard.formats.megatron import MegatronCheckpoint
    from reshard.ops.inspect_megatron import Judged

_SETTINGS = ("run_config.yaml", "model_config.yaml")
"""Of Megatron-Bridge and NeMo 1, in the directory of a checkpoint."""
_PICKLE_LIMIT_NBYTES = 1 << 30
_NO_PICKLES = (".safetensors", ".json", ".jinja", ".txt", ".distcp")
"""Suffixes of files that are none; the objects in a `.distcp` are found through its metadata."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a checkpoint is, as far as headers tell."""

    path: Path
    format: str
    writer: str
    step: int | None
    world_size: int | None
    placements: tuple[str, ...]
    num_tensors: int
    num_parameters: int
    """Elements of the model's tensors."""
    nbytes: int
    dtypes: dict[str, int]
    """Number of tensors of each dtype."""
    parts: tuple[str, ...]
    """What is there besides the model: optimizer, ema, ..."""
    num_objects: int
    other_steps: tuple[int, ...]
    """Other checkpoints of the same run."""
    complete: bool | None
    """As far as headers tell. None for a Megatron model that could be held against no family."""
    problem: str
    """Why it is not complete, or why that is not known."""
    notices: tuple[str, ...]
    next_command: str
    """Empty where none would make something of it."""
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    """(FQN, dtype, shape), when they were asked for."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What only some formats tell, by what it is about: the mesh of the run that wrote a Megatron model, ..."""
    hint: str = ""
    """What to do about the problem."""


@dataclass(frozen=True, slots=True)
class Audit:
    """A class or function that a pickle names, and the files that name it."""

    name: str
    known: bool
    """Whether it belongs to what torch, numpy or Python write for plain state; anything else deserves a look."""
    files: tuple[str, ...]


def inspect(source: str | Path, *, step: int | None = None, tensors: bool = False, **choices: Any) -> Inspection:
    """What is at a path, or in the run of an axolotl config. Incomplete checkpoints are described.

    Raises NotFound when nothing there is recognised.
    """
    path = Path(source)
    settings = None
    if path.name in _SETTINGS and path.is_file():
        path = path.parent
    elif path.suffix in (".yml", ".yaml"):
        from reshard.ops import axolotl

        settings, path = path, axolotl.read(path).output_dir
    try:
        found = find(path, step=step, **choices)
        opened, judged, facts = _opened(found)
    except Incomplete as error:
        return Inspection(
            path, "", "", None, None, (), 0, 0, 0, {}, (), 0, (), False, str(error), (), "", hint=error.hint or ""
        )  # fmt: skip
    described = _described(path, found, opened, judged, tensors)
    problem = _against_config(found, opened) if judged is None else None
    if problem is not None:
        described = replace(described, complete=False, problem=str(problem), hint=problem.hint or "")
        return replace(described, facts=facts)
    words = ("merge", settings, "OUT") if settings else _next(path, found, opened, judged, step=step, **choices)
    return replace(described, facts=facts, next_command=command(*words) if words else "")


def _opened(found: Found) -> tuple[Checkpoint, Judged | None, Mapping[str, str]]:
    """The checkpoint, what is known of the model in one of Megatron's, and what its format tells besides."""
    model = found.part(MODEL)
    if model is None or model.format != "megatron":
        return open_found(found), None, {}
    from reshard.formats import megatron
    from reshard.ops.inspect_megatron import judge

    opened = megatron.open_located(megatron.locate(model.path))
    judged = judge(opened)
    said = (*found.notices, *opened.checkpoint.notices, *opened.settings.notices, *judged.notices)
    return replace(opened.checkpoint, notices=tuple(dict.fromkeys(said))), judged, _facts(opened, judged)


def _facts(opened: MegatronCheckpoint, judged: Judged) -> dict[str, str]:
    settings = opened.settings
    layers = {None: "", True: "one tensor of each kind for all", False: "numbered"}[opened.stacked]
    rows = {
        "family": judged.family,
        "mesh": str(settings.layout or ""),
        "layers": layers,
        "settings": settings.source or "none in the checkpoint",
        "made from": judged.made_from or "",
        "optimizer": "" if opened.optimizer == "none" else opened.optimizer,
        "left out": ", ".join(f"{kind} ({count})" for kind, count in opened.left_out.items()),
        "core": opened.core,
    }
    return {name: value for name, value in rows.items() if value}


def _against_config(found: Found, opened: Checkpoint) -> InputError | None:
    """Why a model is not the whole one that the config beside it describes, as far as its names are the hub's."""
    from reshard.formats import huggingface
    from reshard.ops import names
    from reshard.ops.config import check_complete

    place = next((place for place in found.companions if (place / huggingface.CONFIG).is_file()), None)
    try:
        config = opened.config
        if config is None and place is not None:
            config = huggingface.companions(place)[0]
        if config is not None:
            check_complete(config, names.unwrapped(names.model_only(opened)))
    except Unsupported:
        return None
    except InputError as error:
        return error
    return None


def _described(path: Path, found: Found, opened: Checkpoint, judged: Judged | None, tensors: bool) -> Inspection:
    origin = opened.origin
    dtypes = Counter(t.dtype.torch for t in opened.tensors.values())
    others = tuple(n for n, p in numbered(path) if n != found.step) if path.is_dir() else ()
    complete, problem, hint = (True, "", "") if judged is None else (judged.complete, judged.problem, judged.hint)
    return Inspection(
        found.root, origin.format, origin.writer or found.writer, found.step, origin.world_size, origin.placements,
        len(opened), opened.num_parameters, opened.nbytes, dict(dtypes.most_common()),
        tuple(dict.fromkeys(p.role for p in found.parts if p.role != MODEL)), len(opened.objects), others,
        complete, problem, opened.notices, "",
        tuple((fqn, t.dtype.torch, t.shape) for fqn, t in opened.tensors.items()) if tensors else (), hint=hint,
    )  # fmt: skip


def _next(
    path: Path, found: Found, opened: Checkpoint, judged: Judged | None,
    *, step: int | None = None, state_dict_dirname: str | None = None,
) -> tuple[str | Path, ...]:  # fmt: skip
    """The words of the command that makes something of it; none where none would."""
    if (found.root / "reshard.json").is_file():
        return "verify", found.root
    if judged is not None:
        return _conversion(path, found, judged, step)
    chosen: tuple[str, ...] = () if step is None else ("--step", str(step))
    chosen += () if state_dict_dirname is None else ("--state-dict-dirname", state_dict_dirname)
    if (found.root / "meta.pt").is_file():
        return "merge", path, "OUT.ckpt", *chosen
    if found.root.is_file():
        return "merge", path, "OUT.safetensors", *chosen
    chosen += ("--exclude", "*lora_*") if _has_adapter_in_it(opened) else ()
    has_config = any((place / "config.json").is_file() for place in found.companions)
    return "merge", path, "OUT", *chosen, *(() if has_config else ("--base", "MODEL"))


def _has_adapter_in_it(opened: Checkpoint) -> bool:
    """Whether it is a model and an adapter in one, of which merge writes the one or the other."""
    from reshard.formats import huggingface
    from reshard.ops import names

    try:
        return bool(huggingface.trained_with(names.unwrapped(names.model_only(opened))))
    except InputError:
        return False


def _conversion(path: Path, found: Found, judged: Judged, step: int | None) -> tuple[str | Path, ...]:
    if judged.complete is False or not (judged.complete or judged.needs_model):
        return ()
    chosen: tuple[str, ...] = ()
    if not _is_located(path, found, None):
        is_of_run = step is not None and _is_located(path, found, step)
        path, chosen = (path, ("--iteration", str(step))) if is_of_run else (found.root, ())
    model = ("--hf-model", judged.made_from or "MODEL") if judged.needs_model else ()
    return "convert", path, "OUT", "--to", "nemo2" if found.writer == "NeMo 1" else "hf", *chosen, *model


def _is_located(path: Path, found: Found, step: int | None) -> bool:
    """Whether convert, which looks less far than inspect, finds the same at a path."""
    from reshard.formats.megatron import locate

    try:
        return locate(path, step).weights == next(part.path for part in found.parts if part.role == MODEL)
    except InputError:
        return False


def audit(source: str | Path) -> list[Audit]:
    """Everything that the pickles under a path want to import, found without importing it."""
    wanted: dict[Global, list[str]] = {}
    for name, payload in _pickles(Path(source)):
        for found in globals_in(payload):
            wanted.setdefault(found, []).append(name)
    rows = [Audit(f"{g.module}.{g.name}", is_known(g), tuple(dict.fromkeys(names))) for g, names in wanted.items()]
    return sorted(rows, key=lambda row: (row.known, row.name))


def _pickles(root: Path) -> Iterator[tuple[str, bytes]]:
    """(file, pickle) of every pickle in a file or under a directory."""
    files = Files()
    root = tar.at(root)
    if isinstance(root, tar.ArchivePath):
        paths: list[Path] = sorted(path for path in root.rglob("*") if path.is_file())
    else:
        paths = [root] if root.is_file() else sorted(Path(d) / f for d, _, names in os.walk(root) for f in names)
    for path in paths:
        if not path.is_file() or path.is_symlink() or path.suffix in _NO_PICKLES:
            continue
        nbytes = files.nbytes(str(path))
        head = files.pread(str(path), 0, min(nbytes, 4))
        try:
            if head == b"PK\3\4":
                name = str(path)
                yield name, open_archive(lambda o, n, p=name: files.pread(p, o, n), nbytes, name).payload  # type: ignore[misc]
            elif head[:1] == b"\x80" and nbytes <= _PICKLE_LIMIT_NBYTES:
                yield str(path), files.pread(str(path), 0, nbytes)
        except ReshardError:
            continue
    yield from _objects_of_dcp(root)


def _objects_of_dcp(root: Path) -> Iterator[tuple[str, bytes]]:
    """The pickles of the objects in a DCP's entries."""
    from reshard.formats import dcp

    directories = {p.parent for p in ([root] if root.is_file() else root.rglob("*.distcp"))}
    for directory in sorted(directories):
        try:
            yield from dcp.object_pickles(directory)
        except InputError:
            continue
