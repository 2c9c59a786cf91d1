"""What a path is: from directory listings and file names to the parts of a checkpoint and the formats that read them.

People point at a run, a checkpoint, a shard directory or a file in one. `find` goes up from a file, down through
numbered checkpoints (the newest complete one, or the step that was asked for) and through directories with one
recognised child. Nothing but names, sizes and the first bytes of single files is looked at here.

    layout                                                        part               format
    .metadata, __N.metadata, *.distcp                             model              dcp
    pytorch_model_fsdp_I/, optimizer_I/ (accelerate, Trainer)     model, optimizer   dcp or rank_files
    pytorch_ema_model_fsdp_0/ (LMMs-Engine)                       ema                rank_files
    model_world_size_W_rank_R.pt, pytorch_model_fsdp_I_rankR.bin  model              rank_files
    pytorch_model_fsdp.bin, optimizer.bin                         model, optimizer   torch_save
    shard-*-model-*-of-*.safetensors                              model              dcp_safetensors
    model.safetensors, its index, pytorch_model.bin, its index    model              huggingface
    adapter_model.safetensors                                     model              huggingface
    latest + TAG/*_states.pt, zero/*/fp32.pt                      model              deepspeed
    iter_N/, release/, metadata.json, mp_rank_*/, weights/        model, optimizer   megatron
    *.nemo, or any tar archive of such a directory                model              megatron
    KEY/.zarray                                                   model              zarr
    *.safetensors, *.pt, *.pth, *.bin, *.ckpt                     model              safetensors, torch_save
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reshard.errors import Incomplete, InputError, NotFound, Unsupported, listed
from reshard.formats.megatron_directory import TRACKER, directory_of, has_optimizer, is_rank_directory, recognise
from reshard.storage import tar
from reshard.storage.tar import ArchivePath

MODEL, OPTIMIZER, EMA, EXTRA = "model", "optimizer", "ema", "extra"
_DEPTH = 4


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a checkpoint that one format reads."""

    role: str
    """MODEL, OPTIMIZER, EMA or EXTRA."""
    format: str
    """The name of a module in this folder."""
    path: Path
    kind: str = ""
    """For formats that keep several sets in one directory: which of them."""


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint and all that belongs to it."""

    root: Path
    """The directory or file that a person would call the checkpoint."""
    parts: tuple[Part, ...]
    writer: str
    """In words, as far as the layout tells."""
    step: int | None = None
    companions: tuple[Path, ...] = ()
    """Directories where config and tokenizer may lie, nearest first."""
    notices: tuple[str, ...] = ()

    def part(self, role: str) -> Part | None:
        return next((p for p in self.parts if p.role == role), None)


_NUMBERED = re.compile(
    r"(?:(?P<name>checkpoint|step|dist_epoch|epoch|iter|global_step|ep\d+-ba)[-_]?(?P<step>\d+))(?:\.ckpt)?"
)
_LIGHTNING = re.compile(r".*step=(?P<step>\d+).*")
_HF_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_NUMBERED_SHARD = re.compile(r"(model|pytorch_model)-\d{5,9}-of-\d{5,9}\.(safetensors|bin)")
_MODEL_DIRECTORY = re.compile(r"pytorch_model_fsdp_(\d+)")
_OPTIMIZER_DIRECTORY = re.compile(r"(optimizer_\d+|optimizer|optim)")
_WHOLE = {
    "huggingface": ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"),
    "torch_save": ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"),
}
"""Files of whole models and adapters, by the format that reads them."""
_SINGLE = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".nemo")
_PASS_THROUGH = (
    "weights",
    "hf_weights",
    "hf_adapter",
    "model_and_optim",
    "actor",
    "huggingface",
    "checkpoint",
    "checkpoints",
    "model",
)


def find(path: Path, *, step: int | None = None, state_dict_dirname: str | None = None) -> Found:
    """The checkpoint at a path.

    `step` picks one of several; without it the newest complete one is taken. `state_dict_dirname` names the directory
    of the model's shards, such as `pytorch_ema_model_fsdp_0`. Raises NotFound, Incomplete, or InputError when several
    things are there and it is not clear which is meant.
    """
    path = tar.at(path)
    if not path.exists():
        raise NotFound(f"{path}: no such file or directory")
    if isinstance(path, ArchivePath):
        found = _megatron(directory_of(path), step)
        if found is not None:
            return replace(found, companions=_companions(found))
        _check_not_foreign(path)
        path = Path(path)
    if path.is_file():
        return _of_file(path)
    if is_rank_directory(path.name):
        path = path.parent
    found = _of_directory(path, step, state_dict_dirname, _DEPTH)
    if found is None:
        raise _nothing(path, step)
    if step is not None and found.step is not None and found.step != step:
        raise NotFound(f"{path} is step {found.step}, not {step}")
    if step is not None and found.step is None:
        said = f"{found.root} does not tell its step: --step {step} chose nothing"
        found = replace(found, notices=(*found.notices, said))
    return replace(found, companions=_companions(found))


_OF_OLD_TORCH = "sys_info"
"""A member of the tar archives that torch wrote before 2017."""


def _check_not_foreign(archive: ArchivePath) -> None:
    """Raise NotFound for an archive that is neither NeMo's nor torch's."""
    members = _names(archive)
    if _OF_OLD_TORCH not in members:
        raise NotFound(
            f"{archive} is an archive without weights of NeMo: it holds {listed(members) or 'nothing'}",
            hint="a .nemo has model_weights/ or model_weights.ckpt in it; unpack any other archive first",
        )


def numbered(run: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run, `checkpoint-500`, `step-20`, ..., by ascending step. Other names do not count."""
    found = []
    for name in _names(run):
        match = _NUMBERED.fullmatch(name) or (_LIGHTNING.fullmatch(name) if name.endswith(".ckpt") else None)
        if match and (run / name).is_dir():
            found.append((int(match["step"]), run / name))
    return sorted(found)


