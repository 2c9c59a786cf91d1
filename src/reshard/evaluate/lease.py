"""Who holds a job: a name that tells, on the same machine, whether its process still lives.

    MACHINE PID START RANDOM

MACHINE is host, boot and the name space of process ids; START the clock tick at which the process began, so a process
id that was given again is another owner. Of processes on other machines only the expiry of their leases tells.
"""

from __future__ import annotations

import os
import secrets
import socket
from functools import cache
from pathlib import Path

LEASE_S = 60.0
"""How long a lease is good for without being renewed."""
RENEW_S = LEASE_S / 4


def new_owner() -> str:
    """A name for this process, or one of several in it."""
    pid = os.getpid()
    return f"{_machine()} {pid} {_start_of(pid)} {secrets.token_hex(4)}"


def is_dead(owner: str) -> bool:
    """Whether the owner was a process of this machine that has ended. Of others nobody knows: False."""
    words = owner.split(" ")
    if len(words) != 4 or words[0] != _machine() or not words[1].isdigit():
        return False
    return _start_of(int(words[1])) != words[2]


@cache
def _machine() -> str:
    parts = [socket.gethostname()]
    try:
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    except OSError:
        parts.append("-")
    return "/".join(parts).replace(" ", "_")


def _start_of(pid: int) -> str:
    """When a process began; empty when there is none (any more)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except OSError:
        return "" if Path("/proc/self/stat").exists() else _alive(pid)
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()


def _alive(pid: int) -> str:
    """Where the system has no /proc: whether there is such a process at all."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        return "-"
    return "-"
