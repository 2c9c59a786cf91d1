"""transformers' own module names, and the names of the same weights on the hub.

Since release 5 transformers renames and fuses weights while it loads them: the experts of a layer are one tensor, the
parts of a vision-language model lie under `model.`. Its `save_pretrained` undoes that; a checkpoint of the training
state dict is not undone and carries module names, which no other loader knows.

    module   model.layers.0.mlp.experts.gate_up_proj  (E, 2I, H)
    hub      model.layers.0.mlp.experts.{0..E-1}.gate_proj.weight, .up_proj.weight  (I, H) each

A table is rows; a row serves both directions and matches whole names only. `inner` rows are about layers and hold
wherever the text model lies (`{path}`), `outer` rows about the parts of a composed model; a name goes through one of
each at most. Names on the hub side match no module side, so a checkpoint with hub names passes unchanged.

Checked against `revert_weight_conversion` of transformers 5.23 on models of every type listed, built from their
default configs. Vision towers of the CLIP and SigLIP kinds lie in `vision_tower.vision_model.` on the hub.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from reshard.core.checkpoint import Checkpoint
from reshard.core.tensor import Tensor
from reshard.dialects import packing
from reshard.dialects.match import by_name, joined, natural, pattern, split
from reshard.dialects.table import Config, Row
from reshard.errors import Mismatch, listed


@dataclass(frozen=True, slots=True)
class Table:
    """What differs between module and hub for some model types."""

    model_types: tuple[str, ...]
    inner: tuple[Row, ...] = ()
    outer: tuple[Row, ...] = ()


_GATED = ("gate_proj", "up_proj", "down_proj")


def _experts(moe: str, names: tuple[str, ...] = _GATED, hub_moe: str = "") -> tuple[Row, ...]:
    """The two tensors of fused experts in `moe`, a submodule of each layer, under the hub's names of the matrices."""
    layer = "{path}layers.{layer}"
    return packing.rows(f"{layer}.{moe}.experts", f"{layer}.{hub_moe or moe}.experts.{{expert}}", names)


def _moved(module: str, hub: str) -> Row:
    return Row(f"{{path}}layers.{{layer}}.{module}", f"{{path}}layers.{{layer}}.{hub}")


_PLAIN = _experts("mlp")
_W123 = _experts("mlp", ("w1", "w3", "w2"), hub_moe="block_sparse_moe")


def _under_model(*parts: str) -> tuple[Row, ...]:
    return tuple(Row(f"model.{part}.{{rest}}", f"{part}.{{rest}}") for part in parts)