def shards_in(path: Path) -> list[str]:
    """Names in a directory that training leaves and that no whole model has: shards, numbered checkpoints."""
    from reshard.formats import dcp, deepspeed_directory, rank_files

    names = _names(path)
    found = [child.name for _, child in numbered(path)]
    found += [n for n in names if _MODEL_DIRECTORY.fullmatch(n) and (path / n).is_dir()]
    return found + [
        n
        for n in names
        if dcp.matches(frozenset([n])) or rank_files.matches(frozenset([n])) or deepspeed_directory.is_state_file(n)
    ]


# ---------------------------------------------------------------------------------------------------- one directory


def _of_file(path: Path) -> Found:
    name = path.name
    whole = _whole_of(path)
    if whole is not None:
        return find(whole)
    if name in (".tmp", ".metadata.tmp"):
        raise Incomplete(f"{path}: the save did not finish", hint="use an earlier checkpoint")
    if name.endswith(".safetensors"):
        return _single(path, "safetensors", "safetensors")
    _check_not_compressed(path)
    _check_not_sliced(path.parent, [name])
    return _single(path, "torch_save", "torch.save")


_SLICED = re.compile(r"consolidated\.\d\d\.pth")


def _check_not_sliced(path: Path, names: Sequence[str]) -> None:
    """Raise Unsupported for a model of Meta's in several files, each with a slice of every tensor."""
    slices = [name for name in _names(path) if _SLICED.fullmatch(name)]
    if len(slices) > 1 and any(map(_SLICED.fullmatch, names)):
        raise Unsupported(
            f"{path}: {listed(slices)} hold a slice of every tensor each, of which nothing there says how it was cut",
            hint="Meta's models are on the hub in safetensors too: download these",
        )


_COMPRESSED = {known.magic: known.program for known in tar.COMPRESSIONS} | {b"(\xb5/\xfd": "zstd", b'\x04"M\x18': "lz4"}
"""What files begin with, and the programs that undo it."""


