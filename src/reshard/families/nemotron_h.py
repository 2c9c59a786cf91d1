"""Nemotron-H: Mamba, attention, MLP and expert layers, one mixer each, in the order of a pattern such as `M-*E`.

    Megatron's module   rows, one below the other
    mixer.in_proj       z, x, B, C, dt
    mixer.conv1d        x, B, C

Checked: Nemotron-H 8B, Nemotron Nano 9B v2 (`hybrid_override_pattern`), Nemotron 3 Nano 30B-A3B (experts), Nemotron 3
Super (latent experts, second-token prediction by the layers `*E`), and the `layers_block_type` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from reshard.dialects.facts import Facts
from reshard.dialects.fuse import PADDED
from reshard.dialects.megatron_config import ACTIVATIONS
from reshard.dialects.setting import Always, Rule, Setting, Values
from reshard.dialects.table import Config, Copy, Family, Row, under
from reshard.errors import Mismatch, listed
from reshard.families.blocks import D, L, M, attention, decoder, num_experts, required
from reshard.families.settings import GROUPS, SIGMOID, biases, epsilon, moe, mtp_count, provider

_X = D + "mixer."
_H = L + "mixer."
_IN_PROJ = (("z", "inner"), ("x", "inner"), ("B", "state"), ("C", "state"), ("dt", "mamba_heads"))


def _norm(fused: str, apart: str, kind: str) -> tuple[Row, Row]:
    """The norm before a mixer, and its other name."""
    return (
        Row(D + fused, L + "norm.weight", on=(kind,)),
        Row(D + apart, L + "norm.weight", on=(kind,), variant=True),
    )


def _same(names: Mapping[str, str], kind: str, *tags: str) -> tuple[Row, ...]:
    return tuple(Row(megatron, hub, on=(kind, *tags)) for megatron, hub in names.items())


_MAMBA = (
    *_norm("mixer.in_proj.layer_norm_weight", "norm.weight", "mamba"),
    Row(_X + "in_proj.weight", _H + "in_proj.weight", on=("mamba",), parts=_IN_PROJ),
    Row(_X + "conv1d.weight", _H + "conv1d.weight", on=("mamba",), parts=_IN_PROJ[1:4]),
    Row(_X + "conv1d.bias", _H + "conv1d.bias", on=("mamba", "conv_bias"), parts=_IN_PROJ[1:4]),
    Row(_X + "conv1d_weight", _H + "conv1d.weight", on=("mamba",), variant=True),
    Row(_X + "conv1d_bias", _H + "conv1d.bias", on=("mamba", "conv_bias"), variant=True),
    *_same({_X + name: _H + name for name in ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight")}, "mamba"),
)
_ATTENTION = (
    *_norm("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "attention"),
    *under(attention(on=("attention",)), hub={L + "self_attn.": _H}),
)
_MLP = (
    *_norm("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight", "mlp"),
    *_same({M + "linear_fc1.weight": _H + "up_proj.weight", M + "linear_fc2.weight": _H + "down_proj.weight"}, "mlp"),
)
_MOE = (
    Row(D + "pre_mlp_layernorm.weight", L + "norm.weight", on=("moe",)),
    Row(M + "linear_fc1.layer_norm_weight", L + "norm.weight", on=("moe",), variant=True),
    Row(M + "router.weight", _H + "gate.weight", on=("moe",)),
    Row(M + "router.expert_bias", _H + "gate.e_score_correction_bias", on=("moe",), dtype="F32"),
    *_same(
        {M + f"{name}.weight": _H + f"{name}.weight" for name in ("fc1_latent_proj", "fc2_latent_proj")},
        "moe",
        "latent",
    ),
    *_same(
        {
            M + "experts.linear_fc1.weight{expert}": _H + "experts.{expert}.up_proj.weight",
            M + "experts.linear_fc2.weight{expert}": _H + "experts.{expert}.down_proj.weight",
            M + "shared_experts.linear_fc1.weight": _H + "shared_experts.up_proj.weight",
            M + "shared_experts.linear_fc2.weight": _H + "shared_experts.down_proj.weight",
        },
        "moe",
    ),
)


def _mtp_mixer(rows: tuple[Row, ...], layer: int) -> tuple[Row, ...]:
    """A layer of the block that predicts a second token."""
    at = f"mtp.layers.0.transformer_layer.layers.{layer}."
    return tuple(
        replace(
            row,
            name=at + row.name.removeprefix(D),
            hub=tuple(f"mtp.layers.{layer}." + name.removeprefix(L) for name in row.hubs),
            on=("mtp", *row.on[1:]),
        )
        for row in rows
    )


_MTP = (
    *_same(
        {f"mtp.layers.0.{name}.weight": f"mtp.layers.0.{name}.weight" for name in ("enorm", "hnorm", "eh_proj")}, "mtp"
    ),
    *_mtp_mixer(_ATTENTION, 0),
    *_mtp_mixer(_MOE, 1),
    Row("mtp.layers.0.final_layernorm.weight", "mtp.layers.1.final_layernorm.weight", on=("mtp",)),
)


# ----------------------------------------------------------------------------------------------------------- facts

_KINDS = {
    "M": "mamba",
    "*": "attention",
    "-": "mlp",
    "E": "moe",
    "linear_attention": "mamba",
    "full_attention": "attention",
}
"""The letters of a pattern, and what transformers calls the same; its other words are the tags."""


def _facts(config: Config) -> Facts:
    heads, head_dim, groups, state = required(config, "mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size")
    kinds = _kinds(config, "hybrid_override_pattern", "layers_block_type")
    if not kinds:
        raise Mismatch("config.json of a nemotron_h model has neither hybrid_override_pattern nor layers_block_type")
    tags = {"conv_bias"} if config.get("use_conv_bias", True) else set()
    if config.get("moe_latent_size"):
        tags.add("latent")
    mtp = _kinds(config, "mtp_hybrid_override_pattern", "mtp_layers_block_type")
    if config.get("num_nextn_predict_layers") == 1 and mtp == ["attention", "moe"]:
        tags.add("mtp")
    return decoder(
        {
            **config,
            "num_hidden_layers": len(kinds),
            "head_dim": config.get("head_dim") or config.get("attention_head_dim"),
        },
        tags=tags,
        layers=lambda _: [(kind,) for kind in kinds],
        sizes={"mamba_heads": heads, "inner": heads * head_dim, "state": groups * state},
        counts={"expert": num_experts(config) if "moe" in (*kinds, *mtp) else 0},
    )


def _kinds(config: Config, pattern: str, types: str) -> list[str]:
    """The kinds of layers, from a config's pattern or list of words."""
    said: Any = config.get(types) or config.get(pattern) or ()
    kinds = [_KINDS.get(kind, kind) for kind in said]
    if not set(kinds) <= {"mamba", "attention", "mlp", "moe"}:
        unknown = sorted(map(str, set(kinds) - set(_KINDS.values())))
        raise Mismatch(f"config.json of a nemotron_h model: layers of the kinds {listed(unknown)} are not known")
    return kinds


