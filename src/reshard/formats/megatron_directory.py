"""Which directory holds a Megatron model's weights, and what lies around it. Listings and small files only.

    RUN/latest_checkpointed_iteration.txt     `500` or `release`
    RUN/iter_0000500/, RUN/release/           the weights of Megatron-LM, Megatron-Bridge, slime and ms-swift
    RUN/global_step_500/actor/dist_ckpt/      verl's, with huggingface/ beside it
    CKPT/weights/, CKPT/context/              NeMo 2's
    x.nemo, DIR/model_weights/, model_config.yaml   NeMo 1's archive, or extracted; see `nemo1.py`
    EXP/checkpoints/NAME/, EXP/hparams.yaml   NeMo 1's run

    in the weights' directory                 format
    metadata.json {"sharded_backend": ...}    torch_dist or zarr
    .metadata alone, keys from `model.` on    fsdp_dtensor
    mp_rank_*/model_optim_rng.pt              megatron_legacy
    model_weights.ckpt, tp_rank_*/*.ckpt      megatron_legacy

Source: Megatron-LM `megatron/training/checkpointing.py`, Megatron-Bridge `training/utils/checkpoint_utils.py`, NeMo
`lightning/io/pl.py`, verl `utils/checkpoint/megatron_checkpoint_manager.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from reshard.errors import Corrupt, Incomplete, InputError, NotFound, Unsupported, listed
from reshard.storage import tar
from reshard.storage.tar import ArchivePath

TORCH_DIST, FSDP_DTENSOR, ZARR, LEGACY = "torch_dist", "fsdp_dtensor", "zarr", "megatron_legacy"
Iteration = int | Literal["release"] | None

TRACKER = "latest_checkpointed_iteration.txt"
RANK_FILES = ("model_optim_rng.pt", "model.pt", "model_weights.ckpt")
"""What a rank's directory of the legacy format may hold: Megatron-LM's, verl's, NeMo 1's."""

_ITERATION = re.compile(r"(?:iter_|global_step_)(\d{1,12})")
_RANK = re.compile(r"(?:mp_rank_\d{2,6}(?:_\d{3,6}){0,2}|tp_rank_\d{2,6}_pp_rank_\d{3,6})")
_INNER = ("weights", "model_weights", "dist_ckpt", "actor", "model")
"""Directories of a checkpoint in which its weights may lie, whoever wrote it."""
_SMALL_NBYTES = 1 << 20
_METADATA_HEAD_NBYTES = 64 << 20
_BYTE_KEYS = (b"._extra_state/shard_", b"common_state/shard_")
"""Of entries that torch_dist alone has."""
_EMBEDDING_KEY = b"embedding.word_embeddings.weight"
_EMBEDDING = re.compile(rb"model\d*\.(?:module\.)*(?:language_model\.)?embedding\.word_embeddings\.weight")
_OPTIMIZER = re.compile(rb"optimizer\.(?:state|distributed|param)")


@dataclass(frozen=True, slots=True)
class Located:
    """A Megatron checkpoint, found and not yet opened."""

    root: Path
    """The run's directory; the checkpoint's own where there is no run around it."""
    weights: Path
    """The directory with the shards."""
    iteration: Iteration
    """`release` for weights without a training state; None when no name tells."""
    format: str
    """TORCH_DIST, FSDP_DTENSOR, ZARR or LEGACY."""
    writer: str
    """Megatron-LM, Megatron-Bridge, NeMo 2, NeMo 1, verl or ms-swift, as far as the layout tells."""
    run_config: Path | None = None
    """Megatron-Bridge's run_config.yaml."""
    context: Path | None = None
    """NeMo 2's context directory."""
    transformer_config: Path | None = None
    """verl's transformer_config.json."""
    model_config: Path | None = None
    """NeMo 1's model_config.yaml or hparams.yaml."""
    tokenizer: Path | None = None
    """A directory with tokenizer files."""
    huggingface: Path | None = None
    """A directory with config.json, as verl keeps beside the shards."""
    companions: tuple[Path, ...] = ()
    """Directories where config and tokenizer may lie, nearest first."""
    notices: tuple[str, ...] = ()

    @property
    def checkpoint(self) -> Path:
        """The directory that a person would call the checkpoint: `iter_0000500`, `global_step_500`, NeMo's."""
        place = self.weights
        while place.name in _INNER and place != self.root:
            place = place.parent
        return place


