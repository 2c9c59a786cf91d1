"""torchtitan's own parameter names, and the names of the same weights on the hub.

torchtitan builds its models itself and checkpoints them under its own names. Only elements move on the way to the hub:

    torchtitan  layers.0.attention.qkv_linear.wq.weight                        (heads * head_dim, D)
    hub         model.layers.0.self_attn.q_proj.weight                         in llama the rows of a head reordered
    torchtitan  layers.0.moe.routed_experts.inner_experts.w1_EFD               (E, F, D)
    hub         model.layers.0.mlp.experts.{0..E-1}.gate_proj.weight           (F, D) each

llama3 turns neighbouring pairs of rows of a head (rotary embeddings on complex numbers), transformers' llama turns row
i with row i + head_dim / 2, so the even rows of each head come first on the hub. In the other models the order is one.

Source: torchtitan, `torchtitan/models/*/state_dict_adapter.py` and the modules of the models, at b5bcd76 (August 2026);
llama4 at the parent of d92336f, which removed it; the spellings of older releases at v0.2.0 and v0.2.2. Known there and
set right here: gpt_oss is written under the names of mxfp4 blocks, untransposed, and its experts no longer match.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain

from reshard.core.checkpoint import Checkpoint
from reshard.core.tensor import Tensor
from reshard.dialects import match
from reshard.dialects.fuse import QKV, SAME, Beside, Chained, Dropped, Fuse, Rotary, Sizes, Transposed
from reshard.dialects.match import by_name, joined, natural
from reshard.dialects.table import Config, Row
from reshard.errors import Mismatch, Unsupported, listed

# -------------------------------------------------------------------------------------------------------- the tables

_EXPERTS = "moe.routed_experts.inner_experts"
_QKV = "attention.qkv_linear"


def _moved(module: str, hub: str) -> Row:
    return Row(f"layers.{{layer}}.{module}", f"model.layers.{{layer}}.{hub}")


def _feed_forward(module: str, hub: str) -> tuple[Row, ...]:
    names = (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
    return tuple(_moved(f"{module}.{ours}.weight", f"{hub}.{theirs}.weight") for ours, theirs in names)


def _experts_apart() -> tuple[Row, ...]:
    names = (("w1_EFD", "gate_proj"), ("w3_EFD", "up_proj"), ("w2_EDF", "down_proj"))
    hub = "model.layers.{layer}.mlp.experts.{expert}."
    return tuple(Row(f"layers.{{layer}}.{_EXPERTS}.{ours}", f"{hub}{theirs}.weight") for ours, theirs in names)


_PLAIN: tuple[Fuse, ...] = (SAME, SAME, SAME)
_ROTARY: tuple[Fuse, ...] = (Rotary("heads"), Rotary("groups"), SAME)
"""Of queries, keys and values."""


def _attention(kinds: tuple[str, ...] = ("weight",), rotary: bool = False) -> tuple[Row, ...]:
    """Queries, keys and values, each for itself or fused as between April and June 2026."""
    fuses = _ROTARY if rotary else _PLAIN
    rows: list[Row] = []
    for kind in kinds:
        at = f"layers.{{layer}}.{_QKV}"
        hub = tuple(f"model.layers.{{layer}}.self_attn.{part}_proj.{kind}" for part in "qkv")
        rows += [Row(f"{at}.w{part}.{kind}", name, fuse) for part, name, fuse in zip("qkv", hub, fuses, strict=True)]
        rows.append(Row(f"{at}.wqkv.{kind}", hub, Chained(QKV, fuses) if rotary else QKV, variant=True))
        rows.append(_moved(f"attention.wo.{kind}", f"self_attn.o_proj.{kind}"))
    return tuple(rows)


_MODEL: tuple[Row, ...] = (
    Row("tok_embeddings.weight", "model.embed_tokens.weight"),
    Row("norm.weight", "model.norm.weight"),
    Row("lm_head.weight", "lm_head.weight"),
    _moved("attention_norm.weight", "input_layernorm.weight"),
    _moved("ffn_norm.weight", "post_attention_layernorm.weight"),
)
_HEAD_NORMS = tuple(_moved(f"attention.{part}_norm.weight", f"self_attn.{part}_norm.weight") for part in "qk")
_LATENT = (
    _moved("attention.wq.weight", "self_attn.q_proj.weight"),
    _moved("attention.wq_a.weight", "self_attn.q_a_proj.weight"),
    _moved("attention.q_norm.weight", "self_attn.q_a_layernorm.weight"),
    _moved("attention.wq_b.weight", "self_attn.q_b_proj.weight"),
    _moved("attention.wkv_a.weight", "self_attn.kv_a_proj_with_mqa.weight"),
    _moved("attention.kv_norm.weight", "self_attn.kv_a_layernorm.weight"),
    _moved("attention.wkv_b.weight", "self_attn.kv_b_proj.weight"),
    _moved("attention.wo.weight", "self_attn.o_proj.weight"),
)
_NEXT_TOKENS = (
    _moved("enorm.weight", "enorm.weight"),
    _moved("hnorm.weight", "hnorm.weight"),
    _moved("eh_proj.weight", "eh_proj.weight"),
    _moved("mtp_norm.weight", "shared_head.norm.weight"),
)
_ROUTER = _moved("moe.router.gate.weight", "mlp.gate.weight")
_BIAS = "layers.{layer}.moe.expert_bias_E"
_LEFT = tuple(Row(name, (), Dropped()) for name in (_BIAS, "layers.{layer}.moe.tokens_per_expert_E"))
"""Of load balancing without a loss: a bias of the router, which steers training, and a counter."""


def _llama(config: Config) -> tuple[Row, ...]:
    return *_MODEL, *_attention(rotary=True), *_feed_forward("feed_forward", "mlp")


def _qwen3(config: Config) -> tuple[Row, ...]:
    experts = (*_experts_apart(), _ROUTER, *_LEFT) if config.get("model_type") == "qwen3_moe" else ()
    return *_MODEL, *_attention(), *_HEAD_NORMS, *_feed_forward("feed_forward", "mlp"), *experts


def _deepseek_v3(config: Config) -> tuple[Row, ...]:
    if config.get("rope_interleave") is False:
        raise Mismatch(
            "the config says rope_interleave: false, torchtitan's deepseek_v3 pairs neighbouring rows",
            hint="the config belongs to another model: --base names the one that was trained",
        )
    bias = _moved("moe.expert_bias_E", "mlp.gate.e_score_correction_bias")
    return (
        *_MODEL, *_LATENT, *_feed_forward("feed_forward", "mlp"), *_experts_apart(), _ROUTER, bias, *_LEFT[1:],
        *_feed_forward("moe.shared_experts", "mlp.shared_experts"), *_NEXT_TOKENS,
    )  # fmt: skip


def _gpt_oss(config: Config) -> tuple[Row, ...]:
    experts = f"layers.{{layer}}.{_EXPERTS}"
    hub = "model.layers.{layer}.mlp.experts"
    return (
        *_MODEL, *_attention(("weight", "bias")), _moved("attention.sinks", "self_attn.sinks"), *_LEFT,
        _moved("moe.router.gate.weight", "mlp.router.weight"), _moved("moe.router.gate.bias", "mlp.router.bias"),
        Row(f"{experts}.mlp1_weight_EGD", f"{hub}.gate_up_proj", Transposed()),
        Row(f"{experts}.mlp2_weight_EDF", f"{hub}.down_proj", Transposed()),
        Row(f"{experts}.mlp1_bias_EG", f"{hub}.gate_up_proj_bias"),
        Row(f"{experts}.mlp2_bias_ED", f"{hub}.down_proj_bias"),
    )  # fmt: skip


def _llama4(config: Config) -> tuple[Row, ...]:
    experts = f"layers.{{layer}}.{_EXPERTS}"
    hub = "model.layers.{layer}.feed_forward.experts"
    return (
        *_MODEL, *_attention(), *_feed_forward("feed_forward", "feed_forward"), *_LEFT,
        _moved("moe.router.gate.weight", "feed_forward.router.weight"),
        *_feed_forward("moe.shared_experts", "feed_forward.shared_expert"),
        Row(f"{experts}.w1_EFD", f"{hub}.gate_proj", Transposed()),
        Row(f"{experts}.w3_EFD", f"{hub}.up_proj", Transposed()),
        Row(f"{experts}.w2_EDF", f"{hub}.down_proj", Transposed()),
    )  # fmt: skip


_LLAMA4_EXPERTS = "{path}layers.{layer}.feed_forward.experts"
_LLAMA4_FUSED: tuple[Row, ...] = (
    Row(f"{_LLAMA4_EXPERTS}.gate_up_proj", tuple(f"{_LLAMA4_EXPERTS}.{x}_proj" for x in ("gate", "up")), Beside(2)),
)
"""Gate and up of all experts are one tensor on the hub: this row is joined on the way to it, split on the way back."""

TABLES: Mapping[str, Callable[[Config], tuple[Row, ...]]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "llama4": _llama4,
    "llama4_text": _llama4,
}
"""Rows by the model type of the config."""

_OLDER = (
    (re.compile(r"\.attention\.qkv_linear\.(?=w[qkv]\.)"), ".attention."),
    (re.compile(r"\.routed_experts\.inner_experts\."), ".experts."),
    (re.compile(r"(?<=[a-z0-9])_[A-Z]+$"), ""),
    (re.compile(r"^lm_head\."), "output."),
)
"""What older releases wrote otherwise, each at a time of its own."""


def rows(config: Config) -> tuple[Row, ...]:
    """The rows for a model, those of older releases last. Raises Unsupported for models without a table."""
    model_type = _model_type(config)
    if model_type not in TABLES:
        raise Unsupported(
            f"the names are torchtitan's, and no table leads to the hub's of {model_type or 'a config without a type'}",
            hint=f"known: {listed(sorted(TABLES))}; --keep-names writes the names as they are",
        )
    newest = TABLES[model_type](config)
    if model_type == "llama4":
        newest = tuple(replace(row, hub=tuple(f"language_model.{name}" for name in row.hubs)) for row in newest)
    return (*newest, *chain.from_iterable(_older(row) for row in newest))


def _older(row: Row) -> Iterator[Row]:
    spellings = [row.name]
    for newer, older in _OLDER:
        spellings += [newer.sub(older, name) for name in spellings if newer.search(name)]
    for spelling in spellings[1:]:
        yield replace(row, name=spelling, variant=True)


def _model_type(config: Config) -> str:
    return str(config.get("model_type") or "")


def _size(config: Config, name: str) -> int:
    text = config.get("text_config")
    value = (text if isinstance(text, Mapping) else config).get(name)
    if not isinstance(value, int) or value <= 0:
        raise Mismatch(f"the config of this {_model_type(config)} model lacks {name}, which torchtitan's names need")
    return value


def _sizes(config: Config) -> Sizes:
    """What the fuses of attention ask for."""
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    heads = _size(config, "num_attention_heads")
    groups = _size(config, "num_key_value_heads") if text.get("num_key_value_heads") is not None else heads
    has_head_dim = text.get("head_dim") is not None
    head_dim = _size(config, "head_dim") if has_head_dim else _size(config, "hidden_size") // heads
    return {"heads": heads, "groups": groups, "head_dim": head_dim}


# --------------------------------------------------------------------------------------------------------- both ways

_LAYER = re.compile(
    r"(?:mtp_)?layers\.\d+\."
    r"(?:attention\.(?:qkv_linear\.)?w\w+\.\w+|attention_norm\.weight|ffn_norm\.weight|feed_forward\.w[123]\.\w+|moe\..+)"
)
_ENDS = frozenset(("tok_embeddings.weight", "norm.weight", "lm_head.weight", "output.weight"))


def is_torchtitan(fqns: Iterable[str]) -> bool:
    """Whether these are torchtitan's names: of a whole model, or of a part of one."""
    fqns = set(fqns)
    return any(_LAYER.fullmatch(fqn) for fqn in fqns) or ("tok_embeddings.weight" in fqns and fqns <= _ENDS)


