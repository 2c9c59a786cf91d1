"""The pickle writer, held against the real unpicklers: a rewritten pickle must give them what the original gives."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import io
import pathlib
import pickle
import uuid
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from reshard.errors import Unsupported
from reshard.storage.pickler import dumps
from reshard.storage.unpickle import Global, OrderedDict, Size, StorageRef, TensorRef, TorchDType, load


def rewritten(data: bytes, protocol: int = 2) -> bytes:
    return dumps(load(data, where="here"), protocol=protocol)


def torch_members(obj: object) -> dict[str, bytes]:
    file = io.BytesIO()
    torch.save(obj, file)
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def torch_load(members: dict[str, bytes], *, weights_only: bool) -> Any:
    """What torch.load makes of an archive with these members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=weights_only)


def through_torch(obj: object, *, weights_only: bool = True) -> Any:
    members = torch_members(obj)
    return torch_load(
        {**members, "archive/data.pkl": rewritten(members["archive/data.pkl"])}, weights_only=weights_only
    )


@dataclasses.dataclass
class Config:
    width: int
    names: list[str] = dataclasses.field(default_factory=list)
    parent: Any = None


class Colour(enum.Enum):
    RED = 1


class Slotted:
    __slots__ = ("first", "second")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slotted) and (self.first, self.second) == (other.first, other.second)

    __hash__ = None  # type: ignore[assignment]


class NumberedDict(dict):  # type: ignore[type-arg]
    pass


class NumberedList(list):  # type: ignore[type-arg]
    pass


class NumberedSet(set):  # type: ignore[type-arg]
    pass


class Keywords:
    """Made by `__new__` with keywords."""

    def __new__(cls, *, width: int) -> Keywords:
        made = super().__new__(cls)
        made.width = width  # type: ignore[attr-defined]
        return made

    def __getnewargs_ex__(self) -> Any:
        return (), {"width": self.width}  # type: ignore[attr-defined]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keywords) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


Point = collections.namedtuple("Point", "x y")


class Outer:
    class Inner:
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Outer.Inner)

        __hash__ = None  # type: ignore[assignment]


def slotted() -> Slotted:
    made = Slotted()
    made.first, made.second = 1, [2]
    return made


def numbered(made: Any) -> Any:
    made.number = 7
    return made


VALUES = [
    {"a": [1, 2.5, None, True], "b": (1, (2, 3), "x", b"\x00\xff"), "": b""},
    [0, 255, 256, 65535, 65536, -1, -128, -129, -(2**31), 2**31, -(2**63), 2**63, 2**2000, -(2**2039)],
    ["é", "\ud800", "x" * 70_000],
    list(range(2_500)),
    {n: str(n) for n in range(2_500)},
    {1, 2},
    frozenset("ab"),
    bytearray(b"ab"),
    complex(1, -2),
    collections.OrderedDict(b=1, a=2),
    collections.Counter("hello"),
    collections.defaultdict(list, a=[1]),
    Config(1, ["a"], Config(2)),
    Colour.RED,
    slotted(),
    numbered(NumberedDict(a=1, b=2)),
    numbered(NumberedList([1, 2])),
    numbered(NumberedSet([1, 2])),
    Keywords(width=3),
    Point(1, 2),
    Outer.Inner(),
    Outer.Inner,
    pathlib.PurePosixPath("/a/b"),
    pathlib.PureWindowsPath("c:\\a"),
    datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
    datetime.timedelta(1, 2),
    decimal.Decimal("1.5"),
    uuid.UUID(int=5),
    np.float32(1.5),
    np.dtype("int32"),
    argparse.Namespace(a=1, b=[2]),
    OmegaConf.create({"model": {"layers": [1, None], "name": "${other}"}, "other": "tiny"}),
    slice(1, 2, 3),
    range(3),
    [int, dict, len, pathlib.Path, collections.OrderedDict],
]


@pytest.mark.parametrize("written", [2, 4])
@pytest.mark.parametrize("read", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_python_reads_a_rewritten_pickle_as_the_original(value: object, read: int, written: int) -> None:
    if isinstance(value, Slotted) and read < 2:
        pytest.skip("slots need protocol 2")
    data = pickle.dumps(value, read)
    assert pickle.loads(rewritten(data, written)) == pickle.loads(data)


def test_numpy_array_is_rewritten() -> None:
    array = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(pickle.loads(rewritten(pickle.dumps(array, 2))), array)


def test_stream_is_rewritten() -> None:
    assert pickle.loads(rewritten(pickle.dumps(io.BytesIO(b"abc"), 2))).getvalue() == b"abc"


def test_types_are_rewritten_not_only_values() -> None:
    for value in VALUES:
        if not isinstance(value, range):
            assert type(pickle.loads(rewritten(pickle.dumps(value, 2)))) is type(value)


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda children: (
        st.lists(children) | st.tuples(children, children) | st.dictionaries(st.text() | st.integers(), children)
    ),
)


