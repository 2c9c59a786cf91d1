"""The files of an output, whose kind its name says."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from reshard.core.checkpoint import Checkpoint
from reshard.errors import Unsupported
from reshard.ops import names
from reshard.ops.merge.options import Options
from reshard.storage.plan import Plan

Kind = Literal["huggingface", "safetensors", "torch_save"]

_OTHER_FILES = (
    ".distcp", ".gguf", ".h5", ".index", ".json", ".nemo", ".npz", ".onnx", ".pkl", ".pt2", ".safetensor", ".tar",
    ".zip",
)  # fmt: skip
"""Suffixes that nobody gives to a directory of a model."""


def kind_of(output: Path) -> Kind:
    """What is written to an output of this name. Raises Unsupported for names of files that are none of ours."""
    suffix = output.suffix.lower()
    if suffix in _OTHER_FILES and not os.path.isdir(output):
        raise Unsupported(
            f"{output}: merge writes no {suffix} files",
            hint=".safetensors, or .pt, .pth, .bin, .ckpt; any other name is that of a directory",
        )
    if suffix == ".safetensors":
        return "safetensors"
    return "torch_save" if suffix in (".ckpt", ".pt", ".pth", ".bin") else "huggingface"


def plan_of(root: Path, checkpoint: Checkpoint, output: Path, options: Options) -> tuple[Checkpoint, Plan]:
    """The checkpoint as it is written, its config reconciled, and the plan of that."""
    from reshard.formats import huggingface, safetensors
    from reshard.ops.config import reconcile

    kind = kind_of(output)
    if kind == "torch_save":
        return _plan_torch_save(root, checkpoint, output, options)
    if kind == "safetensors":
        return checkpoint, Plan((safetensors.plan_file("", checkpoint.tensors, {"format": "pt"}),))
    if checkpoint.config is not None and options.what == "model":
        config, changes = reconcile(checkpoint.config, checkpoint.tensors)
        notices = checkpoint.notices + tuple(f"config.json: {change}" for change in changes)
        checkpoint = replace(checkpoint, config=config, notices=notices)
    if huggingface.is_adapter(checkpoint):
        checkpoint = huggingface.to_adapter(checkpoint)
    if huggingface.lacks_adapter_config(checkpoint):
        said = "an adapter without adapter_config.json: copy it from the training run, or name it with --base DIR"
        checkpoint = replace(checkpoint, notices=(*checkpoint.notices, said))
    size = options.max_shard_size
    limit = huggingface.MAX_SHARD_NBYTES if size is None else huggingface.parse_size(str(size))
    return checkpoint, huggingface.plan(checkpoint, max_shard_nbytes=limit)


def _plan_torch_save(root: Path, checkpoint: Checkpoint, output: Path, options: Options) -> tuple[Checkpoint, Plan]:
    """`.ckpt`: `{"state_dict": ..., "cfg": ...}`, the configuration from meta.pt; else the state dict alone."""
    from reshard.formats import lightning, torch_save

    if options.what == "all":
        nest = partial(names.nested, checkpoint)
        files = checkpoint.origin.files
        is_one = checkpoint.origin.format == torch_save.NAME and len(files) == 1
        carried = torch_save.read(files[0]) if is_one else None
        plan = torch_save.plan(checkpoint, "", wrap=nest, carried=carried, name=output.stem)
        return checkpoint, Plan((plan,))
    if output.suffix != ".ckpt":
        return checkpoint, Plan((torch_save.plan(checkpoint, "", name=output.stem),))
    config = lightning.find_config(root, options.cfg_key)
    if config is None:
        plan = torch_save.plan(checkpoint, "", wrap=lambda state: {"state_dict": state}, name=output.stem)
        notices = ("no configuration was found: the output has state_dict only",)
    else:
        value = config.value
        plan = torch_save.plan(
            checkpoint,
            "",
            wrap=lambda state: {"state_dict": state, "cfg": value},
            carried=config.file,
            name=output.stem,
        )
        notices = (f"cfg is {config.key!r} of {config.file.path.name}",)
    return replace(checkpoint, notices=checkpoint.notices + notices), Plan((plan,))
