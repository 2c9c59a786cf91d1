"""The architecture, layer by layer, its fusions and recomputation: what GPTConfig takes; and the tokenizer."""

from __future__ import annotations

from typing import Any

from reshard.ops.migrate.row import MISSING, Code, Moved, Row, Settings, number, on, truthy

_FUNCTIONAL = ("from torch.nn import functional",)
_NEMO = "from nemo.collections.llm.fn.activation import {}"
_ACTIVATIONS = {
    "gelu": Code("functional.gelu", _FUNCTIONAL),
    "geglu": Code("functional.gelu", _FUNCTIONAL),
    "relu": Code("functional.relu", _FUNCTIONAL),
    "reglu": Code("functional.relu", _FUNCTIONAL),
    "silu": Code("functional.silu", _FUNCTIONAL),
    "swiglu": Code("functional.silu", _FUNCTIONAL),
    "squared-relu": Code("squared_relu", (_NEMO.format("squared_relu"),)),
    "squared_relu": Code("squared_relu", (_NEMO.format("squared_relu"),)),
    "approx-gelu": Code("quick_gelu", (_NEMO.format("quick_gelu"),)),
}
_OPENAI_GELU = Code("openai_gelu", (_NEMO.format("openai_gelu"),))
_NORMS = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm", "layernorm1p": "LayerNorm"}


def _activation(value: Any, settings: Settings) -> Moved:
    """A name becomes a function and gated_linear_unit: fast-swiglu is silu, gated."""
    name = value.removeprefix("fast-") if isinstance(value, str) else ""
    if name not in _ACTIVATIONS:
        return Moved(removed=True, attention=True, note=f"NeMo 1 knows {', '.join(_ACTIVATIONS)}")
    function = _OPENAI_GELU if truthy(settings.get("model.openai_gelu")) else _ACTIVATIONS[name]
    return Moved(function, {"config.gated_linear_unit": name.endswith("glu")})


def _openai_gelu(value: Any, settings: Settings) -> Moved:
    """Folded into activation_func."""
    if truthy(value) and settings.get("model.activation") is None:
        return Moved(_OPENAI_GELU)
    return Moved(note="part of activation_func" if truthy(value) else "")


def _normalization(value: Any, _: Settings) -> Moved:
    """rmsnorm becomes "RMSNorm", layernorm "LayerNorm", layernorm1p "LayerNorm" with zero-centred gamma."""
    name = value.lower() if isinstance(value, str) else ""
    if name not in _NORMS:
        return Moved(removed=True, attention=True, note=f"NeMo 1 knows {', '.join(_NORMS)}")
    return Moved(_NORMS[name], {"config.layernorm_zero_centered_gamma": True} if name == "layernorm1p" else {})


def _rotary_base(value: Any, _: Settings) -> Any:
    """A whole number loses its point: GPTConfig's is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _query_key(value: Any, settings: Settings) -> Moved:
    """False outside fp16, as NeMo 1 did itself."""
    half = settings.get("trainer.precision", settings.get("model.precision", 16)) in (16, "16", "16-mixed")
    if truthy(value) and not half:
        return Moved(False, note="NeMo 1 switched it off outside fp16")
    if truthy(value):
        told = "set NVTE_APPLY_QK_LAYER_SCALING=1 in the environment, as NeMo 1 did"
        return Moved(value, {"config.attention_softmax_in_fp32": True}, attention=True, note=told)
    return Moved(value)


def _positions(value: Any, settings: Settings) -> Moved:
    learned = settings.get("model.position_embedding_type", "learned_absolute") == "learned_absolute"
    told = learned and value != settings.get("model.encoder_seq_length", value)
    return Moved(attention=told, note="the table of positions gets seq_length rows, not this many" if told else "")


def _position_kind(value: Any, _: Settings) -> Moved:
    if value in ("learned_absolute", "rope", "none"):
        return Moved(value)
    return Moved(value, attention=True, note="GPTConfig takes learned_absolute and rope")


def _long_rope(value: Any, _: Settings) -> Moved:
    """True takes Llama31Config, which scales the frequencies."""
    if not truthy(value):
        return Moved(removed=True, note="GPTConfig does not scale")
    return Moved(
        "Llama31Config", attention=True,
        note="Llama31Config scales them; its other defaults are Llama's, so every setting is spelled out",
    )  # fmt: skip


def _rope_factor(value: Any, settings: Settings) -> Moved:
    if truthy(settings.get("model.scale_positional_embedding")):
        return Moved(value)
    return Moved(removed=True, note="scale_positional_embedding is off")


def _scaled_init(value: Any, settings: Settings) -> Moved:
    """True is Megatron-Core's default; False becomes output_layer_init_method."""
    if truthy(value):
        return Moved(removed=True, note="Megatron-Core's default")
    std = settings.get("model.init_method_std", 0.02)
    text = f"init_method_normal({std!r})" if number(std) else "init_method_normal(0.02)"
    return Moved(Code(text, ("from megatron.core.utils import init_method_normal",)))


