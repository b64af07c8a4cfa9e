# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/dissect/layer.py: golden frames there and back, and forged ones against parsers and engines."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Padding, Raw
from scapy.sessions import TCPSession

from collector import record
from collector.record import RECORD
from replicator import codec, wire
from replicator.codec import BODY, IPV4, IPV6, SIZES
from replicator.dissect.layer import (
    ITEMS,
    EndedSession,
    SessionIPv4,
    SessionIPv6,
    SyncCreate,
    SyncDelete,
    SyncFrame,
    SyncHello,
    SyncRefuse,
    SyncResync,
    SyncSnapshotBegin,
    SyncSnapshotEnd,
    SyncUpdate,
    SyncWant,
    WantedFlow,
    bind,
    frames,
    unbind,
)
from replicator.link import Down, Receiver, State
from replicator.wire import HEADER, MAX_BODY, Fault, FrameReader, Hello, Opcode, ProtocolError, Reason, Role, SyncReason
from tests.unit import test_codec, test_wire
from tests.unit.session_records import random_sessions, sessions
from tests.unit.test_link import SECOND, Joined, events

GOLDEN = {name: bytes.fromhex(text) for name, (_, text) in {**test_wire.GOLDEN, **test_codec.GOLDEN}.items()}
TAIL = {
    "cport": 1282, "vport": 80, "lport": 1282, "dport": 8080, "timeout_ms": 90_000, "worker": 1, "wscale_vs": 7,
    "wscale_rs": 8, "pp_version": 2, "fnat_isn": 0x70F, "fnat_delta": 0xD1F, "fnat_fdata_seq": 0x21222324,
    "fnat_prev_delta": 0x31323334, "sp_isn": 1, "sp_delta": 2, "sp_fdata_seq": 3, "sp_prev_delta": 4,
    "rs_end_seq": 0x41424344, "rs_end_ack": 0x51525354, "pp_sent": 1, "slot": 0x102, "generation": 3,
    "flags": "hashed+in-timer",
}  # fmt: skip
FORGED = {
    "hello": SyncFrame()
    / SyncHello(node="lb-a", epoch=0x1122334455667788, slots=65536, instance=0xA1B2C3D4, schema=0x0BADCAFE),
    "ack": SyncFrame(opcode="ACK", sequence=258),
    "heartbeat": SyncFrame(opcode="HEARTBEAT"),
    "snapshot begin": SyncFrame(sequence=1) / SyncSnapshotBegin(number=7, reason="NOT_HELD"),
    "snapshot end": SyncFrame(sequence=9) / SyncSnapshotEnd(number=7),
    "resync": SyncFrame() / SyncResync(reason="GAP"),
    "refuse": SyncFrame() / SyncRefuse(reason="SAME_NODE", text="no"),
    "create ipv4": SyncFrame(sequence=5)
    / SyncCreate(items=[SessionIPv4(caddr="10.0.1.2", vaddr="11.0.0.0", laddr="12.0.0.0", daddr="13.0.0.0", **TAIL)]),
    "update ipv6": SyncFrame(sequence=6)
    / SyncUpdate(items=[SessionIPv6(caddr="a00::102", vaddr="b00::", laddr="c00::", daddr="d00::", **TAIL)]),
    "want": SyncFrame()
    / SyncWant(flows=[WantedFlow(caddr="10.0.1.2", vaddr="11.0.0.0", cport=1282, vport=80, proto=record.TCP)]),
    "delete": SyncFrame(sequence=7)
    / SyncDelete(items=[EndedSession(slot=1, generation=2), EndedSession(slot=0x01020304, generation=3)]),
}


