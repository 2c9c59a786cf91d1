"""Megatron-FSDP's checkpoints (`fsdp_dtensor`): a plain DCP whose keys differ between releases.

    RUN/iter_0000000/.metadata, __0_0.distcp    `model.[module.]<native name>` for each tensor, layers and experts
                                                numbered; objects `checkpoint_version`, `iteration` and, for
                                                Megatron-LM, `args`
    RUN/...                                     see `megatron_run.py`

Megatron Bridge leaves what it does not find at random values and says nothing, so a directory is written for a
`Target`: one family of releases, whose names it keeps to. It has neither `common.pt` nor `metadata.json`, by which it
would be taken for `torch_dist`.

Source: Megatron-LM `training/checkpointing.py` and `core/transformer/fsdp_dtensor_checkpoint.py`, main up to 2026-08-22
and dev of 2026-04-20; Megatron Bridge 2026-04 to 2026-08.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from reshard.core.tensor import Tensor
from reshard.errors import Incomplete, Mismatch, Unsupported, listed
from reshard.formats import dcp_write
from reshard.formats.dcp_write import ByteItem, instance
from reshard.formats.megatron_run import checkpoint_directory, plan_run
from reshard.storage.plan import FilePlan
from reshard.storage.unpickle import Global


@dataclass(frozen=True, slots=True)
class Target:
    """Whose loader a directory is for."""

    name: str
    releases: str
    """Which they are, in words."""
    prefixes: tuple[str, ...]
    """In front of native names. Every tensor is written once under each."""
    mtp: tuple[str, ...]
    """What the block of a multi-token-prediction layer is called."""
    split_parts: tuple[bool, ...]
    """Whether the projections of gated delta nets are split into query, key, ...; both for readers of either kind."""
    iteration: int
    """The one that the loader takes without its optimizer."""
    has_train_state: bool
    """Whether Bridge's counters lie beside it."""
    has_args: bool
    """Whether Megatron-LM's `args` are part of it."""


_BRIDGE = "model.module."
"""What is left of the wrapping: the inner module of Megatron-FSDP stays part of the names."""
_PEELED = "model."
"""What releases leave that peel the inner module off too: Megatron-LM's dev branch, for six days in April 2026."""
_MTP_OLD, _MTP_NEW = "mtp_model_layer", "transformer_layer"

TARGETS = {
    target.name: target
    for target in (
        Target(
            "bridge",
            "Megatron Bridge with the Megatron-LM that it pins",
            (_BRIDGE,),
            (_MTP_OLD,),
            (True,),
            iteration=0,
            has_train_state=True,
            has_args=False,
        ),
        Target(
            "bridge-main",
            "Megatron Bridge with Megatron-LM main since 2026-08-20, which names the inner MTP layer anew",
            (_BRIDGE,),
            (_MTP_NEW,),
            (True,),
            iteration=0,
            has_train_state=True,
            has_args=False,
        ),
        Target(
            "megatron-lm",
            "Megatron-LM main: --load with --no-strict-fsdp-dtensor-load --no-load-rng; with gated delta nets at TP 1",
            (_BRIDGE,),
            (_MTP_NEW,),
            (False,),
            iteration=1,
            has_train_state=False,
            has_args=True,
        ),
        Target(
            "qwen3.5-recipe",
            "the published Qwen3.5 recipe: Megatron Bridge 7078f18b, Megatron-LM dev 55df4e5b, fixed for split keys",
            (_PEELED,),
            (_MTP_OLD,),
            (True,),
            iteration=0,
            has_train_state=True,
            has_args=False,
        ),
        Target(
            "any",
            "all of these: every tensor under both prefixes, at twice the size",
            (_BRIDGE, _PEELED),
            (_MTP_OLD, _MTP_NEW),
            (True, False),
            iteration=1,
            has_train_state=True,
            has_args=True,
        ),
    )
}
"""By name; the first is the default."""

DEFAULT_TARGET = TARGETS["bridge"]

ARGS = ("num_layers", "hidden_size", "num_attention_heads", "add_position_embedding")
"""What Megatron-LM compares with its own command line before it loads."""


def target_named(name: str) -> Target:
    """The target of this name. Raises Unsupported, listing all."""
    if name not in TARGETS:
        raise Unsupported(f"no target {name!r} of fsdp_dtensor", hint=f"one of {listed(TARGETS)}")
    return TARGETS[name]


def plan(
    tensors: Mapping[str, Tensor],
    *,
    target: Target = DEFAULT_TARGET,
    iteration: int | None = None,
    args: Mapping[str, Any] | None = None,
    run_config: str | None = None,
    tokenizer: Mapping[str, Tensor] | None = None,
    max_file_nbytes: int | None = None,
) -> tuple[FilePlan, ...]:
    """The files of a run directory.

    Args:
        tensors: By the names on disk, with the target's prefixes; each whole. Bridge itself keeps float32 throughout.
        iteration: The target's own by default.
        args: Plain values, those of ARGS at least, where the target has them.
        run_config: The text of Bridge's `run_config.yaml`.
        tokenizer: Files to be carried byte for byte, by name.
        max_file_nbytes: See `dcp_write.plan`.

    Raises Mismatch for names that the target does not look for, Incomplete without the `args` that it wants.
    """
    _check_names(tensors, target)
    iteration = target.iteration if iteration is None else iteration
    entries: dict[str, Tensor | ByteItem] = {
        "checkpoint_version": ByteItem(3.0),
        "iteration": ByteItem(iteration),
        **({"args": ByteItem(_namespace(args or {}, target))} if target.has_args else {}),
        **tensors,
    }
    paths = {name: ("model", name.removeprefix("model.")) for name in tensors}
    directory = checkpoint_directory(iteration)
    return (
        *dcp_write.plan(entries, directory=directory, paths=paths, max_file_nbytes=max_file_nbytes),
        *plan_run(iteration, has_train_state=target.has_train_state, run_config=run_config, tokenizer=tokenizer),
    )


def _check_names(names: Iterable[str], target: Target) -> None:
    """Names that a loader does not look for stay random in it, without a word."""
    others = [name for name in names if not any(_has(name, prefix) for prefix in target.prefixes)]
    if others:
        prefixes = " or ".join(target.prefixes)
        raise Mismatch(f"{len(others)} names do not begin with {prefixes} as {target.name} wants: {listed(others)}")


def _has(name: str, prefix: str) -> bool:
    """Whether the prefix is all that stands in front of the native name."""
    return name.startswith(prefix) and not name.removeprefix(prefix).startswith("module.")


def _namespace(args: Mapping[str, Any], target: Target) -> Any:
    missing = [name for name in ARGS if name not in args]
    if missing:
        raise Incomplete(f"{target.name} compares `args` with its command line: {listed(missing)} missing")
    whole = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    return instance(Global("argparse", "Namespace"), {**args, **whole})
