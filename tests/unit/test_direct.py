# SPDX-License-Identifier: GPL-2.0-or-later
"""A link over a connection that can be written to and heard from without a task's turn."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable

import numpy as np
import pytest

from collector.table import SessionTable
from replicator.link import Receiver, Sender, State
from replicator.links import Outbound
from replicator.replica import Replicas
from replicator.transport.interface import Backoff, LinkLost, Loss, Way
from replicator.wire import Hello, Role
from tests.unit.session_records import sessions

SLOTS = 100


class Wire:
    """One end of a connection; at the other end is a receiver that answers when it is told to."""

    remote, node = "there", None

    def __init__(self) -> None:
        self.bytes_sent = self.bytes_received = 0
        self.roomy = True
        self.broken = False
        self.direct: list[bytes] = []
        self.replicas = Replicas(Hello("b", 1, Role.RECEIVER))
        self.receiver = Receiver(self.replicas, now_ns=time.monotonic_ns())
        self._hear: Callable[[bytes], None] | None = None
        self._over = asyncio.Event()

    def send_now(self, frames: Iterable[bytes | memoryview]) -> None:
        if self.broken:
            raise LinkLost("there", "it is broken", Loss.RESET)
        data = b"".join(frames)
        self.direct.append(data)
        self.receiver.receive(data, time.monotonic_ns())

    async def send(self, frames: Iterable[bytes | memoryview]) -> None:
        if self.broken:
            raise LinkLost("there", "it is broken", Loss.RESET)
        self.receiver.receive(b"".join(frames), time.monotonic_ns())

    def deliver(self, hear: Callable[[bytes], None] | None) -> None:
        self._hear = hear

    def answer(self) -> None:
        frames = self.receiver.outgoing(time.monotonic_ns())
        if frames and self._hear is not None:
            self._hear(b"".join(frames))

    async def receive(self) -> bytes:
        await self._over.wait()
        return b""

    async def close(self) -> None:
        self._over.set()

    def on_the_way(self) -> Way | None:
        return None


class World:
    """A table, and a link whose dialer gives such wires."""

    address = "there:1"

    def __init__(self) -> None:
        self.table = SessionTable(SLOTS)
        self.table.complete = True
        sender = Sender(self.table, self.table.add_peer("b"), Hello("a", 1, Role.SENDER, SLOTS))
        self.wires: list[Wire] = []
        self.link = Outbound(self, sender, time.monotonic_ns, Backoff(0.001, 0.01))

    async def dial(self) -> Wire:
        self.wires.append(Wire())
        return self.wires[-1]

    def change(self, slot: int, port: int) -> bool:
        """A session is there; whether the peer was told of it at once."""
        rows = sessions(1)
        rows["slot"], rows["cport"] = slot, port
        self.table.apply(np.array([slot]), rows, np.ones(1, np.bool_), time.monotonic_ns())
        return self.link.poke()

    async def quiet(self) -> Wire:
        """The wire, once all is told and acknowledged."""
        while not self.wires or self.link.sender.state is not State.LIVE or not self.link.sender.settled:
            if self.wires:
                self.wires[-1].answer()
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)  # the task waits again
        return self.wires[-1]


def linked(body: Callable[[World], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        world = World()
        running = asyncio.create_task(world.link.run())
        try:
            async with asyncio.timeout(20):
                await body(world)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(all_of_it())


def count(wire: Wire) -> int:
    return sum(len(replica) for replica in wire.replicas)


def test_told_before_poke_returns_and_answered_in_the_same_breath() -> None:
    async def body(world: World) -> None:
        wire = await world.quiet()
        before = len(wire.direct)
        assert world.change(1, 1001)
        assert count(wire) == 1
        assert len(wire.direct) == before + 1
        assert world.change(2, 1002)  # one frame is on its way: this change waits for its acknowledgement
        assert count(wire) == 1
        wire.answer()
        assert count(wire) == 2
        wire.answer()
        assert world.link.sender.settled

    linked(body)


def test_without_room_the_task_does_it() -> None:
    async def body(world: World) -> None:
        wire = await world.quiet()
        wire.roomy, before = False, len(wire.direct)
        assert not world.change(1, 1001)
        assert count(wire) == 0
        while not count(wire):
            await asyncio.sleep(0.001)
        assert len(wire.direct) == before

    linked(body)


def test_a_change_that_waits_for_others_goes_in_time() -> None:
    async def body(world: World) -> None:
        wire = await world.quiet()
        world.change(1, 1001)
        world.change(2, 1002)  # nobody acknowledges the first, and nobody pokes again
        while count(wire) < 2:
            await asyncio.sleep(0.005)

    linked(body)


def test_a_break_ends_the_link_and_the_next_one_goes_on() -> None:
    async def body(world: World) -> None:
        wire = await world.quiet()
        wire.broken = True
        world.change(1, 1001)
        while len(world.wires) < 2:
            await asyncio.sleep(0.001)
        wire = await world.quiet()
        assert count(wire) == 1
        assert world.link.counters["lost_reset"] == 1

    linked(body)


def test_a_fault_of_ours_ends_the_link_only(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async def body(world: World) -> None:
        wire = await world.quiet()
        with monkeypatch.context() as patch:
            patch.setattr(world.link.sender, "receive", lambda data, now_ns: 1 // 0)
            world.change(1, 1001)
            wire.answer()
            while len(world.wires) < 2:
                await asyncio.sleep(0.001)
        assert count(await world.quiet()) == 1
        assert "reading from there failed" in caplog.text

    linked(body)