def locate(path: Path, iteration: int | None = None) -> Located:
    """The Megatron checkpoint at a path: a run, one of its iterations, or the directory or a file of the weights.

    `iteration` picks one of a run; otherwise the tracker's is taken, or the newest complete one when that is missing.
    Raises NotFound for what is not Megatron's, Incomplete for what a crashed save left.
    """
    path = tar.at(path)
    if not path.exists():
        raise NotFound(f"{path}: no such file or directory")
    found = recognise(directory_of(path), iteration)
    single = [name for name in tar.names(path) if name.endswith(".nemo")] if path.is_dir() else []
    if found is None and len(single) == 1 and (path / single[0]).is_file():
        return locate(path / single[0], iteration)
    if found is None:
        there = listed(_names(path)) if path.is_dir() else "a file"
        raise NotFound(
            f"{path} is not a Megatron checkpoint: {there or 'it is empty'}",
            hint=f"name the run ({TRACKER}, iter_0000500/) or a directory with metadata.json or mp_rank_00/ in it",
        )
    if iteration is not None and found.iteration not in (None, iteration):
        raise NotFound(f"{path} is iteration {found.iteration}, not {iteration}")
    return found


def recognise(path: Path, iteration: int | None = None) -> Located | None:
    """What `locate` finds in a directory; None when nothing there says Megatron."""
    inside = _weights_in(path)
    if inside is not None:
        return _described(*inside)
    if _is_left_empty(path):
        raise _empty(path)
    return _of_run(path, _iterations(path), iteration)


def is_rank_directory(name: str) -> bool:
    """Whether a directory of this name holds one rank's legacy file."""
    return _RANK.fullmatch(name) is not None


def has_optimizer(located: Located) -> bool:
    """Whether there are entries of an optimizer in a DCP, as far as the beginning of its index tells."""
    if located.format not in (TORCH_DIST, FSDP_DTENSOR) or not (located.weights / ".metadata").is_file():
        return False
    return _OPTIMIZER.search(_head(located.weights / ".metadata", _METADATA_HEAD_NBYTES)) is not None


# ------------------------------------------------------------------------------------------------- one checkpoint


def directory_of(path: Path) -> Path:
    """The directory of weights, or of a run, that a file or a rank's directory in it belongs to."""
    directory = _packed(path) if path.is_dir() else path.parent
    is_inner = is_rank_directory(directory.name) or (directory / ".zarray").is_file()
    return directory.parent if is_inner else directory


def _packed(path: Path) -> Path:
    """Where in an archive its model is: the folder with its configuration, if one was packed with its name."""
    if not isinstance(path, ArchivePath) or path.inner:
        return path
    folder = path
    while len(tar.names(folder)) == 1 and (folder / tar.names(folder)[0]).is_dir() and not _weights_in(folder):
        folder = folder / tar.names(folder)[0]
    return folder


def _weights_in(path: Path, depth: int = 2) -> tuple[Path, str] | None:
    """(directory of the weights, format) of a checkpoint's directory, or of one inside it."""
    format = _format(path)
    if format is not None:
        return path, format
    if depth:
        for name in _INNER:
            if (path / name).is_dir():
                inner = _weights_in(path / name, depth - 1)
                if inner is not None:
                    return inner
    return None


def _format(path: Path) -> str | None:
    names = _names(path)
    if "metadata.json" in names:
        backend = _backend(path / "metadata.json")
        if backend == "zarr":
            return ZARR
        if backend == "torch_dist":
            return TORCH_DIST
        if backend is not None:
            raise Unsupported(f"{path / 'metadata.json'}: the sharded backend {backend!r:.100} is not known")
    if "model_weights.ckpt" in names or any(is_rank_directory(name) and rank_file(path / name) for name in names):
        return LEGACY
    if ".metadata" in names:
        return _dcp(path, names)
    if any((path / name / ".zarray").is_file() for name in names if name.endswith((".weight", ".bias"))):
        return ZARR
    return None


def _dcp(path: Path, names: Sequence[str]) -> str | None:
    """What a directory with `.metadata` and no word of Megatron is: its names or its keys may tell."""
    if "common.pt" in names:
        return TORCH_DIST
    run_config = path / "run_config.yaml"
    if run_config.is_file() and b"ckpt_format: fsdp_dtensor" in _head(run_config, _SMALL_NBYTES):
        return FSDP_DTENSOR
    head = _head(path / ".metadata", _METADATA_HEAD_NBYTES)
    if any(key in head for key in _BYTE_KEYS):
        return TORCH_DIST  # whose metadata.json was lost: Megatron needs it, and we do not
    is_there = _EMBEDDING_KEY in head and _EMBEDDING.search(head)  # most have it not, and one search is fast
    return FSDP_DTENSOR if is_there else None


