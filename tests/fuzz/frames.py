# SPDX-License-Identifier: GPL-2.0-or-later
"""Streams of frames, and steps of a conversation, for mutations that keep most of them valid.

Rules: what a mutation breaks it mends most of the time (lengths, counts, sequences, the id of a node), so that what it
meant to break is all that is broken and the decoder gets as far as that. An input of an engine is a list of steps: kind
u8, length u16, and so many bytes. Everything here takes any bytes.
"""

import random
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import lz4.block
import numpy as np

from probes.flow import FLOW_KEY
from replicator import codec, wire
from replicator.codec import FlowKeys
from replicator.wire import HEADER, SEQUENCED, Hello, Opcode, Role, SyncReason
from tests.unit.session_records import sessions

SLOTS = 64  # of every pool here: mutations shall hit the same slots again
Resize = Callable[[bytes, int], bytes]  # libFuzzer's own mutations: bytes, longest result

_STEP = struct.Struct("<BH")
_HELLO_ID = slice(8, 16)
_HELLO_NAME = 48
_NUMBERS = (0, 1, 2, 3, 0xFF, 0x7FFF, 0xFFFF, 1 << 20, (1 << 20) + 1, 1 << 31, (1 << 32) - 1, (1 << 64) - 1)


class Step(NamedTuple):
    """One thing that happens to an engine."""

    kind: int
    payload: bytes


def pack_steps(steps: Iterable[Step]) -> bytes:
    """An input; payloads beyond 64 KiB are cut."""
    return b"".join(_STEP.pack(kind, len(payload[:0xFFFF])) + payload[:0xFFFF] for kind, payload in steps)


def parse_steps(data: bytes, kinds: int) -> list[Step]:
    """The steps in an input, whatever it is; ``kinds``: how many kinds there are."""
    steps, at = [], 0
    while at + _STEP.size <= len(data):
        kind, length = _STEP.unpack_from(data, at)
        at += _STEP.size
        steps.append(Step(kind % kinds, data[at : at + length]))
        at += length
    return steps


class Part(NamedTuple):
    """A frame of a stream; a body of another length than its header said stays as it is."""

    opcode: int
    sequence: int
    body: bytes

    def packed(self) -> bytes:
        return HEADER.pack(wire.MAGIC, wire.VERSION, self.opcode & 0xFF, len(self.body), self.sequence) + self.body


def split(stream: bytes) -> tuple[list[Part], bytes]:
    """The frames of a stream as its headers announce them, and what is left."""
    parts, at = [], 0
    while at + HEADER.size <= len(stream):
        magic, version, opcode, length, sequence = HEADER.unpack_from(stream, at)
        if magic != wire.MAGIC or version != wire.VERSION or at + HEADER.size + length > len(stream):
            break
        at += HEADER.size + length
        parts.append(Part(opcode, sequence, stream[at - length : at]))
    return parts, stream[at:]


def mend(part: Part, rng: random.Random) -> Part:
    """Make a body's own numbers fit it."""
    body = bytearray(part.body)
    if part.opcode == Opcode.HELLO and len(body) > _HELLO_NAME:
        body[3] = min(body[3] or 1, wire.MAX_NAME, len(body) - _HELLO_NAME)
        name = bytes(body[_HELLO_NAME : _HELLO_NAME + body[3]]).decode(errors="replace")
        body[_HELLO_ID] = wire.node_id(name).to_bytes(8, "little")
        if rng.random() < 0.9:
            body[4:8] = wire.SCHEMA.to_bytes(4, "little")
    elif part.opcode in (Opcode.CREATE, Opcode.UPDATE, Opcode.DELETE) and len(body) >= codec.BODY.size:
        kinds = [codec.ENDED] if part.opcode == Opcode.DELETE else [codec.IPV4, codec.IPV6]
        kind = body[0] if body[0] in kinds else rng.choice(kinds)
        size, items = codec.SIZES[kind], bytes(body[codec.BODY.size :])
        if body[1] == codec.COMPRESSED:
            raw = codec.BODY.unpack_from(body)[3]
            try:
                items = lz4.block.decompress(items, uncompressed_size=min(raw, wire.MAX_BODY))
            except (lz4.block.LZ4BlockError, ValueError):
                return part
        items += bytes(-len(items) % size)
        count = min(len(items) // size, codec.MAX_COUNT)
        items = _mend_items(items[: count * size], size, kind, rng)
        packed = rng.random() < 0.3 and items
        block = lz4.block.compress(items, store_size=False) if packed else items
        head = codec.BODY.pack(kind, codec.COMPRESSED if packed else 0, count, len(items))
        body = bytearray(head + block)
    return part._replace(body=bytes(body))


def _mend_items(items: bytes, size: int, kind: int, rng: random.Random) -> bytes:
    rows = np.frombuffer(items, np.uint8).reshape(-1, size).copy()
    if not len(rows) or rng.random() < 0.1:
        return rows.tobytes()
    words = rows.view("<u4")
    words[:, 0] %= SLOTS
    words[words[:, 1] == 0, 1] = 1
    if rng.random() < 0.05:  # just outside
        words[rng.randrange(len(rows)), rng.choice((0, 0, 1))] = rng.choice((SLOTS, SLOTS + 1, 0, 0xFFFFFFFF))
    if kind != codec.ENDED:
        four = rows[:, 8:10] != 10 if kind == codec.IPV6 else np.ones((len(rows), 2), np.bool_)
        rows[:, 8:10] = np.where(four, 2, 10)
        if kind == codec.IPV6:
            for side, at in ((0, 16), (1, 48)):
                for address in (at, at + 16):
                    rows[four[:, side], address + 4 : address + 16] = 0
    return rows.tobytes()


def mutate_stream(stream: bytes, longest: int, rng: random.Random, resize: Resize, spares: Sequence[bytes]) -> bytes:
    """Another stream like this one. ``spares``: valid frames to put in."""
    parts, rest = split(stream)
    if not parts or rng.random() < 0.1:
        return resize(stream, longest)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(parts))
        what = rng.randrange(9)
        if what <= 2:
            parts[at] = parts[at]._replace(body=resize(parts[at].body, max(longest - len(stream), 64)))
        elif what == 3:
            parts[at] = parts[at]._replace(opcode=rng.choice([*Opcode, rng.randrange(256)]))
        elif what == 4:
            steps = (*_NUMBERS, parts[at].sequence + 1, parts[at].sequence - 1)
            parts[at] = parts[at]._replace(sequence=rng.choice(steps) & ((1 << 64) - 1))
        elif what == 5:
            parts.insert(at, parts[rng.randrange(len(parts))])
        elif what == 6 and len(parts) > 1:
            del parts[at]
        elif what == 7:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif what == 8:
            spare, _ = split(rng.choice(spares))
            parts[at + 1 : at + 1] = spare
        if rng.random() < 0.8:
            parts = [mend(part, rng) for part in parts]
    if rng.random() < 0.7:
        parts = _renumber(parts)
    whole = b"".join(part.packed() for part in parts) + rest
    if rng.random() < 0.05:
        whole = resize(whole, longest)
    return whole[:longest]


