# SPDX-License-Identifier: GPL-2.0-or-later
"""The sync protocol as Scapy packets: to take frames apart, and to forge them.

Rules: numbers, names, bounds and the shape of a session come from wire.py, codec.py and collector/record.py. What is
left to its default (``None``) is computed: lengths, counts, the kind of a body, the id of a node; what is given is
sent, right or wrong. Nothing in here judges: ``wire`` and ``codec`` do. Importing this imports Scapy, which takes most
of a second.

    frame = SyncFrame(sequence=5) / SyncCreate(items=[SessionIPv4(slot=7, caddr="10.0.0.1", cport=4000)])
    SyncFrame(bytes(frame)).show()
    SyncFrame(opcode="ACK", sequence=5, magic=0xDEAD)

No port belongs to the protocol: ``bind(7700)`` lets Scapy dissect TCP of that port, with
``sniff(session=TCPSession)`` as whole frames (``dpvs-probe decode`` copes with more: see ``reassembly`` and ``scan``).
"""

import socket
import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Any

from scapy.fields import (
    ByteEnumField,
    ByteField,
    Field,
    FieldLenField,
    FlagsField,
    IPField,
    LEIntEnumField,
    LEIntField,
    LELongField,
    LEShortEnumField,
    LEShortField,
    MultiEnumField,
    PacketListField,
    ShortField,
    StrField,
    StrLenField,
    XLEIntField,
    XLELongField,
    XLEShortField,
    XStrFixedLenField,
)
from scapy.layers.inet import TCP
from scapy.packet import Packet, Raw, bind_bottom_up, bind_layers, split_bottom_up

from collector import record
from collector.record import AF_INET, AF_INET6, RECORD
from replicator import blocks, query, wire
from replicator.codec import ENDED, IPV4, IPV6, SIZES
from replicator.wire import HEADER, MAX_BODY, Opcode, Reason, Role, SyncReason


def _names(enumeration: type[IntEnum]) -> dict[int, str]:
    return {member.value: member.name for member in enumeration}


class SyncFrame(Packet):
    """A frame: the header of 16 bytes; the body is the payload."""

    name = "DPVS sync"
    fields_desc = [
        XLEShortField("magic", wire.MAGIC),
        ByteField("version", wire.VERSION),
        ByteEnumField("opcode", Opcode.HEARTBEAT.value, _names(Opcode)),
        LEIntField("length", None),
        LELongField("sequence", 0),
    ]

    @classmethod
    def dispatch_hook(cls, _pkt: bytes | None = None, *_: Any, **__: Any) -> Any:
        return Raw if _pkt and len(_pkt) < HEADER.size else cls

    def post_build(self, pkt: bytes, pay: bytes) -> bytes:
        if self.length is None:
            pkt = pkt[:4] + struct.pack("<I", len(pay)) + pkt[8:]
        return pkt + pay

    def extract_padding(self, s: bytes) -> tuple[bytes, bytes]:
        return s[: self.length], s[self.length :]

    def guess_payload_class(self, payload: bytes) -> Any:
        if (self.magic, self.version) != (wire.MAGIC, wire.VERSION):
            return Raw
        return super().guess_payload_class(payload)

    @classmethod
    def tcp_reassemble(cls, data: bytes, metadata: dict[str, Any], session: dict[str, Any]) -> Packet | None:
        """For Scapy's TCPSession: a frame when all of it is there. What is no frame comes as Raw at once."""
        wanted = HEADER.size
        if len(data) >= wanted:
            magic, version, _, length, _ = HEADER.unpack_from(data)
            if (magic, version) != (wire.MAGIC, wire.VERSION) or length > MAX_BODY:
                return Raw(data)
            wanted += length
        if len(data) < wanted:
            metadata["tcp_min_len"] = wanted
            return None
        return cls(data)

    def mysummary(self) -> str:
        return str(self.sprintf("sync %SyncFrame.opcode% #%SyncFrame.sequence%"))


