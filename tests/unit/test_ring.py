# SPDX-License-Identifier: GPL-2.0-or-later
"""probes/ring.py on a ring made by hand: wrap, busy and discarded records, limits, and a random history."""

import mmap
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.ring import BUSY, DISCARDED, EVENT, RECORD_BYTES, Ring, RingBroken

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

    def put(self, bits: int = 0, length: int = EVENT.itemsize) -> bool:
        """Reserve and write one record, its header with ``bits``; False when the ring is full."""
        if self.free < RECORD_BYTES:
            return False
        at = int(self.producer[0])
        event = np.zeros(1, EVENT)
        event[0] = (0x100000000 + self.sent, self.sent, 7, 1 + self.sent % 2, 0x100, 0)
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


def test_the_event_is_32_bytes() -> None:
    assert EVENT.itemsize == 32
    assert [EVENT.fields[n][1] for n in EVENT.names] == [0, 8, 16, 20, 22, 24]


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
