# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/wire.py: golden frames, streams in any pieces, and whatever a hostile peer may send."""

import contextlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator import wire
from replicator.wire import (
    HEADER,
    MAX_BODY,
    Fault,
    Frame,
    FrameReader,
    Hello,
    Opcode,
    ProtocolError,
    Reason,
    Role,
    SyncReason,
)

# Frames as docs/protocol.md shows them: a change here is a change of the protocol.
GOLDEN = {
    "hello": (
        wire.pack_hello(
            Hello("lb-a", 0x1122334455667788, slots=65536, instance=0xA1B2C3D4, schema=0x0BADCAFE, capabilities=1)
        ),
        "4450 01 01 34000000 0000000000000000"
        "01 01 01 04 fecaad0b a6a8d47a1ec4e8f1 8877665544332211 d4c3b2a100000000 0000000000000000 00000100 01000000"
        "6c622d61",
    ),
    "ack": (wire.pack(Opcode.ACK, 258), "4450 01 02 00000000 0201000000000000"),
    "heartbeat": (wire.pack(Opcode.HEARTBEAT), "4450 01 03 00000000 0000000000000000"),
    "snapshot begin": (
        wire.pack_snapshot_begin(1, 7, SyncReason.NOT_HELD),
        "4450 01 04 08000000 0100000000000000 07000000 03000000",
    ),
    "snapshot end": (wire.pack_snapshot_end(9, 7), "4450 01 05 04000000 0900000000000000 07000000"),
    "resync": (wire.pack_resync(SyncReason.GAP), "4450 01 06 04000000 0000000000000000 04000000"),
    "refuse": (
        wire.pack_refuse(Reason.SAME_NODE, "no"),
        "4450 01 07 06000000 0000000000000000 0300 0200 6e6f",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_frames(name: str) -> None:
    frame, expected = GOLDEN[name]
    assert frame.hex() == expected.replace(" ", "")


def test_schema_of_this_release() -> None:
    assert wire.SCHEMA == 0x91355E80


def read_all(data: bytes, step: int) -> list[Frame]:
    reader, found = FrameReader(), []
    for start in range(0, len(data), step):
        reader.feed(data[start : start + step])
        while (frame := reader.next()) is not None:
            found.append(frame)
    assert reader.buffered == 0
    return found


STREAM = b"".join(frame for frame, _ in GOLDEN.values()) + wire.pack(Opcode.CREATE, 3, bytes(range(200)))


@pytest.mark.parametrize("step", [1, 2, 7, 15, 16, 17, 100, len(STREAM)])
def test_frames_come_out_whole_however_they_come_in(step: int) -> None:
    frames = read_all(STREAM, step)
    assert b"".join(wire.pack(f.opcode, f.sequence, f.body) for f in frames) == STREAM


def test_what_follows_a_frame_stays() -> None:
    reader = FrameReader()
    reader.feed(wire.pack(Opcode.ACK, 1) + b"DP\x01")
    assert reader.next() == Frame(Opcode.ACK, 1, b"")
    assert reader.next() is None
    assert reader.buffered == 3
    reader.feed(wire.pack(Opcode.ACK, 2)[3:])
    assert reader.next() == Frame(Opcode.ACK, 2, b"")


def header(magic: int = wire.MAGIC, version: int = 1, opcode: int = 2, length: int = 0) -> bytes:
    return HEADER.pack(magic, version, opcode, length, 0)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (header(magic=0x4450), Fault.MAGIC),
        (b"GET / HTTP/1.1\r\n\r\n", Fault.MAGIC),
        (header(version=2), Fault.VERSION),
        (header(version=0), Fault.VERSION),
        (header(opcode=0), Fault.OPCODE),
        (header(opcode=9), Fault.OPCODE),
        (header(opcode=255), Fault.OPCODE),
        (header(opcode=Opcode.ACK, length=1), Fault.LENGTH),
        (header(opcode=Opcode.HELLO, length=3), Fault.LENGTH),
        (header(opcode=Opcode.HELLO, length=1025), Fault.LENGTH),
        (header(opcode=Opcode.CREATE, length=MAX_BODY + 1), Fault.LENGTH),
        (header(opcode=Opcode.CREATE, length=0xFFFFFFFF), Fault.LENGTH),
        (header(opcode=Opcode.DELETE, length=7), Fault.LENGTH),
        (header(opcode=Opcode.SNAPSHOT_END, length=8), Fault.LENGTH),
        (header(opcode=Opcode.WANT, length=4 + 257 * 40), Fault.LENGTH),
    ],
)
def test_bad_headers_are_refused_before_their_body_comes(data: bytes, fault: Fault) -> None:
    reader = FrameReader()
    reader.feed(data)
    with pytest.raises(ProtocolError) as caught:
        reader.next()
    assert caught.value.fault is fault
    reader.feed(wire.pack(Opcode.ACK, 1))
    with pytest.raises(ProtocolError):  # there is no finding the next frame
        reader.next()