def _check_not_compressed(path: Path) -> None:
    """Raise Unsupported for a file that is compressed as a whole, and no archive of tar's that could be read so."""
    with path.open("rb") as file:
        head = file.read(8)
    program = next((program for magic, program in _COMPRESSED.items() if head.startswith(magic)), None)
    if program is not None:
        raise Unsupported(
            f"{path} is compressed ({program}), and not read so",
            hint=f"{program} -dc {shlex.quote(str(path))} > {shlex.quote(path.stem)}-plain, and name that",
        )


def _whole_of(path: Path) -> Path | None:
    """The directory of what a file is a part of; None for a file that stands for itself."""
    from reshard.formats import rank_files

    name = path.name
    if name.endswith((".distcp", ".metadata")) or rank_files.matches(frozenset([name])) or _HF_SHARD.fullmatch(name):
        return path.parent
    if name == "meta.pt" and (path.parent / ".metadata").is_file():
        return path.parent
    if is_rank_directory(path.parent.name) or name in (TRACKER, ".zarray"):
        return directory_of(path)
    if name.endswith(".index.json") or name == "config.json" or _NUMBERED_SHARD.fullmatch(name):
        return path.parent
    return _deepspeed_directory(path)


def _deepspeed_directory(path: Path) -> Path | None:
    """The directory of the DeepSpeed checkpoint that a file is a part of, which is nothing without the rest."""
    from reshard.formats import deepspeed_directory

    directory = path.parent
    if deepspeed_directory.is_state_file(path.name) or path.name == "zero_to_fp32.py":
        return directory
    if path.name in ("latest", "latest_universal"):
        return directory if _latest(directory, _names(directory)) is not None else None
    zero = directory if path.name == "optimizer_state.pt" else directory.parent
    is_universal = zero.name == deepspeed_directory.UNIVERSAL and deepspeed_directory.is_universal(zero.parent)
    return zero if is_universal else None


def _single(path: Path, format: str, writer: str) -> Found:
    found = Found(path, (Part(MODEL, format, path),), writer, _step_of(path))
    return replace(found, companions=(path.parent,))


def _of_directory(path: Path, step: int | None, dirname: str | None, depth: int) -> Found | None:
    """What is in a directory itself, or below it."""
    names = _names(path)
    if dirname is not None and dirname in names:
        return _named_directory(path, dirname)
    megatron = _megatron(path, step) if dirname is None else None
    if megatron is not None:
        return megatron
    children = numbered(path)
    if dirname is None or path.name == dirname:
        found = _here(path, names)
        if found is not None and (step is None or found.step is not None or not children):
            return _beside_numbered(found, children)
    if depth == 0:
        return None
    tagged = _latest(path, names) if step is None and dirname is None else None
    if tagged is not None:
        return tagged
    if children:
        return _newest(path, children, step, dirname, depth)
    return _below(path, names, step, dirname, depth)


def _here(path: Path, names: Sequence[str]) -> Found | None:
    """What is in a directory itself."""
    ways = (_accelerate, _dcp, _rank_files, _hf_sharded, _full, _whole, _deepspeed, _zarr)
    return next((found for recognise in ways if (found := recognise(path, names)) is not None), None)


def _beside_numbered(found: Found, children: Sequence[tuple[int, Path]]) -> Found:
    """What a run holds itself, as the Trainer saves it at the end; a notice tells of its numbered checkpoints."""
    if not children or found.step is not None:
        return found
    steps = listed(str(step) for step, _ in children)
    said = (
        f"{found.root} holds a model beside its checkpoints: the model is read, as none of the steps {steps} is named"
    )
    return replace(found, notices=(*found.notices, said))


def _named_directory(path: Path, dirname: str) -> Found:
    inner = _direct(path / dirname)
    if inner is None:
        raise NotFound(f"{path / dirname} holds no shards that are recognised: {listed(_names(path / dirname))}")
    part = replace(inner.parts[0], role=MODEL)
    return Found(path, (part, *_optimizers(path)), inner.writer, _step_of(path))


def _direct(path: Path) -> Found | None:
    if not path.is_dir():
        return None
    names = _names(path)
    return next((f for f in (r(path, names) for r in (_dcp, _rank_files, _hf_sharded, _whole)) if f), None)


