# SPDX-License-Identifier: GPL-2.0-or-later
"""The scan: how long a walk takes, in how long pieces, and what it takes of the worker beside it.

First a twin whose worker has a million live sessions: its pool is mapped and walked through as a node does, nothing
changed. Then the worker makes and ends more sessions as fast as it can, and the nanoseconds of its processor time that
each takes are compared: while nobody scans, while the scan walks at its usual pace (a walk a second), at its pace
without probes, and without a pause; and, as a measure of what sharing a processor's core with anything costs, while a
loop that touches no memory runs beside. These come in turns; printed are medians of the ratios with the turns of
nobody before and after.

Then pools in memory of our own, laid out as DPDK does, all slots live, for tables that no DPVS here could fill: how
time and memory grow up to --slots. Times are processor time of the scanning process.
"""

import argparse
import ctypes
import math
import mmap
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from collector.collector import Collector
from collector.record import FNAT
from collector.table import SessionTable
from probes.layout import Layout
from probes.memory import SessionPool
from probes.target import Target
from scripts.bench.table import size_of
from tests.lab.node import LAYOUT
from tests.lab.node import Settings as Lab
from tests.lab.pair import SPARE_PAGES, Pair
from tests.lab.process import wait_for
from tests.lab.run import Run
from tests.lab.twin import TwinNode
from tests.unit.own_pool import HEADER, STRIDE, XMIT_FNAT, OwnZones, own_target

PORTS = 60_000
POOL_BYTES = 768 * 5 // 4
LIFETIME_MS, SHORT_MS = 900_000, 100
HUGE = 2 << 20
MS = 1_000_000


class Walker:
    """A collector that only scans, and a clock that we turn: a walk is due whenever we want one."""

    def __init__(self, pool: SessionPool) -> None:
        self.pool = pool
        self.table = SessionTable(pool.slots)
        modes = {address: FNAT for name in ("dp_vs_xmit_fnat",) if (address := pool.target.find(name)) is not None}
        self.collector = Collector(pool, None, self.table, modes=modes)
        self.now_ns = 1
        self.longest_ns = 0

    def walk(self) -> float:
        """Once through the pool, slice by slice; milliseconds of processor time."""
        passes, taken = self.collector.counters["scan_passes"], 0
        while self.collector.counters["scan_passes"] == passes:
            taken += self.slice()
        return taken / MS

    def slice(self) -> int:
        """The next slice of a walk; nanoseconds of processor time."""
        self.now_ns += 2_000_000_000
        began = time.thread_time_ns()
        self.collector.scan(self.now_ns)
        taken = time.thread_time_ns() - began
        self.longest_ns = max(self.longest_ns, taken)
        return taken

    def first(self) -> float:
        """The walk that reads everything; milliseconds."""
        began = time.thread_time_ns()
        self.collector.scan_all(self.now_ns)
        return (time.thread_time_ns() - began) / MS

    def quiet(self, rounds: int) -> tuple[float, float]:
        """(median milliseconds of a walk, longest slice in milliseconds) with nothing to find."""
        self.walk()
        self.longest_ns = 0
        return statistics.median(self.walk() for _ in range(rounds)), self.longest_ns / MS


# --- a worker beside the scan ---------------------------------------------------------------------------------------


class Load:
    """The twin's worker, as busy as it can be: nanoseconds of its time for each session that it makes and ends."""

    def __init__(self, node: TwinNode, target: Target) -> None:
        self._node = node
        (tid,) = target.workers()
        self._schedstat = Path(f"/proc/{target.pid}/task/{tid}/schedstat")

    def _now(self) -> tuple[int, int]:
        (worker,) = (worker for worker in self._node.tell("stats")["workers"] if worker["synthetic"])
        made, failed = worker["synthetic"], worker["synthetic_failed"]
        if failed:  # it would be busy with that instead
            raise SystemExit(f"{failed} sessions found no room in the pool, {made} did: the figures would say nothing")
        return made, int(self._schedstat.read_text().split()[0])

    def during(self, seconds: float, work: Callable[[float], None]) -> float:
        made, ran = self._now()
        work(time.monotonic() + seconds)
        made_after, ran_after = self._now()
        return (ran_after - ran) / max(1, made_after - made)


