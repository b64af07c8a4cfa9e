# SPDX-License-Identifier: GPL-2.0-or-later
"""The compiled loops: whatever index or size is wrong is an error before anything is touched."""

from collections.abc import Callable

import numpy as np
import pytest

from collector.conns import as_words, conversion
from collector.record import COMPARE, RECORD
from collector.rows import Copies, Looks, Marks, Rows
from collector.table import SessionTable
from probes import gathering
from replicator import packing
from tests.unit.simulated_dpvs import CONN

SLOTS = 8
GOOD = np.arange(3)
BAD = [np.array([0, SLOTS]), np.array([-1, 0]), np.array([1 << 62])]


def words(n: int, width: int = 18) -> packing.U64:
    return np.zeros((n, width), np.uint64)


def u8(n: int) -> packing.U8:
    return np.zeros(n, np.uint8)


def i64(n: int) -> packing.I64:
    return np.zeros(n, np.int64)


def rows(n: int = SLOTS, room: int = 4) -> Rows:
    made = Rows(
        words(n), u8(n), u8(n), i64(n), COMPARE, np.zeros(18, np.uint64), np.zeros((5, room), np.int64), u8(room)
    )
    made.begin()
    return made


def copies() -> Copies:
    return Copies(words(SLOTS), u8(SLOTS), u8(SLOTS), COMPARE)


def telling() -> packing.Telling:
    return packing.Telling(words(SLOTS), u8(SLOTS), u8(SLOTS))


def record_of(slot: int) -> packing.U64:
    row = np.zeros(1, RECORD)
    row["slot"], row["generation"] = slot, 1
    return row.view(np.uint64).reshape(1, 18)


def apply(slots: packing.I64, *, width: int = 18, short: int = 0) -> None:
    n = len(slots)
    rows().apply(words(n, width), slots, u8(n - short), u8(n), u8(n), i64(n), 1)


FLAT = np.arange(100, dtype=np.uint64)
OFFSETS = np.array([0, 5])


def gather(places: list[int], room: int) -> None:
    gathering.gather(FLAT, np.array(places), OFFSETS, words(room, 2))


@pytest.mark.parametrize("slots", BAD)
@pytest.mark.parametrize(
    "use",
    [
        apply,
        lambda slots: Marks(u8(SLOTS), i64(SLOTS)).mark(slots, i64(len(slots)), u8(len(slots)), i64(len(slots))),
        lambda slots: Marks(u8(SLOTS), i64(SLOTS)).take(slots, i64(len(slots)), u8(len(slots))),
        lambda slots: telling().sort(slots, u8(len(slots)), u8(len(slots)), i64(6)),
        lambda slots: telling().pack4(slots, words(len(slots), 12)),
        lambda slots: telling().pack6(slots, words(len(slots))),
    ],
)
def test_a_slot_that_is_not_there(use: Callable[[packing.I64], None], slots: packing.I64) -> None:
    with pytest.raises(IndexError):
        use(slots)


@pytest.mark.parametrize(
    "use",
    [
        lambda: apply(GOOD, width=17),
        lambda: apply(GOOD, short=1),
        lambda: rows(room=2).apply(words(3), GOOD, u8(3), u8(3), u8(3), i64(3), 1),
        lambda: Rows(
            words(4), u8(3), u8(4), i64(4), COMPARE, np.zeros(18, np.uint64), np.zeros((5, 4), np.int64), u8(4)
        ),
        lambda: Marks(u8(3), i64(4)),
        lambda: Marks(u8(SLOTS), i64(SLOTS)).mark(GOOD, i64(3), u8(3), i64(2)),
        lambda: Marks(u8(SLOTS), i64(SLOTS)).take(GOOD, i64(2), u8(3)),
        lambda: copies().put(record_of(SLOTS), False, i64(1), u8(1)),
        lambda: copies().put(record_of(1), False, i64(0), u8(0)),
        lambda: Copies(words(4), u8(4), u8(5), COMPARE),
        lambda: telling().sort(GOOD, u8(3), u8(2), i64(6)),
        lambda: telling().sort(GOOD, u8(3), u8(3), i64(5)),
        lambda: telling().pack4(GOOD, words(2, 12)),
        lambda: telling().pack6(GOOD, words(3, 17)),
        lambda: packing.unpack4(words(3, 12), SLOTS, words(2)),
        lambda: packing.unpack6(words(3), SLOTS, words(2)),
        lambda: packing.tally(i64(3), 1, i64(0)),
        lambda: gather([0, 95], 2),
        lambda: gather([-1], 1),
        lambda: gather([0], 2),
        lambda: gathering.still(FLAT, GOOD, OFFSETS, words(3, 1), u8(3)),
        lambda: gathering.still(FLAT, GOOD + 95, OFFSETS, words(3, 2), u8(3)),
        lambda: gathering.fold(FLAT, GOOD + 95, OFFSETS, FLAT, np.zeros(3, np.uint32)),
        lambda: gathering.fold(FLAT, GOOD, OFFSETS, FLAT[:1], np.zeros(3, np.uint32)),
    ],
)
def test_a_size_that_does_not_fit(use: Callable[[], object]) -> None:
    with pytest.raises(IndexError):
        use()


def test_what_the_collector_looks_at() -> None:
    table = SessionTable(SLOTS)
    how = conversion(CONN, {})
    how.into(table.row)
    how.read(as_words(np.zeros(3, CONN)))
    looks = Looks(table.rows_, how, u8(SLOTS), i64(SLOTS), i64(SLOTS), u8(SLOTS), np.zeros(SLOTS, np.uint32))
    assert looks.look(u8(3) + 1, GOOD, 1, 1, 1, i64(3)) == 0
    for whole, slots, again in ((u8(2), GOOD[:2], i64(2)), (u8(3), GOOD + SLOTS, i64(3)), (u8(3), GOOD, i64(2))):
        with pytest.raises(IndexError):
            looks.look(whole, slots, 1, 1, 1, again)
    with pytest.raises(IndexError):
        how.read(words(1, 4))
    with pytest.raises(IndexError):
        looks.hear(words(1, 3), np.array([SLOTS]), np.zeros(0, np.uint32), u8(0), i64(1))
    with pytest.raises(IndexError):
        looks.hear(words(2, 3), GOOD[:2], np.zeros(0, np.uint32), u8(0), i64(1))


def test_what_fits_is_done() -> None:
    out = words(2, 2)
    gathering.gather(FLAT, np.array([0, 94]), OFFSETS, out)
    assert out.tolist() == [[0, 5], [94, 99]]
    same = u8(2)
    out[1, 1] = 0
    gathering.still(FLAT, np.array([0, 94]), OFFSETS, out, same)
    assert same.tolist() == [1, 0]
    assert copies().put(record_of(SLOTS - 1), False, i64(1), u8(1)) == 1
