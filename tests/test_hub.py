"""A reference is a directory, a snapshot in the local cache, or fetched without weights."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest

from reshard.errors import NotFound
from reshard.storage import hub
from reshard.storage.hub import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    for variable in ("HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


def store(cache: Path, name: str, revision: str = "main", file: str = "config.json") -> Path:
    """A snapshot as huggingface_hub lays it out: links to blobs."""
    repository = cache / f"models--{name}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "blobs" / "abc").write_text("{}")
    (snapshot / file).symlink_to("../../blobs/abc")
    (repository / "refs" / revision).write_text(COMMIT)
    return snapshot


def test_a_directory_is_itself(tmp_path: Path, cache: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


def test_a_name_is_found_in_the_cache(cache: Path) -> None:
    snapshot = store(cache, "org--name-7B")
    assert resolve("org/name-7B") == snapshot
    assert resolve(f"org/name-7B@{COMMIT}") == snapshot


def test_a_name_without_an_organisation_and_a_revision_are_found(cache: Path) -> None:
    snapshot = store(cache, "gpt2", "v1")
    assert resolve("gpt2@v1") == snapshot


@pytest.mark.parametrize(
    "variable, below", [("HF_HOME", "hub"), ("HUGGINGFACE_HUB_CACHE", ""), ("XDG_CACHE_HOME", "huggingface/hub")]
)
def test_the_cache_is_where_the_library_keeps_it(
    variable: str, below: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv(variable, str(tmp_path / "other"))
    snapshot = store(tmp_path / "other" / below, "org--name")
    assert resolve("org/name") == snapshot


def test_a_snapshot_without_a_config_does_not_count(cache: Path) -> None:
    store(cache, "org--name", file="tokenizer.json")
    with pytest.raises(NotFound):
        resolve("org/name")


def test_offline_the_error_says_so_and_names_the_option(cache: Path) -> None:
    with pytest.raises(NotFound, match="HF_HUB_OFFLINE is set") as caught:
        resolve("org/name@v2")
    assert "org/name@v2" in str(caught.value)
    assert "--base DIR" in str(caught.value.hint)


@pytest.mark.parametrize("reference", ["/no/such/dir", "./no", "../x", "org/na..me", "a/b/c", "", "org/name@", "-x/y"])
def test_what_is_no_name_is_taken_for_a_missing_directory(
    reference: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(NotFound, match="no such directory") as caught:
        resolve(reference or str(tmp_path / "missing"))
    assert "--base DIR" in str(caught.value.hint)


def test_without_the_library_the_hint_names_the_extra(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    original = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError(name)
        return original(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(NotFound, match="org/name is neither a directory nor in") as caught:
        resolve("org/name")
    assert "reshard[hub]" in str(caught.value.hint)


class Library:
    """Stands for huggingface_hub."""

    def __init__(self, result: Path | Exception) -> None:
        self.result, self.asked = result, [("", {})]

    def snapshot_download(self, name: str, **options: Any) -> str:
        self.asked.append((name, options))
        if isinstance(self.result, Exception):
            raise self.result
        return str(self.result)


def test_a_fetch_asks_for_companions_and_never_for_weights(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    library = Library(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)  # type: ignore[arg-type]
    assert resolve("org/name@v2") == tmp_path
    name, options = library.asked[-1]
    assert (name, options["revision"], options["cache_dir"]) == ("org/name", "v2", cache)
    repository = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "vocab.json",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "modeling_x.py",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "original/params.json",
        "onnx/model.onnx",
        "README.md",
    ]
    patterns = {key: options[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(repository, **patterns)) == repository[:9]


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("404"), RuntimeError("broken")])
def test_a_failed_fetch_is_explained(error: Exception, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "huggingface_hub", Library(error))  # type: ignore[arg-type]
    with pytest.raises(NotFound, match=f"org/name could not be fetched from the hub: {error}") as caught:
        resolve("org/name")
    assert "--base DIR" in str(caught.value.hint)


def test_a_reference_cannot_leave_the_cache(cache: Path) -> None:
    repository = cache / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("../../../outside")
    assert hub._cached("org/name", "main") is None