def to_hub(checkpoint: Checkpoint, config: Config | None) -> Checkpoint:
    """The checkpoint under the names that the hub uses, with a notice of what was renamed, permuted, split, left out.

    A checkpoint under other names than torchtitan's comes back as it is; without a config torchtitan's names stay, and
    a notice says what would bring the hub's. The config loses `quantization_config` where the weights are not
    quantized: a base model's speaks of the base model's files. Raises Unsupported for models without a table, Mismatch
    for names or shapes that do not fit the config.
    """
    if not is_torchtitan(checkpoint):
        return checkpoint
    if config is None:
        said = "names are torchtitan's own, and so written: --base DIR_OR_HUB_ID names the model on the hub it is"
        return replace(checkpoint, notices=(*checkpoint.notices, said))
    table = rows(config)
    _check_known(checkpoint, table, config)
    _check_experts(checkpoint, config)
    tensors, notices = _split(checkpoint, table, config)
    tensors = joined(tensors, _LLAMA4_FUSED, {})
    tensors = {fqn: tensors[fqn] for fqn in sorted(tensors, key=natural)}
    config, changes = _as_trained(config, tensors)
    return replace(
        checkpoint, tensors=tensors, paths={}, config=config, notices=(*checkpoint.notices, *notices, *changes)
    )