def afresh(packet: Packet) -> Packet:
    """The same packet built from its fields, not from the bytes that it was made of."""
    again = packet.copy()
    layer = again
    while layer:
        layer.raw_packet_cache = None
        for item in (*getattr(layer, "items", ()), *getattr(layer, "flows", ())):
            item.raw_packet_cache = None
        layer = layer.payload
    return again


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_frames_are_built_from_their_meaning(name: str) -> None:
    assert bytes(FORGED[name]) == GOLDEN[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_frames_there_and_back(name: str) -> None:
    frame = SyncFrame(GOLDEN[name])
    assert bytes(afresh(frame)) == GOLDEN[name]
    assert frame.length == len(GOLDEN[name]) - HEADER.size
    assert not frame.haslayer(Raw)
    assert name.split(maxsplit=1)[0].upper() in frame.summary()
    assert frame.show(dump=True)


def test_shapes_are_those_of_wire_and_codec() -> None:
    assert len(SyncFrame()) == HEADER.size
    assert {kind: len(item()) for kind, item in ITEMS.items()} == SIZES
    assert len(SyncCreate()) == BODY.size
    at = {}
    for field in SessionIPv6.fields_desc:
        at[field.name] = sum(field.sz for field in SessionIPv6.fields_desc[: len(at)])
    assert {name: RECORD.fields[name][1] for name in RECORD.names} == {k: v for k, v in at.items() if k != "padding"}
    for opcode, (least, _) in wire.BODY_BYTES.items():
        body = SyncFrame(opcode=opcode).guess_payload_class(b"")
        name = 1 if opcode is Opcode.HELLO else 0
        assert body is Raw if least == 0 else len(body()) + name == least, opcode.name


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.sampled_from([IPV4, IPV6]), st.booleans())
def test_any_sessions_there_and_back(seed: int, n: int, kind: int, compress: bool) -> None:
    records = random_sessions(np.random.default_rng(seed), n, 100, ipv6=kind == IPV6)
    for name in ("fnat_isn", "fnat_delta", "sp_isn", "caddr"):
        records[name] = records[name][0]  # something for LZ4 to find
    packed = bytes(codec.pack_records(Opcode.UPDATE, 3, records, kind, compress=compress))
    frame = SyncFrame(packed)
    assert bytes(afresh(frame)) == packed
    assert [item.slot for item in frame[SyncUpdate].items] == records["slot"].tolist()
    assert b"".join(map(bytes, map(afresh, frame[SyncUpdate].items))) == codec._open(packed[16:], (kind,))[2]


def test_a_dissected_frame_can_be_changed() -> None:
    packed = bytes(codec.pack_records(Opcode.CREATE, 3, sessions(50), IPV4, compress=True))
    frame = SyncFrame(packed)
    assert frame[SyncCreate].flags == "LZ4"
    frame[SyncCreate].items[7].state = "LAST_ACK"
    del frame.length
    records = codec.parse_records(read(bytes(frame)).body, 50)
    expected = sessions(50)
    expected["state"][7] = record.LAST_ACK
    assert records.tobytes() == expected.tobytes()


def test_ipv4_addresses_in_wide_records() -> None:
    packed = bytes(codec.pack_records(Opcode.CREATE, 3, sessions(1, first=5), IPV6))
    item = SyncFrame(packed)[SyncCreate].items[0]
    assert (item.caddr, item.daddr) == ("10.0.0.5", "13.0.0.0")
    assert bytes(afresh(item)) == packed[24:]


BOMB = test_codec.BOMB


@pytest.mark.parametrize(
    "body",
    [
        BODY.pack(9, 0, 1, 96) + bytes(96),
        BODY.pack(IPV4, 0, 2, 96) + bytes(96),
        BODY.pack(IPV4, 2, 1, 96) + bytes(96),
        BODY.pack(IPV4, 1, 1, 96) + bytes(96),
        BODY.pack(IPV4, 1, 1, 96) + BOMB,
        BODY.pack(IPV4, 1, 0xFFFF, 0xFFFF * 96) + BOMB,
    ],
)
def test_bodies_of_nonsense_are_left_alone(body: bytes) -> None:
    data = wire.pack(Opcode.CREATE, 1, body)
    frame = SyncFrame(data)
    assert frame[SyncCreate].items == []
    assert frame[Raw].load == body[8:]
    assert bytes(frame) == data


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=1, max_size=200), st.sampled_from(list(Opcode)), st.integers(0, 300))
def test_noise_comes_back_as_it_was(noise: bytes, opcode: Opcode, length: int) -> None:
    for data in (noise, wire.pack(opcode, 7, noise), HEADER.pack(wire.MAGIC, 1, opcode, length, 0) + noise):
        assert bytes(SyncFrame(data)) == data