@given(value=nested, protocol=st.sampled_from([2, 4]))
def test_python_reads_any_plain_value_back(value: Any, protocol: int) -> None:
    assert pickle.loads(dumps(value, protocol=protocol)) == value


# ------------------------------------------------------------------------------------------------ references and cycles


def test_shared_references_stay_shared() -> None:
    shared = Config(1)
    loaded = pickle.loads(rewritten(pickle.dumps([shared, shared, ("t", shared)], 2)))
    assert loaded[0] is loaded[1] is loaded[2][1]


def test_object_that_holds_itself_is_rewritten() -> None:
    config = Config(1)
    config.parent = {"child": config}
    loaded = pickle.loads(rewritten(pickle.dumps(config, 2)))
    assert loaded.parent["child"] is loaded


def test_list_and_tuple_that_hold_each_other_are_rewritten() -> None:
    for length in (1, 3, 5):
        items: list[Any] = []
        pair = (items,) * length
        items.append(pair)
        loaded = pickle.loads(rewritten(pickle.dumps(items, 2)))
        assert loaded[0][length - 1] is loaded
        loaded = pickle.loads(rewritten(pickle.dumps(pair, 2)))
        assert loaded[0][0] is loaded


def test_call_whose_arguments_hold_its_result_is_rewritten() -> None:
    data = b"c__builtin__\nslice\n(]q\x01NNtRq\x020h\x01h\x02a."  # items = []; items.append(slice(items, None, None))
    for loaded in (pickle.loads(data), pickle.loads(rewritten(data))):
        assert loaded[0].start is loaded


def test_parents_of_omegaconf_nodes_are_rewritten() -> None:
    config = OmegaConf.create({"a": {"b": 1}})
    assert pickle.loads(rewritten(pickle.dumps(config, 2))).a._get_parent() == config


def test_depth_is_bounded_by_memory_only() -> None:
    depth = 50_000
    data = rewritten(b"]" * depth + b"a" * (depth - 1) + b".")
    loaded = load(data, where="here")
    count = 1
    while loaded:
        loaded, count = loaded[0], count + 1
    assert count == depth


def test_changes_are_replayed_in_order() -> None:
    data = (
        b"\x80\x02c" + __name__.encode() + b"\nNumberedDict\n)\x81}X\x01\x00\x00\x00aK\x01sbX\x01\x00\x00\x00bK\x02sX"
    )
    data += b"\x01\x00\x00\x00cK\x03s}X\x01\x00\x00\x00aK\x04sb."
    loaded = pickle.loads(rewritten(data))
    assert (loaded, vars(loaded)) == ({"b": 2, "c": 3}, {"a": 4})


# -------------------------------------------------------------------------------------------------------------- tensors


def test_torch_loads_a_rewritten_state_dict() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    loaded = through_torch(model.state_dict())
    assert list(loaded) == list(model.state_dict())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    assert loaded._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.complex64, torch.complex32),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    ],
    ids=str,
)
def test_every_dtype_is_written_as_torch_writes_it(dtype: torch.dtype) -> None:
    members = torch_members({"w": torch.zeros(2, 3).to(dtype)})
    assert rewritten(members["archive/data.pkl"]) == members["archive/data.pkl"]
    loaded = torch_load(members, weights_only=True)["w"]
    assert (loaded.dtype, loaded.shape) == (dtype, (2, 3))


def test_views_keep_offset_and_strides() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    loaded = through_torch({"base": base, "view": base[1:, ::2], "turned": base.T})
    assert torch.equal(loaded["view"], base[1:, ::2])
    assert loaded["turned"].stride() == (1, 6)
    assert loaded["turned"].untyped_storage().data_ptr() == loaded["base"].untyped_storage().data_ptr()


def test_lazy_bits_are_kept() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j]).conj()
    loaded = through_torch(tensor)
    assert loaded.is_conj()
    assert torch.equal(loaded.resolve_conj(), tensor.resolve_conj())
    assert through_torch(tensor.imag).is_neg()


