"""What a merge is told, what it is when it is ready to be carried out, and what it did."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from reshard.core.checkpoint import Checkpoint
from reshard.errors import Unsupported, listed
from reshard.storage.plan import Plan

What = Literal["model", "optimizer", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a merge does besides merging. The defaults change nothing of the weights."""

    what: What = "model"
    dtype: str | None = None
    """Of floating-point tensors; None keeps each as it is."""
    max_shard_size: str | int | None = None
    """Of the files of a HuggingFace directory, such as `5GB`, or in bytes."""
    base: str | None = None
    """A model directory or hub id: config and tokenizer come from there when the checkpoint has none."""
    include: tuple[str, ...] = ()
    """FQN globs; only these tensors. Empty takes all."""
    exclude: tuple[str, ...] = ()
    """FQN globs; not these."""
    keep_names: bool = False
    """Every FQN as stored: no containers off, no hub names, no ties. What wrappers added goes unless names need it."""
    step: int | None = None
    state_dict_dirname: str | None = None
    cfg_key: str | None = None
    """Where the config is in Lightning's meta.pt, for `.ckpt` outputs."""
    save_tokenizer: bool = True
    verify: bool = False
    """Compare the copies of data that several ranks hold, and read the output again when it is written."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", self.base if self.base is None else os.fspath(self.base))
        for name in ("include", "exclude"):
            globs = getattr(self, name)
            object.__setattr__(self, name, (globs,) if isinstance(globs, str) else tuple(globs))
        if self.what not in get_args(What):
            raise Unsupported(f"what={self.what!r} is merged", hint=f"one of {listed(get_args(What))}")

    def record(self) -> dict[str, Any]:
        """What differs from the defaults, for the manifest."""
        default = Options()
        changed = {
            name: getattr(self, name) for name in self.__slots__ if getattr(self, name) != getattr(default, name)
        }
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> Options:
        """The options that a manifest holds."""
        return msgspec.convert(record, cls)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A merge that is ready to be carried out: nothing is written yet, and every header has been checked."""

    root: Path
    """The directory that was found for what the user named."""
    opened: Checkpoint
    """All that was read."""
    checkpoint: Checkpoint
    """All that is written."""
    plan: Plan
    notices: tuple[str, ...]
    verify: bool = False
    """Whether the output is read again when it is written."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did."""

    output: Path
    source: Path
    format: str
    step: int | None
    num_tensors: int
    nbytes: int
    read_nbytes: int
    num_checked: int
    """Records of the shards whose CRC-32 was confirmed."""
    kept_nbytes: int
    """Taken over from an interrupted run."""
    seconds: float
    notices: tuple[str, ...]
    removed: tuple[Path, ...] = ()
    """Shards that were removed afterwards."""
