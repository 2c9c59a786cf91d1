"""What a path is, from wherever in a checkpoint a person points."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

import workspace
from checkpoints import write_dcp
from reshard.errors import Incomplete, InputError, NotFound, Unsupported
from reshard.formats import open_path
from reshard.formats.detect import find, numbered

ALIKE = {
    "HF Trainer (FSDP)": [
        "output", "output/checkpoint-500", "output/checkpoint-500/pytorch_model_fsdp_0",
        "output/checkpoint-500/pytorch_model_fsdp_0/.metadata",
        "output/checkpoint-500/pytorch_model_fsdp_0/__1_0.distcp",
    ],
    "LMMs-Engine (FSDP2)": [
        "run", "run/checkpoint-500", "run/checkpoint-500/pytorch_model_fsdp_0",
        "run/checkpoint-500/pytorch_model_fsdp_0/model_world_size_2_rank_1.pt",
    ],
    "verl": [
        "verl", "verl/global_step_500", "verl/global_step_500/actor",
        "verl/global_step_500/actor/model_world_size_2_rank_0.pt",
    ],
    "Lightning (FSDP)": [
        "nemo", "nemo/step=500.ckpt", "nemo/step=500.ckpt/.metadata", "nemo/step=500.ckpt/__0_0.distcp",
        "nemo/step=500.ckpt/meta.pt",
    ],
    "torchtitan": [
        "outputs", "outputs/checkpoint", "outputs/checkpoint/step-500", "outputs/checkpoint/step-500/.metadata",
    ],
    "FSDP1 local": ["fsdp1", "fsdp1/checkpoint-500", "fsdp1/checkpoint-500/pytorch_model_fsdp_rank1.bin"],
    "torch HuggingFaceStorageWriter": ["sharded_save", "sharded_save/shard-00001-model-00001-of-00001.safetensors"],
    "DeepSpeed": ["zero", "zero/global_step3", "zero/latest", "zero/global_step3/mp_rank_00_model_states.pt"],
    "HuggingFace": [
        "big_model", "big_model/model.safetensors.index.json", "big_model/model-00002-of-00003.safetensors",
    ],
    "PEFT": ["lora", "lora/checkpoint-500", "lora/checkpoint-500/pytorch_model_fsdp_0"],
}  # fmt: skip
"""Paths that mean one checkpoint, the first the furthest up."""
FORMATS = {
    "HF Trainer (FSDP)": "dcp", "LMMs-Engine (FSDP2)": "rank_files", "verl": "rank_files", "Lightning (FSDP)": "dcp",
    "torchtitan": "dcp", "FSDP1 local": "rank_files", "torch HuggingFaceStorageWriter": "dcp_safetensors",
    "DeepSpeed": "deepspeed", "HuggingFace": "huggingface", "PEFT": "dcp",
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.write_workspace(tmp_path_factory.mktemp("detect"))


@pytest.mark.parametrize("system", ALIKE)
def test_a_checkpoint_is_found_from_wherever_in_it_one_points(system: str, home: Path) -> None:
    found = [find(home / path) for path in ALIKE[system]]
    models = {(part.format, part.path) for f in found for part in f.parts if part.role == "model"}
    assert len(models) == 1
    assert models.pop()[0] == FORMATS[system]


@pytest.mark.parametrize("system", ALIKE)
def test_the_tensors_are_the_same_from_everywhere(system: str, home: Path) -> None:
    opened = [open_path(home / path) for path in ALIKE[system]]
    assert len({frozenset(checkpoint) for checkpoint in opened}) == 1


@pytest.mark.parametrize("system", [s for s in ALIKE if s in ("HF Trainer (FSDP)", "Lightning (FSDP)", "torchtitan")])
def test_the_writer_is_named(system: str, home: Path) -> None:
    assert find(home / ALIKE[system][1]).writer == system or find(home / ALIKE[system][0]).writer == system


def test_the_newest_checkpoint_of_a_run_is_taken_or_the_step_asked_for(home: Path) -> None:
    assert [number for number, _ in numbered(home / "output")] == [400, 500]
    assert find(home / "output").step == 500
    assert find(home / "output", step=400).root == home / "output/checkpoint-400"
    with pytest.raises(NotFound, match="no checkpoint of step 401") as error:
        find(home / "output", step=401)
    assert error.value.hint == "it has the steps 400, 500"
    with pytest.raises(NotFound, match="is step 400, not 500"):
        find(home / "output/checkpoint-400", step=500)


def test_steps_are_numbers_not_text(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        write_dcp(tmp_path / f"checkpoint-{step}/pytorch_model_fsdp_0", workspace.state_of())
    (tmp_path / "checkpoint-100-merged").mkdir()
    (tmp_path / "checkpoint-last").mkdir()
    assert find(tmp_path).step == 100


def test_an_unfinished_newest_checkpoint_is_passed_over_and_said(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_dcp(tmp_path / f"checkpoint-{step}/pytorch_model_fsdp_0", workspace.state_of())
    (tmp_path / "checkpoint-3/pytorch_model_fsdp_0/.metadata").unlink()
    (tmp_path / "checkpoint-2/pytorch_model_fsdp_0/__1_0.distcp").unlink()
    (tmp_path / "checkpoint-4").mkdir()
    found = find(tmp_path)
    assert found.step == 1
    assert [n for n in found.notices if "checkpoint-3" in n and "did not finish" in n]
    assert [n for n in found.notices if "checkpoint-2" in n and "__1_0.distcp" in n]
    assert [n for n in found.notices if "checkpoint-4" in n]


def test_a_run_without_one_complete_checkpoint_says_why_for_each(tmp_path: Path) -> None:
    for step in (1, 2):
        write_dcp(tmp_path / f"checkpoint-{step}/pytorch_model_fsdp_0", workspace.state_of())
        (tmp_path / f"checkpoint-{step}/pytorch_model_fsdp_0/.metadata").unlink()
    with pytest.raises(Incomplete, match=r"none of 2 checkpoints is complete: checkpoint-2 .*, checkpoint-1 "):
        find(tmp_path)


@pytest.mark.parametrize(
    ("files", "error", "said"),
    [
        ([], NotFound, "it is empty"),
        (["notes.txt", "loss.png"], NotFound, "it holds loss.png, notes.txt"),
        ([".metadata.tmp", "__0_0.distcp"], Incomplete, "the save did not finish"),
        (["__0_0.distcp", "__1_0.distcp"], Incomplete, "the save did not finish"),
        (["pytorch_model_fsdp_0/x"], Incomplete, "pytorch_model_fsdp_0 holds no shards: x"),
        (["a.pt", "b.pt"], InputError, "holds several files: a.pt, b.pt"),
        ([".metadata.tmp"], Incomplete, "the save did not finish"),
    ],
)  # fmt: skip
def test_what_is_not_a_checkpoint_is_explained(
    files: list[str], error: type[InputError], said: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(error, match=said):
        open_path(tmp_path)


def test_a_rank_file_that_is_missing_is_named(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "verl/global_step_500/actor", tmp_path / "actor")
    (tmp_path / "actor/model_world_size_2_rank_1.pt").unlink()
    with pytest.raises(Incomplete, match="1"):
        open_path(tmp_path / "actor")


def test_two_checkpoints_side_by_side_are_not_guessed_between(home: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(home / "output/checkpoint-500", tmp_path / name)
    with pytest.raises(InputError, match="holds several checkpoints: one, two") as error:
        find(tmp_path)
    assert error.value.hint == "name the one you mean"


def test_the_directory_of_the_shards_can_be_named(home: Path) -> None:
    ema = find(home / "run", state_dict_dirname="pytorch_ema_model_fsdp_0")
    assert ema.parts[0].path == home / "run/checkpoint-500/pytorch_ema_model_fsdp_0"
    with pytest.raises(NotFound):
        find(home / "run/checkpoint-500", state_dict_dirname="optimizers")


def test_other_parts_are_seen_too(home: Path) -> None:
    assert {p.role for p in find(home / "output/checkpoint-500").parts} == {"model", "optimizer"}
    assert {p.role for p in find(home / "run/checkpoint-500").parts} == {"model", "ema", "optimizer"}


def test_config_and_tokenizer_are_looked_for_nearby(home: Path) -> None:
    def has_config(path: str) -> bool:
        return any((place / "config.json").is_file() for place in find(home / path).companions)

    assert has_config("verl/global_step_500/actor")
    assert has_config("run/checkpoint-500/pytorch_model_fsdp_0")
    assert not has_config("output/checkpoint-500")


def test_two_spellings_of_one_path_are_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home / "output")
    assert find(Path(".")).root == find(home / "output/../output").root == find(home / "output").root


@pytest.mark.parametrize("head, program", [(b"(\xb5/\xfd", "zstd"), (b"\x1f\x8b\x08", "gzip"), (b"\xfd7zXZ\0", "xz")])
def test_a_file_that_is_compressed_is_called_so(head: bytes, program: str, tmp_path: Path) -> None:
    (tmp_path / "a b.pt").write_bytes(head + bytes(900))
    with pytest.raises(Unsupported, match=rf"a b\.pt is compressed \({program}\)") as raised:
        find(tmp_path / "a b.pt")
    assert raised.value.hint == f"{program} -dc '{tmp_path}/a b.pt' > 'a b'-plain, and name that"


def test_an_archive_of_something_else_is_said_to_be_that(tmp_path: Path) -> None:
    (tmp_path / "model_config.yaml").write_text("model: {}")
    with tarfile.open(tmp_path / "m.nemo", "w") as archive:
        archive.add(tmp_path / "model_config.yaml", "model_config.yaml")
    with pytest.raises(NotFound, match=r"without weights of NeMo: it holds model_config\.yaml"):
        find(tmp_path / "m.nemo")