def idle(end: float) -> None:
    time.sleep(max(0.0, end - time.monotonic()))


def spin(end: float) -> None:
    while time.monotonic() < end:
        pass


def paced(walker: Walker, walk_s: float) -> Callable[[float], None]:
    """Slices as they fall due when one walk takes ``walk_s``; 0: one after the other."""
    slices = -(-walker.pool.slots // walker.collector.settings.slice_slots)

    def work(end: float) -> None:
        due = time.monotonic()
        while time.monotonic() < end:
            walker.slice()
            due += walk_s / slices
            time.sleep(max(0.0, due - time.monotonic()))

    return work


def beside(walker: Walker, load: Load, rounds: int, seconds: float) -> None:
    """Print how much slower the worker is beside each."""
    settings, slots = walker.collector.settings, walker.pool.slots
    alone_s = max(settings.alone_least_ns, settings.slot_ns * slots) / 1e9
    ways: dict[str, Callable[[float], None]] = {
        "the scan, a walk a second": paced(walker, settings.pass_large_ns / 1e9),
        f"the scan without probes, a walk each {1000 * alone_s:.0f} ms": paced(walker, alone_s),
        "the scan without a pause": paced(walker, 0),
        "a loop that touches no memory": spin,
    }
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    quiet = []
    before = load.during(seconds, idle)
    order, rng = list(ways.items()), random.Random(1)
    for _ in range(rounds):
        rng.shuffle(order)
        for name, work in order:
            taken = load.during(seconds, work)
            after = load.during(seconds, idle)
            ratios[name].append(taken / ((before + after) / 2) - 1)
            quiet.append(after / before - 1)
            before = after
    print(f"\nworker, {before:.0f} ns a session made and ended; {rounds} turns of {seconds} s each\n\n"
          f"| beside it | slower by, %, median | its 95 % confidence | quartiles |\n|---|---|---|---|")  # fmt: skip
    for name, found in {"nobody, from one time to the next": quiet, **ratios}.items():
        low, high = confidence(found)
        print(f"| {name} | {100 * statistics.median(found):+.2f} | {100 * low:+.2f} to {100 * high:+.2f} |"
              f" {100 * np.percentile(found, 25):+.1f} to {100 * np.percentile(found, 75):+.1f} |")  # fmt: skip


def confidence(found: list[float]) -> tuple[float, float]:
    """Between which of the figures their true median lies, in 95 of 100 such series; of their order alone, whatever
    their distribution.
    """
    ordered, n = sorted(found), len(found)
    reach = 0.98 * math.sqrt(n)
    return ordered[max(0, math.floor(n / 2 - reach))], ordered[min(n - 1, math.ceil(n / 2 + reach) - 1)]


def live(sessions: int, rounds: int, turns: int, seconds: float) -> None:
    """A twin with so many live sessions."""
    pool_size = 2 * sessions + sessions // 4  # with room for what is made as fast as it can be
    locals_ = [f"10.9.2.{n}" for n in range(100, 100 + -(-pool_size // PORTS))]
    memory = (2 * pool_size * POOL_BYTES + len(locals_) * (8 << 20)) // (1 << 20) + 200
    lab = Lab(pool=pool_size, memory_mib=memory, poll=True, established_timeout_s=900)
    with Run(2 * (memory // 2 + SPARE_PAGES)) as run, Pair(run, settings=lab) as pair:
        pair.kill("b")
        node = cast(TwinNode, pair.a)
        for address in locals_:
            node.tell(f"laddr add tcp {pair.plan.vip}:80 {address}")
            node.tell(f"laddr add tcp {pair.plan.vip}:7 {address}")
        node.tell(f"synthesize {sessions} 0 {LIFETIME_MS}")
        with Target.open(node.pid) as target, SessionPool.open(target, Layout.load(LAYOUT)) as pool:
            wait_for("sessions", lambda: np.count_nonzero(pool.live()) >= sessions, 60, 0.2)
            walker = Walker(pool)
            first = walker.first()
            quiet, longest = walker.quiet(rounds)
            print(f"{pool.slots} slots, {walker.table.count} live, {100 * walker.table.count / pool.slots:.0f} %")
            print(f"first walk, everything read: {first:.0f} ms; then {quiet:.1f} ms a walk,"
                  f" {1e6 * quiet / walker.table.count:.0f} ns a session, longest slice {longest:.2f} ms")  # fmt: skip
            node.tell(f"synthesize 1000000000 0 {SHORT_MS}")
            beside(walker, Load(node, target), turns, seconds)


# --- pools that no DPVS here could fill ------------------------------------------------------------------------------


class LargePool:
    """What ``tests.unit.own_pool.OwnPool`` is, made by arrays: one chunk, all sessions live."""

    name = "dp_vs_conn_0"

    def __init__(self, slots: int) -> None:
        self.slots = slots
        layout = Layout.load(LAYOUT)
        self._per_page = HUGE // STRIDE
        self._pages = -(-slots // self._per_page)
        fd = os.memfd_create("dpvs-probe-bench")
        os.ftruncate(fd, (self._pages + 2) * HUGE)
        self._map = mmap.mmap(fd, 0)
        os.close(fd)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.address = -(-base // HUGE) * HUGE  # the pool's struct, in the first page; objects from the second on
        self._skip = self.address - base
        self.start = self.address + HUGE
        self._fill(layout)
        self._head(layout)

    def _fill(self, layout: Layout) -> None:
        raw = np.frombuffer(self._map, np.uint8)[self._skip + HUGE :][: self._pages * HUGE].reshape(self._pages, HUGE)
        rows = np.lib.stride_tricks.as_strided(raw, (self._pages, self._per_page, STRIDE), (HUGE, STRIDE, 1))
        objhdr = HEADER - layout.size("rte_mempool_objhdr")
        names = ("af", "proto", "caddr", "vaddr", "laddr", "daddr", "cport", "vport", "lport", "dport", "connpool",
                 "refcnt", "flags", "state", "packet_xmit", "dest", "timeout")  # fmt: skip
        plain = {"af": 2, "proto": 6, "refcnt": 1, "flags": 0x1305, "state": 1, "packet_xmit": XMIT_FNAT,
                 "dest": 0x1234, "timeout": 90, "connpool": self.address}  # fmt: skip

        def put(part: npt.NDArray[np.uint8], at: int, values: npt.NDArray[np.uint64] | int, size: int) -> None:
            data = np.asarray(values, "<u8").reshape(-1, 1).view(np.uint8)[:, :size]
            part[:, at : at + size] = data

        entry, second = layout.offset("dp_vs_conn", "tuplehash"), layout.size("conn_tuple_hash")
        for page in range(self._pages):
            first = page * self._per_page
            count = min(self._per_page, self.slots - first)
            part = rows[page, :count]
            number = np.arange(first, first + count, dtype=np.uint64)
            header = (
                self.start + page * HUGE + np.arange(count, dtype=np.uint64) * np.uint64(STRIDE) + np.uint64(objhdr)
            )
            following = header + np.uint64(STRIDE)
            following[-1] = 0 if first + count == self.slots else self.start + (page + 1) * HUGE + objhdr
            put(part, objhdr + layout.offset("rte_mempool_objhdr", "next"), following, 8)
            put(part, objhdr + layout.offset("rte_mempool_objhdr", "mp"), self.address, 8)
            for name in names:
                offset, size = layout.field("dp_vs_conn", name)
                values = plain.get(name, number + np.uint64(1))
                put(part, HEADER + offset, values, min(size, 8))
            for at in (entry, entry + second):
                offset, size = layout.field("conn_tuple_hash", "af")
                put(part, HEADER + at + offset, 2, size)
            timer = layout.offset("dp_vs_conn", "timer") + layout.offset("dpvs_timer", "handler")
            put(part, HEADER + timer, 0x400100, 8)

    def _head(self, layout: Layout) -> None:
        def put(address: int, struct: str, name: str, value: int | bytes) -> None:
            offset, size = layout.field(struct, name)
            data = value if isinstance(value, bytes) else value.to_bytes(size, "little")
            at = address - self.address + self._skip + offset
            self._map[at : at + len(data)] = data

        objhdr = layout.size("rte_mempool_objhdr")
        for name, value in {
            "name": self.name.encode(), "size": self.slots, "populated_size": self.slots,
            "elt_size": layout.size("dp_vs_conn"), "header_size": HEADER,
            "trailer_size": STRIDE - HEADER - layout.size("dp_vs_conn"), "nb_mem_chunks": 1,
            "elt_list": (self.start + HEADER - objhdr).to_bytes(8, "little"),
            "mem_list": (self.address + 4096).to_bytes(8, "little"),
        }.items():  # fmt: skip
            put(self.address, "rte_mempool", name, value)
        for name, number in {"next": 0, "mp": self.address, "addr": self.start, "len": self._pages * HUGE}.items():
            put(self.address + 4096, "rte_mempool_memhdr", name, number)

    def change(self, pool: SessionPool, slots: npt.NDArray[np.int64], state: int) -> None:
        """Another state for these sessions."""
        at = (pool.address_of(slots) - np.uint64(self.address) + np.uint64(self._skip)).astype(np.int64)
        offset, _ = Layout.load(LAYOUT).field("dp_vs_conn", "state")
        np.frombuffer(self._map, np.uint8)[at + offset] = state

    def close(self) -> None:
        with suppress(BufferError):  # numpy may still hold a view; it goes with it
            self._map.close()


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def large(slots: int, rounds: int) -> bool:
    """A row of the table for so many slots; False if there is no memory for it."""
    if slots * (STRIDE + 400) > available_bytes() * 3 // 4:
        return False
    with tempfile.TemporaryDirectory() as directory:
        made = LargePool(slots)
        zones = OwnZones(Path(directory), [made])  # type: ignore[list-item]
        try:
            with own_target(Path(directory)) as target:
                began = time.thread_time_ns()
                with SessionPool.open(target, Layout.load(LAYOUT)) as pool:
                    opened = (time.thread_time_ns() - began) / MS
                    walker = Walker(pool)
                    first = walker.first()
                    assert walker.table.count == slots, (walker.table.count, slots)
                    quiet, longest = walker.quiet(rounds)
                    changed = []
                    for number in range(rounds):
                        some = np.random.default_rng(number).choice(slots, slots // 100, replace=False)
                        made.change(pool, some, 2 + number % 2)
                        changed.append(walker.walk())
                    table = walker.table.add_peer("b")
                    memory = size_of(walker.collector, walker.table, table, pool, pool._table) / slots
        finally:
            made.close()
            del zones
    print(f"| {slots} | {opened:.0f} | {first:.0f} | {quiet:.0f} | {1e6 * quiet / slots:.0f} |"
          f" {statistics.median(changed):.0f} | {longest:.2f} | {memory:.0f} |", flush=True)  # fmt: skip
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", type=int, default=1_000_000, metavar="SESSIONS", help="in a twin; 0: without")
    parser.add_argument("--slots", type=int, default=8_000_000, help="of the largest pool of our own; 0: none")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--turns", type=int, default=150, help="beside the worker, of each kind")
    parser.add_argument("--seconds", type=float, default=0.05, help="of each turn beside the worker")
    options = parser.parse_args(arguments)
    if options.live:
        live(options.live, options.rounds, options.turns, options.seconds)
    sizes = [options.slots >> shift for shift in (3, 2, 1, 0)] if options.slots else []
    if sizes:
        print("\n| slots, all live | opened, ms | first walk, ms | a walk, ms | ns a session | 1 % changed, ms |"
              " longest slice, ms | memory, bytes a session |\n" + "|---" * 8 + "|")  # fmt: skip
    for slots in sizes:
        if not large(slots, min(5, options.rounds)):
            print(f"\nno memory for {slots} slots: see how the others grow")
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