def test_a_stream_of_frames() -> None:
    stream = b"".join(GOLDEN.values())
    found = frames(stream + b"DP\x01")
    assert [bytes(frame) for frame in found] == [*GOLDEN.values(), b"DP\x01"]
    assert [type(frame) for frame in found[:-1]] == [SyncFrame] * len(GOLDEN)
    assert isinstance(frames(GOLDEN["ack"] + b"GET / HTTP/1.1\r\n")[-1], Raw)


def test_scapy_reassembles_a_bound_port() -> None:
    link = Ether() / IP(src="10.0.0.1", dst="10.0.0.2")
    bind(7700)
    try:
        session, found, at = TCPSession(), [], 100
        for frame in GOLDEN.values():
            for part in (frame[:9], frame[9:]):
                segment = link / TCP(sport=4000, dport=7700, seq=at, flags="PA") / part
                at += len(part)
                packet = session.process(Ether(bytes(segment)))
                if packet and SyncFrame in packet:
                    found.append(bytes(packet[SyncFrame]))
        assert found == list(GOLDEN.values())
        both = Ether(bytes(link / TCP(sport=7700, dport=4000) / (GOLDEN["ack"] + GOLDEN["heartbeat"])))
        assert (both[SyncFrame].sequence, both[Padding].load) == (258, GOLDEN["heartbeat"])
    finally:
        unbind(7700)
    assert SyncFrame not in Ether(bytes(link / TCP(sport=4000, dport=7700) / GOLDEN["ack"]))


# --- forged frames: each kind of wrongness, against the parsers and against both engines ------------------------------


def read(data: bytes) -> wire.Frame:
    reader = FrameReader()
    reader.feed(data)
    frame = reader.next()
    assert frame is not None
    return frame


def one(**changed: object) -> SessionIPv4:
    return SessionIPv4(**{"slot": 3, "caddr": "10.0.0.1", **changed})


def create(sequence: int = 1, **changed: object) -> Packet:
    return SyncFrame(sequence=sequence) / SyncCreate(**{"items": [one()], **changed})


