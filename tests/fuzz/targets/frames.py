# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/wire.py: frames out of a stream in any pieces, and what the small ones carry."""

import random
import zlib
from collections.abc import Iterable

from replicator import codec, wire
from replicator.wire import Frame, FrameReader, Opcode, ProtocolError, Reason, Role, SyncReason
from tests.fuzz import frames
from tests.fuzz.judge import SLACK_BYTES, Finding, must, only
from tests.fuzz.mutation import resize

MAX_BYTES = 4096
WORDS = (b"DP\x01", *(bytes([code]) for code in Opcode), b"\x00\x00\x10\x00", b"\x01\x00\x10\x00")

_SPARES = [frames.hello("lb-b", Role.SENDER), *frames.small_frames()]


def seeds() -> Iterable[bytes]:
    yield b"".join([frames.hello("lb-a", Role.SENDER), *frames.small_frames()])
    yield b"".join(frames.session_frames())
    yield frames.hello("é" * 32, Role.RECEIVER, replica=3) + wire.pack(Opcode.HEARTBEAT)[:9]


def bound(data: bytes) -> int:
    return SLACK_BYTES + 4 * len(data)  # the buffer, one frame, what was read with it; not what a header announces


def check(data: bytes) -> None:
    whole = read(data, [len(data)])
    rng = random.Random(zlib.crc32(data))
    must(read(data, [rng.choice((1, 15, 16, 17, 100, 1000)) for _ in range(16)]) == whole, "pieces make no difference")


def read(data: bytes, sizes: list[int]) -> tuple[int, str]:
    """How many frames there were and how it ended; what decodes must encode to the same."""
    reader, at, count, used = FrameReader(), 0, 0, 0
    while at < len(data):
        size = sizes[count % len(sizes)] if len(sizes) > 1 else sizes[0]
        reader.feed(data[at : at + size])
        at += size
        while True:
            try:
                frame = reader.next()
            except ProtocolError as error:
                try:
                    reader.next()
                except ProtocolError as again:
                    must(again is error, "an error is final")
                return count, str(error)
            if frame is None:
                break
            packed = wire.pack(frame.opcode, frame.sequence, frame.body)
            must(data[used : used + len(packed)] == packed, "a frame encodes to what it came from")
            used += len(packed)
            count += 1
            parse(frame)
    must(reader.buffered == len(data) - used, "what is no frame yet is kept")
    return count, ""


def parse(frame: Frame) -> None:
    """What a small frame carries."""
    body = frame.body
    with only(ProtocolError):
        if frame.opcode is Opcode.HELLO:
            hello = wire.parse_hello(body)
            again = wire.pack_hello(hello)[wire.HEADER.size :]
            must(body.startswith(again), "HELLO encodes to what it came from")
            must(hello.node.isprintable(), "a node's name can be printed")
        elif frame.opcode is Opcode.REFUSE:
            reason, text = wire.parse_refuse(body)
            must(text.isprintable() and 0 <= reason <= 0xFFFF, "a refusal can be printed")
            if reason in set(Reason) and text.encode() == body[4:]:
                must(wire.pack_refuse(Reason(reason), text)[16:] == body, "REFUSE encodes to what it came from")
        elif frame.opcode is Opcode.SNAPSHOT_BEGIN:
            number, why = wire.parse_snapshot_begin(body)
            if why in set(SyncReason):
                again = wire.pack_snapshot_begin(frame.sequence, number, SyncReason(why))
                must(again[wire.HEADER.size :] == body, "SNAPSHOT_BEGIN encodes to what it came from")
        elif frame.opcode is Opcode.SNAPSHOT_END:
            again = wire.pack_snapshot_end(frame.sequence, wire.parse_snapshot_end(body))
            must(again[wire.HEADER.size :] == body, "SNAPSHOT_END encodes to what it came from")
        elif frame.opcode is Opcode.RESYNC:
            must(0 <= wire.parse_resync(body) < 1 << 32, "a reason is a number")
        elif frame.opcode is Opcode.WANT:
            again = codec.pack_want(codec.parse_want(body))
            must(again[wire.HEADER.size :] == body, "WANT encodes to what it came from")
        elif frame.opcode in (Opcode.ACK, Opcode.HEARTBEAT) and body:
            raise Finding(f"{frame.opcode.name} with a body")


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    return frames.mutate_stream(data, longest, random.Random(seed), resize, _SPARES)
