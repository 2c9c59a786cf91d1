"""DeepSeek-V2 and V3, and the families with their latent attention: Kimi K2, Moonlight, GLM-4.7-Flash, GLM-5, Sarvam.

Checked: the configs of DeepSeek-V2, V2-Lite, V3, R1 and V3.2, Kimi-K2, Moonlight-16B-A3B, GLM-4.7-Flash, GLM-5.

Nothing is reordered. The norms of the compressed queries and keys are fused into the up projections; the local spec,
and every model whose indexer reads the normalised queries, keeps them apart. A fused down projection is Megatron's
module only: its checkpoints hold two tensors, but for legacy files and early ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from reshard.dialects.facts import Facts
from reshard.dialects.fuse import Rows
from reshard.dialects.setting import Always, Rule, Setting, Values
from reshard.dialects.table import Config, Family, Row
from reshard.families.blocks import (
    MODEL,
    MTP_COPIES,
    TIED_HEAD,
    A,
    D,
    L,
    decoder,
    dense_first,
    expert_count,
    experts,
    gated_mlp,
    mlp_norm,
    moe_norm,
    mtp_layer,
    num_mtp,
    required,
    router,
    shared_experts,
    text_config,
)
from reshard.families.settings import (
    DENSE_FIRST,
    DENSE_LISTED,
    GROUPS,
    LATENT,
    SHARED,
    SIGMOID,
    epsilon,
    moe,
    mtp_count,
)

_S = f"{L}self_attn."


def _up(kind: str, down: str, up: str, fused_norm: bool, on: tuple[str, ...] = ()) -> tuple[Row, ...]:
    """A down projection, a norm, an up projection."""
    norms = f"{A}linear_{kind}_up_proj.layer_norm_weight", f"{A}{kind}_layernorm.weight"
    written, read = norms if fused_norm else norms[::-1]
    return (
        Row(f"{A}linear_{kind}_down_proj.weight", f"{_S}{down}.weight", on=on),
        Row(written, f"{_S}{kind}_a_layernorm.weight", on=on),
        Row(read, f"{_S}{kind}_a_layernorm.weight", on=on, variant=True),
        Row(f"{A}linear_{kind}_up_proj.weight", f"{_S}{up}.weight", on=on),
    )


def _attention(fused_norms: bool = True) -> tuple[Row, ...]:
    down = f"{A}linear_qkv_down_proj."
    return (
        Row(f"{D}input_layernorm.weight", f"{L}input_layernorm.weight"),
        Row(f"{down}layer_norm_weight", f"{L}input_layernorm.weight", on=("q_lora",), variant=True),
        Row(f"{A}linear_q_proj.weight", f"{_S}q_proj.weight", on=("direct_q",)),
        *_up("q", "q_a_proj", "q_b_proj", fused_norms, on=("q_lora",)),
        *_up("kv", "kv_a_proj_with_mqa", "kv_b_proj", fused_norms),
        Row(
            f"{down}weight",
            (f"{_S}q_a_proj.weight", f"{_S}kv_a_proj_with_mqa.weight"),
            Rows(("q_lora", "kv_down")),
            on=("q_lora",),
            variant=True,
        ),
        Row(f"{A}linear_proj.weight", f"{_S}o_proj.weight"),
    )


def _indexer() -> tuple[Row, ...]:
    """What chooses the keys of sparse attention."""
    ours, theirs = f"{A}core_attention.indexer.", f"{_S}indexer."
    names = (
        ("linear_wq_b.weight", "wq_b.weight"),
        ("linear_wk.weight", "wk.weight"),
        ("k_norm.weight", "k_norm.weight"),
        ("k_norm.bias", "k_norm.bias"),
        ("linear_weights_proj.weight", "weights_proj.weight"),
    )
    return tuple(Row(ours + a, theirs + b, on=("indexer",)) for a, b in names)


_MLP = (
    *mlp_norm(on=("dense",)),
    *gated_mlp(on=("dense",)),
    *moe_norm(on=("moe",)),
    *router(),
    *experts(),
    *shared_experts(),
)
_LAYER = (*_attention(), *_MLP)
_SPARSE_LAYER = (*_attention(fused_norms=False), *_indexer(), *_MLP)


def _facts(config: Config, expert_bias: bool, sparse: bool = False) -> Facts:
    text = text_config(config)
    tags = {"q_lora" if text.get("q_lora_rank") else "direct_q"}
    tags |= {"shared"} if text.get("n_shared_experts") or text.get("num_shared_experts") else set()
    tags |= {"expert_bias"} if expert_bias else set()
    tags |= {"mtp"} if num_mtp(config) else set()
    kv_lora, rope = required(text, "kv_lora_rank", "qk_rope_head_dim")
    return decoder(
        config,
        tags=tags,
        layers=_with_indexers if sparse else dense_first,
        sizes={"q_lora": int(text.get("q_lora_rank") or 0), "kv_down": kv_lora + rope},
        counts=expert_count(config) | {"mtp": num_mtp(config)},
    )


def _with_indexers(text: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The layers, and which of them have an indexer of their own; others share that of a layer before."""
    kinds = text.get("indexer_types") or text.get("index_topk_pattern")
    step, offset = int(text.get("index_topk_freq") or 1), int(text.get("index_skip_topk_offset", 2))
    for layer, tags in enumerate(dense_first(text)):
        own = kinds[layer] in ("full", "F") if kinds else max(layer - offset + 1, 0) % step == 0
        yield (*tags, "indexer") if own else tags


