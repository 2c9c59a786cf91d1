"""Mutated files of every kind: only errors of ours come out, in little time and memory, and no output that is wrong."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import resource
import shutil
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import reshard
from checkpoints import model, write_dcp
from reshard.errors import ReshardError
from reshard.ops.inspect import audit, inspect
from reshard.ops.merge import Options, prepare
from reshard.storage.run import digest

MODEL = model(1, 8)
MEMORY_NBYTES = 64 << 20
BOUNDED = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """4 GiB more of address space than now: what would take all memory raises MemoryError, and fails."""
    lines = Path("/proc/self/status").read_text().splitlines()
    now = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmSize"))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def read_all(source: Path) -> dict[str, str]:
    """The digest of every tensor that a merge would write, by FQN. Only errors of ours may come out."""
    prepared = prepare(source, source.parent / "out", Options(keep_names=True))
    found = digest(prepared.plan, threads=1)
    return {s.name: found[f.path, i].xxh3_128 for f in prepared.plan.files for i, _, s in f.placed() if s.name}


def survives(source: Path) -> dict[str, str] | None:
    """What is read of a mutated checkpoint, or None where it is refused, in bounded memory."""
    tracemalloc.start()
    try:
        for look in (lambda: inspect(source), lambda: audit(source)):
            with suppress(ReshardError):
                look()
        try:
            return read_all(source)
        except ReshardError:
            return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY_NBYTES


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with some changed, cut, doubled, or replaced by what readers stumble over."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(out) - 1, 0)))
        match draw(st.sampled_from(["flip", "byte", "cut", "double", "insert", "number", "end", "move"])):
            case "flip" if out:
                out[at] ^= 1 << draw(st.integers(0, 7))
            case "byte" if out:
                out[at] = draw(st.integers(0, 255))
            case "cut":
                del out[at : at + draw(st.integers(1, 64))]
            case "double":
                out[at:at] = out[at : at + draw(st.integers(1, 200))]
            case "insert":
                out[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "number":
                value = draw(
                    st.sampled_from([0, 1, 0x7F, 0xFF, 1 << 31, (1 << 32) - 1, 1 << 60, (1 << 63) - 1, (1 << 64) - 1])
                )
                width = draw(st.sampled_from([1, 2, 4, 8]))
                out[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
            case "end":
                del out[at:]
            case "move":
                piece = bytes(out[at : at + draw(st.integers(1, 32))])
                out[draw(st.integers(0, len(out))) :][:0] = piece
    return bytes(out)


WIDTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
OPCODES = [op.code.encode("latin1") for op in pickletools.opcodes]


@st.composite
def pickles(draw: st.DrawFn) -> bytes:
    """Programs of pickle opcodes with arguments that are mostly well-formed."""
    out = [b"\x80\x04"]
    names = ["os\nsystem\n", "builtins\neval\n", "torch._utils\n_rebuild_tensor_v2\n", "collections\nOrderedDict\n",
             "torch\nSize\n", "torch.distributed.checkpoint.metadata\nMetadata\n", "builtins\ngetattr\n"]  # fmt: skip
    for _ in range(draw(st.integers(1, 40))):
        code = draw(st.sampled_from(OPCODES))
        out.append(code)
        argument = pickletools.code2op[code.decode("latin1")].arg
        if argument is None:
            continue
        if code in (b"c", b"i"):
            out.append(draw(st.sampled_from(names)).encode())
        elif argument.n == pickletools.UP_TO_NEWLINE:
            out.append(draw(st.sampled_from([b"1\n", b"'a'\n", b"-7L\n", b"x\n", b"1.5\n", b"9" * 50 + b"\n"])))
        elif argument.n >= 0:
            out.append(draw(st.binary(min_size=argument.n, max_size=argument.n)))
        else:
            width = WIDTHS[argument.n]
            body = draw(st.binary(max_size=8))
            claimed = draw(st.sampled_from([len(body), len(body), len(body), (1 << (8 * width - 1)) - 1]))
            out.append((claimed & ((1 << 8 * width) - 1)).to_bytes(width, "little") + body)
    return b"".join(out) + draw(st.sampled_from([b".", b""]))


def replaced(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


# ---------------------------------------------------------------------------------------------------------------- DCP


@pytest.fixture(scope="module")
def dcp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    objects = {"epoch": 3, "state": {"a": [1, 2, torch.ones(3)]}}
    return write_dcp(tmp_path_factory.mktemp("fuzz") / "dcp", MODEL, objects=objects)


@pytest.fixture(scope="module")
def truth(dcp: Path) -> dict[str, str]:
    return read_all(dcp)


def rewritten(directory: Path, name: str, data: bytes) -> dict[str, str] | None:
    """What is read with one file changed, which is then put back."""
    original = (directory / name).read_bytes()
    replaced(directory / name, data)
    try:
        return survives(directory)
    finally:
        replaced(directory / name, original)


@given(data=st.data())
@BOUNDED
def test_mutated_metadata(dcp: Path, data: st.DataObject) -> None:
    rewritten(dcp, ".metadata", data.draw(mutated((dcp / ".metadata").read_bytes())))


@given(program=pickles())
@BOUNDED
def test_metadata_of_any_opcodes(dcp: Path, program: bytes) -> None:
    assert rewritten(dcp, ".metadata", program) is None


VALUES = st.one_of(
    st.integers(-(1 << 70), 1 << 70), st.none(), st.text(max_size=5), st.booleans(), st.floats(), st.binary(max_size=4),
    st.just(()), st.just([]), st.just({}), st.lists(st.integers(-2, 1 << 65), max_size=3).map(tuple),
)  # fmt: skip


@given(data=st.data())
@BOUNDED
def test_metadata_with_values_of_any_kind(dcp: Path, data: st.DataObject) -> None:
    """Well-formed pickles whose fields hold something else."""
    said = pickle.loads((dcp / ".metadata").read_bytes())
    value = data.draw(VALUES)
    fqn = data.draw(st.sampled_from(sorted(said.state_dict_metadata)))
    place = next(k for k in said.storage_data if k.fqn == fqn)
    described = said.state_dict_metadata[fqn]
    match data.draw(st.sampled_from(["field", "tensor", "chunk", "info", "index", "dtype", "entry", "path"])):
        case "field":
            name = data.draw(st.sampled_from(sorted(vars(said))))
            object.__setattr__(said, name, value)
        case "tensor" if hasattr(described, "chunks"):
            object.__setattr__(described, data.draw(st.sampled_from(["size", "chunks", "properties"])), value)
        case "chunk" if hasattr(described, "chunks"):
            object.__setattr__(described.chunks[0], data.draw(st.sampled_from(["offsets", "sizes"])), value)
        case "info":
            info = said.storage_data[place]
            name = data.draw(st.sampled_from(["relative_path", "offset", "length", "transform_descriptors"]))
            object.__setattr__(info, name, value)
        case "index":
            info = said.storage_data.pop(place)
            object.__setattr__(place, data.draw(st.sampled_from(["fqn", "offset"])), value)
            said.storage_data = list(said.storage_data.items()) if isinstance(value, list | dict) else said.storage_data
        case "dtype" if hasattr(described, "properties"):
            object.__setattr__(described.properties, "dtype", value)
        case "entry":
            said.state_dict_metadata[fqn] = value
        case "path":
            said.planner_data[fqn] = value
    try:
        changed = pickle.dumps(said, protocol=4)
    except Exception:  # torch's own classes refuse some
        return
    rewritten(dcp, ".metadata", changed)


@pytest.mark.parametrize("name", ["", ".", "pipe"])
def test_metadata_that_names_what_is_no_file(dcp: Path, name: str) -> None:
    said = pickle.loads((dcp / ".metadata").read_bytes())
    for place in said.storage_data.values():
        object.__setattr__(place, "relative_path", name)
    os.mkfifo(dcp / "pipe")
    try:
        assert rewritten(dcp, ".metadata", pickle.dumps(said)) is None
    finally:
        (dcp / "pipe").unlink()


@given(data=st.data())
@BOUNDED
def test_mutated_shards_are_refused_or_read_right(dcp: Path, truth: dict[str, str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["__0_0.distcp", "__1_0.distcp"]))
    found = rewritten(dcp, name, data.draw(mutated((dcp / name).read_bytes())))
    assert found is None or found == truth


# -------------------------------------------------------------------------------------------------------- single files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz")
    torch.save({"state_dict": MODEL, "epoch": 3, "view": MODEL["embed.weight"][1:3]}, directory / "new.pt")
    torch.save(MODEL, directory / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(MODEL, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("name", ["new.pt", "legacy.pt", "model.safetensors"])
@given(data=st.data())
@BOUNDED
def test_mutated_files(files: Path, name: str, data: st.DataObject) -> None:
    directory = files / "mutated"
    directory.mkdir(exist_ok=True)
    replaced(directory / name, data.draw(mutated((files / name).read_bytes())))
    survives(directory / name)


@given(program=pickles())
@BOUNDED
def test_archives_of_any_opcodes(files: Path, program: bytes) -> None:
    path = files / "opcodes.pt"
    with zipfile.ZipFile(files / "new.pt") as archive:
        records = {n: archive.read(n) for n in archive.namelist()}
    path.unlink(missing_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for record, content in records.items():
            archive.writestr(record, program if record.endswith("data.pkl") else content)
    survives(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 65), 1 << 65) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@BOUNDED
def test_safetensors_headers_of_any_json(files: Path, data: st.DataObject) -> None:
    original = (files / "model.safetensors").read_bytes()
    length = int.from_bytes(original[:8], "little")
    header = json.loads(original[8 : 8 + length])
    key = data.draw(st.sampled_from(sorted(header)))
    inner = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "all", "more", "metadata"]))
    if inner == "all":
        header[key] = data.draw(JSON)
    elif inner == "more":
        header[data.draw(st.text(max_size=5))] = data.draw(JSON)
    elif inner == "metadata":
        header["__metadata__"] = {
            "reshard.dtypes": json.dumps(data.draw(JSON)),
            "format": data.draw(st.text(max_size=3)),
        }
    else:
        header[key][inner] = data.draw(JSON | st.lists(st.integers(-1, 1 << 62), max_size=3))
    text = json.dumps(header).encode()
    path = files / "json.safetensors"
    replaced(path, len(text).to_bytes(8, "little") + text + original[8 + length :])
    survives(path)


# ----------------------------------------------------------------------------------------------------- directories


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file a rank, of DTensors, as torch wrote them."""
    found = Path(__file__).parent / "data/torch/rank_files_2.15.0"
    return Path(shutil.copytree(found, tmp_path_factory.mktemp("fuzz") / "ranks"))


