# SPDX-License-Identifier: GPL-2.0-or-later
"""probes/memory.py, mempool.py and mapping.py on a pool in this process's own memory, mapped and copied."""

import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from collector.conns import from_conns
from collector.record import FNAT
from probes import mempool
from probes.layout import Layout, UnknownLayout
from probes.mapping import MapFailed, MemoryClosed, folded, open_memory
from probes.memory import SessionPool, choose_layout
from probes.mempool import PoolMismatch, PoolNotFound, SlotTable, find_memzones, find_pools, parse_memzones
from probes.target import Target
from tests.unit.own_pool import CONN, EXPIRE, LAYOUT, STRIDE, XMIT_FNAT, OwnPool, OwnZones, own_target, slots

HUGE = 2 << 20


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    with own_target(tmp_path) as own:
        yield own


def opened(directory: Path, target: Target, *pools: OwnPool, layout: Layout = LAYOUT) -> SessionPool:
    zones = OwnZones(directory, pools)
    pool = SessionPool.open(target, layout)
    pool.keep = zones, pools  # type: ignore[attr-defined]
    return pool


class TestFinding:
    def test_by_the_table_of_zones(self, tmp_path: Path, target: Target) -> None:
        own = OwnPool(tmp_path)
        zones = OwnZones(tmp_path, [own])
        found = find_pools(target, LAYOUT, "dp_vs_conn_")
        assert [(p.name, p.address, p.populated, p.stride) for p in found] == [(own.name, own.address, 100, STRIDE)]
        assert ("MP_dp_vs_conn_0", own.address) in [(z.name, z.address) for z in find_memzones(target, LAYOUT)]
        del zones

    def test_other_pools_are_left_out(self, tmp_path: Path, target: Target) -> None:
        pools = [OwnPool(tmp_path, name=name) for name in ("dp_vs_conn_0", "dp_vs_conn_extra_0", "mbuf_pool_0")]
        zones = OwnZones(tmp_path, pools)
        assert [p.name for p in find_pools(target, LAYOUT, "dp_vs_conn_")] == ["dp_vs_conn_0"]
        del zones

    def test_by_name_where_there_is_no_table(self, tmp_path: Path, target: Target) -> None:
        own = OwnPool(tmp_path)
        regions = [r for r in target.maps() if str(tmp_path) in r.path]
        decoy = own.areas[0].start + 128  # the name stands elsewhere as well
        own.areas[0].write(decoy, b"dp_vs_conn_0\0")
        found = find_pools(target, LAYOUT, "dp_vs_conn_", regions)
        assert [p.address for p in found] == [own.address]

    def test_by_a_table_without_a_name(self, tmp_path: Path, target: Target) -> None:
        own = OwnPool(tmp_path)
        zones = OwnZones(None, [own])
        table = zones.area.start
        regions = [r for r in target.maps() if str(tmp_path) in r.path or r.start <= table < r.end]
        found = find_pools(target, LAYOUT, "dp_vs_conn_", regions)
        assert [p.address for p in found] == [own.address]

    def test_none(self, tmp_path: Path, target: Target) -> None:
        with pytest.raises(PoolNotFound):
            find_pools(target, LAYOUT, "dp_vs_conn_", [])

    def test_rubbish_behind_the_table(self) -> None:
        assert parse_memzones(b"\xff" * 1000, LAYOUT) == []
        assert parse_memzones(bytes(1000), LAYOUT) == []
        assert parse_memzones(b"x" * 71, LAYOUT) == []

    @pytest.mark.parametrize(
        ("field", "value"),
        [("elt_size", 0), ("header_size", 8), ("populated_size", 101), ("populated_size", 0), ("nb_mem_chunks", 2),
         ("nb_mem_chunks", 0), ("trailer_size", 1 << 30), ("elt_size", 579)],
    )  # fmt: skip
    def test_impossible_numbers_are_refused(self, tmp_path: Path, target: Target, field: str, value: int) -> None:
        own = OwnPool(tmp_path)
        zones = OwnZones(tmp_path, [own])
        own.head.field(own.address, "rte_mempool", field, value)
        with pytest.raises(PoolMismatch):
            SessionPool.open(target, LAYOUT)
        del zones

    def test_a_chunk_of_another_pool(self, tmp_path: Path, target: Target) -> None:
        own = OwnPool(tmp_path)
        zones = OwnZones(tmp_path, [own])
        own.head.field(own.address + 1024, "rte_mempool_memhdr", "mp", own.address + 64)
        with pytest.raises(PoolMismatch):
            SessionPool.open(target, LAYOUT)
        del zones

    def test_sessions_of_another_size(self, tmp_path: Path, target: Target) -> None:
        own = OwnPool(tmp_path)
        zones = OwnZones(tmp_path, [own])
        own.head.field(own.address, "rte_mempool", "elt_size", CONN + 64)
        own.head.field(own.address, "rte_mempool", "trailer_size", 0)
        with pytest.raises(PoolMismatch, match="640 bytes"):
            SessionPool.open(target, LAYOUT)
        with pytest.raises(UnknownLayout, match="640 bytes"):
            choose_layout(target)
        del zones

    def test_the_layout_is_chosen_by_evidence(self, tmp_path: Path) -> None:
        own = OwnPool(tmp_path)
        zones = OwnZones(tmp_path, [own])
        own.head.write(own.address + 4000, 0x00010A02, 4)
        with own_target(tmp_path, g_version=own.address + 4000) as target:
            assert choose_layout(target) is Layout.load("1.10.2")
            own.head.write(own.address + 4000, 0x00010B00, 4)
            with pytest.raises(UnknownLayout, match=r"1\.11\.0"):
                choose_layout(target)
        del zones