class SyncHello(Packet):
    """Who is there."""

    name = "HELLO"
    fields_desc = [
        ByteField("version_least", wire.VERSION),
        ByteField("version_most", wire.VERSION),
        ByteEnumField("role", Role.SENDER.value, _names(Role)),
        FieldLenField("name_length", None, length_of="node", fmt="B"),
        XLEIntField("schema", wire.SCHEMA),
        XLELongField("node_id", None),
        LELongField("epoch", 0),
        LELongField("instance", 0),
        LELongField("replica", 0),
        LEIntField("slots", 0),
        FlagsField("capabilities", wire.LZ4, -32, ["LZ4", "WANTS", "ZSTD"]),
        StrLenField("node", b"", length_from=lambda pkt: pkt.name_length),
        StrField("later", b""),
    ]

    def post_build(self, pkt: bytes, pay: bytes) -> bytes:
        if self.node_id is None:
            number = wire.node_id(bytes(self.node).decode(errors="replace"))
            pkt = pkt[:8] + struct.pack("<Q", number) + pkt[16:]
        return pkt + pay


class SyncSnapshotBegin(Packet):
    """A full sync begins."""

    name = "SNAPSHOT_BEGIN"
    fields_desc = [LEIntField("number", 1), LEIntEnumField("reason", SyncReason.FIRST.value, _names(SyncReason))]


class SyncSnapshotEnd(Packet):
    """A full sync ends."""

    name = "SNAPSHOT_END"
    fields_desc = [LEIntField("number", 1)]


class SyncResync(Packet):
    """The receiver asks for a full sync."""

    name = "RESYNC"
    fields_desc = [LEIntEnumField("reason", SyncReason.REQUESTED.value, _names(SyncReason))]


class SyncRefuse(Packet):
    """One side finds the other at fault."""

    name = "REFUSE"
    fields_desc = [
        LEShortEnumField("reason", Reason.PROTOCOL.value, _names(Reason)),
        FieldLenField("text_length", None, length_of="text", fmt="<H"),
        StrLenField("text", b"", length_from=lambda pkt: pkt.text_length),
    ]


class AddressField(Field):
    """An address of either family in 16 bytes: IPv4 in the first four, zeros after it."""

    __slots__ = ("_family",)

    def __init__(self, name: str, family: str) -> None:
        super().__init__(name, None, "16s")
        self._family = family

    def i2m(self, pkt: Packet | None, x: str | bytes | None) -> bytes:
        if x is None:
            return bytes(16)
        if isinstance(x, bytes):
            return x
        family = socket.AF_INET6 if ":" in x else socket.AF_INET
        return socket.inet_pton(family, x).ljust(16, b"\0")

    def m2i(self, pkt: Packet | None, x: bytes) -> str:
        if getattr(pkt, self._family, None) == AF_INET and not any(x[4:]):
            return socket.inet_ntop(socket.AF_INET, x[:4])
        return socket.inet_ntop(socket.AF_INET6, x)


class WantedFlow(Packet):
    """A flow whose session the receiver asks for: ``FLOW_KEY`` of ``probes.flow``."""

    name = "flow"
    fields_desc = [
        AddressField("caddr", "af"),
        AddressField("vaddr", "af"),
        ShortField("cport", 0),
        ShortField("vport", 0),
        ByteField("proto", record.TCP),
        ByteEnumField("af", AF_INET, {AF_INET: "inet", AF_INET6: "inet6"}),
        LEShortField("zero", 0),
    ]

    def extract_padding(self, s: bytes) -> tuple[bytes, bytes]:
        return b"", s


class SyncWant(Packet):
    """The receiver asks for the sessions of flows."""

    name = "WANT"
    fields_desc = [
        FieldLenField("count", None, count_of="flows", fmt="<H"),
        LEShortField("zero", 0),
        PacketListField("flows", [], WantedFlow, count_from=lambda pkt: pkt.count),
    ]


