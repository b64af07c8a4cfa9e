# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading a store: what it holds, how old that is, and why it is refused.

Rules: nothing is believed that is not whole (``format.py``), and nothing of a file that others may write. A file may be
read while a running attach writes it: what seems torn is read again before it is called that.
"""

import fcntl
import os
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from collector.record import Records, pick
from replicator.store.format import (
    FIRST_BLOCK,
    FIRST_STAMP,
    PAGE,
    PAGE_WORDS,
    ForeignStore,
    Head,
    Instant,
    Judged,
    Stamp,
    StoreRefused,
    Words,
    joined,
    judge_blocks,
    newest_stamp,
    parse_head,
)

AT_ONCE = 256  # blocks
LOOKS = 3
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def now() -> Instant:
    """This moment. CLOCK_BOOTTIME goes on while the machine is suspended, and nobody sets it."""
    return Instant(time.clock_gettime_ns(time.CLOCK_BOOTTIME), time.time_ns())


def boot_id() -> bytes:
    """16 bytes that name the time since the machine was started."""
    return bytes.fromhex(BOOT_ID.read_text().strip().replace("-", ""))


def age_ns(since: Instant, boot: bytes, at: Instant, at_boot: bytes) -> int:
    """How long before ``at`` was ``since``: by the clock of the machine's run if both are of one, else by the wall's.

    Raises StoreRefused if that was after it: then nobody knows.
    """
    age = at.boot_ns - since.boot_ns if boot == at_boot else at.real_ns - since.real_ns
    if age < 0:
        raise StoreRefused(f"it was written {-age / 1e9:.0f} s from now: the clock was put back")
    return age


@dataclass
class Contents:
    """All that a file says."""

    path: Path
    head: Head
    stamp: Stamp
    own: Records  # of the pool, as they were last
    waiting: Records  # restored, and without a packet when the file was begun: their timeouts count from then
    interrupted: int = 0  # blocks that were being written when the writing ended: they say what they said before
    damaged: list[int] = field(default_factory=list)  # numbers of blocks that say nothing any more

    def require_whole(self) -> None:
        """Raises StoreRefused if anything is damaged."""
        if self.damaged:
            raise StoreRefused(
                f"{len(self.damaged)} of its {self.head.blocks} blocks are damaged, the first is {self.damaged[0]}",
                help_text="`dpvs-probe snapshot restore --partly FILE` takes what is whole.",
            )

    def require_node(self, node: str) -> None:
        """Raises ForeignStore if it is of another node."""
        if self.head.node != node:
            raise ForeignStore(f"it is of node '{self.head.node}', this is '{node}'")


def read(path: str | Path, *, owner: int | None = None) -> Contents:
    """Read a store; raises StoreRefused, its ``path`` named. ``owner``: who the file must belong to; us by default."""
    path = Path(path)
    try:
        return _read(path, os.geteuid() if owner is None else owner)
    except StoreRefused as error:
        raise type(error)(f"{path} is refused: {error}", help_text=error.help_text) from None
    except OSError as error:
        raise StoreRefused(f"{path} cannot be read: {error.strerror}", help_text="") from error


def _read(path: Path, owner: int) -> Contents:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ForeignStore("it is no file")
        if found.st_uid != owner or stat.S_IMODE(found.st_mode) & 0o022:
            raise ForeignStore(
                f"it belongs to uid {found.st_uid}, or others may write to it",
                help_text="Whoever can write sessions steers traffic: a store is its owner's alone, mode 0600.",
            )
        if found.st_size < FIRST_BLOCK * PAGE:
            raise ForeignStore(f"it has {found.st_size} bytes: it is no store of sessions")
        head = parse_head(_pages(fd, 0, 1), found.st_size)
        stamp = _stamp(fd, head)
        own: list[Records] = []
        waiting: list[Records] = []
        interrupted, damaged = 0, []
        for first in range(0, head.blocks, AT_ONCE):
            judged = _blocks(fd, head, first, min(AT_ONCE, head.blocks - first))
            interrupted += judged.interrupted
            damaged += judged.damaged
            (own if first + AT_ONCE <= head.own_blocks else waiting).append(judged.records)
        return Contents(path, head, stamp, *_sorted(head, own, waiting), interrupted, damaged)
    finally:
        os.close(fd)


def _sorted(head: Head, own: list[Records], rest: list[Records]) -> tuple[Records, Records]:
    """Own sessions and waiting ones; what was read together is told apart by its slot, which only own ones have."""
    mixed = joined(rest)
    ours = mixed["slot"] < head.slots
    return joined([*own, pick(mixed, ours)]), pick(mixed, ~ours)


def _pages(fd: int, first: int, count: int) -> Words:
    data = os.pread(fd, count * PAGE, first * PAGE)
    if len(data) != count * PAGE:
        raise StoreRefused("it ends before it should")
    return np.frombuffer(data, np.uint64).reshape(count, PAGE_WORDS)


def _stamp(fd: int, head: Head) -> Stamp:
    for look in range(LOOKS):
        try:
            return newest_stamp(_pages(fd, FIRST_STAMP, 2), head.epoch)
        except StoreRefused:
            if look == LOOKS - 1:
                raise
    raise AssertionError


def _blocks(fd: int, head: Head, first: int, count: int) -> Judged:
    for _ in range(LOOKS):
        judged = judge_blocks(first, _pages(fd, FIRST_BLOCK + 2 * first, 2 * count), head.epoch)
        if not judged.damaged and not judged.interrupted:
            break
    return judged


def locked(fd: int) -> bool:
    """Whether somebody writes this file. Else nobody does while ``fd`` is open."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False