@given(data=st.data())
@settings(BOUNDED, max_examples=30)
def test_mutated_rank_files(ranks: Path, data: st.DataObject) -> None:
    names = sorted(str(p.relative_to(ranks)) for p in ranks.rglob("*.pt"))
    name = data.draw(st.sampled_from(names))
    original = (ranks / name).read_bytes()
    replaced(ranks / name, data.draw(mutated(original)))
    try:
        survives((ranks / name).parent)
    finally:
        replaced(ranks / name, original)


@pytest.fixture(scope="module")
def indexed(dcp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz") / "indexed"
    reshard.merge(dcp, directory, max_shard_size="500B")
    (directory / "reshard.json").unlink()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    return directory


@given(data=st.data())
@BOUNDED
def test_mutated_indexes_and_configs(indexed: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["model.safetensors.index.json", "config.json"]))
    original = (indexed / name).read_bytes()
    if data.draw(st.booleans()):
        replaced(indexed / name, data.draw(mutated(original)))
    else:
        said = json.loads(original)
        said[data.draw(st.sampled_from([*said, "architectures", "text_config", "quantization_config"]))] = data.draw(
            JSON
        )
        replaced(indexed / name, json.dumps(said).encode())
    try:
        survives(indexed)
        with suppress(ReshardError):
            digest(prepare(indexed, indexed.parent / "out", Options()).plan, threads=1)
    finally:
        replaced(indexed / name, original)