WRONG_HEADERS = {
    "magic": (SyncFrame(magic=0xDEAD), Fault.MAGIC),
    "magic, other byte order": (SyncFrame(magic=0x4450), Fault.MAGIC),
    "version 0": (SyncFrame(version=0), Fault.VERSION),
    "version 2": (SyncFrame(version=2), Fault.VERSION),
    "opcode 0": (SyncFrame(opcode=0), Fault.OPCODE),
    "opcode 9": (SyncFrame(opcode=9), Fault.OPCODE),
    "opcode 19": (SyncFrame(opcode=19), Fault.OPCODE),
    "a body that a heartbeat has not": (SyncFrame(opcode="HEARTBEAT", length=1), Fault.LENGTH),
    "no body where one must be": (SyncFrame(opcode="CREATE", length=0), Fault.LENGTH),
    "a HELLO too short": (SyncFrame(opcode="HELLO", length=len(SyncHello())), Fault.LENGTH),
    "a HELLO too long": (SyncFrame(opcode="HELLO", length=1025), Fault.LENGTH),
    "a body too long": (SyncFrame(opcode="CREATE", length=MAX_BODY + 1), Fault.LENGTH),
    "a body of 4 GiB": (SyncFrame(opcode="DELETE", length=0xFFFFFFFF), Fault.LENGTH),
}
WRONG_BODIES = {
    "kind 5": (create(kind=5), Fault.RECORD),
    "ends in CREATE": (create(items=[EndedSession()]), Fault.RECORD),
    "sessions in DELETE": (SyncFrame(sequence=1) / SyncDelete(items=[one()]), Fault.RECORD),
    "no sessions": (create(items=[]), Fault.COUNT),
    "count too large": (create(count=2), Fault.COUNT),
    "count too small": (create(items=[one(), one(slot=4)], count=1), Fault.COUNT),
    "count 65535": (create(count=0xFFFF), Fault.COUNT),
    "raw length": (create(raw_length=97), Fault.COUNT),
    "raw length beyond all bounds": (create(count=0xFFFF, raw_length=0xFFFF * 96), Fault.COUNT),
    "truncated records": (create(items=[Raw(bytes(one())[:-1])], count=1, raw_length=96, kind=IPV4), Fault.COUNT),
    "records of the wrong kind": (create(items=[SessionIPv6()], kind=IPV4), Fault.COUNT),
    "unknown flags": (create(flags=0x82), Fault.COMPRESSION),
    "a format that is not known": (create(flags=0x04), Fault.COMPRESSION),
    "Zstandard that is none": (create(flags=0x06), Fault.COMPRESSION),
    "LZ4 of less than announced": (
        create(flags="LZ4", items=[Raw(bytes(95))], count=1, raw_length=96, kind=IPV4),
        Fault.COMPRESSION,
    ),
    "LZ4 of more than announced": (
        create(flags="LZ4", items=[one(), one(slot=4)], count=1, raw_length=96),
        Fault.COMPRESSION,
    ),
    "an LZ4 bomb": (
        create(flags="LZ4", items=[Raw(bytes(4 * MAX_BODY))], count=1, raw_length=96, kind=IPV4),
        Fault.COMPRESSION,
    ),
    "a slot beyond the pool": (create(items=[one(slot=16)]), Fault.RECORD),
    "generation 0": (create(items=[one(generation=0)]), Fault.RECORD),
    "an IPv6 session among IPv4 ones": (create(items=[one(af="inet6")]), Fault.RECORD),
    "an unknown family": (create(items=[SessionIPv6(af=11)]), Fault.RECORD),
    "IPv4 in 16 bytes, with more after it": (
        create(items=[SessionIPv6(af="inet", af_out="inet", caddr="a00:1::1")]),
        Fault.RECORD,
    ),
    "DELETE beyond the pool": (SyncFrame(sequence=1) / SyncDelete(items=[EndedSession(slot=16)]), Fault.RECORD),
    "DELETE of generation 0": (SyncFrame(sequence=1) / SyncDelete(items=[EndedSession(generation=0)]), Fault.RECORD),
}
HELLO = SyncHello(node="a", epoch=1, slots=16)
WRONG_HELLOS = {
    "a role that is none": ({"role": 3}, Fault.UNEXPECTED, Reason.PROTOCOL),
    "no name": ({"name_length": 0}, Fault.LENGTH, Reason.PROTOCOL),
    "a name longer than the body": ({"name_length": 9}, Fault.LENGTH, Reason.PROTOCOL),
    "a name too long": ({"node": "x" * 65}, Fault.LENGTH, Reason.PROTOCOL),
    "a name that is not UTF-8": ({"node": b"\xff"}, Fault.TEXT, Reason.PROTOCOL),
    "a name with a newline": ({"node": "a\nb"}, Fault.TEXT, Reason.PROTOCOL),
    "another node's id": ({"node_id": 1}, Fault.TEXT, Reason.PROTOCOL),
    "a later protocol only": ({"version_least": 2, "version_most": 9}, None, Reason.VERSION),
    "records of another shape": ({"schema": wire.SCHEMA ^ 1}, None, Reason.SCHEMA),
    "the same name": ({"node": "b"}, None, Reason.SAME_NODE),
    "two senders": ({"role": "RECEIVER"}, None, Reason.ROLE),
    "too many slots": ({"slots": (1 << 25) + 1}, None, Reason.TOO_LARGE),
}
WRONG_HELLOS["versions upside down"] = ({"version_least": 2, "version_most": 1}, Fault.VERSION, Reason.PROTOCOL)


