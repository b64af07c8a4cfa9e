# SPDX-License-Identifier: GPL-2.0-or-later
"""The file that a node's own sessions are kept in: pages and their checksums. docs/store.md has the pictures.

Rules
- A file is pages of 4096 bytes, little-endian: one head, two stamps, then two places for each block. A block is 28
  slots of the session table; after those of the pool come blocks of sessions that were restored and still wait.
- A page begins with 64 bytes that say what it is: magic and number, generation, run, two words of its kind, checksum of
  all the rest. A page whose checksum is wrong is no page.
- Stamps and blocks are written in turn to their two places. So whenever the writing ends, one of the two is whole, and
  the whole one with the higher generation is what was said last.
- Pure: words in, words out; no file is opened here and no clock read.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from collector.record import RECORD, WORDS, Bools, Records, Slots
from collector.record import words as as_words
from probes.errors import DpvsProbeError
from replicator.wire import MAX_NAME, SCHEMA, node_id

MAGIC = b"DPVSPROBE-STORE\n"
VERSION = 1
PAGE = 4096
PAGE_WORDS = PAGE // 8
HEAD_WORDS = 8
CHECK = 7  # the word of a page with its checksum
PER_BLOCK = (PAGE_WORDS - HEAD_WORDS) // WORDS
KINDS = HEAD, STAMP, BLOCK = (0x48505344, 0x53505344, 0x42505344)  # "DSPH", "DSPS", "DSPB" as bytes
FIRST_STAMP, FIRST_BLOCK = 1, 3  # pages
ENDED = 1  # flag of a stamp: the DPVS had ended
MAX_BLOCKS = (1 << 26) // PER_BLOCK

Words = npt.NDArray[np.uint64]

_BODY = np.dtype(
    [
        ("magic", "S16"), ("version", "<u4"), ("schema", "<u4"), ("page", "<u4"), ("per_block", "<u4"),
        ("slots", "<u4"), ("waiting", "<u4"), ("blocks", "<u4"), ("workers", "<u4"),
        ("node_id", "<u8"), ("epoch", "<u8"), ("instance", "<u8"),
        ("created_boot_ns", "<u8"), ("created_real_ns", "<u8"), ("boot_id", "16u1"),
        ("name_bytes", "<u4"), ("name", f"{MAX_NAME}u1"),
    ]
)  # fmt: skip
_SALT = np.arange(1, PAGE_WORDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
_BITS = np.uint64(1) << np.arange(PER_BLOCK, dtype=np.uint64)
_AT_ONCE = 64  # pages whose checksums are computed together: they and what is made of them stay in the cache


class StoreRefused(DpvsProbeError):
    """A file that sessions cannot be taken from."""

    help_text = "See it with `dpvs-probe snapshot inspect FILE`; without it, only this node's peers have its sessions."


class ForeignStore(StoreRefused):
    """A file that is not this node's store: nothing of ours may be written there."""

    help_text = "Name another file with --store, or remove this one."


class Instant(NamedTuple):
    """A moment by the clock that counts since the machine started (suspended or not), and by the wall's."""

    boot_ns: int
    real_ns: int


