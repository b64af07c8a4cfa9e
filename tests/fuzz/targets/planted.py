# SPDX-License-Identifier: GPL-2.0-or-later
"""No decoder of ours: one with a fault that only who follows the branches finds, to see that faults are found."""

from collections.abc import Iterable

from replicator.wire import FrameReader, Opcode, ProtocolError
from tests.fuzz.judge import SLACK_BYTES, only

MAX_BYTES = 64
WORDS = (b"DP\x01",)


def seeds() -> Iterable[bytes]:
    yield b"a seed that is no frame"


def bound(data: bytes) -> int:
    return SLACK_BYTES


def check(data: bytes) -> None:
    reader = FrameReader()
    reader.feed(data)
    with only(ProtocolError):
        while (frame := reader.next()) is not None:
            if frame.opcode is Opcode.ACK:
                frame.body[0]  # an ACK has none