@given(data=st.data())
@BOUNDED
def test_mutated_manifests(dcp: Path, indexed: Path, data: st.DataObject) -> None:
    output = indexed.parent / "proven"
    if not output.exists():
        reshard.merge(dcp, output)
    original = (output / "reshard.json").read_bytes()
    changed = data.draw(mutated(original))
    replaced(output / "reshard.json", changed)
    try:
        assert reshard.verify(output).ok is (changed == original)
    except ReshardError:
        pass
    finally:
        replaced(output / "reshard.json", original)


MEGATRON = {
    "nemotron_h": ("iter_0000000/.metadata", "iter_0000000/run_config.yaml", "iter_0000000/metadata.json"),
    "zarr_llama": ("iter_0000010/common.pt", "iter_0000010/output_layer.weight/.zarray"),
    "legacy_llama_tp2pp2": ("iter_0000010/mp_rank_01_000/model_optim_rng.pt", "latest_checkpointed_iteration.txt"),
    "fsdp_gdn": ("iter_0000000/.metadata", "iter_0000000/__0_0.distcp"),
}


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("fuzz") / "megatron"
    for name in MEGATRON:
        shutil.copytree(Path(__file__).parent / "data" / "megatron" / name, found / name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name, file", [(name, file) for name, files in MEGATRON.items() for file in files])
@given(data=st.data())
@settings(BOUNDED, max_examples=20)
def test_mutated_megatron_directories(megatron: Path, name: str, file: str, data: st.DataObject) -> None:
    original = (megatron / name / file).read_bytes()
    replaced(megatron / name / file, data.draw(mutated(original)))
    try:
        survives(megatron / name)
    finally:
        replaced(megatron / name / file, original)


def test_a_directory_of_anything_is_no_checkpoint(tmp_path: Path) -> None:
    for number, name in enumerate([".metadata", "__0_0.distcp", "model.safetensors", "pytorch_model.bin", "latest",
                                   "config.json", "model_world_size_2_rank_0.pt", "meta.pt", "a.ckpt"]):  # fmt: skip
        for content in (b"", b"\0", b"PK\3\4", b"\x80\4.", b"{}", os.urandom(100)):
            directory = tmp_path / f"{number} {content[:2].hex()}"
            directory.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
            assert survives(directory) is None
