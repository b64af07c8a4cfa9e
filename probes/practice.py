# SPDX-License-Identifier: GPL-2.0-or-later
"""What a hit costs on this machine: probes are tried on a process of our own before any is put into DPVS.

Rules: the practice process calls, in a loop, an instruction of the same kind as each site, with the session in the same
register, and nothing else. So a difference of two runs is the price of a hit, with the very program that will run in
DPVS. It works on a second thread: a kernel whose probes pass over threads (uprobe_multi, some releases of Linux 6.6 to
6.9) is found out here. The code lies in a memfd; nothing is written to any file system.
"""

import os
import select
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from probes.errors import DpvsProbeError
from probes.sites import Kind, Site

CHILD = Path(__file__).with_name("practice_child.py")
REPLY_S = 10.0
ROUNDS = 7
ROUND_NS = 2_000_000  # so many hits that a round takes about as long
REGISTERS = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
_FUNCTION = bytes.fromhex("55 5d c3")  # push rbp; pop rbp; ret
_ENTER = bytes.fromhex("53 55 4154 4155 4156 4157 57 56")  # push rbx, rbp, r12-r15, count, session
_LEAVE = bytes.fromhex("5e 5f 415f 415e 415d 415c 5d 5b c3")
_COUNT_DOWN = bytes.fromhex("48ff4c2408")  # dec qword [rsp+8]
# An instruction of each kind, and what undoes it. A call has a function of its own.
_SAMPLES: dict[Kind, tuple[bytes, bytes]] = {
    "nop5": (bytes.fromhex("0f1f440000"), b""),
    "nop": (b"\x90", b""),
    "jump": (bytes.fromhex("eb00"), b""),
    "push": (b"\x55", bytes.fromhex("4883c408")),  # push rbp; add rsp, 8
    "stepped": (bytes.fromhex("4889f8"), b""),  # mov rax, rdi
}


class PracticeFailed(DpvsProbeError):
    help_text = "Costs that were measured elsewhere are taken instead: the budget of the probes is kept less exactly."


class Costs(NamedTuple):
    """Nanoseconds that one hit takes of the probed thread."""

    create_ns: float
    free_ns: float
    measured: bool  # on this machine, with this program; else only of the same kind of instruction

    @property
    def session_ns(self) -> float:
        """Of a whole session: made once, ended once."""
        return self.create_ns + self.free_ns


def assumed(sites: Sequence[Site]) -> Costs:
    """Where nothing could be measured: what an empty program costs elsewhere, and half as much again."""
    create, free = (1.5 * site.cost_ns for site in sites)
    return Costs(create, free, measured=False)


class Loop(NamedTuple):
    """One loop of the practice code, by offsets: where it is entered, its instruction, the function that that calls."""

    function: int
    site: int
    called: int = -1


def code_for(sites: Sequence[tuple[Kind, str]]) -> tuple[bytes, list[Loop]]:
    """Machine code with a loop for each (kind of instruction, register that holds the session there)."""
    code = bytearray()
    loops = []
    for kind, register in sites:
        called = -1
        if kind == "call":
            called = len(code)
            code += _FUNCTION.ljust(16, b"\xcc")
        function = len(code)
        load = _load(register)
        site = function + len(_ENTER) + len(load)
        if kind == "call":
            instruction, after = b"\xe8" + struct.pack("<i", called - (site + 5)), b""
        else:
            instruction, after = _SAMPLES[kind]
        body = load + instruction + after + _COUNT_DOWN
        back = b"\x0f\x85" + struct.pack("<i", -(len(body) + 6))  # jnz
        code += _ENTER + body + back + _LEAVE
        code += b"\xcc" * (-len(code) % 16)
        loops.append(Loop(function, site, called))
    return bytes(code), loops


def _load(register: str) -> bytes:
    """``mov register, [rsp]``: the session."""
    number = REGISTERS.index(register)
    return bytes((0x4C if number >= 8 else 0x48, 0x8B, (number & 7) << 3 | 4, 0x24))


class Practice:
    """The practice process, running; a context manager. ``pid``, ``path`` and ``offsets`` are for attaching probes."""

    def __init__(self, sites: Sequence[tuple[Kind, str]]) -> None:
        code, self.loops = code_for(sites)
        self.offsets = tuple(loop.site for loop in self.loops)
        try:
            self._file = os.memfd_create("dpvs-probe-practice")
            os.write(self._file, code)
        except OSError as error:
            raise PracticeFailed(f"no file in memory: {error.strerror}") from None
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", str(CHILD), str(self._file)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                pass_fds=[self._file], start_new_session=True, bufsize=0,
            )  # fmt: skip
        except OSError as error:
            os.close(self._file)
            raise PracticeFailed(f"the practice process does not start: {error.strerror}") from None
        self.pid = self._child.pid
        self.path = f"/proc/{self.pid}/fd/{self._file}"
        try:
            if self._answer() != "ready":
                raise PracticeFailed("the practice process does not start")
        except BaseException:
            self.close()
            raise

    def run(self, which: int, count: int) -> float:
        """Go ``count`` times through a loop; nanoseconds of processor time for each."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(b"%d %d\n" % (self.loops[which].function, count))
            return int(self._answer()) / count
        except (OSError, ValueError):
            raise PracticeFailed("the practice process has ended") from None

    def _answer(self) -> str:
        stdout = self._child.stdout
        assert stdout is not None
        text = b""
        while not text.endswith(b"\n"):
            readable, _, _ = select.select([stdout], [], [], REPLY_S)
            piece = os.read(stdout.fileno(), 256) if readable else b""
            if not piece:
                raise PracticeFailed("the practice process does not answer")
            text += piece
        return text.decode().strip()

    def close(self) -> None:
        self._child.kill()
        self._child.communicate()
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def median_of_rounds(
    practice: Practice,
    which: int,
    expected_ns: float,
    rounds: int = ROUNDS,
    *,
    most: int = 1 << 30,
    between: Callable[[], None] | None = None,
) -> tuple[float, int]:
    """(median of several rounds in nanoseconds a time, how often the loop was gone through in all).

    ``most``: times in one round; ``between``: called after each.
    """
    count = min(max(50, int(ROUND_NS / expected_ns)), most)
    times = []
    for _ in range(rounds):
        times.append(practice.run(which, count))
        if between is not None:
            between()
    return statistics.median(times), count * rounds
