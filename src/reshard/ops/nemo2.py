"""A model as a directory of NeMo 2: its context, its tokenizer, and the rows of its vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from reshard.core.box import Box
from reshard.core.tensor import Source, Tensor
from reshard.dialects import nemo_config
from reshard.dialects.setting import Values, flat
from reshard.errors import NotFound, Unsupported
from reshard.formats import fiddle, huggingface, nemo1, nemo2, nemo2_context, token_count
from reshard.formats.fiddle import Call, Symbol
from reshard.ops.tokens import is_of_tokenizer
from reshard.storage import hub
from reshard.storage.files import Files, LazySource
from reshard.storage.plan import FilePlan

LIBRARIES = ("sentencepiece", "huggingface")
PREFIX = nemo2.PREFIX

_EMBEDDING = "embedding.word_embeddings.weight"

_DIRECTORY, _PIECES, _GENERATION = "nemo_tokenizer", "tokenizer.model", "generation_config.json"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer, as a context has it."""

    call: Call
    files: Mapping[str, Tensor]
    """By their names in the context."""
    num_tokens: int | None = None
    """As far as its files tell."""


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory, planned."""

    files: tuple[FilePlan, ...]
    notices: tuple[str, ...] = field(default=())


def plan(
    tensors: Mapping[str, Tensor],
    settings: Values,
    config: Mapping[str, Any],
    family: str,
    assets: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    max_file_nbytes: int | None,
) -> Directory:
    """The files of a model, and what the user should know.

    Args:
        tensors: By Megatron's names on disk.
        settings: As `megatron_config.to_megatron` gives them.
        config: config.json.
        family: The family's name.
        assets: What lay beside the model; `generation_config.json` is taken.
        tokenizer: None where there is none.
    """
    size, unit, notices = _vocabulary(tensors, settings, tokenizer)
    rope = flat(config)["rope"]
    call = nemo_config.config_call(settings, family, rope, size, unit)
    generation = {f"artifacts/{_GENERATION}": assets[_GENERATION]} if _GENERATION in assets else {}
    described = nemo_config.Described(
        nemo_config.model_class(family), call, tokenizer.call if tokenizer else None, bool(generation)
    )
    return Directory(
        nemo2.plan(
            tensors,
            io=fiddle.dumps(nemo_config.context(described)),
            model_yaml=nemo_config.model_yaml(described),
            files={**(tokenizer.files if tokenizer else {}), **generation},
            max_file_nbytes=max_file_nbytes,
        ),
        notices,
    )


def config_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor], family: str) -> dict[str, Any]:
    """A config.json for `megatron_config.to_megatron`: with the dtype that is written, and NeMo's own scaling aside.

    Raises Unsupported for a family that NeMo has no class for.
    """
    nemo_config.model_class(family)
    return {**nemo_config.without_bands(config), "dtype": tensors[_EMBEDDING].dtype.torch}


def filled(settings: Values, model_id: str) -> dict[str, Any]:
    """A checkpoint's settings with what --model-id adds: one of NVIDIA's names, or a directory of NeMo 2.

    Raises Mismatch where they contradict it, Unsupported for a name that is not known.
    """
    context = Path(model_id) / nemo2.CONTEXT
    if nemo2_context.describes(context):
        known = nemo_config.of_context(nemo2_context.settings_of(context).values)
    else:
        known = nemo_config.of_id(model_id)
    return nemo_config.filled(settings, model_id, known)


def _vocabulary(
    tensors: Mapping[str, Tensor], settings: Values, tokenizer: Tokenizer | None
) -> tuple[int | None, int, tuple[str, ...]]:
    """(vocab_size, make_vocab_size_divisible_by, what to say), by which NeMo makes an embedding of just these rows.

    Without a vocab_size NeMo makes the tokenizer's number a multiple, and so do all its releases; with one it makes as
    many rows as that says, from 2.3 on.
    """
    rows = tensors[_EMBEDDING].shape[0]
    unit = min(rows & -rows, 128)
    if tokenizer is None:
        return (
            rows,
            unit,
            ("without a tokenizer NeMo builds the model, but cannot generate: --tokenizer-path names one",),
        )
    tokens = tokenizer.num_tokens
    asked = settings.get("make_vocab_size_divisible_by") or unit
    for divisor in dict.fromkeys((asked, unit)):
        if tokens is not None and tokens == settings.get("vocab_size") and -(-tokens // divisor) * divisor == rows:
            return None, divisor, ()
    said = f"the embedding has {rows} rows, the tokenizer {tokens} tokens: " if tokens is not None else ""
    return rows, unit, (f"{said}vocab_size {rows} is in the context, which NeMo 2.2 leaves out and older ones refuse",)


# ----------------------------------------------------------------------------------------------------- tokenizers


def tokenizer_named(path: str, library: str | None) -> Tokenizer:
    """The tokenizer of --tokenizer-path: a SentencePiece file, or a directory or hub id with a tokenizer's files.

    Raises NotFound where nothing of the kind is there.
    """
    place = tokenizer_place(path)
    if place.is_file():
        if library == "huggingface":
            raise NotFound(
                f"--tokenizer-path {path} is a file: a HuggingFace tokenizer is a directory of them", hint=_HINT
            )
        return _sentence_piece(f"--tokenizer-path {path}", huggingface.asset(place), LazySource(Files()))
    _, assets = huggingface.companions(place)
    found = tokenizer_among(assets, LazySource(Files()), library)
    if found is None:
        raise NotFound(f"--tokenizer-path {path} has no files of a {library or 'known'} tokenizer", hint=_HINT)
    return found


def tokenizer_place(path: str) -> Path:
    """The file or directory that --tokenizer-path names. Raises NotFound."""
    place = Path(path).expanduser()
    if place.is_file():
        return place
    try:
        return hub.resolve(path, hint=_HINT)
    except NotFound as error:
        raise NotFound(f"--tokenizer-path {error}", hint=error.hint) from error


def tokenizer_files(path: str, library: str | None) -> dict[str, Tensor]:
    """The files of --tokenizer-path, as a HuggingFace directory has them."""
    return {PurePath(name).name: data for name, data in tokenizer_named(path, library).files.items()}


_HINT = "--tokenizer-path names a SentencePiece model, a directory with tokenizer.json or tokenizer.model, or a hub id"


def tokenizer_among(assets: Mapping[str, Tensor], source: Source, library: str | None = None) -> Tokenizer | None:
    """The tokenizer among the files that lie beside a model; None where there is none of this library."""
    if library != "sentencepiece" and any(name in assets for name in _OF_HUGGINGFACE):
        files = {name: data for name, data in assets.items() if is_of_tokenizer(name)}
        arguments = {"pretrained_model_name": _DIRECTORY}
        listing = assets.get("tokenizer.json")
        return Tokenizer(
            Call(Symbol.of(nemo2_context.AUTO_TOKENIZER), arguments),
            {f"{_DIRECTORY}/{name}": data for name, data in files.items()},
            token_count.of_bytes(_read(listing, source)) if listing is not None else None,
        )
    if library != "huggingface" and _PIECES in assets:
        return _sentence_piece(_PIECES, assets[_PIECES], source)
    if library is None and nemo1.TIKTOKEN in assets:
        call = Call(Symbol.of(nemo2_context.TIKTOKEN), {"vocab_file": nemo1.TIKTOKEN})
        return Tokenizer(call, {nemo1.TIKTOKEN: assets[nemo1.TIKTOKEN]}, _NUM_OF_TIKTOKEN)
    return None


_NUM_OF_TIKTOKEN = 1 << 17
"""TiktokenTokenizer counts as many tokens, whatever its file has: special ones fill the rest."""


def tokenizer_on_hub(name: str) -> Tokenizer:
    """A tokenizer that NeMo fetches by its name."""
    return Tokenizer(Call(Symbol.of(nemo2_context.AUTO_TOKENIZER), {"pretrained_model_name": name}), {})


_OF_HUGGINGFACE = ("tokenizer.json", "tokenizer_config.json")


def has_tokenizer(assets: Mapping[str, Tensor]) -> bool:
    """Whether files of a tokenizer are among those that lie beside a model."""
    return any(map(is_of_tokenizer, assets))


def _sentence_piece(name: str, data: Tensor, source: Source) -> Tokenizer:
    num_tokens = token_count.of_bytes(_read(data, source))
    if num_tokens is None:
        raise Unsupported(f"{name} is not a SentencePiece model", hint=_HINT)
    arguments = {"model_path": _PIECES, "special_tokens": None, "legacy": False}
    return Tokenizer(Call(Symbol.of(nemo2_context.SENTENCE_PIECE), arguments), {_PIECES: data}, num_tokens)


def _read(data: Tensor, source: Source) -> bytes:
    if data.nbytes > token_count.LIMIT_NBYTES:
        raise Unsupported(f"a tokenizer's file of {data.nbytes} bytes, the largest have some 30 MB")
    return bytes(data.read(source, Box.whole(data.shape)).tobytes())


def assets_of(context: Path) -> dict[str, Tensor]:
    """The files of a context under the names that HuggingFace has for them: tokenizer and generation config."""
    found: dict[str, Tensor] = {}
    place = nemo2_context.tokenizer_path(context, nemo2_context.read(context))
    if place is not None and place.is_dir():
        found = dict(huggingface.companions(place)[1])
    elif place is not None and place.name.endswith(".model"):
        found = {_PIECES: huggingface.asset(place)}
    elif place is not None and place.name.endswith(".json"):
        found = {nemo1.TIKTOKEN: huggingface.asset(place)}
    generation = context / "artifacts" / _GENERATION
    return found | ({_GENERATION: huggingface.asset(generation)} if generation.is_file() else {})
