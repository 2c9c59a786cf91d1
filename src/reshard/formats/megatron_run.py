"""What Megatron-LM and Megatron Bridge keep around a checkpoint, whatever its format: the files to be written.

`megatron_directory.py` finds them again.

    RUN/latest_checkpointed_iteration.txt   the iteration as text, or `release`; Megatron-LM's way to the newest
    RUN/latest_train_state.pt               Bridge's way, copied from the iteration's directory
    RUN/iter_0000010/ or RUN/release/       the checkpoint
        train_state.pt                      eight counters as 0-d tensors
        run_config.yaml                     Bridge's whole configuration
        tokenizer/                          its files

Source: Megatron-LM `training/checkpointing.py`, core_v0.19.0; Megatron Bridge `training/checkpointing.py` and
`training/state.py`, 2026-08.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Literal as OneOf
from typing import TypeAlias

from reshard.core.dtypes import dtype
from reshard.core.tensor import Literal, Tensor
from reshard.formats.megatron_directory import TRACKER
from reshard.formats.torch_archive import file_of, of_value, segments
from reshard.storage.plan import FilePlan, Segment

LATEST_TRAIN_STATE = "latest_train_state.pt"
TRAIN_STATE = "train_state.pt"
RUN_CONFIG = "run_config.yaml"
TOKENIZER = "tokenizer"
RELEASE: OneOf["release"] = "release"

Iteration: TypeAlias = int | OneOf["release"]
"""Of training; `release` for weights that a run starts from, which Megatron-LM loads without any flag."""


def checkpoint_directory(iteration: Iteration) -> str:
    """Where a run directory keeps the checkpoint of an iteration."""
    return RELEASE if iteration == RELEASE else f"iter_{iteration:07d}"


def plan_run(
    iteration: Iteration,
    *,
    has_train_state: bool,
    run_config: str | None = None,
    tokenizer: Mapping[str, Tensor] | None = None,
) -> Iterator[FilePlan]:
    """All files of a run directory but the checkpoint's own.

    Args:
        has_train_state: Whether Bridge finds its counters; without them it takes the tracker, but no iteration 0.
        run_config: The text of Bridge's YAML file.
        tokenizer: Files to be carried byte for byte, by name, as U8 tensors.
    """
    directory = checkpoint_directory(iteration)
    yield FilePlan(TRACKER, (Segment(str(iteration).encode()),))
    if has_train_state and iteration != RELEASE:
        state = train_state(iteration)
        yield file_of(f"{directory}/{TRAIN_STATE}", state)
        # a copy: its archive bears the name of the original
        copied = segments(of_value(state, TRAIN_STATE.removesuffix(".pt")), LATEST_TRAIN_STATE)
        yield FilePlan(LATEST_TRAIN_STATE, tuple(copied), crc32=True)
    if run_config is not None:
        yield FilePlan(f"{directory}/{RUN_CONFIG}", (Segment(run_config.encode()),))
    for name, data in sorted((tokenizer or {}).items()):
        yield FilePlan(f"{directory}/{TOKENIZER}/{name}", (Segment(data),))


def train_state(step: int) -> dict[str, Tensor]:
    """Bridge's counters of a run that has seen no data yet."""
    return {
        "step": _scalar("int64", struct.pack("<q", step)),
        "consumed_train_samples": _scalar("int64", bytes(8)),
        "skipped_train_samples": _scalar("int64", bytes(8)),
        "consumed_valid_samples": _scalar("int64", bytes(8)),
        "floating_point_operations_so_far": _scalar("float32", bytes(4)),
        "do_train": _scalar("bool", b"\0"),
        "do_valid": _scalar("bool", b"\0"),
        "do_test": _scalar("bool", b"\0"),
    }


def _scalar(kind: str, data: bytes) -> Tensor:
    return Literal(dtype(kind), (), data)
