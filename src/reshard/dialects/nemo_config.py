"""What a model is to NeMo 2: its classes, and the arguments that they are called with.

    context    the call of TrainerContext that a directory's io.json holds
    model_yaml the text of model.yaml, which deployment reads instead
    of_id      the settings of the models that NVIDIA's conversion script has names for

A model is called by the base class of its family with every value spelled: what a class has of its own differs from
release to release, and so do the names of the sized classes. Settings are run_config.yaml's.

Source: NeMo `collections/llm/gpt/model/*.py`, `lightning/io/pl.py`, 2.0 to 2.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from reshard.dialects.megatron_config import DEFAULTS, same
from reshard.dialects.recognise import of_nemo
from reshard.dialects.setting import Values
from reshard.errors import Mismatch, Unsupported, listed
from reshard.formats.fiddle import Call, Symbol
from reshard.formats.nemo2_classes import GPT, MODEL_IDS, MODULE, defaults

_FAMILIES = {
    "llama": ("llama.LlamaModel", "llama.LlamaConfig"),
    "mistral": ("mistral.MistralModel", "mistral.MistralConfig7B"),
    "mixtral": ("mixtral.MixtralModel", "mixtral.MixtralConfig"),
    "nemotron": ("nemotron.NemotronModel", "nemotron.NemotronConfig"),
    "qwen2": ("qwen2.Qwen2Model", "qwen2.Qwen2Config"),
    "qwen3": ("qwen3.Qwen3Model", "qwen3.Qwen3Config"),
    "qwen3_moe": ("qwen3.Qwen3Model", "qwen3.Qwen3MoEConfig"),
    "gemma": ("gemma.GemmaModel", "gemma.GemmaConfig"),
    "gemma2": ("gemma2.Gemma2Model", "gemma2.Gemma2Config"),
    "starcoder2": ("starcoder2.Starcoder2Model", "starcoder2.Starcoder2Config"),
    "phi3": ("phi3mini.Phi3Model", "phi3mini.Phi3Config"),
}
"""By family, the classes of the model and of its config."""

_LLAMA31 = "llama.Llama31Config"
"""The only class that scales its rotary embedding."""

_SPELLED = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "seq_length", "max_position_embeddings", "position_embedding_type", "rotary_base", "rotary_percent",
    "seq_len_interpolation_factor", "scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len",
    "window_size", "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "qk_layernorm",
    "gated_linear_unit", "add_bias_linear", "add_qkv_bias", "num_moe_experts", "moe_router_topk",
    "moe_router_pre_softmax", "moe_ffn_hidden_size", "moe_aux_loss_coeff", "query_pre_attn_scalar",
    "attn_logit_softcapping", "final_logit_softcapping", "hidden_dropout", "attention_dropout", "init_method_std",
    "share_embeddings_and_output_weights", "make_vocab_size_divisible_by", "vocab_size", "bf16", "fp16",
    "params_dtype",
)  # fmt: skip
"""Arguments, in the order in which they are written."""

_NOT_NEMOS = frozenset(
    {"_target_", "should_pad_vocab", "rope_scaling", "rope_scaling_factor", "moe_grouped_gemm",
     "moe_token_dispatcher_type", "activation_func", "transformer_layer_spec"}
)  # fmt: skip
"""Settings that say how a run executes, or that NeMo puts otherwise: held against the class on their own."""

_CALLABLES = {
    "silu": "torch.nn.functional.silu",
    "gelu": "torch.nn.functional.gelu",
    "relu": "torch.nn.functional.relu",
    "squared_relu": "nemo.collections.llm.fn.activation.squared_relu",
    "openai_gelu": "nemo.collections.llm.fn.activation.openai_gelu",
    "fast_gelu": "nemo.collections.llm.fn.activation.openai_gelu",
    "gemma2_layer_spec": f"{MODULE}gemma2.gemma2_layer_spec",
}


def config_call(settings: Values, family: str, rope: Values, vocab_size: int | None, vocab_unit: int) -> Call:
    """The config of a model.

    Args:
        settings: As `megatron_config.to_megatron` gives them.
        family: Its name.
        rope: The scaling of its rotary embedding, as `setting.flat` gives it.
        vocab_size: Rows of the embedding; None where NeMo finds as many by the tokenizer.
        vocab_unit: NeMo makes the tokenizer's number a multiple of this.

    Raises Unsupported for a family that NeMo has no class for, and for settings that its class has not.
    """
    model_class(family)
    short = _LLAMA31 if family == "llama" and settings.get("rope_scaling") is True else _FAMILIES[family][1]
    own = defaults(MODULE + short) or {}
    values = {**settings, **_window(settings, own), **_scaling(settings, rope, short)}
    values |= {"vocab_size": vocab_size, "make_vocab_size_divisible_by": vocab_unit}
    if values.get("moe_ffn_hidden_size") == values.get("ffn_hidden_size") and own.get("moe_ffn_hidden_size") is None:
        values.pop("moe_ffn_hidden_size", None)
    if "max_position_embeddings" in own:
        values.setdefault("max_position_embeddings", values.get("seq_length"))
    _check_expressed(values, own, short)
    arguments = {name: values[name] for name in _SPELLED if name in values and not _is_unset(name, values, own)}
    if "params_dtype" in arguments:
        arguments["params_dtype"] = Symbol("torch", str(arguments["params_dtype"]))
    return Call(Symbol.of(MODULE + short), {**arguments, **_function(values, own)})


def _function(values: Values, own: Values) -> Values:
    """The activation, where the class has another: Megatron-Core refuses to fuse those that it has no kernel for."""
    if _activation(values.get("activation_func")) == _activation(own.get("activation_func")):
        return {}
    return {"activation_func": Symbol.of(_CALLABLES[str(values["activation_func"])]), "bias_activation_fusion": False}


def model_class(family: str) -> Symbol:
    """The class of a family's models. Raises Unsupported for a family that NeMo has none for."""
    if family not in _FAMILIES:
        raise Unsupported(
            f"NeMo 2 has no class for {family} models that computes what they compute",
            hint=f"the families that are written: {listed(_FAMILIES, 20)}; --to torch_dist writes the others",
        )
    return Symbol.of(MODULE + _FAMILIES[family][0])