def _backend(path: Path) -> str | None:
    """`sharded_backend` of a metadata.json; None when it is some other program's file of that name."""
    try:
        document = json.loads(_head(path, _SMALL_NBYTES))
    except (ValueError, RecursionError) as error:
        if (path.parent / ".metadata").is_file():
            raise Corrupt(f"{path} is not JSON: {error}", hint="copy it again from where it was written") from error
        return None
    found = document.get("sharded_backend") if isinstance(document, dict) else None
    return found if isinstance(found, str) else None


def rank_file(path: Path) -> Path | None:
    """The model's file in the directory of a rank; Lightning names it as it likes, and there is one."""
    named = next((path / name for name in RANK_FILES if (path / name).is_file()), None)
    if named is not None or not path.is_dir():
        return named
    others = [name for name in _names(path) if name.endswith(".ckpt")]
    if len(others) > 1:
        last = [name for name in others if name.endswith("-last.ckpt")]
        if len(last) != 1:
            raise InputError(
                f"{path} holds several checkpoints: {listed(others)}", hint="move the others out, on every rank"
            )
        others = last
    return path / others[0] if others else None


def _described(weights: Path, format: str) -> Located:
    """The checkpoint around a directory of weights."""
    checkpoint = weights.parent if weights.name in _INNER else weights
    if checkpoint.name == "actor":
        checkpoint = checkpoint.parent
    places = list(dict.fromkeys((weights, weights.parent, checkpoint) if checkpoint != weights else (weights,)))
    numbered = _iteration_of(checkpoint.name)
    root = checkpoint.parent if numbered is not None else checkpoint
    context = _first(places, "context", directory=True)
    if context is None and (beside := _first(places, "io.json")) is not None:
        context = beside.parent  # of NeMo 2 before it had directories for weights and context
    model_config = _model_config(places)
    found = Located(
        root,
        weights,
        numbered,
        format,
        "",
        run_config=_first(places, "run_config.yaml"),
        context=context,
        transformer_config=_first(places, "transformer_config.json"),
        model_config=model_config,
        tokenizer=_tokenizer(places, context),
        huggingface=_huggingface(places),
        notices=weights.archive.notices if isinstance(weights, ArchivePath) else (),
    )
    _check_finished(checkpoint)
    return replace(found, writer=_writer(found, places), companions=_companions(found, places))


def _model_config(places: Sequence[Path]) -> Path | None:
    """NeMo 1's configuration: in the archive's folder, or in that of a run around its checkpoints."""
    inside = _first(places, "model_config.yaml")
    above = places[-1].parent
    if inside is not None or above.name != "checkpoints":
        return inside
    return _first([above.parent, above], "hparams.yaml")


def _check_finished(checkpoint: Path) -> None:
    """Raise Incomplete where NeMo's marker says that the save did not finish."""
    marker = checkpoint.parent / f"{checkpoint.name}-unfinished"
    if not isinstance(checkpoint, ArchivePath) and marker.exists():
        raise Incomplete(f"{checkpoint}: {marker.name} beside it says that the save did not finish",
                         hint="use an earlier checkpoint")  # fmt: skip


def _iteration_of(name: str) -> Iteration:
    if name == "release":
        return "release"
    match = _ITERATION.fullmatch(name)
    return int(match[1]) if match else None


def _first(places: Sequence[Path], name: str, *, directory: bool = False) -> Path | None:
    is_there = Path.is_dir if directory else Path.is_file
    return next((place / name for place in places if is_there(place / name)), None)


def _tokenizer(places: Sequence[Path], context: Path | None) -> Path | None:
    candidates = [place / "tokenizer" for place in places]
    candidates += [context / "nemo_tokenizer"] if context else []
    candidates += [place / "huggingface" for place in places]
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return next((c for c in candidates if any((c / name).is_file() for name in files)), None)


def _huggingface(places: Sequence[Path]) -> Path | None:
    candidates = [place / "huggingface" for place in places] + list(places)
    return next((c for c in candidates if (c / "config.json").is_file()), None)


def _writer(found: Located, places: Sequence[Path]) -> str:
    if found.context is not None:
        return "NeMo 2"
    if found.weights.name == "model_weights" or found.model_config:
        return "NeMo 1"
    if found.run_config is not None:
        return "Megatron-Bridge"
    verl = (
        found.weights.name == "dist_ckpt"
        or found.transformer_config
        or (found.weights / "mp_rank_00/model.pt").is_file()
    )
    if verl or any(place.name.startswith("global_step_") for place in places):
        return "verl"
    return "ms-swift" if _first(places, "args.json") else "Megatron-LM"


def _companions(found: Located, places: Sequence[Path]) -> tuple[Path, ...]:
    near = [found.huggingface, found.tokenizer, *places, found.root]
    return tuple(dict.fromkeys(place for place in near if place is not None))


