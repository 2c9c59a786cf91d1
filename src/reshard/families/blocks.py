"""What the families share: rows of the common decoder, and facts from a config.

`MODEL` `ATTENTION` `MLP` `MOE` ...   rows, to be put together by a family
`decoder(config)`                     the facts of a decoder, from the names that most configs use
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from reshard.dialects.facts import Facts
from reshard.dialects.fuse import GLU, PADDED, QKV, Fuse, Qkv
from reshard.dialects.table import Config, Copy, Row, as_mtp
from reshard.errors import Mismatch

D, L = "decoder.layers.{layer}.", "model.layers.{layer}."
A, M = D + "self_attention.", D + "mlp."


# ------------------------------------------------------------------------------------------------------------ rows


MODEL = (
    Row("embedding.word_embeddings.weight", "model.embed_tokens.weight", PADDED),
    Row("decoder.final_layernorm.weight", "model.norm.weight"),
    Row("output_layer.weight", "lm_head.weight", PADDED, on=("untied",)),
)


def input_norm(hub: str = "input_layernorm", fused: str = "linear_qkv", on: tuple[str, ...] = ()) -> tuple[Row, ...]:
    """The norm before the attention, fused into its first linear; the local spec keeps it apart."""
    return (
        Row(f"{A}{fused}.layer_norm_weight", f"{L}{hub}.weight", on=on),
        Row(f"{D}input_layernorm.weight", f"{L}{hub}.weight", on=on, variant=True),
    )


def mlp_norm(hub: str = "post_attention_layernorm", on: tuple[str, ...] = ()) -> tuple[Row, ...]:
    """The norm before a dense MLP, fused into its first linear; the local spec keeps it apart."""
    return (
        Row(f"{M}linear_fc1.layer_norm_weight", f"{L}{hub}.weight", on=on),
        Row(f"{D}pre_mlp_layernorm.weight", f"{L}{hub}.weight", on=on, variant=True),
    )


def moe_norm(hub: str = "post_attention_layernorm", on: tuple[str, ...] = ()) -> tuple[Row, ...]:
    """The norm before a mixture of experts; models of the local spec save it under the dense MLP's name."""
    return (
        Row(f"{D}pre_mlp_layernorm.weight", f"{L}{hub}.weight", on=on),
        Row(f"{M}linear_fc1.layer_norm_weight", f"{L}{hub}.weight", on=on, variant=True),
    )


def attention(fuse: Fuse = QKV, on: tuple[str, ...] = ()) -> tuple[Row, ...]:
    """Query, key, value and output projections, with the biases that the tags ask for."""
    q, k, v = (f"{L}self_attn.{name}_proj." for name in "qkv")
    return (
        Row(f"{A}linear_qkv.weight", (f"{q}weight", f"{k}weight", f"{v}weight"), fuse, on=on),
        Row(f"{A}linear_qkv.bias", (f"{q}bias", f"{k}bias", f"{v}bias"), fuse, on=(*on, "qkv_bias")),
        Row(f"{A}linear_proj.weight", f"{L}self_attn.o_proj.weight", on=on),
        Row(f"{A}linear_proj.bias", f"{L}self_attn.o_proj.bias", on=(*on, "proj_bias")),
    )


def head_norms(on: tuple[str, ...] = ()) -> tuple[Row, ...]:
    """Norms of queries and keys."""
    return tuple(Row(f"{A}{x}_layernorm.weight", f"{L}self_attn.{x}_norm.weight", on=on) for x in "qk")


def gated_mlp(
    on: tuple[str, ...] = (), megatron: str = M, hub: str = f"{L}mlp.", names: Sequence[str] = ("gate", "up", "down")
) -> tuple[Row, ...]:
    """Gate, up and down projections; `megatron` and `hub` say where they lie."""
    gate, up, down = (f"{hub}{name}_proj." for name in names)
    return (
        Row(f"{megatron}linear_fc1.weight", (f"{gate}weight", f"{up}weight"), GLU, on=on),
        Row(f"{megatron}linear_fc1.bias", (f"{gate}bias", f"{up}bias"), GLU, on=(*on, "mlp_bias")),
        Row(f"{megatron}linear_fc2.weight", f"{down}weight", on=on),
        Row(f"{megatron}linear_fc2.bias", f"{down}bias", on=(*on, "mlp_bias")),
    )


