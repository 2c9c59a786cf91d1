"""Hostile checkpoints end in an error of ours or are read as inert data: nothing is imported, run, or touched."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import reshard
from checkpoints import ROOT, child, left_in, model, peak_nbytes, write_dcp
from reshard.errors import ReshardError
from reshard.ops.inspect import audit

HOSTILE = ROOT / "tests/data/hostile"
ITEMS = sorted(p.name for p in HOSTILE.iterdir())

WATCHED = """
import json, os, sys
from pathlib import Path

ours = ("reshard", "numpy", "ml_dtypes", "msgspec", "xxhash", "rich", "yaml", "_", "zstandard", "zlib_ng")
allowed = {*sys.stdlib_module_names, "org", "typing_extensions"}  # tried by the pickle module, by msgspec
source, output = map(os.path.realpath, sys.argv[2:4])
broken = []

def watch(event, args):
    if event == "import" and args[0].split(".")[0] not in allowed and not args[0].startswith(ours):
        broken.append(f"import {args[0]}")
    if event.startswith(("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess", "socket")):
        broken.append(f"{event} {args}")
    if event in ("pickle.find_class", "marshal.loads", "exec") and "reshard" in sys.modules and watching:
        if event == "pickle.find_class":
            broken.append(f"{event} {args}")
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
        path = os.path.realpath(args[0]) if isinstance(args[0], (str, bytes)) else ""
        if not str(path).startswith((output, os.path.dirname(output) + "/.", os.devnull)):
            broken.append(f"open for writing {path}")

watching = True
from reshard.cli.main import main
sys.addaudithook(watch)
before = set(sys.modules)
code = main(sys.argv[1:4] + ["--quiet"] if sys.argv[1] == "merge" else [sys.argv[1], *sys.argv[4:], source])
strange = sorted(
    n for n in set(sys.modules) - before if n.split(".")[0] not in allowed and not n.startswith(ours)
)
print(json.dumps({"code": code, "broken": broken, "modules": strange}))
"""


def watched(*args: str | Path) -> dict[str, Any]:
    """What `reshard ARGS` did in a process whose every import, start and write is looked at."""
    command = [sys.executable, "-B", "-c", WATCHED, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    import json

    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said | {"stderr": done.stderr}


@pytest.mark.parametrize("name", ITEMS)
def test_a_hostile_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ReshardError) as caught:
        reshard.merge(HOSTILE / name, tmp_path / "out.safetensors", keep_names=True)
    assert name in str(caught.value)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("name", ITEMS)
@pytest.mark.parametrize("verb", ["merge", "inspect"])
def test_nothing_is_imported_started_or_written_elsewhere(name: str, verb: str, tmp_path: Path) -> None:
    marks = sorted(Path("/tmp").glob("PWNED*"))
    said = watched(verb, HOSTILE / name, tmp_path / "out.safetensors")
    assert (said["broken"], said["modules"]) == ([], [])
    assert said["code"] in (0, 1), said["stderr"]
    assert sorted(Path("/tmp").glob("PWNED*")) == marks
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("name", ["exec_in_metadata", "exec_in_pt.pt"])
def test_an_audit_lists_what_a_pickle_wants_to_import(name: str, tmp_path: Path) -> None:
    said = watched("inspect", HOSTILE / name, tmp_path / "out", "--audit")
    assert (said["code"], said["broken"]) == (0, [])
    done = child("inspect", "--audit", HOSTILE / name)
    assert "UNKNOWN  posix.system" in done.stdout
    assert name in done.stdout


# ------------------------------------------------------------------------------------------------ made on the spot


class Runs:
    """Pickles to a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call


