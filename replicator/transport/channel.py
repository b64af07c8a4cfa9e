# SPDX-License-Identifier: GPL-2.0-or-later
"""What connections over memory have in common: waiting for room and for news, the end, and the loss of the peer.

Rules
- What ``send`` cannot hand over at once waits here, that call's frames and no more, and goes on by itself as room
  comes, even if the call is cancelled meanwhile: the stream of bytes never has a hole.
- A peer that takes nothing for ``PEER_TIMEOUT_S`` while something waits for it is lost, as with TCP_USER_TIMEOUT.
- What came before the peer was lost is handed out before the loss is raised.
- There is always more to read when a peer is quick, so every couple of milliseconds the event loop gets its turn.
"""

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable

from .interface import PEER_TIMEOUT_S, LinkLost, Loss, Way

READ_BYTES = 256 << 10
FEW = 3  # pieces that are copied one by one; more are joined first...
SMALL_BYTES = 8 << 10  # ... if they are smaller than that on the average
CLOSE_S = 1.0
TURN_S = 0.002


class Channel(ABC):
    """A ``Connection``, but for how bytes get into and out of memory. Made inside the event loop that uses it."""

    def __init__(self, remote: str) -> None:
        self.remote = remote
        self.node: str | None = None
        self.bytes_sent = 0
        self.bytes_received = 0
        self._loop = asyncio.get_running_loop()
        self._pending: deque[memoryview] = deque()
        self._room, self._news = asyncio.Event(), asyncio.Event()
        self._lost: str | None = None
        self._loss = Loss.RESET
        self._closing = self._released = False
        self._moved = self._turn = self._loop.time()

    async def send(self, frames: Iterable[bytes | memoryview]) -> None:
        """Hand frames over, in order; returns when there is room for more. Raises LinkLost."""
        self._check()
        if not self._pending:
            self._moved = self._loop.time()
        pieces = list(frames)
        if len(pieces) > FEW and sum(map(len, pieces)) < SMALL_BYTES * len(pieces):
            pieces = [b"".join(pieces)]
        for frame in pieces:
            view = memoryview(frame)
            if size := view.nbytes:
                self._pending.append(view if view.format == "B" and view.ndim == 1 else view.cast("B"))
                self.bytes_sent += size
        self._pump()
        while self._pending:
            self._check()
            await self._wait_for_room()
        await self._give_turn()

    async def receive(self) -> bytes:
        """What has come, at least one byte, not cut at frames; b"" when the peer closed in order. Raises LinkLost."""
        await self._give_turn()  # before anything is taken: cancelled here, nothing is lost
        while True:
            self._news.clear()
            data = b"" if self._released else self._take()
            if data:
                self.bytes_received += len(data)
                return data
            if self._closing or self._finished():
                return b""
            self._check()
            await self._news.wait()
            self._turn = self._loop.time()

    async def close(self) -> None:
        """Send what is buffered as far as a second allows, then end. Safe to call twice; raises nothing."""
        if self._closing:
            return
        self._closing = True
        self._news.set()
        try:
            async with asyncio.timeout(CLOSE_S):
                while self._pending and self._lost is None:
                    await self._wait_for_room()
                if self._lost is None:
                    await self._end()
        except TimeoutError:
            pass
        finally:
            self._lose("closed here")
            self._released = True
            self._release()

    def on_the_way(self) -> Way:
        """Nothing: shared memory and RDMA are faster than anything LZ4 could do for them."""
        return Way(0, 0)

    # --- what a transport has to say ---------------------------------------------------------------------------------

    @abstractmethod
    def _put(self, pending: deque[memoryview]) -> bool:
        """Take from the left what there is room for; whether anything was. If some is left, ``_wake`` comes later."""

    @abstractmethod
    def _take(self) -> bytes:
        """What has come, READ_BYTES or little more; if that is nothing, ``_wake`` is called when something comes."""

    @abstractmethod
    def _finished(self) -> bool:
        """The peer closed in order, and all it sent was taken."""

    @abstractmethod
    async def _end(self) -> None:
        """Tell the peer that nothing more comes; all that was put reaches it although we are gone afterwards."""

    @abstractmethod
    def _release(self) -> None:
        """Give back memory and descriptors."""

    # --- for transports ----------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """There may be room or news, or the peer may be gone."""
        if not self._released:
            self._pump()
        self._news.set()

    def _lose(self, why: str, loss: Loss = Loss.RESET) -> None:
        """The peer is gone; the first reason counts."""
        if self._lost is None:
            self._lost, self._loss = why, loss
        self._room.set()
        self._news.set()

    # --- here --------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._lost is not None:
            raise LinkLost(self.remote, self._lost, self._loss)

    def _pump(self) -> None:
        if self._pending and self._lost is None and self._put(self._pending):
            self._moved = self._loop.time()
        if not self._pending:
            self._room.set()

    async def _wait_for_room(self) -> None:
        self._room.clear()
        left = self._moved + PEER_TIMEOUT_S - self._loop.time()
        if left <= 0:
            self._lose(f"it took nothing for {PEER_TIMEOUT_S} s", Loss.SILENT)
            return
        try:
            async with asyncio.timeout(left):
                await self._room.wait()
        except TimeoutError:
            self._pump()
        self._turn = self._loop.time()

    async def _give_turn(self) -> None:
        now = self._loop.time()
        if now - self._turn > TURN_S:
            self._turn = now
            await asyncio.sleep(0)


def cut(pending: deque[memoryview], most: int) -> list[memoryview]:
    """Take up to ``most`` bytes from the left, in few pieces: many small ones are joined."""
    pieces: list[memoryview] = []
    while pending and most:
        first = pending[0]
        if len(first) > most:
            pending[0] = first[most:]
            first = first[:most]
        else:
            pending.popleft()
        pieces.append(first)
        most -= len(first)
    return pieces if len(pieces) <= FEW else [memoryview(b"".join(pieces))]