def plain_mlp(up: str = "up_proj", down: str = "down_proj") -> tuple[Row, ...]:
    """The two projections of an MLP without a gate."""
    names = (("linear_fc1", up), ("linear_fc2", down))
    return tuple(
        Row(f"{M}{ours}.{kind}", f"{L}mlp.{theirs}.{kind}", on=on)
        for ours, theirs in names
        for kind, on in (("weight", ()), ("bias", ("mlp_bias",)))
    )


def copied(
    megatron: str, hub: str, names: Iterable[str], on: tuple[str, ...] = (), variant: bool = False
) -> tuple[Row, ...]:
    """Tensors that have one name in Megatron and on the hub, but for the prefix."""
    return tuple(Row(megatron + name, hub + name, on=on, variant=variant) for name in names)


def router(hub: str = "mlp.gate", on: tuple[str, ...] = ("moe",), bias: str = "") -> tuple[Row, ...]:
    """The router, with the bias that it adds to its scores where there is one (`bias` on the hub)."""
    bias = bias or f"{hub}.e_score_correction_bias"
    return (
        Row(f"{M}router.weight", f"{L}{hub}.weight", on=on),
        Row(f"{M}router.expert_bias", f"{L}{bias}", on=(*on, "expert_bias"), dtype="F32"),
    )


def experts(
    hub: str = "mlp.experts.{expert}.",
    names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
    on: tuple[str, ...] = ("moe",),
) -> tuple[Row, ...]:
    """Gated experts, a matrix each on the hub."""
    gate, up, down = (f"{L}{hub}{name}.weight" for name in names)
    return (
        Row(f"{M}experts.linear_fc1.weight{{expert}}", (gate, up), GLU, on=on),
        Row(f"{M}experts.linear_fc2.weight{{expert}}", down, on=on),
    )


def shared_experts(hub: str = "mlp.shared_experts.", on: tuple[str, ...] = ("moe", "shared")) -> tuple[Row, ...]:
    """The experts that every token takes."""
    return gated_mlp(on, megatron=f"{M}shared_experts.", hub=f"{L}{hub}")


def mtp_layer(rows: Iterable[Row], kinds: Sequence[str] = ("moe",), norm: str = "shared_head.norm") -> tuple[Row, ...]:
    """A multi-token-prediction layer that the hub counts on behind the decoder's, its block like a layer of `kinds`."""
    megatron, hub = "mtp.layers.{mtp}.", "model.layers.{mtp_layer}."
    return (
        *(Row(f"{megatron}{x}.weight", f"{hub}{x}.weight", on=("mtp",)) for x in ("enorm", "hnorm", "eh_proj")),
        Row(f"{megatron}final_layernorm.weight", f"{hub}{norm}.weight", on=("mtp",)),
        *as_mtp(rows, kinds),
    )


MTP_COPIES = (
    Copy("model.layers.{mtp_layer}.embed_tokens.weight", "model.embed_tokens.weight", on=("mtp",), always=True),
    Copy("model.layers.{mtp_layer}.shared_head.head.weight", "lm_head.weight", on=("mtp", "untied"), always=True),
)
"""What the layer of `mtp_layer` shares with the model: repeated on the hub."""

NORM_BIASES = (
    Row(f"{A}linear_qkv.layer_norm_bias", f"{L}input_layernorm.bias"),
    Row(f"{M}linear_fc1.layer_norm_bias", f"{L}post_attention_layernorm.bias"),
    Row("decoder.final_layernorm.bias", "model.norm.bias"),
    Row(f"{D}input_layernorm.bias", f"{L}input_layernorm.bias", variant=True),
    Row(f"{D}pre_mlp_layernorm.bias", f"{L}post_attention_layernorm.bias", variant=True),
)
"""The biases of LayerNorms."""

TIED_HEAD = (Copy("lm_head.weight", "model.embed_tokens.weight", on=("tied",)),)
"""A head that repeats the embedding, where a checkpoint has it."""

DENSE = (*MODEL, *input_norm(), *attention(), *mlp_norm(), *gated_mlp())
"""Llama and what is built like it."""

GATED_QKV = Qkv(gated=True)


