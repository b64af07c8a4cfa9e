# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames and what the small ones carry. docs/protocol.md is the reference.

Rules: a frame is a 16-byte header (magic u16, version u8, opcode u8, body length u32, sequence u64, little-endian,
packed) and its body. A length is checked against what its opcode may carry before a byte is stored for it. Nothing in
here reads, sends or waits. Whatever a peer sends, decoding gives a value or raises ``ProtocolError``.
"""

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any, NamedTuple

from collector.record import RECORD
from probes.errors import DpvsProbeError

MAGIC = 0x5044  # "DP"
VERSION = 1
HEADER = struct.Struct("<HBBIQ")
MAX_BODY = 1 << 20
MAX_NAME = 64
MAX_WORKERS = 255  # one byte; DPVS has at most 64
MAX_TEXT = 256

_HELLO = struct.Struct("<BBBBIQQQQII")  # then the name, then workers u8 where they are known
_REFUSE = struct.Struct("<HH")  # then the text
_SNAPSHOT = struct.Struct("<II")
_U32 = struct.Struct("<I")
WANT = struct.Struct("<HH")  # count, 0; then the flows
WANT_BYTES = 40  # of a flow
MAX_WANT = 256  # flows in a frame


class Opcode(IntEnum):
    """What a frame is for. Those from 16 on carry sessions."""

    HELLO = 1
    ACK = 2
    HEARTBEAT = 3
    SNAPSHOT_BEGIN = 4
    SNAPSHOT_END = 5
    RESYNC = 6
    REFUSE = 7
    WANT = 8
    CREATE = 16
    UPDATE = 17
    DELETE = 18


# Least and most bytes of a body.
BODY_BYTES = {
    Opcode.HELLO: (_HELLO.size + 1, 1024),  # longer than we know: from a later version, the rest is not looked at
    Opcode.ACK: (0, 0),
    Opcode.HEARTBEAT: (0, 0),
    Opcode.SNAPSHOT_BEGIN: (_SNAPSHOT.size, _SNAPSHOT.size),
    Opcode.SNAPSHOT_END: (_U32.size, _U32.size),
    Opcode.RESYNC: (_U32.size, _U32.size),
    Opcode.REFUSE: (_REFUSE.size, _REFUSE.size + MAX_TEXT),
    Opcode.WANT: (WANT.size, WANT.size + MAX_WANT * WANT_BYTES),
    Opcode.CREATE: (8, MAX_BODY),
    Opcode.UPDATE: (8, MAX_BODY),
    Opcode.DELETE: (8, MAX_BODY),
}
_LIMITS = [BODY_BYTES.get(Opcode(code)) if code in set(Opcode) else None for code in range(256)]
# Frames that a receiver has to take in order, none missing.
SEQUENCED = frozenset((Opcode.CREATE, Opcode.UPDATE, Opcode.DELETE, Opcode.SNAPSHOT_BEGIN, Opcode.SNAPSHOT_END))


class Fault(StrEnum):
    """The kinds of ``ProtocolError``."""

    MAGIC = "bad magic"
    VERSION = "bad version"
    OPCODE = "unknown opcode"
    LENGTH = "bad length"
    COUNT = "bad count"
    COMPRESSION = "bad compression"
    RECORD = "bad record"
    TEXT = "bad text"
    SEQUENCE = "bad sequence"
    UNEXPECTED = "unexpected frame"


class ProtocolError(DpvsProbeError):
    """The peer sent what the protocol does not allow."""

    help_text = "Look whether another program uses this port, and that both nodes run releases that fit."

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(f"{fault.value}: {detail}")
        self.fault = fault


class Reason(IntEnum):
    """Why a link is refused, or ended by the side that says so."""

    VERSION = 1  # no protocol version in common
    SCHEMA = 2  # records of another shape
    SAME_NODE = 3  # both ends have one node name
    STALE_EPOCH = 4  # a later run of that node is known
    TOO_LARGE = 5  # more slots, or more origins, than the receiver takes
    PROTOCOL = 6  # what came made no sense
    ROLE = 7  # both ends would send, or both receive
    REPLACED = 8  # a newer connection of the same origin took over
    NOT_PROVEN = 9  # HELLO names another node than the certificate


class SyncReason(IntEnum):
    """Why a full sync is made rather than a partial one."""

    FIRST = 1  # nothing was ever sent to this peer
    PEER_RESTARTED = 2  # it is another run of the peer
    NOT_HELD = 3  # the peer has let go of what it held of us
    GAP = 4  # the peer missed a frame
    REQUESTED = 5  # the peer or the operator asks for it
    SHARED_ANEW = 6  # the peers share the sessions among them in another way


class Role(IntEnum):
    """Who dials sends sessions; who listens receives them."""

    SENDER = 1
    RECEIVER = 2


LZ4 = 1  # capability: bodies may be LZ4 blocks
WANTS = 2  # capability: a sender that answers WANT
ZSTD = 4  # capability: bodies may be Zstandard frames


def schema_of(dtype: Any) -> int:
    """A number for the shape of a record: names, formats and offsets of its fields."""
    shape = [f"{dtype.itemsize}"]
    for name in dtype.names:
        kind, offset = dtype.fields[name][:2]
        shape.append(f"{name}@{offset}:{kind.itemsize // kind.base.itemsize}*{kind.base.str}")
    digest = hashlib.blake2b(" ".join(shape).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


SCHEMA = schema_of(RECORD)


def node_id(name: str) -> int:
    """The number that stands for a node: blake2b of its name, 8 bytes, little-endian."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Hello:
    """How each side of a link introduces itself."""

    node: str
    epoch: int  # one run of dpvs-probe: wall clock at its attach, ns
    role: Role = Role.SENDER
    slots: int = 0  # of the sender's session pool; 0 from a receiver
    instance: int = 0  # one life of the DPVS process: anything that differs between two of them
    replica: int = 0  # from a receiver: names what it holds of the sender; another number, nothing held
    capabilities: int = LZ4
    schema: int = SCHEMA
    versions: tuple[int, int] = (VERSION, VERSION)
    workers: int = 0  # of the DPVS, at most MAX_WORKERS; 0: not known

    @property
    def node_id(self) -> int:
        """``node_id`` of the name."""
        return node_id(self.node)


