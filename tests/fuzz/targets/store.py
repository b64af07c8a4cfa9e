# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/store and replicator/sources.py: files of sessions, as they are read.

An input is what it is (u8: a head, a stamp, a block's two places, or lines of an export; 128 added where checksums are
put right, so that what they protect is reached), and the bytes, filled up with zeros.
"""

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from collector.record import RECORD, pick
from replicator.sources import BadSource, export, parse
from replicator.sources import json_lines as lines_of
from replicator.store.format import (
    PAGE,
    PAGE_WORDS,
    PER_BLOCK,
    Head,
    Instant,
    Stamp,
    StoreRefused,
    judge_blocks,
    newest_stamp,
    pack_blocks,
    pack_head,
    pack_stamp,
    parse_head,
    rows_of,
    sealed,
)
from replicator.store.reader import Contents
from replicator.store.restored import fit
from tests.fuzz.judge import SLACK_BYTES, must, only
from tests.unit.session_records import sessions

MAX_BYTES = 2 * PAGE + 1
HEAD, STAMP, BLOCK, LINES = range(4)
SEALED = 128
BOOT = bytes(range(16))
AT = Instant(10**9, 10**18)
_HEAD = Head("lb-a", 7, 8, 300, 3, 2, AT, BOOT)
WORDS = (b"DPVSPROBE-STORE\n", b"DSPB", b"DSPH", b"DSPS")


def seeds() -> Iterable[bytes]:
    head = pack_head(_HEAD).tobytes().rstrip(b"\0")
    stamps = pack_stamp(Stamp(3, AT, 5, True), 7).tobytes() + pack_stamp(Stamp(4, AT, 5, False), 7).tobytes()
    block = pack_blocks(np.zeros(1, np.int64), *rows_of(sessions(9), 1), 3, 7).tobytes()
    for kind, data in ((HEAD, head), (STAMP, stamps.rstrip(b"\0")), (BLOCK, block), (BLOCK, bytes(PAGE) + block)):
        yield bytes([kind]) + data.rstrip(b"\0")
        yield bytes([kind | SEALED]) + data.rstrip(b"\0")

    async def said() -> bytes:
        out = b""
        async for lines in export(sessions(2), np.ones(2, np.bool_), None, "a", whole=True):
            out += b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        return out

    yield bytes([LINES]) + asyncio.run(said())


def bound(data: bytes) -> int:
    return SLACK_BYTES + (1 << 20) + 64 * len(data)


def check(data: bytes) -> None:
    kind, rest = (data or b"\0")[0], data[1:]
    if kind & 127 == LINES:
        with only(BadSource):
            found, last = parse(lines_of(rest, "x"), "x")
            must(found is None or len(found.records) == last["sessions"], "as many as it says")
        return
    pages = np.frombuffer(rest[: 2 * PAGE].ljust(2 * PAGE, b"\0"), np.uint64).reshape(2, PAGE_WORDS).copy()
    if kind & SEALED:
        pages = sealed(pages)
    if kind & 127 == HEAD:
        size = int(pages[0, 13] & np.uint64(0xFFFFFFFF)) * 2 * PAGE + 3 * PAGE
        with only(StoreRefused):
            head = parse_head(pages[:1], size)
            must(head.size == size, "the size that its blocks need")
    elif kind & 127 == STAMP:
        with only(StoreRefused):
            newest_stamp(pages, int(pages[0, 2]))
    else:
        judged = judge_blocks(0, pages, int(pages[0, 2]))
        must(len(judged.records) <= PER_BLOCK, "one block")
        must(len(judged.damaged) + judged.interrupted <= 1, "judged once")
        contents = Contents(Path("x"), _HEAD, Stamp(1, AT, 0, False), judged.records, judged.records[:0])
        back = fit(contents, BOOT, Instant(AT.boot_ns + 5 * 10**9, AT.real_ns))
        must((back.records["timeout_ms"] > 0).all(), "what comes back has time left")
        must(len(back.records) + back.expired + back.unfit == len(judged.records), "all are accounted for")
        must(pick(back.records, np.arange(len(back.records))).dtype == RECORD, "records")
