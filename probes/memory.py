# SPDX-License-Identifier: GPL-2.0-or-later
"""DPVS's session pool as numpy arrays.

Rules: a session is named by its *slot*, a dense number from 0 to ``slots - 1`` over all pools (one a NUMA socket).
Reading costs DPVS nothing and asks it nothing, so what is read may be half-changed: ``read`` looks twice at the words
that make up a session and says which ones held still. DPVS does not clear a session when it frees it: only its HASHED
flag tells (DPVS 1.10.2, src/ipvs/ip_vs_conn.c).

A session that DPVS is just creating becomes readable here a moment after its create event: it is hashed, and its timer
armed, only after the place where the probe fires.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from probes.layout import SESSION, UDP_NUMBERS, BadLayout, Evidence, Layout, release_name, select
from probes.mapping import ROWS, Addresses, MapFailed, Memory, Prints, Words, open_memory
from probes.mempool import (
    Mempool,
    Memzone,
    PoolMismatch,
    PoolNotFound,
    SlotTable,
    find_memzones,
    find_objects,
    find_pools,
)
from probes.poolcheck import explain
from probes.target import ReadFailed, Region, Target

Bools = npt.NDArray[np.bool_]
Slots = npt.NDArray[np.int64]
Conns = npt.NDArray[np.void]

POOL_PREFIX = "dp_vs_conn_"
AF_INET, AF_INET6 = 2, 10
UDP = 17
UNKNOWN_STATE = 0xFFFF

# What ``read`` returns: name -> (member of struct dp_vs_conn, member inside it, dtype). Addresses and ports in network
# order; a timeval is two 64-bit numbers.
_FIELDS: dict[str, tuple[str, str | None, str]] = {
    "af": ("af", None, "<u4"),
    "proto": ("proto", None, "u1"),
    "caddr": ("caddr", None, "16u1"),
    "vaddr": ("vaddr", None, "16u1"),
    "laddr": ("laddr", None, "16u1"),
    "daddr": ("daddr", None, "16u1"),
    "cport": ("cport", None, ">u2"),
    "vport": ("vport", None, ">u2"),
    "lport": ("lport", None, ">u2"),
    "dport": ("dport", None, ">u2"),
    "connpool": ("connpool", None, "<u8"),
    "af_out": ("tuplehash", "af", "<u4"),
    "refcnt": ("refcnt", None, "<i4"),
    "timer_handler": ("timer", "handler", "<u8"),
    "timeout_s": ("timeout", None, "<u8"),
    "timeout_us": ("timeout", "usec", "<u8"),
    "dest": ("dest", None, "<u8"),
    **{
        f"{seq}_{part}": (seq, part, "<u4")
        for seq in ("fnat_seq", "syn_proxy_seq")
        for part in ("isn", "delta", "fdata_seq", "prev_delta")
    },
    "rs_end_seq": ("rs_end_seq", None, "<u4"),
    "rs_end_ack": ("rs_end_ack", None, "<u4"),
    "packet_xmit": ("packet_xmit", None, "<u8"),
    "wscale_vs": ("wscale_vs", None, "u1"),
    "wscale_rs": ("wscale_rs", None, "u1"),
    "pp_version": ("pp_version", None, "u1"),
    "pp_sent": ("pp_sent", None, "u1"),
    "flags": ("flags", None, "<u2"),
    "state": ("state", None, "<u2"),
}
_INNER = {"timer": "dpvs_timer", "fnat_seq": "dp_vs_seq", "syn_proxy_seq": "dp_vs_seq"}
# Words that change with every packet or say nothing about what the session is: not looked at twice.
_LOOSE = {
    "refcnt", "timer_handler", "timeout_s", "timeout_us", "rs_end_seq", "rs_end_ack",
}  # fmt: skip
# What a scan compares: client address (part of it) and all ports, sequence deltas, state and flags.
_HOT = ("caddr", "cport", "fnat_seq_isn", "fnat_seq_fdata_seq", "flags")


def missing_fields(layout: Layout) -> list[str]:
    """Fields that are read as 0: sessions of this release have none, or where it is, is not proven."""
    return [name for name, (member, _, _) in _FIELDS.items() if not layout.has(SESSION, member)]


def field_offset(layout: Layout, name: str) -> int:
    """Byte offset in ``struct dp_vs_conn`` of a field of ``SessionPool.read``."""
    member, inner, _ = _FIELDS[name]
    offset = layout.offset(SESSION, member)
    if member == "tuplehash":  # [0] inbound, [1] outbound
        return offset + layout.size("conn_tuple_hash") + layout.offset("conn_tuple_hash", inner or "af")
    if member == "timeout":
        return offset + (8 if inner == "usec" else 0)
    return offset + (layout.offset(_INNER[member], inner) if inner else 0)


def session_dtype(layout: Layout) -> "np.dtype[np.void]":
    """The fields of ``SessionPool.read`` where they are in a ``struct dp_vs_conn`` of this layout, read as a whole.

    Those that it does not have are in eight zeros behind it.
    """
    missing = missing_fields(layout)
    return np.dtype(
        {
            "names": list(_FIELDS),
            "formats": [dtype for _, _, dtype in _FIELDS.values()],
            "offsets": [layout.size(SESSION) if n in missing else field_offset(layout, n) for n in _FIELDS],
            "itemsize": layout.size(SESSION) + 8,
        }
    )


def _udp_states(layout: Layout) -> npt.NDArray[np.uint16] | None:
    """By this layout's number of a state of UDP that of DPVS 1.10.2, UNKNOWN_STATE as the last; None: all the same."""
    if layout.udp_states == UDP_NUMBERS:
        return None
    numbers = np.full(max(layout.udp_states.values()) + 2, UNKNOWN_STATE, np.uint16)
    for name, number in layout.udp_states.items():
        numbers[number] = UDP_NUMBERS[name]
    return numbers


