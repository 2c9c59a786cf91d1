"""Single files of torch.save: torch reads what is written here, and here is read what torch wrote."""

from __future__ import annotations

import io
import os
import pickle
import random
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.serialization as serialization

from reshard.core.checkpoint import Checkpoint
from reshard.core.dtypes import dtype
from reshard.core.tensor import Deferred, concat, leaves
from reshard.errors import Corrupt, Incomplete, NotFound, ReshardError, Unsupported
from reshard.formats import torch_save
from reshard.storage.files import Files, Ledger, Reader
from reshard.storage.plan import Plan
from reshard.storage.run import run
from reshard.storage.unpickle import Global, Inert, TorchDType

DATA = Path(__file__).parent / "data" / "torch"

DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64", "bool", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
]

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:.*TypedStorage")


def noise(shape: tuple[int, ...], kind: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A tensor of random bits."""
    generator = torch.Generator().manual_seed(seed)
    nbytes = int(np.prod(shape)) * kind.itemsize
    top = 2 if kind is torch.bool else 256
    return torch.randint(0, top, (nbytes,), dtype=torch.uint8, generator=generator).view(kind).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    """Its elements row-major, as they are in memory once conjugation and sign are applied."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def assert_holds(checkpoint: Checkpoint, expected: Mapping[str, torch.Tensor]) -> None:
    """Names, dtypes, shapes and bits."""
    assert list(checkpoint) == list(expected)
    for name, tensor in expected.items():
        mine = checkpoint.tensors[name]
        assert (mine.dtype.torch, mine.shape) == (str(tensor.dtype)[6:], tuple(tensor.shape)), name
        assert mine.read(checkpoint.source).tobytes() == bits(tensor), name


def everything() -> dict[str, torch.Tensor]:
    """Every dtype, and every way to lie in a storage."""
    big = noise((10, 6), torch.float32)
    found: dict[str, torch.Tensor] = {}
    for number, name in enumerate(DTYPES):
        kind = getattr(torch, name)
        found[f"{name}.matrix"] = noise((5, 7), kind, number)
        found[f"{name}.empty"] = torch.empty((0, 3), dtype=kind)
        if name != "float4_e2m1fn_x2":
            found[f"{name}.scalar"] = noise((1,), kind, number).reshape(())
    found |= {
        "whole": big,
        "tied": big,
        "rows": big[2:5],
        "columns": big[:, 1:3],
        "step": big[::3, ::2],
        "transposed": big.T,
        "expanded": big[0, 0].expand(3, 2),
        "tail": big.flatten()[-7:],
        "images": noise((2, 3, 4, 5), torch.float32).to(memory_format=torch.channels_last),
        "conjugate": noise((3,), torch.complex64).conj(),
        "negative": noise((4,), torch.complex128).conj().imag,
        "parameter": torch.nn.Parameter(noise((3, 2), torch.float32)),
        "unicode ü.∂": noise((2,), torch.int64),
    }
    return found


def saved(value: object, path: Path, **how: Any) -> Path:
    torch.save(value, path, **how)
    return path


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("alignment", [64, 4096])
def test_every_dtype_and_view_is_read_bit_for_bit(tmp_path: Path, protocol: int, alignment: int) -> None:
    state = everything()
    with serialization.config.patch({"save.storage_alignment": alignment}):
        path = saved(state, tmp_path / "m.pt", pickle_protocol=protocol)
    checkpoint = torch_save.open(path)
    assert_holds(checkpoint, state)
    assert checkpoint.notices == ()
    assert checkpoint.origin.files == (path,)


def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    state = everything()
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(state, tmp_path / "m.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_holds(torch_save.open(path), state)


@pytest.mark.parametrize("protocol", [2, 4])
def test_legacy_streams_are_read(tmp_path: Path, protocol: int) -> None:
    state = everything()
    path = saved(state, tmp_path / "m.pt", _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    assert_holds(torch_save.open(path), state)


def test_legacy_streams_with_a_pickle_of_several_megabytes_are_read(tmp_path: Path) -> None:
    state = {"note": "x" * 3_000_000, "w": noise((3,), torch.float32)}
    checkpoint = torch_save.open(saved(state, tmp_path / "m.pt", _use_new_zipfile_serialization=False))
    assert_holds(checkpoint, {"w": state["w"]})
    assert checkpoint.objects["note"] == state["note"]


def test_files_of_torch_2_2_are_read_in_both_formats() -> None:
    expected = torch.load(DATA / "files_2.2.2" / "zip.pt", weights_only=True)
    for name in ("zip.pt", "legacy.pt"):
        assert_holds(torch_save.open(DATA / "files_2.2.2" / name), expected)


def test_a_big_endian_machines_file_holds_the_same_numbers() -> None:
    expected = torch.load(DATA / "files_2.13.0" / "little.pt", weights_only=True)
    assert_holds(torch_save.open(DATA / "files_2.13.0" / "little.pt"), expected)
    assert_holds(torch_save.open(DATA / "files_2.13.0" / "bigendian.pt"), expected)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives_that_were_packed_again_are_read(tmp_path: Path, method: int) -> None:
    state = everything() | {"zeros": torch.zeros(1 << 20)}
    with (
        zipfile.ZipFile(saved(state, tmp_path / "m.pt")) as old,
        zipfile.ZipFile(tmp_path / "again.pt", "w", method) as new,
    ):
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    checkpoint = torch_save.open(tmp_path / "again.pt")
    assert_holds(checkpoint, state)
    assert_holds(checkpoint.located(), state)
    plan = Plan((torch_save.plan(checkpoint.located(), ""),))
    del checkpoint  # what was inflated must live as long as the plan
    run(plan, tmp_path / "out.pt")
    assert bits(torch.load(tmp_path / "out.pt")["zeros"]) == bits(state["zeros"])


def test_a_deflated_storage_that_is_not_as_long_as_stated_is_refused(tmp_path: Path) -> None:
    path = saved({"w": torch.zeros(1000)}, tmp_path / "m.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            data = bytes(1 << 24) if record.filename.endswith("/data/0") else old.read(record)
            new.writestr(record.filename, data)
    with pytest.raises(Corrupt, match="storage 0 has 16777216 bytes, the pickle says 4000"):
        torch_save.open(tmp_path / "bomb.pt")


def test_tensors_of_one_storage_are_read_from_one_extent(tmp_path: Path) -> None:
    big = noise((8, 4), torch.float32)
    checkpoint = torch_save.open(saved({"a": big, "b": big, "c": big[2:]}, tmp_path / "m.pt"))
    a, b, c = checkpoint.tensors.values()
    assert a is b
    assert {id(leaf.extent) for t in (a, c) for leaf in leaves(t)} == {id(next(leaves(a)).extent)}


def test_nesting_is_kept_as_paths_and_what_is_no_tensor_as_objects(tmp_path: Path) -> None:
    w = noise((2, 2), torch.bfloat16)
    state = {
        "state_dict": OrderedDict({"model.layers.0.weight": w}),
        "optimizer_states": [{"state": {0: {"exp_avg": w, "step": torch.tensor(3.0)}}, "param_groups": []}],
        "epoch": 3,
        "betas": (0.9, 0.999),
        "dtype": torch.float16,
        "nothing": {},
    }
    checkpoint = torch_save.open(saved(state, tmp_path / "last.ckpt"))
    assert_holds(
        checkpoint,
        {
            "state_dict.model.layers.0.weight": w,
            "optimizer_states.0.state.0.exp_avg": w,
            "optimizer_states.0.state.0.step": torch.tensor(3.0),
        },
    )
    assert checkpoint.path("state_dict.model.layers.0.weight") == ("state_dict", "model.layers.0.weight")
    assert checkpoint.path("optimizer_states.0.state.0.step") == ("optimizer_states", 0, "state", "0", "step")
    assert checkpoint.objects == {
        "optimizer_states.0.param_groups": [],
        "epoch": 3,
        "betas": (0.9, 0.999),
        "dtype": TorchDType("float16"),
        "nothing": {},
    }


def test_what_two_names_refer_to_is_listed_under_both_and_cycles_end(tmp_path: Path) -> None:
    state: dict[str, Any] = {"w": noise((2,), torch.float32)}
    both: dict[str, Any] = {"model": state, "ema": state}
    both["self"] = both
    checkpoint = torch_save.open(saved(both, tmp_path / "m.pt"))
    assert_holds(checkpoint, {"model.w": state["w"], "ema.w": state["w"]})


def test_a_bare_tensor_is_called_tensor(tmp_path: Path) -> None:
    w = noise((3,), torch.float16)
    checkpoint = torch_save.open(saved(w, tmp_path / "w.pt"))
    assert_holds(checkpoint, {"tensor": w})
    assert checkpoint.path("tensor") == ("tensor",)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    w = noise((3,), torch.float16)
    with pytest.raises(Unsupported, match=r"a\.b names two tensors"):
        torch_save.open(saved({"a.b": w, "a": {"b": w}}, tmp_path / "w.pt"))


class Scaled(torch.nn.Module):
    """Every kind of state that a module has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("temporary", torch.arange(4), persistent=False)
        self.register_parameter("absent", None)
        self.block = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.LayerNorm(2))
        self.head = self.block[0]


def test_a_whole_module_holds_what_its_state_dict_holds(tmp_path: Path) -> None:
    module = Scaled()
    checkpoint = torch_save.open(saved({"ema": module, "epoch": 1}, tmp_path / "m.pt"))
    expected = {f"ema.{name}": tensor for name, tensor in module.state_dict().items()}
    assert {*checkpoint} == {*expected}
    assert_holds(checkpoint.select(expected), expected)
    assert checkpoint.path("ema.block.0.weight") == ("ema", "block.0.weight")
    assert "whole module" in torch_save.open(saved(module, tmp_path / "n.pt")).notices[0]


class Labelled(torch.Tensor):
    """A subclass with elements of its own."""


def test_subclasses_and_attributes_are_unwrapped_and_named(tmp_path: Path) -> None:
    labelled = noise((3,), torch.float32).as_subclass(Labelled)
    noted = noise((2,), torch.float32)
    noted.origin = "here"  # type: ignore[attr-defined]
    buffer = torch.nn.Buffer(noise((2,), torch.float32))
    checkpoint = torch_save.open(saved({"a": labelled, "b": noted, "c": buffer}, tmp_path / "m.pt"))
    assert_holds(checkpoint, {"a": labelled.as_subclass(torch.Tensor), "b": noted, "c": buffer})
    (notice,) = checkpoint.notices
    assert "Labelled" in notice
    assert notice.endswith("stored: a")


@pytest.mark.filterwarnings("ignore")
def test_quantized_tensors_give_their_integers_and_say_so(tmp_path: Path) -> None:
    values = noise((4, 3), torch.int8).float()
    quantized = torch.quantize_per_tensor(values, 0.5, 3, torch.qint8)
    channels = torch.quantize_per_channel(values, torch.ones(4), torch.zeros(4), 0, torch.quint8)
    checkpoint = torch_save.open(saved({"q": quantized, "c": channels}, tmp_path / "m.pt"))
    assert checkpoint.tensors["q"].dtype is dtype("qint8")
    assert checkpoint["q"].numpy().tobytes() == quantized.int_repr().numpy().tobytes()
    assert checkpoint["c"].numpy().tobytes() == channels.int_repr().numpy().tobytes()
    assert "without scale and zero point: q, c" in checkpoint.notices[0]
    with pytest.raises(Unsupported, match="q: qint8 is not written"):
        torch_save.plan(checkpoint, "m.pt")


@pytest.mark.filterwarnings("ignore")
def test_tensors_without_strides_are_listed_and_refuse_to_be_read(tmp_path: Path) -> None:
    state = {
        "w": noise((2,), torch.float32),
        "coo": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "meta": torch.empty(2, 3, device="meta"),
    }
    checkpoint = torch_save.open(saved(state, tmp_path / "m.pt"))
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {
        "w": (2,),
        "coo": (3, 3),
        "csr": (3, 3),
        "meta": (2, 3),
    }
    assert [n.rpartition(": ")[2] for n in checkpoint.notices] == ["coo, csr", "meta"]
    for name in ("coo", "csr", "meta"):
        with pytest.raises(Unsupported, match=f"{name} is a"):
            checkpoint[name].numpy()
        with pytest.raises(Unsupported, match=f"{name} is a"):
            Plan((torch_save.plan(checkpoint.select([name]), "m.pt"),)).sources()
    assert checkpoint["w"].numpy().tobytes() == bits(state["w"])


class Holder:
    """An object that no one here knows."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_objects_that_hide_tensors_are_named(tmp_path: Path) -> None:
    checkpoint = torch_save.open(saved({"h": Holder(torch.zeros(3))}, tmp_path / "m.pt"))
    assert isinstance(checkpoint.objects["h"], Inert)
    assert checkpoint.notices == (f"an object of {__name__}.Holder with 1 tensors inside, which are not read: h",)


def test_shards_with_an_index_are_one_checkpoint(tmp_path: Path) -> None:
    a, b = noise((2,), torch.float32), noise((3,), torch.float32)
    saved({"a": a}, tmp_path / "pytorch_model-00001-of-00002.bin")
    saved({"b": b}, tmp_path / "pytorch_model-00002-of-00002.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    index.write_text(str({"metadata": {}, "weight_map": names}).replace("'", '"'))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for path in (tmp_path, index):
        checkpoint = torch_save.open(path)
        assert_holds(checkpoint, {"a": a, "b": b})
        assert checkpoint.config is not None
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(Incomplete, match="00002-of-00002"):
        torch_save.open(tmp_path)


def test_a_directory_with_one_file_of_weights_is_read_with_its_config(tmp_path: Path) -> None:
    w = noise((2,), torch.float32)
    saved({"w": w}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = torch_save.open(tmp_path)
    assert_holds(checkpoint, {"w": w})
    assert dict(checkpoint.config or {}) == {"model_type": "llama"}
    with pytest.raises(NotFound):
        torch_save.open(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------------------ writing


def opened(state: Mapping[str, torch.Tensor], path: Path) -> Checkpoint:
    return torch_save.open(saved(dict(state), path))


def test_torch_loads_what_is_written(tmp_path: Path) -> None:
    state = everything()
    checkpoint = opened(state, tmp_path / "in.pt")
    plan = Plan((torch_save.plan(checkpoint, "model.ckpt", wrap=lambda s: {"state_dict": s, "epoch": 3}),))
    run(plan, tmp_path / "out", threads=2)
    path = tmp_path / "out" / "model.ckpt"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    for how in ({"weights_only": True}, {"weights_only": True, "mmap": True}):
        loaded = torch.load(path, **how)
        assert loaded["epoch"] == 3
        assert list(loaded["state_dict"]) == list(state)
        for name, tensor in loaded["state_dict"].items():
            assert (tensor.dtype, tensor.shape) == (state[name].dtype, state[name].shape)
            assert bits(tensor) == bits(state[name]), name
        assert loaded["state_dict"]["tied"].data_ptr() == loaded["state_dict"]["whole"].data_ptr()


def test_an_archive_is_torchs_own_byte_for_byte(tmp_path: Path) -> None:
    state = {name: t.detach() for name, t in everything().items() if t.is_contiguous() and not t._is_view()}
    path = saved(state, tmp_path / "m.pt")
    run(Plan((torch_save.plan(torch_save.open(path), "", wrap=dict, name="m"),)), tmp_path / "n.pt")
    assert (tmp_path / "n.pt").read_bytes() == path.read_bytes()


def test_tensors_that_are_put_together_are_written_as_one(tmp_path: Path) -> None:
    a, b = noise((2, 3), torch.bfloat16), noise((4, 3), torch.bfloat16)
    checkpoint = opened({"a": a, "b": b}, tmp_path / "in.pt")
    joined = concat([*checkpoint.tensors.values()], 0)
    plan = torch_save.plan(replace(checkpoint, tensors={"ab": joined}), "")
    run(Plan((plan,)), tmp_path / "out.bin", block_nbytes=16)
    assert bits(torch.load(tmp_path / "out.bin")["ab"]) == bits(torch.cat([a, b]))


def test_inert_objects_and_their_tensors_are_carried_over(tmp_path: Path) -> None:
    meta = torch_save.read(
        saved({"holder": Holder(torch.arange(3.0)), "score": torch.tensor(2.5)}, tmp_path / "meta.pt")
    )
    checkpoint = opened({"w": torch.arange(4.0)}, tmp_path / "in.pt")
    plan = torch_save.plan(checkpoint, "", wrap=lambda s: {**meta.value, "state_dict": s}, carried=meta)
    run(Plan((plan,)), tmp_path / "out.ckpt")
    loaded = torch.load(tmp_path / "out.ckpt", weights_only=False)
    assert loaded["holder"].tensor.tolist() == [0, 1, 2]
    assert loaded["score"].item() == 2.5
    assert loaded["state_dict"]["w"].tolist() == [0, 1, 2, 3]
    with pytest.raises(Unsupported, match="tensors inside of it"):
        torch_save.plan(checkpoint, "", wrap=lambda s: {**meta.value, "state_dict": s})


def test_a_state_dict_without_tensors_is_a_file_too(tmp_path: Path) -> None:
    checkpoint = opened({}, tmp_path / "in.pt")
    run(Plan((torch_save.plan(checkpoint, "", wrap=lambda s: {"state_dict": s}),)), tmp_path / "out.pt")
    assert torch.load(tmp_path / "out.pt") == {"state_dict": {}}


# ------------------------------------------------------------------------------------------------------------ refusing


class Evil:
    """Runs a command in whoever unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_nothing_in_a_file_is_executed(tmp_path: Path, is_zip: bool) -> None:
    state = {"w": torch.zeros(3), "evil": Evil(tmp_path / "ran")}
    path = saved(state, tmp_path / "m.pt", _use_new_zipfile_serialization=is_zip)
    checkpoint = torch_save.open(path)
    assert list(checkpoint) == ["w"]
    assert checkpoint.objects["evil"].cls == Global("posix", "system")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_file_of_torch_save_is_told_apart(tmp_path: Path) -> None:
    def refused(data: bytes) -> ReshardError:
        (tmp_path / "x.pt").write_bytes(data)
        with pytest.raises(ReshardError, match=r"x\.pt") as caught:
            torch_save.open(tmp_path / "x.pt")
        return caught.value

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("sys_info"))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    assert isinstance(refused(b""), Incomplete)
    assert isinstance(refused(os.urandom(100).replace(b"\x80", b"\x81")), NotFound)
    assert "bare pickle" in str(refused(pickle.dumps({"a": [1] * 100})))
    assert "tar archive" in str(refused(stream.getvalue()))
    assert refused(pointer).hint == "git lfs pull"
    with pytest.raises(NotFound):
        torch_save.open(tmp_path / "absent.pt")


def test_torchscript_is_refused_with_a_way_out(tmp_path: Path) -> None:
    writer = torch._C.PyTorchFileWriter(str(tmp_path / "m.pt"))
    for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
        writer.write_record(name, pickle.dumps(None, 2), len(pickle.dumps(None, 2)))
    writer.write_end_of_file()
    with pytest.raises(Unsupported, match="TorchScript") as caught:
        torch_save.open(tmp_path / "m.pt")
    assert "torch.jit.load" in str(caught.value.hint)


def test_a_bomb_of_references_is_refused(tmp_path: Path) -> None:
    value: Any = [torch.zeros(1)]
    for _ in range(60):
        value = [value, value]
    with pytest.raises(Corrupt, match="over and over"):
        torch_save.open(saved(value, tmp_path / "m.pt"))


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_that_was_cut_short_is_refused_at_any_length(tmp_path: Path, is_zip: bool) -> None:
    state = {f"w{i}": noise((3, i), torch.float32) for i in range(4)}
    data = saved(state, tmp_path / "m.pt", _use_new_zipfile_serialization=is_zip).read_bytes()
    for nbytes in range(0, len(data), 7):
        (tmp_path / "cut.pt").write_bytes(data[:nbytes])
        with pytest.raises((Incomplete, Corrupt), match=r"cut\.pt"):
            torch_save.open(tmp_path / "cut.pt")


def read_all(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Every tensor, with every checksum confirmed."""
    files, ledger = Files(), Ledger()
    found = {n: t.read(Reader(files, ledger)).tobytes() for n, t in checkpoint.tensors.items()}
    ledger.settle(files)
    return found


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_flipped_bit_is_an_error_that_names_the_file_or_changes_nothing(tmp_path: Path, is_zip: bool) -> None:
    state = {f"w{i}": noise((3, i), torch.float32) for i in range(3)} | {"n": torch.nn.Parameter(torch.ones(2))}
    data = saved(state, tmp_path / "m.pt", _use_new_zipfile_serialization=is_zip).read_bytes()
    expected = read_all(torch_save.open(tmp_path / "m.pt"))
    chance = random.Random(0)
    for _ in range(400):
        flipped = bytearray(data)
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path = tmp_path / "flip.pt"
        path.write_bytes(flipped)
        try:
            found = read_all(torch_save.open(path))
        except ReshardError as error:
            assert "flip.pt" in str(error)  # noqa: PT017
        else:
            assert found == expected or not is_zip  # a legacy stream has no checksums


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    path = saved({"w": torch.zeros(1 << 20)}, tmp_path / "m.pt")
    touched: list[int] = []

    class Counted(Files):
        def pread_into(self, path: str, offset: int, out: Any) -> None:
            touched.append(memoryview(out).nbytes)
            super().pread_into(path, offset, out)

    torch_save.read(path, Counted())
    assert sum(touched) < 50_000


def test_torch_is_not_imported() -> None:
    code = "import sys, reshard.formats.torch_save, reshard.formats.rank_files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_deferred_tensors_are_those_of_compressed_storages_only(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint = opened({"w": torch.zeros(3)}, tmp_path / "m.pt")
    assert not any(isinstance(tensor, Deferred) for tensor in checkpoint.tensors.values())
    assert checkpoint.locate is None