def _accelerate(path: Path, names: Sequence[str]) -> Found | None:
    models = sorted((int(m[1]), m[0]) for m in map(_MODEL_DIRECTORY.fullmatch, names) if m)
    models = [(i, n) for i, n in models if (path / n).is_dir()]
    if not models:
        return None
    inner = _direct(path / models[0][1])
    if inner is None:
        raise Incomplete(
            f"{path / models[0][1]} holds no shards: {listed(_names(path / models[0][1])) or 'it is empty'}",
            hint="the save did not finish; use an earlier checkpoint",
        )
    parts = [replace(inner.parts[0], role=MODEL)]
    notices = []
    if len(models) > 1:
        others = listed(n for _, n in models[1:])
        notices.append(f"{path} holds several models; {models[0][1]} is read, not {others} (--state-dict-dirname)")
    ema = _direct(path / "pytorch_ema_model_fsdp_0")
    if ema is not None:
        parts.append(replace(ema.parts[0], role=EMA))
    lmms = (path / "extra_state").is_dir() or (path / "dataloader_state").is_dir()
    trainer = "trainer_state.json" in names
    writer = "LMMs-Engine (FSDP2)" if lmms else "HF Trainer (FSDP)" if trainer else "accelerate (FSDP)"
    return Found(path, (*parts, *_optimizers(path)), writer, _step_of(path), notices=tuple(notices))


def _optimizers(path: Path) -> Iterator[Part]:
    for name in _names(path):
        if _OPTIMIZER_DIRECTORY.fullmatch(name) and (path / name).is_dir():
            inner = _direct(path / name)
            if inner is not None:
                yield replace(inner.parts[0], role=OPTIMIZER)
        elif re.fullmatch(r"optimizer(_\d+)?\.bin", name):
            yield Part(OPTIMIZER, "torch_save", path / name)


def _dcp(path: Path, names: Sequence[str]) -> Found | None:
    from reshard.formats import dcp

    if not dcp.matches(frozenset(names)) or any(_MODEL_DIRECTORY.fullmatch(n) for n in names):
        return None
    writer = "torch.distributed.checkpoint"
    if "meta.pt" in names:
        writer = "Lightning (FSDP)"
    elif re.fullmatch(r"step-\d+", path.name):
        writer = "torchtitan"
    elif path.name.startswith("dist_epoch_"):
        writer = "torchtune"
    elif _MODEL_DIRECTORY.fullmatch(path.name) or re.fullmatch(r"optimizer_\d+", path.name):
        writer = "accelerate (FSDP)"
    return Found(path, (Part(MODEL, "dcp", path),), writer, _step_of(path))


def _rank_files(path: Path, names: Sequence[str]) -> Found | None:
    from reshard.formats import rank_files

    kinds = sorted({group.kind for group in rank_files.groups(names)})
    if not kinds:
        return None
    roles = {"model": MODEL, "optimizer": OPTIMIZER}
    parts = [Part(roles.get(kind, EXTRA), "rank_files", path, kind) for kind in kinds]
    parts.sort(key=lambda p: (p.role != MODEL, p.role != OPTIMIZER))
    if len(parts) == 1:
        parts = [replace(parts[0], role=MODEL)]
    accelerate = any(n.startswith("pytorch_model_fsdp") for n in names)
    writer = "accelerate (FSDP)" if accelerate else "FSDP, one file a rank (verl's layout)"
    optimizers = () if any(p.role == OPTIMIZER for p in parts) else tuple(_optimizers(path))
    return Found(path, (*parts, *optimizers), writer, _step_of(path))


def _hf_sharded(path: Path, names: Sequence[str]) -> Found | None:
    if not any(_HF_SHARD.fullmatch(n) for n in names):
        return None
    return Found(path, (Part(MODEL, "dcp_safetensors", path),), "torch HuggingFaceStorageWriter", _step_of(path))


