"""Llama and the families that are built like it.

Checked: Llama 2 7B, 3.1 405B and 3.2 1B, Yi 1.5 9B, DeepSeek LLM 67B, Mistral 7B and Nemo, Qwen2.5 0.5B and 7B,
Qwen3 0.6B and 8B, Seed-OSS 36B, ERNIE 4.5 0.3B.
"""

from __future__ import annotations

from reshard.dialects.facts import Facts
from reshard.dialects.table import Config, Family
from reshard.families.blocks import DENSE, TIED_HEAD, bias_tags, decoder, head_norms
from reshard.families.settings import biases, epsilon, provider, rotary, window


def _llama(config: Config) -> Facts:
    return decoder(config, tags=bias_tags(config))


def _mistral(config: Config) -> Facts:
    return decoder(config)


def _qwen2(config: Config) -> Facts:
    return decoder(config, tags=("qkv_bias",))


def _seed_oss(config: Config) -> Facts:
    return decoder(config, tags=bias_tags(config, proj="attention_out_bias"))


def _ernie(config: Config) -> Facts:
    return decoder(config, tags=bias_tags(config, "use_bias", "use_bias", "use_bias"), tied=True)


FAMILIES = (
    Family(
        "llama",
        ("llama",),
        ("LlamaForCausalLM", "LLaMAForCausalLM"),
        DENSE,
        _llama,
        copies=TIED_HEAD,
        settings=(biases("mlp_bias", qkv="attention_bias"),),
        verified="Megatron-LM 0.11 to 0.20 and Megatron-Bridge, bit for bit",
    ),
    Family(
        "mistral",
        ("mistral", "ministral3"),
        ("MistralForCausalLM", "Ministral3ForCausalLM"),
        DENSE,
        _mistral,
        copies=TIED_HEAD,
        settings=(provider("mistral.mistral_provider.MistralModelProvider"), window(4096)),
        verified="Megatron-Bridge import, bit for bit",
    ),
    Family(
        "ministral",
        ("ministral",),
        ("MinistralForCausalLM",),
        DENSE,
        _mistral,
        copies=TIED_HEAD,
        settings=(provider("mistral.mistral_provider.MistralModelProvider"), window(4096, layers=True)),
        verified="names of transformers; built as Mistral",
    ),
    Family(
        "qwen2",
        ("qwen2",),
        ("Qwen2ForCausalLM",),
        DENSE,
        _qwen2,
        copies=TIED_HEAD,
        settings=(("add_qkv_bias", True), window(4096, layers=True, switch=True)),
        verified="Megatron-Bridge import, bit for bit",
    ),
    Family(
        "qwen3",
        ("qwen3",),
        ("Qwen3ForCausalLM",),
        (*DENSE, *head_norms()),
        _llama,
        copies=TIED_HEAD,
        settings=(("qk_layernorm", True), biases(qkv="attention_bias"), window(4096, layers=True, switch=True)),
        verified="Megatron-Bridge import, bit for bit",
    ),
    Family(
        "seed_oss",
        ("seed_oss",),
        ("SeedOssForCausalLM",),
        DENSE,
        _seed_oss,
        copies=TIED_HEAD,
        settings=(biases("attention_out_bias", "mlp_bias", qkv="attention_bias"),),
        verified="megatron-core computes the same logits",
    ),
    Family(
        "ernie4_5",
        ("ernie4_5",),
        ("Ernie4_5ForCausalLM",),
        DENSE,
        _ernie,
        copies=TIED_HEAD,
        settings=(
            ("rotary_interleaved", True),
            *rotary(500000.0),
            epsilon("rms_norm_eps", 1e-5),
            biases("use_bias"),
        ),
        verified="names of mcore-bridge; megatron-core computes the same logits",
    ),
)
