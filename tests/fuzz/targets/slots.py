# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/transport/slots.py: a connection whose peer writes what it likes into our memory, sends what words it
likes, and says what it likes on the stream beside it.

An input is whether slots are sealed u8, and a list of steps.
"""

import asyncio
from collections.abc import Iterable, Sequence
from functools import cache

from replicator.seal import OVERHEAD, Opener, Sealer
from replicator.transport.channel import READ_BYTES
from replicator.transport.exchange import Kind, pack, pack_bye
from replicator.transport.interface import LinkLost
from replicator.transport.slots import CREDIT, Seals, SlotConnection
from tests.fuzz import frames
from tests.fuzz.frames import Step
from tests.fuzz.judge import must, told
from tests.fuzz.mutation import resize

MAX_BYTES = 2048
WORDS = (b"\x00\x00\x00\x80", b"\xff\xff\xff\xff", b"\x00\x10\x00\x00", b"DPRM\x01")
SLOTS, SLOT_BYTES = 4, 4096
WORD, MEMORY, STREAM, GOOD, READ, SEND, END, KINDS = range(8)
OURS, THEIRS = bytes(range(32)), bytes(range(1, 33))


def seeds() -> Iterable[bytes]:
    read, credit = Step(READ, b""), Step(WORD, (CREDIT | 2).to_bytes(4, "little"))
    good = [Step(GOOD, b"a frame"), Step(GOOD, bytes(1000)), read, Step(GOOD, b"x"), read]
    for sealed in (b"\0", b"\1"):
        yield sealed + frames.pack_steps([*good, Step(STREAM, pack(Kind.BEAT) + pack_bye(3)), read])
        yield sealed + frames.pack_steps([Step(SEND, b"\xff\x1f"), credit, Step(SEND, b"\xff\x7f"), read])
        yield sealed + frames.pack_steps([Step(MEMORY, b"\x00some words"), Step(WORD, b"\x10\x00\x00\x00"), read])
        yield sealed + frames.pack_steps([Step(STREAM, pack(Kind.OFFER)), read, Step(END, b""), read])


def bound(data: bytes) -> int:
    # The ring, the staging area, what is opened; what waits to be sent.
    return 4 * (READ_BYTES + SLOTS * SLOT_BYTES) + (1 << 20) + 64 * len(data)


class _Queue:
    """Takes everything at once; gives the words that the peer sent."""

    def __init__(self) -> None:
        self.fd = -1
        self.slots = self.peer_slots = SLOTS
        self.slot_bytes = self.peer_slot_bytes = SLOT_BYTES
        self.ring = memoryview(bytearray(SLOTS * SLOT_BYTES))
        self.staging = memoryview(bytearray(SLOTS * SLOT_BYTES))
        self.written = self.words_out = 0
        self.words: list[int] = []
        self.said: list[int] = []

    def write(self, number: int, lengths: Sequence[int]) -> None:
        must(number == self.written, "slots are written in order")
        must(all(0 < length <= SLOT_BYTES for length in lengths), "and no more of them than there is")
        self.written += len(lengths)

    def say(self, word: int) -> None:
        self.said.append(word)

    def poll(self) -> list[int]:
        words, self.words = self.words, []
        return words

    def rearm(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Stream:
    """The connection beside it."""

    remote = "10.9.8.2:40000"
    node: str | None = None
    bytes_sent = bytes_received = 0

    def __init__(self) -> None:
        self.heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def send(self, frames: Iterable[bytes | memoryview]) -> None:
        pass

    async def receive(self) -> bytes:
        return await self.heard.get()

    async def close(self) -> None:
        pass

    def on_the_way(self) -> None:
        return None


class _Connection(SlotConnection):
    """One that can be driven without descriptors."""

    def happened(self) -> None:
        self._on_completion()

    def over(self) -> None:
        self._lose("over")


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    loop.add_reader = loop.remove_reader = lambda *_: False  # type: ignore[method-assign, assignment]
    return loop


def check(data: bytes) -> None:
    _loop().run_until_complete(_check(data))


async def _check(data: bytes) -> None:
    queue, stream = _Queue(), _Stream()
    sealed = bool(data[:1] and data[0] & 1)
    sealer = Sealer(THEIRS, rekey_frames=3)
    connection = _Connection(queue, stream, Seals(Sealer(OURS), Opener(THEIRS)) if sealed else None)
    number = sending = 0
    for kind, payload in frames.parse_steps(data[1:], KINDS):
        if kind == WORD:
            queue.words.append(int.from_bytes(payload[:4], "little"))
            number += not queue.words[-1] & CREDIT
        elif kind == MEMORY:
            at = (payload[:1] or b"\0")[0] * 61 % (SLOTS * SLOT_BYTES)
            piece = payload[1:][: SLOTS * SLOT_BYTES - at]
            queue.ring[at : at + len(piece)] = piece
        elif kind == GOOD:
            content = payload[: SLOT_BYTES - OVERHEAD] or b"x"
            content = sealer.seal(content) if sealed else content
            at = number % SLOTS * SLOT_BYTES
            queue.ring[at : at + len(content)] = content
            queue.words.append(len(content))
            number += 1
        elif kind in (STREAM, END):
            await stream.heard.put(payload if kind == STREAM else b"")
        elif kind == READ:
            await _read(connection)
        elif sending < 8:
            sending += 1
            await _send(connection, int.from_bytes(payload[:2], "little"))
        connection.happened()
        for _ in range(3):
            await asyncio.sleep(0)
        must(len(connection._ready) <= SLOTS, "no more slots wait than there are")
        must(len(queue.said) <= number // (SLOTS // 4) + 1, "a credit for a quarter of the ring, and for nothing else")
    connection.over()
    await connection.close()


async def _read(connection: SlotConnection) -> None:
    try:
        async with asyncio.timeout(0):
            found = await connection.receive()
    except TimeoutError:
        return
    except LinkLost as error:
        told(error)
        return
    must(len(found) <= READ_BYTES + SLOTS * SLOT_BYTES, "no more than there was")


async def _send(connection: SlotConnection, size: int) -> None:
    try:
        async with asyncio.timeout(0):
            await connection.send([bytes(size), b"and more"])
    except TimeoutError:
        return
    except LinkLost as error:
        told(error)


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    spares = [
        word.to_bytes(4, "little") for word in (0, 1, SLOT_BYTES, SLOT_BYTES + 1, CREDIT, CREDIT | 1, (1 << 32) - 1)
    ]
    steps = frames.mutate_steps(data[1:], longest - 1, seed, resize, kinds=KINDS, feeds=KINDS, spares=spares)
    return (data[:1] or b"\0") + steps
