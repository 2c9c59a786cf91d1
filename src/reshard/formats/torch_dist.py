"""Megatron-Core's distributed checkpoints (`torch_dist`): a DCP and three files that Megatron wants beside it.

    RUN/iter_0000010/.metadata, __0_0.distcp    the model's tensors by unprefixed name, layers that are alike stacked;
                                                `<module>._extra_state/shard_<i>_<n>` objects, one a module and place
    RUN/iter_0000010/metadata.json              that this is `torch_dist`
    RUN/iter_0000010/common.pt                  what is not sharded, in plain values; since core_v0.19.0 it may be the
                                                object `common_state/shard_0_1` instead, which older releases refuse
    RUN/...                                     see `megatron_run.py`

A loader demands an extra state of every module of Transformer Engine, though all are empty since its release 2.5; those
of modules that it does not have it leaves alone. So the objects written are those that any release asks for.

Source: Megatron-LM `megatron/core/dist_checkpointing`, core_v0.8.0 to core_v0.19.0; Megatron Bridge 2026-08.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import Any

from reshard.core.box import Shape
from reshard.core.dtypes import dtype
from reshard.core.tensor import Literal, Tensor
from reshard.formats import dcp_write
from reshard.formats.dcp_write import ByteItem
from reshard.formats.megatron_directory import TORCH_DIST
from reshard.formats.megatron_run import RELEASE, Iteration, checkpoint_directory, plan_run
from reshard.formats.torch_archive import file_of
from reshard.storage.plan import FilePlan, Segment

CONFIG = "metadata.json"
COMMON = "common.pt"

CONFIG_JSON = {
    "sharded_backend": TORCH_DIST,
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What metadata.json holds."""
_CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
EXTRA_STATE = "._extra_state/shard_"


def plan(
    tensors: Mapping[str, Tensor],
    *,
    iteration: Iteration = 0,
    extra_states: Iterable[str] | None = None,
    run_config: str | None = None,
    tokenizer: Mapping[str, Tensor] | None = None,
    common: Mapping[str, Any] | None = None,
    max_file_nbytes: int | None = None,
) -> tuple[FilePlan, ...]:
    """The files of a run directory that Megatron-LM and Megatron Bridge load.

    Args:
        tensors: By the names on disk, each whole.
        extra_states: Keys of the objects; those that `extra_state_keys` finds by default.
        run_config: The text of Bridge's `run_config.yaml`.
        tokenizer: Files to be carried byte for byte, by name.
        common: More of what is not sharded, such as `args`. Plain values, for loaders that take nothing else.
        max_file_nbytes: See `dcp_write.plan`.
    """
    directory = checkpoint_directory(iteration)
    keys = extra_state_keys(tensors) if extra_states is None else list(extra_states)
    entries: dict[str, Tensor | ByteItem] = {**tensors, **dict.fromkeys(keys, _EXTRA_STATE)}
    return (
        *dcp_write.plan(entries, directory=directory, max_file_nbytes=max_file_nbytes),
        FilePlan(f"{directory}/{CONFIG}", (Segment(json.dumps(CONFIG_JSON).encode()),)),
        file_of(f"{directory}/{COMMON}", _common(iteration) | dict(common or {})),
        # Bridge refuses a tracker that says 0, and takes the counters instead
        *plan_run(iteration, has_train_state=iteration == 0, run_config=run_config, tokenizer=tokenizer),
    )


_EXTRA_STATE = ByteItem([Literal(dtype("uint8"), (0,), b"")])
"""As Transformer Engine 2.5 and later leave it."""


def _common(iteration: Iteration) -> dict[str, Any]:
    """Without a version, or with an older one, rows of qkv are put in another order when they are loaded."""
    step = {} if iteration == RELEASE else {"iteration": iteration}
    return {"checkpoint_version": 3.0, **step, "content_metadata": dict(_CONTENT)}


# --------------------------------------------------------------------------------------------------- extra states


_ENGINE_MODULE = re.compile(
    r"linear_\w+|in_proj|out_proj|out_norm|eh_proj|enorm|hnorm|final_norm|patch_norm|(?:\w+_)?layernorm|core_attention"
)
"""Last name of the modules that Transformer Engine makes."""

_PART = re.compile(r"(?<=\.in_proj)\.weight\.\w+")
"""Tensors of one module that are stored in parts: `in_proj.weight.query`."""

_STACK = re.compile(r"\.(?:layers|\w+_list)\.(?!\d)")
"""A list of modules that are stored as one, the list's axis first."""

_EXPERTS = ".experts.experts."


def extra_state_keys(tensors: Mapping[str, Tensor]) -> list[str]:
    """The objects that go with these tensors, a key for each module of Transformer Engine and place in its lists.

    `<module>._extra_state/shard_<i>_<n>` for place i of n; experts of stacked layers have two numbers, `0.3_4.8`. Two
    more than the newest writers leave are for loaders of other releases: those up to core_v0.15 ask for
    `core_attention`, and hybrid models for `output_layer`.
    """
    places = {module: tensor.shape for name, tensor in tensors.items() for module in _engine_modules(name)}
    if any(module.endswith(".final_norm") for module in places):
        outputs = [name for name in tensors if re.fullmatch(r"(?:.+\.)?output_layer\.weight", name)]
        places |= {name.removesuffix(".weight"): () for name in outputs}
    return [f"{module}{EXTRA_STATE}{place}" for module, shape in places.items() for place in _places(module, shape)]


def _engine_modules(name: str) -> Iterator[str]:
    """The modules of Transformer Engine that a tensor tells of."""
    module = _PART.sub(".weight", name).rpartition(".")[0]
    if _ENGINE_MODULE.fullmatch(module.rpartition(".")[2]):
        yield module
    if module.endswith(".self_attention.linear_proj"):
        yield module.removesuffix("linear_proj") + "core_attention"


def _places(module: str, shape: Shape) -> Iterator[str]:
    """`<i>_<n>` for all places of a module in the lists that it is stored with, whose axes come first."""
    sizes = shape[: (_STACK.search(module) is not None) + (_EXPERTS in module)] or (1,)
    for place in product(*map(range, sizes)):
        yield f"{'.'.join(map(str, place))}_{'.'.join(map(str, sizes))}"
