# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/link.py, Sender: whatever a receiver may answer, while sessions come and go.

Afterwards an honest receiver must get all there is.
"""

import zlib
from collections.abc import Iterable

import numpy as np

from collector.table import SessionTable
from replicator import wire
from replicator.link import LinkSettings, Receiver, Sender
from replicator.replica import Replicas
from replicator.wire import Hello, Opcode, Role
from tests.fuzz import frames
from tests.fuzz.frames import SLOTS, Step
from tests.fuzz.judge import must
from tests.fuzz.mutation import resize
from tests.fuzz.talk import MS, SOMETIMES, converse, readable
from tests.unit.session_records import sessions

MAX_BYTES = 4096
WORDS = ()
FEED, WAIT, RECONNECT, CHANGE, KINDS = 0, 1, 2, 3, 4
SETTINGS = LinkSettings(body_bytes=2048, window_bytes=8192, window_frames=16, compress=True)

_ME = Hello("lb-a", 7, Role.SENDER, SLOTS, instance=5)
_HELLO = frames.hello("lb-b", Role.RECEIVER, replica=1)
_SPARES = [
    _HELLO, frames.hello("lb-b", Role.RECEIVER, replica=2), frames.hello("lb-b", Role.RECEIVER, epoch=8),
    *(wire.pack(Opcode.ACK, number) for number in (1, 2, 3, 4, 5, 8)), *frames.small_frames(),
]  # fmt: skip


def seeds() -> Iterable[bytes]:
    acks = [Step(FEED, wire.pack(Opcode.ACK, number)) for number in range(1, 5)]
    change = Step(CHANGE, bytes([0, 20, 1, 5]))
    yield frames.pack_steps(
        [change, Step(FEED, _HELLO), *acks, Step(CHANGE, bytes([10, 4, 0, 9])), Step(WAIT, b"\xc8\0")]
    )
    yield frames.pack_steps(
        [Step(FEED, _HELLO + acks[1].payload), change, acks[3], Step(RECONNECT, b""), Step(FEED, _HELLO)]
    )
    yield frames.pack_steps(
        [Step(FEED, _HELLO), Step(FEED, wire.pack_resync(wire.SyncReason.GAP)), acks[2], change, *acks]
    )
    yield frames.pack_steps([Step(FEED, wire.pack_refuse(wire.Reason.SCHEMA, "another release")), Step(RECONNECT, b"")])


def bound(data: bytes) -> int:
    # Table and replica, mostly what blocks are compared in; a window of frames, packed and to be packed; what is read.
    return (1 << 20) + SLOTS * 1024 + 4 * SETTINGS.window_bytes + 64 * len(data)


def check(data: bytes) -> None:
    now = 10**12
    table = SessionTable(SLOTS)
    table.complete = True
    sender = Sender(table, table.add_peer("lb-b"), _ME, SETTINGS)
    sender.connected(now)
    for step in frames.parse_steps(data, KINDS):
        now += MS
        if step.kind == FEED:
            sender.receive(step.payload, now)
        elif step.kind == WAIT:
            now += int.from_bytes(step.payload[:2], "little") * MS
        elif step.kind == CHANGE:
            change(table, step.payload, now)
        else:
            sender.connected(now)
        said = readable(sender.outgoing(now))
        must(said <= SETTINGS.window_bytes + 2 * SETTINGS.body_bytes, "no more than a window is said at once")
        must(sender.in_flight <= SETTINGS.window_frames + 2, "no more than a window is in flight")
        must(sender._acknowledged <= sender._sequence, "nothing is acknowledged that was not sent")
        must(0 <= sender.pending <= SLOTS, "no slot waits twice")
        while sender.next_event():
            pass
        sender.report()
        sender.next_deadline(now)
    if zlib.crc32(data) % SOMETIMES == 0:
        honest(table, sender, now)


def change(table: SessionTable, payload: bytes, now: int) -> None:
    """Sessions that come, change and go: first slot, how many, whether they are there, what they carry."""
    first, count, present, value = (payload + bytes(4))[:4]
    slots = np.arange(first % SLOTS, min(first % SLOTS + count % 32 + 1, SLOTS))
    records = sessions(len(slots), first=first % SLOTS, ipv6=bool(value & 1))
    records["fnat_isn"] = value
    table.apply(slots, records, np.full(len(slots), present & 1, np.bool_), now)


def honest(table: SessionTable, sender: Sender, now: int) -> None:
    """A receiver of a run that is not known yet is told everything."""
    sender.connected(now)
    receiver = Receiver(Replicas(Hello("lb-z", 1 << 63, Role.RECEIVER, instance=1)), now_ns=now)
    converse(sender, receiver, now)
    must(sender.settled and receiver.replica is not None, "an honest receiver is told")
    must(receiver.replica is not None and receiver.replica.digest() == table.digest(), "all there is")


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    return frames.mutate_steps(data, longest, seed, resize, kinds=KINDS, feeds=FEED, spares=_SPARES)
