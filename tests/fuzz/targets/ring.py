# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/transport/ring.py: a ring whose other side writes whatever it likes into the control words.

An input is a list of steps: the peer sets a word (which, value u64), we read so much, we write so much.
"""

import struct
from collections.abc import Iterable

from replicator.transport.ring import CONTROL_BYTES, BrokenRing, Reader, Writer
from tests.fuzz import frames
from tests.fuzz.frames import Step
from tests.fuzz.judge import SLACK_BYTES, must, told
from tests.fuzz.mutation import resize

MAX_BYTES = 1024
WORDS = (b"\xff" * 8, b"\x00\x10\x00\x00\x00\x00\x00\x00", b"\x01\x10\x00\x00\x00\x00\x00\x00")
SIZE = 4096
LINE = 64  # bytes from one word to the next
SET_OURS, SET_THEIRS, READ, WRITE, KINDS = range(5)
_WORD = struct.Struct("<BQ")


def seeds() -> Iterable[bytes]:
    steps = [Step(SET_THEIRS, _WORD.pack(0, 100)), Step(READ, b"\x40\x00"), Step(READ, b"\xff\x0f")]
    steps += [Step(SET_THEIRS, _WORD.pack(0, 4196)), Step(READ, b"\xff\xff"), Step(SET_THEIRS, _WORD.pack(4, 1))]
    yield frames.pack_steps(steps)
    steps = [Step(WRITE, b"\xff\x0f"), Step(SET_OURS, _WORD.pack(1, 4000)), Step(WRITE, b"\xff\x07")]
    yield frames.pack_steps([*steps, Step(SET_OURS, _WORD.pack(3, 1)), Step(WRITE, b"\x01\x00")])
    yield frames.pack_steps([Step(SET_THEIRS, _WORD.pack(0, (1 << 64) - 1)), Step(READ, b"\x01\x00")])


def bound(data: bytes) -> int:
    return SLACK_BYTES + 4 * SIZE + 8 * len(data)


def check(data: bytes) -> None:
    out, into = (bytearray(CONTROL_BYTES), bytearray(SIZE)), (bytearray(CONTROL_BYTES), bytearray(SIZE))
    writer = Writer(memoryview(out[0]), memoryview(out[1]))
    reader = Reader(memoryview(into[0]), memoryview(into[1]))
    written = taken = 0
    for kind, payload in frames.parse_steps(data, KINDS):
        amount = int.from_bytes(payload[:2], "little")
        try:
            if kind in (SET_OURS, SET_THEIRS):
                which, value = _WORD.unpack((payload + bytes(9))[:9])
                control = (out if kind == SET_OURS else into)[0]
                control[LINE * (which % 5) : LINE * (which % 5) + 8] = value.to_bytes(8, "little")
            elif kind == READ:
                available = reader.available()
                must(0 <= available <= SIZE, "no more can be there than fits")
                found = reader.read(min(available, amount))
                must(len(found) == min(available, amount), "as much as was asked for")
                taken += len(found)
                reader.publish()
                must(int.from_bytes(into[0][LINE : LINE + 8], "little") == taken, "our position is what we have read")
                must(reader.at_end() in (True, False) and reader.ended in (True, False), "ended or not")
            else:
                room = writer.room()
                must(0 <= room <= SIZE, "no more room than there is memory")
                size = min(room, amount)
                writer.write(memoryview(bytes(size)))
                written += size
                writer.publish()
                must(int.from_bytes(out[0][:8], "little") == written, "our position is what we have written")
        except BrokenRing as error:
            told(error)
    writer.release()
    reader.release()


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    spares = [_WORD.pack(0, 1), _WORD.pack(1, SIZE), _WORD.pack(0, (1 << 64) - 1), _WORD.pack(1, 1 << 63)]
    return frames.mutate_steps(data, longest, seed, resize, kinds=KINDS, feeds=KINDS, spares=spares)
