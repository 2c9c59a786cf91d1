"""Where a model's config, tokenizer and processor files are: a directory, or a name on the HuggingFace hub.

The local cache is read as huggingface_hub 1.x lays it out, without that library:

    CACHE/models--ORG--NAME/refs/REVISION          holds a commit's hash
    CACHE/models--ORG--NAME/snapshots/HASH/...     links to the files of that commit
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from reshard.errors import NotFound

FETCHED = (
    "*.json",
    "*.txt",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.py",
    "vocab.*",
    "additional_chat_templates/*",
)
"""What is fetched of a repository."""
NOT_FETCHED = ("*.index.json", "*/*.json", "*/*.txt", "*/*.py", "*/*.model")
"""Nothing of the weights, and nothing of other models in folders."""
_ID = re.compile(r"(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(?P<revision>\w[\w./-]*))?")
_HINT = "--base DIR names a directory with config.json and the tokenizer files"


def resolve(reference: str, *, weights: bool = False, hint: str = _HINT) -> Path:
    """The directory that `reference` means: a path, or a hub id `org/name` or `org/name@revision`.

    A hub id is looked up in the local cache and then, where huggingface_hub is installed and HF_HUB_OFFLINE is not
    set, fetched: config, tokenizer and processor files, and the safetensors only where the `weights` are wanted.
    Raises NotFound; `hint` says how the caller's user names such a directory.
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    match = _ID.fullmatch(reference)
    if match is None or ".." in reference:
        raise NotFound(f"{reference}: no such directory", hint=hint)
    name, revision = match["name"], match["revision"] or "main"
    return _cached(name, revision, weights) or _fetched(name, revision, weights, hint)


def cache_directory() -> Path:
    """Where huggingface_hub keeps its files, by the variables that it reads."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def is_offline() -> bool:
    """Whether the user has forbidden the network."""
    return any(
        os.environ.get(v, "").upper() in ("1", "ON", "YES", "TRUE") for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _cached(name: str, revision: str, weights: bool = False) -> Path | None:
    repository = cache_directory() / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / revision
    commit = reference.read_text("utf-8").strip() if reference.is_file() else revision
    snapshot = repository / "snapshots" / commit
    if not re.fullmatch(r"\w[\w.-]*", commit) or not (snapshot / "config.json").is_file():
        return None
    return snapshot if not weights or any(snapshot.glob("*.safetensors")) else None


def _fetched(name: str, revision: str, weights: bool, hint: str) -> Path:
    where = f"{name}@{revision}" if revision != "main" else name
    if is_offline():
        raise NotFound(
            f"{where} is neither a directory nor in {cache_directory()}, and HF_HUB_OFFLINE is set", hint=hint
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise NotFound(
            f"{where} is neither a directory nor in {cache_directory()}",
            hint=f"{hint}; or `pip install 'reshard[hub]'` to fetch it",
        ) from error
    try:
        found = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_directory(),
            allow_patterns=[*FETCHED, *(("*.safetensors",) if weights else ())],
            ignore_patterns=[pattern for pattern in NOT_FETCHED if not (weights and pattern == "*.index.json")],
        )
    except Exception as error:  # the library's own, its HTTP client's and the system's have no common base
        reason = str(error).strip().partition("\n")[0]
        raise NotFound(
            f"{where} could not be fetched from the hub: {reason} (and no directory is called so)", hint=hint
        ) from error
    return Path(found)
