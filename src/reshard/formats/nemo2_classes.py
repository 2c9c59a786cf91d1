"""The config classes of NeMo 2's language models: what each makes of an argument that nobody gave.

A context that NeMo wrote names a class and the arguments that were passed; the rest is the class's own. Only what
describes a model is here, not how a run executes it. Values are those of NeMo 2.4; what other releases have otherwise:

    MixtralConfig.moe_router_pre_softmax   True up to 2.3
    MixtralConfig8x22B.seq_length          65536 in 2.2
    Llama32Config1B, 3B.seq_length         8192 and 4096 up to 2.3
    Nemotron3Config22B                     Nemotron4Config22B in 2.0
    MistralNeMoConfig12B, 123B             MistralNeMo2407Config12B, 123B in 2.0

Source: NeMo `nemo/collections/llm/gpt/model/*.py`, 2.0 to 2.6; `scripts/checkpoint_converters/
convert_nemo1_to_nemo2.py` for the names of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

MODULE = "nemo.collections.llm.gpt.model."
"""Where the classes are, a module for each family."""

GPT: Mapping[str, Any] = {
    "normalization": "LayerNorm",
    "activation_func": "gelu",
    "gated_linear_unit": False,
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "layernorm_epsilon": 1e-5,
    "layernorm_zero_centered_gamma": False,
    "position_embedding_type": "learned_absolute",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "seq_len_interpolation_factor": None,
    "seq_length": 1024,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "init_method_std": 0.02,
    "share_embeddings_and_output_weights": True,
    "make_vocab_size_divisible_by": 128,
    "vocab_size": None,
    "num_query_groups": None,
    "kv_channels": None,
    "window_size": None,
    "num_moe_experts": None,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": False,
    "moe_aux_loss_coeff": 0,
    "moe_ffn_hidden_size": None,
    "bf16": False,
    "fp16": False,
    "params_dtype": "float32",
}
"""GPTConfig's own, and those that it has from Megatron-Core's TransformerConfig."""


class _Class(NamedTuple):
    base: str
    own: Mapping[str, Any]


_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")


def _class(base: str, /, *sizes: int | None, **own: Any) -> _Class:
    """A class by its base and what it has of its own; sizes in the order of `_SIZES`, None where the base's holds."""
    return _Class(base, {n: v for n, v in zip(_SIZES, sizes, strict=False) if v is not None} | own)