class Frame(NamedTuple):
    """One frame as it came."""

    opcode: Opcode
    sequence: int
    body: bytes


def pack(opcode: Opcode, sequence: int = 0, body: bytes = b"") -> bytes:
    """A whole frame."""
    return HEADER.pack(MAGIC, VERSION, opcode, len(body), sequence) + body


def pack_hello(hello: Hello) -> bytes:
    """A HELLO frame. Raises ValueError for a name that is empty or longer than MAX_NAME bytes: it is never cut."""
    name = hello.node.encode()
    if not 0 < len(name) <= MAX_NAME:
        raise ValueError(f"a node name has 1 to {MAX_NAME} bytes")
    fixed = _HELLO.pack(
        *hello.versions, hello.role, len(name), hello.schema, hello.node_id, hello.epoch, hello.instance, hello.replica,
        hello.slots, hello.capabilities,
    )  # fmt: skip
    return pack(Opcode.HELLO, 0, fixed + name + (bytes([min(hello.workers, MAX_WORKERS)]) if hello.workers else b""))


def parse_hello(body: bytes) -> Hello:
    """The HELLO in a body. Version and schema are not judged here."""
    (low, high, role, length, schema, number, epoch, instance, replica, slots, capabilities) = _HELLO.unpack_from(body)
    if low > high or low == 0:
        raise ProtocolError(Fault.VERSION, f"versions {low} to {high} offered")
    if role not in (Role.SENDER, Role.RECEIVER):
        raise ProtocolError(Fault.UNEXPECTED, f"role {role}")
    if not 0 < length <= MAX_NAME or _HELLO.size + length > len(body):
        raise ProtocolError(Fault.LENGTH, f"a node name of {length} bytes")
    try:
        name = body[_HELLO.size : _HELLO.size + length].decode()
    except UnicodeDecodeError:
        raise ProtocolError(Fault.TEXT, "a node name that is not UTF-8") from None
    if not name.isprintable():
        raise ProtocolError(Fault.TEXT, "a node name that cannot be printed")
    if node_id(name) != number:
        raise ProtocolError(Fault.TEXT, f"the id of node '{name}' is not its own")
    workers = body[_HELLO.size + length] if len(body) > _HELLO.size + length else 0
    return Hello(name, epoch, Role(role), slots, instance, replica, capabilities, schema, (low, high), workers)


