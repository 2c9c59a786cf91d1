"""verify finds every flipped byte; --against what a forged manifest hides; --remove-shards waits for the proof."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import reshard
from checkpoints import equals, left_in, model, write_dcp
from reshard.cli.main import main
from reshard.errors import Corrupt, OutputError, ReshardError
from reshard.storage import manifest
from reshard.storage.manifest import sealed

MODEL = model()
OUTPUTS = ["out", "shards", "out.safetensors", "out.pt"]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dcp(tmp_path_factory.mktemp("verify") / "source", MODEL, ranks=2, prefix=("model",))


@pytest.fixture(scope="session")
def outputs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One output of each kind; `shards` is a directory of several files."""
    directory = tmp_path_factory.mktemp("outputs")
    for name in OUTPUTS:
        reshard.merge(source, directory / name, max_shard_size="4KB" if name == "shards" else None)
    return directory


def files_of(output: Path) -> list[Path]:
    if output.is_dir():
        return sorted(p for p in output.rglob("*") if p.is_file())
    return sorted(output.parent.glob(f"{output.name}*"))


def problems(output: Path, against: Path | None = None) -> tuple[str, ...]:
    """What verify finds, or the error that it ends in."""
    try:
        return reshard.verify(output, against).problems
    except ReshardError as error:
        return (str(error),)


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_was_written_is_proven(outputs: Path, source: Path, name: str) -> None:
    verified = reshard.verify(outputs / name, source)
    assert verified.problems == ()
    assert verified.num_tensors == len(MODEL)
    assert main(["verify", str(outputs / name), "--against", str(source)]) == 0


