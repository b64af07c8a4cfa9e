# SPDX-License-Identifier: GPL-2.0-or-later
"""probes/ring.py on rings made by hand: wrap, busy and discarded records, limits, several threads, random histories."""

import mmap
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.ring import BUSY, DISCARDED, EVENT, RECORD_BYTES, THREADS, Ring, RingBroken, ThreadRings

PAGE = mmap.PAGESIZE
FITS = PAGE // RECORD_BYTES


class FakeKernel:
    """The producer's side: writes as kernel/bpf/ringbuf.c does, every byte at both places of the double mapping."""

    def __init__(self, size: int = PAGE, position: int = 0) -> None:
        self.size = size
        self.consumer = np.full(1, position, np.uint64)
        self.producer = np.full(1, position, np.uint64)
        self.data = np.zeros(2 * size // 8, np.uint64)
        self.ring = Ring(self.consumer, self.producer, self.data)
        self.sent = 0

    @property
    def free(self) -> int:
        return self.size - int(self.producer[0] - self.consumer[0])

    def _word(self, position: int, value: int) -> None:
        index = position % self.size // 8
        self.data[index] = self.data[index + self.size // 8] = value

    def put(self, bits: int = 0, length: int = EVENT.itemsize, *, tid: int = 7, time_ns: int | None = None) -> bool:
        """Reserve and write one record, its header with ``bits``; False when the ring is full."""
        if self.free < RECORD_BYTES:
            return False
        at = int(self.producer[0])
        event = np.zeros(1, EVENT)
        event[0] = (0x100000000 + self.sent, self.sent if time_ns is None else time_ns, tid, 1 + self.sent % 2)
        self._word(at, length | bits | 5 << 32)  # the upper half: page offset, not ours to look at
        for index, value in enumerate(event.view(np.uint64)):
            self._word(at + 8 + 8 * index, int(value))
        self.producer[0] = at + RECORD_BYTES
        self.sent += 1
        return True

    def settle(self, position: int, bits: int = 0) -> None:
        """Submit or discard the record at ``position``, busy until now."""
        self._word(position, EVENT.itemsize | bits)


def numbers(events: np.ndarray) -> list[int]:
    assert events.dtype == EVENT
    assert (events["conn"] - 0x100000000 == events["time_ns"]).all()
    return events["time_ns"].tolist()


def test_the_event_is_24_bytes() -> None:
    assert EVENT.itemsize == 24
    assert [EVENT.fields[n][1] for n in EVENT.names] == [0, 8, 16, 20]


def test_empty() -> None:
    kernel = FakeKernel()
    assert len(kernel.ring.drain()) == 0
    assert kernel.ring.pending == 0


def test_in_order_and_the_space_comes_back() -> None:
    kernel = FakeKernel()
    for _ in range(5):
        kernel.put()
    assert kernel.ring.pending == 5
    assert numbers(kernel.ring.drain()) == [0, 1, 2, 3, 4]
    assert kernel.free == kernel.size
    assert len(kernel.ring.drain()) == 0


def test_wrap() -> None:
    kernel = FakeKernel()
    got: list[int] = []
    for _ in range(50):
        for _ in range(FITS - 3):
            assert kernel.put()
        got += numbers(kernel.ring.drain())
    assert got == list(range(kernel.sent))
    assert kernel.sent * RECORD_BYTES > 40 * kernel.size


def test_full_to_the_last_record() -> None:
    kernel = FakeKernel(position=3 * RECORD_BYTES)
    while kernel.put():
        pass
    assert kernel.sent == FITS
    assert numbers(kernel.ring.drain()) == list(range(FITS))


def test_limit() -> None:
    kernel = FakeKernel()
    for _ in range(10):
        kernel.put()
    assert numbers(kernel.ring.drain(3)) == [0, 1, 2]
    assert kernel.ring.pending == 7
    assert numbers(kernel.ring.drain(0)) == []
    assert numbers(kernel.ring.drain()) == [3, 4, 5, 6, 7, 8, 9]


def test_stops_at_a_busy_record_and_goes_on_later() -> None:
    kernel = FakeKernel()
    kernel.put()
    busy = int(kernel.producer[0])
    kernel.put(BUSY)
    kernel.put()
    assert numbers(kernel.ring.drain()) == [0]
    assert numbers(kernel.ring.drain()) == []
    assert int(kernel.consumer[0]) == busy
    kernel.settle(busy)
    assert numbers(kernel.ring.drain()) == [1, 2]


def test_skips_discarded_records() -> None:
    kernel = FakeKernel()
    for bits in (0, DISCARDED, 0, DISCARDED, DISCARDED):
        kernel.put(bits)
    assert numbers(kernel.ring.drain()) == [0, 2]
    assert kernel.ring.discarded == 3
    assert kernel.free == kernel.size


def test_a_busy_record_that_is_discarded() -> None:
    kernel = FakeKernel()
    busy = int(kernel.producer[0])
    kernel.put(BUSY)
    kernel.put()
    assert numbers(kernel.ring.drain()) == []
    kernel.settle(busy, DISCARDED)
    assert numbers(kernel.ring.drain()) == [1]


def test_a_foreign_record_is_an_error_and_not_consumed() -> None:
    kernel = FakeKernel()
    kernel.put()
    kernel.put(length=64)
    with pytest.raises(RingBroken):
        kernel.ring.drain()
    assert int(kernel.consumer[0]) == 0


def test_a_size_that_is_no_power_of_two() -> None:
    with pytest.raises(RingBroken):
        Ring(np.zeros(1, np.uint64), np.zeros(1, np.uint64), np.zeros(2 * 3000 // 8, np.uint64))


def test_what_was_drained_stays_good() -> None:
    kernel = FakeKernel()
    kernel.put()
    events = kernel.ring.drain()
    for _ in range(5 * FITS):
        if not kernel.put():
            kernel.ring.drain()
    kernel.data[:] = 0xFFFFFFFFFFFFFFFF
    assert numbers(events) == [0]
    assert events.flags.writeable


def test_more_than_a_chunk() -> None:
    kernel = FakeKernel(1 << 21)
    for _ in range(20000):
        kernel.put()
    assert numbers(kernel.ring.drain(1 << 20)) == list(range(20000))


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from((0, DISCARDED, BUSY)), st.integers(1, 120)), max_size=60))
def test_any_history(steps: list[tuple[int, int, int]]) -> None:
    """Whatever is put, settled and drained: what comes out is what was submitted, in order, once."""
    kernel = FakeKernel()
    expected: list[int] = []
    got: list[int] = []
    open_record: tuple[int, int] | None = None
    for count, bits, limit in steps:
        for _ in range(count):
            if not kernel.put():
                break
            expected.append(kernel.sent - 1)
        at = int(kernel.producer[0])
        if (bits != BUSY or open_record is None) and kernel.put(bits):
            if bits == BUSY:
                open_record = at, kernel.sent - 1
            if bits != DISCARDED:
                expected.append(kernel.sent - 1)
        got += numbers(kernel.ring.drain(limit))
        if open_record is not None:
            assert open_record[1] not in got
            if limit % 2:
                kernel.settle(open_record[0])
                open_record = None
    if open_record is not None:
        kernel.settle(open_record[0])
    while len(events := kernel.ring.drain()):
        got += numbers(events)
    assert got == expected


def test_mapping_and_closing() -> None:
    """A memfd in place of the BPF map: the areas lie where the kernel has them; closing leaves nothing mapped."""
    size = 2 * PAGE
    fd = os.memfd_create("ring")
    os.ftruncate(fd, 2 * PAGE + 2 * size)
    ring = Ring.map(fd, size)
    assert ring.ring_bytes == size
    os.pwrite(fd, RECORD_BYTES.to_bytes(8, "little"), PAGE)
    os.pwrite(fd, EVENT.itemsize.to_bytes(8, "little") + (42).to_bytes(8, "little"), 2 * PAGE)
    events = ring.drain()
    assert events["conn"].tolist() == [42]
    assert os.pread(fd, 8, 0) == RECORD_BYTES.to_bytes(8, "little")
    ring.close()
    ring.close()
    assert len(ring.drain()) == 0
    assert events["conn"].tolist() == [42]
    os.close(fd)


def test_a_descriptor_that_is_no_ring() -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    with pytest.raises(RingBroken):
        Ring.map(fd, PAGE)
    os.close(fd)


# --- rings of threads ------------------------------------------------------------------------------------------------

EACH = 8  # events in each ring


class FakeThreads:
    """The program's side: threads write as bpf/session.bpf.c does, time goes on by one with each event."""

    def __init__(self, rings: int, *tids: int, begun: int = 0) -> None:
        self.kernel = FakeKernel()
        self.table = np.zeros((THREADS, 16), np.uint64)
        self.table[:, [1, 8]] = begun
        self.events = np.zeros(2 * EACH * rings, np.uint64)
        self.now_ns = 100
        self.rings = ThreadRings(self.kernel.ring, self.table, self.events, rings, lambda: self.now_ns)
        self.rings.adopt(tids)
        self.lost = 0

    def put(self, tid: int, kind: int = 1, *, conn: int | None = None) -> bool:
        self.now_ns += 1
        row = self.table[tid % THREADS]
        if int(row[0]) & 0xFFFFFFFF != tid:
            return self.kernel.put(tid=tid, time_ns=self.now_ns)
        head = int(row[1])
        if head - int(row[8]) >= EACH:
            self.lost += 1
            return False
        place = 2 * ((int(row[0]) >> 32) * EACH + head % EACH)
        self.events[place] = (0x7F0000000000 + self.now_ns if conn is None else conn) | kind << 62
        self.events[place + 1] = self.now_ns
        row[1] = head + 1
        return True

    def drain(self, maximum: int = 1000) -> list[tuple[int, int]]:
        """(time, thread) of each."""
        events = self.rings.drain(maximum)
        assert events.dtype == EVENT
        return list(zip(events["time_ns"].tolist(), events["tid"].tolist(), strict=True))


def test_an_event_of_a_thread() -> None:
    fake = FakeThreads(1, 5000)
    fake.put(5000, 2, conn=0x7FFFFFFFFFF8)
    assert fake.rings.pending == 1
    assert fake.rings.drain().tolist() == [(0x7FFFFFFFFFF8, 101, 5000, 2)]
    assert fake.rings.pending == 0
    assert len(fake.rings.drain()) == 0


@pytest.mark.parametrize("begun", [0, EACH - 3, (1 << 32) - 2])
def test_a_thread_ring_to_the_last_event_and_around(begun: int) -> None:
    fake = FakeThreads(2, 40, 41, begun=begun)
    for _ in range(7):
        for _ in range(EACH):
            assert fake.put(41)
        assert not fake.put(41)
        assert [tid for _, tid in fake.drain()] == [41] * EACH
    assert fake.lost == 7


def test_threads_in_the_order_of_time() -> None:
    fake = FakeThreads(2, 40, 41)
    for tid in (41, 40, 40, 41, 77, 40, 41):
        fake.put(tid)
    assert [tid for _, tid in fake.drain()] == [41, 40, 40, 41, 77, 40, 41]


def test_what_happens_while_we_look_is_for_the_next_time() -> None:
    fake = FakeThreads(2, 40, 41)
    fake.put(40)
    fake.put(41)
    fake.now_ns -= 1
    assert fake.drain() == [(101, 40)]
    fake.now_ns += 1
    assert fake.drain() == [(102, 41)]


def test_the_limit_takes_the_oldest() -> None:
    fake = FakeThreads(4, 40, 41, 42)
    order = (40, 40, 40, 40, 41, 40, 42, 41)
    for tid in order:
        fake.put(tid)
    got = fake.drain(4)
    assert 4 <= len(got) < 4 + 4
    assert got + fake.drain() == [(101 + number, tid) for number, tid in enumerate(order)]


def test_who_gets_a_ring() -> None:
    fake = FakeThreads(3, 40)
    fake.rings.adopt([40, 40 + THREADS, 41])  # has one; its row is another's; gets one
    assert fake.rings.owners == [40, 41]
    fake.put(40 + THREADS)
    fake.put(43)
    fake.put(44)
    assert [tid for _, tid in fake.drain()] == [40 + THREADS, 43, 44]
    assert fake.rings.owners == [40, 41, 43]
    for tid in (44, 43, 40):
        assert fake.put(tid)
    assert [tid for _, tid in fake.drain()] == [44, 43, 40]
    again = ThreadRings(fake.kernel.ring, fake.table, fake.events, 3, lambda: fake.now_ns)
    assert again.owners == [40, 41, 43]
    fake.put(41)
    assert again.drain()["tid"].tolist() == [41]
    again.release()
    assert again.owners == []
    again.adopt([41])
    fake.put(41)
    assert again.drain()["tid"].tolist() == [41]


def test_rings_of_impossible_sizes_and_heads() -> None:
    table, ring = np.zeros((THREADS, 16), np.uint64), FakeKernel().ring
    for rings, words in ((1, 0), (3, 2 * 64), (0, 0)):
        with pytest.raises(RingBroken):
            ThreadRings(ring, table, np.zeros(words, np.uint64), rings)
    with pytest.raises(RingBroken):
        ThreadRings(ring, table[:8], np.zeros(16, np.uint64), 1)
    fake = FakeThreads(1, 40)
    fake.table[40, 1] = EACH + 1
    with pytest.raises(RingBroken, match="9 events in a ring of 8"):
        fake.drain()


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.lists(st.integers(40, 45), max_size=12), st.integers(1, 12)), min_size=1, max_size=30),
)
def test_any_history_of_threads(own: int, steps: list[tuple[list[int], int]]) -> None:
    """What is not lost comes out once, in the order of time, whoever wrote it; threads get rings meanwhile."""
    fake = FakeThreads(4, *range(40, 40 + own), begun=5)
    expected: list[tuple[int, int]] = []
    got: list[tuple[int, int]] = []
    for tids, limit in steps:
        expected += [(fake.now_ns, tid) for tid in tids if fake.put(tid)]
        got += fake.drain(limit)
    while more := fake.drain(3):
        got += more
    assert sorted(got) == expected
    first = [one for one in got if one[1] < 40 + own]
    assert first == sorted(first)  # across threads too, where each has its ring
    for tid in range(40, 46):
        assert [t for t, other in got if other == tid] == [t for t, other in expected if other == tid]
    assert len(fake.rings.owners) <= 4


def test_closed_rings_of_threads() -> None:
    fake = FakeThreads(2, 40)
    fake.put(40)
    events = fake.rings.drain()
    fake.rings.close()
    fake.rings.close()
    assert fake.rings.pending == 0
    assert len(fake.rings.drain()) == 0
    assert events["tid"].tolist() == [40]