def _full(path: Path, names: Sequence[str]) -> Found | None:
    full = [n for n in names if re.fullmatch(r"pytorch_model_fsdp(_\d+)?\.bin", n)]
    if not full or "model.safetensors" in names:
        return None
    parts = (Part(MODEL, "torch_save", path / full[0]), *_optimizers(path))
    return Found(path, parts, "FSDP, full state dict", _step_of(path))


def _whole(path: Path, names: Sequence[str]) -> Found | None:
    from reshard.formats import huggingface

    format = next((format for format, files in _WHOLE.items() if not set(files).isdisjoint(names)), None)
    if format is None and any(map(huggingface.SHARD.fullmatch, names)):
        format = "huggingface"
    if format is None:
        return None
    tag = _latest(path, names)
    notices = () if tag is None else (f"{tag.parts[0].path} holds its fp32 weights too; name it to merge those",)
    return Found(path, (Part(MODEL, format, path),), "HuggingFace", _step_of(path), notices=notices)


def _deepspeed(path: Path, names: Sequence[str]) -> Found | None:
    """A tag's directory, or a universal checkpoint's, or the `zero` directory in one."""
    from reshard.formats import deepspeed_directory

    if path.name == deepspeed_directory.UNIVERSAL and deepspeed_directory.is_universal(path.parent):
        path = path.parent
    elif not deepspeed_directory.matches(path, names):
        return None
    writer = "DeepSpeed (universal)" if deepspeed_directory.is_universal(path) else "DeepSpeed"
    tag = re.fullmatch(r"global_step(\d+)(?:_universal)?", path.name)
    return Found(path, (Part(MODEL, "deepspeed", path),), writer, int(tag[1]) if tag else _step_of(path))


def _megatron(path: Path, step: int | None) -> Found | None:
    """A run of Megatron's, or a checkpoint in one."""
    located = recognise(path, step)
    if located is None:
        return None
    parts = [Part(MODEL, "megatron", located.weights)]
    if has_optimizer(located):
        parts.append(Part(OPTIMIZER, "megatron", located.weights, "optimizer"))
    number = located.iteration if isinstance(located.iteration, int) else None
    return Found(located.checkpoint, tuple(parts), located.writer, number, located.companions, located.notices)


def _zarr(path: Path, names: Sequence[str]) -> Found | None:
    from reshard.formats import zarr

    is_array = zarr.HEADER in names or any((path / name / zarr.HEADER).is_file() for name in names)
    return Found(path, (Part(MODEL, "zarr", path),), "zarr", _step_of(path)) if is_array else None


def _latest(path: Path, names: Sequence[str]) -> Found | None:
    """The tag of DeepSpeed that a run's `latest` names, or its conversion that `latest_universal` does."""
    for pointer in ("latest", "latest_universal"):
        if pointer not in names or not (path / pointer).is_file() or (path / pointer).stat().st_size > 4096:
            continue
        tag = (path / pointer).read_text(errors="replace").strip()
        if tag in names and (path / tag).is_dir():
            found = _deepspeed(path / tag, _names(path / tag))
            if found is not None:
                return replace(found, root=path, step=_step_of(path) if found.step is None else found.step)
    return None


# -------------------------------------------------------------------------------------------- several directories


def _newest(
    path: Path, children: list[tuple[int, Path]], step: int | None, dirname: str | None, depth: int
) -> Found | None:
    """The checkpoint of the step asked for, or the newest that is complete."""
    if step is not None:
        wanted = [child for number, child in children if number == step]
        if not wanted:
            steps = listed(str(number) for number, _ in children)
            raise NotFound(f"{path} has no checkpoint of step {step}", hint=f"it has the steps {steps}")
        found = _of_directory(wanted[0], None, dirname, depth - 1)
        if found is None:
            raise _nothing(wanted[0], None)
        return replace(found, step=step if found.step is None else found.step)
    skipped: list[str] = []
    for number, child in reversed(children):
        try:
            found = _of_directory(child, None, dirname, depth - 1)
            if found is None:
                skipped.append(f"{child.name} (nothing that is recognised in it)")
                continue
            _check_complete(found)
        except InputError as error:
            skipped.append(f"{child.name} ({error})")
            continue
        notices = tuple(f"passed over: {what}" for what in skipped)
        return replace(found, step=number if found.step is None else found.step, notices=found.notices + notices)
    raise Incomplete(f"{path}: none of {len(children)} checkpoints is complete: {listed(skipped)}")