def pack_refuse(reason: Reason, text: str) -> bytes:
    """A REFUSE frame; a long text is cut."""
    encoded = text.encode()[:MAX_TEXT].decode(errors="ignore").encode()
    return pack(Opcode.REFUSE, 0, _REFUSE.pack(reason, len(encoded)) + encoded)


def parse_refuse(body: bytes) -> tuple[int, str]:
    """Reason (perhaps one that only later versions know) and text, made printable."""
    reason, length = _REFUSE.unpack_from(body)
    if _REFUSE.size + length != len(body):
        raise ProtocolError(Fault.LENGTH, f"a refusal with {length} bytes of text")
    text = body[_REFUSE.size :].decode(errors="replace")
    return reason, "".join(c if c.isprintable() else "?" for c in text)


def pack_snapshot_begin(sequence: int, number: int, reason: SyncReason) -> bytes:
    """SNAPSHOT_BEGIN: a full sync, the ``number``-th of this sender, starts here."""
    return pack(Opcode.SNAPSHOT_BEGIN, sequence, _SNAPSHOT.pack(number & 0xFFFFFFFF, reason))


def parse_snapshot_begin(body: bytes) -> tuple[int, int]:
    """Number and reason."""
    number, reason = _SNAPSHOT.unpack(body)
    return number, reason


def pack_snapshot_end(sequence: int, number: int) -> bytes:
    """SNAPSHOT_END: every session that is not named since its beginning is no more."""
    return pack(Opcode.SNAPSHOT_END, sequence, _U32.pack(number & 0xFFFFFFFF))


def parse_snapshot_end(body: bytes) -> int:
    """Number of the snapshot."""
    return int(_U32.unpack(body)[0])


def pack_resync(reason: SyncReason) -> bytes:
    """RESYNC: the receiver asks for a full sync."""
    return pack(Opcode.RESYNC, 0, _U32.pack(reason))


def parse_resync(body: bytes) -> int:
    """Reason."""
    return int(_U32.unpack(body)[0])


class FrameReader:
    """Frames out of a stream of bytes, whatever its pieces.

    Holds at most one frame that is not complete, and what was fed behind it. After a ``ProtocolError`` the stream has
    no frames any more, and every call raises the same.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0
        self._error: ProtocolError | None = None

    @property
    def buffered(self) -> int:
        """Bytes that are not part of a frame returned so far."""
        return len(self._buffer) - self._at

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """More of the stream."""
        if self._at:
            del self._buffer[: self._at]
            self._at = 0
        self._buffer += data

    def next(self) -> Frame | None:
        """The next whole frame; None when more bytes are needed. Raises ProtocolError."""
        if self._error is not None:
            raise self._error.with_traceback(None)  # else each time keeps one frame more alive
        start = self._at + HEADER.size
        if len(self._buffer) < start:
            return None
        magic, version, code, length, sequence = HEADER.unpack_from(self._buffer, self._at)
        limits = _LIMITS[code]
        if magic != MAGIC:
            self._fail(Fault.MAGIC, f"a frame begins with {magic:#06x}")
        if version != VERSION:
            self._fail(Fault.VERSION, f"a frame of version {version}")
        if limits is None:
            self._fail(Fault.OPCODE, f"{code}")
        elif not limits[0] <= length <= limits[1]:
            self._fail(Fault.LENGTH, f"{length} bytes for {Opcode(code).name}")
        if len(self._buffer) < start + length:
            return None
        self._at = start + length
        return Frame(Opcode(code), sequence, bytes(memoryview(self._buffer)[start : start + length]))

    def _fail(self, fault: Fault, detail: str) -> None:
        self._error = ProtocolError(fault, detail)
        raise self._error
