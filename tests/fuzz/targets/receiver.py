# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/link.py, Receiver, with replicator/replica.py: whatever a sender may say, over several connections.

Afterwards an honest node must be able to replicate to here as if nothing had happened.
"""

import zlib
from collections.abc import Iterable

import numpy as np

from collector.table import SessionTable
from replicator.link import Receiver, Sender
from replicator.query import describe
from replicator.replica import Replicas
from replicator.wire import Hello, Role
from tests.fuzz import frames
from tests.fuzz.frames import Step
from tests.fuzz.judge import SLACK_BYTES, must
from tests.fuzz.mutation import resize
from tests.fuzz.talk import MS, SOMETIMES, converse, readable
from tests.unit.session_records import sessions

MAX_BYTES = 16 << 10
WORDS = ()
FEED, WAIT, RECONNECT, KINDS = 0, 1, 2, 3
MAX_SLOTS, MAX_ORIGINS = 4096, 3
SLOT_BYTES = 160  # docs/protocol.md, Limits; and what is made for a moment when all of them are looked at
REPLICA_BYTES = 400 << 10  # of one replica, whatever its size

_ME = Hello("lb-b", 9, Role.RECEIVER, instance=3)
_HELLO = frames.hello("lb-a", Role.SENDER)
_SPARES = [
    _HELLO, frames.hello("lb-a", Role.SENDER, epoch=8), frames.hello("lb-c", Role.SENDER, slots=8),
    frames.hello("lb-d", Role.SENDER, slots=MAX_SLOTS), frames.hello("lb-b", Role.SENDER),
    *frames.session_frames(), *frames.small_frames(),
]  # fmt: skip


def seeds() -> Iterable[bytes]:
    small = frames.small_frames()
    sync = [_HELLO, small[0], *frames.session_frames(), small[1]]
    yield frames.pack_steps([Step(FEED, b"".join(sync))])
    yield frames.pack_steps([Step(FEED, frame) for frame in sync])
    later = frames.hello("lb-a", Role.SENDER, epoch=8)
    yield frames.pack_steps(
        [
            Step(FEED, b"".join(sync)),
            Step(WAIT, b"\x10\x00"),
            Step(RECONNECT, b""),
            Step(FEED, later + b"".join(sync[1:])),
        ]
    )
    yield frames.pack_steps([Step(FEED, _HELLO + small[0] + b"".join(frames.session_frames()[2:]) + small[1])])
    yield frames.pack_steps([Step(FEED, _HELLO + small[5]), Step(WAIT, b"\xff\xff"), Step(FEED, small[3])])


def bound(data: bytes) -> int:
    # Replicas by the slots that were agreed to; a read, its frames, what they unpack to, and what is answered to them.
    origins = MAX_ORIGINS + 2
    unpacked = sum(map(len, data.split(b"DP"))) + data.count(b"DP") * (24 << 10)
    return SLACK_BYTES + 2 * origins * (MAX_SLOTS * SLOT_BYTES + REPLICA_BYTES) + 16 * len(data) + unpacked


def check(data: bytes) -> None:
    now = 10**12
    replicas = Replicas(_ME, max_slots=MAX_SLOTS, max_origins=MAX_ORIGINS)
    receiver = Receiver(replicas, now_ns=now)
    for step in frames.parse_steps(data, KINDS):
        now += MS
        if step.kind == FEED:
            receiver.receive(step.payload, now)
        elif step.kind == WAIT:
            now += int.from_bytes(step.payload[:2], "little") * MS
            replicas.age(now)
        else:
            receiver.disconnected(now)
            receiver = Receiver(replicas, now_ns=now)
        readable(receiver.outgoing(now))
        while receiver.next_event():
            pass
        receiver.report()
    receiver.disconnected(now)
    inspect(replicas)
    if zlib.crc32(data) % SOMETIMES == 0:
        honest(replicas, now)


def inspect(replicas: Replicas) -> None:
    """What must hold whatever was said."""
    for replica in replicas:
        present = np.flatnonzero(replica.present)
        must(replica.count == len(present), "count is the number of sessions")
        rows = replica.sessions()
        must((rows["slot"] == present).all(), "a session stands in its slot")
        must(rows["generation"].all(), "a session has a generation")
        must(replica.slots <= MAX_SLOTS, "a pool is no larger than is taken")
        for line in describe(rows[:1], replica.node):
            must(all(text.isprintable() for text in line.values() if isinstance(text, str)), "for people to read")
    must(len(list(replicas)) <= 3 * MAX_ORIGINS, "so many origins are kept")


def honest(replicas: Replicas, now: int) -> None:
    """A node that knows nothing of all this is let in, under a name that is known when there is no room for others."""
    known = next(iter(replicas), None)
    full = len({replica.node_id for replica in replicas}) >= MAX_ORIGINS
    if full and (known is None or known.epoch >= (1 << 64) - 1):
        return
    name, epoch = (known.node, known.epoch + 1) if full and known is not None else ("honest", 1)
    if not full and any(replica.node == name for replica in replicas):
        return
    table = SessionTable(32)
    table.apply(np.arange(20), sessions(20), np.ones(20, np.bool_), now)
    table.complete = True
    sender = Sender(table, table.add_peer("lb-b"), Hello(name, epoch, Role.SENDER, 32, instance=1))
    receiver = Receiver(replicas, now_ns=now)
    sender.connected(now)
    converse(sender, receiver, now)
    must(sender.settled and receiver.replica is not None, "an honest node is let in afterwards")
    must(receiver.replica is not None and receiver.replica.digest() == table.digest(), "and is understood")


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    return frames.mutate_steps(data, longest, seed, resize, kinds=KINDS, feeds=FEED, spares=_SPARES)
