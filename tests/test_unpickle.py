"""The restricted unpickler, held against what torch, omegaconf, numpy and Python pickle, and against hostile bytes."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import gc
import io
import os
import pathlib
import pickle
import pickletools
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from reshard.errors import Corrupt, ReshardError, Unsupported
from reshard.storage.unpickle import (
    DCP_RECORDS,
    Counter,
    DefaultDict,
    Global,
    Inert,
    OrderedDict,
    QTensorRef,
    Rebuilt,
    Record,
    Size,
    StorageRef,
    TensorRef,
    TorchDType,
    as_path,
    globals_in,
    is_known,
    load,
    load_from,
)


def read(data: bytes, **options: Any) -> Any:
    return load(data, where="here", **options)


def value_or_error(data: bytes, **options: Any) -> Any:
    """What is read, or the message of the error, which must be one of ours and say where."""
    try:
        return read(data, **options)
    except ReshardError as error:
        message = str(error)
    assert message.startswith("here: ")
    return message


def torch_pickle(obj: object) -> bytes:
    """The data.pkl that torch.save writes."""
    file = io.BytesIO()
    torch.save(obj, file)
    with zipfile.ZipFile(file) as archive:
        return archive.read("archive/data.pkl")


class Executes:
    def __init__(self, function: object, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


class Outer:
    class Inner:
        pass


@dataclasses.dataclass
class Config:
    width: int
    depth: int


class Slotted:
    __slots__ = ("first", "second")


class NumberedDict(dict):  # type: ignore[type-arg]
    number: int


# ------------------------------------------------------------------------------------------------------ harmless values


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        None,
        [True, False],
        [0, 255, 256, 65535, 65536, -1, 2**31, -(2**63), 2**2000],
        [1.5, float("inf"), -0.0],
        ["", "ascii", "é", "x" * 300, "\ud800"],
        [b"", b"bytes", b"\x00\xff" * 200],
        bytearray(b"some"),
        (1, (2, (3, 4, 5, 6))),
        {"a": {1: 2}, (1, 2): [3]},
        {1, 2, 3},
        frozenset("ab"),
        complex(1, -2),
        collections.OrderedDict(b=1, a=2),
        collections.Counter("hello"),
        collections.defaultdict(list, a=[1]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_values_come_back_equal(value: object, protocol: int) -> None:
    assert read(pickle.dumps(value, protocol)) == value


def test_containers_keep_what_they_are() -> None:
    loaded = read(
        pickle.dumps([collections.OrderedDict(a=1), collections.defaultdict(list), collections.Counter("ab")], 2)
    )
    assert [type(item) for item in loaded] == [OrderedDict, DefaultDict, Counter]
    assert loaded[1].factory == Global("__builtin__", "list")


def test_state_dict_keeps_its_metadata() -> None:
    state_dict = torch.nn.Linear(2, 3).state_dict()
    loaded = read(torch_pickle(state_dict))
    assert isinstance(loaded, collections.OrderedDict)
    assert loaded._metadata == state_dict._metadata  # type: ignore[attr-defined]


def test_shared_references_stay_shared() -> None:
    shared = ["x"]
    loaded = read(pickle.dumps([shared, shared]))
    assert loaded[0] is loaded[1]


# ------------------------------------------------------------------------------------------------------- tensors, torch


def test_dtype_and_size_are_values() -> None:
    loaded = read(torch_pickle([torch.bfloat16, torch.Size([2, 3])]))
    assert loaded == [TorchDType("bfloat16"), Size((2, 3))]
    assert type(loaded[1]) is Size


STORAGE_KINDS = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
    torch.complex64: "ComplexFloatStorage",
    torch.complex128: "ComplexDoubleStorage",
}


@pytest.mark.parametrize(
    "dtype", [*STORAGE_KINDS, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64], ids=str
)
def test_dense_tensor_is_a_reference_into_a_storage(dtype: torch.dtype) -> None:
    tensor = torch.zeros(4, 6, dtype=dtype)
    view = tensor[1:, ::2]
    kind = STORAGE_KINDS.get(dtype, "UntypedStorage")
    numel = 24 if dtype in STORAGE_KINDS else 24 * dtype.itemsize
    expected = TensorRef(StorageRef(kind, "0", "cpu", numel), str(dtype).removeprefix("torch."), 6, (3, 3), (6, 2))
    assert read(torch_pickle(view)) == expected


def test_parameter_says_so() -> None:
    loaded = read(torch_pickle(torch.nn.Parameter(torch.zeros(3))))
    assert (type(loaded), loaded.is_parameter, loaded.requires_grad) == (TensorRef, True, True)


def test_conjugate_and_negative_bits_are_kept() -> None:
    conjugate = torch.zeros(2, dtype=torch.complex64).conj()
    assert (read(torch_pickle(conjugate)).conj, read(torch_pickle(conjugate)).neg) == (True, False)
    assert read(torch_pickle(conjugate.imag)).neg is True


def test_tied_tensors_share_a_storage_key() -> None:
    tensor = torch.zeros(4)
    loaded = read(torch_pickle({"a": tensor, "b": tensor, "c": torch.ones(4)}))
    assert [loaded[name].storage.key for name in "abc"] == ["0", "0", "1"]


def test_tensor_with_attributes_shows_its_inner_tensor() -> None:
    tensor = torch.zeros(3)
    tensor.origin = "here"  # type: ignore[attr-defined]
    loaded = read(torch_pickle(tensor))
    assert isinstance(loaded, Rebuilt)
    assert loaded.cls == Global("torch", "Tensor")
    assert loaded.inner == TensorRef(StorageRef("FloatStorage", "0", "cpu", 3), "float32", 0, (3,), (1,))
    assert loaded.attr("origin") == "here"


def test_parameter_with_attributes_shows_its_inner_parameter() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.origin = "here"  # type: ignore[attr-defined]
    loaded = read(torch_pickle(parameter))
    assert (loaded.cls.name, loaded.inner.is_parameter, loaded.attr("origin")) == ("Parameter", True, "here")


@pytest.mark.filterwarnings("ignore")
def test_quantized_tensor_has_its_integers_and_its_quantizer() -> None:
    quantized = torch.quantize_per_tensor(torch.zeros(2, 2), 0.5, 3, torch.qint8)
    loaded = read(torch_pickle(quantized))
    assert isinstance(loaded, QTensorRef)
    assert loaded.tensor == TensorRef(StorageRef("QInt8Storage", "0", "cpu", 4), "qint8", 0, (2, 2), (2, 1))
    assert loaded.quantizer == (Global("torch", "per_tensor_affine"), 0.5, 3)


def test_other_tensors_stay_inert() -> None:
    loaded = read(torch_pickle([torch.eye(2).to_sparse(), torch.zeros(2, device="meta"), torch.device("cuda", 1)]))
    assert [item.cls.name for item in loaded] == [
        "_rebuild_sparse_tensor",
        "_rebuild_meta_tensor_no_storage",
        "device",
    ]


@pytest.mark.filterwarnings("ignore")
def test_dtensor_shows_its_local_tensor_and_where_it_belongs() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
        loaded = read(torch_pickle(distribute_tensor(torch.zeros(6, 4), mesh, [Shard(0)])))
    finally:
        torch.distributed.destroy_process_group()
    assert isinstance(loaded, Rebuilt)
    assert loaded.cls == Global("torch.distributed.tensor", "DTensor")
    assert loaded.attr("_local_tensor").size == (3, 4)
    spec = loaded.attr("_spec")
    assert [(placement.cls.name, placement.attr("dim")) for placement in spec.attr("placements")] == [("Shard", 0)]
    assert spec.attr("tensor_meta").cls.name == "TensorMeta"
    assert spec.attr("tensor_meta").args[0] == Size((6, 4))


@pytest.mark.parametrize(
    "change",
    [
        lambda args: (args[0], -1, *args[2:]),
        lambda args: (*args[:2], (2, 2), *args[3:]),
        lambda args: (*args[:2], [4], *args[3:]),
        lambda args: (*args[:2], (2.0,), *args[3:]),
        lambda args: (*args[:3], (-1,), *args[4:]),
        lambda args: (*args[:2], (2**63,), *args[3:]),
        lambda args: ("storage", *args[1:]),
        lambda args: args[:2],
        lambda args: (*args, {}, {}),
    ],
)
def test_tensor_that_contradicts_itself_is_corrupt(change: Any) -> None:
    rebuild, args = torch.zeros(4).__reduce_ex__(2)

    class WithStorage(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(obj, torch.TypedStorage) else None

    file = io.BytesIO()
    WithStorage(file, 2).dump(Executes(rebuild, *change(args)))
    with pytest.raises(Corrupt, match="here"):
        read(file.getvalue())


def test_legacy_file_is_pickles_back_to_back() -> None:
    file = io.BytesIO()
    torch.save({"w": torch.zeros(3)}, file, _use_new_zipfile_serialization=False)
    data = file.getvalue()
    offset, objects = 0, []
    for _ in range(5):
        obj, offset = load_from(data, offset, where="here")
        objects.append(obj)
    assert objects[0] == 0x1950A86A20F9469CFC6C
    assert objects[2]["little_endian"] is True
    key = objects[3]["w"].storage.key
    assert objects[4] == [key]
    assert data[offset : offset + 8] == struct.pack("<q", 3)


def test_persistent_load_of_the_caller_is_used() -> None:
    loaded = read(torch_pickle([torch.zeros(2).untyped_storage()]), persistent_load=lambda pid: pid)
    assert loaded == [("storage", Global("torch.storage", "UntypedStorage"), "0", "cpu", 8)]


# ------------------------------------------------------------------------------------------------------ DCP's .metadata


def metadata_pickle(num_tensors: int = 2, num_chunks: int = 3) -> bytes:
    chunks = [ChunkStorageMetadata(torch.Size([4 * n, 0]), torch.Size([4, 5])) for n in range(num_chunks)]
    size = torch.Size([4 * num_chunks, 5])
    tensors = {
        f"w{n}": TensorStorageMetadata(TensorProperties(torch.bfloat16), size, chunks) for n in range(num_tensors)
    }
    storage = {
        MetadataIndex(name, chunk.offsets): _StorageInfo(f"__{n}_0.distcp", 10, 20)
        for name in tensors
        for n, chunk in enumerate(chunks)
    }
    storage[MetadataIndex("step")] = _StorageInfo("__0_0.distcp", 0, 10)
    return pickle.dumps(Metadata({**tensors, "step": BytesStorageMetadata()}, {"w0": ("model", "w0")}, storage))


def test_dcp_metadata_comes_as_records() -> None:
    loaded = read(metadata_pickle(), records=DCP_RECORDS)
    assert isinstance(loaded, Record)
    assert loaded.cls == Global("torch.distributed.checkpoint.metadata", "Metadata")
    tensor = loaded.attr("state_dict_metadata")["w1"]
    assert tensor.attr("size") == (12, 5)
    assert tensor.attr("properties").state[0] == TorchDType("bfloat16")
    assert [chunk.attr("offsets") for chunk in tensor.attr("chunks")] == [(0, 0), (4, 0), (8, 0)]
    places = {
        (index.attr("fqn"), index.attr("offset")): (info.attr("relative_path"), info.attr("length"))
        for index, info in loaded.attr("storage_data").items()
    }
    assert places["w0", (4, 0)] == ("__1_0.distcp", 20)
    assert places["step", None] == ("__0_0.distcp", 10)
    assert loaded.attr("state_dict_metadata")["step"].state is None


def test_dcp_metadata_without_records_is_inert_and_equal() -> None:
    loaded = read(metadata_pickle())
    assert isinstance(loaded, Inert)
    chunk = loaded.attr("state_dict_metadata")["w0"].attr("chunks")[1]
    assert (chunk.cls.name, chunk.attr("sizes")) == ("ChunkStorageMetadata", (4, 5))


def test_records_are_matched_by_their_last_name() -> None:
    data = b"\x80\x02cmine.filesystem\n_StorageInfo\n)\x81}X\x01\x00\x00\x00aK\x01sb."
    loaded = read(data, records=DCP_RECORDS)
    assert isinstance(loaded, Record)
    assert (loaded.cls, loaded.attr("a")) == (Global("mine.filesystem", "_StorageInfo"), 1)


# -------------------------------------------------------------------------------------------------------- inert objects


def test_unknown_object_keeps_class_arguments_and_state() -> None:
    loaded = read(pickle.dumps(Config(3, 4), 2))
    assert isinstance(loaded, Inert)
    assert (loaded.cls, loaded.constructor, loaded.args) == (Global(__name__, "Config"), "newobj", ())
    assert loaded.state == {"width": 3, "depth": 4}
    assert (loaded.attr("depth"), loaded.attr("height", "none")) == (4, "none")


def test_slots_are_attributes_too() -> None:
    slotted = Slotted()
    slotted.first, slotted.second = 1, 2
    loaded = read(pickle.dumps(slotted))
    assert loaded.state == {"first": 1, "second": 2}
    assert loaded.attr("second") == 2


def test_items_of_a_subclass_are_recorded_in_order() -> None:
    numbered = NumberedDict(a=1, b=2)
    numbered.number = 7
    loaded = read(pickle.dumps(numbered, 4))
    assert loaded.changes == [("setitem", ("a", 1)), ("setitem", ("b", 2)), ("build", {"number": 7})]


def test_class_of_an_old_protocol_object_is_its_class_not_copyreg() -> None:
    loaded = read(pickle.dumps(Config(1, 2), 0))
    assert loaded.cls == Global(__name__, "Config")
    assert loaded.maker.name == "_reconstructor"


def test_reference_to_a_class_is_a_global() -> None:
    assert read(pickle.dumps([Config, os.path.join, dict], 4)) == [
        Global(__name__, "Config"),
        Global("posixpath", "join"),
        Global("builtins", "dict"),
    ]


def test_nested_class_has_its_qualified_name_in_any_protocol() -> None:
    assert [read(pickle.dumps(Outer.Inner, protocol)) for protocol in (2, 4)] == [Global(__name__, "Outer.Inner")] * 2


def test_cycles_are_kept() -> None:
    config = OmegaConf.create({"model": {"layers": [1, 2], "name": "tiny"}})
    loaded = read(pickle.dumps(config, 2))
    assert loaded.cls == Global("omegaconf.dictconfig", "DictConfig")
    model = loaded.attr("_content")["model"]
    assert model.attr("_parent") is loaded
    assert model.attr("_content")["name"].attr("_val") == "tiny"


@pytest.mark.parametrize("protocol", [2, 4])
def test_paths_mean_the_same_on_any_system(protocol: int) -> None:
    paths = [pathlib.PosixPath("/a/b"), pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("c:\\x\\y")]
    loaded = [as_path(item) for item in read(pickle.dumps(paths, protocol))]
    assert loaded == [pathlib.PurePosixPath(text) for text in ("/a/b", "a", "c:/x/y")]
    assert as_path(read(b"\x80\x02cpathlib._local\nPosixPath\nX\x01\x00\x00\x00q\x85R.")) == pathlib.PurePosixPath("q")
    assert as_path("text") is None


def test_numpy_datetime_and_streams_stay_inert() -> None:
    values = [np.float32(1), np.arange(3), datetime.timedelta(1), io.BytesIO(b"x"), slice(1, 2), range(3)]
    assert all(isinstance(item, Inert) for item in read(pickle.dumps(values)))


# -------------------------------------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_call_is_recorded_not_made(protocol: int, tmp_path: pathlib.Path) -> None:
    loaded = read(pickle.dumps(Executes(os.system, f"touch {tmp_path}/ran"), protocol))
    assert (loaded.cls, loaded.args) == (Global("posix", "system"), (f"touch {tmp_path}/ran",))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_imported() -> None:
    assert "this" not in sys.modules
    assert read(b"cthis\nd\n.") == Global("this", "d")
    assert "this" not in sys.modules


def test_a_payload_that_is_popped_is_not_run(tmp_path: pathlib.Path) -> None:
    payload = pickle.dumps(Executes(os.mkdir, str(tmp_path / "ran")), 2)[2:-1]
    assert read(b"\x80\x02" + payload + b"0K\x07.") == 7
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "data",
    [
        b"c__builtin__\ngetattr\n(cos\nsystem\nS'__globals__'\ntR.",
        b"c__builtin__\ngetattr\n(c__builtin__\ngetattr\nS'__self__'\ntR.",
        b"c__builtin__\ngetattr\n(c__builtin__\neval\nS'__call__'\ntR(S'1'\ntR.",
        b"c__builtin__\neval\n(S'1/0'\ntR.",
        b"(S'1/0'\ni__builtin__\neval\n.",
        b"(c__builtin__\neval\nS'1/0'\no.",
    ],
)
def test_attribute_chains_reach_nothing(data: bytes) -> None:
    assert isinstance(read(data), (Global, Inert))


def test_getattr_of_a_value_is_recorded() -> None:
    loaded = read(b"c__builtin__\ngetattr\n(S'text'\nS'upper'\ntR.")
    assert (loaded.cls.name, loaded.args) == ("getattr", ("text", "upper"))


@pytest.mark.parametrize(
    "data",
    [
        b"ctorch\nfloat32\n}S'name'\nS'float64'\nsb.",
        b"ctorch\nfloat32\n(S'float64'\ntb.",
        b"ctorch\nfloat32\n(N}S'name'\nS'float64'\nstb.",
        b"cany\nClass\n}S'_name'\nNsb.",
        b"cany\nClass\n(N}S'_build'\nNstb.",
        b"cany\nClass\n(N}S'__new__'\nNstb.",
        b"ccollections\nOrderedDict\n(N}S'_build'\nNstb.",
        b"ctorch\nSize\n((K\x01ttR(N}S'x'\nNstb.",
        b"ccollections\nOrderedDict\n)R(N}S'items'\nNstb.",
    ],
)
def test_what_loads_share_cannot_be_changed(data: bytes) -> None:
    with pytest.raises(Corrupt, match="here"):
        read(data)
    assert read(b"ctorch\nfloat32\n.") == TorchDType("float32")
    assert read(b"cany\nClass\n)R.").cls == Global("any", "Class")


def test_state_cannot_shadow_a_method() -> None:
    loaded = read(b"ccollections\nOrderedDict\n)R}S'items'\nNsb.")
    assert list(loaded.items()) == []
    loaded = read(b"cany\nClass\n)\x81}(S'attr'\nNS'__class__'\nNS'__setstate__'\nNub.")
    assert loaded.attr("__class__", 1) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"N",
        b"R.",
        b"(.",
        b"0.",
        b"NR.",
        b"NN\x81.",
        b"]NN\x81.",
        b"K",
        b"X\xff\xff\xff\xffabc.",
        b"h\x05.",
        b"}]Ns.",
        b"}(NNNu.",
        b"\xff.",
        b"I1",
        b"Ix\n.",
        b"L" + b"9" * 5000 + b"L\n.",
        b"NQ.",
        b"Pname\n.",
        b"(U\x07storagecos\nsystem\nU\x010U\x03cpuK\x01tQ.",
        b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuJ\xff\xff\xff\xfftQ.",
        b"]\x93.",
        b"\x8c\x01a\x8c\x01b\x93(b.",
        b"c" + b"m" * 5000 + b"\nn\n.",
    ],
)
def test_broken_streams_say_where(data: bytes) -> None:
    with pytest.raises(ReshardError, match=r"^here: cannot read the pickle: "):
        read(data)


@pytest.mark.parametrize(
    "data", [b"\x82\x01.", b"\x83\x01\x00.", b"\x84\x01\x00\x00\x00.", b"\x97.", b"N\x98.", b"\x80\x63N."]
)
def test_what_points_outside_the_file_is_unsupported(data: bytes) -> None:
    with pytest.raises(Unsupported, match="here"):
        read(data)


@pytest.mark.parametrize("opcode", pickletools.opcodes, ids=lambda opcode: opcode.name)
def test_every_opcode_alone_is_read_or_refused(opcode: Any) -> None:
    for operand in (b"", b"\x00" * 8, b"\xff" * 8, b"1\nx\n", b"a\nb\n"):
        for stack in (b"", b"N", b"(N", b"](N", b"}(NN", b"cx\ny\n)", b"\x8c\x01a\x8c\x01b"):
            value_or_error(stack + opcode.code.encode("latin-1") + operand + b".")


@pytest.mark.parametrize(
    "data",
    [
        b"Nr\xff\xff\xff\x3f.",
        b"Np900000000\n.",
        b"Np99999999999999999999\n.",
        b"\x8e" + struct.pack("<Q", 1 << 40) + b".",
        b"\x8d" + struct.pack("<Q", 1 << 40) + b".",
        b"\x96" + struct.pack("<Q", 1 << 40) + b".",
        b"\x96" + struct.pack("<Q", 1 << 63) + b".",
        b"B" + struct.pack("<I", 1 << 31) + b".",
        b"T" + struct.pack("<i", -1) + b".",
        b"\x8b" + struct.pack("<I", (1 << 31) - 1) + b".",
        b"\x95" + struct.pack("<Q", 1 << 40) + b"N.",
        b"c__builtin__\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
        b"c__builtin__\nrange\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
        b"c__builtin__\nlist\nc__builtin__\nrange\nJ\xff\xff\xff\x7f\x85R\x85R.",
    ],
)
def test_a_claim_allocates_nothing(data: bytes) -> None:
    read(b"N.")
    tracemalloc.start()
    value_or_error(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    "repeated",
    [
        b"c__builtin__\nset\nh\x00\x85R",
        b"ccollections\nCounter\nh\x01\x85R",
        b"ctorch\nSize\nh\x02\x85R",
        b"cx\ny\nh\x02R",
        b"cx\ny\nh\x02\x81",
        b"c_codecs\nencode\nh\x03X\x06\x00\x00\x00latin1\x86R",
        b"c__builtin__\nbytearray\nh\x04\x85R",
    ],
)
def test_copies_of_copies_are_refused(repeated: bytes) -> None:
    items = b"".join(b"M" + struct.pack("<H", n) for n in range(5000))
    pairs = b"".join(b"M" + struct.pack("<H", n) + b"N" for n in range(5000))
    text = (
        b"X"
        + struct.pack("<I", 9000)
        + b"x" * 9000
        + b"q\x03"
        + b"B"
        + struct.pack("<I", 9000)
        + b"x" * 9000
        + b"q\x04"
    )
    data = (
        b"\x80\x03]("
        + items
        + b"eq\x00}("
        + pairs
        + b"uq\x01("
        + items
        + b"tq\x02"
        + text
        + b"]("
        + repeated * 200
        + b"e."
    )
    with pytest.raises(Corrupt, match="over and over"):
        read(data)


def test_too_many_classes_are_unsupported() -> None:
    with pytest.raises(Unsupported, match="classes"):
        read(b"(" + b"".join(b"cm\nn%d\n" % n for n in range(10_001)) + b"t.")


def test_nesting_as_deep_as_the_file_is_read_and_freed() -> None:
    depth = 200_000
    assert type(read(b"]" * depth + b"a" * (depth - 1) + b".")) is list
    assert type(read(b")" + b"\x85" * 900 + b".")) is tuple
    deep = read(b"cx\ny\nq\x000)" + b"q\x010h\x00h\x01\x85R" + b"q\x010h\x00h\x01\x85R" * depth + b".")
    assert isinstance(deep, Inert)
    del deep


@pytest.mark.parametrize(
    "rebuild", [b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch._utils\n_rebuild_parameter_with_state\n"]
)
def test_nested_rebuilds_end(rebuild: bytes) -> None:
    data = rebuild + b"q\x000)q\x01" + b"0(h\x00Nh\x01Ntq\x01" * 5000 + b"0h\x00h\x01R."
    value_or_error(data)


@pytest.mark.parametrize("options", [{}, {"records": DCP_RECORDS}])
@pytest.mark.parametrize(
    "key",
    [
        b")" + b"\x85" * 900_000,
        b")" + b"\x85NN00" * 100_000,
        b")" + b"2\x86" * 60,
        b")q\x00" + b"h\x00h\x00\x86q\x00" * 60,
        b")\x94" + b"".join(b"(h%ch%cNt\x94" % (n, n) for n in range(60)),
        b")p0\n" + b"g0\ng0\n\x86p0\n" * 60,
        b"(" * 60 + b")" + b"2t" * 60,
    ],
)
def test_a_key_that_cannot_be_hashed_is_refused(key: bytes, options: Any) -> None:
    with pytest.raises(Corrupt, match="nests tuples"):
        read(b"}" + key + b"Ns.", **options)


def test_a_tuple_that_is_shared_often_is_no_bomb() -> None:
    shared = (0.9, 0.999)
    assert len(read(pickle.dumps([{"betas": shared, "key": (shared, shared)} for _ in range(2_000)], 2))) == 2_000


def test_garbage_collection_is_left_as_it_was() -> None:
    assert gc.isenabled()
    read(b"N.")
    with pytest.raises(Corrupt):
        read(b"R.")
    assert gc.isenabled()
    gc.disable()
    try:
        read(b"N.")
        assert not gc.isenabled()
    finally:
        gc.enable()


SEEDS = [
    metadata_pickle(),
    torch_pickle(torch.nn.Linear(2, 3).state_dict()),
    torch_pickle({"p": torch.nn.Parameter(torch.zeros(2)), "s": torch.Size([1]), "d": torch.float16}),
    *(
        pickle.dumps(
            [Config(1, 2), NumberedDict(a=1), Slotted(), np.arange(3), {1, 2}, collections.Counter("ab"), Outer.Inner],
            protocol,
        )
        for protocol in (2, 4)
    ),
    pickle.dumps([Config(1, 2), 1.5, "text", {"a": b"x"}], 0),
]


@given(data=st.data(), seed=st.sampled_from(SEEDS), as_records=st.booleans())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_change_to_a_real_pickle_gives_a_value_or_our_error(data: Any, seed: bytes, as_records: bool) -> None:
    changed = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(0, len(changed)))
        length = data.draw(st.integers(0, 4))
        changed[position : position + length] = data.draw(
            st.binary(max_size=6)
            | st.sampled_from(pickletools.opcodes).map(lambda opcode: opcode.code.encode("latin-1"))
        )
    value_or_error(bytes(changed), records=DCP_RECORDS if as_records else frozenset())
    globals_in(bytes(changed))


@given(
    data=st.lists(
        st.sampled_from(pickletools.opcodes).map(lambda opcode: opcode.code.encode("latin-1")) | st.binary(max_size=3)
    )
)
@settings(max_examples=400, deadline=None)
def test_any_bytes_give_a_value_or_our_error(data: list[bytes]) -> None:
    value_or_error(b"".join(data) + b".")
    globals_in(b"".join(data))


def test_torch_is_not_needed() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from reshard.storage import unpickle\n"
        "print(unpickle.load(sys.stdin.buffer.read(), where='x')['w'].size)"
    )
    data = torch_pickle({"w": torch.zeros(2, 3)})
    assert (
        subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True).stdout
        == b"(2, 3)\n"
    )


# ---------------------------------------------------------------------------------------------------------------- audit


def test_audit_lists_what_a_pickle_would_import() -> None:
    for protocol in (0, 2, 4):
        data = pickle.dumps([Executes(os.system, "true"), collections.OrderedDict()], protocol)
        found = globals_in(data)
        assert {(item.module, item.name) for item in found} >= {("posix", "system"), ("collections", "OrderedDict")}
        assert [item for item in found if not is_known(item)] == [Global("posix", "system")]


def test_audit_sees_through_the_stack() -> None:
    assert globals_in(b"\x80\x04\x8c\x06system\x94\x8c\x02os\x94NN00h\x01h\x000h\x00\x93.") == [Global("os", "system")]


def test_audit_of_a_broken_pickle_shows_what_it_asks_for_before() -> None:
    assert globals_in(b"cos\nsystem\nRRRccollections\nOrderedDict\n") == [
        Global("collections", "OrderedDict"),
        Global("os", "system"),
    ]


def test_everything_a_stock_checkpoint_names_is_known() -> None:
    state_dict = torch.nn.Linear(2, 3).state_dict()
    for data in (
        metadata_pickle(),
        torch_pickle(state_dict),
        torch_pickle(torch.optim.Adam([torch.zeros(1)]).state_dict()),
    ):
        assert [item for item in globals_in(data) if not is_known(item)] == []
