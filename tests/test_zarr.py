"""zarr version 2 arrays, held against zarr-python: whatever it writes reads the same, and what is lost is said."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reshard
from reshard.core.box import Box
from reshard.errors import Corrupt, Incomplete, InputError, NotFound, Unsupported
from reshard.formats import zarr as ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import numcodecs
    import zarr

DATA = Path(__file__).parent / "data" / "megatron" / "zarr_llama" / "iter_0000010"
CODECS: dict[str, Any] = {
    "none": None, "zlib": numcodecs.Zlib(4), "gzip": numcodecs.GZip(2), "bz2": numcodecs.BZ2(1),
    "lzma": numcodecs.LZMA(), "zstd": numcodecs.Zstd(3), "lz4": numcodecs.LZ4(),
    "blosc": numcodecs.Blosc("lz4", 5, numcodecs.Blosc.SHUFFLE), "blosc_zstd": numcodecs.Blosc("zstd", 3),
}  # fmt: skip
DTYPES = ("<f4", ">f4", "<f2", "<f8", "|u1", "|i1", "<i8", ">i2", "|b1")


def written(
    path: Path, values: np.ndarray[Any, Any], chunks: tuple[int, ...], codec: Any, order: Any, separator: Any
) -> None:
    """An array of zarr-python's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = zarr.create_array(
            str(path), shape=values.shape, chunks=chunks, dtype=values.dtype, zarr_format=2, order=order, fill_value=0,
            compressors=codec, chunk_key_encoding={"name": "v2", "separator": separator},
            config={"write_empty_chunks": True},
        )  # fmt: skip
        array[...] = values


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, Any]:
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=4)))
    return {
        "values": np.random.default_rng(draw(st.integers(0, 9)))
        .integers(0, 100, shape)
        .astype(draw(st.sampled_from(DTYPES))),
        "chunks": tuple(draw(st.integers(1, n + 1)) for n in shape),
        "codec": CODECS[draw(st.sampled_from(sorted(CODECS)))],
        "order": draw(st.sampled_from("CF")),
        "separator": draw(st.sampled_from("./")),
    }


@settings(max_examples=120, deadline=None)
@given(arrays(), st.data())
def test_any_array_of_zarr_python_reads_the_same_whole_and_in_parts(made: dict[str, Any], data: st.DataObject) -> None:
    values = made["values"]
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder) / "a.weight", **made)
        opened = ours.open(Path(folder) / "a.weight")
        actual = opened["a.weight"].numpy()
        start = tuple(data.draw(st.integers(0, n - 1)) for n in values.shape)
        stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, values.shape, strict=True))
        part = opened.tensors["a.weight"].read(opened.source, Box(start, stop))
    assert actual.dtype == values.dtype.newbyteorder("=")
    np.testing.assert_array_equal(actual, values)
    native = values.astype(values.dtype.newbyteorder("="))
    np.testing.assert_array_equal(part, native[Box(start, stop).slices].view(part.dtype))


def test_a_checkpoint_of_megatron_reads_as_zarr_python_reads_it() -> None:
    opened = ours.open(DATA, is_wanted=lambda name: name.endswith("weight"))
    assert len(opened) == 9
    for name, tensor in opened.items():
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(shutil.copytree(DATA / name, Path(folder) / "a"))
            header = json.loads((copy / ".zarray").read_text())
            (copy / ".zarray").write_text(json.dumps(header | {"dtype": "<u2", "fill_value": 0}))
            expected = zarr.open_array(str(copy), mode="r")[...]
        assert tensor.dtype.name == "BF16"
        np.testing.assert_array_equal(tensor.numpy().view("u2"), expected)


def test_extra_states_are_objects_and_what_is_not_wanted_is_not_read(folder: Path) -> None:
    copy = shutil.copytree(DATA, folder / "copy")
    assert "decoder.layers.mlp.linear_fc1._extra_state/shard_0_4" in ours.open(copy).objects
    (copy / "output_layer.weight" / ".zarray").write_text("{")
    assert "output_layer.weight" not in ours.open(copy, is_wanted=lambda name: name != "output_layer.weight")


@pytest.mark.parametrize("spelling", ["bfloat16", "|V2", "<V2"])
def test_every_spelling_of_bfloat16_is_bfloat16(folder: Path, spelling: str) -> None:
    values = np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3)
    (folder / "0.0").write_bytes(values.tobytes())
    (folder / ".zarray").write_text(json.dumps(header_of(shape=[2, 3], chunks=[2, 3], dtype=spelling)))
    np.testing.assert_array_equal(ours.open(folder)[folder.name].numpy(), values)


def header_of(**changes: Any) -> dict[str, Any]:
    return {
        "zarr_format": 2, "shape": [4, 4], "chunks": [2, 4], "dtype": "<f4", "compressor": None, "fill_value": 0.0,
        "filters": None, "order": "C",
    } | changes  # fmt: skip


