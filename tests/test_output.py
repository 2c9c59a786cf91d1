"""Destinations: existing, linked, unwritable, inside the input, relative, and under all sorts of names."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
import torch

import reshard
from checkpoints import child, equals, left_in, model, write_dcp
from reshard.errors import OutputError

MODEL = model(1)


@pytest.fixture(scope="session")
def shared_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dcp(tmp_path_factory.mktemp("output") / "source", MODEL)


@pytest.fixture
def source(shared_source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_source, tmp_path / "in/source"))


@pytest.mark.parametrize("name", ["out", "out.safetensors", "out.pt"])
def test_an_existing_output_is_refused_and_replaced_with_force(source: Path, tmp_path: Path, name: str) -> None:
    reshard.merge(source, tmp_path / name, exclude=["steps"])
    before = left_in(tmp_path)
    old = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(OutputError, match="exists") as caught:
        reshard.merge(source, tmp_path / name)
    assert "--force" in str(caught.value.hint)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == old
    reshard.merge(source, tmp_path / name, force=True)
    assert left_in(tmp_path) == before
    assert reshard.verify(tmp_path / name, source).num_tensors == len(MODEL)


def test_a_replaced_directory_keeps_nothing_of_the_old_one(source: Path, tmp_path: Path) -> None:
    reshard.merge(source, tmp_path / "out", max_shard_size="1KB")
    (tmp_path / "out/pytorch_model.bin").write_bytes(b"stale")
    reshard.merge(source, tmp_path / "out", force=True)
    assert left_in(tmp_path / "out") == ["model.safetensors", "reshard.json"]


def test_an_empty_directory_is_no_output(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    reshard.merge(source, tmp_path / "out")
    assert equals(tmp_path / "out", MODEL)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_where_a_directory_should_go_is_refused(source: Path, tmp_path: Path, force: bool) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        reshard.merge(source, tmp_path / "out", force=force)
    assert (tmp_path / "out").read_text() == "mine"
    assert left_in(tmp_path) == ["in", "in/source", *left_below(source, tmp_path), "out"]


def left_below(source: Path, root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in source.iterdir())


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_where_a_file_should_go_is_refused(source: Path, tmp_path: Path, force: bool) -> None:
    (tmp_path / "out.safetensors").mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        reshard.merge(source, tmp_path / "out.safetensors", force=force)


def test_neither_file_nor_directory_is_refused(source: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out.safetensors")
    with pytest.raises(OutputError, match="neither"):
        reshard.merge(source, tmp_path / "out.safetensors", force=True)
    with pytest.raises(OutputError):
        reshard.merge(source, "/dev/null", force=True)
    assert stat.S_ISFIFO((tmp_path / "out.safetensors").stat().st_mode)


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_through_a_link_the_target_is_written_and_the_link_stays(source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / name).symlink_to(Path("elsewhere") / name)
    reshard.merge(source, tmp_path / name)  # the target does not exist yet
    assert (tmp_path / name).is_symlink()
    assert equals(tmp_path / "elsewhere" / name, MODEL)
    reshard.merge(source, tmp_path / name, force=True)
    assert (tmp_path / name).is_symlink()
    assert equals(tmp_path / name, MODEL)
    assert not any(n.startswith(".") for n in os.listdir(tmp_path / "elsewhere"))


def test_a_link_in_an_old_output_is_not_written_through(source: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.safetensors").symlink_to(tmp_path / "precious")
    reshard.merge(source, tmp_path / "out", force=True)
    assert (tmp_path / "precious").read_text() == "mine"
    assert equals(tmp_path / "out", MODEL)


def test_a_link_left_in_the_staging_directory_is_not_written_through(source: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".out.reshard/files").mkdir(parents=True)
    (tmp_path / ".out.reshard/files/model.safetensors").symlink_to(tmp_path / "precious")
    reshard.merge(source, tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "mine"
    assert equals(tmp_path / "out", MODEL)


def test_a_loop_of_links_is_an_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    done = child("merge", source, tmp_path / "a")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(("error: ", "hint: "))


def test_a_source_through_links_is_read(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    reshard.merge(tmp_path / "link", tmp_path / "out")
    assert equals(tmp_path / "out", MODEL)


@pytest.mark.parametrize("where", ["in", "in/source", "in/source/__0_0.distcp.safetensors"])
def test_an_output_may_not_hold_the_input(source: Path, tmp_path: Path, where: str) -> None:
    output = tmp_path / where
    if where.endswith(".safetensors"):
        output.symlink_to("__0_0.distcp")
    before = {p: p.read_bytes() for p in source.rglob("*") if p.is_file()}
    with pytest.raises(OutputError, match="holds the input"):
        reshard.merge(source, output, force=True)
    assert {p: p.read_bytes() for p in source.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["merged", "merged.safetensors", "deep/er/merged"])
def test_an_output_inside_the_input_leaves_the_shards_alone(source: Path, name: str) -> None:
    before = {p: p.read_bytes() for p in source.iterdir()}
    reshard.merge(source, source / name)
    assert equals(source / name, MODEL)
    assert {p: p.read_bytes() for p in before} == before
    assert reshard.verify(source / name, source).ok


def test_relative_paths(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source)
    reshard.merge(".", "../../out")
    assert equals(tmp_path / "out", MODEL)
    monkeypatch.chdir(tmp_path)
    reshard.merge("in/source", "./sub/../out.safetensors")
    assert equals(tmp_path / "out.safetensors", MODEL)
    with pytest.raises(OutputError):
        reshard.merge("in/source", ".", force=True)
    with pytest.raises(OutputError):
        reshard.merge("in/source", "in/source/..", force=True)


def test_missing_parents_are_made(source: Path, tmp_path: Path) -> None:
    reshard.merge(source, tmp_path / "a/b/c/out")
    assert equals(tmp_path / "a/b/c/out", MODEL)


def test_a_parent_that_is_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(OutputError, match="not a directory"):
        reshard.merge(source, tmp_path / "a/b/out")
    assert (tmp_path / "a").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_parent_is_said_before_anything_is_read(source: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="not writable"):
        reshard.merge(source, tmp_path / "closed/out")


def test_a_target_that_no_one_may_write_is_refused(source: Path) -> None:
    with pytest.raises(OutputError):
        reshard.merge(source, "/proc/out")
    with pytest.raises(OutputError):
        reshard.merge(source, "/proc/self/out.safetensors")


def test_the_access_of_a_parent_is_asked_for(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="not writable"):
        reshard.merge(source, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["ü ber", "模型", "with space", "-dash", "new\nline", "a" * 250, "é" * 120, "dot.", "~"]
)
@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_an_output_may_have_any_name(source: Path, tmp_path: Path, name: str, suffix: str) -> None:
    output = tmp_path / (name + suffix)
    if len(os.fsencode(output.name)) > (255 if not suffix else 255 - len(".reshard.json")):
        with pytest.raises(OutputError):
            reshard.merge(source, output)
        assert left_in(tmp_path) == ["in", "in/source", *left_below(source, tmp_path)]
        return
    reshard.merge(source, output)
    assert equals(output, MODEL)
    assert reshard.verify(output, source).ok
    assert not any(n.startswith(".") for n in os.listdir(tmp_path))


@pytest.mark.parametrize("kind", ["out", "out.safetensors", "out.pt"])
def test_fqns_of_any_length_and_script(tmp_path: Path, kind: str) -> None:
    tensors = {"模型.слой.0.weight": torch.randn(4, 3), "x" * 5000 + ".weight": torch.randn(3), "🙂": torch.zeros(2)}
    tensors |= {"a." * 400 + "b": torch.randn(2), 'q"uote\\s': torch.randn(2), " ": torch.ones(1)}
    write_dcp(tmp_path / "source", tensors)
    reshard.merge(tmp_path / "source", tmp_path / kind, keep_names=True)
    if kind == "out.pt":
        loaded = torch.load(tmp_path / kind, weights_only=True)
        assert {k: v.tolist() for k, v in loaded.items()} == {k: v.tolist() for k, v in tensors.items()}
    else:
        assert equals(tmp_path / kind, tensors)
    assert reshard.verify(tmp_path / kind, tmp_path / "source").ok


def test_a_dry_run_writes_nothing_and_says_what_would_refuse(source: Path, tmp_path: Path) -> None:
    before = left_in(tmp_path)
    assert child("merge", source, tmp_path / "deep/out", "--dry-run").returncode == 0
    assert left_in(tmp_path) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("mine")
    assert child("merge", source, tmp_path / "out", "--dry-run").returncode == 1


def test_files_have_the_rights_that_the_umask_leaves(source: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        reshard.merge(source, tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()} == {0o640}