def _is_unset(name: str, values: Values, own: Values) -> bool:
    """A None that the class has too is no argument: releases before 2.3 do not know all of them."""
    return values[name] is None and own.get(name) is None


def _window(settings: Values, own: Values) -> Values:
    """NeMo counts a token's own place into its window."""
    window = settings.get("window_size")
    if window is None:
        return {"window_size": None} if own.get("window_size") is not None else {}
    return {"window_size": [window[0] + 1 if window[0] >= 0 else window[0], window[1]]}


def _scaling(settings: Values, rope: Values, short: str) -> Values:
    if settings.get("rope_scaling") is not True:
        return {}
    if short != _LLAMA31:
        raise Unsupported(f"NeMo 2's {short.partition('.')[2]} has no scaling of the rotary embedding as Llama 3.1 has")
    return {
        "scale_factor": settings["rope_scaling_factor"],
        "low_freq_factor": rope.get("low_freq_factor", 1.0),
        "high_freq_factor": rope.get("high_freq_factor", 4.0),
        "old_context_len": rope.get("original_max_position_embeddings", 8192),
    }


_BANDS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def without_bands(config: Values) -> Values:
    """A config as if Llama 3.1's rotary embedding had its usual bands: Megatron knows no others, but NeMo does."""
    result = dict(config)
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if isinstance(rope, Mapping) and "llama3" in (rope.get("rope_type"), rope.get("type")):
            result[key] = {name: value for name, value in rope.items() if name not in _BANDS}
    return result


