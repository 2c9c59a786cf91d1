"""config.json held against the tensors: what training or the trainer changed is set right, and said."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from reshard.core.checkpoint import Checkpoint
from reshard.core.dtypes import DType, dtype
from reshard.core.tensor import Tensor
from reshard.dialects.shapes import parameter_shapes
from reshard.errors import Incomplete, InputError, Mismatch, Unsupported, listed
from reshard.ops import tie

_DTYPE_KEYS = ("dtype", "torch_dtype")
"""transformers 5 writes the first, transformers 4 the second."""
_WEIGHTS = ("F16", "BF16", "F32", "F64")
"""Types that a config may name; 8-bit weights are described by `quantization_config`."""
_HEAD = re.compile(r"(?:^|\.)(?:\w*head|embed_out|proj_out|output_projection|output)\.")
"""In the FQN of anything that may be an output layer, whatever a family calls it."""
_EXTRA_ROWS = {"mllama": 8, "mllama_text_model": 8, "moshi": 1}
"""Rows of the embeddings beyond `vocab_size`, by model type: tokens that are read and never written."""
_WITH_HEAD = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


def reconcile(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, headless: bool = False
) -> tuple[Mapping[str, Any], list[str]]:
    """The config as it has to be for these tensors, and a sentence for each change.

    `tensors` are those that will be written. The very same object comes back when nothing has to change. Raises
    Mismatch when the model has a head of its own by its config and the tensors lack it, unless it is `headless`.
    """
    changes: list[str] = []
    result = _architectures(config, changes)
    result = _dtypes(result, tensors, changes)
    result = result if headless else _tied(result, tensors, changes)
    result = _vocabulary(result, tensors, changes)
    return (result, changes) if changes else (config, [])


def _architectures(config: Mapping[str, Any], changes: list[str]) -> Mapping[str, Any]:
    names = config.get("architectures")
    if not isinstance(names, list):
        return config
    plain = [_without_wrapper(name) for name in names]
    if plain == names:
        return config
    changes.append(f"architectures: {names} -> {plain}: FSDP had renamed the class")
    return {**config, "architectures": plain}


def _without_wrapper(name: Any) -> Any:
    """`FSDPLlamaForCausalLM`, as `fully_shard` calls the class, as `LlamaForCausalLM`."""
    if not isinstance(name, str):
        return name
    short = name.removeprefix("FSDP")
    return short if short[:1].isupper() else name


def _dtypes(config: Mapping[str, Any], tensors: Mapping[str, Tensor], changes: list[str]) -> Mapping[str, Any]:
    held: Counter[DType] = Counter()
    for tensor in tensors.values():
        if tensor.dtype.name in _WEIGHTS:
            held[tensor.dtype] += tensor.size
    if not held or "quantization_config" in config:
        return config
    return _with_dtype(config, held.most_common(1)[0][0], held, "", changes)


def _with_dtype(
    config: Mapping[str, Any], wanted: DType, held: Counter[DType], path: str, changes: list[str]
) -> Mapping[str, Any]:
    result = dict(config)
    for key, value in config.items():
        if key in _DTYPE_KEYS and isinstance(value, str) and _is_stale(value, wanted, held, nested=bool(path)):
            result[key] = wanted.torch
            changes.append(f"{path}{key}: {value} -> {wanted.torch}: what the weights are")
        elif key.endswith("_config") and isinstance(value, Mapping):
            result[key] = _with_dtype(value, wanted, held, f"{path}{key}.", changes)
    return result


def _is_stale(name: str, wanted: DType, held: Counter[DType], nested: bool) -> bool:
    """The whole is called by the dtype of most weights; a part only has to name one that there is."""
    try:
        said = dtype(name)
    except Unsupported:
        return False
    return said is not wanted and not (nested and held[said])


def _tied(config: Mapping[str, Any], tensors: Mapping[str, Tensor], changes: list[str]) -> Mapping[str, Any]:
    source = tie.embeddings(tensors)
    if source is None or any(_HEAD.search(fqn) for fqn in tensors) or not _has_head(config):
        return config
    said = tie.says_tied(config)
    if said is False:
        raise Mismatch(
            f"the config says tie_word_embeddings: false, and of the head and the embeddings only {source} is there:"
            " transformers would fill the head with random numbers",
            hint="if the model was trained with tied weights, set tie_word_embeddings to true in the config;"
            " otherwise the checkpoint is incomplete",
        )
    if said is None:
        changes.append(f"tie_word_embeddings: true was added: there is {source} and no head of its own")
        return {**config, "tie_word_embeddings": True}
    if "tie_word_embeddings" not in config and "text_config" in config:
        changes.append("tie_word_embeddings: true was added beside text_config, where transformers 5 looks for it")
        return {**config, "tie_word_embeddings": True}
    return config


def _has_head(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures")
    return isinstance(names, list) and any(isinstance(n, str) and n.endswith(_WITH_HEAD) for n in names)


def _vocabulary(config: Mapping[str, Any], tensors: Mapping[str, Tensor], changes: list[str]) -> Mapping[str, Any]:
    source = tie.embeddings(tensors)
    if source is None or len(tensors[source].shape) != 2:
        return config
    rows = tensors[source].shape[0]
    heads = {tensors[head].shape[0] for head in tie.HEADS if head in tensors and tensors[head].shape}
    result = dict(config)
    if (
        ".decoder." in source and config.get("decoder_vocab_size") is not None
    ):  # Marian's; `vocab_size` is the encoder's
        return config
    for path, part in (("", config), ("text_config.", config.get("text_config"))):
        if isinstance(part, Mapping) and isinstance(part.get("vocab_size"), int) and part["vocab_size"] != rows:
            if part["vocab_size"] + _EXTRA_ROWS.get(str(part.get("model_type")), 0) == rows:
                continue
            if heads - {rows} or rows < part["vocab_size"]:
                raise Mismatch(
                    f"{path}vocab_size is {part['vocab_size']} in config.json, {source} has {rows} rows"
                    + "".join(f", the head {n}" for n in sorted(heads - {rows})),
                    hint="either rows are lost, or the config belongs to another model: check both",
                )
            changes.append(f"{path}vocab_size: {part['vocab_size']} -> {rows}: the rows of {source}")
            if path:
                result["text_config"] = {**part, "vocab_size": rows}
            else:
                result["vocab_size"] = rows
    return result if changes else config


def check_complete(config: Mapping[str, Any], checkpoint: Checkpoint, hint: str | None = None) -> None:
    """Hold the tensors against what the config implies, for the families whose shapes are known from it.

    Raises Incomplete for parameters that are missing, which a loader would initialise anew, and Mismatch for shapes of
    another model; `hint` says what does about the former. The rows of embeddings and head, which training may change,
    are `reconcile`'s.
    """
    try:
        shapes = parameter_shapes(config)
    except InputError:
        return
    tensors, where = checkpoint.tensors, checkpoint.origin.path
    held = [fqn for fqn in shapes if fqn in tensors]
    if 2 * len(held) < len(tensors):
        return  # an adapter, a part, or a model under names of its own
    resized = {tie.embeddings(tensors), *tie.HEADS}
    wrong = [fqn for fqn in held if fqn not in resized and tensors[fqn].shape != shapes[fqn]]
    if wrong:
        shown = listed((f"{f} is {list(tensors[f].shape)}, not {list(shapes[f])}" for f in wrong), 5)
        raise Mismatch(
            f"{where}: {len(wrong)} tensors have not the shapes that config.json implies: {shown}",
            hint="either shards are missing, or the config belongs to another model: check both",
        )
    missing = [f for f in shapes if f not in tensors and f not in tie.HEADS and not _ALTERNATIVE.search(f)]
    if missing:
        raise Incomplete(
            f"{where}: {len(missing)} parameters that config.json implies are missing: {listed(missing)}",
            hint=hint,
        )


_ALTERNATIVE = re.compile(r"\.(block_sparse_moe|experts|mlp\.gate)\b")
"""Names that have several spellings, of which a model has one."""