# ------------------------------------------------------------------------------------------------------------- runs


def _iterations(run: Path) -> list[tuple[int, Path]]:
    """The numbered checkpoints of a run, ascending. verl's steps count when Megatron's files are in them."""
    found = []
    for name in _names(run):
        match = _ITERATION.fullmatch(name)
        if match and (run / name).is_dir() and (name.startswith("iter_") or _weights_in(run / name)):
            found.append((int(match[1]), run / name))
    return sorted(found)


def _of_run(run: Path, iterations: list[tuple[int, Path]], wanted: int | None) -> Located | None:
    """The iteration asked for, the tracker's, or the newest that is complete. None when none is Megatron's."""
    tracked = _tracked(run)
    candidates = [path for _, path in reversed(iterations)]
    if (run / "release").is_dir():
        candidates.append(run / "release")
    if not any(_weights_in(path) or _is_left_empty(path) for path in candidates):
        return None
    if wanted is not None:
        chosen = next((path for number, path in iterations if number == wanted), None)
        if chosen is None:
            raise NotFound(f"{run} has no iteration {wanted}", hint=f"it has {_listed_iterations(iterations)}")
        return replace(_complete(chosen), root=run)
    first = [path for path in candidates if path.name == tracked]
    skipped = [] if first or tracked is None else [f"{tracked}, which {TRACKER} names, is not there"]
    for path in first + [path for path in candidates if path not in first]:
        inside = _whole_in(path)
        if inside is not None:
            notices = tuple(f"{what}: {path.name} is read" for what in skipped)
            found = _described(*inside)
            return replace(found, root=run, notices=found.notices + notices)
        named = f", which {TRACKER} names," if path in first else ""
        skipped.append(f"{path.name}{named} {_lack(path)}")
    raise Incomplete(
        f"{run}: no iteration is complete: {listed(skipped)}",
        hint="a save that crashes leaves an empty directory, or shards without an index: copy what is missing, or use "
        "the checkpoint of another run",
    )


def _lack(path: Path) -> str:
    """Why what is in the directory of an iteration is no checkpoint."""
    shards = [name for name in _names(path) if name.endswith(".distcp")]
    if shards:
        return f"has {listed(shards, 3)} and no whole .metadata, which is written last"
    return "is empty" if _is_left_empty(path) else "holds no weights"


def _listed_iterations(iterations: Sequence[tuple[int, Path]]) -> str:
    return listed(str(number) for number, _ in iterations) or "none"


def _whole_in(path: Path) -> tuple[Path, str] | None:
    """`_weights_in`, unless the save did not finish: `.metadata` is among the last files that are written."""
    inside = _weights_in(path) if path.is_dir() else None
    if inside is None or inside[1] not in (TORCH_DIST, FSDP_DTENSOR):
        return inside
    index = inside[0] / ".metadata"
    return inside if index.is_file() and index.stat().st_size else None


def _is_left_empty(path: Path) -> bool:
    """Whether a crash left this directory: Megatron's name, and nothing that could be a shard."""
    if not re.fullmatch(r"iter_\d{7,12}|release", path.name):
        return False
    return all(name.startswith(".git") or name.endswith((".yaml", ".json", ".txt")) for name in _names(path))


def _complete(path: Path) -> Located:
    inside = _weights_in(path)
    if inside is None:
        raise _empty(path)
    return _described(*inside)


def _empty(path: Path) -> InputError:
    names = [name for name in _names(path) if not name.startswith(".git")]
    what = f"it holds {listed(names)}" if names else "it is empty: the save crashed before anything was written"
    return Incomplete(f"{path} holds no weights; {what}", hint="use an earlier iteration")


def _tracked(run: Path) -> str | None:
    """The directory that the tracker names; None without a tracker. Raises Corrupt when it is no such text."""
    if not (run / TRACKER).is_file():
        return None
    text = _head(run / TRACKER, 256).decode(errors="replace").strip()
    if text == "release":
        return text
    if not re.fullmatch(r"\d{1,12}", text):
        raise Corrupt(
            f"{run / TRACKER} says {text!r:.60}, a number or `release` was expected",
            hint="name the directory of an iteration, iter_0000500, or write its number there",
        )
    step = run / f"global_step_{int(text)}"
    return step.name if step.is_dir() else f"iter_{int(text):07d}"


def _head(path: Path, nbytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(min(nbytes, path.stat().st_size))  # `read` sets aside all that it is asked for


def _names(path: Path) -> list[str]:
    try:
        return tar.names(path)
    except NotADirectoryError:
        return []
    except OSError as error:
        raise InputError(f"{path} cannot be listed: {error.strerror}") from error