def array_of(folder: Path, files: dict[str, bytes], **changes: Any) -> Path:
    (folder / ".zarray").write_text(json.dumps(header_of(**changes)))
    for key, data in files.items():
        (folder / key).write_bytes(data)
    return folder


def test_a_missing_chunk_is_named_and_never_filled(folder: Path) -> None:
    with pytest.raises(Incomplete, match=r"1 of 2 chunks are missing: 1\.0"):
        ours.open(array_of(folder, {"0.0": bytes(32)}))


def test_an_array_whose_chunks_are_all_missing_is_lost_whatever_its_fill_value(folder: Path) -> None:
    with pytest.raises(Incomplete, match=r"2 of 2 chunks are missing: 0\.0, 1\.0"):
        ours.open(array_of(folder, {}))


def test_a_chunk_under_another_key_does_not_count(folder: Path) -> None:
    with pytest.raises(Incomplete, match=r"missing: 1\.0"):
        ours.open(array_of(folder, {"0.0": bytes(32), "0.1": bytes(32)}))


def test_chunks_without_a_header_are_said(folder: Path) -> None:
    (folder / "a.weight").mkdir()
    (folder / "a.weight" / "0.0").write_bytes(bytes(32))
    with pytest.raises(Incomplete, match=r"chunks and no \.zarray"):
        ours.open(folder)


@pytest.mark.parametrize("nbytes, error", [(0, Incomplete), (31, Incomplete), (33, Corrupt)])
def test_a_chunk_of_another_size_is_refused(folder: Path, nbytes: int, error: type[InputError]) -> None:
    with pytest.raises(error, match=rf"chunk 1\.0 has {nbytes} bytes, 32 are expected"):
        ours.open(array_of(folder, {"0.0": bytes(32), "1.0": bytes(nbytes)}))


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"zarr_format": 3}, Unsupported),
        ({"shape": [4, -4]}, Corrupt),
        ({"shape": [1 << 60, 4]}, Corrupt),
        ({"shape": [1 << 40, 4], "chunks": [1, 1]}, Unsupported),
        ({"shape": [4, True]}, Corrupt),
        ({"shape": "44"}, Corrupt),
        ({"shape": [1] * 40, "chunks": [1] * 40}, Corrupt),
        ({"chunks": [0, 4]}, Corrupt),
        ({"chunks": [4]}, Corrupt),
        ({"dtype": "|O"}, Unsupported),
        ({"dtype": "|S8"}, Unsupported),
        ({"dtype": [["a", "<f4"]]}, Unsupported),
        ({"order": "Z"}, Corrupt),
        ({"dimension_separator": "../"}, Corrupt),
        ({"filters": [{"id": "delta", "dtype": "<f4"}]}, Unsupported),
        ({"compressor": {"id": "pickle"}}, Unsupported),
        ({"compressor": "zlib"}, Corrupt),
        ({"compressor": {"id": "zlib"}, "shape": [1 << 40], "chunks": [1 << 40]}, Unsupported),
    ],
)
def test_headers_that_lie_or_are_not_read_are_refused_by_type(
    folder: Path, changes: dict[str, Any], error: type[InputError]
) -> None:
    with pytest.raises(error, match=r"zarray|chunks"):
        ours.open(array_of(folder, {"0.0": bytes(32), "1.0": bytes(32)}, **changes))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"[" * 100_000, b"\xff\xfe"])
def test_a_header_that_is_no_json_object_is_refused(folder: Path, data: bytes) -> None:
    (folder / ".zarray").write_bytes(data)
    with pytest.raises((Corrupt, Unsupported), match="zarray"):
        ours.open(folder)


@pytest.mark.parametrize("codec", [name for name in CODECS if name != "none"])
def test_a_compressed_chunk_that_is_damaged_cut_or_of_another_size_is_refused(folder: Path, codec: str) -> None:
    written(folder / "a", np.arange(4096, dtype="<f4"), (4096,), CODECS[codec], "C", ".")
    chunk = folder / "a" / "0"
    whole = chunk.read_bytes()
    for data in (whole[: len(whole) // 2], b"", bytes(64), CODECS[codec].encode(bytes(3 * 16384))):
        chunk.write_bytes(data)
        with pytest.raises(Corrupt, match="chunk 0"):
            ours.open(folder / "a")["a"].numpy()


def test_a_directory_without_arrays_is_not_found(folder: Path) -> None:
    with pytest.raises(NotFound, match="no zarr array"):
        ours.open(folder)


def test_open_takes_an_array_a_directory_of_arrays_and_a_header(folder: Path) -> None:
    written(folder / "run" / "a.weight", np.arange(6, dtype="<f4"), (4,), None, "C", ".")
    for path in (folder / "run" / "a.weight", folder / "run", folder / "run" / "a.weight" / ".zarray"):
        np.testing.assert_array_equal(reshard.open(path)["a.weight"].numpy(), np.arange(6, dtype="<f4"))
