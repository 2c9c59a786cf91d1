"""Who does what in a run of several ranks: contiguous runs of tensors, or whole files, of nearly the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reshard.storage.launch import Launch, Spread
from reshard.storage.move import Task, tasks
from reshard.storage.plan import Digest, FilePlan, Plan

_TASK_NBYTES = 1 << 14
"""What a tensor costs besides its bytes."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank writes."""

    tasks: Sequence[Task]
    files: Sequence[FilePlan]
    """Those that it writes into."""
    owners: Mapping[str, int]
    """The rank that writes all of a file, where one does; the first rank writes what is not tensors of any other."""


def share_of(plan: Plan, known: Mapping[tuple[str, int], Digest], launch: Launch, spread: Spread) -> Share:
    """The share of this rank. What is known already costs reading and no writing, so it is dealt out by itself."""
    writers = spread.writers(launch.world_size)
    if spread.distributed_save:
        owners = _owners(plan, writers)
        chosen = [task for task in tasks(plan) if owners[task.file.path] == launch.rank]
    else:
        owners = {}
        every = tasks(plan)
        groups = (
            [task for task in every if (task.file.path, task.index) not in known],
            [task for task in every if (task.file.path, task.index) in known],
        )
        chosen = [task for group in groups for task in _dealt(group, launch.rank, writers)]
    touched = {task.file.path for task in chosen}
    return Share(chosen, [file for file in plan.files if file.path in touched], owners)


def _owners(plan: Plan, writers: range) -> dict[str, int]:
    files = list({task.file.path: task.file for task in tasks(plan)}.values())
    bounds = cut([file.nbytes for file in files], len(writers))
    return {
        file.path: rank
        for rank, start, stop in zip(writers, bounds, bounds[1:], strict=False)
        for file in files[start:stop]
    }


def _dealt(group: Sequence[Task], rank: int, writers: range) -> Sequence[Task]:
    if rank not in writers:
        return []
    bounds = cut([task.tensor.nbytes + _TASK_NBYTES for task in group], len(writers))
    place = writers.index(rank)
    return group[bounds[place] : bounds[place + 1]]


def cut(weights: Sequence[int], count: int) -> list[int]:
    """`count + 1` bounds that cut a sequence into runs, the heaviest of them as light as can be."""
    sums = np.concatenate(([0], np.cumsum(np.array(weights, np.int64))))
    low, high = int(max(weights, default=0)), int(sums[-1])
    while low < high:
        limit = (low + high) // 2
        low, high = (low, limit) if _bounds(sums, limit, count)[-1] == len(weights) else (limit + 1, high)
    return _bounds(sums, low, count)


def _bounds(sums: np.ndarray[tuple[int], np.dtype[np.int64]], limit: int, count: int) -> list[int]:
    """Runs that are each as long as the limit allows, from the front."""
    bounds = [0]
    for _ in range(count):
        bounds.append(int(np.searchsorted(sums, sums[bounds[-1]] + limit, "right")) - 1)
    return bounds