def from_hub(checkpoint: Checkpoint, config: Config) -> Checkpoint:
    """The inverse: hub names as the newest torchtitan writes them. Raises Incomplete when an expert is missing."""
    tensors: dict[str, Tensor] = {}
    for fqn, tensor in checkpoint.tensors.items():
        found = by_name(fqn, _LLAMA4_FUSED)
        tensors |= {fqn: tensor} if found is None else match.split(tensor, *found, {})
    tensors = {_apart(fqn, config): tensor for fqn, tensor in joined(tensors, rows(config), _sizes(config)).items()}
    return replace(checkpoint, tensors=tensors, paths={})


def _check_known(checkpoint: Checkpoint, table: tuple[Row, ...], config: Config) -> None:
    unknown = [fqn for fqn in checkpoint if by_name(_numbered(fqn, config), table) is None]
    if unknown:
        raise Mismatch(
            f"{checkpoint.origin.path}: {len(unknown)} of torchtitan's names have no place in a"
            f" {_model_type(config)} model: {listed(unknown)}",
            hint="is --base the model that was trained? --exclude leaves tensors out, --keep-names keeps all names",
        )


_GROUPED = re.compile(r".*\.(?:experts|inner_experts)\.(?:(w[13]|mlp1_weight)|w2|mlp2_weight)(?:_[A-Z]+)?")


