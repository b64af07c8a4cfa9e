# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/codec.py: bodies of sessions, plain and as LZ4 blocks. An input is opcode u8, and a body."""

import random
from collections.abc import Iterable

import lz4.block
import numpy as np

from replicator import blocks, codec
from replicator.codec import BODY, COMPRESSED, ENDED, SIZES
from replicator.query import describe
from replicator.wire import HEADER, MAX_BODY, Opcode, ProtocolError
from tests.fuzz import frames
from tests.fuzz.judge import SLACK_BYTES, must, only
from tests.fuzz.mutation import resize

MAX_BYTES = 16 << 10
WORDS = (b"\x04\x00\x01\x00\x60\x00\x00\x00", b"\x06\x00\x01\x00\x90\x00\x00\x00", b"\x00\x00\x01\x00\x08\x00\x00\x00")


def seeds() -> Iterable[bytes]:
    for frame in frames.session_frames():
        yield frame[3:4] + frame[HEADER.size :]
    noise = np.random.default_rng(1).integers(0, 256, 1500, dtype=np.uint8).tobytes()
    yield bytes([Opcode.CREATE]) + BODY.pack(codec.IPV4, COMPRESSED, 1000, 96_000) + noise
    packed = blocks.pack(blocks.ZSTD, bytes(960))
    yield bytes([Opcode.CREATE]) + BODY.pack(codec.IPV4, blocks.ZSTD, 10, 960) + packed
    for opcode, kind, count in (  # the first may hold that many, the others claim one more than a body holds
        (Opcode.DELETE, ENDED, 0xFFFF),
        (Opcode.CREATE, codec.IPV4, MAX_BODY // 96 + 1),
        (Opcode.CREATE, codec.IPV6, MAX_BODY // 144 + 1),
    ):
        raw = count * SIZES[kind]
        bomb = lz4.block.compress(bytes(raw), store_size=False)
        yield bytes([opcode]) + BODY.pack(kind, COMPRESSED, count, raw) + bomb


def declared(data: bytes) -> int:
    """Bytes of items that a body claims to hold and may hold: only they may be made room for."""
    if len(data) < 1 + BODY.size:
        return 0
    kind, flags, count, raw = BODY.unpack_from(data, 1)
    if raw > MAX_BODY or raw != count * SIZES.get(kind, 0):
        return 0
    return raw if flags in (blocks.LZ4, blocks.ZSTD) or len(data) == 1 + BODY.size + raw else 0


def bound(data: bytes) -> int:
    # The items unpacked, the records made of them, and here the frame made of those once more.
    return SLACK_BYTES + 3 * len(data) + 8 * declared(data)


def check(data: bytes) -> None:
    if len(data) < 1 + BODY.size:
        return  # no frame carries so little
    opcode, body = Opcode.DELETE if data[0] == Opcode.DELETE else Opcode.UPDATE, data[1:]
    with only(ProtocolError):
        kind, _, count, _ = BODY.unpack_from(body)
        if opcode is Opcode.DELETE:
            slots, generations = codec.parse_deletes(body, frames.SLOTS)
            must(len(slots) == len(generations) == count, "as many as announced")
            must(slots.max() < frames.SLOTS and generations.all(), "slots and generations that can be")
            plain = bytes(codec.pack_deletes(1, slots, generations))
        else:
            records = codec.parse_records(body, frames.SLOTS)
            must(len(records) == count, "as many as announced")
            must(records["slot"].max() < frames.SLOTS and records["generation"].all(), "slots that can be")
            plain = bytes(codec.pack_records(opcode, 1, records, kind))
            for line in describe(records[:2], "lb-a"):
                must(all(text.isprintable() for text in line.values() if isinstance(text, str)), "for people to read")
        if body[1] == 0:
            must(plain[HEADER.size :] == body, "sessions encode to what they came from")


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    rng = random.Random(seed)
    if len(data) < 1 + BODY.size or rng.random() < 0.3:
        return resize(data, longest)
    part = frames.Part(data[0], 1, data[1:])
    if rng.random() < 0.8:
        part = part._replace(body=resize(part.body, longest - 1))
    if rng.random() < 0.7:
        part = frames.mend(part, rng)
    return (bytes([part.opcode]) + part.body)[:longest]
