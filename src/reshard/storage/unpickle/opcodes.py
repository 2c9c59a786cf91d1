"""What a pickle claims, checked before a C unpickler believes it.

The C unpickler allocates as it is told: memo slot number n costs 16 n bytes, and a length of 2**60 is tried. It also
hashes dict keys in C, where tuples inside tuples cost a stack frame per level, and a tuple that holds another one twice
doubles the work per level. Three questions about the opcodes, then, none of which runs anything:

    pickle_end       where is STOP, and is every length and memo number in proportion to the bytes there are?
    check_nesting    can every tuple be hashed in bounded stack and time?
    named_globals    what do GLOBAL and INST name?

Source of the opcodes: CPython `Lib/pickletools.py`, 3.11 to 3.14.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from functools import lru_cache
from math import log2

from reshard.errors import Unsupported
from reshard.storage.unpickle.limits import Refused

_STOP, _PROTO, _FRAME, _PUT, _LONG_BINPUT = b".\x80\x95pr"
_NUM_OPERAND_BYTES = {
    **dict.fromkeys(b"()012NQRabdelost}]u\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94", 0),
    **dict.fromkeys(b"Khq\x80", 1),
    **dict.fromkeys(b"M", 2),
    **dict.fromkeys(b"Jjr", 4),
    **dict.fromkeys(b"G\x95", 8),
}
_NUM_LENGTH_BYTES = {
    **dict.fromkeys(b"UC\x8a\x8c", 1),
    **dict.fromkeys(b"TXB\x8b", 4),
    **dict.fromkeys(b"\x8d\x8e\x96", 8),
}
_NUM_LINES = {**dict.fromkeys(b"FILSVPgp", 1), **dict.fromkeys(b"ci", 2)}
_EXTENSIONS = b"\x82\x83\x84"
_BUFFERS = b"\x97\x98"


@lru_cache(maxsize=2)
def _plain_run(allows_large_memo: bool) -> re.Pattern[bytes]:
    """Matches the longest run of opcodes that can claim nothing out of proportion; 20 ns per opcode."""
    single = rb"[()0-2NQRabdelostu}\]\x81\x85-\x89\x8f-\x94]"

    def short(opcode: bytes, rest_of_length: bytes, most: int) -> bytes:
        lengths = (re.escape(bytes([n])) + rest_of_length + (b".{%d}" % n if n else b"") for n in range(most + 1))
        return opcode + b"(?:" + b"|".join(lengths) + b")"

    runs = (
        single + rb"++",
        rb"[hKq]." + single + rb"*+",
        rb"M.." + single + rb"*+",
        rb"[jJ].{4}" + single + rb"*+",
        short(rb"\x8c", b"", 255),
        short(rb"X", rb"\x00\x00\x00", 255),
        rb"r..[\x00-\x0f]\x00" if allows_large_memo else rb"r..\x00\x00",
        rb"G.{8}",
        short(rb"\x8a", b"", 16),
        rb"c[^\n]*+\n[^\n]*+\n",
    )
    return re.compile(b"(?:" + b"|".join(runs) + b")*+", re.DOTALL)


def pickle_end(data: memoryview, offset: int) -> int:
    """The offset after the STOP of the pickle at `offset`, having checked every length and memo number on the way."""
    plain_run = _plain_run(len(data) - offset >= 1 << 20)
    while True:
        run = plain_run.match(data, offset)
        assert run is not None
        offset = run.end()
        if offset >= len(data):
            raise Refused("it ends before its STOP")
        if data[offset] == _STOP:
            return offset + 1
        offset = _opcode_end(data, offset)


def _opcode_end(data: memoryview, offset: int) -> int:
    """The offset after the opcode at `offset` and its operand, which are whole and claim nothing that is not there."""
    opcode = data[offset]
    end = offset + 1
    if opcode in _NUM_OPERAND_BYTES:
        end += _NUM_OPERAND_BYTES[opcode]
    elif opcode in _NUM_LENGTH_BYTES:
        end += _NUM_LENGTH_BYTES[opcode]
        end += int.from_bytes(data[offset + 1 : end], "little")
    elif opcode in _NUM_LINES:
        for _ in range(_NUM_LINES[opcode]):
            end = _line_end(data, end)
    elif opcode in _EXTENSIONS or opcode in _BUFFERS:
        raise Unsupported(f"opcode 0x{opcode:02x} at byte {offset}, which points outside the file")
    else:
        raise Refused(f"0x{opcode:02x} at byte {offset} is no opcode")
    if end > len(data):
        raise Refused(f"opcode 0x{opcode:02x} at byte {offset} ends {end - len(data)} bytes after the data")
    operand = data[offset + 1 : end]
    if opcode == _PROTO and operand[0] > pickle.HIGHEST_PROTOCOL:
        raise Unsupported(f"pickle protocol {operand[0]}")
    if opcode == _FRAME and int.from_bytes(operand, "little") > len(data) - end:
        raise Refused(f"a frame at byte {offset} ends after the data")
    if opcode in (_PUT, _LONG_BINPUT):
        number = int.from_bytes(operand, "little") if opcode == _LONG_BINPUT else _decimal(operand)
        if not 0 <= number <= len(data):
            raise Refused(f"memo number {number} at byte {offset} of {len(data)}")
    return end


def _line_end(data: memoryview, offset: int) -> int:
    """The offset after the next newline."""
    while offset < len(data):
        chunk = bytes(data[offset : offset + 4096])
        found = chunk.find(b"\n")
        if found >= 0:
            return offset + found + 1
        offset += len(chunk)
    raise Refused("a line at its end is not finished")


def _decimal(line: memoryview) -> int:
    digits = bytes(line[:-1])
    if not (digits.isdigit() and len(digits) < 20):
        raise Refused(f"{digits[:20]!r} is no memo number")
    return int(digits)


def named_globals(data: memoryview) -> Iterator[tuple[str, str]]:
    """Module and name of each GLOBAL and INST up to the first opcode that cannot be read."""
    offset = 0
    while offset < len(data) and data[offset] != _STOP:
        try:
            end = _opcode_end(data, offset)
        except (Refused, Unsupported):
            return
        if data[offset] in b"ci":
            module, name = bytes(data[offset + 1 : end]).decode("utf-8", "replace").split("\n")[:2]
            yield module, name
        offset = end


# -------------------------------------------------------------------------------------------------------------- nesting

MAX_TUPLE_DEPTH = 1_000
"""Tuples inside tuples. Hashing takes about 100 bytes of stack per level."""

_TUPLE_SIZES = {0x85: 1, 0x86: 2, 0x87: 3}
_MARK, _POP, _POP_MARK, _DUP, _TUPLE, _MEMOIZE = b"(012t\x94"
_PUSHES = frozenset(b"KMJNILFGSTUVXBCcP}])\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x96")
_POPS = dict.fromkeys(b"ab", 1) | dict.fromkeys(b"s", 2)
_POPS_TO_MARK = frozenset(b"eu\x90")
_POPS_TO_MARK_AND_PUSHES = frozenset(b"ldoi\x91")
_REPLACES = {**dict.fromkeys(b"\x93\x81", 2), 0x92: 3}
_REDUCE = ord("R")
_GETS, _PUTS = frozenset(b"hjg"), frozenset(b"qrp")

Nesting = tuple[int, int]
"""Of a tuple: levels, and elements that a hash visits. Other values have none: their hash stops at once."""


def is_surely_shallow(data: memoryview) -> bool:
    """Whether there are too few opcodes that make and repeat tuples for a bomb: so for one tensor. Takes 1 us."""
    data_bytes = bytes(data)
    num_tuples = sum(map(data_bytes.count, (b"\x85", b"\x86", b"\x87", b"t")))
    num_repeats = num_tuples + sum(map(data_bytes.count, (b"h", b"j", b"g", b"2")))
    # n levels that hold the level below k times each: k**n visits, from n * k repeats
    levels = min(num_tuples, max(1, int(num_repeats / 2.7)))
    return num_tuples < MAX_TUPLE_DEPTH and levels * log2(max(2, num_repeats / max(1, levels))) < 32


def check_nesting(data: memoryview, *, calls_return_arguments: bool = False) -> None:
    """Refuse a pickle, which `pickle_end` has passed, with a tuple that cannot be hashed in bounded stack and time.

    Follows what the opcodes do to the stack and the memo; 0.3 us per opcode. Where the stack underflows, the unpickler
    stops too. A persistent id counts as the object that it stands for.
    """
    stack: list[Nesting | None] = []
    marks: list[int] = []
    memo: dict[int, Nesting | None] = {}
    most_visits = 1000 + 4 * len(data)

    def made(items: list[Nesting | None]) -> Nesting:
        depth, visits = 1, len(items)
        for item in items:
            if item is not None:
                depth, visits = max(depth, item[0] + 1), visits + item[1]
        if depth > MAX_TUPLE_DEPTH or visits > most_visits:
            raise Refused(f"it nests tuples {depth} deep, with {visits} elements when written out")
        return depth, visits

    for opcode, operand in _operations(bytes(data)):
        if opcode in _PUSHES:
            stack.append(None)
        elif opcode == _MEMOIZE:
            memo[len(memo)] = stack[-1] if stack else None
        elif opcode in _GETS:
            stack.append(memo.get(_number(opcode, operand)))
        elif opcode in _PUTS:
            memo[_number(opcode, operand)] = stack[-1] if stack else None
        elif opcode == _MARK:
            marks.append(len(stack))
        elif opcode in _TUPLE_SIZES:
            size = _TUPLE_SIZES[opcode]
            stack[-size:] = [made(stack[-size:])]
        elif opcode in _REPLACES:
            stack[-_REPLACES[opcode] :] = [None]
        elif opcode == _REDUCE:
            stack[-2:] = [stack[-1] if stack and calls_return_arguments else None]
        elif opcode in _POPS:
            del stack[-_POPS[opcode] :]
        elif opcode == _DUP:
            stack.append(stack[-1] if stack else None)
        elif opcode == _POP and marks and marks[-1] == len(stack):
            marks.pop()
        elif opcode == _POP:
            del stack[-1:]
        elif opcode in _MARKED:
            start = marks.pop() if marks else len(stack)
            items = stack[start:]
            del stack[start:]
            if opcode == _TUPLE:
                stack.append(made(items))
            elif opcode in _POPS_TO_MARK_AND_PUSHES:
                stack.append(None)


_MARKED = _POPS_TO_MARK | _POPS_TO_MARK_AND_PUSHES | {_TUPLE, _POP_MARK}


def _number(opcode: int, operand: bytes) -> int:
    return int(operand[:-1]) if opcode in b"gp" else int.from_bytes(operand, "little")


def _operations(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Opcode and operand of each opcode before STOP."""
    view, offset = memoryview(data), 0
    while (opcode := data[offset]) != _STOP:
        num_bytes = _NUM_OPERAND_BYTES.get(opcode)
        end = offset + 1 + num_bytes if num_bytes is not None else _opcode_end(view, offset)
        yield opcode, b"" if num_bytes == 0 else data[offset + 1 : end]
        offset = end