class TestObjects:
    @pytest.mark.parametrize("page", [4096, 65536, HUGE])
    @pytest.mark.parametrize("shared", [True, False])
    def test_all_objects_in_any_page_size(self, tmp_path: Path, target: Target, page: int, shared: bool) -> None:
        own = OwnPool(tmp_path, chunks=(3001, 7), page=page, shared=shared)
        with opened(tmp_path, target, own) as pool:
            assert pool.shared is shared
            assert pool.slots == 3008
            addresses = np.sort(own.addresses)
            assert (pool.address_of(np.arange(3008)) == addresses).all()
            assert (pool.slot_of(addresses) == np.arange(3008)).all()

    def test_addresses_that_are_no_objects(self, tmp_path: Path, target: Target) -> None:
        own = OwnPool(tmp_path, chunks=(50, 50))
        with opened(tmp_path, target, own) as pool:
            some = pool.address_of(slots(0, 1, 49, 50, 99))
            for off in (-STRIDE * 200, -64, -8, -1, 1, 8, 64, HUGE):
                moved = (some.astype(np.int64) + off).astype(np.uint64)
                good = np.isin(moved, own.addresses)
                assert ((pool.slot_of(moved) >= 0) == good).all(), off
            strange = np.array([0, 1, 2**63, 2**64 - 1, some[0]], np.uint64)
            assert pool.slot_of(strange).tolist() == [-1, -1, -1, -1, 0]
            assert pool.slot_of(np.empty(0, np.uint64)).tolist() == []

    def test_session_pointers_are_not_taken_for_headers(self, tmp_path: Path, target: Target) -> None:
        """conn->connpool is the same word as a header's pool; even with zeros or an address before it."""
        own = OwnPool(tmp_path)
        for slot in range(100):
            own.set(slot, connpool=own.address, cport=bytes(2), vport=bytes(2), lport=bytes(2), dport=bytes(2))
        own.set(5, cport=int(own.addresses[7] - 24).to_bytes(8, "little"))
        with opened(tmp_path, target, own) as pool:
            assert pool.slots == 100
            assert (pool.address_of(np.arange(100)) == own.addresses).all()

    def test_a_broken_chain_of_objects(self, tmp_path: Path, target: Target) -> None:
        own = OwnPool(tmp_path)
        zones = OwnZones(tmp_path, [own])
        own.area(int(own.addresses[10])).field(int(own.addresses[10]) - 24, "rte_mempool_objhdr", "mp", 0)
        with pytest.raises(PoolMismatch, match="98 were found"):
            SessionPool.open(target, LAYOUT)
        del zones

    def test_two_sockets_make_one_range_of_slots(self, tmp_path: Path, target: Target) -> None:
        one, two = OwnPool(tmp_path, name="dp_vs_conn_1", chunks=(10,)), OwnPool(tmp_path, chunks=(20,))
        with opened(tmp_path, target, one, two) as pool:
            assert [p.name for p in pool.pools] == ["dp_vs_conn_0", "dp_vs_conn_1"]
            assert (pool.slot_of(two.addresses) == np.arange(20)).all()
            assert (pool.slot_of(one.addresses) == np.arange(20, 30)).all()
            one.session(3)
            two.session(4)
            assert np.flatnonzero(pool.live()).tolist() == [4, 23]
            assert pool.valid(pool.read(slots(4, 23))[0]).all()

    def test_objects_that_are_not_evenly_spaced(self) -> None:
        with pytest.raises(PoolMismatch):
            SlotTable([((0, 8192), np.array([64, 800, 1000], np.uint64))], 704)

    def test_a_block_boundary_loses_no_object(
        self, tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(mempool, "BLOCK_BYTES", 704)  # a boundary in, before and behind headers
        own = OwnPool(tmp_path, chunks=(200,))
        with opened(tmp_path, target, own) as pool:
            assert (pool.address_of(np.arange(200)) == own.addresses).all()


@pytest.mark.parametrize("shared", [True, False])
class TestReading:
    def test_fields(self, tmp_path: Path, target: Target, shared: bool) -> None:
        own = OwnPool(tmp_path, shared=shared)
        own.session(7, state=4, port=50001, rs_end_seq=9, wscale_vs=7, wscale_rs=8, pp_version=2, pp_sent=1, lcore=3)
        with opened(tmp_path, target, own) as pool:
            conns, ok = pool.read(slots(7))
            assert ok.tolist() == [True]
            conn = conns[0]
            assert conn["caddr"][:4].tolist() == [10, 1, 0, 5]
            expected = {
                "af": 2, "af_out": 2, "proto": 6, "cport": 50001, "vport": 80, "lport": 1032, "dport": 8080, "state": 4,
                "flags": 0x1305, "timeout_s": 90, "timeout_us": 250000, "connpool": own.address, "refcnt": 1,
                "timer_handler": EXPIRE, "packet_xmit": XMIT_FNAT, "fnat_seq_delta": 1007, "rs_end_seq": 9,
                "dest": 0x1234,
                "wscale_vs": 7, "wscale_rs": 8, "pp_version": 2, "pp_sent": 1,
            }  # fmt: skip
            assert {name: int(conn[name]) for name in expected} == expected
            record = from_conns(conns, slots(7), {XMIT_FNAT: FNAT})[0]
            assert (record["fwdmode"], record["timeout_ms"], record["fnat_delta"]) == (FNAT, 90000, 1007)
            assert not record["caddr"][4:].any()

    def test_states_of_udp_in_the_numbers_of_1_10_2(self, tmp_path: Path, target: Target, shared: bool) -> None:
        own = OwnPool(tmp_path, shared=shared)
        for slot, (proto, state) in enumerate([(17, 0), (17, 1), (17, 2), (17, 65535), (6, 0), (6, 1)]):
            own.session(slot, proto=proto, state=state)
        with opened(tmp_path, target, own) as pool:
            assert pool.read(np.arange(6))[0]["state"].tolist() == [0, 1, 2, 65535, 0, 1]
        older = replace(LAYOUT, udp_states={"NORMAL": 0, "LAST": 1})
        with opened(tmp_path, target, own, layout=older) as pool:
            assert pool.read(np.arange(6))[0]["state"].tolist() == [2, 3, 65535, 65535, 0, 1]
            assert len(pool.read(slots())[0]) == 0

    def test_any_selection_in_any_order(self, tmp_path: Path, target: Target, shared: bool) -> None:
        own = OwnPool(tmp_path, chunks=(1300, 800), shared=shared)
        for slot in range(2100):
            own.set(slot, rs_end_seq=slot, flags=0x100 if slot % 3 else 0)
        with opened(tmp_path, target, own) as pool:
            order = pool.slot_of(own.addresses)
            truth = np.empty(2100, np.int64)
            truth[order] = np.arange(2100)
            for chosen in (np.arange(2100), np.arange(2100)[::-1].copy(), slots(5, 5, 2099, 0), slots()):
                conns, ok = pool.read(chosen)
                assert ok.all()
                assert (conns["rs_end_seq"] == truth[chosen]).all()
                assert (pool.live(chosen) == (truth[chosen] % 3 != 0)).all()
            assert (pool.live() == (truth % 3 != 0)).all()

    def test_a_copy_does_not_change_any_more(self, tmp_path: Path, target: Target, shared: bool) -> None:
        own = OwnPool(tmp_path, shared=shared)
        own.session(1)
        with opened(tmp_path, target, own) as pool:
            conns, _ = pool.read(slots(1))
            own.session(1, state=6, flags=0)
            assert int(conns[0]["state"]) == 1
            assert int(pool.read(slots(1))[0][0]["state"]) == 6
            conns["state"] = 3

    def test_what_a_session_is(self, tmp_path: Path, target: Target, shared: bool) -> None:
        own = OwnPool(tmp_path, shared=shared)
        for slot in range(8):
            own.session(slot)
        own.set(1, flags=0x1205)  # freed: not hashed
        own.set(2, connpool=own.address + 64)
        own.set(3, af=7)
        own.set(4, refcnt=0)
        own.set(5, timer=bytes(24))  # not armed yet
        own.set(6, refcnt=0xFFFFFFFF)
        with opened(tmp_path, target, own) as pool:
            conns, _ = pool.read(np.arange(8))
            assert pool.valid(conns).tolist() == [True, False, False, False, False, False, False, True]
            pool.handler = None  # a stripped binary: any code of the program will do
            assert pool.valid(conns).tolist() == [True, False, False, False, False, False, False, True]

    def test_hot_words(self, tmp_path: Path, target: Target, shared: bool) -> None:
        own = OwnPool(tmp_path, shared=shared)
        for slot in range(100):
            own.session(slot, flags=0x1305 if slot % 2 else 0x1205)
        with opened(tmp_path, target, own) as pool:
            before, prints = pool.scan_hot(), pool.scan_prints(0, 100)
            assert before.shape == (100, 5)
            assert (pool.hot_live(before) == (np.arange(100) % 2 == 1)).all()
            assert set(pool.hot_flags(before).tolist()) == {0x1305, 0x1205}
            assert (pool.scan_hot(10, 20) == before[10:20]).all()
            assert (prints == folded(before)).all()
            assert (pool.scan_prints(10, 20) == prints[10:20]).all()
            assert prints.all()
            own.set(11, state=5)
            own.set(12, fnat_seq=bytes(16))
            own.set(13, lport=(9).to_bytes(2, "big"))
            own.set(14, rs_end_seq=77, refcnt=2)  # what every packet moves is no change
            own.set(15, caddr=b"\x0a\1\0\6")
            assert np.flatnonzero((pool.scan_hot() != before).any(axis=1)).tolist() == [11, 12, 13, 15]
            assert np.flatnonzero(pool.scan_prints(0, 100) != prints).tolist() == [11, 12, 13, 15]

    def test_other_memory(self, tmp_path: Path, target: Target, shared: bool) -> None:
        own = OwnPool(tmp_path, shared=shared)
        with opened(tmp_path, target, own) as pool:
            assert pool.find_memzone("MP_dp_vs_conn_0") == (own.address, 4096)
            assert pool.find_memzone("nothing") is None
            assert pool.read_mapped(own.address, 12) == b"dp_vs_conn_0"

    def test_closed(self, tmp_path: Path, target: Target, shared: bool) -> None:
        pool = opened(tmp_path, target, OwnPool(tmp_path, shared=shared))
        pool.close()
        pool.close()
        for read in (pool.live, pool.scan_hot, lambda: pool.scan_prints(0, 1), lambda: pool.read(slots(0))):
            with pytest.raises(MemoryClosed):
                read()


class TornMemory:
    """Memory that changes between two looks at chosen places."""

    def __init__(self, pool: SessionPool, own: OwnPool, change: dict[int, str]) -> None:
        self.inner, self.own, self.change, self.looks = pool._memory, own, change, 0
        self.shared = True
        self.close = pool._memory.close

    def gather(self, places, offsets, out=None):  # type: ignore[no-untyped-def]
        result = self.inner.gather(places, offsets, out)
        self.looks += 1
        for slot, field in self.change.items():
            self.own.set(slot, **{field: self.looks + 100})
        return result

    def still(self, places, offsets, seen):  # type: ignore[no-untyped-def]
        return self.inner.still(places, offsets, seen)


@pytest.mark.parametrize(
    ("field", "torn"),
    [("state", True), ("flags", True), ("cport", True), ("dest", True), ("packet_xmit", True), ("connpool", True),
     ("rs_end_seq", False), ("rs_end_ack", False), ("refcnt", False)],
)  # fmt: skip
def test_torn_reads_are_told(tmp_path: Path, target: Target, field: str, torn: bool) -> None:
    own = OwnPool(tmp_path)
    with opened(tmp_path, target, own) as pool:
        pool._memory = TornMemory(pool, own, {3: field})  # type: ignore[assignment]
        _, ok = pool.read(np.arange(6))
        assert ok.tolist() == [slot != 3 or not torn for slot in range(6)]


class TestMapping:
    def test_reading_only(self, tmp_path: Path, target: Target) -> None:
        own = OwnPool(tmp_path)
        with opened(tmp_path, target, own) as pool:
            with pytest.raises(ValueError, match="read-only"):
                pool._memory.block(own.areas[0].start, 64)[0] = 1
            mine = [r for r in target.maps() if r.path.endswith("dp_vs_conn_0_0") and "w" not in r.perms]
            assert mine
            assert all(region.perms == "r--s" for region in mine)

    def test_closing_gives_the_pages_and_descriptors_back(self, tmp_path: Path, target: Target) -> None:
        own = OwnPool(tmp_path)
        gc.collect()
        fds, regions = len(os.listdir("/proc/self/fd")), len(target.maps())
        for _ in range(50):
            opened(tmp_path, target, own).close()
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == fds
        assert len(target.maps()) <= regions + 5  # the allocator's own

    def test_a_hole_in_the_memory(self, target: Target) -> None:
        with pytest.raises(MapFailed):
            open_memory(target, [(0x1000, 0x3000)])

    def test_a_file_that_is_another_one_now(self, tmp_path: Path, target: Target) -> None:
        """Only met without the right to use map_files."""
        own = OwnPool(tmp_path)
        path = tmp_path / "dp_vs_conn_0_0"
        path.rename(tmp_path / "moved")
        path.write_bytes(bytes(1 << 20))
        span = (own.areas[0].start, own.areas[0].start + 4096)
        regions = [r for r in target.maps() if r.start <= span[0] < r.end]
        wrong = [type(r)(r.start, r.end, r.perms, r.offset, r.dev, r.inode, str(path)) for r in regions]
        if os.geteuid() == 0:
            open_memory(target, [span], wrong).close()
        else:
            with pytest.raises(MapFailed, match="another one"):
                open_memory(target, [span], wrong)