def test_parameters_and_attributes_are_kept() -> None:
    tensor = torch.ones(2)
    tensor.origin = "here"  # type: ignore[attr-defined]
    parameter = torch.nn.Parameter(torch.ones(3))
    with_attribute = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    with_attribute.origin = "there"  # type: ignore[attr-defined]
    loaded = through_torch([tensor, parameter, with_attribute], weights_only=False)
    assert (loaded[0].origin, type(loaded[1]), loaded[1].requires_grad) == ("here", torch.nn.Parameter, True)
    assert (loaded[2].origin, type(loaded[2]), loaded[2].requires_grad) == ("there", torch.nn.Parameter, False)


def test_sparse_and_whole_modules_are_kept() -> None:
    model = torch.nn.Linear(2, 3)
    loaded = through_torch([torch.eye(2).to_sparse(), model], weights_only=False)
    assert torch.equal(loaded[0].to_dense(), torch.eye(2))
    assert torch.equal(loaded[1].weight, model.weight)


@pytest.mark.filterwarnings("ignore")
def test_quantized_tensors_are_kept() -> None:
    quantized = torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8)
    assert torch.equal(through_torch(quantized, weights_only=False).int_repr(), quantized.int_repr())


def test_leaves_of_torch_are_kept() -> None:
    leaves = {"size": torch.Size([2]), "dtype": torch.float16, "device": torch.device("cpu"), "class": torch.nn.Linear}
    loaded = through_torch(leaves, weights_only=False)
    assert loaded == leaves
    assert type(loaded["size"]) is torch.Size


@pytest.mark.parametrize(
    "ref, expected",
    [
        (TensorRef(StorageRef("FloatStorage", "0", "cpu", 6), "float32", 0, (2, 3), (3, 1)), torch.zeros(2, 3)),
        (
            TensorRef(StorageRef("UntypedStorage", "0", "cpu", 24), "float8_e4m3fn", 0, (2, 3), (3, 1)),
            torch.zeros(2, 3).to(torch.float8_e4m3fn),
        ),
    ],
)
def test_new_file_of_tensors_passes_weights_only(ref: TensorRef, expected: torch.Tensor) -> None:
    members = {"archive/data.pkl": dumps(OrderedDict(w=ref)), "archive/data/0": bytes(24), "archive/version": b"3\n"}
    loaded = torch_load(members, weights_only=True)["w"]
    assert (loaded.dtype, loaded.shape) == (expected.dtype, expected.shape)


def test_state_dict_is_byte_for_byte_what_torch_writes() -> None:
    data = torch_members(torch.nn.Linear(2, 3).state_dict())["archive/data.pkl"]
    assert rewritten(data) == data


def test_persistent_id_of_the_caller_is_written() -> None:
    ref = TensorRef(StorageRef("FloatStorage", "a", "cuda:3", 6), "float32", 0, (6,), (1,))

    def renamed(obj: object) -> object:
        if isinstance(obj, StorageRef):
            return ("storage", Global("torch", obj.kind), "7", "cpu", obj.numel)
        return None

    assert load(dumps([ref], persistent_id=renamed), where="here")[0].storage == StorageRef(
        "FloatStorage", "7", "cpu", 6
    )


# --------------------------------------------------------------------------------------------------------------- limits


def test_value_of_an_unknown_type_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="Config"):
        dumps({"a": Config(1)})


def test_names_that_a_pickle_cannot_hold_are_unsupported() -> None:
    for name in ("two\nlines", "\ud800", ""):
        with pytest.raises(Unsupported, match="class name"):
            dumps(Global("module", name))


def test_only_two_protocols_are_written() -> None:
    with pytest.raises(Unsupported, match="protocol 5"):
        dumps(1, protocol=5)


def test_values_of_ours_are_written_as_torchs() -> None:
    assert pickle.loads(dumps([Size((1, 2)), TorchDType("int8")])) == [torch.Size([1, 2]), torch.int8]


def test_bytes_do_not_depend_on_who_made_equal_names() -> None:
    def pair(module: str) -> list[object]:
        return [Global("package.module", "One"), Global(module, "Two")]

    again = "".join(["package", ".module"])
    assert again is not pair("")[0].module  # type: ignore[attr-defined]
    assert dumps(pair(again), protocol=4) == dumps(pair("package.module"), protocol=4)
