# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/dissect: streams out of captured segments, frames out of streams, and what is said of the rest."""

import itertools
import random
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator import codec, wire
from replicator.codec import IPV4
from replicator.dissect import links as links_module
from replicator.dissect import show
from replicator.dissect.links import Links, Said, Seen, Segment
from replicator.dissect.reassembly import MAX_AHEAD, PATIENCE_NS, Direction, Piece
from replicator.dissect.scan import SEARCH_BYTES, Item, Kind, Refused, Scanner, Skipped
from replicator.wire import HEADER, Fault, Frame, Hello, Opcode, Reason, Role, SyncReason
from tests.unit.session_records import random_sessions, sessions

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND
SLOTS = 1000
A, B = ("10.9.8.1", 40_000), ("10.9.8.2", 7700)
HELLO_A = wire.pack_hello(Hello("a", 1, slots=SLOTS))
HELLO_B = wire.pack_hello(Hello("b", 2, Role.RECEIVER))
# As OpenSSL writes them: a ClientHello, records of data.
CLIENT_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(505)


def tls_records(*sizes: int) -> bytes:
    noise = random.Random(1)
    return b"".join(b"\x17\x03\x03" + size.to_bytes(2, "big") + noise.randbytes(size) for size in sizes)


def creates(first: int, n: int, *, each: int = 5) -> list[bytes]:
    """n CREATE frames of sessions of noise, numbered from ``first``."""
    rng = np.random.default_rng(first)
    return [
        bytes(codec.pack_records(Opcode.CREATE, first + number, random_sessions(rng, each, SLOTS), IPV4))
        for number in range(n)
    ]


def text_of(pieces: Iterable[Piece]) -> bytes:
    return b"".join(b"<%d>" % missing * (missing > 0) + data for missing, data in pieces)


# --- reassembly -------------------------------------------------------------------------------------------------------


def test_segments_in_any_order_twice_and_overlapping() -> None:
    way = Direction()
    way.begins(99)
    pieces = []
    for at, data in (
        (103, b"def"),
        (100, b"ab"),
        (100, b"abc"),
        (108, b"ij"),
        (104, b"efg"),
        (105, b"fghij"),
        (99, b"xa"),
    ):
        pieces += way.add(at, data, 0)
    assert text_of(pieces) == b"abcdefghij"
    assert way.held == 0
    assert way.repeated == 10


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=300), st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_any_order_gives_the_stream(stream: bytes, first: int, rng: random.Random) -> None:
    way = Direction()
    way.begins(first)
    cuts = []
    at = 0
    while at < len(stream):
        size = rng.randint(1, 40)
        cuts.append((at, stream[at : at + size]))
        at += rng.randint(1, size)
    cuts += rng.sample(cuts, rng.randint(0, len(cuts)))
    rng.shuffle(cuts)
    pieces = [piece for at, data in cuts for piece in way.add((first + 1 + at) & 0xFFFFFFFF, data, 0)]
    assert text_of(pieces + way.finish()) == stream
    assert way.held == 0


def test_numbers_wrap() -> None:
    way = Direction()
    assert text_of(way.add(0xFFFFFFFE, b"abcd", 0)) == b"abcd"
    assert way.add(0xFFFFFFFF, b"bcd", 0) == []
    assert text_of(way.add(2, b"ef", 0)) == b"ef"


def test_a_hole_is_given_up_when_the_other_side_has_it() -> None:
    way = Direction()
    way.add(0, b"abc", 0)
    assert way.add(10, b"klm", 0) == []
    assert way.acknowledged(3, SECOND) == []
    assert way.acknowledged(3, 2 * SECOND) == [], "it may still be sent again"
    assert way.acknowledged(13, 3 * SECOND) == [], "packets of two interfaces may be mixed up"
    assert way.acknowledged(13, 3 * SECOND + PATIENCE_NS) == [Piece(7, b"klm")]
    assert way.add(13, b"n", 4 * SECOND) == [Piece(0, b"n")]
    assert way.add(5, b"late", 5 * SECOND) == []