def _record_fields(kind: int) -> list[Field]:
    """The fields of a session record, from the dtype that the tables use: one cannot change without the other."""
    families = {AF_INET: "inet", AF_INET6: "inet6"}
    family = AF_INET if kind == IPV4 else AF_INET6
    states = {
        proto: dict(enumerate(names))
        for proto, names in ((record.TCP, record.TCP_STATES), (record.UDP, record.UDP_STATES))
    }
    bits = {**query.FLAG_NAMES, record.HASHED: "hashed", record.IN_TIMER: "in-timer"}
    flags = [bits.get(1 << bit, f"bit{bit}") for bit in range(16)]
    special: dict[str, Field] = {
        "generation": LEIntField("generation", 1),
        "af": ByteEnumField("af", family, families),
        "af_out": ByteEnumField("af_out", family, families),
        "proto": ByteEnumField("proto", record.TCP, query.PROTOCOL_NAMES),
        "fwdmode": ByteEnumField("fwdmode", record.FNAT, record.MODE_NAMES),
        "state": MultiEnumField("state", record.ESTABLISHED, states, depends_on=lambda pkt: pkt.proto, fmt="<H"),
        "flags": FlagsField("flags", record.HASHED, -16, flags),
        "worker": ByteField("worker", record.UNKNOWN_WORKER),
    }
    plain = {"|u1": ByteField, "<u2": LEShortField, ">u2": ShortField, "<u4": LEIntField}
    shape: Any = RECORD
    fields, end = [], 0
    for name in sorted(shape.names, key=lambda name: int(shape.fields[name][1])):
        dtype, offset = shape.fields[name][:2]
        if offset != end:
            fields.append(XStrFixedLenField("padding", bytes(offset - end), length=offset - end))
        end = offset + dtype.itemsize
        if name in special:
            fields.append(special[name])
        elif dtype.shape:
            outer = "af" if name in ("caddr", "vaddr") else "af_out"
            fields.append(IPField(name, "0.0.0.0") if kind == IPV4 else AddressField(name, outer))
        else:
            fields.append(plain[dtype.str](name, 0))
    if end != RECORD.itemsize:
        raise AssertionError("a record with padding at its end")
    return fields


class _Item(Packet):
    def extract_padding(self, s: bytes) -> tuple[bytes, bytes]:
        return b"", s


class SessionIPv4(_Item):
    """A session with addresses of 4 bytes: kind 4."""

    name = "session, IPv4"
    fields_desc = _record_fields(IPV4)


class SessionIPv6(_Item):
    """A session with addresses of 16 bytes, of any families: kind 6."""

    name = "session, any family"
    fields_desc = _record_fields(IPV6)


class EndedSession(_Item):
    """A session that ended: kind 0."""

    name = "ended session"
    fields_desc = [LEIntField("slot", 0), LEIntField("generation", 1)]


ITEMS: dict[int, type[Packet]] = {IPV4: SessionIPv4, IPV6: SessionIPv6, ENDED: EndedSession}


class KindField(ByteEnumField):
    """The kind of a body; None: that of the first item."""

    __slots__ = ("_otherwise",)

    def __init__(self, name: str, otherwise: int) -> None:
        super().__init__(name, None, {IPV4: "ipv4", IPV6: "ipv6", ENDED: "ended"})
        self._otherwise = otherwise

    def i2m(self, pkt: Packet | None, x: int | None) -> int:
        if x is not None:
            return x
        first = pkt.items[0] if pkt is not None and pkt.items else None
        return next((kind for kind, item in ITEMS.items() if type(first) is item), self._otherwise)


