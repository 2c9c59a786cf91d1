"""Shards that wait for their merge are held, so that a trainer's `save_total_limit` cannot take them away.

Each is linked into a directory of ours, which costs nothing and lasts when the trainer removes its own name of it;
where the file system has no hard links, or another one is asked for, it is copied. A link does not help against a file
that is overwritten in place: that shows in its fingerprint. Small files around the shards (config, tokenizer, a
trainer's notes) come along as copies.

    HELD/checkpoint-500/...        as in the run
    HELD/config.json, ...          what lies beside the checkpoint in the run
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from reshard.errors import Mismatch, NotFound
from reshard.evaluate.ready import Whole, fingerprint, stamps, walk
from reshard.formats.huggingface import COMPANIONS, CONFIG

_SMALL_NBYTES = 64 << 20
_OF_TENSORS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".distcp")
_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES}


@dataclass(frozen=True, slots=True)
class Held:
    """A checkpoint that is safe from its trainer."""

    path: Path
    """As it was in the run."""
    num_links: int
    num_copies: int
    copied_nbytes: int

    def __str__(self) -> str:
        if not self.num_copies:
            return f"{self.num_links} hard links"
        linked = f", {self.num_links} hard links" if self.num_links else ""
        return f"{self.num_copies} copies{linked}"


def hold(whole: Whole, folder: Path) -> Held:
    """The checkpoint in a directory of ours, complete or not at all.

    Raises NotFound when the trainer removed it meanwhile, Mismatch when it was written again, OSError when there is no
    room for copies.
    """
    final = folder / whole.path.name
    if folder.is_dir():
        held = Held(final, len(whole.files), 0, 0)
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        making = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        try:
            held = _fill(whole, making, final)
            _check(whole, making / whole.path.name)
            with suppress(OSError):  # another watcher was faster
                os.rename(making, folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    _check(whole, final)
    return held


def release(folder: Path) -> None:
    """Let go of what is held there."""
    shutil.rmtree(folder, ignore_errors=True)


def is_intact(path: Path, names: Iterable[str], wanted: str) -> bool:
    """Whether these shards are there as they were when their fingerprint was taken."""
    return fingerprint(stamps(path, names)) == wanted


def _check(whole: Whole, path: Path) -> None:
    if fingerprint(stamps(path, whole.files)) != whole.fingerprint:
        raise Mismatch(f"{whole.path} changed while its shards were being held")


def _fill(whole: Whole, making: Path, final: Path) -> Held:
    linked = [_brought(whole.path / name, making / whole.path.name / name, link=True) for name in whole.files]
    if None in linked:
        raise NotFound(f"{whole.path}: shards were removed before they could be held")
    for name, stat in walk(whole.path):
        if stat.st_size <= _SMALL_NBYTES and name not in whole.files:
            _brought(whole.path / name, making / whole.path.name / name, link=name.endswith(_OF_TENSORS))
    for name in os.listdir(whole.path.parent):
        if any(fnmatchcase(name, pattern) for pattern in (CONFIG, *COMPANIONS)):
            _brought(whole.path.parent / name, making / name, link=False)
    copies = [size for (size, _), link in zip(whole.files.values(), linked, strict=True) if not link]
    return Held(final, len(linked) - len(copies), len(copies), sum(copies))


def _brought(source: Path, target: Path, *, link: bool) -> bool | None:
    """Whether a file was linked, not copied; None when it is not there."""
    try:
        if link:
            return _link(source, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_file():
            shutil.copyfile(source, target)
    except FileNotFoundError:
        return None
    return False


def _link(source: Path, target: Path) -> bool:
    """Link a file, or copy it with its times; says whether it was a link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    real = os.path.realpath(source)
    try:
        os.link(real, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    else:
        return True
    stat = os.stat(real)
    shutil.copyfile(real, target)
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return False
