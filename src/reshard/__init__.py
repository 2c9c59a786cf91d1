"""Shards in, a proven whole model out: merge, convert, average, inspect and verify checkpoints without torch or a GPU.

with_names = reshard.open("output/checkpoint-500")      # a mapping of FQN to lazy tensor
with_names["model.norm.weight"][:8].numpy()             # reads only these bytes
reshard.merge("output/checkpoint-500", "model/", base="meta-llama/Llama-3.1-8B")
reshard.convert("model/", "megatron/", to="torch_dist")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reshard import errors
from reshard.errors import ReshardError
from reshard.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from reshard.core.checkpoint import Checkpoint, LazyTensor
    from reshard.ops.average import average
    from reshard.ops.axolotl import merge_fsdp_weights
    from reshard.ops.convert import convert
    from reshard.ops.inspect import Inspection, inspect
    from reshard.ops.merge import Merged, merge
    from reshard.ops.verify import Verified, verify

_WHERE = {
    "Checkpoint": "reshard.core.checkpoint",
    "Inspection": "reshard.ops.inspect",
    "LazyTensor": "reshard.core.checkpoint",
    "Merged": "reshard.ops.merge",
    "Verified": "reshard.ops.verify",
    "average": "reshard.ops.average",
    "convert": "reshard.ops.convert",
    "inspect": "reshard.ops.inspect",
    "merge": "reshard.ops.merge",
    "merge_fsdp_weights": "reshard.ops.axolotl",
    "verify": "reshard.ops.verify",
}


def open(path: str | Path, *, step: int | None = None, state_dict_dirname: str | None = None) -> Checkpoint:
    """The checkpoint at a path, a mapping of FQN to lazy tensor. Only headers are read.

    Raises NotFound when nothing there is recognised, Incomplete when parts are missing, Corrupt when they contradict
    each other.
    """
    from pathlib import Path

    from reshard.formats import open_path

    return open_path(Path(path), step=step, state_dict_dirname=state_dict_dirname)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'reshard' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)


__all__ = [
    "Checkpoint",
    "Inspection",
    "LazyTensor",
    "Merged",
    "ReshardError",
    "Verified",
    "__version__",
    "average",
    "convert",
    "errors",
    "inspect",
    "merge",
    "merge_fsdp_weights",
    "open",
    "verify",
]
