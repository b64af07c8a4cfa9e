# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/transport/exchange.py: what two nodes say to set RDMA up. An input is a stream of messages."""

import random
import zlib
from collections.abc import Iterable
from dataclasses import replace

from replicator.transport import exchange
from replicator.transport.exchange import HEADER, MAX_TEXT, BadSetup, Kind, Messages, Side
from tests.fuzz.judge import SLACK_BYTES, must, only, told

MAX_BYTES = 4096
WORDS = (b"DPRM\x01", b"\x5c\x00", b"\x01\x00\x5c\x00", b"\x02\x5c\x00", *(bytes([kind]) for kind in Kind))

_SIDE = Side(
    gid=bytes(10) + b"\xff\xff\x0a\x00\x00\x01", qp=0x1234, psn=0xABCDEF, lid=1, mtu=3, ring=0x7F0000000000, rkey=99,
    slots=64, slot_bytes=65536, epoch=1 << 60, offer=bytes(range(36)),
)  # fmt: skip


def seeds() -> Iterable[bytes]:
    for side in (_SIDE, replace(_SIDE, offer=b"")):
        both = side.pack(Kind.OFFER) + side.pack(Kind.ANSWER)
        yield both + exchange.pack(Kind.READY) + 3 * exchange.pack(Kind.BEAT) + exchange.pack_bye(1 << 40)
    # The largest ring there may be, and what is just not one.
    for slots, slot_bytes in ((256, 256 << 10), (256, (256 << 10) + 64), (64, (1 << 20) + 64), (257, 4096), (4, 4032)):
        yield replace(_SIDE, slots=slots, slot_bytes=slot_bytes).pack(Kind.OFFER)
    yield exchange.pack_refuse("a ring of no slots") + exchange.pack(Kind.BEAT)[:5]


def bound(data: bytes) -> int:
    return SLACK_BYTES + 6 * len(data)


def check(data: bytes) -> None:
    whole = read(data, [len(data)])
    rng = random.Random(zlib.crc32(data))
    must(read(data, [rng.choice((1, 7, 8, 9, 100, 1000)) for _ in range(16)]) == whole, "pieces make no difference")


def read(data: bytes, sizes: list[int]) -> tuple[int, str]:
    """How many messages there were, and how it ended."""
    messages, at, count, used = Messages(), 0, 0, 0
    while at < len(data):
        size = sizes[count % len(sizes)]
        messages.feed(data[at : at + size])
        at += size
        while True:
            try:
                message = messages.next()
            except BadSetup as error:
                told(error)
                return count, str(error)
            if message is None:
                break
            packed = exchange.pack(message.kind, message.body)
            must(data[used : used + len(packed)] == packed, "a message encodes to what it came from")
            used += len(packed)
            count += 1
            parse(message)
    return count, ""


def parse(message: exchange.Message) -> None:
    """What a message carries."""
    with only(BadSetup):
        if message.kind in (Kind.OFFER, Kind.ANSWER):
            side = Side.parse(message.body)
            again = side.pack(message.kind)[HEADER.size :]
            must(side.offer or len(again) == len(message.body), "a side that does not seal has no offer")
            must(not side.offer or again == message.body, "a side encodes to what it came from")
            must(side.slots * side.slot_bytes <= exchange.MOST_RING_BYTES, "no ring is larger than allowed")
        elif message.kind is Kind.REFUSE:
            text = exchange.parse_refuse(message.body)
            must(text.isprintable() and len(text) <= MAX_TEXT, "a reason can be printed")
        elif message.kind is Kind.BYE:
            must(exchange.pack_bye(exchange.parse_bye(message.body)).endswith(message.body), "BYE encodes back")
