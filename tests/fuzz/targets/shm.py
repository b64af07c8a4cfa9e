# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/transport/shm_setup.py: what a dialer hands over, descriptors and all, and what a listener answers.

An input is: form u8 (0: the listener's answer, else a hand-over), number of descriptors u8, for each what it is u8 and
how u8, and the message.
"""

import fcntl
import mmap
import os
import socket
from collections.abc import Iterable
from contextlib import ExitStack, suppress

from replicator.transport import shm_setup
from replicator.transport.shm_setup import ANSWER, LEAST_RING_BYTES, MOST_RING_BYTES, BadSetup
from tests.fuzz.judge import SLACK_BYTES, Finding, must, only

MAX_BYTES = 512
WORDS = (b"DPSM\x01\x00", b"DPSM\x01\x00\x01\x00", b"\x00\x00\x01\x00", b"\x00\x00\x20\x00", b"\x00\x00\x00\x04")
RING = 64 << 10
SEALS = (0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL, fcntl.F_SEAL_WRITE)
MEMORY, BELL, PIPE, FILE, SOCKET, KINDS = range(6)


def _hand_over(*descriptors: tuple[int, int], sealed: bool = False, ring: int = RING, magic: bytes = b"DPSM") -> bytes:
    message = magic + (1).to_bytes(2, "little") + int(sealed).to_bytes(2, "little") + ring.to_bytes(4, "little")
    return bytes([1, len(descriptors), *(byte for pair in descriptors for byte in pair)]) + message + bytes(4)


def seeds() -> Iterable[bytes]:
    good = [(MEMORY, 2), (BELL, 0), (BELL, 0)]
    yield _hand_over(*good)
    yield _hand_over(*good, sealed=True)
    yield _hand_over(*good, ring=MOST_RING_BYTES)
    yield _hand_over(good[1], good[0], good[1])
    yield _hand_over((MEMORY, 0), *good[1:])
    yield _hand_over((FILE, 0), (PIPE, 0), (SOCKET, 1), (BELL, 1))
    yield _hand_over()
    yield bytes(2) + shm_setup.answer()
    yield bytes(2) + shm_setup.answer("one side seals what it sends and the other does not")


def bound(data: bytes) -> int:
    return SLACK_BYTES + 8 * len(data)  # the memory that is mapped is the peer's


def check(data: bytes) -> None:
    if len(data) < 2:
        return
    if data[0] == 0:
        with only(BadSetup):
            shm_setup.read_answer(data[2:])
            must(data[2:6] == b"DPSM" and len(data) == 2 + ANSWER.size, "yes only from a node")
        return
    count = min(data[1] % 8, (len(data) - 2) // 2)
    pairs, message = data[2 : 2 + 2 * count], data[2 + 2 * count :]
    before = set(os.listdir("/proc/self/fd"))
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(each) for each in socket.socketpair())
        ring = int.from_bytes(message[8:12], "little")
        descriptors = [_make(pairs[i], pairs[i + 1], ring, stack) for i in range(0, 2 * count, 2)]
        if message or descriptors:
            socket.send_fds(theirs, [message or b"x"], descriptors)
        else:
            theirs.shutdown(socket.SHUT_WR)
        undo = stack.enter_context(ExitStack())
        with only(BadSetup):
            shared = shm_setup.take(ours, undo, sealed=False)
            must(LEAST_RING_BYTES <= shared.ring_bytes <= MOST_RING_BYTES, "a ring of an allowed size")
            must(len(shared.memory) == 2 * shared.ring_bytes + mmap.PAGESIZE, "two rings and their control words")
            with suppress(OSError):
                os.ftruncate(descriptors[0], 0)
                raise Finding("the peer can cut the memory off")
            shared.memory[-1] = 1
            for writer_or_reader in shared.rings(dialed=False):
                writer_or_reader.release()
    must(set(os.listdir("/proc/self/fd")) == before, "no descriptor is left behind")


def _make(kind: int, how: int, ring: int, stack: ExitStack) -> int:
    kind %= KINDS
    if kind == MEMORY:
        fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        size = mmap.PAGESIZE + 2 * min(ring, 2 * MOST_RING_BYTES)
        os.ftruncate(fd, size + (how >> 4 & 3) - (how >> 6))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS[how % 4])
        if how & 8:
            stack.callback(os.close, fd)
            fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    elif kind == BELL:
        fd = os.eventfd(how & 1, os.EFD_CLOEXEC)
    elif kind == PIPE:
        fd, other = os.pipe()
        stack.callback(os.close, other)
    elif kind == SOCKET:
        fd = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach()
    else:
        fd = os.open(("/dev/null", "/proc/self/maps", "/", "/dev/zero")[how % 4], os.O_RDONLY)
    stack.callback(os.close, fd)
    return fd