def calls(mark: Path) -> dict[str, Any]:
    import builtins
    import os
    import shutil
    import socket

    code = f"open({str(mark)!r}, 'w').close()"
    return {
        "os.system": Runs(os.system, f"touch {mark}"),
        "exec": Runs(builtins.exec, code),
        "eval": Runs(builtins.eval, code),
        "import": Runs(builtins.__import__, "antigravity"),
        "open": Runs(builtins.open, str(mark), "w"),
        "getattr": Runs(builtins.getattr, Runs(builtins.__import__, "os"), "system"),
        "subprocess": Runs(subprocess.Popen, ["touch", str(mark)]),
        "socket": Runs(socket.create_connection, ("127.0.0.1", 9)),
        "rmtree": Runs(shutil.rmtree, str(mark.parent)),
        "torch.load": Runs(torch.load, str(mark)),
    }


CALLS = sorted(calls(Path("mark")))


@pytest.mark.parametrize("call", CALLS)
def test_a_call_among_the_tensors_of_a_file_is_inert(call: str, tmp_path: Path) -> None:
    mark, weights = tmp_path / "mark", torch.randn(3, 4)
    torch.save({"w": weights, "callback": calls(mark)[call]}, tmp_path / "model.pt")
    said = watched("merge", tmp_path / "model.pt", tmp_path / "out.safetensors")
    assert (said["code"], said["broken"], said["modules"]) == (0, [], []), said["stderr"]
    assert not mark.exists()
    rows = {row.name: row.known for row in audit(tmp_path / "model.pt")}
    assert any(not known for known in rows.values()), rows


@pytest.mark.parametrize("call", CALLS)
def test_a_call_in_an_object_of_a_dcp_is_inert_and_audited(call: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    write_dcp(tmp_path / "shards", model(1), objects={"callback": calls(mark)[call]})
    said = watched("merge", tmp_path / "shards", tmp_path / "out.safetensors")
    assert (said["code"], said["broken"], said["modules"]) == (0, [], []), said["stderr"]
    assert not mark.exists()
    rows = {row.name: row.known for row in audit(tmp_path / "shards")}
    assert any(not known for known in rows.values()), rows


@pytest.mark.parametrize("call", CALLS)
def test_a_call_in_the_metadata_is_inert(call: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    write_dcp(tmp_path / "shards", model(1))
    said = pickle.loads((tmp_path / "shards/.metadata").read_bytes())
    said.storage_meta = calls(mark)[call]
    (tmp_path / "shards/.metadata").write_bytes(pickle.dumps(said, protocol=4))
    found = watched("merge", tmp_path / "shards", tmp_path / "out.safetensors")
    assert (found["code"], found["broken"], found["modules"]) == (0, [], []), found["stderr"]
    assert not mark.exists()


# ------------------------------------------------------------------------------------------------- memory and time


def nested(depth: int) -> bytes:
    return b"\x80\x04" + b"]" * depth + b"a" * (depth - 1) + b"."


def doubling(times: int) -> bytes:
    """A list of two references to a list of two references to ..."""
    out = b"\x80\x04]q\x00"
    for i in range(times):
        out += b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1])
    return out + b"."