_LETTERS = {kind: letter for letter, kind in _KINDS.items() if len(letter) == 1}


def _pattern(config: Values, facts: Facts) -> Values:
    kinds = [next(iter(tags)) for tags in facts.layers]
    return {"num_layers": len(kinds), "hybrid_layer_pattern": "".join(_LETTERS[kind] for kind in kinds)}


def _pattern_config(settings: Values) -> Values:
    """Megatron's pattern also has bars between pipeline stages, and a slash before the second-token predictor."""
    said = settings.get("hybrid_layer_pattern") or settings["hybrid_override_pattern"]
    pattern, _, mtp = str(said).replace("|", "").partition("/")
    found: dict[str, Any] = {"num_hidden_layers": len(pattern), "hybrid_override_pattern": pattern}
    mtp = mtp.partition("/")[0] or settings.get("mtp_hybrid_override_pattern") or ""
    return found | ({"mtp_hybrid_override_pattern": mtp} if mtp else {})


def _experts(config: Values, facts: Facts) -> Values:
    return {"num_moe_experts": facts.counts.get("expert") or None}


def _experts_config(settings: Values) -> Values:
    count = settings.get("num_moe_experts")
    return {"n_routed_experts": count, "n_shared_experts": 1} if count else {}


_SETTINGS = (
    provider("hybrid.hybrid_provider.HybridModelProvider"),
    ("is_hybrid_model", True),
    Rule("num_layers", _pattern, _pattern_config),
    ("position_embedding_type", "none"),
    ("rotary_base", 10000.0),
    Rule("rope", lambda config, facts: {}, lambda settings: {}),
    epsilon("layer_norm_epsilon", 1e-5),
    Setting("activation_func", "mlp_hidden_act", "relu2", ACTIVATIONS),
    ("gated_linear_unit", False),
    *(
        Setting(megatron, hub)
        for megatron, hub in (
            ("mamba_num_heads", "mamba_num_heads"),
            ("mamba_head_dim", "mamba_head_dim"),
            ("mamba_num_groups", "n_groups"),
            ("mamba_state_dim", "ssm_state_size"),
            ("mamba_chunk_size", "chunk_size"),
            ("fp32_residual_connection", "residual_in_fp32"),
        )
    ),
    *moe("n_routed_experts", aux=0.0001),
    Rule("num_moe_experts", _experts, _experts_config),
    Setting("moe_shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    Setting("moe_latent_size", "moe_latent_size"),
    *GROUPS,
    *SIGMOID,
    mtp_count(),
    Always("mamba_hidden_act", "silu"),
    Always("conv_kernel", 4),
    Always("use_conv_bias", True),
    biases("use_bias", "mlp_bias", "attention_bias"),
)

FAMILIES = (
    Family(
        "nemotron_h",
        ("nemotron_h",),
        ("NemotronHForCausalLM",),
        under(
            (
                Row("embedding.word_embeddings.weight", "model.embeddings.weight", PADDED),
                *_MAMBA,
                *_ATTENTION,
                *_MLP,
                *_MOE,
                Row("decoder.final_norm.weight", "model.norm_f.weight"),
                Row("decoder.final_layernorm.weight", "model.norm_f.weight", variant=True),
                Row("output_layer.weight", "lm_head.weight", PADDED, on=("untied",)),
                *_MTP,
            ),
            hub={"model.": "backbone."},
        ),
        _facts,
        copies=(Copy("lm_head.weight", "backbone.embeddings.weight", on=("tied",)),),
        stacked=False,
        settings=_SETTINGS,
        verified="Megatron-Bridge import, bit for bit",
    ),
)
