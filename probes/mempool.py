# SPDX-License-Identifier: GPL-2.0-or-later
"""DPDK's memory zones and mempools, read from outside.

Rules: DPDK keeps a table of named memory zones (``fbarray_memzone``); a mempool ``X`` lives in the zone ``MP_X`` and
its objects in chunks that its ``mem_list`` names. Each object is preceded by a header (``struct rte_mempool_objhdr``)
that points to the pool and to the next header. Objects are one stride apart *inside a page*; a new page starts anew.
Nothing is believed before it is checked: the objects found must be exactly ``populated_size``, and the slot function
must give every object's number back. DPDK 24.11, lib/mempool/rte_mempool.h, rte_mempool_ops_default.c.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes import gathering
from probes.errors import DpvsProbeError
from probes.layout import Layout
from probes.mapping import BLOCK_BYTES, Addresses, Memory
from probes.target import ReadFailed, Region, Target

PREFIX = "MP_"
TABLE = "fbarray_memzone"
SMALL_BYTES = 64 << 20
MAX_CHUNKS = 1 << 16
MAX_OBJECTS = 1 << 28
PAGE_SHIFTS = (21, 16, 12)  # what fits a page of 2 MiB fits one of 1 GiB as well
POOL_ALIGN = 64  # rte_mempool is cache aligned


class PoolNotFound(DpvsProbeError):
    help_text = "Is this DPVS fully started? Its session pool appears before it takes traffic. See dpvs-probe doctor."


class PoolMismatch(DpvsProbeError):
    help_text = "DPVS's memory is not laid out as expected, so nothing of it is believed: run dpvs-probe doctor."


@dataclass(frozen=True)
class Memzone:
    name: str
    address: int
    length: int


@dataclass(frozen=True)
class Mempool:
    """What ``struct rte_mempool`` says, checked for sanity; ``chunks`` are (start, end) addresses, apart, ascending."""

    name: str
    address: int
    populated: int
    element_bytes: int
    header_bytes: int
    stride: int
    first_header: int
    chunks: tuple[tuple[int, int], ...]


def find_memzones(target: Target, layout: Layout, regions: Sequence[Region] | None = None) -> list[Memzone]:
    """All memory zones of the process; empty where DPDK keeps no shared table (``--no-shconf``, ``--in-memory``)."""
    regions = target.maps() if regions is None else regions
    zones = []
    for region in regions:
        if TABLE in region.path:
            zones += parse_memzones(target.read(region.start, region.size), layout)
    return zones


def parse_memzones(table: bytes, layout: Layout) -> list[Memzone]:
    """The used entries of the table; what follows the entries (DPDK's own bit mask) does not look like one."""
    size = layout.size("rte_memzone")
    zones = []
    for base in range(0, len(table) - size + 1, size):
        offset, length = layout.field("rte_memzone", "name")
        raw = table[base + offset : base + offset + length]
        name = raw.split(b"\0", 1)[0]
        if not name or len(name) == length or not name.isascii() or not name.decode().isprintable():
            continue
        address = layout.unpack("rte_memzone", "addr", table, base)
        zone_length = layout.unpack("rte_memzone", "len", table, base)
        if address and zone_length:
            zones.append(Memzone(name.decode(), address, zone_length))
    return zones


def find_pools(target: Target, layout: Layout, prefix: str, regions: Sequence[Region] | None = None) -> list[Mempool]:
    """The mempools named ``<prefix><number>``, by number: by the table of zones, else by looking for their names."""
    regions = target.maps() if regions is None else regions
    name = re.compile(re.escape(prefix) + r"\d+$")
    found = {
        zone.name.removeprefix(PREFIX): zone.address
        for zone in find_memzones(target, layout, regions)
        if zone.name.startswith(PREFIX) and name.match(zone.name.removeprefix(PREFIX))
    }
    pools = [read_pool(target, layout, address) for address in found.values()]
    if not pools:
        pools = _search(target, layout, prefix, regions)
    if not pools:
        raise PoolNotFound(f"process {target.pid} has no mempool {prefix}<socket>")
    for pool in pools:
        if not name.match(pool.name):
            raise PoolMismatch(f"the mempool at {pool.address:#x} is called {pool.name!r}, not {prefix}<socket>")
    return sorted(pools, key=lambda pool: int(pool.name.removeprefix(prefix)))


def _search(target: Target, layout: Layout, prefix: str, regions: Sequence[Region]) -> list[Mempool]:
    """Look for the pools by name in memory: first for a private table of zones, which is small and anonymous
    (``--in-memory``, ``--no-shconf``), then for the pool structs in all that DPDK may have written (seconds).
    """
    writable = [r for r in regions if r.perms.startswith("rw") and TABLE not in r.path]
    small = [r for r in writable if not r.path and r.size <= SMALL_BYTES]
    offset = layout.offset("rte_memzone", "addr")
    zones = _find(target, small, (PREFIX + prefix).encode(), 8)
    addresses = [int.from_bytes(target.read(zone + offset, 8), "little") for zone in zones]
    if found := _pools_at(target, layout, prefix, addresses):
        return found
    large = [r for r in writable if not r.path.startswith("[") and ".so" not in r.path and r.path != target.exe]
    return _pools_at(target, layout, prefix, _find(target, large, prefix.encode(), POOL_ALIGN))


def _find(target: Target, regions: Sequence[Region], needle: bytes, align: int) -> Iterator[int]:
    """Addresses, multiples of ``align``, where the bytes stand."""
    for region in regions:
        for start in range(region.start, region.end, BLOCK_BYTES):
            try:
                data = target.read(start, min(BLOCK_BYTES, region.end - start))
            except ReadFailed:
                continue  # reserved, not populated
            position = data.find(needle)
            while position >= 0:
                if (start + position) % align == 0:
                    yield start + position
                position = data.find(needle, position + 1)


def _pools_at(target: Target, layout: Layout, prefix: str, addresses: Iterable[int]) -> list[Mempool]:
    """What of the addresses is a pool of that name; the rest is log lines and copies of the name."""
    pools: dict[int, Mempool] = {}
    for address in addresses:
        try:
            pool = read_pool(target, layout, address)
        except (PoolMismatch, ReadFailed):
            continue
        if pool.name.removeprefix(prefix).isdecimal():
            pools[address] = pool
    return list(pools.values())


def read_pool(target: Target, layout: Layout, address: int) -> Mempool:
    """The mempool at ``address``; raises PoolMismatch where a number makes no sense."""
    raw = target.read(address, layout.size("rte_mempool"))

    def number(field: str) -> int:
        return layout.unpack("rte_mempool", field, raw)

    offset, size = layout.field("rte_mempool", "name")
    name = raw[offset : offset + size].split(b"\0", 1)[0].decode("ascii", "replace")
    element, header, trailer = number("elt_size"), number("header_size"), number("trailer_size")
    stride, populated, count = element + header + trailer, number("populated_size"), number("nb_mem_chunks")
    sane = (
        layout.size("rte_mempool_objhdr") <= header <= 4096
        and 0 < element <= 1 << 20
        and trailer <= 1 << 16
        and stride % 8 == 0
        and 0 < populated <= min(number("size"), MAX_OBJECTS)
        and 0 < count <= MAX_CHUNKS
    )
    if not sane:
        raise PoolMismatch(f"the mempool {name!r} at {address:#x} has impossible sizes")
    list_offset, _ = layout.field("rte_mempool", "elt_list")
    first_header = int.from_bytes(raw[list_offset : list_offset + 8], "little")
    list_offset, _ = layout.field("rte_mempool", "mem_list")
    chunks = _chunks(target, layout, address, int.from_bytes(raw[list_offset : list_offset + 8], "little"), count)
    if sum(end - start for start, end in chunks) < populated * (stride - trailer):
        raise PoolMismatch(f"the mempool {name!r} has {populated} objects but too little memory for them")
    return Mempool(name, address, populated, element, header, stride, first_header, chunks)


def _chunks(target: Target, layout: Layout, pool: int, first: int, count: int) -> tuple[tuple[int, int], ...]:
    """Walk the list of memory headers of a pool."""
    chunks, address = [], first
    for _ in range(count):
        if address == 0:
            break
        raw = target.read(address, layout.size("rte_mempool_memhdr"))
        start, length = (layout.unpack("rte_mempool_memhdr", name, raw) for name in ("addr", "len"))
        if layout.unpack("rte_mempool_memhdr", "mp", raw) != pool or not start or not length:
            raise PoolMismatch(f"a memory chunk of the mempool at {pool:#x} does not belong to it")
        chunks.append((start, start + length))
        address = layout.unpack("rte_mempool_memhdr", "next", raw)
    if len(chunks) != count or address != 0:
        raise PoolMismatch(f"the mempool at {pool:#x} says {count} memory chunks, its list is another")
    return _join(chunks)


def _join(chunks: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Chunks in ascending order, touching ones as one: DPDK adds memory page by page."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(chunks):
        if joined and joined[-1][1] >= start:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return tuple(joined)


def find_objects(memory: Memory, layout: Layout, pool: Mempool) -> Addresses:
    """Addresses of all objects of the pool, ascending, shape (populated,) uint64.

    A word equal to the pool's address marks a header, but a session keeps that same pointer in ``connpool``. Headers
    form one chain by their ``next``; nothing points to the rest.
    """
    mp, following = layout.offset("rte_mempool_objhdr", "mp"), layout.offset("rte_mempool_objhdr", "next")
    found = []
    for start, end in pool.chunks:
        for at in range(-(-start // 8) * 8, end // 8 * 8, BLOCK_BYTES):
            words = memory.block(at, min(BLOCK_BYTES, end // 8 * 8 - at))
            hits = np.flatnonzero(words == np.uint64(pool.address)) * 8 + (at - mp)
            found.append(hits[hits >= start].astype(np.uint64))
    header = np.concatenate(found)  # ascending, as the chunks are
    following_header = memory.gather(memory.locate(header), np.array([following]))[:, 0]
    linked = header == np.uint64(pool.first_header)
    if len(header):
        nearest = np.minimum(np.searchsorted(header, following_header), len(header) - 1)
        linked[nearest[header[nearest] == following_header]] = True
    header = header[linked]
    if len(header) != pool.populated:
        raise PoolMismatch(f"the mempool {pool.name!r} says {pool.populated} objects, {len(header)} were found")
    objects: Addresses = header + np.uint64(layout.size("rte_mempool_objhdr"))
    return objects


class SlotTable:
    """Address to slot number and back. Slots are dense: 0 .. n-1 in the order of ``extents``.

    ``extents``: for each contiguous chunk its (start, end) and its objects' addresses, ascending. Inside a page,
    ``slot = base[page] + (address - first[page]) // stride``; the biggest page size for which that holds is taken.
    """

    def __init__(self, extents: Sequence[tuple[tuple[int, int], Addresses]], stride: int) -> None:
        self.addresses: Addresses = np.concatenate([objects for _, objects in extents])
        self._stride = np.uint64(stride)
        for shift in PAGE_SHIFTS:
            self._build(extents, shift)
            if np.array_equal(self.slot_of(self.addresses), np.arange(len(self.addresses))):
                return
        raise PoolMismatch("the session pool's objects are not evenly spaced in any page size")

    def _build(self, extents: Sequence[tuple[tuple[int, int], Addresses]], shift: int) -> None:
        self._shift = np.uint64(shift)
        firsts, bases, counts, starts, ends, tables, page0s = [], [], [], [], [], [], []
        slot = pages = 0
        for (start, end), objects in extents:
            page0 = start >> shift
            number = (end - 1 >> shift) - page0 + 1
            first, base, count = np.zeros(number, np.uint64), np.zeros(number, np.int64), np.zeros(number, np.uint64)
            page, index, many = np.unique(
                (objects >> self._shift).astype(np.int64) - page0, return_index=True, return_counts=True
            )
            first[page], base[page], count[page] = objects[index], slot + index, many
            firsts.append(first)
            bases.append(base)
            counts.append(count)
            starts.append(start)
            ends.append(end)
            tables.append(pages)
            page0s.append(page0)
            slot += len(objects)
            pages += number
        order = np.argsort(starts)
        self._first, self._base, self._count = np.concatenate(firsts), np.concatenate(bases), np.concatenate(counts)
        self._starts, self._ends = np.array(starts, np.uint64)[order], np.array(ends, np.uint64)[order]
        self._table, self._page0 = np.array(tables, np.int64)[order], np.array(page0s, np.int64)[order]

    def slot_of(self, addresses: Addresses) -> npt.NDArray[np.int64]:
        """Slot of each address, -1 where it is not the address of an object."""
        slots = np.empty(len(addresses), np.int64)
        gathering.find(
            addresses, self._starts, self._ends, self._table, self._page0, self._first, self._base, self._count,
            int(self._shift), int(self._stride), slots,
        )  # fmt: skip
        return slots