def _v2(config: Config) -> Facts:
    return _facts(config, expert_bias=False)


def _v3(config: Config) -> Facts:
    """The config of V3's own code names the method that has a bias; transformers' class has no other."""
    return _facts(config, expert_bias=text_config(config).get("topk_method", "noaux_tc") == "noaux_tc")


def _sparse(config: Config) -> Facts:
    return _facts(config, expert_bias=True, sparse=True)


def _groups(config: Values, facts: Facts) -> Values:
    """V2-Lite has groups in its config and does not choose by them."""
    grouped = config.get("topk_method") == "group_limited_greedy"
    counts = (config.get("n_group"), config.get("topk_group")) if grouped else (1, 1)
    return dict(zip(("moe_router_num_groups", "moe_router_group_topk"), counts, strict=True))


def _groups_config(settings: Values) -> Values:
    count, chosen = settings["moe_router_num_groups"], settings["moe_router_group_topk"]
    method = "greedy" if count == 1 else "group_limited_greedy"
    return {"n_group": count, "topk_group": chosen, "topk_method": method}


_MIXTURE = (
    *LATENT,
    *moe("n_routed_experts"),
    Setting("moe_aux_loss_coeff", "aux_loss_alpha"),
    *GROUPS,
    DENSE_FIRST,
    SHARED,
    ("moe_router_pre_softmax", True),
    ("moe_router_dtype", "fp32"),
    ("moe_router_load_balancing_type", "seq_aux_loss"),
)
_SOFTMAX = (
    *_MIXTURE,
    Always("scoring_func", "softmax"),
    Always("norm_topk_prob", False),
    Rule("moe_router_num_groups", _groups, _groups_config),
)
_SIGMOID = (
    *_MIXTURE,
    *SIGMOID,
    Always("scoring_func", "sigmoid"),
    Always("topk_method", "noaux_tc"),
    Setting("moe_aux_loss_coeff", "aux_loss_alpha", 0.0001),
    mtp_count(),
)

_INDEXED = (
    ("experimental_attention_variant", "dsa"),
    Setting("dsa_indexer_head_dim", "index_head_dim"),
    Setting("dsa_indexer_n_heads", "index_n_heads"),
    Setting("dsa_indexer_topk", "index_topk"),
)

FAMILIES = (
    Family(
        "deepseek_v2",
        ("deepseek_v2",),
        ("DeepseekV2ForCausalLM",),
        (*MODEL, *_LAYER),
        _v2,
        copies=TIED_HEAD,
        stacked=False,
        settings=_SOFTMAX,
        verified="Megatron-Bridge import, bit for bit",
    ),
    Family(
        "deepseek_v3",
        ("deepseek_v3", "kimi_k2"),
        ("DeepseekV3ForCausalLM", "KimiK2ForCausalLM"),
        (*MODEL, *_LAYER, *mtp_layer(_LAYER)),
        _v3,
        copies=(*TIED_HEAD, *MTP_COPIES),
        stacked=False,
        settings=_SIGMOID,
        verified="Megatron-Bridge import, bit for bit",
    ),
    Family(
        "glm4_moe_lite",
        ("glm4_moe_lite",),
        ("Glm4MoeLiteForCausalLM",),
        (*MODEL, *_LAYER, *mtp_layer(_LAYER)),
        _v3,
        copies=(*TIED_HEAD, *MTP_COPIES),
        stacked=False,
        settings=(*_SIGMOID, DENSE_LISTED, epsilon("rms_norm_eps", 1e-5)),
        verified="the names of Megatron-Bridge and transformers",
    ),
    Family(
        "sarvam_mla",
        ("sarvam_mla",),
        ("SarvamMLAForCausalLM",),
        (*MODEL, *_LAYER),
        _v3,
        copies=TIED_HEAD,
        stacked=False,
        settings=_SIGMOID,
        verified="the names of Megatron-Bridge",
    ),
    Family(
        "deepseek_v32",
        ("deepseek_v32", "glm_moe_dsa"),
        ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"),
        (*MODEL, *_SPARSE_LAYER, *mtp_layer(_SPARSE_LAYER, ("moe", "indexer"))),
        _sparse,
        copies=(*TIED_HEAD, *MTP_COPIES),
        stacked=False,
        settings=(*_SIGMOID, DENSE_LISTED, *_INDEXED),
        verified="the names of Megatron-Bridge and transformers",
    ),
)