def _check_experts(checkpoint: Checkpoint, config: Config) -> None:
    """Until August 2025, before v0.2.0, experts lay (E, in, out) under the same names: only the shape tells."""
    for fqn, tensor in checkpoint.tensors.items():
        match = _GROUPED.fullmatch(fqn)
        if match is None:
            continue
        hidden, dim = _size(config, "hidden_size"), 2 if match[1] else 1
        if len(tensor.shape) != 3 or tensor.shape[dim] != hidden:
            raise Mismatch(
                f"{checkpoint.origin.path}: {fqn}: shape {list(tensor.shape)}, where dimension {dim} should be the"
                f" hidden_size of the config, {hidden}",
                hint="the config is another model's, or torchtitan was older than v0.2.0, which had (E, in, out)",
            )


def _split(checkpoint: Checkpoint, table: tuple[Row, ...], config: Config) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the hub's names, and sentences about what was done."""
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    permuted, split, left, sizes = 0, 0, [], _sizes(config)
    for fqn, tensor in checkpoint.tensors.items():
        found = by_name(_numbered(fqn, config), table)
        assert found is not None, "names that no row has were refused"
        row, at = found
        permuted += isinstance(row.fuse, Rotary | Chained)
        split += bool(row.packs) or len(row.hubs) > 1
        left += [] if row.hubs else [fqn]
        for name, part in _parts(tensor, row, at, sizes).items():
            if name in tensors:
                raise Mismatch(f"{checkpoint.origin.path}: {origin[name]} and {fqn} are both {name} on the hub")
            tensors[name], origin[name] = part, fqn
    first, to = next(((fqn, name) for name, fqn in origin.items() if fqn != name), ("", ""))
    renamed = len(checkpoint) - len(left)
    said = [f"torchtitan's names to the hub's of {_model_type(config)}: {renamed} tensors (such as {first} -> {to})"]
    if permuted:
        said.append(f"rows of queries and keys reordered for transformers' rotary embeddings in {permuted} tensors")
    if split:
        said.append(f"{split} fused tensors split")
    notices = [", ".join(said)]
    if left:
        notices.append(
            f"left out, as {_model_type(config)} has no place for what balanced the load of experts in training:"
            f" {listed(left, 3)}"
        )
    if config.get("vision_config") is not None:
        notices.append("torchtitan trains the text model alone: the output has no vision tower")
    return tensors, notices


def _parts(tensor: Tensor, row: Row, at: match.Numbers, sizes: Sizes) -> dict[str, Tensor]:
    try:
        return match.split(tensor, row, at, sizes)
    except Mismatch as error:
        hint = "the config belongs to another model: --base names the one that was trained"
        raise Mismatch(str(error), hint=hint) from error


def _as_trained(config: Config, tensors: Mapping[str, Tensor]) -> tuple[Config, list[str]]:
    if "quantization_config" not in config or any(tensor.dtype.itemsize < 2 for tensor in tensors.values()):
        return config, []
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return plain, ["config.json: quantization_config was taken out: the weights are not quantized"]


_PREDICTORS = re.compile(r"mtp_layers\.(\d+)\.(.+)")
_LAYERS = re.compile(r"layers\.(\d+)\.(.+)")


def _numbered(fqn: str, config: Config) -> str:
    """Layers that predict further tokens (deepseek_v3) are counted on behind the model's own, as on the hub."""
    match = _PREDICTORS.fullmatch(fqn) if _model_type(config) == "deepseek_v3" else None
    return f"layers.{_size(config, 'num_hidden_layers') + int(match[1])}.{match[2]}" if match else fqn


def _apart(fqn: str, config: Config) -> str:
    """The inverse of `_numbered`."""
    match = _LAYERS.fullmatch(fqn) if _model_type(config) == "deepseek_v3" else None
    beyond = int(match[1]) - _size(config, "num_hidden_layers") if match else -1
    return f"mtp_layers.{beyond}.{match[2]}" if match and beyond >= 0 else fqn
