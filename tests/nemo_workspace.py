"""The NeMo part of a user's directory: an archive of NeMo 1 in every form that the documentation's commands name.

What is in it NeMo wrote; only the tokenizer, of which its data has no copy, is made here.
"""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

from reshard.cli.main import main

DATA = Path(__file__).parent / "data"
LLAMA, MISTRAL = "meta-llama/Meta-Llama-3-8B", "mistralai/Mistral-7B-v0.1"
"""Directories of these names are taken before NVIDIA's names are looked up, or the hub is asked."""
EXPORTED = DATA / "nemo/nemo1/mistral_hf.safetensors"
"""What NeMo's own exporter made of the archive."""

_TOKENIZER = "0073c5cf4b6b456cb103be846c52552b_tokenizer.model"
_NUM_TOKENS = 250


def write_nemo(directory: Path) -> Path:
    """Everything of NeMo's that the documentation's commands name."""
    extracted = directory / "extracted"
    shutil.copytree(DATA / "nemo/nemo1/mistral", extracted)
    (extracted / _TOKENIZER).write_bytes(_pieces())
    (directory / "tokenizer.model").write_bytes(_pieces())
    shutil.copytree(extracted / "model_weights", directory / "model_weights")
    for name, mode in (("model.nemo", "w:"), ("old.nemo", "w:gz")):
        with tarfile.open(directory / name, mode) as archive:
            archive.add(extracted, ".")
    shutil.copytree(DATA / "nemo2/llama3", directory / "nemo2")
    shutil.copytree(DATA / "nemo2/llama3_hf", directory / LLAMA)
    _write_named(extracted, directory / MISTRAL)
    shutil.copy(DATA / "nemo/yaml/gpt_v2.4.0.yaml", directory / "megatron_gpt_config.yaml")
    return directory


def _pieces() -> bytes:
    """A SentencePiece model: field 1 for each token."""
    tokens = (f"token {number}".encode() for number in range(_NUM_TOKENS))
    return b"".join(bytes([0x0A, len(token) + 2, 0x0A, len(token)]) + token for token in tokens)


def _write_named(source: Path, directory: Path) -> None:
    """What `--model-id` says of a model as small as this one: a context of NeMo 2, without weights."""
    assert main(["convert", str(source), str(directory), "--to", "nemo2", "-q"]) == 0
    shutil.rmtree(directory / "weights")
    (directory / "reshard.json").unlink()
