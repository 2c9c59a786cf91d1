"""What is never lost: other training runs where the output goes, and shards that hold more than the output."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from reshard.core.checkpoint import same_bytes
from reshard.core.tensor import Tensor, leaves
from reshard.errors import Corrupt, NotFound, OutputError, listed
from reshard.formats.detect import shards_in
from reshard.ops import tie
from reshard.ops.merge.options import Prepared
from reshard.storage import manifest
from reshard.storage.plan import Plan
from reshard.storage.staging import resolved, source_within


def check_replaceable(output: Path, plan: Plan) -> None:
    """Raise OutputError when there are training checkpoints where the output goes, whatever --force says."""
    if not os.path.isdir(output) or source_within(resolved(output), plan) is not None:
        return  # what holds the source itself is refused as that
    shards = shards_in(output)
    if shards:
        with suppress(NotFound, Corrupt):
            ours = {Path(file).parts[0] for file in manifest.read(output).files}
            shards = [name for name in shards if name not in ours]
    if shards:
        raise OutputError(
            f"{output} is not replaced: it holds the shards of a training run: {listed(shards, 3)}",
            hint="choose another output, such as a directory in it",
        )


def check_removable(prepared: Prepared) -> None:
    """Raise OutputError when the shards hold anything that nothing of the output is made of."""
    kept = {place for tensor in prepared.checkpoint.tensors.values() for place in _places(tensor)}
    stored = prepared.opened.located().tensors
    left = [fqn for fqn, tensor in stored.items() if tensor.size and not kept.intersection(_places(tensor))]
    if len(left) <= len(tie.TIES):  # one tensor under two names is written once
        whole = [tensor for fqn, tensor in stored.items() if fqn not in left]
        source = prepared.opened.source
        left = [fqn for fqn in left if not any(same_bytes(stored[fqn], tensor, source) for tensor in whole)]
    left += () if _holds_objects(prepared) else prepared.opened.objects
    if left:
        raise OutputError(
            f"{prepared.opened.origin.path}: --remove-shards would lose what is not in the output: {listed(left)}",
            hint="--all into a .pt file takes it, unless each rank has its own; or remove the shards yourself",
        )


def _holds_objects(prepared: Prepared) -> bool:
    """Whether the output holds all that is no tensor. Of what each rank keeps for itself it has one rank's."""
    from reshard.formats import rank_files

    facts, origin = prepared.plan.facts, prepared.opened.origin
    files = frozenset(file.name for file in origin.files)
    is_one = origin.format == "torch_save" or (".metadata" in files and not rank_files.matches(files))
    return is_one and facts["output"] == "torch_save" and facts["options"].get("what") == "all"


def _places(tensor: Tensor) -> set[tuple[object, ...]]:
    """Where in which files a tensor lies, and which part of the storage there it is."""
    return {(leaf.extent.path, leaf.extent.offset, leaf.offset, leaf.shape, leaf.strides) for leaf in leaves(tensor)}


def read_again(output: Path, threads: int | None) -> None:
    """Raise OutputError unless the output is what its manifest says."""
    verified = manifest.verify(output, threads)
    if verified.problems:
        raise OutputError(f"{output}: {listed(verified.problems)}", hint="the disk did not keep what was written")


def remove(prepared: Prepared) -> tuple[Path, ...]:
    """Unlink the shards, and directories that are empty then; what was unlinked."""
    files = prepared.checkpoint.origin.files
    for file in files:
        file.unlink()
    for directory in sorted({f.parent for f in files}, key=lambda p: -len(p.parts)):
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
    return files