def hello(**changed: object) -> Packet:
    return SyncFrame() / SyncHello(**{"node": "a", "epoch": 1, "slots": 16, **changed})


@pytest.fixture
def joined() -> Joined:
    """A live link of 16 slots."""
    joined = Joined()
    joined.connect()
    joined.quiet()
    assert joined.receiver is not None
    events(joined.receiver)
    events(joined.sender)
    return joined


def ended_by(engine: object, now_ns: int) -> tuple[Reason, Down]:
    """The engine has refused its peer, and said so: reason on the wire, and its event."""
    assert engine.state is State.CLOSED  # type: ignore[attr-defined]
    last = frames(b"".join(map(bytes, engine.outgoing(now_ns))))[-1]  # type: ignore[attr-defined]
    (down,) = [event for event in events(engine) if isinstance(event, Down)]  # type: ignore[arg-type]
    assert down.refused == last[SyncRefuse].reason
    assert not down.by_peer
    assert last[SyncRefuse].text.decode() == down.why
    return Reason(last[SyncRefuse].reason), down


@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_wrong_headers(joined: Joined, name: str) -> None:
    frame, fault = WRONG_HEADERS[name]
    with pytest.raises(ProtocolError) as caught:
        read(bytes(frame))
    assert caught.value.fault is fault
    assert joined.receiver is not None
    for engine in (joined.receiver, joined.sender):
        engine.receive(bytes(frame), joined.now_ns)
        assert engine.counters["protocol_errors"] == 1
        reason, down = ended_by(engine, joined.now_ns)
        assert reason is Reason.PROTOCOL
        assert down.why == str(caught.value)


@pytest.mark.parametrize("name", WRONG_BODIES)
def test_wrong_bodies(joined: Joined, name: str) -> None:
    frame, fault = WRONG_BODIES[name]
    parsed = read(bytes(frame))
    with pytest.raises(ProtocolError) as caught:
        (codec.parse_deletes if parsed.opcode is Opcode.DELETE else codec.parse_records)(parsed.body, 16)
    assert caught.value.fault is fault
    receiver = joined.receiver
    assert receiver is not None
    assert receiver.replica is not None
    frame = frame.copy()
    frame.sequence = joined.sender._sequence + 1
    before = receiver.replica.digest()
    receiver.receive(bytes(frame), joined.now_ns)
    assert ended_by(receiver, joined.now_ns)[0] is Reason.PROTOCOL
    assert receiver.replica.digest() == before


@pytest.mark.parametrize("name", WRONG_HELLOS)
def test_wrong_hellos(name: str) -> None:
    changed, fault, reason = WRONG_HELLOS[name]
    frame = hello(**changed)
    if fault is not None:
        with pytest.raises(ProtocolError) as caught:
            wire.parse_hello(read(bytes(frame)).body)
        assert caught.value.fault is fault
    joined = Joined()
    receiver = Receiver(joined.replicas, now_ns=joined.now_ns)
    receiver.receive(bytes(frame), joined.now_ns)
    assert ended_by(receiver, joined.now_ns)[0] is reason
    assert len(list(joined.replicas)) == 0


@pytest.mark.parametrize("engine", ["receiver", "sender"])
@pytest.mark.parametrize("name", ["ack", "heartbeat", "snapshot begin", "resync", "create ipv4", "delete"])
def test_nothing_comes_before_hello(engine: str, name: str) -> None:
    joined = Joined()
    joined.connect()
    chosen = joined.receiver if engine == "receiver" else joined.sender
    assert chosen is not None
    chosen.receive(bytes(FORGED[name]), joined.now_ns)
    reason, down = ended_by(chosen, joined.now_ns)
    assert reason is Reason.PROTOCOL
    assert Fault.UNEXPECTED.value in down.why


