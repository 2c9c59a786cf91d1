"""Layers of Qwen3-Next and Qwen3.5: gated delta nets, and attention with an output gate.

    Megatron's module   hub                                rows
    in_proj             Qwen3-Next: in_proj_qkvz, _ba      query, key, value, z, beta, alpha: one below the other
                        Qwen3.5: in_proj_qkv, _z, _b, _a
    conv1d              conv1d                             query, key, value
    out_norm            norm                               w - 1

`LAYERS` are the rows without `in_proj`, which each family has its own way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from reshard.dialects.facts import Facts
from reshard.dialects.fuse import Fuse, ZeroCentred
from reshard.dialects.table import Config, Row, as_mtp
from reshard.errors import Mismatch
from reshard.families.blocks import (
    GATED_QKV,
    MODEL,
    A,
    D,
    L,
    attention,
    bias_tags,
    decoder,
    expert_count,
    experts,
    gated_mlp,
    head_norms,
    input_norm,
    mlp_norm,
    moe_norm,
    num_experts,
    required,
    router,
    shared_experts,
    text_config,
)

N = L + "linear_attn."
_IN_PROJ = (
    ("query", "key_rows"),
    ("key", "key_rows"),
    ("value", "value_rows"),
    ("z", "value_rows"),
    ("beta", "value_heads"),
    ("alpha", "value_heads"),
)


def in_proj(hub: tuple[str, ...], fuse: Fuse) -> Row:
    """The projection of all that a gated delta net needs, made of these submodules of the hub's."""
    names = tuple(f"{N}{name}.weight" for name in hub)
    return Row(f"{A}in_proj.weight", names, fuse, on=("linear",), parts=_IN_PROJ)


DELTA_NET = (
    *input_norm(fused="in_proj", on=("linear",)),
    Row(f"{A}conv1d.weight", f"{N}conv1d.weight", on=("linear",), parts=_IN_PROJ[:3]),
    Row(f"{A}A_log", f"{N}A_log", on=("linear",)),
    Row(f"{A}dt_bias", f"{N}dt_bias", on=("linear",)),
    Row(f"{A}out_norm.weight", f"{N}norm.weight", ZeroCentred(), on=("linear",)),
    Row(f"{A}out_proj.weight", f"{N}out_proj.weight", on=("linear",)),
)
FULL = (*input_norm(on=("full",)), *attention(GATED_QKV, on=("full",)), *head_norms(on=("full",)))
DENSE = (*mlp_norm(on=("dense",)), *gated_mlp(on=("dense",)))
MOE = (
    *moe_norm(on=("moe",)),
    *router(),
    *experts(),
    *shared_experts("mlp.shared_expert."),
    Row(f"{D}mlp.shared_experts.gate_weight", f"{L}mlp.shared_expert_gate.weight", on=("moe", "shared")),
)
LAYERS = (*DELTA_NET, *FULL, *DENSE, *MOE)


def unfused(*linear: str) -> tuple[Row, ...]:
    """The names that slime's own modules have, which keep the hub's tensors as they are."""
    own = ("conv1d.weight", "A_log", "dt_bias", "norm.weight", "out_proj.weight", *(f"{x}.weight" for x in linear))
    full = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    names = (
        *((f"linear_attn.{name}", ("linear",)) for name in own),
        *((f"self_attn.{name}.weight", ("full",)) for name in full),
        ("input_layernorm.weight", ()),
    )
    return tuple(Row(f"{A}{name}", f"{L}{name}", on=on, variant=True) for name, on in names)


def mtp(rows: Iterable[Row], mlp: str) -> tuple[Row, ...]:
    """The layer that predicts a second token, and what joins the two. The hub's projection belongs to all of them."""
    at = "mtp.layers.0."
    return (
        Row(f"{at}enorm.weight", "mtp.pre_fc_norm_embedding.weight", on=("mtp",)),
        Row(f"{at}hnorm.weight", "mtp.pre_fc_norm_hidden.weight", on=("mtp",)),
        Row(f"{at}eh_proj.weight", "mtp.fc.weight", on=("mtp",)),
        *as_mtp(rows, ("full", mlp), hub="mtp.layers.{mtp}."),
        Row(f"{at}final_layernorm.weight", "mtp.norm.weight", on=("mtp",)),
    )


def model(own: tuple[Row, ...], mlp: str) -> tuple[Row, ...]:
    """A whole text model; `own` is what the family has for `in_proj`, and its prediction layer has this kind of MLP."""
    return (*MODEL, *own, *LAYERS, *mtp((*own, *LAYERS), mlp))


# ----------------------------------------------------------------------------------------------------------- facts


def facts(config: Config) -> Facts:
    """The facts of a text model, from its config or the `text_config` in it.

    Configs of the hub are silent about the layer that predicts a second token, or count it in one of two ways.
    """
    text = text_config(config)
    key_heads, value_heads = required(text, "linear_num_key_heads", "linear_num_value_heads")
    key_dim, value_dim = required(text, "linear_key_head_dim", "linear_value_head_dim")
    said = (text.get("mtp_num_hidden_layers"), text.get("num_nextn_predict_layers"))
    num_mtp = next((int(n) for n in said if n is not None), 1)
    return decoder(
        config,
        tags=bias_tags(config) | {"shared"} | ({"mtp"} if num_mtp else set()),
        layers=_layers,
        sizes={
            "key_heads": key_heads,
            "value_heads": value_heads,
            "key_rows": key_heads * key_dim,
            "value_rows": value_heads * value_dim,
        },
        counts={"expert": num_experts(config), "mtp": num_mtp},
    )


def facts_of_experts(config: Config) -> Facts:
    """The facts of a model that must have experts."""
    return replace(found := facts(config), counts={**found.counts, **expert_count(config)})


def _layers(text: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Full attention by `layer_types` or every so many layers; dense without experts or where the config says so."""
    linear, full, interval = "linear_attention", "full_attention", text.get("full_attention_interval") or 4
    types = text.get("layer_types") or [
        linear if i % interval else full for i in range(1, text["num_hidden_layers"] + 1)
    ]
    dense, step = text.get("mlp_only_layers") or (), text.get("decoder_sparse_step") or 1
    for layer, kind in enumerate(types):
        if kind not in (linear, full):
            raise Mismatch(f"config.json: layer_types has {kind!r}, {linear} or {full} expected")
        is_dense = not num_experts(text) or layer in dense or (layer + 1) % step
        yield kind.removesuffix("_attention"), "dense" if is_dense else "moe"
