# SPDX-License-Identifier: GPL-2.0-or-later
"""What two nodes say to each other over a stream to set an RDMA connection up, and while it lives.

Rules: a message is magic u32, version u8, kind u8, length u16, little-endian, and a body whose length its kind fixes or
bounds; nothing longer is stored. The dialer sends OFFER, the listener ANSWER, the dialer READY; either may send REFUSE
with a reason instead. After that both send a BEAT every half second until the end, and a BYE with the number of slots
they wrote when they close in order. The stream is authenticated and encrypted by whoever opened it, and with it all
that is said here. Nothing here reads or waits.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

MAGIC = 0x4D525044  # "DPRM"
VERSION = 1
MAX_TEXT = 200
OFFER_BYTES = 36
HEADER = struct.Struct("<IBBH")
# GID, queue pair, first packet number, LID, MTU (log2), sealed, ring's address, its key, slots, bytes of one, and for
# what seals them: epoch and offer of keys
_ENDPOINT = struct.Struct(f"<16sIIHBBQIIIQ{OFFER_BYTES}s")
_BYE = struct.Struct("<Q")

LEAST_SLOTS, MOST_SLOTS = 4, 256
LEAST_SLOT_BYTES, MOST_SLOT_BYTES = 4096, 1 << 20
MOST_RING_BYTES = 64 << 20


class Kind(IntEnum):
    """What a message is for."""

    OFFER = 1
    ANSWER = 2
    READY = 3
    REFUSE = 4
    BEAT = 5
    BYE = 6


_LIMITS = {
    Kind.OFFER: (_ENDPOINT.size, _ENDPOINT.size),
    Kind.ANSWER: (_ENDPOINT.size, _ENDPOINT.size),
    Kind.READY: (0, 0),
    Kind.REFUSE: (0, MAX_TEXT),
    Kind.BEAT: (0, 0),
    Kind.BYE: (_BYE.size, _BYE.size),
}


class BadSetup(Exception):
    """The other side does not speak this, or wants what cannot be."""


class Message(NamedTuple):
    """One message as it came."""

    kind: Kind
    body: bytes


@dataclass(frozen=True)
class Side:
    """Where one side's queue pair and ring are, and its part of the agreement on keys. ``offer`` empty: not sealed."""

    gid: bytes  # 16 bytes
    qp: int
    psn: int  # of the first packet that this side sends
    lid: int
    mtu: int  # as in ibv_mtu: 1 is 256 bytes, each step doubles
    ring: int  # address
    rkey: int
    slots: int
    slot_bytes: int
    epoch: int = 0
    offer: bytes = b""

    def pack(self, kind: Kind) -> bytes:
        """OFFER or ANSWER."""
        body = _ENDPOINT.pack(
            self.gid, self.qp, self.psn, self.lid, self.mtu, bool(self.offer), self.ring, self.rkey, self.slots,
            self.slot_bytes, self.epoch, self.offer,
        )  # fmt: skip
        return pack(kind, body)

    @classmethod
    def parse(cls, body: bytes) -> "Side":
        """From the body of OFFER or ANSWER. Raises BadSetup."""
        gid, qp, psn, lid, mtu, sealed, ring, rkey, slots, slot_bytes, epoch, offer = _ENDPOINT.unpack(body)
        if not LEAST_SLOTS <= slots <= MOST_SLOTS or not LEAST_SLOT_BYTES <= slot_bytes <= MOST_SLOT_BYTES:
            raise BadSetup(f"a ring of {slots} slots of {slot_bytes} bytes")
        if slots * slot_bytes > MOST_RING_BYTES or slot_bytes % 64:
            raise BadSetup(f"a ring of {slots} slots of {slot_bytes} bytes")
        if not 1 <= mtu <= 5 or qp >= 1 << 24 or psn >= 1 << 24 or sealed > 1:
            raise BadSetup("a queue pair that cannot be")
        return cls(gid, qp, psn, lid, mtu, ring, rkey, slots, slot_bytes, epoch, offer if sealed else b"")


def pack(kind: Kind, body: bytes = b"") -> bytes:
    """A whole message."""
    return HEADER.pack(MAGIC, VERSION, kind, len(body)) + body


def pack_refuse(why: str) -> bytes:
    """A refusal; a long reason is cut."""
    return pack(Kind.REFUSE, why.encode()[:MAX_TEXT])


def pack_bye(slots: int) -> bytes:
    """The end, after so many slots were written."""
    return pack(Kind.BYE, _BYE.pack(slots))


def parse_bye(body: bytes) -> int:
    """How many slots were written."""
    return int(_BYE.unpack(body)[0])


def parse_refuse(body: bytes) -> str:
    """The reason, made printable."""
    text = body.decode(errors="replace")
    return "".join(c if c.isprintable() else "?" for c in text)


class Messages:
    """Messages out of a stream of bytes, whatever its pieces. Holds no more than one piece and one message."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0  # what is before it was given out

    def feed(self, data: bytes) -> None:
        """More of the stream."""
        del self._buffer[: self._at]
        self._at = 0
        self._buffer += data

    def next(self) -> Message | None:
        """The next whole message; None when more bytes are needed. Raises BadSetup."""
        start = self._at + HEADER.size
        if len(self._buffer) < start:
            return None
        magic, version, code, length = HEADER.unpack_from(self._buffer, self._at)
        if magic != MAGIC:
            raise BadSetup("this is no set-up of RDMA")
        if version != VERSION:
            raise BadSetup(f"version {version} of the set-up of RDMA, {VERSION} is spoken here")
        try:
            kind = Kind(code)
        except ValueError:
            raise BadSetup(f"an unknown message {code}") from None
        low, high = _LIMITS[kind]
        if not low <= length <= high:
            raise BadSetup(f"{length} bytes for {kind.name}")
        if len(self._buffer) < start + length:
            return None
        self._at = start + length
        return Message(kind, bytes(self._buffer[start : self._at]))