def test_a_hole_is_given_up_at_the_end_and_when_too_much_waits() -> None:
    way = Direction()
    way.add(0, b"a", 0)
    way.add(5, b"f", 0)
    way.add(9, b"j", 0)
    assert text_of(way.finish()) == b"<4>f<3>j"
    way = Direction()
    way.add(0, b"a", 0)
    pieces = []
    for number in range(MAX_AHEAD // 1000):
        pieces += way.add(1001 + 1000 * number, bytes(1000), 0)
        assert way.held <= MAX_AHEAD + 2000
    assert pieces[0].missing == 1000
    assert sum(len(piece.data) for piece in pieces) + way.held // 1128 * 1000 == MAX_AHEAD // 1000 * 1000


# --- frames out of a stream -----------------------------------------------------------------------------------------


def scanned(scanner: Scanner, *pieces: bytes | int) -> list[Item]:
    found = []
    for piece in pieces:
        found += scanner.missing(piece) if isinstance(piece, int) else scanner.feed(piece)
    return [*found, *scanner.finish()]


def sequences(items: list[Item]) -> list[int]:
    return [item.sequence for item in items if isinstance(item, Frame)]


def in_pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 7, 16, 24, 100, 100_000])
def test_from_the_start_every_frame_is_found(size: int) -> None:
    frames = [HELLO_A, *creates(1, 5), wire.pack(Opcode.HEARTBEAT)]
    scanner = Scanner(from_start=True)
    found = scanned(scanner, *in_pieces(b"".join(frames), size))
    assert (
        [wire.pack(*frame) for frame in found if isinstance(frame, Frame)] == frames == [wire.pack(*f) for f in found]
    )  # type: ignore[misc]
    assert scanner.kind is Kind.SYNC
    assert scanner.held == 0


