"""The programs that are not ours, each a process of its own: `python -m bench.contestants NAME SRC... OUT`.

floor       every byte of the shards copied with the two checksums and nothing else: what no merge can beat by much
torch       torch.distributed.checkpoint.format_utils.dcp_to_torch_save
accelerate  accelerate merge-weights
"""

from __future__ import annotations

import os
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import xxhash

BLOCK_NBYTES = 512 << 10
WINDOW_NBYTES = 4 << 20
RUN_NBYTES = 32 << 20
NUM_THREADS = 2


def floor(source: Path, output: Path) -> None:
    """Copy the files of a directory in blocks: pread, CRC-32, xxh3-128, pwrite, and an early start of the disk."""
    runs, lock = _runs(source, output), threading.Lock()

    def work() -> None:
        buffer = memoryview(bytearray(BLOCK_NBYTES))
        while True:
            with lock:
                run = next(runs, None)
            if run is None:
                return
            _copy(*run, buffer)

    threads = [threading.Thread(target=work) for _ in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _runs(source: Path, output: Path) -> Iterator[tuple[int, int, int, int]]:
    output.mkdir()
    for path in sorted(source.iterdir()):
        reading = os.open(path, os.O_RDONLY)
        writing = os.open(output / path.name, os.O_WRONLY | os.O_CREAT)
        nbytes = os.fstat(reading).st_size
        if nbytes:
            os.posix_fallocate(writing, 0, nbytes)
        for start in range(0, nbytes, RUN_NBYTES):
            yield reading, writing, start, min(nbytes, start + RUN_NBYTES)


def _copy(reading: int, writing: int, start: int, stop: int, buffer: memoryview) -> None:
    crc, digest = 0, xxhash.xxh3_128()
    for offset in range(start, stop, BLOCK_NBYTES):
        block = buffer[: os.preadv(reading, [buffer[: stop - offset]], offset)]
        crc = zlib.crc32(block, crc)
        digest.update(block)
        os.pwrite(writing, block, offset)
        if (offset + BLOCK_NBYTES) % WINDOW_NBYTES == 0:
            window = offset + BLOCK_NBYTES - WINDOW_NBYTES
            os.posix_fadvise(writing, window, WINDOW_NBYTES, os.POSIX_FADV_DONTNEED)  # starts its writing
            if window >= start + 2 * WINDOW_NBYTES:  # written by now: its pages serve again
                os.posix_fadvise(writing, window - 2 * WINDOW_NBYTES, WINDOW_NBYTES, os.POSIX_FADV_DONTNEED)


def torch(source: Path, output: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    output.mkdir()
    dcp_to_torch_save(source, output / "model.pt")


def accelerate(source: Path, output: Path) -> None:
    from accelerate.utils import merge_fsdp_weights

    merge_fsdp_weights(str(source), str(output))


if __name__ == "__main__":
    name, source, output = sys.argv[1:]
    {"floor": floor, "torch": torch, "accelerate": accelerate}[name](Path(source), Path(output))