_LLAVA_TEXT = (
    Row("model.language_model.{rest}", "language_model.model.{rest}"),
    Row("lm_head.{rest}", "language_model.lm_head.{rest}"),
)
_LLAVA = (*_LLAVA_TEXT, *_under_model("multi_modal_projector"), Row("model.image_newline", "image_newline"))
_QWEN_VL = (Row("model.language_model.{rest}", "model.{rest}"), *_under_model("visual"))
_OMNI = (*_QWEN_VL, *_under_model("audio_tower"))
_IN_MODEL = (
    tuple(
        Row(f"model.{tower}.{{part}}.{{rest}}", f"{tower}.vision_model.{{part}}.{{rest}}")
        for tower in ("vision_tower", "image_tower", "video_tower")
    )
    + tuple(
        Row(f"model.{tower}.vision_model.{{rest}}", f"{tower}.vision_model.{{rest}}", variant=True)
        for tower in ("vision_tower", "image_tower", "video_tower")
    )
    + tuple(
        # as transformers 5 saves a tower that it did not load
        Row(f"vision_tower.{part}.{{rest}}", f"vision_tower.vision_model.{part}.{{rest}}", variant=True)
        for part in ("embeddings", "encoder", "head", "post_layernorm", "pre_layrnorm")
    )
)
_TOWERS = _under_model("vision_tower", "image_tower", "video_tower")
_NESTED_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Their modules lost the level `vision_model.` in transformers 5; the hub kept it."""
_WITH_TOWER = (
    "aria",
    "aya_vision",
    "gemma3",
    "got_ocr2",
    "internvl",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "mistral3",
    "paligemma",
    "pp_chart2table",
    "video_llava",
    "vipllava",
)

TABLES = (
    Table(
        (
            "qwen2_moe",
            "qwen3_moe",
            "qwen3_next",
            "qwen3_omni_moe_text",
            "qwen3_omni_moe_thinker",
            "qwen3_5_moe",
            "qwen3_5_moe_text",
            "olmoe",
            "flex_olmo",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "dots1",
            "glm4_moe",
            "glm4_moe_lite",
            "glm4v_moe",
            "glm_moe_dsa",
            "hunyuan_v1_moe",
            "longcat_flash",
            "afmoe",
            "solar_open",
            "cohere2_moe",
            "mimo_v2_flash",
            "flint",
            "mellum",
            "dots3_note_text",
        ),
        inner=_PLAIN,
    ),
    Table(("mimo_v2_flash",), inner=(_moved("self_attn.sinks", "self_attn.attention_sink_bias"),)),
    Table(("flint",), inner=(_moved("self_attn.sinks", "self_attn.softmax_offset"),)),
    Table(
        ("ernie4_5_moe",),
        inner=(
            *_PLAIN,
            _moved("mlp.gate.moe_statics.e_score_correction_bias", "mlp.moe_statics.e_score_correction_bias"),
        ),
    ),
    Table(
        ("exaone_moe",),
        inner=(*_PLAIN, _moved("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias")),
    ),
    Table(
        ("mixtral", "minimax"),
        inner=(*_W123, _moved("mlp.gate.weight", "block_sparse_moe.gate.weight")),
    ),
    Table(
        ("minimax_m2",),
        inner=(
            *_W123,
            _moved("mlp.gate.weight", "block_sparse_moe.gate.weight"),
            _moved("mlp.e_score_correction_bias", "block_sparse_moe.e_score_correction_bias"),
        ),
    ),
    Table(
        ("phimoe",),
        inner=(*_W123, _moved("mlp.router.weight", "block_sparse_moe.gate.weight")),
    ),
    Table(("jamba",), inner=_experts("feed_forward")),
    Table(("lfm2_moe",), inner=_experts("feed_forward", ("w1", "w3", "w2"))),
    Table(
        ("granitemoe", "granitemoeshared", "granitemoehybrid"),
        inner=(
            _moved("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.input_linear.weight"),
            _moved("block_sparse_moe.experts.down_proj", "block_sparse_moe.output_linear.weight"),
            _moved("block_sparse_moe.router.weight", "block_sparse_moe.router.layer.weight"),
        ),
    ),
    Table(
        ("nemotron_h",),
        inner=_experts("mixer", ("up_proj", "down_proj")),
        outer=(Row("model.{rest}", "backbone.{rest}"),),
    ),
    Table(
        ("aria", "aria_text"),
        inner=(
            _moved("mlp.experts.gate_up_proj", "mlp.experts.fc1.weight"),
            _moved("mlp.experts.down_proj", "mlp.experts.fc2.weight"),
        ),
    ),
    Table(("gpt_neox",), outer=(Row("lm_head.{rest}", "embed_out.{rest}"),)),
    Table(("qwen2_vl", "qwen2_5_vl"), outer=_QWEN_VL),
    Table(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), outer=_OMNI),
    Table(_WITH_TOWER, outer=_LLAVA),
    Table(
        ("qwen2_audio", "voxtral", "audioflamingo3"),
        outer=(*_LLAVA_TEXT, *_under_model("audio_tower", "multi_modal_projector")),
    ),
    Table(("granite_speech",), outer=(*_LLAVA_TEXT, *_under_model("encoder", "projector"))),
    Table(("fuyu",), outer=(*_LLAVA_TEXT, *_under_model("vision_embed_tokens"))),
    Table(("mllama",), outer=(*_LLAVA_TEXT, *_under_model("vision_model", "multi_modal_projector"))),
    Table(
        ("emu3",),
        outer=(
            Row("model.text_model.{rest}", "text_model.model.{rest}"),
            Row("lm_head.{rest}", "text_model.lm_head.{rest}"),
            *_under_model("vqmodel"),
        ),
    ),
    Table(
        ("paddleocr_vl",),
        outer=(
            Row("model.language_model.{rest}", "model.{rest}"),
            Row("model.projector.{rest}", "mlp_AR.{rest}"),
            *_under_model("visual"),
        ),
    ),
)

_NOT_COVERED = """
axk1 axk2 bailing_hybrid cosmos3_edge cosmos3_omni deepseek_ocr2 deepseek_v4 dots3_note ernie4_5_vl_moe gemma4_unified
glm5_next glm5_next_text gte hrm_text hunyuan_vl hy_v3 hy_v4 hyperclovax_vision_v2 inkling2 inkling2_text
inkling_mm_model jina_embeddings_v3 kimi_k25 kimi_linear kolibri1 laguna lfm3_vl minimax_m3_vl mistral_large4
mistral_large4_text molmo2 nemo_speechlm nemotron_h_omni nomic_bert olmo_hybrid pi0 qianfan_ocr qwen2_5_omni
qwen3_omni_moe qwen4_exp shieldgemma2 step3p7 t5gemma2 unlimited_ocr
"""
NOT_COVERED = frozenset(_NOT_COVERED.split())
"""Language models that transformers 5.23 renames in ways for which there is no table here."""

_SAME_ON_HUB = """
cohere2_vision deepseek_vl deepseek_vl_hybrid exaone4_5 florence2 gemma3n gemma4 glm46v glm4v glm4v_moe glm_ocr glmga
idefics2 idefics3 janus lfm2_vl lighton_ocr llama4 minicpmv4_6 minicpmv4_7 minicpm_ocr muse_glimmer muse_spark ovis2
qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe smolvlm video_llama_3
"""
SAME_ON_HUB = frozenset(_SAME_ON_HUB.split())
"""Composed models whose parts have one name in the module and on the hub."""


def to_hub(checkpoint: Checkpoint, config: Config | None) -> Checkpoint:
    """The checkpoint under the names that the hub uses, with a notice of what was renamed and split.

    Tensors are views, in the order in which transformers writes them. A checkpoint that has the hub's names already
    comes back as it is. Model types without a table keep their names; a notice says so where that matters. Raises
    Mismatch when fused experts have no shape of fused experts, or when two tensors would get one name.
    """
    inner, outer = rows(config)
    tensors, changed, split = _renamed(checkpoint, inner, outer)
    notices = []
    if changed or split:
        notices.append(_counted(_model_type(config), changed, split))
    if _model_type(config) in packing.TURNED_ON_HUB:
        tensors, said = packing.turned(tensors)
        notices += said
    notices += _left(tensors, config, inner, outer)
    if not notices:
        return checkpoint
    return replace(checkpoint, tensors=tensors, paths={}, notices=(*checkpoint.notices, *notices))


def to_modules(checkpoint: Checkpoint, config: Config | None) -> Checkpoint:
    """The inverse: hub names as module names, experts fused. Raises Incomplete when an expert is missing."""
    inner, outer = rows(config)
    tensors = joined(joined(checkpoint.tensors, outer, {}), inner, {})
    if _model_type(config) in packing.TURNED_ON_HUB:
        tensors, _ = packing.turned(tensors, to_hub=False)
    return replace(checkpoint, tensors=tensors, paths={})


def rows(config: Config | None) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """The rows for a model: inner ones by its type and its text part's, outer ones by its type."""
    if config is None:
        return (), ()
    types = {_model_type(config), *(_model_type(config.get(k)) for k in ("text_config", "llm_config"))}
    inner = dict.fromkeys(row for table in TABLES if types & set(table.model_types) for row in table.inner)
    outer = dict.fromkeys(r for table in TABLES if _model_type(config) in table.model_types for r in table.outer)
    if _model_type(config) in _WITH_TOWER:
        nested = _model_type(config.get("vision_config")) in _NESTED_TOWERS
        outer |= dict.fromkeys(_IN_MODEL if nested else _TOWERS)
    return tuple(inner), tuple(outer)