def _check_complete(found: Found) -> None:
    """Raise when the model's shards are not all there. Opens headers."""
    from reshard.formats import open_part

    for part in found.parts:
        if part.role == MODEL:
            open_part(part)


def _below(path: Path, names: Sequence[str], step: int | None, dirname: str | None, depth: int) -> Found | None:
    """What is in the one child that is recognised; known names of containers first."""
    directories = [n for n in names if (path / n).is_dir() and not n.startswith(".")]
    known = [n for n in _PASS_THROUGH if n in directories]
    for name in known:
        found = _of_directory(path / name, step, dirname, depth - 1)
        if found is not None:
            extra = () if found.part(OPTIMIZER) else tuple(_optimizers(path))
            return replace(found, root=path, parts=found.parts + extra, step=found.step or _step_of(path))
    candidates = []
    for name in directories:
        if name in known:
            continue
        found = _of_directory(path / name, step, dirname, depth - 1)
        if found is not None:
            candidates.append(found)
    if len(candidates) > 1:
        raise InputError(
            f"{path} holds several checkpoints: {listed(str(c.root.relative_to(path)) for c in candidates)}",
            hint="name the one you mean",
        )
    if candidates:
        return candidates[0]
    shards = {n: shard for n in names if (shard := _NUMBERED_SHARD.fullmatch(n))}
    if shards and depth == _DEPTH:
        name, kind = next(iter(shards.values())).groups()
        raise Incomplete(
            f"{path}: {name}.{kind}.index.json is missing, which says what is in {listed(shards)}",
            hint="copy it beside them, from where they come",
        )
    singles = [n for n in names if n.endswith(_SINGLE) and (path / n).is_file()]
    if len(singles) == 1 and depth == _DEPTH:
        if _whole_of(path / singles[0]) is not None:
            raise Incomplete(f"{path / singles[0]} is one file of several, and the others are not there")
        return find(path / singles[0])
    if len(singles) > 1 and depth == _DEPTH:
        _check_not_sliced(path, singles)
        raise InputError(f"{path} holds several files: {listed(singles)}", hint="name the one you mean")
    return None


def _nothing(path: Path, step: int | None) -> NotFound:
    names = _names(path)
    if ".metadata.tmp" in names:
        return Incomplete(f"{path}: .metadata.tmp is there and .metadata is not: the save did not finish")  # type: ignore[return-value]
    what = f"it holds {listed(names)}" if names else "it is empty"
    return NotFound(
        f"{path}: no checkpoint that is recognised; {what}",
        hint="name the directory that holds the shards (with .metadata, *_rank_*.pt or *.safetensors in it)",
    )


def _companions(found: Found) -> tuple[Path, ...]:
    """Where config and tokenizer may lie, nearest first."""
    places = list(found.companions)
    places += [p.path if p.path.is_dir() else p.path.parent for p in found.parts if p.role == MODEL]
    root = found.root if found.root.is_dir() else found.root.parent
    places += [root, root / "huggingface", root.parent]
    places += [place / "lora_adapter" for place in places]  # verl's: adapter_config.json
    if places and places[0] != root:
        places.insert(1, places[0] / "huggingface")
        places.insert(2, places[0].parent)
    return tuple(dict.fromkeys(p for p in places if p.is_dir()))


def _step_of(path: Path) -> int | None:
    for part in (path.name, path.parent.name):
        match = _NUMBERED.fullmatch(part) or _LIGHTNING.fullmatch(part)
        if match:
            return int(match["step"])
    return None


def _names(path: Path) -> list[str]:
    try:
        return tar.names(path)
    except PermissionError as error:
        raise InputError(f"{path} cannot be listed: {error.strerror}") from error