@pytest.mark.parametrize("name", OUTPUTS)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_anywhere_is_found(outputs: Path, name: str, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(files_of(outputs / name)))
    original = path.read_bytes()
    at, bit = data.draw(st.integers(0, len(original) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(original)
    changed[at] ^= 1 << bit
    try:
        path.write_bytes(changed)
        found = problems(outputs / name)
    finally:
        path.write_bytes(original)
    assert found != ()
    assert str(path.name) in found[0]


def test_every_byte_of_a_manifest_counts(outputs: Path) -> None:
    path = outputs / "out/reshard.json"
    original = path.read_bytes()
    unseen = []
    for at in range(len(original)):
        changed = bytearray(original)
        changed[at] ^= 1
        path.write_bytes(changed)
        try:
            manifest.read(outputs / "out")
        except Corrupt:
            continue
        finally:
            path.write_bytes(original)
        unseen.append(at)
    assert unseen == []


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_missing_a_short_and_a_long_file_are_found(outputs: Path, tmp_path: Path, name: str) -> None:
    for path in files_of(outputs / name):
        if path.name.endswith("reshard.json"):
            continue
        original = path.read_bytes()
        for changed in (None, b"", original[:-1], original + b"\0", original[: len(original) // 2]):
            path.unlink()
            if changed is not None:
                path.write_bytes(changed)
            found = problems(outputs / name)
            path.write_bytes(original)
            assert found
            assert path.name in found[0]
    assert problems(outputs / name) == ()


def test_without_a_manifest_only_the_source_can_tell(outputs: Path, source: Path, tmp_path: Path) -> None:
    shutil.copytree(outputs / "out", tmp_path / "out")
    (tmp_path / "out/reshard.json").unlink()
    assert "no manifest" in problems(tmp_path / "out")[0]
    assert problems(tmp_path / "out", source) == ()


def test_a_manifest_that_names_files_elsewhere_is_no_proof(outputs: Path, tmp_path: Path) -> None:
    shutil.copytree(outputs / "out", tmp_path / "out")
    (tmp_path / "elsewhere").write_bytes((outputs / "out/model.safetensors").read_bytes())
    said = json.loads((tmp_path / "out/reshard.json").read_text())
    record = said["files"]["model.safetensors"]
    for name in ("../elsewhere", str(tmp_path / "elsewhere")):
        said["files"] = {name: record}
        (tmp_path / "out/reshard.json").write_bytes(sealed(json.dumps(said, indent=1).encode() + b"\n"))
        assert "outside of the output" in problems(tmp_path / "out")[0]


# --------------------------------------------------------------------------------------------------- --against


def forged(output: Path) -> None:
    """Make the manifest of a directory say what its files now hold, as somebody who hides a change would."""
    import xxhash

    said = json.loads((output / "reshard.json").read_text())
    for name, record in said["files"].items():
        data = (output / name).read_bytes()
        record["nbytes"] = len(data)
        for segment in record["segments"]:
            part = data[segment["offset"] : segment["offset"] + segment["nbytes"]]
            segment["xxh3_128"] = xxhash.xxh3_128_hexdigest(part)
    (output / "reshard.json").write_bytes(sealed(json.dumps(said, indent=1).encode() + b"\n"))


@pytest.mark.parametrize("fqn", ["embed.weight", "layers.1.norm.weight", "steps"])
@pytest.mark.parametrize("name", ["out", "shards"])
def test_a_wrong_value_under_a_forged_manifest_is_found(
    outputs: Path, source: Path, tmp_path: Path, name: str, fqn: str
) -> None:
    output = Path(shutil.copytree(outputs / name, tmp_path / "out"))
    for path in output.glob("*.safetensors"):
        tensors = load_file(path)
        if fqn in tensors:
            value = tensors[fqn].reshape(-1)
            data = path.read_bytes()
            at = data.index(value.numpy().tobytes()) + (value.numel() - 1) * value.element_size()
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    forged(output)
    assert problems(output) == ()
    assert problems(output, source) == (f"{fqn}: not the values of the source",)
    assert main(["verify", str(output), "--against", str(source)]) == 1


def test_another_source_is_found(outputs: Path, tmp_path: Path) -> None:
    other = write_dcp(tmp_path / "other", model(seed=1), prefix=("model",))
    found = problems(outputs / "out", other)
    assert len(found) == len(MODEL)
    more = write_dcp(tmp_path / "more", model(3), prefix=("model",))
    assert "layers.2.up.weight is in the source and not in" in " ".join(problems(outputs / "out", more))
    fewer = write_dcp(tmp_path / "fewer", model(1), prefix=("model",))
    assert "and not in the source" in " ".join(problems(outputs / "out", fewer))


def test_a_cast_is_recomputed_as_the_manifest_says(source: Path, tmp_path: Path) -> None:
    reshard.merge(source, tmp_path / "out", dtype="bfloat16")
    assert problems(tmp_path / "out", source) == ()
    path = tmp_path / "out/model.safetensors"
    tensors = load_file(path)
    wanted = {k: v.bfloat16() if v.is_floating_point() else v for k, v in MODEL.items()}
    assert equals(tmp_path / "out", wanted)
    tensors["embed.weight"][0, 0] = torch.nextafter(
        tensors["embed.weight"][0, 0], torch.tensor(9, dtype=torch.bfloat16)
    )
    save_file(tensors, path)
    (tmp_path / "out/reshard.json").unlink()
    assert any("embed.weight" in p for p in problems(tmp_path / "out", source))


@pytest.mark.parametrize("kind", ["safetensors", "torch.save"])
def test_what_other_tools_wrote_is_held_against_the_source(source: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / ("other.safetensors" if kind == "safetensors" else "other.pt")

    def save(tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, output) if kind == "safetensors" else torch.save(tensors, output)

    save(MODEL)
    assert problems(output, source) == ()
    save(MODEL | {"steps": MODEL["steps"] + 1})
    assert problems(output, source) == ("steps: not the values of the source",)
    save({k: v for k, v in MODEL.items() if k != "steps"})
    assert "steps is in the source" in problems(output, source)[0]
    save(MODEL | {"extra": torch.zeros(3)})
    assert "extra is in" in problems(output, source)[0]
    save(MODEL | {"steps": MODEL["steps"].int()})
    assert "I32" in problems(output, source)[0]


# ----------------------------------------------------------------------------------------------- --remove-shards


@pytest.fixture
def shards(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "mine"))


def test_shards_are_removed_once_the_output_is_proven(shards: Path, tmp_path: Path) -> None:
    merged = reshard.merge(shards, tmp_path / "out", remove_shards=True)
    assert len(merged.removed) == 3
    assert not shards.exists()
    assert equals(tmp_path / "out", MODEL)
    assert problems(tmp_path / "out") == ()


def test_other_files_beside_the_shards_stay(shards: Path, tmp_path: Path) -> None:
    (shards / "notes.txt").write_text("mine")
    reshard.merge(shards, tmp_path / "out", remove_shards=True)
    assert left_in(shards) == ["notes.txt"]


def test_nothing_is_removed_when_a_shard_is_damaged(shards: Path, tmp_path: Path) -> None:
    data = bytearray((shards / "__1_0.distcp").read_bytes())
    data[800] ^= 1
    (shards / "__1_0.distcp").write_bytes(data)
    before = left_in(tmp_path)
    with pytest.raises(ReshardError):
        reshard.merge(shards, tmp_path / "out", remove_shards=True)
    assert left_in(tmp_path) == before


def test_nothing_is_removed_when_the_output_does_not_hold_what_was_written(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reshard.ops import merge as module

    real = module.run

    def damaging(*args: object, **options: object) -> object:
        result = real(*args, **options)
        data = bytearray((tmp_path / "out/model.safetensors").read_bytes())
        data[-1] ^= 1
        (tmp_path / "out/model.safetensors").write_bytes(data)
        return result

    monkeypatch.setattr(module, "run", damaging)
    before = left_in(shards)
    with pytest.raises(OutputError, match=r"model\.safetensors"):
        reshard.merge(shards, tmp_path / "out", remove_shards=True)
    assert left_in(shards) == before


@pytest.mark.parametrize("what", ["optimizer", "object", "excluded"])
def test_what_would_be_lost_is_not_removed(tmp_path: Path, what: str) -> None:
    tensors = {"model.w": torch.randn(4, 4), "model.v": torch.randn(4)}
    paths = {"model.w": ("model", "w"), "model.v": ("model", "v")}
    if what == "optimizer":
        tensors["optimizer.state.w.exp_avg"] = torch.randn(4, 4)
        paths["optimizer.state.w.exp_avg"] = ("optimizer", "state", "w", "exp_avg")
    options = {"exclude": ("v",)} if what == "excluded" else {}
    objects = {"epoch": 3} if what == "object" else None
    shards = write_dcp(tmp_path / "mine", tensors, objects=objects, paths=paths)
    before = left_in(tmp_path)
    with pytest.raises(OutputError, match="would lose"):
        reshard.merge(shards, tmp_path / "out", remove_shards=True, **options)
    assert left_in(tmp_path) == before


def test_shards_that_are_removed_by_the_command_line(shards: Path, tmp_path: Path) -> None:
    assert main(["merge", str(shards), str(tmp_path / "out.safetensors"), "--remove-shards", "-q"]) == 0
    assert not shards.exists()
    assert equals(tmp_path / "out.safetensors", MODEL)


def test_verify_against_the_source_sees_a_config_that_was_changed_under_a_forged_manifest(tmp_path: Path) -> None:
    write_dcp(tmp_path / "run", model(2))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "strange"}\n')
    reshard.merge(tmp_path / "run", tmp_path / "out", base=str(tmp_path / "base"))
    (tmp_path / "base2").mkdir()
    (tmp_path / "base2" / "config.json").write_text('{"model_type": "changed"}\n')
    reshard.merge(tmp_path / "run", tmp_path / "other", base=str(tmp_path / "base2"))
    (tmp_path / "base" / "config.json").write_text('{"model_type": "changed"}\n')
    found = reshard.verify(tmp_path / "out", tmp_path / "run")
    assert found.problems == (f"{tmp_path / 'out' / 'config.json'} is not the file that the source gives",)


def test_verify_recomputes_an_average_from_its_recipe(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_dcp(tmp_path / "run" / f"checkpoint-{step}", times(step))
    sources = [tmp_path / "run" / f"checkpoint-{step}" for step in (1, 2, 3)]
    reshard.average(sources, tmp_path / "soup.safetensors", weights=[1, 2, 1])
    assert reshard.verify(tmp_path / "soup.safetensors", tmp_path / "run").ok
    shutil.rmtree(sources[1])
    write_dcp(sources[1], times(7))
    assert not reshard.verify(tmp_path / "soup.safetensors", tmp_path / "run").ok


def times(factor: int) -> dict[str, torch.Tensor]:
    return {fqn: tensor * factor for fqn, tensor in model(1).items()}


def test_the_directory_one_works_in_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dcp(tmp_path / "run", model(1))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "work.txt").write_text("precious")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match="no place for an output"):
        reshard.merge(tmp_path / "run", ".", force=True)
    assert (tmp_path / "here" / "work.txt").read_text() == "precious"