@pytest.mark.parametrize("size", [1, 7, 16, 24, 100, 100_000])
@pytest.mark.parametrize("cut", [1, 15, 16, 17, 40, 503, 504])
def test_a_beginning_within_the_connection(cut: int, size: int) -> None:
    stream = b"".join(creates(1, 5))
    found = scanned(Scanner(from_start=False), *in_pieces(stream[cut:], size))
    assert sequences(found) == ([1, 2, 3, 4, 5][(cut + 503) // 504 :])
    (skipped,) = [item for item in found if isinstance(item, Skipped)] or [Skipped(0, "")]
    assert skipped.size == -cut % 504
    assert skipped.size == 0 or "begins within" in skipped.why


def test_sessions_that_look_like_headers_do_not_deceive() -> None:
    """Whoever is a client of a load balancer chooses some bytes of its sessions."""
    records = sessions(5)
    for at, bait in enumerate((wire.pack(Opcode.ACK, 9), HEADER.pack(wire.MAGIC, 1, 16, 0x68, 7))):
        records[at : at + 1].view(np.uint8)[96 : 96 + 16] = np.frombuffer(bait, np.uint8)
    frame = bytes(codec.pack_records(Opcode.CREATE, 3, records, IPV4))
    assert frame.count(b"DP\x01") == 3
    found = scanned(Scanner(from_start=False), frame[5:] + b"".join(creates(4, 2)))
    assert sequences(found) == [4, 5]


@pytest.mark.parametrize("at", range(0, 1009, 63))
@pytest.mark.parametrize("size", [1, 100, 504, 700])
def test_a_hole_costs_the_frames_that_it_touches(at: int, size: int) -> None:
    stream = b"".join(creates(1, 6))
    found = scanned(Scanner(from_start=True), stream[:at], size, stream[at + size :])
    touched = range(at // 504, -(-(at + size) // 504))
    lost = set(touched)
    assert sequences(found) == [number + 1 for number in range(6) if number not in lost]
    assert any(isinstance(item, Skipped) for item in found)
    assert all(not isinstance(item, Refused) for item in found)


def test_a_hole_within_one_frame_needs_no_search() -> None:
    """After it stands something that the search would take for a header."""
    records = sessions(5)
    records[3:4].view(np.uint8)[96:112] = np.frombuffer(wire.pack(Opcode.ACK, 9), np.uint8)
    stream = bytes(codec.pack_records(Opcode.CREATE, 1, records, IPV4)) + b"".join(creates(2, 2))
    found = scanned(Scanner(from_start=True), stream[:100], 50, *in_pieces(stream[150:], 9))
    assert sequences(found) == [2, 3]
    assert found[0] == Skipped(100, "the rest of CREATE #1 is not in the capture (50 bytes are missing)")
    two = scanned(Scanner(from_start=True), stream[:100], 50, stream[150:160], 30, stream[190:])
    assert two == found


def test_what_is_not_allowed_is_said_and_passed_over() -> None:
    good = creates(1, 3)
    bad = HEADER.pack(wire.MAGIC, 2, Opcode.ACK, 0, 0)
    found = scanned(Scanner(from_start=True), good[0] + bad + good[1] + good[2])
    assert sequences(found) == [1, 2, 3]
    (refused,) = [item for item in found if isinstance(item, Refused)]
    assert refused.error.fault is Fault.VERSION
    assert Skipped(16, "no frame") in found


def test_the_end_within_a_frame() -> None:
    (frame,) = creates(1, 1)
    assert scanned(Scanner(from_start=True), frame, frame[:90])[1:] == [Skipped(90, "the capture ends within a frame")]


@pytest.mark.parametrize("size", [1, 5, 100, 100_000])
def test_tls_from_the_start(size: int) -> None:
    scanner = Scanner(from_start=True)
    assert scanned(scanner, *in_pieces(CLIENT_HELLO + tls_records(700, 90), size)) == []
    assert scanner.kind is Kind.TLS
    assert scanner.held == 0


@pytest.mark.parametrize("size", [11, 1448, 100_000])
@pytest.mark.parametrize("cut", [0, 3, 800])
def test_tls_from_its_middle(cut: int, size: int) -> None:
    scanner = Scanner(from_start=False)
    assert scanned(scanner, *in_pieces(tls_records(1200, 40, 9000, 300, 300)[cut:], size)) == []
    assert scanner.kind is Kind.TLS


def test_something_else() -> None:
    scanner = Scanner(from_start=True)
    assert scanned(scanner, b"GET / HTTP/1.1\r\n\r\n", 10, b"more") == []
    assert (scanner.kind, scanner.starts_with) == (Kind.OTHER, b"GET / HTTP/1.1\r\n")


def test_something_else_from_its_middle_is_not_kept() -> None:
    noise, scanner = random.Random(2), Scanner(from_start=False)
    for _ in range(SEARCH_BYTES // 10_000 + 2):
        assert scanner.feed(noise.randbytes(10_000)) == []
        assert scanner.held < 100_000
    assert scanner.kind is Kind.OTHER


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(st.binary(max_size=60), st.sampled_from([HELLO_A, wire.pack(Opcode.ACK, 3), 40, 600])), max_size=9
    ),
    st.booleans(),
)
def test_no_noise_breaks_it_and_every_byte_is_accounted_for(pieces: list[bytes | int], from_start: bool) -> None:
    scanner = Scanner(from_start)
    found = scanned(scanner, *pieces)
    if scanner.kind is Kind.SYNC:
        fed = sum(len(piece) for piece in pieces if isinstance(piece, bytes))
        told = sum(item.size for item in found if isinstance(item, Skipped))
        told += sum(HEADER.size + len(item.body) for item in found if isinstance(item, Frame))
        assert told <= fed


# --- links: two directions, and what frames say -----------------------------------------------------------------------


class Talk:
    """Makes the segments of a connection."""

    def __init__(
        self, a: tuple[str, int] = A, b: tuple[str, int] = B, *, syn: bool = True, isn: int = 0xFFFFFF00
    ) -> None:
        self.next = {a: isn, b: 77}
        self.a, self.b = a, b
        self.now_ns = START
        self.segments: list[Segment] = []
        if syn:
            for source in (a, b):
                self._add(source, b"", syn=True)

    def say(self, source: tuple[str, int], data: bytes, size: int = 1448) -> "Talk":
        for part in in_pieces(data, size):
            self._add(source, part)
        return self

    def _add(self, source: tuple[str, int], data: bytes, syn: bool = False) -> None:
        other = self.b if source == self.a else self.a
        self.now_ns += 1_000_000
        acknowledged = None if syn and source == self.a else self.next[other]
        self.segments.append(Segment(self.now_ns, source, other, self.next[source], acknowledged, syn, data))
        self.next[source] = (self.next[source] + len(data) + syn) & 0xFFFFFFFF

    def found(self, port: int | None = None) -> list[Seen | Said]:
        return list(through(Links(port), self.segments))


def through(links: Links, segments: Iterable[Segment]) -> Iterable[Seen | Said]:
    for segment in segments:
        yield from links.segment(segment)
    yield from links.finish()


def opcodes(found: Iterable[Seen | Said]) -> list[str]:
    return [item.opcode.name if isinstance(item, Seen) else item.what for item in found]


def test_a_whole_link() -> None:
    records = sessions(3)
    frames = [
        HELLO_A,
        wire.pack_snapshot_begin(1, 1, SyncReason.FIRST),
        bytes(codec.pack_records(Opcode.CREATE, 2, records, IPV4)),
        wire.pack_snapshot_end(3, 1),
        bytes(codec.pack_deletes(4, np.array([2]), np.array([1], np.uint32))),
    ]
    talk = Talk().say(A, frames[0]).say(B, HELLO_B).say(A, b"".join(frames[1:]), 41).say(B, wire.pack(Opcode.ACK, 4))
    talk.say(B, wire.pack_refuse(Reason.REPLACED, "enough") + wire.pack_resync(SyncReason.GAP))
    found = talk.found()
    assert opcodes(found) == [
        "HELLO", "HELLO", "SNAPSHOT_BEGIN", "CREATE", "SNAPSHOT_END", "DELETE", "ACK", "REFUSE", "RESYNC",
    ]  # fmt: skip
    seen = [item for item in found if isinstance(item, Seen)]
    assert [item.source for item in seen] == [A, B, A, A, A, A, B, B, B]
    assert seen[0].about["node"] == "a"
    assert seen[2].about == {"number": 1, "reason": "first"}
    assert seen[3].about == {"count": 3, "kind": "ipv4", "raw_bytes": 288, "compressed": False}
    assert seen[3].sessions is not None
    assert seen[3].sessions.tobytes() == records.tobytes()
    assert seen[5].ended == [(2, 1)]
    assert seen[7].about == {"reason": "replaced", "text": "enough"}
    assert seen[3].time_ns > seen[2].time_ns >= START
    assert all(item.note is None and item.fault is None for item in seen)


def test_segments_lost_repeated_and_out_of_order() -> None:
    talk = Talk().say(A, HELLO_A).say(A, b"".join(creates(1, 9)), 100)
    segments = talk.segments
    mixed = [*segments[:5], segments[7], segments[5], segments[6], segments[6], *segments[8:]]
    links = Links()
    assert sequences_of(through(links, mixed)) == list(range(1, 10))
    assert links.counts.repeated_bytes == 100
    lossy = segments[:20] + segments[21:]
    found = list(through(Links(), lossy))
    assert len(sequences_of(found)) == 8
    assert opcodes(found).count("skipped") >= 1
    (gap,) = [item for item in found if isinstance(item, Seen) and item.note]
    assert "frames are missing" in str(gap.note)


def sequences_of(found: Iterable[Seen | Said]) -> list[int]:
    return [item.sequence for item in found if isinstance(item, Seen) and item.sequence]


def test_a_capture_that_begins_within_a_connection() -> None:
    stream = b"".join(creates(7, 4))
    talk = Talk(syn=False).say(A, stream[100:]).say(B, wire.pack(Opcode.ACK, 10))
    found = talk.found()
    assert opcodes(found) == ["skipped", "CREATE", "CREATE", "CREATE", "ACK"]
    assert isinstance(found[0], Said)
    assert (found[0].size, found[0].text) == (404, "the capture begins within the connection")


def test_a_new_connection_between_the_same_ports() -> None:
    first = Talk().say(A, HELLO_A + creates(1, 1)[0][:50])
    second = Talk(isn=5).say(A, HELLO_A + creates(1, 1)[0])
    links = Links()
    found = list(through(links, first.segments + second.segments))
    assert opcodes(found) == ["HELLO", "skipped", "HELLO", "CREATE"]
    assert links.counts.links == 2
    within = Talk(syn=False).say(A, creates(5, 1)[0])
    assert opcodes(through(Links(), within.segments + second.segments)) == ["CREATE", "HELLO", "CREATE"]
    again = [*first.segments[:2], *first.segments]  # the same SYN, sent again
    assert opcodes(through(Links(), again)) == ["HELLO", "skipped"]


def test_replayed_frames_and_faults_are_said() -> None:
    one, two = creates(1, 2)
    beyond = bytes(codec.pack_records(Opcode.CREATE, 3, sessions(1, first=SLOTS), IPV4))
    found = Talk().say(A, HELLO_A + one + two + one + beyond).found()
    seen = [item for item in found if isinstance(item, Seen)]
    assert [bool(item.note) for item in seen] == [False, False, False, True, True]
    assert "again" in str(seen[3].note)
    assert seen[4].fault is not None
    assert seen[4].fault.fault is Fault.RECORD
    assert seen[4].about["count"] == 1
    assert seen[4].sessions is None


def test_encrypted_links_are_said_once() -> None:
    links = Links()
    talk = Talk().say(A, CLIENT_HELLO).say(B, tls_records(900)).say(A, tls_records(100, 200))
    found = list(through(links, talk.segments))
    assert opcodes(found) == ["encrypted"]
    assert (links.counts.encrypted, links.counts.frames) == (1, 0)


def test_other_connections_are_counted_and_named_for_a_port() -> None:
    talk = Talk().say(A, b"GET / HTTP/1.1\r\n\r\n").say(B, b"HTTP/1.1 200 OK\r\n\r\n")
    links = Links()
    assert list(through(links, talk.segments)) == []
    assert links.counts.others == 1
    assert opcodes(talk.found(7700)) == ["other"]
    assert talk.found(7701) == []


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "MAX_CONNECTIONS", 10)
    talks = [Talk(("10.0.0.1", 1000 + number)).say(A, b"") for number in range(50)]
    for talk in talks:
        talk.say(talk.a, HELLO_A[:30])
    links = Links()
    found = list(through(links, itertools.chain.from_iterable(talk.segments for talk in talks)))
    assert opcodes(found).count("given-up") == links.counts.given_up == 40
    monkeypatch.setattr(links_module, "MAX_HELD", 200)
    links = Links()
    found = list(through(links, itertools.chain.from_iterable(talk.segments for talk in talks[:10])))
    assert links.counts.given_up == 4


@pytest.mark.parametrize("seconds", [0, 253402300800, 1 << 62, -1])
def test_any_time_can_be_shown(seconds: int) -> None:
    said = Said(seconds * 1_000_000_000, ("10.0.0.1", 1), ("10.0.0.2", 2), "refused", "no frame")
    (line,) = show.lines(said, verbose=False)
    assert line.endswith("10.0.0.1:1 -> 10.0.0.2:2  refused: no frame")
