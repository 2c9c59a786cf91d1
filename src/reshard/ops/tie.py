"""Tied weights: one tensor under two names, written once under the name of its source.

Sharded checkpoints hold a copy under each name, so identity in memory says nothing: the config says whether a pair is
tied, the bytes say whether the copies agree, and the table below says which of the two is the source.

Source of the table: `_tied_weights_keys` of the model classes of transformers 5.23, and for models whose names on the
hub are not those of their modules (LLaVA, GPT-NeoX, the Qwen omni thinkers) the hub's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from reshard.core.checkpoint import Checkpoint, same_bytes
from reshard.errors import Mismatch


@dataclass(frozen=True, slots=True)
class Tie:
    """A name that repeats another tensor."""

    alias: str
    """The whole FQN that transformers leaves out."""
    sources: tuple[str, ...]
    """Whole FQNs that it may repeat, the most telling first; `{model}` stands for one segment."""


_EMBEDDINGS = (
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "model.text_model.embed_tokens.weight",
    "model.shared.weight",
    "shared.weight",
    "model.decoder.embed_tokens.weight",
    "transformer.wte.weight",
    "transformer.word_embeddings.weight",
    "transformer.tokens_embed.weight",
    "transformer.w.weight",
    "backbone.embeddings.weight",
    "backbone.embedding.weight",
    "gpt_neox.embed_in.weight",
    "model.embed_tokens.embed_tokens.weight",
    "model.text_model.embeddings.tok_embeddings.weight",
    "model.language_model.shared.weight",
    "led.shared.weight",
    "prophetnet.word_embeddings.weight",
)
_WORDS = ("{model}.embeddings.word_embeddings.weight",)

TIES = (
    Tie("lm_head.weight", _EMBEDDINGS),
    Tie("language_model.lm_head.weight", ("language_model.model.embed_tokens.weight",)),
    Tie("text_model.lm_head.weight", ("text_model.model.embed_tokens.weight",)),
    Tie(
        "thinker.lm_head.weight",
        ("thinker.model.embed_tokens.weight", "thinker.model.language_model.embed_tokens.weight"),
    ),
    Tie("embed_out.weight", ("gpt_neox.embed_in.weight", "gpt_neox_japanese.embed_in.weight")),
    Tie("output_projection.weight", ("model.decoder.embed_tokens.weight", "biogpt.embed_tokens.weight")),
    Tie("proj_out.weight", ("model.decoder.embed_tokens.weight",)),
    Tie("head.weight", ("rwkv.embeddings.weight",)),
    Tie("lm_loss.weight", ("transformer.word_embedding.weight",)),
    Tie("pred_layer.proj.weight", ("transformer.embeddings.weight",)),
    Tie("encoder.embed_tokens.weight", ("shared.weight",)),
    Tie("decoder.embed_tokens.weight", ("shared.weight",)),
    Tie("model.encoder.embed_tokens.weight", ("model.shared.weight",)),
    Tie("model.decoder.embed_tokens.weight", ("model.shared.weight",)),
    Tie("cls.predictions.decoder.weight", _WORDS),
    Tie("cls.predictions.decoder.bias", ("cls.predictions.bias",)),
    Tie("predictions.decoder.weight", _WORDS),
    Tie("predictions.decoder.bias", ("predictions.bias",)),
    Tie("lm_head.decoder.weight", _WORDS),
    Tie("lm_head.decoder.bias", ("lm_head.bias",)),
    Tie("generator_lm_head.weight", _WORDS),
    Tie("vocab_projector.weight", _WORDS),
    Tie("decoder.weight", ("model.embeddings.tok_embeddings.weight",)),
)

HEADS = ("lm_head.weight", "language_model.lm_head.weight", "thinker.lm_head.weight", "embed_out.weight")
"""Aliases that every causal language model has, tied or not."""

_TIED_BY_DEFAULT = """
    albert bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom camembert cohere
    cohere2 cohere2_moe convbert ctrl data2vec-text deberta deberta-v2 distilbert electra ernie ernie4_5 ernie4_5_moe
    esm falcon falcon_mamba flaubert florence2 fnet funnel gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4
    gemma4_text gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox_japanese ibert layoutlm led lfm2 lfm2_moe lfm2_vl longformer
    longt5 luke m2m_100 mamba marian mbart megatron-bert mobilebert modernbert modernbert-decoder moonshine mpnet mpt
    mra mt5 mvp nllb-moe nomic_bert nystromformer openai-gpt opt paligemma pegasus pegasus_x plbart pop2piano
    prophetnet recurrent_gemma roberta roberta-prelayernorm roc_bert roformer smollm3 squeezebert starcoder2
    switch_transformers t5 t5gemma tapas trocr umt5 vaultgemma vilt visual_bert whisper xglm xlm xlm-roberta
    xlm-roberta-xl xlnet xmod yoso zamba zamba2