def _model_type(config: Any) -> str:
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    return kind if isinstance(kind, str) else ""


def _renamed(
    checkpoint: Checkpoint, inner: Iterable[Row], outer: Iterable[Row]
) -> tuple[dict[str, Tensor], list[tuple[str, str]], list[tuple[str, int]]]:
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    changed, split = [], []
    in_order = sorted(checkpoint.tensors, key=natural) if (inner or outer) else checkpoint.tensors
    for fqn in in_order:
        parts = _split(fqn, checkpoint.tensors[fqn], inner, outer)
        if len(parts) > 1:
            split.append((fqn, len(parts)))
        elif fqn not in parts:
            changed.append((fqn, next(iter(parts))))
        for name, tensor in parts.items():
            if name in tensors:
                raise Mismatch(f"{checkpoint.origin.path}: {origin[name]} and {fqn} are both {name} on the hub")
            tensors[name], origin[name] = tensor, fqn
    if not changed and not split:
        return dict(checkpoint.tensors), [], []
    return tensors, changed, split


def _split(fqn: str, tensor: Tensor, inner: Iterable[Row], outer: Iterable[Row]) -> dict[str, Tensor]:
    found = by_name(fqn, inner)
    parts = {fqn: tensor} if found is None else split(tensor, *found, {})
    return {_outer_name(name, outer): part for name, part in parts.items()}


