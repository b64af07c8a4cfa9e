# SPDX-License-Identifier: GPL-2.0-or-later
"""DPDK's part of a layout, proven on its table of memory zones and on the session pool, field by field.

Rules: as ``probes.evidence``. A zone leads to its pool, which carries its name; a pool's objects lie as far apart as
its sizes say, in its chunks, and each names the pool. DPDK 24.11 (and 20.11, 18.11: the same), lib/mempool.
"""

import itertools
import re
from collections.abc import Sequence

from probes.evidence import Chain, Ledger, Looker, Name, moved, name_of
from probes.layout import SESSION, Layout
from probes.mempool import MAX_CHUNKS, MAX_OBJECTS, PREFIX, TABLE, find_memzones, parse_memzones
from probes.target import ReadFailed, Region, Target

ZONE, POOL, HEADER, CHUNK = "rte_memzone", "rte_mempool", "rte_mempool_objhdr", "rte_mempool_memhdr"
CACHE_LINE = 64
LOOKED_AT = 256  # bytes of a pool in which its name must stand
OBJECTS = 8  # whose distance is compared
ZONE_FIELDS: tuple[Name, ...] = tuple((ZONE, member) for member in ("name", "addr", "len", None))
POOL_FIELDS: tuple[Name, ...] = (
    *(
        (POOL, member)
        for member in (
            "name", "size", "elt_size", "header_size", "trailer_size", "populated_size", "nb_mem_chunks", "elt_list",
            "mem_list",
        )
    ),
    *((HEADER, member) for member in ("next", "mp", None)),
    *((CHUNK, member) for member in ("next", "mp", "addr", "len")),
)  # fmt: skip


def look_at_pools(ledger: Ledger, looker: Looker, prefix: str, regions: Sequence[Region], found: Sequence[int]) -> None:
    """Judge DPDK's structs by what the process has; without a table of zones (``--in-memory``) only the pools', which
    were ``found`` by their names."""
    tables = [r for r in regions if TABLE in r.path]
    if tables:
        raw = [looker.target.read(table.start, table.size) for table in tables]
        _chain_of_zones(prefix).look(ledger, looker, raw)
    addresses = _addresses(looker.target, looker.layout, prefix, regions)
    _chain_of_pools(prefix).look(ledger, looker, addresses if tables else found)


def explain(target: Target, layout: Layout, prefix: str, regions: Sequence[Region]) -> str | None:
    """Which of DPDK's fields is to blame where no session pool is found; None where that cannot be told."""
    try:
        return _wrong_field(target, layout, prefix, regions)
    except ReadFailed:
        return None


def _wrong_field(target: Target, layout: Layout, prefix: str, regions: Sequence[Region]) -> str | None:
    tables = [r for r in regions if TABLE in r.path]
    if not tables:
        return None
    raw = [target.read(table.start, table.size) for table in tables]
    zones, looker = _chain_of_zones(prefix), Looker(target, layout)
    if not zones.holds_for(looker, raw):
        mended = {
            name_of(name)
            for name in ZONE_FIELDS
            for _, other in moved(layout, name)
            if zones.holds_for(looker.under(other), raw)
        }
        return " or ".join(sorted(mended)) or None
    ledger = Ledger()
    _chain_of_pools(prefix).look(ledger, looker, _addresses(target, layout, prefix, regions))
    return " or ".join(sorted(map(name_of, ledger.bad))) or None


def _addresses(target: Target, layout: Layout, prefix: str, regions: Sequence[Region]) -> list[int]:
    zones = find_memzones(target, layout, regions)
    return [zone.address for zone in zones if re.fullmatch(re.escape(PREFIX + prefix) + r"\d+", zone.name)]


def _chain_of_zones(prefix: str) -> Chain:
    wanted = re.compile(re.escape(PREFIX + prefix) + r"\d+")

    def holds(looker: Looker, raw: bytes) -> bool:
        zones = sorted(parse_memzones(raw, looker.layout), key=lambda zone: zone.address)
        if any(one.address + one.length > two.address for one, two in itertools.pairwise(zones)):
            return False
        pools = [zone for zone in zones if wanted.fullmatch(zone.name)]
        return bool(pools) and all(
            zone.length >= LOOKED_AT // 2
            and zone.name.removeprefix(PREFIX).encode() + b"\0" in looker.read(zone.address, LOOKED_AT)
            for zone in pools
        )

    return Chain("DPDK's memory zones", ZONE_FIELDS, holds)


def _chain_of_pools(prefix: str) -> Chain:
    wanted = re.compile(re.escape(prefix) + r"\d+")

    def holds(looker: Looker, pool: int) -> bool:
        layout = looker.layout
        number = looker.number
        name = looker.bytes(POOL, "name", pool).split(b"\0")[0].decode("ascii", "replace")
        element, before, after, populated = (
            number(POOL, member, pool) for member in ("elt_size", "header_size", "trailer_size", "populated_size")
        )
        if not wanted.fullmatch(name) or element != layout.size(SESSION):
            return False
        if not 0 < populated == number(POOL, "size", pool) <= MAX_OBJECTS:  # or DPVS had not started
            return False
        chunks = _chunks(looker, pool)
        first, size = number_of_list(looker, "elt_list", pool), layout.size(HEADER)
        if not chunks or not any(0 <= first + size - before - start < CACHE_LINE for start, _ in chunks):
            return False
        if (first + size) % CACHE_LINE:  # so are objects without flags aligned
            return False
        if sum(length for _, length in chunks) < populated * (before + element):
            return False
        distances, at = [], first
        for _ in range(OBJECTS):
            following = number(HEADER, "next", at)
            if number(HEADER, "mp", at) != pool or following == 0:
                return False
            distances.append(following - at)
            at = following
        return max(set(distances), key=distances.count) == before + element + after

    return Chain("DPDK's session pool", POOL_FIELDS, holds)


def number_of_list(looker: Looker, member: str, pool: int) -> int:
    """The first pointer of a list head in a pool."""
    return looker.word(pool + looker.layout.offset(POOL, member))


def _chunks(looker: Looker, pool: int) -> list[tuple[int, int]]:
    """(start, length) of the pool's chunks; empty where the list is not what the pool says."""
    chunks: list[tuple[int, int]] = []
    at = number_of_list(looker, "mem_list", pool)
    count = looker.number(POOL, "nb_mem_chunks", pool)
    while at and len(chunks) <= min(count, MAX_CHUNKS):
        if looker.number(CHUNK, "mp", at) != pool:
            return []
        start, length = looker.number(CHUNK, "addr", at), looker.number(CHUNK, "len", at)
        if not start or not 0 < length < 1 << 40:
            return []
        looker.read(start, 8)
        looker.read(start + length - 8, 8)
        chunks.append((start, length))
        at = looker.number(CHUNK, "next", at)
    return chunks if len(chunks) == count else []
