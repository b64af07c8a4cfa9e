# SPDX-License-Identifier: GPL-2.0-or-later
"""A ring of bytes in memory that two processes share: one writes, the other reads.

Rules: positions count bytes since the beginning and are words of 8 bytes, each written by one side only, with one
aligned store. x86_64 keeps stores in order, so what lies before a position is there when the position is; only "I am
about to sleep" needs a fence (a store must be seen before another word is read). Each side trusts its own copy of its
position and checks the other's: a peer that breaks the rules breaks the link and nothing else. Nothing here waits.
"""

import threading

WORD_BYTES = 8
CONTROL_BYTES = 320  # five words, each on a cache line of its own
_HEAD, _TAIL, _WRITER_SLEEPS, _READER_SLEEPS, _ENDED = 0, 8, 16, 24, 32

_lock = threading.Lock()


class BrokenRing(Exception):
    """The positions in shared memory make no sense."""


def fence() -> None:
    """Everything stored before is visible to others before anything after is loaded: a locked instruction does it."""
    _lock.acquire()
    _lock.release()


class _Side:
    """``control``: CONTROL_BYTES of zeros to begin with; ``data``: a power of two of bytes."""

    def __init__(self, control: memoryview, data: memoryview) -> None:
        if len(control) != CONTROL_BYTES or len(data) & (len(data) - 1):
            raise ValueError("a ring has CONTROL_BYTES of control and a power of two of data")
        self._words = control.cast("Q")
        self._data = data
        self._at = self._shown = 0  # our own position, and what the other side knows of it
        self.size = len(data)

    def release(self) -> None:
        """Let go of the memory."""
        self._words.release()
        self._data.release()

    def _distance(self, ahead: int, behind: int) -> int:
        distance = ahead - behind
        if not 0 <= distance <= self.size:
            raise BrokenRing(f"positions {behind} and {ahead} in a ring of {self.size} bytes")
        return distance

    def _roused(self, word: int) -> bool:
        fence()
        if not self._words[word]:
            return False
        self._words[word] = 0
        return True


class Writer(_Side):
    """The side that writes."""

    def room(self) -> int:
        """Bytes that can be written now. Raises BrokenRing."""
        return self.size - self._distance(self._at, self._words[_TAIL])

    def write(self, data: memoryview) -> None:
        """Copy in what fits in ``room``; the reader sees it after ``publish``."""
        start = self._at & (self.size - 1)
        first = min(len(data), self.size - start)
        self._data[start : start + first] = data[:first]
        if first < len(data):
            self._data[: len(data) - first] = data[first:]
        self._at += len(data)

    @property
    def unseen(self) -> int:
        """Bytes written since the last ``publish``."""
        return self._at - self._shown

    def publish(self) -> bool:
        """Show the reader what was written; whether it sleeps and must be woken."""
        self._words[_HEAD] = self._shown = self._at
        return self._roused(_READER_SLEEPS)

    def end(self) -> bool:
        """Nothing more comes; whether the reader must be woken."""
        self._words[_ENDED] = 1
        return self._roused(_READER_SLEEPS)

    def sleep(self) -> None:
        """Ask to be woken when something was read. Look at ``room`` once more afterwards."""
        self._words[_WRITER_SLEEPS] = 1
        fence()


class Reader(_Side):
    """The side that reads."""

    def available(self) -> int:
        """Bytes that can be read now. Raises BrokenRing."""
        return self._distance(self._words[_HEAD], self._at)

    def peek(self, count: int) -> bytes:
        """The next ``count`` of the available bytes, which stay."""
        start = self._at & (self.size - 1)
        if start + count <= self.size:
            return bytes(self._data[start : start + count])
        return b"".join((self._data[start:], self._data[: start + count - self.size]))

    def read(self, count: int) -> bytes:
        """The next ``count`` of the available bytes, a copy; their place is free after ``publish``."""
        data = self.peek(count)
        self._at += count
        return data

    def publish(self) -> bool:
        """Give the place of what was read back; whether the writer sleeps and must be woken."""
        self._words[_TAIL] = self._shown = self._at
        return self._roused(_WRITER_SLEEPS)

    def sleep(self) -> None:
        """Ask to be woken when something is written. Look at ``available`` once more afterwards."""
        self._words[_READER_SLEEPS] = 1
        fence()

    def at_end(self) -> bool:
        """Whether all that is available was read."""
        return bool(self._words[_HEAD] == self._at)

    @property
    def ended(self) -> bool:
        """The writer said that nothing comes after what is available."""
        return bool(self._words[_ENDED])
