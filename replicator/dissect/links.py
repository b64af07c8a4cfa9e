# SPDX-License-Identifier: GPL-2.0-or-later
"""From the TCP segments of a capture to the frames of its links, each with what can be said of it.

Rules: pure. Each connection has two directions; each direction is put together (``reassembly``), cut into frames
(``scan``), and each frame is judged by the parsers that the nodes use. Connections that were not heard of for the
longest time are given up when there are too many, or when all of them hold too much: that is counted and said.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from collector.record import Records
from replicator import blocks, codec, wire
from replicator.codec import BODY, ENDED, IPV4, IPV6
from replicator.wire import HEADER, SEQUENCED, Frame, Opcode, ProtocolError, Reason, Role, SyncReason

from .reassembly import Direction, Piece
from .scan import Item, Kind, Scanner, Skipped

MAX_CONNECTIONS = 4096
MAX_HELD = 64 << 20  # bytes, of all connections
KINDS = {IPV4: "ipv4", IPV6: "ipv6", ENDED: "ended"}

End = tuple[str, int]  # address, port


class Segment(NamedTuple):
    """A TCP segment as it was captured; perhaps less than was sent."""

    time_ns: int  # wall clock
    source: End
    destination: End
    sequence: int
    acknowledged: int | None
    syn: bool
    data: bytes


@dataclass
class Seen:
    """A frame. ``about``: what it says, plain values by name. ``fault``: what a node finds wrong with its body."""

    time_ns: int
    source: End
    destination: End
    opcode: Opcode
    sequence: int
    size: int  # with its header
    about: dict[str, Any]
    note: str | None = None
    fault: ProtocolError | None = None
    sessions: Records | None = None
    ended: list[tuple[int, int]] | None = None  # slot, generation


@dataclass
class Said:
    """Something about a direction that is no frame. ``what``: skipped, refused, encrypted, other or given-up."""

    time_ns: int
    source: End
    destination: End
    what: str
    text: str
    size: int = 0


@dataclass
class Counts:
    """Of a whole capture."""

    frames: int = 0
    faults: int = 0
    links: int = 0  # connections with a frame of ours
    encrypted: int = 0
    others: int = 0
    given_up: int = 0
    skipped_bytes: int = 0
    repeated_bytes: int = 0  # sent, or captured, again


@dataclass
class _Way:
    source: End
    destination: End
    direction: Direction = field(default_factory=Direction)
    scanner: Scanner | None = None
    syn: int | None = None
    slots: int = 1 << 32  # of the sender's pool, once its HELLO was seen
    sequence: int | None = None  # of the last frame that has one

    @property
    def kind(self) -> Kind:
        return self.scanner.kind if self.scanner is not None else Kind.UNKNOWN

    @property
    def held(self) -> int:
        return self.direction.held + (self.scanner.held if self.scanner is not None else 0)


class _Connection:
    def __init__(self, first: Segment) -> None:
        self.ways = {
            first.source: _Way(first.source, first.destination),
            first.destination: _Way(first.destination, first.source),
        }
        self.held = 0
        self.said: set[Kind] = set()

    def begins_anew(self, segment: Segment) -> bool:
        """Whether this SYN is of another connection between the same ports."""
        if not segment.syn:
            return False
        way = self.ways[segment.source]
        if way.syn is None:
            way.syn = segment.sequence
            return way.direction.started
        return way.syn != segment.sequence


class Links:
    """Feed ``segment`` in the order of the capture, ``finish`` at its end; both give what was found."""

    def __init__(self, port: int | None = None) -> None:
        """``port``: look at connections from or to it only, and say what they are if they are not ours."""
        self.counts = Counts()
        self._port = port
        self._connections: OrderedDict[frozenset[End], _Connection] = OrderedDict()
        self._held = 0
        self._time_ns = 0

    def segment(self, segment: Segment) -> Iterator[Seen | Said]:
        """The next one."""
        if self._port is not None and self._port not in (segment.source[1], segment.destination[1]):
            return
        self._time_ns = segment.time_ns
        key = frozenset((segment.source, segment.destination))
        connection = self._connections.get(key)
        if connection is not None and connection.begins_anew(segment):
            yield from self._close(key)
            connection = None
        if connection is None:
            connection = self._connections[key] = _Connection(segment)
            connection.begins_anew(segment)
        self._connections.move_to_end(key)
        way, back = connection.ways[segment.source], connection.ways[segment.destination]
        pieces: list[Piece] = []
        if segment.syn:
            way.direction.begins(segment.sequence)
        if segment.data:
            sequence = (segment.sequence + segment.syn) & 0xFFFFFFFF
            pieces = way.direction.add(sequence, segment.data, segment.time_ns)
        yield from self._take(connection, way, pieces)
        if segment.acknowledged is not None:
            yield from self._take(connection, back, back.direction.acknowledged(segment.acknowledged, segment.time_ns))
        self._held += way.held + back.held - connection.held
        connection.held = way.held + back.held
        while len(self._connections) > MAX_CONNECTIONS or (self._held > MAX_HELD and len(self._connections) > 1):
            oldest = next(iter(self._connections))
            first = next(iter(self._connections[oldest].ways.values()))
            if self._connections[oldest].held:
                self.counts.given_up += 1
                text = "too many connections in this capture: what was not complete of this one is given up"
                yield Said(self._time_ns, first.source, first.destination, "given-up", text)
            yield from self._close(oldest)

    def finish(self) -> Iterator[Seen | Said]:
        """The capture is over."""
        while self._connections:
            yield from self._close(next(iter(self._connections)))

    def _close(self, key: frozenset[End]) -> Iterator[Seen | Said]:
        connection = self._connections.pop(key)
        self._held -= connection.held
        for way in connection.ways.values():
            yield from self._take(connection, way, way.direction.finish())
            self.counts.repeated_bytes += way.direction.repeated
            if way.scanner is not None:
                yield from self._tell(connection, way, way.scanner.finish())
        kinds = {way.kind for way in connection.ways.values()}
        self.counts.links += Kind.SYNC in kinds
        self.counts.encrypted += Kind.TLS in kinds
        self.counts.others += not kinds & {Kind.SYNC, Kind.TLS}

    def _take(self, connection: _Connection, way: _Way, pieces: list[Piece]) -> Iterator[Seen | Said]:
        for missing, data in pieces:
            if way.scanner is None:
                way.scanner = Scanner(way.direction.from_start and not missing)
            elif missing:
                yield from self._tell(connection, way, way.scanner.missing(missing))
            yield from self._tell(connection, way, way.scanner.feed(data))

    def _tell(self, connection: _Connection, way: _Way, items: list[Item]) -> Iterator[Seen | Said]:
        for item in items:
            if isinstance(item, Frame):
                self.counts.frames += 1
                seen = self._judge(way, item)
                self.counts.faults += seen.fault is not None
                yield seen
            elif isinstance(item, Skipped):
                self.counts.skipped_bytes += item.size
                yield Said(self._time_ns, way.source, way.destination, "skipped", item.why, item.size)
            else:
                self.counts.faults += 1
                text = str(item.error)
                yield Said(self._time_ns, way.source, way.destination, "refused", text)
        kind = way.kind
        if kind in (Kind.TLS, Kind.OTHER) and kind not in connection.said:
            connection.said.add(kind)
            if kind is Kind.TLS:
                text = "this connection is TLS, what it carries cannot be read"
                yield Said(self._time_ns, way.source, way.destination, "encrypted", text)
            elif self._port is not None:
                assert way.scanner is not None
                text = f"not the sync protocol: it begins with {way.scanner.starts_with!r}"
                yield Said(self._time_ns, way.source, way.destination, "other", text)

    def _judge(self, way: _Way, frame: Frame) -> Seen:
        seen = Seen(
            self._time_ns, way.source, way.destination, frame.opcode, frame.sequence, HEADER.size + len(frame.body), {}
        )
        if frame.opcode in SEQUENCED:
            last, way.sequence = way.sequence, frame.sequence
            if last is not None and frame.sequence <= last:
                seen.note = f"again, or late: #{last} came before"
            elif last is not None and frame.sequence != last + 1:
                seen.note = f"frames are missing: #{last} came before"
        try:
            _explain(seen, frame, way)
        except ProtocolError as error:
            seen.fault = error
        return seen


def _explain(seen: Seen, frame: Frame, way: _Way) -> None:
    """What a frame says, into ``about``. Raises ProtocolError, as the node that it is for would."""
    body, about = frame.body, seen.about
    if frame.opcode is Opcode.HELLO:
        way.sequence = None
        hello = wire.parse_hello(body)
        about.update(
            node=hello.node, role=Role(hello.role).name.lower(), versions=list(hello.versions),
            schema=f"{hello.schema:#010x}", epoch=hello.epoch, instance=hello.instance, replica=hello.replica,
            slots=hello.slots, lz4=bool(hello.capabilities & wire.LZ4),
            zstd=bool(hello.capabilities & wire.ZSTD),
            wants=bool(hello.capabilities & wire.WANTS),
        )  # fmt: skip
        if hello.role is Role.SENDER:
            way.slots = hello.slots
        if hello.schema != wire.SCHEMA:
            seen.note = "session records of another shape than this release has"
    elif frame.opcode is Opcode.SNAPSHOT_BEGIN:
        number, reason = wire.parse_snapshot_begin(body)
        about.update(number=number, reason=_name(SyncReason, reason))
    elif frame.opcode is Opcode.SNAPSHOT_END:
        about.update(number=wire.parse_snapshot_end(body))
    elif frame.opcode is Opcode.RESYNC:
        about.update(reason=_name(SyncReason, wire.parse_resync(body)))
    elif frame.opcode is Opcode.REFUSE:
        reason, text = wire.parse_refuse(body)
        about.update(reason=_name(Reason, reason), text=text)
    elif frame.opcode is Opcode.WANT:
        about.update(flows=len(codec.parse_want(body)))
    elif frame.opcode not in (Opcode.ACK, Opcode.HEARTBEAT):
        kind, flags, count, raw = BODY.unpack_from(body)
        about.update(
            count=count, kind=KINDS.get(kind, str(kind)), raw_bytes=raw, compressed=flags != blocks.PLAIN,
            **({"compression": blocks.NAMES[flags].lower()} if flags in (blocks.LZ4, blocks.ZSTD) else {}),
        )  # fmt: skip
        if frame.opcode is Opcode.DELETE:
            slots, generations = codec.parse_deletes(body, way.slots)
            seen.ended = list(zip(slots.tolist(), generations.tolist(), strict=True))
        else:
            seen.sessions = codec.parse_records(body, way.slots)


def _name(enumeration: Any, value: int) -> str:
    try:
        return str(enumeration(value).name).lower()
    except ValueError:
        return str(value)