def _outer_name(fqn: str, outer: Iterable[Row]) -> str:
    found = by_name(fqn, outer)
    return fqn if found is None else found[0].hub_names(found[1])[0]


def _counted(model_type: str, changed: list[tuple[str, str]], split: list[tuple[str, int]]) -> str:
    said = []
    if changed:
        said.append(f"{len(changed)} renamed (such as {changed[0][0]} -> {changed[0][1]})")
    if split:
        parts = sum(n for _, n in split)
        said.append(f"{len(split)} fused tensors split into {parts} of single experts (such as {split[0][0]})")
    return f"module names of transformers 5 to the hub's names of {model_type}: {', '.join(said)}"


def _left(
    tensors: Mapping[str, Tensor], config: Config | None, inner: tuple[Row, ...], outer: tuple[Row, ...]
) -> list[str]:
    """What may still have names that only transformers 5 knows."""
    model_type = _model_type(config)
    if model_type in NOT_COVERED:
        known = f"transformers 5 renames weights of {model_type}, for which there is no table here"
        return [f"{known}: names are written as they are, and other loaders may not know them"]
    notices = []
    kind = f"model type {model_type}" if model_type else "a model without a config"
    types = {model_type, _model_type((config or {}).get("text_config"))}
    fused = [] if types & packing.PACKED_ON_HUB else [fqn for fqn, t in tensors.items() if packing.is_packed(fqn, t)]
    if fused:
        notices.append(f"fused experts are kept, as there is no table for {kind}: {listed(fused, 3)}")
    if not outer and model_type not in SAME_ON_HUB and any(fqn.startswith("model.language_model.") for fqn in tensors):
        notices.append(f"names under model.language_model. are kept, as there is no table for {kind}")
    if any(row.name.startswith("model.") for row in outer):
        hub = [pattern(name) for row in outer for name in row.hubs]
        strange = [fqn for fqn in tensors if not any(p.fullmatch(fqn) for p in hub) and fqn != "lm_head.weight"]
        if strange:
            notices.append(
                f"names that are neither module nor hub names of {model_type} are kept: {listed(strange, 3)}"
            )
    return notices