def _check_expressed(values: Values, own: Values, short: str) -> None:
    """Raise Unsupported, listing all, for settings that the class has no argument for, and computes otherwise."""
    left = [
        f"{name} {value!r:.60}"
        for name, value in values.items()
        if name not in _SPELLED and name not in _NOT_NEMOS and not same(value, own.get(name, DEFAULTS.get(name)))
    ]
    left += [
        f"{name} {values[name]!r:.60}"
        for name in _SPELLED
        if values.get(name) is not None and name not in own and name not in _ALWAYS_THERE
    ]
    function = values.get("activation_func")
    if _activation(function) != _activation(own.get("activation_func")) and function not in _CALLABLES:
        left.append(f"activation_func {function!r:.60}")
    if values.get("position_embedding_type") not in ("rope", "learned_absolute"):
        left.append(f"position_embedding_type {values.get('position_embedding_type')!r:.60}")
    if left:
        raise Unsupported(
            f"NeMo 2's {short.partition('.')[2]} does not compute with {listed(left)}",
            hint="--to torch_dist writes the model for Megatron-LM and Megatron Bridge",
        )


_ALWAYS_THERE = frozenset(
    {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings"}
)
"""Fields without a default of their own in the base class."""


def _activation(name: Any) -> Any:
    return "fast_gelu" if name in ("openai_gelu", "gelu_pytorch_tanh") else name


# ---------------------------------------------------------------------------------------------------- the context

_TRAINER = Call(
    Symbol.of("nemo.lightning.pytorch.trainer.Trainer"),
    {
        "accelerator": "cpu",
        "strategy": Call(
            Symbol.of("nemo.lightning.pytorch.strategies.megatron_strategy.MegatronStrategy"),
            {"ddp": "pytorch", "setup_optimizers": False},
        ),
        "devices": 1,
    },
)
"""As NeMo's own conversions have it: whoever loads the model makes another."""

_GENERATION = Call(
    Symbol.of("nemo.lightning.io.artifact.hf_auto.from_pretrained"),
    {
        "auto_cls": Symbol.of("transformers.generation.configuration_utils.GenerationConfig"),
        "pretrained_model_name_or_path": "./artifacts",
    },
)


@dataclass(frozen=True, slots=True)
class Described:
    """A model and what belongs to it, as calls."""

    model: Symbol
    config: Call
    tokenizer: Call | None
    has_generation_config: bool = False
    """Whether `artifacts/generation_config.json` is there."""


def context(described: Described) -> Call:
    """What io.json holds."""
    config = described.config
    if described.has_generation_config:
        config = Call(config.target, {**config.arguments, "generation_config": _GENERATION})
    arguments = {"config": config} | ({"tokenizer": described.tokenizer} if described.tokenizer else {})
    return Call(
        Symbol.of("nemo.lightning.io.pl.TrainerContext"),
        {"model": Call(described.model, arguments), "trainer": _TRAINER, "extra": {}},
    )


def model_yaml(described: Described) -> str:
    """The text of model.yaml: the config with its class's own values too."""
    own = defaults(described.config.target.path) or {}
    values = {**own, **described.config.arguments}
    if described.has_generation_config:
        values["generation_config"] = _GENERATION
    config = {"_target_": described.config.target.path} | {n: _yaml(n, values[n]) for n in sorted(values)}
    document = {"_target_": described.model.path, "config": config, "model_transform": None, "optim": None}
    if described.tokenizer:
        document["tokenizer"] = _yaml("tokenizer", described.tokenizer)
    return yaml.safe_dump(document, default_flow_style=False, width=120, sort_keys=True)


def _yaml(name: str, value: Any) -> Any:
    match value:
        case Call():
            return {"_target_": value.target.path} | {n: _yaml(n, v) for n, v in value.arguments.items()}
        case Symbol():
            return {"_target_": value.path, "_call_": False}
        case list() | tuple():
            return [_yaml("", item) for item in value]
        case str() if name in ("activation_func", "transformer_layer_spec"):
            return {"_target_": _CALLABLES[value], "_call_": False}
        case str() if name == "params_dtype":
            return {"_target_": f"torch.{value}", "_call_": False}
    return value


# ------------------------------------------------------------------------------------------------- NVIDIA's names

_HYBRID = ("nemotronh4b", "nemotronh8b", "nemotronh47b", "nemotronh56b")
"""Names for models with Mamba's layers, which are of another class than GPT's."""

_NOT_OF_ID = frozenset(
    {"params_dtype", "bf16", "fp16", "vocab_size", "make_vocab_size_divisible_by", "hidden_dropout",
     "attention_dropout", "moe_aux_loss_coeff", "seq_length", "max_position_embeddings", "init_method_std"}
)  # fmt: skip
"""What does not change what a model computes: a checkpoint may have it otherwise."""

_NULL_SAYS = ("window_size", "num_moe_experts", "seq_len_interpolation_factor")
"""What a model does not have whose settings do not speak of it."""

_OF_TENSORS = frozenset({"params_dtype", "bf16", "fp16", "vocab_size", "make_vocab_size_divisible_by"})
"""What the tensors say better."""


def of_id(model_id: str) -> dict[str, Any]:
    """The settings of a model by NVIDIA's name. Raises Unsupported for other names."""
    if model_id in _HYBRID:
        raise Unsupported(
            f"--model-id {model_id}: NeMo's class of hybrid models is not written",
            hint="without --model-id such a checkpoint converts to hf or torch_dist",
        )
    if model_id not in MODEL_IDS:
        raise Unsupported(
            f"--model-id {model_id} is neither a directory of NeMo 2 nor one of the {len(MODEL_IDS)} models that "
            f"NVIDIA's script knows: {listed(MODEL_IDS, 12)}",
            hint="leave it out: what the checkpoint says of itself is enough",
        )
    return of_context(defaults(MODULE + MODEL_IDS[model_id]) or {})


def of_context(values: Values) -> dict[str, Any]:
    """The settings of a model by those of a NeMo context, as far as they say what it is."""
    known = {n: v for n, v in values.items() if n in GPT or n in _SPELLED}
    heads = known["num_attention_heads"]
    known["num_query_groups"] = known.get("num_query_groups") or heads
    known["kv_channels"] = known.get("kv_channels") or known["hidden_size"] // heads
    found = {**known, "rope_scaling": False, **of_nemo(known)}
    return {n: v for n, v in found.items() if n not in _OF_TENSORS}


def filled(settings: Values, model_id: str, known: Values) -> dict[str, Any]:
    """A checkpoint's settings with what they leave out and `known`, the model's of that name, says.

    Raises Mismatch, listing all with both values, where the checkpoint says otherwise.
    """
    stated = {n: v for n, v in settings.items() if v is not None}
    if stated:
        stated |= {name: None for name in _NULL_SAYS if name not in stated}
    is_nemos = str(stated.get("model_class")).startswith("nemo.")
    said = {**stated, **(of_nemo(stated) if is_nemos else {})}
    experts = bool(said.get("num_moe_experts") or known.get("num_moe_experts"))
    unlike = [
        f"{name} is {said[name]!r:.60}, not {value!r}"
        for name, value in known.items()
        if name in said and name not in _NOT_OF_ID and (experts or not name.startswith("moe_"))
        and not same(_comparable(name, said[name]), _comparable(name, value))
    ]  # fmt: skip
    if unlike:
        raise Mismatch(
            f"the checkpoint is no {model_id}: {listed(unlike)}",
            hint="leave --model-id out: what the checkpoint says of itself is enough",
        )
    return {**known, **stated}


def _comparable(name: str, value: Any) -> Any:
    if name == "activation_func":
        return _activation(value)
    return list(value) if isinstance(value, tuple) else value
