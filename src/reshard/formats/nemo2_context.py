"""What NeMo 2 writes beside the weights about a model, read as data: nothing in it is imported or called.

    context/io.json          the call that makes model and trainer again: classes, and the arguments that were given
    context/model.yaml       the model with every field of its config
    context/nemo_tokenizer/  or <32 hex digits>_tokenizer.model, as io.json names it
    context/<32 hex digits>  pickles of a training run's own objects: never opened

NeMo itself goes by io.json, so its arguments count before model.yaml's values, and these before the class's own.

Source: NeMo `lightning/io/{pl,mixin,to_config}.py`, 2.0 to 2.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from reshard.errors import Corrupt, Unsupported, listed
from reshard.formats import fiddle, megatron_settings, token_count
from reshard.formats.fiddle import Call, Symbol
from reshard.formats.megatron_settings import Settings
from reshard.formats.nemo2_classes import defaults

IO = "io.json"
MODEL = "model.yaml"

SENTENCE_PIECE = "nemo.collections.common.tokenizers.sentencepiece_tokenizer.SentencePieceTokenizer"
TIKTOKEN = "nemo.collections.common.tokenizers.tiktoken_tokenizer.TiktokenTokenizer"
AUTO_TOKENIZER = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"

_PRE_SOFTMAX = "moe_router_pre_softmax"


@dataclass(frozen=True, slots=True)
class Context:
    """What io.json says of a model."""

    model: Call
    config: Call
    tokenizer: Call | None


def describes(context: Path) -> bool:
    """Whether a directory says what the model is."""
    return any((context / name).is_file() for name in (IO, MODEL))


def settings_of(context: Path) -> Settings:
    """The model's settings, under run_config.yaml's names. Raises Corrupt for files that are damaged."""
    stated = megatron_settings.of_model_yaml(context / MODEL) if (context / MODEL).is_file() else None
    if not (context / IO).is_file():
        return stated or Settings()
    found = read(context)
    given = _plain_arguments(found.config, context)
    own = defaults(found.config.target.path)
    notices = [] if stated is None else _disagreements(stated.values, given)
    if stated is None and own is None:
        notices.append(f"{found.config.target.path!s:.200} is not a class of NeMo's: io.json's arguments alone count")
    if stated is None and _PRE_SOFTMAX in (own or {}) and _PRE_SOFTMAX not in given and _has_experts(own, given):
        notices.append(
            f"io.json does not say {_PRE_SOFTMAX}, which was True up to NeMo 2.3 and is False since: taken for False"
        )
    values = {**(own or {}), **(stated.values if stated else {}), **given}
    values |= {"_target_": found.config.target.path, "model_class": found.model.target.path}
    settings = megatron_settings.settings(values, IO if stated is None else MODEL, _token_count(context, found, values))
    return replace(settings, notices=tuple(notices))


def _plain_arguments(config: Call, context: Path) -> dict[str, Any]:
    """Arguments as model.yaml would have them; calls that are still to be made are left out."""
    try:
        return {name: _plain(value) for name, value in config.arguments.items() if not isinstance(value, Call)}
    except ValueError as error:
        raise Corrupt(f"{context / IO}: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Symbol):
        return value.name.rpartition(".")[2]
    return megatron_settings.plain(value)


def _disagreements(stated: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    unlike = [
        f"{name} {stated[name]!r}, {given[name]!r}" for name in given if stated.get(name, given[name]) != given[name]
    ]
    if not unlike:
        return []
    return [f"{MODEL} and {IO} differ, and {IO} counts, as it does for NeMo: {listed(unlike)}"]


def _has_experts(own: Mapping[str, Any] | None, given: Mapping[str, Any]) -> bool:
    return bool({**(own or {}), **given}.get("num_moe_experts"))


def read(context: Path) -> Context:
    """What a directory's io.json says of the model. Raises Corrupt when it is none of a model."""
    path = context / IO
    if path.stat().st_size > fiddle.LIMIT_NBYTES:
        raise Unsupported(f"{path} has {path.stat().st_size} bytes, such files have some thousands")
    root = fiddle.loads(path.read_bytes(), str(path))
    model = root.get("model") if isinstance(root.get("model"), Call) else root
    config, tokenizer = model.get("config"), model.get("tokenizer")
    if not isinstance(config, Call):
        raise Unsupported(
            f"{path} is of {model.target.path!s:.200}, which has no config: no language model of NeMo's",
            hint="language models are read, as `nemo.collections.llm` makes them",
        )
    return Context(model, config, tokenizer if isinstance(tokenizer, Call) else None)


# ----------------------------------------------------------------------------------------------------- tokenizers


def tokenizer_path(context: Path, found: Context) -> Path | None:
    """The file or directory in the context that the tokenizer is made from; None where it is not there."""
    tokenizer = found.tokenizer
    if tokenizer is None:
        return None
    named = next((n for key in _PLACES if (n := tokenizer.get(key))), None)
    if not isinstance(named, str) or PurePosixPath(named).is_absolute() or ".." in PurePosixPath(named).parts:
        return None
    path = context / named
    return path if path.exists() else None


_PLACES = ("model_path", "pretrained_model_name", "vocab_file")
"""The arguments that name a place, by class: SentencePiece's, HuggingFace's, tiktoken's."""


def _token_count(context: Path, found: Context, values: Mapping[str, Any]) -> int | None:
    """Of the tokenizer, by which NeMo chooses the rows of the embedding when the config has no number of them."""
    if values.get("vocab_size") is not None or found.tokenizer is None:
        return None
    if found.tokenizer.get("special_tokens"):
        return None
    path = tokenizer_path(context, found)
    return token_count.count(path) if path is not None else None
