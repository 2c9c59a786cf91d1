"""Llama and the families that are built like it.

Checked: Llama 2, 3 and 3.1 configs, Mistral 7B, Qwen2 and Qwen2.5, Qwen3 dense.
"""

from __future__ import annotations

from reshard.dialects.table import Config, Facts, Family
from reshard.families.blocks import DENSE, bias_tags, decoder, head_norms


def _llama(config: Config) -> Facts:
    return decoder(config, tags=bias_tags(config))


def _mistral(config: Config) -> Facts:
    return decoder(config)


def _qwen2(config: Config) -> Facts:
    return decoder(config, tags=("qkv_bias",))


FAMILIES = (
    Family("llama", ("llama",), ("LlamaForCausalLM",), DENSE, _llama),
    Family("mistral", ("mistral", "ministral"), ("MistralForCausalLM", "MinistralForCausalLM"), DENSE, _mistral),
    Family("qwen2", ("qwen2",), ("Qwen2ForCausalLM",), DENSE, _qwen2, settings=(("add_qkv_bias", True),)),
    Family(
        "qwen3", ("qwen3",), ("Qwen3ForCausalLM",), (*DENSE, *head_norms()), _llama, settings=(("qk_layernorm", True),)
    ),
)