@pytest.mark.parametrize("frame", [hello(), SyncFrame(opcode="ACK", sequence=1), SyncFrame() / SyncResync()])
def test_what_a_sender_never_says(joined: Joined, frame: Packet) -> None:
    assert joined.receiver is not None
    joined.receiver.receive(bytes(frame), joined.now_ns)
    assert Fault.UNEXPECTED.value in ended_by(joined.receiver, joined.now_ns)[1].why


@pytest.mark.parametrize("name", ["hello", "snapshot begin", "snapshot end", "create ipv4", "update ipv6", "delete"])
def test_what_a_receiver_never_says(joined: Joined, name: str) -> None:
    joined.sender.receive(bytes(FORGED[name]), joined.now_ns)
    assert Fault.UNEXPECTED.value in ended_by(joined.sender, joined.now_ns)[1].why


def test_an_acknowledgement_of_what_was_never_sent(joined: Joined) -> None:
    joined.sender.receive(bytes(SyncFrame(opcode="ACK", sequence=joined.sender._sequence + 1)), joined.now_ns)
    assert Fault.SEQUENCE.value in ended_by(joined.sender, joined.now_ns)[1].why


def test_a_frame_again_is_not_taken_again(joined: Joined) -> None:
    receiver = joined.receiver
    assert receiver is not None
    assert receiver.replica is not None
    sequence = joined.sender._sequence
    receiver.receive(bytes(create(sequence + 1)), joined.now_ns)
    after = receiver.replica.digest()
    assert receiver.replica.count == 1
    for replayed in (create(sequence + 1, items=[one(slot=9)]), create(1, items=[one(slot=9)]), create(0)):
        receiver.receive(bytes(replayed), joined.now_ns)
    assert receiver.counters["duplicates"] == 3
    assert receiver.replica.digest() == after
    assert receiver.state is State.LIVE


def test_a_missing_frame_is_asked_for(joined: Joined) -> None:
    receiver = joined.receiver
    assert receiver is not None
    receiver.receive(bytes(create(joined.sender._sequence + 2)), joined.now_ns)
    said = frames(b"".join(map(bytes, receiver.outgoing(joined.now_ns))))
    assert said[0][SyncResync].reason == SyncReason.GAP
    assert said[1].opcode == Opcode.ACK
    assert receiver.state is State.SYNCING
    assert receiver.replica is not None
    assert not receiver.replica.synced


@pytest.mark.parametrize("name", GOLDEN)
def test_truncated_frames_are_waited_for_and_then_forgotten(joined: Joined, name: str) -> None:
    receiver = joined.receiver
    assert receiver is not None
    before = receiver.counters["frames_received"]
    receiver.receive(GOLDEN[name][:-1], joined.now_ns)
    assert receiver.state is State.LIVE
    assert receiver.counters["frames_received"] == before
    receiver.disconnected(joined.now_ns + SECOND)
    (down,) = [event for event in events(receiver) if isinstance(event, Down)]
    assert down.refused is None


def test_a_refusal_ends_either_side(joined: Joined) -> None:
    assert joined.receiver is not None
    for engine in (joined.receiver, joined.sender):
        engine.receive(bytes(SyncFrame() / SyncRefuse(reason="REPLACED", text="enough")), joined.now_ns)
        (down,) = [event for event in events(engine) if isinstance(event, Down)]
        assert down == Down("enough", Reason.REPLACED, by_peer=True)


def test_forged_hello_of_a_receiver() -> None:
    joined = Joined()
    joined.connect()
    joined.sender.outgoing(joined.now_ns)
    answer = hello(node="b", role="RECEIVER", epoch=100, replica=77, slots=0)
    expected = replace(Hello("b", 100), role=Role.RECEIVER, replica=77)
    assert bytes(answer) == wire.pack_hello(expected)
    joined.sender.receive(bytes(answer), joined.now_ns)
    assert joined.sender.peer == expected
    (begin,) = frames(b"".join(map(bytes, joined.sender.outgoing(joined.now_ns))))[:1]
    assert begin[SyncSnapshotBegin].reason == SyncReason.FIRST
    assert SyncHello(wire.pack_hello(expected)[16:] + b"more").later == b"more"