class Head(NamedTuple):
    """What is said once of a file."""

    node: str
    epoch: int  # of the dpvs-probe that wrote it
    instance: int  # of the DPVS whose sessions these are
    slots: int  # of its pool
    waiting: int  # places for sessions that were restored and have had no packet since
    workers: int  # of the DPVS; 0: not known
    created: Instant
    boot_id: bytes  # 16 bytes

    @property
    def own_blocks(self) -> int:
        """Blocks of the pool's slots; those of waiting sessions come after them."""
        return -(-self.slots // PER_BLOCK)

    @property
    def blocks(self) -> int:
        """All blocks."""
        return self.own_blocks + -(-self.waiting // PER_BLOCK)

    @property
    def size(self) -> int:
        """Of the file, in bytes."""
        return (FIRST_BLOCK + 2 * self.blocks) * PAGE


class Stamp(NamedTuple):
    """When the file was last known to say what DPVS holds."""

    generation: int
    at: Instant
    sessions: int
    ended: bool  # DPVS had ended: nothing has changed since


def checksums(pages: Words) -> Words:
    """Of n pages, (n, 512): one number each, over all words but the one it is kept in."""
    out = np.empty(len(pages), np.uint64)
    for first in range(0, len(pages), _AT_ONCE):
        mixed = pages[first : first + _AT_ONCE] + _SALT
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
            mixed ^= mixed >> np.uint64(shift)
            mixed *= np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
        mixed[:, CHECK] = 0
        total = mixed.sum(axis=1, dtype=np.uint64)
        out[first : first + _AT_ONCE] = total ^ (total >> np.uint64(32))
    return out


def sealed(pages: Words) -> Words:
    """The same pages with their checksums in place."""
    pages[:, CHECK] = checksums(pages)
    return pages


def pack_head(head: Head) -> Words:
    """The first page, (1, 512)."""
    page = _page(HEAD, 0, 1, head.epoch)
    body = page.view(np.uint8)[0, HEAD_WORDS * 8 :][: _BODY.itemsize].view(_BODY)
    name = head.node.encode()
    values = {
        "magic": MAGIC, "version": VERSION, "schema": SCHEMA, "page": PAGE, "per_block": PER_BLOCK,
        "slots": head.slots, "waiting": head.waiting, "blocks": head.blocks, "workers": head.workers,
        "node_id": node_id(head.node), "epoch": head.epoch, "instance": head.instance,
        "created_boot_ns": head.created.boot_ns, "created_real_ns": head.created.real_ns,
        "boot_id": np.frombuffer(head.boot_id, np.uint8), "name_bytes": len(name),
        "name": np.frombuffer(name.ljust(MAX_NAME, b"\0"), np.uint8),
    }  # fmt: skip
    for field, value in values.items():
        body[field] = value
    return sealed(page)


def parse_head(page: Words, size: int) -> Head:
    """The head of a file of ``size`` bytes; raises StoreRefused with what is wrong."""
    body = page.reshape(1, PAGE_WORDS).view(np.uint8)[0, HEAD_WORDS * 8 :][: _BODY.itemsize].view(_BODY)[0]
    if bytes(page.reshape(-1)[HEAD_WORDS : HEAD_WORDS + 2].tobytes()) != MAGIC:
        raise ForeignStore("it is no store of sessions")
    if int(body["version"]) != VERSION:
        raise StoreRefused(f"it is of version {body['version']}, this is {VERSION}")
    if not _whole(page.reshape(1, -1), HEAD)[0]:
        raise StoreRefused("its head is damaged")
    if int(body["schema"]) != SCHEMA or (int(body["page"]), int(body["per_block"])) != (PAGE, PER_BLOCK):
        raise StoreRefused("its session records are of another shape: it was written by another release")
    head = Head(
        bytes(body["name"][: int(body["name_bytes"])]).decode(errors="replace"),
        int(body["epoch"]),
        int(body["instance"]),
        int(body["slots"]),
        int(body["waiting"]),
        int(body["workers"]),
        Instant(int(body["created_boot_ns"]), int(body["created_real_ns"])),
        bytes(body["boot_id"]),
    )
    if head.blocks != int(body["blocks"]) or head.blocks > MAX_BLOCKS:
        raise StoreRefused("its head contradicts itself")
    if size != head.size:
        raise StoreRefused(f"it has {size} bytes and should have {head.size}: it was cut short or added to")
    return head


def pack_stamp(stamp: Stamp, epoch: int) -> Words:
    """A stamp's page, (1, 512)."""
    page = _page(STAMP, 0, stamp.generation, epoch)
    page[0, 3:7] = (stamp.at.boot_ns, stamp.at.real_ns, stamp.sessions, ENDED if stamp.ended else 0)
    return sealed(page)


def newest_stamp(places: Words, epoch: int) -> Stamp:
    """Of the two pages of stamps, (2, 512), the last that was said; raises StoreRefused when there is none."""
    whole = np.flatnonzero(_whole(places, STAMP) & (places[:, 2] == np.uint64(epoch)))
    if len(whole) == 0:
        raise StoreRefused("neither of its two stamps is whole: nothing says how old it is")
    page = places[whole[np.argmax(places[whole, 1])]]
    return Stamp(int(page[1]), Instant(int(page[3]), int(page[4])), int(page[5]), bool(int(page[6]) & ENDED))


def pack_blocks(numbers: Slots, rows: Words, present: Bools, generation: int, epoch: int) -> Words:
    """Pages of n blocks: ``rows`` (n * 28, 18) of records, ``present`` (n * 28,) where one holds a session; of the
    others, rows are cleared.
    """
    n = len(numbers)
    pages = np.zeros((n, PAGE_WORDS), np.uint64)
    pages[:, 0] = np.uint64(BLOCK) | (numbers.astype(np.uint64) << np.uint64(32))
    pages[:, 1], pages[:, 2] = generation, epoch
    held = present.reshape(n, PER_BLOCK)
    pages[:, 3] = (held * _BITS).sum(axis=1, dtype=np.uint64)
    absent = np.flatnonzero(~present)
    if len(absent):
        rows[absent] = 0
    pages[:, HEAD_WORDS:] = rows.reshape(n, PER_BLOCK * WORDS)
    return sealed(pages)


class Judged(NamedTuple):
    """What n blocks of a file say."""

    records: Records  # that they hold, in order
    interrupted: int  # blocks of whose two places one is no page: writing it was cut off, the other one counts
    damaged: list[int]  # numbers of blocks of which nothing is whole


def judge_blocks(first: int, places: Words, epoch: int) -> Judged:
    """Read n blocks from number ``first`` on; ``places``: both pages of each, (2 n, 512), a copy of the file's."""
    n = len(places) // 2
    numbers = np.repeat(np.arange(first, first + n, dtype=np.uint64), 2)
    whole = _whole(places, BLOCK, numbers) & (places[:, 2] == np.uint64(epoch))
    suspects = np.flatnonzero(~whole)
    blank = np.zeros(2 * n, np.bool_)
    blank[suspects] = ~places[suspects].any(axis=1)
    pairs, blanks = whole.reshape(n, 2), blank.reshape(n, 2)
    torn = ~pairs & ~blanks
    damaged = ~pairs.any(axis=1) & torn.all(axis=1)
    generations = np.where(pairs, places[:, 1].reshape(n, 2), np.uint64(0))
    at = np.flatnonzero(pairs.any(axis=1))
    pages = places[2 * at + (generations[at, 1] > generations[at, 0])]
    held = (pages[:, 3, None] & _BITS) != 0
    rows = pages[:, HEAD_WORDS:].reshape(len(at), PER_BLOCK, WORDS)[held]
    records: Records = np.ascontiguousarray(rows).view(RECORD).reshape(-1)
    return Judged(records, int(np.count_nonzero(torn.any(axis=1) & ~damaged)), [
        first + int(number) for number in np.flatnonzero(damaged)
    ])  # fmt: skip


def joined(parts: Sequence[Records]) -> Records:
    """Records of several arrays in one; plain concatenation packs them, without the space between their fields."""
    rows = [as_words(part) for part in parts]
    return np.concatenate([np.empty((0, WORDS), np.uint64), *rows]).view(RECORD).reshape(-1)


def rows_of(records: Records, blocks: int) -> tuple[Words, Bools]:
    """Rows and flags for ``pack_blocks`` of records that fill blocks from the first on."""
    rows = np.zeros((blocks * PER_BLOCK, WORDS), np.uint64)
    rows[: len(records)] = as_words(records)
    return rows, np.arange(len(rows)) < len(records)


def _page(kind: int, number: int, generation: int, epoch: int) -> Words:
    page = np.zeros((1, PAGE_WORDS), np.uint64)
    page[0, :3] = (kind | number << 32, generation, epoch)
    return page


def _whole(pages: Words, kind: int, numbers: Words | None = None) -> Bools:
    first = np.uint64(kind) if numbers is None else np.uint64(kind) | (numbers << np.uint64(32))
    good = pages[:, 0] == first
    at = np.flatnonzero(good)
    good[at] = checksums(pages[at]) == pages[at, CHECK]
    return np.asarray(good)