def hello_body(**changes: int | bytes) -> bytes:
    fields: dict[str, int] = {
        "low": 1, "high": 1, "role": 1, "length": 1, "schema": 0, "id": wire.node_id("x"), "epoch": 1, "instance": 2,
        "replica": 3, "slots": 4, "capabilities": 5,
    }  # fmt: skip
    name = changes.pop("name", b"x")
    assert isinstance(name, bytes)
    fields.update(changes)  # type: ignore[arg-type]
    return struct.pack("<BBBBIQQQQII", *fields.values()) + name


def test_hello_there_and_back() -> None:
    hello = Hello("node-ü", 5, Role.RECEIVER, 7, 8, 9, 10, 11, (1, 3))
    assert wire.parse_hello(wire.pack_hello(hello)[16:]) == hello


def test_hello_of_a_later_version_may_be_longer() -> None:
    assert wire.parse_hello(hello_body(high=9) + b"more").versions == (1, 9)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (hello_body(low=2), Fault.VERSION),
        (hello_body(low=0), Fault.VERSION),
        (hello_body(role=3), Fault.UNEXPECTED),
        (hello_body(length=0), Fault.LENGTH),
        (hello_body(length=2), Fault.LENGTH),
        (hello_body(length=65, name=b"x" * 65), Fault.LENGTH),
        (hello_body(name=b"\xff"), Fault.TEXT),
        (hello_body(name=b"\n", id=wire.node_id("\n")), Fault.TEXT),
        (hello_body(id=1), Fault.TEXT),
    ],
)
def test_bad_hellos(body: bytes, fault: Fault) -> None:
    with pytest.raises(ProtocolError) as caught:
        wire.parse_hello(body)
    assert caught.value.fault is fault


@pytest.mark.parametrize("name", ["", "x" * 65])
def test_names_that_cannot_be_sent(name: str) -> None:
    with pytest.raises(ValueError, match="node name"):
        wire.pack_hello(Hello(name, 1))


def test_refusals_are_cut_and_made_printable() -> None:
    frame = wire.pack_refuse(Reason.SCHEMA, "ä" * 500)
    assert wire.parse_refuse(frame[16:]) == (Reason.SCHEMA, "ä" * 128)
    assert wire.parse_refuse(struct.pack("<HH", 999, 3) + b"a\x1b\xff") == (999, "a??".replace("??", "?\ufffd"))
    with pytest.raises(ProtocolError):
        wire.parse_refuse(struct.pack("<HH", 1, 3) + b"a")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(1, 40), st.booleans())
def test_noise_gives_frames_or_a_protocol_error(noise: bytes, step: int, framed: bool) -> None:
    data = (wire.pack(Opcode.HEARTBEAT) + HEADER.pack(wire.MAGIC, 1, 1, len(noise), 0) + noise) if framed else noise
    reader = FrameReader()
    with contextlib.suppress(ProtocolError):
        for start in range(0, len(data), step):
            reader.feed(data[start : start + step])
            while (frame := reader.next()) is not None:
                if frame.opcode is Opcode.HELLO:
                    wire.parse_hello(frame.body)


def test_errors_are_one_line_and_say_what_to_do() -> None:
    error = ProtocolError(Fault.TEXT, "two\nlines")
    assert str(error) == "bad text: two lines"
    assert error.help_text


def test_an_error_that_is_raised_again_and_again_keeps_nothing_alive() -> None:
    reader, depths = FrameReader(), set()
    reader.feed(bytes(16))
    for _ in range(20):
        with pytest.raises(ProtocolError) as error:
            reader.next()
        depths.add(len(error.traceback))
    assert len(depths) <= 2