# ----------------------------------------------------------------------------------------------------------- facts


def decoder(
    config: Config,
    *,
    tags: Iterable[str] = (),
    layers: Callable[[Config], Iterable[Iterable[str]]] | None = None,
    sizes: Mapping[str, int] | None = None,
    counts: Mapping[str, int] | None = None,
    tied: bool = False,
) -> Facts:
    """The facts of a decoder, from its config or the `text_config` in it.

    `layers` gives the tags of each layer, all `dense` by default; `tied` is what holds when the config does not say.
    Raises Mismatch for a config that lacks a size.
    """
    text = text_config(config)
    try:
        heads = int(text["num_attention_heads"])
        hidden = int(text["hidden_size"])
        found = {
            "hidden": hidden,
            "vocab": int(text.get("vocab_size") or config["vocab_size"]),
            "heads": heads,
            "groups": int(text.get("num_key_value_heads") or heads),
            "head_dim": int(text.get("head_dim") or hidden // heads),
        }
        num_layers = int(text["num_hidden_layers"])
        kinds = tuple(frozenset(kind) for kind in layers(text)) if layers else (frozenset(("dense",)),) * num_layers
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise Mismatch(f"config.json of a {config.get('model_type')} model lacks a size: {error}") from error
    if len(kinds) != num_layers:
        raise Mismatch(f"config.json describes {len(kinds)} layers, num_hidden_layers is {num_layers}")
    return Facts(found | dict(sizes or {}), kinds, frozenset((*tags, tie_tag(config, tied))), dict(counts or {}))


def required(config: Mapping[str, Any], *keys: str) -> tuple[int, ...]:
    """These sizes of a config. Raises Mismatch naming the key that is missing or not a whole number above 0."""
    for key in keys:
        value = config.get(key)
        if type(value) is not int or value <= 0:
            raise Mismatch(f"config.json of a {config.get('model_type')} model: {key} is {value!r}, a size expected")
    return tuple(int(config[key]) for key in keys)


def text_config(config: Config) -> Mapping[str, Any]:
    """The part of a config that is about the language model."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def tie_tag(config: Config, default: bool = False) -> str:
    """`tied` or `untied`."""
    value = config.get("tie_word_embeddings")
    if value is None:
        value = text_config(config).get("tie_word_embeddings")
    return "tied" if (default if value is None else value) else "untied"


def bias_tags(
    config: Config, qkv: str = "attention_bias", proj: str = "attention_bias", mlp: str = "mlp_bias"
) -> set[str]:
    """The tags of the biases that a config switches on."""
    text = text_config(config)
    pairs = (("qkv_bias", qkv), ("proj_bias", proj), ("mlp_bias", mlp))
    return {tag for tag, key in pairs if text.get(key)}


def num_experts(config: Config) -> int:
    """How many experts a layer has, whatever the config calls them; 0 without.

    `n_routed_experts` comes first: some releases of transformers write a `num_experts` of their own beside it.
    """
    text = text_config(config)
    keys = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
    return next((int(text[key]) for key in keys if text.get(key)), 0)


def expert_count(config: Config) -> dict[str, int]:
    """The count of experts of a model that must have some. Raises Mismatch when the config names none."""
    count = num_experts(config)
    if not count:
        raise Mismatch(f"config.json of a {config.get('model_type')} model does not say how many experts it has")
    return {"expert": count}


def dense_first(text: Mapping[str, Any]) -> Iterator[tuple[str]]:
    """Layers as `mlp_layer_types` lists them, or `first_k_dense_replace` dense ones and mixtures of experts then."""
    kinds = text.get("mlp_layer_types")
    if kinds is not None:
        yield from (("moe",) if kind == "sparse" else ("dense",) for kind in kinds)
        return
    first, step = text["first_k_dense_replace"], text.get("moe_layer_freq") or 1
    for layer in range(text["num_hidden_layers"]):
        yield ("moe",) if layer >= first and layer % step == 0 else ("dense",)


def num_mtp(config: Config) -> int:
    """How many multi-token-prediction layers a model has."""
    text = text_config(config)
    keys = ("num_nextn_predict_layers", "num_mtp_layers")
    return next((int(text[key]) for key in keys if text.get(key)), 0)
