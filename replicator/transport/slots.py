# SPDX-License-Identifier: GPL-2.0-or-later
"""A stream of bytes through rings of slots that the other side writes to: how RDMA carries a connection.

Rules
- Each side has a ring of slots in registered memory. The peer writes slot after slot into it, each with an immediate
  word: the number of bytes.
- What is sent is put together in slots of our own, registered as well, one for each of the peer's, and written from
  there: frames are copied once, or sealed straight into their slot.
- A credit, an immediate word of its own, says how many slots were read so far, modulo 2^31. One goes out for each
  quarter of the ring that was read and for nothing else: a credit that answered a credit would never come to rest.
- A slot is free again, here and there, when a credit says that the peer has read it. What the device says of its writes
  wakes nobody: half of all wake-ups would be for that. It is looked at in passing.
- The stream over which the connection was set up stays open and carries a heartbeat: its end is the peer's end. The
  orderly end is said there too, with the number of slots: nobody can cut the last ones off.
"""

import asyncio
import logging
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from probes.errors import DpvsProbeError
from replicator.seal import OVERHEAD, Opener, Sealer

from .channel import READ_BYTES, Channel, cut
from .exchange import BadSetup, Kind, Messages, pack, pack_bye, parse_bye
from .interface import PEER_TIMEOUT_S, Connection, LinkLost, Loss

LOOK_S = 0.002
TICK_S = 0.25
BEAT_TICKS = 2  # between two beats of ours
SILENT_TICKS = 11  # without one of the peer's: it is lost, a quarter of a second before PEER_TIMEOUT_S
CREDIT = 1 << 31  # in an immediate word: the rest is a count of slots, else it is the length of one
CREDITS_OUT = 4  # written and not yet taken by the device

log = logging.getLogger(__name__)


class QueueDown(Exception):
    """The queue pair is broken; str() says why."""