_GATED: dict[str, Any] = {
    "normalization": "RMSNorm",
    "activation_func": "silu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}

_CLASSES: Mapping[str, Mapping[str, _Class]] = {
    "llama": {
        "LlamaConfig": _class("GPTConfig", **_GATED, seq_length=4096, share_embeddings_and_output_weights=False),
        "Llama2Config7B": _class("LlamaConfig", 32, 4096, 32, 32, 11008),
        "Llama2Config13B": _class("LlamaConfig", 40, 5120, 40, 40, 13824),
        "Llama2Config70B": _class("LlamaConfig", 80, 8192, 64, 8, 28672),
        "Llama3Config": _class(
            "LlamaConfig", num_query_groups=8, init_method_std=0.01, layernorm_epsilon=1e-05, rotary_percent=1.0
        ),
        "Llama31Config": _class(
            "Llama3Config",
            scale_factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            old_context_len=8192,
            init_method_std=0.02,
        ),
        "Llama3Config8B": _class("Llama3Config", 32, 4096, 32, None, 14336, rotary_base=500000, seq_length=8192),
        "Llama3Config70B": _class(
            "Llama3Config",
            80,
            8192,
            64,
            None,
            28672,
            rotary_base=500000,
            seq_length=8192,
            init_method_std=0.008944,
            make_vocab_size_divisible_by=128,
        ),
        "Llama31Config8B": _class("Llama31Config", 32, 4096, 32, None, 14336, rotary_base=500000, seq_length=131072),
        "Llama31Config70B": _class(
            "Llama31Config",
            80,
            8192,
            64,
            None,
            28672,
            rotary_base=500000,
            seq_length=131072,
            make_vocab_size_divisible_by=128,
        ),
        "Llama31Config405B": _class(
            "Llama31Config",
            126,
            16384,
            128,
            None,
            53248,
            rotary_base=500000,
            seq_length=131072,
            make_vocab_size_divisible_by=128,
        ),
        "Llama32Config1B": _class(
            "Llama31Config",
            16,
            2048,
            32,
            None,
            8192,
            scale_factor=32.0,
            share_embeddings_and_output_weights=True,
            rotary_base=500000,
            seq_length=131072,
            make_vocab_size_divisible_by=128,
        ),
        "Llama32Config3B": _class(
            "Llama31Config",
            28,
            3072,
            24,
            None,
            8192,
            scale_factor=32,
            share_embeddings_and_output_weights=True,
            rotary_base=500000,
            seq_length=131072,
            make_vocab_size_divisible_by=128,
        ),
        "CodeLlamaConfig7B": _class("Llama2Config7B", rotary_base=1000000, seq_length=16384),
        "CodeLlamaConfig13B": _class("Llama2Config13B", rotary_base=1000000, seq_length=16384),
        "CodeLlamaConfig34B": _class("LlamaConfig", 48, 8192, 64, 8, 22016, rotary_base=1000000, seq_length=16384),
        "CodeLlamaConfig70B": _class("Llama2Config70B"),
    },
    "mistral": {
        "MistralConfig7B": _class(
            "GPTConfig",
            32,
            4096,
            32,
            8,
            14336,
            **_GATED,
            seq_length=32768,
            share_embeddings_and_output_weights=False,
            init_method_std=0.02,
            layernorm_epsilon=1e-05,
            window_size=[4096, 0],
            params_dtype="bfloat16",
        ),
        "MistralNeMoConfig12B": _class(
            "MistralConfig7B",
            40,
            5120,
            kv_channels=128,
            seq_length=4096,
            window_size=None,
            rotary_percent=1.0,
            rotary_base=1000000.0,
        ),
        "MistralNeMoConfig123B": _class(
            "MistralConfig7B",
            88,
            12288,
            96,
            None,
            28672,
            kv_channels=128,
            seq_length=4096,
            window_size=None,
            rotary_percent=1.0,
            rotary_base=1000000.0,
        ),
    },
    "mixtral": {
        "MixtralConfig": _class(
            "GPTConfig",
            32,
            4096,
            32,
            8,
            14336,
            **_GATED,
            max_position_embeddings=4096,
            seq_length=4096,
            share_embeddings_and_output_weights=False,
            num_moe_experts=8,
            moe_aux_loss_coeff=0.01,
            moe_router_topk=2,
            moe_router_pre_softmax=False,
            init_method_std=0.02,
            layernorm_epsilon=1e-05,
            rotary_percent=1.0,
            rotary_base=1000000.0,
            bf16=True,
            params_dtype="bfloat16",
        ),
        "MixtralConfig8x3B": _class("MixtralConfig", hidden_size=2560, ffn_hidden_size=8960),
        "MixtralConfig8x7B": _class("MixtralConfig"),
        "MixtralConfig8x22B": _class("MixtralConfig", 56, 6144, 48, None, 16384),
    },
    "nemotron": {
        "NemotronConfig": _class(
            "GPTConfig",
            32,
            3072,
            24,
            8,
            9216,
            normalization="LayerNorm",
            activation_func="squared_relu",
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            rotary_percent=0.5,
            layernorm_zero_centered_gamma=True,
            seq_length=4096,
            kv_channels=128,
            init_method_std=0.0134,
        ),
        "Nemotron3Config4B": _class("NemotronConfig"),
        "Nemotron3Config8B": _class(
            "NemotronConfig",
            hidden_size=4096,
            ffn_hidden_size=16384,
            num_attention_heads=32,
            num_query_groups=None,
            kv_channels=None,
            init_method_std=0.01,
        ),
        "Nemotron3Config22B": _class(
            "NemotronConfig", 40, 6144, 48, None, 24576, kv_channels=None, init_method_std=0.008, num_query_groups=None
        ),
        "Nemotron4Config15B": _class(
            "NemotronConfig", hidden_size=6144, ffn_hidden_size=24576, num_attention_heads=48, kv_channels=None
        ),
        "Nemotron4Config340B": _class(
            "NemotronConfig", 96, 18432, 96, None, 73728, kv_channels=None, init_method_std=0.0063
        ),
    },
    "qwen2": {
        "Qwen2Config": _class(
            "GPTConfig",
            **_GATED,
            add_qkv_bias=True,
            seq_length=4096,
            init_method_std=0.02,
            vocab_size=151936,
            share_embeddings_and_output_weights=False,
            layernorm_epsilon=1e-06,
            rotary_base=1000000.0,
        ),
        "Qwen2Config500M": _class("Qwen2Config", 24, 896, 14, 2, 4864),
        "Qwen25Config500M": _class("Qwen2Config500M", seq_length=32768),
        "Qwen2Config1P5B": _class("Qwen2Config", 28, 1536, 12, 2, 8960),
        "Qwen25Config1P5B": _class("Qwen2Config1P5B", seq_length=131072),
        "Qwen2Config7B": _class("Qwen2Config", 28, 3584, 28, 4, 18944, vocab_size=152064),
        "Qwen25Config7B": _class("Qwen2Config7B", seq_length=131072),
        "Qwen25Config14B": _class(
            "Qwen2Config", 48, 5120, 40, 8, 13824, vocab_size=152064, layernorm_epsilon=1e-05, seq_length=131072
        ),
        "Qwen25Config32B": _class(
            "Qwen2Config", 64, 5120, 40, 8, 27648, vocab_size=152064, layernorm_epsilon=1e-05, seq_length=131072
        ),
        "Qwen2Config72B": _class("Qwen2Config", 80, 8192, 64, 8, 29568, vocab_size=152064, layernorm_epsilon=1e-05),
        "Qwen25Config72B": _class("Qwen2Config72B", seq_length=131072),
    },
    "qwen3": {
        "Qwen3Config": _class(
            "Qwen2Config",
            add_qkv_bias=False,
            qk_layernorm=True,
            kv_channels=128,
            num_query_groups=8,
            max_position_embeddings=40960,
        ),
        "Qwen3MoEConfig": _class(
            "Qwen3Config",
            num_moe_experts=128,
            moe_aux_loss_coeff=0.001,
            moe_router_topk=8,
            moe_router_pre_softmax=False,
        ),
        "Qwen3Config600M": _class("Qwen3Config", 28, 1024, 16, None, 3072, share_embeddings_and_output_weights=True),
        "Qwen3Config1P7B": _class("Qwen3Config", 28, 2048, 16, None, 6144, share_embeddings_and_output_weights=True),
        "Qwen3Config4B": _class("Qwen3Config", 36, 2560, 32, None, 9728, share_embeddings_and_output_weights=True),
        "Qwen3Config8B": _class("Qwen3Config", 36, 4096, 32, None, 12288),
        "Qwen3Config14B": _class("Qwen3Config", 40, 5120, 40, None, 17408),
        "Qwen3Config32B": _class("Qwen3Config", 64, 5120, 64, None, 25600),
        "Qwen3Config30B_A3B": _class("Qwen3MoEConfig", 48, 2048, 32, 4, 6144, moe_ffn_hidden_size=768),
        "Qwen3Config235B_A22B": _class("Qwen3MoEConfig", 94, 4096, 64, 4, 12288, moe_ffn_hidden_size=1536),
    },
    "gemma": {
        "GemmaConfig": _class(
            "GPTConfig",
            normalization="RMSNorm",
            activation_func="openai_gelu",
            gated_linear_unit=True,
            position_embedding_type="rope",
            add_bias_linear=False,
            seq_length=8192,
            kv_channels=256,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            share_embeddings_and_output_weights=True,
            layernorm_zero_centered_gamma=True,
        ),
        "GemmaConfig2B": _class("GemmaConfig", 18, 2048, 8, 1, 16384),
        "GemmaConfig7B": _class("GemmaConfig", 28, 3072, 16, 16, 24576),
        "CodeGemmaConfig2B": _class("GemmaConfig2B"),
        "CodeGemmaConfig7B": _class("GemmaConfig7B"),
    },
    "gemma2": {
        "Gemma2Config": _class(
            "GPTConfig",
            normalization="RMSNorm",
            activation_func="openai_gelu",
            gated_linear_unit=True,
            position_embedding_type="rope",
            add_bias_linear=False,
            seq_length=8192,
            kv_channels=256,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            share_embeddings_and_output_weights=True,
            layernorm_zero_centered_gamma=True,
            layernorm_epsilon=1e-06,
            rotary_base=10000,
            window_size=[4096, 0],
            vocab_size=256000,
            transformer_layer_spec="gemma2_layer_spec",
            query_pre_attn_scalar=224,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        ),
        "Gemma2Config2B": _class("Gemma2Config", 26, 2304, 8, 4, 9216, query_pre_attn_scalar=256),
        "Gemma2Config9B": _class("Gemma2Config", 42, 3584, 16, 8, 14336, query_pre_attn_scalar=256),
        "Gemma2Config27B": _class("Gemma2Config", 46, 4608, 32, 16, 36864, query_pre_attn_scalar=144),
    },
    "starcoder2": {
        "Starcoder2Config": _class(
            "GPTConfig",
            normalization="LayerNorm",
            activation_func="gelu",
            add_bias_linear=True,
            seq_length=16384,
            position_embedding_type="rope",
            rotary_percent=1.0,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            init_method_std=0.01,
            share_embeddings_and_output_weights=False,
            layernorm_epsilon=1e-5,
        ),
        "Starcoder2Config3B": _class(
            "Starcoder2Config", 30, 3072, 24, 2, 12288, init_method_std=0.018042, rotary_base=999999.4420358813
        ),
        "Starcoder2Config7B": _class(
            "Starcoder2Config", 32, 4608, 36, 4, 18432, init_method_std=0.018042, rotary_base=1_000_000
        ),
        "Starcoder2Config15B": _class(
            "Starcoder2Config", 40, 6144, 48, 4, 24576, init_method_std=0.01275, rotary_base=100_000
        ),
    },
    "phi3mini": {
        "Phi3Config": _class("GPTConfig", **_GATED, seq_length=4096, share_embeddings_and_output_weights=False),
        "Phi3ConfigMini": _class("Phi3Config", 32, 3072, 32, 32, 8192, rotary_base=10000.0, vocab_size=32064),
    },
}
"""By module and name."""

_RENAMED = {
    "nemotron.Nemotron4Config22B": "nemotron.Nemotron3Config22B",
    "mistral.MistralNeMo2407Config12B": "mistral.MistralNeMoConfig12B",
    "mistral.MistralNeMo2407Config123B": "mistral.MistralNeMoConfig123B",
}


def defaults(path: str) -> dict[str, Any] | None:
    """What a config class has for arguments that are not given, by its path. None for a class that is not known."""
    short = path.removeprefix(MODULE)
    if short == "base.GPTConfig":
        return dict(GPT)
    module, _, name = _RENAMED.get(short, short).partition(".")
    found = _CLASSES.get(module, {}).get(name)
    if found is None:
        return None
    # qwen3's classes are made of qwen2's
    home = module if found.base in _CLASSES[module] else next((m for m in _CLASSES if found.base in _CLASSES[m]), "")
    inherited = dict(GPT) if found.base == "GPTConfig" else defaults(f"{MODULE}{home}.{found.base}")
    return None if inherited is None else {**inherited, **found.own}


MODEL_IDS: Mapping[str, str] = {
    "meta-llama/Llama-2-7b-hf": "llama.Llama2Config7B",
    "meta-llama/Llama-2-13b-hf": "llama.Llama2Config13B",
    "meta-llama/Llama-2-70b-hf": "llama.Llama2Config70B",
    "meta-llama/Meta-Llama-3-8B": "llama.Llama3Config8B",
    "meta-llama/Meta-Llama-3-70B": "llama.Llama3Config70B",
    "mistralai/Mistral-7B-v0.1": "mistral.MistralConfig7B",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral.MixtralConfig8x7B",
    "mistralai/Mixtral-8x22B-v0.1": "mixtral.MixtralConfig8x22B",
    "nvidia/nemotron-3-8b-base-4k": "nemotron.Nemotron3Config8B",
    "nemotron4-22b": "nemotron.Nemotron3Config22B",
    "nemotron4-15b": "nemotron.Nemotron4Config15B",
    "nemotron4-340b": "nemotron.Nemotron4Config340B",
}
"""The models that NVIDIA's script has names for, and their classes."""