class ItemsField(PacketListField):
    """The items of a body, or one compressed block of them. What does not fit its announcement is left alone: Raw."""

    def addfield(self, pkt: Packet, s: bytes, val: Iterable[Any]) -> bytes:
        raw = b"".join(map(bytes, val))
        flags = int(pkt.getfieldval("flags"))
        return s + (blocks.pack(flags, raw) if flags in (blocks.LZ4, blocks.ZSTD) else raw)

    def getfield(self, pkt: Packet, s: bytes) -> tuple[bytes, list[Packet]]:
        item, raw_length = ITEMS.get(pkt.kind), pkt.raw_length
        if item is None or raw_length > MAX_BODY or raw_length != pkt.count * SIZES[pkt.kind]:
            return s, []
        rest, data = b"", s
        if pkt.flags in (blocks.LZ4, blocks.ZSTD):
            try:
                data = blocks.unpack(int(pkt.flags), s, raw_length)
            except blocks.BadBlock:
                return s, []
        elif pkt.flags != 0:
            return s, []
        else:
            whole = min(len(s), raw_length) // SIZES[pkt.kind] * SIZES[pkt.kind]
            data, rest = s[:whole], s[whole:]
        size = SIZES[pkt.kind]
        return rest, [item(data[at : at + size]) for at in range(0, len(data), size)]


def _sessions_fields(otherwise: int) -> list[Field]:
    return [
        KindField("kind", otherwise),
        FlagsField("flags", 0, 8, ["LZ4", "ZSTD"]),
        FieldLenField("count", None, count_of="items", fmt="<H"),
        FieldLenField("raw_length", None, length_of="items", fmt="<I"),
        ItemsField("items", [], ITEMS[otherwise]),
    ]


class SyncCreate(Packet):
    """Sessions that the receiver may not know. ``flags="LZ4"`` or ``"ZSTD"`` compresses them."""

    name = "CREATE"
    fields_desc = _sessions_fields(IPV4)


class SyncUpdate(Packet):
    """Sessions that changed."""

    name = "UPDATE"
    fields_desc = _sessions_fields(IPV4)


class SyncDelete(Packet):
    """Sessions that ended."""

    name = "DELETE"
    fields_desc = _sessions_fields(ENDED)


bind_layers(SyncFrame, SyncHello, opcode=Opcode.HELLO.value)
bind_layers(SyncFrame, SyncSnapshotBegin, opcode=Opcode.SNAPSHOT_BEGIN.value)
bind_layers(SyncFrame, SyncSnapshotEnd, opcode=Opcode.SNAPSHOT_END.value)
bind_layers(SyncFrame, SyncResync, opcode=Opcode.RESYNC.value)
bind_layers(SyncFrame, SyncRefuse, opcode=Opcode.REFUSE.value)
bind_layers(SyncFrame, SyncWant, opcode=Opcode.WANT.value)
bind_layers(SyncFrame, SyncCreate, opcode=Opcode.CREATE.value)
bind_layers(SyncFrame, SyncUpdate, opcode=Opcode.UPDATE.value)
bind_layers(SyncFrame, SyncDelete, opcode=Opcode.DELETE.value)


def bind(port: int) -> None:
    """From now on Scapy takes TCP from and to ``port`` for sync links."""
    bind_bottom_up(TCP, SyncFrame, sport=port)
    bind_bottom_up(TCP, SyncFrame, dport=port)


def unbind(port: int) -> None:
    """Undo ``bind``."""
    split_bottom_up(TCP, SyncFrame, sport=port)
    split_bottom_up(TCP, SyncFrame, dport=port)


def frames(stream: bytes) -> list[Packet]:
    """All frames of a stream of bytes that begins with one; what is no frame, or not all of one, comes last, as Raw."""
    found: list[Packet] = []
    while stream:
        frame = SyncFrame.tcp_reassemble(stream, {}, {})
        if frame is None or isinstance(frame, Raw):
            return [*found, Raw(stream)]
        size = HEADER.size + frame.length
        found.append(SyncFrame(stream[:size]))
        stream = stream[size:]
    return found
