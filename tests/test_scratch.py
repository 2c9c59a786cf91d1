"""Deflate streams, as they lie in archives and arrays."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator

import pytest

from reshard.errors import Corrupt
from reshard.storage.scratch import GZIP, RAW, ZLIB, inflate

PLAIN = bytes(range(256)) * 40_000
RAW_STREAM = zlib.compress(PLAIN)[2:-4]
STREAMS = {RAW: RAW_STREAM, ZLIB: zlib.compress(PLAIN), GZIP: gzip.compress(PLAIN)}


@pytest.mark.parametrize("container", STREAMS)
@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_a_stream_is_inflated_whatever_pieces_it_comes_in(container: int, size: int) -> None:
    stream = STREAMS[container]
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert b"".join(inflate(iter(pieces), "here", container)) == PLAIN
    with pytest.raises(Corrupt, match="here: the compressed data is cut short"):
        list(inflate([stream[:-1]], "here", container))


def test_what_follows_a_stream_is_not_read() -> None:
    read = []

    def pieces() -> Iterator[bytes]:
        for piece in (STREAMS[ZLIB], b"behind", b"far behind"):
            read.append(piece)
            yield piece

    assert b"".join(inflate(pieces(), "here", ZLIB)) == PLAIN
    assert read == [STREAMS[ZLIB]]
