# SPDX-License-Identifier: GPL-2.0-or-later
"""Engines that talk to each other, and to nobody."""

from collections.abc import Iterable

from replicator.codec import Buffer
from replicator.link import Receiver, Sender
from replicator.wire import FrameReader
from tests.fuzz.judge import Finding
from tests.fuzz.targets.frames import parse

MS = 1_000_000
ROUNDS = 50
SOMETIMES = 4  # an honest peer, who costs more than the input, comes after one of so many


def readable(outgoing: Iterable[Buffer]) -> int:
    """What an engine says must be whole frames that its peer can read; how many bytes they are."""
    reader, size = FrameReader(), 0
    for frame in outgoing:
        reader.feed(frame)
        size += len(frame)
    while (found := reader.next()) is not None:
        parse(found)
    if reader.buffered:
        raise Finding("an engine said less than a frame")
    return size


def converse(sender: Sender, receiver: Receiver, now_ns: int) -> None:
    """Carry bytes between two engines that are connected, until neither has anything to say."""
    for _ in range(ROUNDS):
        now_ns += MS
        there, back = sender.outgoing(now_ns), receiver.outgoing(now_ns)
        for frame in there:
            receiver.receive(frame, now_ns)
        for frame in back:
            sender.receive(frame, now_ns)
        if not there and not back:
            return