class Queue(Protocol):
    """A connected queue pair and its memory; ``rdma.VerbsQueue`` is the real one."""

    fd: int  # readable when something came, or the queue broke, after ``rearm``; not when something was written
    ring: memoryview  # where the peer writes: ``slots`` of ``slot_bytes``
    slots: int
    slot_bytes: int
    staging: memoryview  # where we write from: ``peer_slots`` of ``peer_slot_bytes``
    peer_slots: int
    peer_slot_bytes: int
    written: int  # slots that the peer's device had at the last ``poll``, counted from the beginning
    words_out: int  # words that the peer's device did not have at the last ``poll``

    @abstractmethod
    def write(self, number: int, lengths: Sequence[int]) -> None:
        """Write slots ``number`` (counted from the beginning), ``number + 1``, ... as one chain. Raises QueueDown."""

    @abstractmethod
    def say(self, word: int) -> None:
        """Send an immediate word. Raises QueueDown."""

    @abstractmethod
    def poll(self) -> list[int]:
        """Immediate words that came, in order; sees what was written. Raises QueueDown when there is nothing else."""

    @abstractmethod
    def rearm(self) -> None:
        """Make ``fd`` tell of what comes from now on. Raises QueueDown."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""


class Seals(NamedTuple):
    """What seals the slots that we send and opens those that come, each once and in order."""

    sealer: Sealer
    opener: Opener


class SlotConnection(Channel):
    """One established connection over a ``Queue``."""

    def __init__(
        self,
        queue: Queue,
        stream: Connection,
        seals: Seals | None = None,
        messages: Messages | None = None,
    ) -> None:
        """``messages``: of the set-up over ``stream``, where more may have come already."""
        super().__init__(stream.remote)
        self.stream = stream
        self.node: str | None = getattr(stream, "node", None)  # the peer's name, where the stream has proven it
        self._messages = messages or Messages()
        self._silent = 0  # ticks since the peer's last beat
        self._queue = queue
        self._seals = seals
        self._room_bytes = queue.peer_slot_bytes - (OVERHEAD if seals else 0)
        self._plain = memoryview(bytearray(READ_BYTES + queue.slot_bytes if seals else 0))
        self._posted = self._credit = 0  # slots we wrote, slots that the peer has read
        self._taken = self._credited = 0  # slots we read, slots of which the peer knows that
        self._ready: deque[int] = deque()  # lengths of slots that came and were not read
        self._end_at: int | None = None  # how many slots the peer wrote before it closed
        self._loop.add_reader(queue.fd, self._on_completion)
        self._on_completion()  # what came before anybody looked
        self._watch = asyncio.create_task(self._watch_stream())

    # --- sending -----------------------------------------------------------------------------------------------------

    def _put(self, pending: deque[memoryview]) -> bool:
        took = False
        try:
            while pending:
                count = self._free()
                if count == 0:
                    self._drain()
                    count = self._free()
                    if count == 0:
                        break
                lengths: list[int] = []
                while pending and len(lengths) < count:
                    lengths.append(self._fill(self._posted + len(lengths), pending))
                self._queue.write(self._posted, lengths)
                self._posted += len(lengths)
                took = True
        except (QueueDown, DpvsProbeError) as error:
            self._lose(str(error))
        return took

    def _free(self) -> int:
        """Slots that may be written now, of which a quarter at once: while they travel, the next are filled."""
        slots = self._queue.peer_slots
        free = self._credit + slots - self._posted
        return min(free, slots // 4)

    def _fill(self, number: int, pending: deque[memoryview]) -> int:
        """Move as much as fits into our slot of that number; the length of what is in it then."""
        start = number % self._queue.peer_slots * self._queue.peer_slot_bytes
        slot = self._queue.staging[start : start + self._queue.peer_slot_bytes]
        pieces = cut(pending, self._room_bytes)
        if self._seals is not None:
            return self._seals.sealer.seal_into(pieces[0] if len(pieces) == 1 else b"".join(pieces), slot)
        at = 0
        for piece in pieces:
            slot[at : at + len(piece)] = piece
            at += len(piece)
        return at

    async def _end(self) -> None:
        """Say goodbye, once all slots are there."""
        await self._written()
        if self._lost is None:
            with suppress(LinkLost):
                await self.stream.send([pack_bye(self._posted)])

    async def _written(self) -> None:
        """Wait until the peer's device has all slots. Nothing tells of that."""
        while self._queue.written < self._posted and self._lost is None:
            await asyncio.sleep(LOOK_S)
            self._drain()

    # --- receiving ---------------------------------------------------------------------------------------------------

    def _take(self) -> bytes:
        if not self._ready:
            self._drain()
        slots: list[memoryview] = []
        total = 0
        while self._ready and total < READ_BYTES:
            start = (self._taken + len(slots)) % self._queue.slots * self._queue.slot_bytes
            slots.append(self._queue.ring[start : start + self._ready.popleft()])
            total += len(slots[-1])
        if not slots:
            return b""
        data = b"".join(slots) if self._seals is None else self._open(slots, self._seals.opener)
        self._taken += len(slots)
        self._give_credit()
        return data

    def _open(self, slots: Sequence[memoryview], opener: Opener) -> bytes:
        at = 0
        try:
            for slot in slots:
                at += opener.open_into(slot, self._plain[at:])
        except DpvsProbeError as error:  # what is good of it counts, nothing after it does
            self._lose(str(error), Loss.TAMPERED)
            self._ready.clear()
        return bytes(self._plain[:at])

    def _finished(self) -> bool:
        return self._end_at is not None and self._taken >= self._end_at

    def _give_credit(self) -> None:
        if self._taken - self._credited < self._queue.slots // 4 or self._queue.words_out >= CREDITS_OUT:
            return
        if self._lost is None:
            try:
                self._queue.say(CREDIT | (self._taken & (CREDIT - 1)))
            except QueueDown as error:
                self._lose(str(error))
            self._credited = self._taken

    # --- completions -------------------------------------------------------------------------------------------------

    def _on_completion(self) -> None:
        try:
            self._queue.rearm()
        except QueueDown as error:
            self._down(error)
        self._drain()
        self._wake()

    def _drain(self) -> None:
        """Take in all that completed."""
        try:
            while words := self._queue.poll():
                for word in words:
                    self._on_word(word)
        except (QueueDown, BadSetup) as error:
            self._down(error)
        self._give_credit()

    def _on_word(self, word: int) -> None:
        if word & CREDIT:
            ahead = ((word ^ CREDIT) - self._credit) % CREDIT
            if ahead > self._posted - self._credit:
                raise BadSetup("a credit for slots that were never written")
            self._credit += ahead
        elif word > self._queue.slot_bytes or len(self._ready) >= self._queue.slots:
            raise BadSetup(f"{word} bytes in a slot, behind {len(self._ready)} others")
        else:
            self._ready.append(word)
        self._news.set()

    def _down(self, error: Exception) -> None:
        self._loop.remove_reader(self._queue.fd)
        self._lose(str(error))

    # --- the stream --------------------------------------------------------------------------------------------------

    async def _watch_stream(self) -> None:
        """Until the connection ends: our beats, and the peer's."""
        why, loss = "the peer has ended", Loss.RESET
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._beat())
                group.create_task(self._listen())
        except* (LinkLost, EOFError) as errors:
            log.debug("stream of %s: %s", self.remote, errors.exceptions[0])
        except* BadSetup as errors:
            why = str(errors.exceptions[0])
        except* TimeoutError:
            why, loss = f"no heartbeat for {PEER_TIMEOUT_S} s", Loss.SILENT
        if not self._released:
            self._drain()  # the peer's last slots were there before it said goodbye, or was gone
            self._lose(why, loss)
            self._wake()

    async def _beat(self) -> None:
        # Turns of this loop are counted, not seconds: one that was held up itself has not looked for what came either.
        while True:
            await self.stream.send([pack(Kind.BEAT)])
            for _ in range(BEAT_TICKS):
                await asyncio.sleep(TICK_S)
                if self._released:  # cancelled, but not yet told so
                    return
                self._drain()  # for a credit that had to wait for others to be written
                self._silent += 1
                if self._silent >= SILENT_TICKS:
                    raise TimeoutError

    async def _listen(self) -> None:
        while True:
            while message := self._messages.next():
                if message.kind is Kind.BYE:
                    self._end_at = parse_bye(message.body)
                elif message.kind is not Kind.BEAT:
                    raise BadSetup(f"{message.kind.name} on a connection that is set up")
                self._silent = 0
            data = await self.stream.receive()
            if not data:
                raise EOFError
            self._messages.feed(data)

    def _release(self) -> None:
        self._watch.cancel()
        self._loop.remove_reader(self._queue.fd)
        self._queue.close()

    async def close(self) -> None:
        """Send what is buffered as far as a second allows, then end. Safe to call twice; raises nothing."""
        await super().close()
        await self.stream.close()
