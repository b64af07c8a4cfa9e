# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/dissect: TCP segments of a capture to frames, and the frames as Scapy packets and as text.

An input is a list of steps, each a segment: kind says who sends it and whether it acknowledges or begins something;
payload is where it begins, relative to what was sent so far, i16, and the bytes.
"""

import json
from collections.abc import Iterable

from scapy.packet import Packet, Raw

from replicator import codec
from replicator.dissect import layer, show
from replicator.dissect.links import MAX_HELD, Links, Said, Seen, Segment
from replicator.wire import FrameReader, Opcode, ProtocolError, Role
from tests.fuzz import frames
from tests.fuzz.frames import Step
from tests.fuzz.judge import must, told
from tests.fuzz.mutation import resize
from tests.unit.session_records import sessions

MAX_BYTES = 4096
WORDS = (b"DP\x01", b"\x16\x03\x01", b"\x17\x03\x03")
THERE, BACK, SYN, ACK, KINDS = 0, 1, 2, 4, 8
_ENDS = (("10.9.8.1", 40000), ("fd00::1", 7700))
_HELLO = frames.hello("lb-a", Role.SENDER)
_STREAM = [
    _HELLO,
    bytes(codec.pack_records(Opcode.CREATE, 2, sessions(2), codec.IPV4)),
    bytes(codec.pack_records(Opcode.UPDATE, 3, sessions(1, first=20, ipv6=True), codec.IPV6)),
    bytes(codec.pack_records(Opcode.UPDATE, 4, sessions(2), codec.IPV4, compress=True)),
    frames.session_frames()[-1],
    *frames.small_frames(),
]


def _step(kind: int, data: bytes, ahead: int = 0) -> Step:
    return Step(kind, ahead.to_bytes(2, "little", signed=True) + data)


def seeds() -> Iterable[bytes]:
    whole = b"".join(_STREAM)
    yield frames.pack_steps([_step(THERE | SYN, b""), *(_step(THERE, frame) for frame in _STREAM)])
    yield frames.pack_steps([_step(THERE, whole[30:]), _step(BACK | ACK, frames.hello("lb-b", Role.RECEIVER))])
    lost = [_step(THERE | SYN, whole[:100]), _step(THERE, whole[200:600], 100), _step(BACK | ACK, b"", 400)]
    yield frames.pack_steps([*lost, _step(THERE, whole[600:]), _step(BACK | ACK, b"")])
    yield frames.pack_steps(
        [_step(THERE | SYN, b"\x16\x03\x01\x00\x05hello\x17\x03\x03\x00\x01x"), _step(BACK, b"GET / HTTP/1.1")]
    )


def bound(data: bytes) -> int:
    # A Scapy packet of some kilobytes for each session, of which LZ4 makes more than there are bytes; and text of them.
    packed = data.count(b"DP") * (64 << 10)
    return min(MAX_HELD, (1 << 20) + 512 * len(data) + 16 * packed)


def check(data: bytes) -> None:
    links, now = Links(), 10**18
    sent = [1000, 0xFFFFFF00]
    found: list[Seen | Said] = []
    for kind, payload in frames.parse_steps(data, KINDS):
        side = kind & BACK
        ahead = int.from_bytes(payload[:2], "little", signed=True)
        sequence, content = (sent[side] + (0 if kind & ACK else ahead)) & 0xFFFFFFFF, payload[2:]
        now += 60_000_000
        syn = bool(kind & SYN)
        acknowledged = (sent[not side] + ahead) & 0xFFFFFFFF if kind & ACK else None
        found += links.segment(Segment(now, _ENDS[side], _ENDS[not side], sequence, acknowledged, syn, content))
        sent[side] = (sequence + syn + len(content)) & 0xFFFFFFFF
        scapy(content)
    found += links.finish()
    must(links.counts.frames == sum(isinstance(one, Seen) for one in found), "frames are counted")
    for one in found:
        shown(one)


def shown(one: Seen | Said) -> None:
    """What is printed of it."""
    if isinstance(one, Seen) and one.fault is not None:
        told(one.fault)
    for line in show.lines(one, verbose=True):
        must(line.isprintable(), "a line can be printed")
    for line in show.objects(one, verbose=True):
        must(isinstance(json.loads(line), dict), "an object is JSON")


def scapy(stream: bytes) -> None:
    """Frames as Scapy has them are the frames that a node reads, and encode to what they came from."""
    packets = layer.frames(stream)
    must(b"".join(map(bytes, packets)) == stream, "packets encode to what they came from")
    reader = FrameReader()
    reader.feed(stream)
    for packet in packets:
        if isinstance(packet, Raw):
            return
        try:
            frame = reader.next()
        except ProtocolError:
            return
        must(
            frame is not None and packet.sequence == frame.sequence and packet.opcode == frame.opcode, "the same frames"
        )
        fields(packet)


def fields(packet: Packet) -> None:
    """All that can be looked at, and encoded again from its values."""
    must(packet.summary(), "a summary")
    if packet.sequence % 4 == 0:
        must(packet.show2(dump=True), "and in full")


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    return frames.mutate_steps(data, longest, seed, resize, kinds=KINDS, feeds=KINDS, spares=_STREAM)