def _renumber(parts: list[Part]) -> list[Part]:
    number, out = 0, []
    for part in parts:
        if part.opcode == Opcode.HELLO:
            number = 0
        elif part.opcode in SEQUENCED:
            number += 1
            part = part._replace(sequence=number)  # noqa: PLW2901
        out.append(part)
    return out


def mutate_steps(
    data: bytes, longest: int, seed: int, resize: Resize, *, kinds: int, feeds: int, spares: Sequence[bytes]
) -> bytes:
    """Another conversation like this one; the payload of steps of kind ``feeds`` is a stream of frames."""
    rng = random.Random(seed)
    steps = parse_steps(data, kinds)
    if not steps or rng.random() < 0.05:
        return resize(data, longest)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(steps)) if steps else 0
        what = rng.randrange(10)
        if not steps or what == 0:
            payload = rng.choice(spares) if rng.random() < 0.5 else rng.randbytes(rng.randrange(8))
            steps.insert(at, Step(rng.randrange(kinds), payload))
        elif what == 1:
            del steps[at]
        elif what == 2:
            steps.insert(rng.randrange(len(steps) + 1), steps[at])
        elif what == 3:  # the same bytes in two pieces
            payload = steps[at].payload
            cut = rng.randrange(len(payload) + 1)
            steps[at : at + 1] = [steps[at]._replace(payload=payload[:cut]), steps[at]._replace(payload=payload[cut:])]
        elif steps[at].kind == feeds:
            room = min(longest, 0xFFFF)
            steps[at] = steps[at]._replace(payload=mutate_stream(steps[at].payload, room, rng, resize, spares))
        else:
            steps[at] = steps[at]._replace(payload=resize(steps[at].payload, 64))
    return pack_steps(steps)[:longest]


# --- valid frames ----------------------------------------------------------------------------------------------------


def hello(node: str, role: Role, *, epoch: int = 7, replica: int = 0, slots: int = SLOTS) -> bytes:
    """A HELLO frame of a node here."""
    return wire.pack_hello(Hello(node, epoch, role, slots if role is Role.SENDER else 0, instance=5, replica=replica))


def session_frames() -> list[bytes]:
    """CREATE, UPDATE and DELETE frames of every form, in order from 2 on."""
    four, six = sessions(5), sessions(3, first=20, ipv6=True)
    four["generation"][:2] = 2, 0xFFFFFFFF
    slots, generations = np.array([1, 3]), np.array([1, 2], np.uint32)
    frames = [
        codec.pack_records(Opcode.CREATE, 2, four, codec.IPV4),
        codec.pack_records(Opcode.CREATE, 3, six, codec.IPV6),
        codec.pack_records(Opcode.UPDATE, 4, sessions(40), codec.IPV4, compress=True),
        codec.pack_records(Opcode.UPDATE, 5, sessions(20, first=20, ipv6=True), codec.IPV6, compress=True),
        codec.pack_records(Opcode.CREATE, 6, sessions(1, first=SLOTS - 1), codec.IPV6),
        codec.pack_deletes(7, slots, generations),
    ]
    return [bytes(frame) for frame in frames]


def small_frames() -> list[bytes]:
    """All others but HELLO."""
    return [
        wire.pack_snapshot_begin(1, 1, SyncReason.FIRST),
        wire.pack_snapshot_end(8, 1),
        wire.pack_resync(SyncReason.GAP),
        wire.pack_refuse(wire.Reason.STALE_EPOCH, "a later run is known"),
        wire.pack(Opcode.ACK, 1),
        wire.pack(Opcode.HEARTBEAT),
        codec.pack_want(wanted(5)),
        codec.pack_want(wanted(2, ipv6=True)),
    ]


def wanted(count: int, *, ipv6: bool = False) -> FlowKeys:
    """The flows of ``sessions(count)``."""
    records, keys = sessions(count, ipv6=ipv6), np.zeros(count, FLOW_KEY)
    for name in ("caddr", "vaddr", "cport", "vport", "proto", "af"):
        keys[name] = records[name]
    return keys