def _vocabulary(value: Any, _: Settings) -> Moved:
    return Moved(value, note="" if value is None else "counted before padding")


def _window(value: Any, _: Settings) -> Any:
    """A list becomes a tuple."""
    return tuple(value) if isinstance(value, list) else value


def _overlap(value: Any, _: Settings) -> Moved:
    """True makes the callback."""
    if not truthy(value):
        return Moved(removed=True, note="no callback is made")
    return Moved(True, {"overlap.": True})


def _customized(value: Any, _: Settings) -> Moved:
    return Moved(attention=value not in (None, False), note="a family's class has it: Gemma2Config, by hand")


def _without_megatron_core(value: Any, _: Settings) -> Moved:
    told = not truthy(value)
    return Moved(attention=told, note="weights of NeMo 1's own GPT have other names: convert them" if told else "")


def _artifact(value: Any, _: Settings) -> Moved:
    """`nemo:<name>` loses its prefix."""
    if isinstance(value, str) and value.startswith("nemo:"):
        return Moved(value.removeprefix("nemo:"), attention=True, note="a member of the .nemo: unpack it beside")
    return Moved(value)


def _legacy(value: Any, settings: Settings) -> Any:
    """Absent meant True for SentencePiece."""
    return settings.get("model.tokenizer.library") == "sentencepiece" if value is None else value


def _unless(expected: Any, note: str) -> Any:
    return on(attention_when=lambda value: value not in (expected, MISSING), note=note)


_LLAMA = "model.scale_positional_embedding"
"""Where it is on, Llama 3.1's class is taken, whose defaults are not GPTConfig's."""
_LLAMA_DEFAULTS = {
    "num_query_groups": None, "layernorm_epsilon": 1e-5, "init_method_std": 0.02, "persist_layer_norm": False,
    "share_embeddings_and_output_weights": True, "hidden_dropout": 0.1, "attention_dropout": 0.1,
    "apply_rope_fusion": False,
}  # fmt: skip
_SAME = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
    "layernorm_zero_centered_gamma", "make_vocab_size_divisible_by", "seq_len_interpolation_factor",
    "rotary_interleaved", "use_cpu_initialization", "overlap_p2p_comm", "batch_p2p_comm", "enable_cuda_graph",
    "defer_embedding_wgrad_compute",
    "wgrad_deferral_limit", "cpu_offloading", "cpu_offloading_num_layers", "cpu_offloading_activations",
    "cpu_offloading_weights", "deterministic_mode",
)  # fmt: skip
_MOE = (
    "num_moe_experts", "moe_router_topk", "moe_router_load_balancing_type", "moe_grouped_gemm", "moe_aux_loss_coeff",
    "moe_z_loss_coeff", "moe_input_jitter_eps", "moe_token_dropping", "moe_token_dispatcher_type",
    "moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity", "moe_token_drop_policy", "moe_layer_recompute",
    "moe_per_layer_logging",
)  # fmt: skip

