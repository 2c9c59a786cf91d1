"""Values that NeMo 1.0 or its launcher understood, and that mean nothing or something else in NeMo 2.0."""

from __future__ import annotations

import math
from typing import Any

from reshard.ops.migrate.row import number

_SIZES = frozenset((
    "strategy.tensor_model_parallel_size", "strategy.pipeline_model_parallel_size", "strategy.context_parallel_size",
    "strategy.expert_model_parallel_size", "strategy.expert_tensor_parallel_size", "trainer.num_nodes",
    "trainer.accumulate_grad_batches", "data.micro_batch_size", "data.global_batch_size", "data.seq_length",
    "config.num_layers", "config.hidden_size", "config.num_attention_heads", "config.num_query_groups",
    "config.ffn_hidden_size", "config.kv_channels", "config.num_moe_experts", "config.seq_length",
))  # fmt: skip
"""Places of what there is one of, or more."""
_NEEDED = frozenset(("data.seq_length", "data.micro_batch_size", "data.global_batch_size", "optimizer.lr"))
"""Places where NeMo 2 takes no None, though it has no value of its own that would do."""


def remark(place: str | None, value: Any) -> str:
    """What to look at where a value goes to `section.argument`; empty for values that go as they are."""
    if not _is_finite(value):
        return "not a finite number: is it meant?"
    if place == "trainer.devices" and value in (-1, "-1", "auto"):
        return "all GPUs that are visible; the launcher has to start as many processes: write the number"
    if place == "trainer.max_steps" and number(value) and value < 1:
        return "no limit; PreTrainingDataModule makes as many samples as the steps need: write the number"
    if place in _SIZES and number(value) and value < 1:
        return "a size begins at 1"
    if place in _NEEDED and value is None:
        return "null, where NeMo 2 needs a value"
    return ""


def _is_finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
