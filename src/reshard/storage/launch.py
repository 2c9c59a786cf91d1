"""Which process of how many this is, as torchrun, accelerate, srun and mpirun say it in the environment.

    RANK, WORLD_SIZE                                  torchrun, accelerate, deepspeed, anyone
    SLURM_PROCID, SLURM_NTASKS                        inside `srun` (SLURM_STEP_ID) with more than one task
    OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE        Open MPI's mpirun

The command line works together with its other ranks; a library call does so inside `together` alone, because a
training script that merges on its first rank has the same environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from reshard.errors import ReshardError

_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)

_IDENTITY = (
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT", "PBS_JOBID", "LSB_JOBID", "PMIX_NAMESPACE",
)  # fmt: skip
"""What all ranks of one launch have in common, and two launches seldom."""

_MAX_WORLD_SIZE = 1 << 16
_JOIN_TIMEOUT_S = 600.0
_SILENCE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among those that were started together."""

    rank: int = 0
    world_size: int = 1
    local_size: int = 1
    """How many of them share this machine, as far as the launcher says."""
    identity: str = ""
    """Of the launch; empty where the environment says nothing but ranks."""
    store: tuple[str, int] | None = None
    """Host and port of torchrun's key-value store."""
    owns_store: bool = False
    """Whether this process has to open the store, because torchrun's agent does not."""
    join_timeout_s: float = _JOIN_TIMEOUT_S
    """How long to wait for ranks that start late."""
    silence_timeout_s: float = _SILENCE_TIMEOUT_S
    """How long a rank may say nothing before it counts as dead."""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that talks and commits."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}"


@dataclass(frozen=True, slots=True)
class Spread:
    """How the work is spread over the ranks. It changes no byte of the output."""

    distributed_save: bool = False
    """Every file is written by one rank; else all ranks write into all files."""
    save_every_n_ranks: int = 1
    """Only the ranks that this divides write."""

    def __post_init__(self) -> None:
        if self.save_every_n_ranks < 1:
            raise ReshardError(f"--save-every-n-ranks {self.save_every_n_ranks}: it begins at 1")

    def writers(self, world_size: int) -> range:
        """The ranks that write; the first always does."""
        return range(0, world_size, self.save_every_n_ranks)


_ALONE = Launch()

_current: ContextVar[Launch] = ContextVar("launch", default=_ALONE)


def current() -> Launch:
    """The launch that this code works in; one process alone unless inside `together`."""
    return _current.get()


@contextmanager
def together(launch: Launch | None = None) -> Iterator[Launch]:
    """What is written inside is written by all ranks of the launch, each of which has to come here.

    Raises ReshardError when the environment contradicts itself.
    """
    token = _current.set(detect(os.environ) if launch is None else launch)
    try:
        yield _current.get()
    finally:
        _current.reset(token)


def detect(environ: Mapping[str, str]) -> Launch:
    """The launch that an environment describes. Raises ReshardError for numbers that cannot be."""
    for rank_name, size_name, local_name in _NAMES:
        if rank_name == "SLURM_PROCID" and "SLURM_STEP_ID" not in environ:
            continue  # the batch script itself, not a task of srun
        rank, world_size = _number(environ, rank_name), _number(environ, size_name)
        if rank is None and world_size is None:
            continue
        if world_size is None and rank == 0:
            continue
        if rank is None and world_size == 1:
            continue
        if rank is None or world_size is None:
            missing, there = (rank_name, size_name) if rank is None else (size_name, rank_name)
            raise ReshardError(
                f"{there} is {environ[there]} and {missing} is not set", hint=f"set both, or unset {there} to run alone"
            )
        if not 0 <= rank < world_size <= _MAX_WORLD_SIZE:
            raise ReshardError(f"{rank_name} is {rank} and {size_name} is {world_size}: there is no such rank")
        if world_size > 1:
            return _launch(environ, rank, world_size, local_name)
    return Launch()


def _launch(environ: Mapping[str, str], rank: int, world_size: int, local_name: str) -> Launch:
    local = environ.get(local_name, "")
    store = None
    if "TORCHELASTIC_RUN_ID" in environ and "MASTER_ADDR" in environ:
        port = _number(environ, "MASTER_PORT")
        store = None if port is None else (environ["MASTER_ADDR"], port)
    return Launch(
        rank,
        world_size,
        min(int(local), world_size) if local.isascii() and local.isdigit() and int(local) else 1,
        "\n".join(f"{name}={environ[name]}" for name in _IDENTITY if environ.get(name)),
        store,
        rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        _seconds(environ, "RESHARD_JOIN_TIMEOUT_S", _JOIN_TIMEOUT_S),
        _seconds(environ, "RESHARD_SILENCE_TIMEOUT_S", _SILENCE_TIMEOUT_S),
    )


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ReshardError(f"{name} is {text!r}: a whole number is expected", hint=f"unset {name} to run alone")
    return int(text)


def _seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name, "").strip()
    if not text:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e7:
        raise ReshardError(f"{name} is {text!r}: a number of seconds is expected")
    return seconds