"""
TIED_BY_DEFAULT = frozenset(_TIED_BY_DEFAULT.split())
"""Model types that are tied when config.json does not say: defaults of transformers 5.23."""


def says_tied(config: Mapping[str, Any] | None) -> bool | None:
    """What the config says about tied embeddings, its text part's word counting where the whole says nothing.

    None when it says nothing and its model type has no known default of being tied.
    """
    if config is None:
        return None
    for part in (config, config.get("text_config"), config.get("thinker_config")):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return True if config.get("model_type") in TIED_BY_DEFAULT else None


def pairs(fqns: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(alias, source) of every pair that is there, aliases of aliases resolved to what stays."""
    names = set(fqns)
    for tie in TIES:
        if tie.alias in names:
            source = next(_found(tie.sources, names), None)
            if source is not None:
                yield tie.alias, source


def embeddings(fqns: Iterable[str]) -> str | None:
    """The FQN of the input embeddings of a language model, by the sources of its head."""
    names = set(fqns)
    return next((s for tie in TIES if tie.alias in HEADS for s in _found(tie.sources, names)), None)


def _found(sources: Iterable[str], names: set[str]) -> Iterator[str]:
    for source in sources:
        if "{model}" in source:
            pattern = re.compile(re.escape(source).replace(r"\{model\}", r"\w+"))
            yield from sorted(name for name in names if pattern.fullmatch(name))
        elif source in names:
            yield source


def tie(checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> Checkpoint:
    """The checkpoint with each tied tensor once, under its source's name, and a notice for each that was left out.

    Reads both copies to compare them. Where they differ the source is taken, as that is what a model with tied weights
    computes with. Nothing is left out unless the config says that weights are tied. Raises Mismatch when it says so
    and the shapes cannot be one tensor's.
    """
    if not says_tied(config):
        return checkpoint
    dropped: dict[str, str] = {}
    for alias, source in pairs(checkpoint.tensors):
        dropped[alias] = _said(checkpoint, alias, source)
    if not dropped:
        return checkpoint
    kept = checkpoint.select(fqn for fqn in checkpoint.tensors if fqn not in dropped)
    return replace(kept, notices=(*kept.notices, *dropped.values()))


def _said(checkpoint: Checkpoint, alias: str, source: str) -> str:
    a, s = checkpoint.tensors[alias], checkpoint.tensors[source]
    if a.shape != s.shape:
        raise Mismatch(
            f"{checkpoint.origin.path}: the config says that weights are tied, but {alias} is {list(a.shape)} and"
            f" {source} is {list(s.shape)}",
            hint="set tie_word_embeddings to false in the config if the model was trained with a head of its own",
        )
    if same_bytes(a, s, checkpoint.source):
        return f"{alias} is tied to {source} and holds the same bytes: written once"
    return (
        f"{alias} is tied to {source} but holds other values: {source} was taken, {alias} left out"
        " (averages of a training run cover the source only)"
    )
