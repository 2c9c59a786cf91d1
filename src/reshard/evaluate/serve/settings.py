"""The settings of a server."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reshard.errors import InputError, NotFound, listed

LOOPBACK = ("127.0.0.1", "localhost", "::1")
QUEUE = "queue.sqlite"
_STATE = ".reshard-serve"

MAX_NUM_SLOTS = 256
"""Each slot is a thread, and a program with a model in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """What a server is started with."""

    backend: str = "lm_eval"
    """`lm_eval`, `lmms_eval` or `command`."""
    command: tuple[str, ...] = ()
    """Of the backend `command`."""
    host: str = "127.0.0.1"
    port: int = 8000
    roots: tuple[Path, ...] = ()
    """Directories, resolved: nothing outside them is read or written for anybody."""
    state: Path = Path(_STATE)
    """Where the queue, merged models and outputs without a place of their own are."""
    slots: int = 1
    """Evaluations at a time."""
    token: str | None = None
    timeout_s: float = 24 * 3600.0
    """That a job may take, merging included."""
    include_path: str | None = None
    """Further tasks of lm_eval."""
    base: str | None = None
    """Where config and tokenizer come from when a checkpoint has none."""
    trust_remote_code: bool = False
    """Whether a request may ask for it."""
    python: str = ""
    """The interpreter that has the harness."""

    def __post_init__(self) -> None:
        if not 1 <= self.slots <= MAX_NUM_SLOTS:
            raise InputError(f"--slots {self.slots}: 1 to {MAX_NUM_SLOTS} are expected")
        if not 0 < self.timeout_s < float("inf"):
            raise InputError(f"--timeout {self.timeout_s}: more than 0 seconds are expected")
        if not 0 <= self.port < 65536:
            raise InputError(f"--port {self.port}: 0 to 65535 is expected")
        if (self.backend == "command") != bool(self.command):
            raise InputError(
                "--command and --backend command go together",
                hint='--backend command --command "my-eval {model} {output}"',
            )
        if self.host not in LOOPBACK and not self.token:
            raise InputError(
                f"--host {self.host}: whoever reaches the server could start programs with it, so it wants a token",
                hint='--token "$(openssl rand -hex 16)", or RESHARD_TOKEN',
            )
        if self.token is not None and not re.fullmatch(r"[\x21-\x7e]+", self.token):
            raise InputError("--token: printable characters without spaces are expected")

    @property
    def jobs(self) -> Path:
        """Outputs of requests that name none."""
        return self.state / "jobs"

    @property
    def merged(self) -> Path:
        return self.state / "merged"


def resolved_roots(roots: Sequence[str]) -> tuple[Path, ...]:
    """Roots as they really are; the working directory where none is named."""
    found = tuple(Path(os.path.realpath(root)) for root in roots or (".",))
    missing = [str(root) for root in found if not root.is_dir()]
    if missing:
        raise NotFound(f"--root {listed(missing)}: no such directory")
    return found


def default_state(roots: Sequence[Path]) -> Path:
    """Where the state is if nobody says: in the first root, where a later server finds it again."""
    return roots[0] / _STATE


def devices_of_slots(num_slots: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each slot: the machine's GPUs, dealt out evenly; None where there are none.

    With more slots than GPUs several share one.
    """
    devices = _devices()
    if not devices:
        return [None] * num_slots
    if num_slots >= len(devices):
        return [devices[slot % len(devices)] for slot in range(num_slots)]
    each = len(devices) // num_slots
    return [",".join(devices[slot * each : (slot + 1) * each]) for slot in range(num_slots)]


def _devices() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip() and device.strip() != "-1"]
    numbers = [int(path.name[6:]) for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()]
    return [str(index) for index in range(len(numbers))]