class Gather:
    """Which words of a session to fetch for some fields, and the dtype that finds the fields in the fetched words.

    ``offsets``: byte offsets of the words, the first ``steady`` of them those that hold a field to be looked at twice.
    """

    def __init__(self, layout: Layout, names: Sequence[str]) -> None:
        every, missing = names, set(missing_fields(layout))
        names = [name for name in every if name not in missing]
        covered = {name: self._words(layout, name) for name in names}
        steady = {word for name in names if name not in _LOOSE for word in covered[name]}
        loose = {word for name in names for word in covered[name]} - steady
        order = sorted(steady) + sorted(loose)
        for name in names:  # a field in several words needs them next to each other
            first = order.index(covered[name][0])
            if order[first : first + len(covered[name])] != covered[name]:
                raise BadLayout(f"layout {layout.name}: field {name} of {SESSION} does not start on a word")
        self.steady = len(steady)
        self.offsets = np.array(order, np.int64) * 8
        # What is not there is read as 0, from a word behind those that are fetched.
        self.extra = 1 if missing.intersection(every) else 0
        places = {n: order.index(covered[n][0]) * 8 + field_offset(layout, n) % 8 for n in names}
        self.dtype = np.dtype(
            {
                "names": list(every),
                "formats": [_FIELDS[name][2] for name in every],
                "offsets": [places.get(name, 8 * len(order)) for name in every],
                "itemsize": 8 * (len(order) + self.extra),
            }
        )

    @staticmethod
    def _words(layout: Layout, name: str) -> list[int]:
        offset, size = field_offset(layout, name), np.dtype(_FIELDS[name][2]).itemsize
        return list(range(offset // 8, (offset + size - 1) // 8 + 1))


class SessionPool:
    """All sessions of one DPVS, by slot. ``with SessionPool.open(target, layout) as pool``."""

    def __init__(self, target: Target, layout: Layout, pools: Sequence[Mempool], memory: Memory) -> None:
        self.target, self.layout, self.pools = target, layout, tuple(pools)
        self._memory = memory
        extents = []
        for pool in pools:
            objects = find_objects(memory, layout, pool)
            for start, end in pool.chunks:
                extents.append(((start, end), objects[(objects >= np.uint64(start)) & (objects < np.uint64(end))]))
        self._table = SlotTable(extents, pools[0].stride)
        self._places = memory.locate(self._table.addresses)
        self.slots = len(self._places)
        self._all = Gather(layout, list(_FIELDS))
        self._udp_states = _udp_states(layout)
        self._unknown_flags = 0 if layout.has(SESSION, "syn_proxy_seq") else layout.flag("SYNPROXY")
        self._state = Gather(layout, ["flags", "state"])
        self.hot_offsets = np.array([field_offset(layout, n) // 8 * 8 for n in _HOT], np.int64)
        flags = field_offset(layout, "flags")
        self._flags_shift = np.uint64(8 * (flags % 8))
        self._hashed = np.uint64(layout.flag("HASHED")) << self._flags_shift
        self._pool_addresses = np.array([pool.address for pool in pools], np.uint64)
        self.handler = target.find("dp_vs_conn_expire")  # static: only an unstripped binary names it

    @classmethod
    def open(cls, target: Target, layout: Layout) -> Self:
        """Find the pools, map their pages, number their objects. Raises PoolNotFound, PoolMismatch or MapFailed."""
        regions = target.maps()
        try:
            return cls._open(target, layout, regions)
        except (PoolMismatch, PoolNotFound, ReadFailed, MapFailed) as error:
            if (wrong := explain(target, layout, POOL_PREFIX, regions)) is None:
                raise
            raise PoolMismatch(f"{wrong}: {error}") from None

    @classmethod
    def _open(cls, target: Target, layout: Layout, regions: Sequence[Region]) -> Self:
        pools = find_pools(target, layout, POOL_PREFIX, regions)
        for pool in pools:
            if pool.element_bytes != layout.size(SESSION) or pool.stride != pools[0].stride:
                raise PoolMismatch(
                    f"sessions of {pool.name} are {pool.element_bytes} bytes, layout {layout.name} says "
                    f"{layout.size(SESSION)} (sizeof({SESSION}))"
                )
        memory = open_memory(target, [chunk for pool in pools for chunk in pool.chunks], regions)
        try:
            return cls(target, layout, pools, memory)
        except BaseException:
            memory.close()
            raise

    def close(self) -> None:
        """Give the pages back. Reading afterwards raises MemoryClosed."""
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    @property
    def shared(self) -> bool:
        """Whether DPVS's pages are mapped here; False means that every read is a system call and a copy."""
        return self._memory.shared

    # --- slots and addresses -----------------------------------------------------------------------------------------

    def slot_of(self, addresses: Addresses) -> Slots:
        """Slot of each session address, -1 for what is not the address of a session object."""
        return self._table.slot_of(addresses)

    def address_of(self, slots: Slots) -> Addresses:
        return self._table.addresses[slots]

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self, slots: Slots) -> tuple[Conns, Bools]:
        """Copies of n sessions, shape (n,), fields as in ``_FIELDS``, and which of them held still while being read.

        A session that did not is to be read again later. Held still does not mean in use: see ``valid``. States of UDP
        are in the numbers of DPVS 1.10.2, whatever those of this release are.
        """
        places = self._places[slots]
        words = np.empty((len(places), len(self._all.offsets)), np.uint64)
        ok = np.empty(len(places), bool)
        steady = self._all.steady
        for first in range(0, len(places), ROWS):  # the second look finds what the first brought into the cache
            part = slice(first, first + ROWS)
            self._memory.gather(places[part], self._all.offsets, out=words[part])
            ok[part] = self._memory.still(places[part], self._all.offsets[:steady], words[part])
        if self._all.extra:
            words = np.concatenate((words, np.zeros((len(words), 1), np.uint64)), axis=1)
        conns = words.view(self._all.dtype)[:, 0]
        if self._udp_states is not None:
            udp = conns["proto"] == UDP
            conns["state"][udp] = self._udp_states.take(conns["state"][udp], mode="clip")
        return conns, ok

    def valid(self, conns: Conns) -> Bools:
        """Which of n read sessions DPVS has in its tables: hashed, of this pool, with DPVS's own timer, referenced.

        Those behind a SYN proxy are left out where their second sequence numbers cannot be read.
        """
        good: Bools = (conns["flags"] & self.layout.flag("HASHED")) != 0
        good &= (conns["flags"] & self._unknown_flags) == 0
        good &= np.isin(conns["connpool"], self._pool_addresses)
        good &= np.isin(conns["af"], (AF_INET, AF_INET6)) & (conns["refcnt"] > 0)
        if self.handler is not None:
            good &= conns["timer_handler"] == np.uint64(self.handler)
        else:
            handlers, which = np.unique(conns["timer_handler"], return_inverse=True)
            good &= np.array([self.target.is_code(int(handler)) for handler in handlers], bool)[which]
        return good

    def live(self, slots: Slots | None = None) -> Bools:
        """Which slots (all, if None) hold a hashed session: one word each."""
        places = self._places if slots is None else self._places[slots]
        live: Bools = (self._memory.gather(places, self._state.offsets)[:, 0] & self._hashed) != 0
        return live

    def scan_hot(self, first: int = 0, last: int | None = None) -> Words:
        """Shape (n, 5) uint64 of the slots [first, last): client, ports, sequence words, flags and state, as they lie.

        ``hot_flags`` and ``hot_live`` read the last column.
        """
        return self._memory.gather(self._places[first:last], self.hot_offsets)

    def scan_prints(self, first: int, last: int) -> Prints:
        """``folded`` of ``scan_hot``, shape (n,), to be compared with the scan before: where it differs, a session has
        changed.
        """
        return self._memory.fold(self._places[first:last], self.hot_offsets)

    def hot_flags(self, hot: Words) -> npt.NDArray[np.uint16]:
        return (hot[:, -1] >> self._flags_shift).astype(np.uint16)

    def hot_live(self, hot: Words) -> Bools:
        live: Bools = (hot[:, -1] & self._hashed) != 0
        return live

    def raw(self, slots: Slots) -> npt.NDArray[np.uint8]:
        """Shape (n, sizeof(struct dp_vs_conn)) uint8: everything of some sessions, for the proof of the layout."""
        offsets = np.arange(0, self.layout.size(SESSION), 8, dtype=np.int64)
        return self._memory.gather(self._places[slots], offsets).view(np.uint8)

    # --- other memory of DPVS ----------------------------------------------------------------------------------------

    def find_memzone(self, name: str) -> tuple[int, int] | None:
        """(address, length) of a DPDK memory zone."""
        zones: list[Memzone] = find_memzones(self.target, self.layout)
        return next(((zone.address, zone.length) for zone in zones if zone.name == name), None)

    def read_mapped(self, address: int, size: int) -> bytes:
        """Bytes anywhere in DPVS's memory; a copy by the kernel, DPVS is not asked."""
        return self.target.read(address, size)


def evidence(target: Target, layout: Layout) -> Evidence:
    """What the process says of itself: its release (``g_version``) and the size of its session objects."""
    version = target.global_u32("g_version")
    pools = find_pools(target, layout, POOL_PREFIX)
    return Evidence(None if not version else release_name(version), pools[0].element_bytes)


def choose_layout(target: Target) -> Layout:
    """The shipped layout that fits this process. DPDK's part is needed to read the evidence: each one's is tried."""
    problem: Exception | None = None
    for name in Layout.shipped():
        try:
            return select(evidence(target, Layout.load(name)))
        except PoolMismatch as error:
            problem = error
    raise problem or PoolMismatch("no layout is shipped")