ARCHITECTURE = (
    *(Row(f"model.{name}", f"config.{name}") for name in _SAME),
    *(Row(f"model.{name}", f"config.{name}", absent=value, when=_LLAMA) for name, value in _LLAMA_DEFAULTS.items()),
    Row("model.encoder_seq_length", "config.seq_length"),
    Row("model.max_position_embeddings", move=_positions, note="GPTConfig has seq_length alone; MixtralConfig has it"),
    Row("model.position_embedding_type", "config.position_embedding_type", move=_position_kind,
        absent="learned_absolute", when=_LLAMA),
    Row("model.rotary_base", "config.rotary_base", move=_rotary_base, absent=10000, when=_LLAMA),
    Row("model.rotary_percentage", "config.rotary_percent"),
    Row("model.scale_positional_embedding", "config.", move=_long_rope,
        note="Llama 3.1's rope: the class Llama31Config instead of a flag"),
    *(Row(f"model.{name}", f"config.{name}", move=_rope_factor, note="of Llama31Config only")
      for name in ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")),
    Row("model.normalization", "config.normalization", move=_normalization, absent="layernorm", when=_LLAMA),
    Row("model.activation", "config.activation_func", move=_activation, absent="gelu", when=_LLAMA,
        note="gated_linear_unit beside it"),
    Row("model.openai_gelu", "config.activation_func", move=_openai_gelu, note="openai_gelu goes before activation"),
    Row("model.bias", "config.add_bias_linear", absent=True, when=_LLAMA),
    Row("model.qkv_bias", "config.add_qkv_bias"),
    Row("model.use_scaled_init_method", "config.output_layer_init_method", move=_scaled_init),
    Row("model.override_vocab_size", "config.vocab_size", move=_vocabulary, note="since 2.3"),
    Row("model.window_size", "config.window_size", move=_window),
    Row("model.apply_query_key_layer_scaling", "config.apply_query_key_layer_scaling", move=_query_key,
        note="fp16 only, as in NeMo 1"),
    *(Row(f"model.{name}", f"config.{name}") for name in _MOE),
    Row("model.moe_router_pre_softmax", "config.moe_router_pre_softmax", absent=False, when="model.num_moe_experts",
        note="absent meant False; MixtralConfig's default was True until 2.3: other outputs"),
    Row("model.mcore_customization_config.query_pre_attn_scalar", move=_customized, note="of Gemma2Config"),
    Row("model.mcore_customization_config.attn_logit_softcapping", move=_customized, note="of Gemma2Config"),
    Row("model.mcore_customization_config.final_logit_softcapping", move=_customized, note="of Gemma2Config"),
    Row("model.mcore_customization_config.new_decoder_architecture",
        move=_unless(False, "NeMo 2 has no Falcon"), note="of Falcon, which NeMo 2 lacks"),
    Row("model.mcore_customization_config.parallel_attention",
        move=_unless(False, "NeMo 2 has no Falcon"), note="of Falcon, which NeMo 2 lacks"),
    Row("model.apply_embedding_scaling", move=_unless(False, "GemmaModel scales embeddings: use it by hand"),
        note="of Gemma: GemmaModel does"),
    Row("model.ffn_dropout", move=_unless(0.0, "Megatron-Core drops nothing there"), note="Megatron-Core has none"),
    Row("model.headscale", move=_unless(False, "Megatron-Core has no head scales"), note="Megatron-Core has none"),
    Row("model.transformer_block_type", move=_unless("pre_ln", "Megatron-Core has pre_ln alone"), note="always pre_ln"),
    Row("model.normalize_attention_scores", move=_unless(True, "softmax_scale=1.0, since 2.2, by hand"),
        note="always; softmax_scale since 2.2"),
    Row("model.attention_type", move=_unless("multihead", "no other kind is left"), note="always multihead"),
    Row("model.drop_layers", move=on(attention_when=truthy, note="drop them from the converted checkpoint"),
        note="no counterpart"),
    Row("model.pre_process", note="the pipeline stage decides"),
    Row("model.post_process", note="the pipeline stage decides"),
    Row("model.mcore_gpt", move=_without_megatron_core, note="NeMo 2 is Megatron-Core only"),
    Row("model.megatron_legacy", note="NeMo 2 is Megatron-Core only"),
    Row("model.name", note="the layers' spec is transformer_layer_spec"),
    Row("model.transformer_engine", note="used wherever it is installed"),
    Row("model.use_emha", note="was never supported"),
    Row("model.use_flash_attention", note="Transformer Engine chooses; attention_backend since 2.2"),
    Row("model.onnx_safe", note="no counterpart"),
    Row("model.hyena.*", move=_unless(None, "HyenaModel, since 2.3, by hand"), note="HyenaModel, since 2.3"),
)  # fmt: skip

FUSIONS = (
    Row("model.bias_activation_fusion", "config.bias_activation_fusion", absent=True, when="model.num_layers",
        note="absent meant True, GPTConfig's default is False"),
    Row("model.bias_dropout_add_fusion", "config.bias_dropout_fusion", absent=True, when="model.num_layers",
        note="absent meant True, GPTConfig's default is False"),
    Row("model.masked_softmax_fusion", "config.masked_softmax_fusion", absent=False, when="model.num_layers",
        note="absent meant False under Megatron-Core, GPTConfig's default is True"),
    Row("model.cross_entropy_loss_fusion", "config.cross_entropy_loss_fusion", absent=False, when="model.num_layers",
        note="absent meant False, GPTConfig's default is True"),
    Row("model.gradient_accumulation_fusion", "config.gradient_accumulation_fusion", absent=False,
        when="model.num_layers", note="absent meant False, GPTConfig's default is whether the kernel is installed"),
    Row("model.get_attention_mask_from_fusion", note="Transformer Engine makes the mask"),
    Row("model.ub_tp_comm_overlap", "overlap.tp_comm_overlap", move=_overlap, note="a callback of the Trainer"),
    Row("model.ub_tp_comm_overlap_cfg.*", move=on(attention_when=truthy, note="by hand"),
        note="tp_comm_overlap_cfg=, an object of nemo.collections.llm.recipes.tp_overlap_configs.userbuffers"),
    Row("model.activations_checkpoint_granularity", "config.recompute_granularity"),
    Row("model.activations_checkpoint_method", "config.recompute_method"),
    Row("model.activations_checkpoint_num_layers", "config.recompute_num_layers"),
    Row("model.num_micro_batches_with_partial_activation_checkpoints",
        "config.num_microbatches_with_partial_activation_checkpoints"),
    Row("model.activations_checkpoint_layers_per_pipeline",
        move=_unless(None, "all stages recompute the same number of layers"), note="no counterpart"),
)  # fmt: skip

TOKENIZER = (
    Row("model.tokenizer.library", "tokenizer.library"),
    Row("model.tokenizer.type", "tokenizer.model_name"),
    Row("model.tokenizer.model", "tokenizer.tokenizer_model", move=_artifact),
    Row("model.tokenizer.tokenizer_model", note="the same file as model, registered twice by NeMo 1's converter"),
    Row("model.tokenizer.vocab_file", "tokenizer.vocab_file", move=_artifact),
    Row("model.tokenizer.merge_file", "tokenizer.merges_file", move=_artifact),
    Row("model.tokenizer.delimiter", "tokenizer.delimiter"),
    Row("model.tokenizer.sentencepiece_legacy", "tokenizer.legacy", move=_legacy, absent=None, when="model.tokenizer",
        note="absent meant True for SentencePiece, get_nmt_tokenizer's default is False"),
    Row("model.tokenizer.use_fast", "tokenizer.use_fast"),
    Row("model.tokenizer.trust_remote_code", "tokenizer.trust_remote_code"),
    Row("model.tokenizer.special_tokens", "tokenizer.special_tokens"),
    Row("model.tokenizer.chat_template", "tokenizer.chat_template"),
    Row("model.tokenizer.additional_special_tokens",
        move=on(attention_when=truthy, note="tokenizer.add_special_tokens([...]), by hand"),
        note="tokenizer.add_special_tokens([...])"),
)  # fmt: skip

ROWS = (*ARCHITECTURE, *FUSIONS, *TOKENIZER)
