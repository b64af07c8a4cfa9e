# SPDX-License-Identifier: GPL-2.0-or-later
"""Queue pairs without RDMA: two in one process, joined by the event loop.

They are as strict as a device: memory is read when a write is carried out and not when it is asked for, what came is
told of once after each ``rearm`` and what was written not at all, a write without a receive for it or to a queue pair
that is gone breaks both.
"""

import asyncio
import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar

from replicator.transport.exchange import Side
from replicator.transport.slots import QueueDown
from replicator.transport.verbs import SPARE_RECEIVES, Device

DEVICE = Device("simulated")


class SimulatedQueue:
    """As ``slots.Queue`` says."""

    alive: ClassVar[dict[int, "SimulatedQueue"]] = {}
    made: ClassVar[int] = 0
    crashes: ClassVar[int] = 0  # uses after close

    def __init__(self, device: Device, *, like: bytes | None = None, slots: int = 8, delay_s: float = 0) -> None:
        assert device == DEVICE
        self.slots, self.slot_bytes = slots, 64 << 10
        self._memory = bytearray(slots * self.slot_bytes)
        self.ring = memoryview(self._memory)
        self.staging = memoryview(b"")
        self.peer_slots = self.peer_slot_bytes = self.written = self.words_out = 0
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.receives = slots + SPARE_RECEIVES
        self.words_said = 0
        self._inbox: deque[int] = deque()
        self._outbox: deque[tuple[int | None, int]] = deque()
        self._carried_out = self._words_carried_out = 0
        self._armed, self._broken, self._delay_s = False, "", delay_s
        SimulatedQueue.made += 1
        self._number = SimulatedQueue.made
        self.alive[self._number] = self
        self._peer_number = 0
        self.rearm()

    def side(self, epoch: int = 0, offer: bytes = b"") -> Side:
        return Side(bytes(16), self._number, 0, 0, 5, 0, 0, self.slots, self.slot_bytes, epoch, offer)

    def connect(self, peer: Side) -> None:
        self._peer_number = peer.qp
        self.peer_slots, self.peer_slot_bytes = peer.slots, peer.slot_bytes
        self.staging = memoryview(bytearray(peer.slots * peer.slot_bytes))

    def write(self, number: int, lengths: Sequence[int]) -> None:
        if self._broken:
            raise QueueDown(self._broken)
        for slot, length in enumerate(lengths, number):
            assert length <= self.peer_slot_bytes
            self._outbox.append((slot, length))
        self._later()

    def say(self, word: int) -> None:
        if self._broken:
            raise QueueDown(self._broken)
        self.words_out += 1
        self.words_said += 1
        self._outbox.append((None, word))
        self._later()

    def poll(self) -> list[int]:
        self._must_be_alive()
        self.written = self._carried_out
        self.words_out = self.words_said - self._words_carried_out
        words = list(self._inbox)
        self._inbox.clear()
        self.receives += len(words)
        if self._broken and not words:
            raise QueueDown(self._broken)
        return words

    def rearm(self) -> None:
        self._must_be_alive()
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        self._armed = True

    def close(self) -> None:
        if self.alive.pop(self._number, None):
            self._broken = "closed"
            os.close(self.fd)

    def _must_be_alive(self) -> None:
        if self._number not in self.alive:
            SimulatedQueue.crashes += 1
            raise QueueDown("a device would have crashed")

    def fail(self, why: str) -> None:
        """Break, as when the device gives up."""
        self._broken = self._broken or why
        self._completed()

    def _later(self) -> None:
        loop = asyncio.get_running_loop()
        if self._delay_s:
            loop.call_later(self._delay_s, self._carry_out)
        else:
            loop.call_soon(self._carry_out)

    def _carry_out(self) -> None:
        while self._outbox and not self._broken:
            peer = self.alive.get(self._peer_number)
            if peer is None:
                self.fail("no answer from its RDMA device")
                return
            slot, value = self._outbox.popleft()
            peer.receives -= 1
            if peer.receives < 0:
                peer.fail("no receive for what came")
                self.fail("the peer has no receive")
                return
            if slot is not None:
                start = slot % self.peer_slots * self.peer_slot_bytes
                peer.ring[start : start + value] = self.staging[start : start + value]
                self._carried_out = slot + 1
            else:
                self._words_carried_out += 1
            peer._inbox.append(value)
            peer._completed()

    def _completed(self) -> None:
        if self._armed and self._number in self.alive:
            self._armed = False
            os.eventfd_write(self.fd, 1)