BOMBS = {
    "nested": nested(200_000),
    "doubling": doubling(200),
    "long string": b"\x80\x04\x8d" + (1 << 60).to_bytes(8, "little") + b"x.",
    "long bytes": b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x.",
    "long frame": b"\x80\x04\x95" + (1 << 62).to_bytes(8, "little") + b"N.",
    "huge number": b"\x80\x04\x8b" + (0x7FFFFFFF).to_bytes(4, "little") + b"\1.",
    "memo": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "bytearray": b"\x80\x05\x96" + (1 << 50).to_bytes(8, "little") + b".",
    "decimal": b"I" + b"9" * 1_000_000 + b"\n.",
    "repeat": b"\x80\x04cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",
    "power": b"\x80\x04coperator\npow\nK\x0a\x8a\x05\x00\x00\x00\x00\x10\x86R.",
}


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_a_pickle_bomb_takes_neither_memory_nor_time(name: str, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/.metadata").write_bytes(BOMBS[name])
    (tmp_path / "shards/__0_0.distcp").write_bytes(b"")
    (tmp_path / "model.pt").write_bytes(BOMBS[name])
    for source in (tmp_path / "shards", tmp_path / "model.pt"):
        done = child("merge", source, tmp_path / "out", preexec_fn=bounded, timeout=30)
        assert (done.returncode, done.stdout) == (1, ""), done.stderr[-2000:]
        assert done.stderr.startswith("error: ")


def bounded() -> None:
    """1 GiB of address space: what a bomb asks for fails, and MemoryError is no error of ours."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))


def test_a_claimed_tensor_of_2_to_the_60_elements_takes_no_memory(tmp_path: Path) -> None:
    for claim in (1 << 40, 1 << 60):
        strided = torch.zeros(1).as_strided((2,), (0,))
        torch.save({"w": strided}, tmp_path / "model.pt")
        data = (tmp_path / "model.pt").read_bytes()
        assert data.count(b"K\x02\x85") == 1
        with pytest.raises(ReshardError):
            reshard.merge(_with_pickle(tmp_path / "model.pt", claim), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    done = child("merge", tmp_path / "model.pt", tmp_path / "out.safetensors", preexec_fn=bounded, timeout=30)
    assert done.returncode == 1, done.stderr


def _with_pickle(path: Path, claim: int) -> Path:
    """A file of torch.save whose tensor of two elements, all the same one, claims to have many."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (n for n in records if n.endswith("data.pkl"))
    number = b"\x8a\x08" + claim.to_bytes(8, "little")
    records[name] = records[name].replace(b"K\x02\x85", number + b"\x85")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for record, content in records.items():
            archive.writestr(record, content)
    return path


def test_reading_a_hostile_checkpoint_takes_as_little_memory_as_starting(tmp_path: Path) -> None:
    write_dcp(tmp_path / "shards", model(1))
    started = peak_nbytes("inspect", tmp_path / "shards")
    torch.save({"w": torch.zeros(3), "o": [None] * 1000}, tmp_path / "little.pt")
    assert peak_nbytes("inspect", tmp_path / "little.pt") < started + (40 << 20)


# ----------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize(
    "name", ["../outside.distcp", "/etc/passwd", "sub/../../outside.distcp", "link.distcp", "nul\0.distcp", "", "."]
)
def test_a_shard_file_elsewhere_is_not_read(tmp_path: Path, name: str) -> None:
    tensors = {"w": torch.randn(4, 4)}
    shards = write_dcp(tmp_path / "shards", tensors)
    (tmp_path / "outside.distcp").write_bytes((shards / "__0_0.distcp").read_bytes())
    said = pickle.loads((shards / ".metadata").read_bytes())
    for info in said.storage_data.values():
        if info.relative_path == "__0_0.distcp":
            info.relative_path = name
    (shards / ".metadata").write_bytes(pickle.dumps(said, protocol=4))
    if name == "link.distcp":
        (shards / "sub").symlink_to("/etc")
        for info in said.storage_data.values():
            info.relative_path = "sub/passwd" if info.relative_path == name else info.relative_path
        (shards / ".metadata").write_bytes(pickle.dumps(said, protocol=4))
    with pytest.raises(ReshardError):
        reshard.merge(shards, tmp_path / "out.safetensors")


@pytest.mark.parametrize("fqn", ["../../x", "/etc/passwd", "a/b", "..", "name\nwith\tlines", "\x1b[31mred", " "])
def test_a_strange_fqn_is_a_name_and_nothing_else(tmp_path: Path, fqn: str) -> None:
    write_dcp(tmp_path / "shards", {fqn: torch.randn(4), "plain": torch.randn(4)})
    before = set(left_in(tmp_path))
    reshard.merge(tmp_path / "shards", tmp_path / "out", keep_names=True)
    written = {"out", "out/model.safetensors", "out/reshard.json"}
    assert set(left_in(tmp_path)) - before == written
    assert reshard.verify(tmp_path / "out", tmp_path / "shards").ok
