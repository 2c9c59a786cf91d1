"""A bounded place on disk for what can only be read from front to back: compressed streams, decoded once."""

from __future__ import annotations

import shutil
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from reshard.core.tensor import Extent
from reshard.errors import Corrupt, Unsupported
from reshard.storage.files import Files

RAW, ZLIB, GZIP = -zlib.MAX_WBITS, zlib.MAX_WBITS, zlib.MAX_WBITS + 16
"""What a deflate stream lies in."""

_PIECE_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class ScratchExtent(Extent):
    """An extent of a temporary file, which stays as long as anyone refers to the extent."""

    scratch: Scratch | None = field(default=None, repr=False)


class Scratch:
    """Files that live as long as this object."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="reshard-"))
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self._count = 0

    def decoded(self, pieces: Iterable[bytes], limit_nbytes: int, where: str) -> ScratchExtent:
        """All pieces in a file, as one extent. Raises Corrupt, naming `where`, past the limit."""
        self._count += 1
        path = self._directory / str(self._count)
        nbytes = 0
        with path.open("wb") as file:
            for piece in pieces:
                nbytes += len(piece)
                if nbytes > limit_nbytes:
                    raise Corrupt(f"{where}: it decompresses to more than the {limit_nbytes} bytes expected")
                file.write(piece)
        return ScratchExtent(str(path), 0, nbytes, scratch=self)


def zstd(pieces: Iterable[bytes], where: str) -> Iterator[bytes]:
    """The plaintext of zstd frames. Raises Unsupported without the `zstd` extra, Corrupt for damaged frames."""
    try:
        import zstandard
    except ImportError as error:
        raise Unsupported(f"{where} is compressed with zstd", hint="pip install 'reshard[zstd]'") from error
    decoder = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
    try:
        for piece in pieces:
            for at in range(0, len(piece), 1 << 16):  # a small input bounds what one call can return
                yield decoder.decompress(piece[at : at + (1 << 16)])
    except zstandard.ZstdError as error:
        raise Corrupt(f"{where}: {error}") from error
    if not decoder.eof:
        raise Corrupt(f"{where}: the zstd frame is cut short")


def inflate(pieces: Iterable[bytes], where: str, container: int = RAW) -> Iterator[bytes]:
    """The plaintext of a deflate stream; bytes behind its end are not read. Raises Corrupt for damaged ones."""
    decoder = zlib.decompressobj(container)
    try:
        for piece in pieces:
            while piece:
                yield decoder.decompress(piece, _PIECE_NBYTES)
                piece = decoder.unconsumed_tail
            if decoder.eof:
                break  # the decoder would keep all that it is given from here on
        yield decoder.flush()
    except zlib.error as error:
        raise Corrupt(f"{where}: {error}") from error
    if not decoder.eof:
        raise Corrupt(f"{where}: the compressed data is cut short")


def stream(files: Files, extent: Extent) -> Iterator[bytes]:
    """The bytes of an extent, piece by piece."""
    for at in range(0, extent.nbytes, _PIECE_NBYTES):
        yield files.pread(extent.path, extent.offset + at, min(_PIECE_NBYTES, extent.nbytes - at))
