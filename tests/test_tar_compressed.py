"""Archives of tar in every compression: the same members, nothing beyond measure, no damage unseen."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from reshard.cli.main import main
from reshard.errors import Corrupt, Incomplete, InputError, OutputError, Unsupported
from reshard.storage import tar
from test_nemo1 import assert_same, exported, members, pack

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "xz -0": lambda data: lzma.compress(data, preset=0),
    "xz -9": lambda data: lzma.compress(data, preset=9),
    "gzip of two streams": lambda data: gzip.compress(data[:3000]) + gzip.compress(data[3000:]),
    "bzip2 of two streams": lambda data: bz2.compress(data[:3000]) + bz2.compress(data[3000:]),
    "xz of two streams": lambda data: lzma.compress(data[:3000]) + bytes(8) + lzma.compress(data[3000:]),
}
NOISE = b"".join(bytes([i * i % 251, i % 256]) for i in range(1 << 20))
"""Two MiB: more than a piece, and more than a block of bzip2."""


def archive(path: Path, compress: str, content: bytes = NOISE) -> Path:
    """A compressed archive of two members."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as file:
        for name, data in (("model_config.yaml", b"hidden_size: 8\n"), ("a/noise", content)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    path.write_bytes(COMPRESS[compress](plain.getvalue()))
    return path


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where archives are decompressed to."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


@pytest.mark.parametrize("compress", COMPRESS)
def test_members_of_a_compressed_archive_are_those_that_were_packed(
    compress: str, tmp_path: Path, scratch: Path
) -> None:
    path = archive(tmp_path / "m.nemo", compress)
    assert tar.is_archive(path)
    found = tar.at(path / "a" / "noise")
    assert found.read_bytes() == NOISE
    notice = tar.opened(str(path)).notices[0]
    assert f"is compressed ({compress.split()[0]}) and cannot be read in place" in notice
    assert f"`{compress.split()[0]} -dc {path} > plain.nemo` spares that" in notice
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("compress", ["bzip2", "xz"])
def test_a_nemo_archive_is_converted_whatever_compresses_it(compress: str, tmp_path: Path, scratch: Path) -> None:
    from safetensors.torch import load_file

    plain = pack(tmp_path / "plain", members())
    (tmp_path / "m.nemo").write_bytes(COMPRESS[compress](plain.read_bytes()))
    assert main(["convert", str(tmp_path / "m.nemo"), str(tmp_path / "hf"), "--to", "hf", "-q"]) == 0
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), exported())
    assert main(["verify", str(tmp_path / "hf"), "--against", str(tmp_path / "m.nemo"), "-q"]) == 0


@pytest.mark.parametrize("compress", ["gzip", "bzip2", "xz"])
def test_a_compressed_archive_cut_anywhere_is_incomplete(compress: str, tmp_path: Path, scratch: Path) -> None:
    path = archive(tmp_path / "m.nemo", compress, NOISE[:20_000])
    whole = path.read_bytes()
    for stop in range(len(whole) - 200, len(whole), 7):
        path.write_bytes(whole[:stop])
        with pytest.raises(Incomplete, match=r"m\.nemo: the compressed archive is cut short"):
            tar.opened(str(path))
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("compress", ["gzip", "bzip2", "xz"])
def test_a_compressed_archive_with_a_bit_changed_is_refused(compress: str, tmp_path: Path, scratch: Path) -> None:
    path = archive(tmp_path / "m.nemo", compress, NOISE[:20_000])
    whole = path.read_bytes()
    for at in range(len(whole) // 2, len(whole), len(whole) // 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises((Corrupt, Incomplete), match=r"m\.nemo"):
            tar.opened(str(path))


@pytest.mark.parametrize("compress", ["gzip", "bzip2", "xz"])
def test_an_archive_that_grows_beyond_measure_is_refused(
    compress: str, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar, "_INFLATED_NBYTES", 1 << 20)
    path = archive(tmp_path / "m.nemo", compress, bytes(32 << 20))
    with pytest.raises(Unsupported, match="a/noise ends at byte") as raised:
        tar.opened(str(path))
    assert raised.value.hint == f"if you trust it, decompress it: {compress} -dc {path} > plain.nemo"
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("compress", ["bzip2", "xz"])
def test_the_disk_is_asked_before_a_member_is_decompressed(
    compress: str, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = archive(tmp_path / "m.nemo", compress)
    monkeypatch.setattr(tar.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1000))
    with pytest.raises(OutputError, match="which has 1000"):
        tar.opened(str(path))


def test_a_dictionary_beyond_measure_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "m.nemo", "xz -9")
    assert tar.is_archive(path)
    monkeypatch.setattr(tar, "_XZ_NBYTES", 16 << 20)
    with pytest.raises(InputError, match=r"m\.nemo"):
        tar.opened(str(path))


@pytest.mark.parametrize(
    "magic", [known.magic for known in tar.COMPRESSIONS], ids=[k.program for k in tar.COMPRESSIONS]
)
def test_a_file_that_only_begins_as_if_it_were_compressed_is_no_archive(magic: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.nemo").write_bytes(magic + bytes(5000))
    assert not tar.is_archive(tmp_path / "m.nemo")


@pytest.mark.slow
@pytest.mark.parametrize("compress", ["gzip", "bzip2", "xz -0"])
def test_an_archive_is_decompressed_piece_by_piece(compress: str, tmp_path: Path, scratch: Path) -> None:
    path = archive(tmp_path / "m.nemo", compress, Random(0).randbytes(12 << 20))
    tar.is_archive(path)  # imports what decompresses it
    tracemalloc.start()
    tar.opened(str(path))
    _, peak_nbytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_nbytes < 8 << 20
