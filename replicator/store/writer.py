# SPDX-License-Identifier: GPL-2.0-or-later
"""Writing a store: one more peer of the session table, which happens to be a file.

Rules
- State, not a log, as for any peer: a slot that is marked is written as it is when its turn comes, with its 27
  neighbours, to that of the block's two places which does not hold what is valid.
- A new file is written beside the old one, and takes its name when all sessions are in it once. Until then the old one
  stands, with what the run before knew.
- Room is taken for the whole file before the first session is written: a full disk refuses the attach and does not
  kill it later. Nothing is ever read back.
- Memory is mapped and shared with the file, so what was written is there whatever becomes of us. What a machine without
  power keeps is up to the kernel (or to ``flush_ns``: then the file is written through that often, by another thread).
"""

import errno
import logging
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from collector.record import Records, Slots, words
from collector.table import Dirty, SessionTable
from probes.errors import DpvsProbeError
from replicator.store.format import (
    FIRST_BLOCK,
    FIRST_STAMP,
    PAGE_WORDS,
    PER_BLOCK,
    Head,
    Instant,
    Stamp,
    Words,
    pack_blocks,
    pack_head,
    pack_stamp,
    rows_of,
)
from replicator.store.reader import locked

WRITE_NS = 20_000_000  # between two writes: a session that opens changes several times within that
STAMP_NS = 100_000_000
CLAIM = 4096  # slots taken from the marks at once
AT_ONCE = 64  # blocks put together at once: what that takes stays in the processor's cache

log = logging.getLogger(__name__)


class StoreUnusable(DpvsProbeError):
    """The file cannot be written."""

    help_text = "Give --store a file in a directory of root's with room for 300 bytes for each session of the pool."


class Writer:
    """Keeps one file equal to one table. Not thread-safe; ``tick`` takes well below a millisecond for a calm table."""

    def __init__(
        self, path: Path, table: SessionTable, dirty: Dirty, head: Head, waiting: Records, *, flush_ns: int = 0
    ) -> None:
        """``dirty``: marks of ``table`` for this file alone; ``waiting``: the ``head.waiting`` sessions that wait."""
        self.path, self._table, self._dirty, self._head = path, table, dirty, head
        self._fresh = path.with_name(path.name + ".new")
        self._generation = 1
        self._stamps = 0
        self._place = np.zeros(head.blocks, np.int64)  # of each block, where it is written next
        self._next_ns = self._stamp_ns = self._flushed_ns = 0
        self._flush_ns = flush_ns
        self._flusher = ThreadPoolExecutor(1, "store") if flush_ns else None
        self._flushing: Future[None] | None = None
        self._owed = False
        self.whole = False  # all sessions were written once, and the file has its name
        self.sessions = 0
        self.written = 0  # blocks
        self._fd, self._map = self._make()
        self._pages: Words = np.frombuffer(self._map, np.uint64).reshape(-1, PAGE_WORDS)
        self._pages[0] = pack_head(head)[0]
        if len(waiting):
            tail = waiting.copy()
            tail["slot"] = head.slots + np.arange(len(tail))
            numbers = np.arange(head.own_blocks, head.blocks)
            self._put(numbers, pack_blocks(numbers, *rows_of(tail, len(numbers)), self._generation, head.epoch))

    @property
    def behind(self) -> int:
        """Slots that wait to be written."""
        return self._dirty.pending

    def tick(self, now_ns: int, at: Instant) -> None:
        """Write what has changed, if it is time for it. ``at``: now, for the stamp."""
        if now_ns < self._next_ns and self._dirty.owed == 0:
            return
        self._next_ns = now_ns + WRITE_NS
        self._write(CLAIM)
        if not self.whole:
            if self._all_owed() and self._dirty.owed == 0:
                self._finish(at)
        elif now_ns >= self._stamp_ns:
            self._stamp_ns = now_ns + STAMP_NS
            self._stamp(at, ended=False)
        if self._flusher and now_ns - self._flushed_ns >= self._flush_ns and (
            self._flushing is None or self._flushing.done()
        ):  # fmt: skip
            self._flushed_ns = now_ns
            self._flushing = self._flusher.submit(self._map.flush)

    def end(self, at: Instant, *, ended: bool) -> None:
        """Write all that is left. ``ended``: the DPVS is no more, and the table will not change again."""
        if self._table.complete:
            self._all_owed()
            while self._dirty.pending:
                self._write(CLAIM)
            if not self.whole:
                self._finish(at)
            self._stamp(at, ended=ended)

    def close(self) -> None:
        """Let go of the file; one that never became whole is removed."""
        if self._flusher:
            self._flusher.shutdown(wait=True)
        del self._pages
        self._map.close()
        os.close(self._fd)
        if not self.whole:
            self._fresh.unlink(missing_ok=True)

    def report(self) -> dict[str, Any]:
        """For status and metrics."""
        return {
            "file": str(self.path),
            "bytes": self._head.size,
            "whole": self.whole,
            "sessions": self.sessions,
            "behind": self.behind,
            "blocks_written": self.written,
        }

    def _make(self) -> tuple[int, mmap.mmap]:
        fd = -1
        try:
            fd = os.open(self._fresh, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            if locked(fd):
                raise StoreUnusable(
                    f"{self._fresh} is being written by another dpvs-probe", help_text="Give it its own."
                )
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, 0)
            os.posix_fallocate(fd, 0, self._head.size)
            return fd, mmap.mmap(fd, self._head.size)
        except (OSError, DpvsProbeError) as error:
            if fd >= 0:
                os.close(fd)
            if isinstance(error, DpvsProbeError):
                raise
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self._fresh.unlink(missing_ok=True)
            raise StoreUnusable(f"{self._fresh} cannot be made ({self._head.size} bytes): {error.strerror}") from error

    def _all_owed(self) -> bool:
        """Once all sessions of DPVS are in the table, all of them are to be written; whether that is so."""
        if not self._owed and self._table.complete:
            self._owed = True
            self._dirty.owe(self._table.shared)
        return self._owed

    def _write(self, most: int) -> None:
        slots = self._dirty.take(most)
        if len(slots) == 0:
            return
        numbers = np.unique(slots // PER_BLOCK)
        self._generation += 1
        for first in range(0, len(numbers), AT_ONCE):
            self._write_blocks(numbers[first : first + AT_ONCE])

    def _write_blocks(self, numbers: Slots) -> None:
        neighbours = (numbers[:, None] * PER_BLOCK + np.arange(PER_BLOCK)).ravel()
        inside = neighbours < self._head.slots
        neighbours[~inside] = 0
        present = self._table.shared[neighbours] & inside
        rows = words(self._table.rows(neighbours))
        self._put(numbers, pack_blocks(numbers, rows, present, self._generation, self._head.epoch))

    def _put(self, numbers: Slots, pages: Words) -> None:
        self._pages[FIRST_BLOCK + 2 * numbers + self._place[numbers]] = pages
        self._place[numbers] ^= 1
        self.written += len(numbers)

    def _stamp(self, at: Instant, *, ended: bool) -> None:
        self._stamps += 1
        self.sessions = int(np.count_nonzero(self._table.shared))
        stamp = Stamp(self._stamps, at, self.sessions, ended)
        self._pages[FIRST_STAMP + self._stamps % 2] = pack_stamp(stamp, self._head.epoch)[0]

    def _finish(self, at: Instant) -> None:
        """All sessions are in it: from now on it is the store."""
        self._stamp(at, ended=False)
        if self._flusher:
            self._map.flush()
        os.replace(self._fresh, self.path)
        self.whole = True
