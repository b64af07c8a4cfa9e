# SPDX-License-Identifier: GPL-2.0-or-later
"""What probes cost the thread they are on, and how fast their records become rows of a table.

A process of our own runs, in loops, one instruction of each kind that the kernel treats differently (as attach does to
try its probes), and calls a function that is probed where everybody would, on entry and on return: with an empty
program, with one that puts the same event into the kernel's ring buffer, and with ours, by a perf event and by one
link. These three are on at the same time, on three loops that are alike, and take turns; nothing else is. A round goes
through all instructions, in another order each time. Printed are medians of the rounds, in nanoseconds of processor
time of the probed thread, and ours against the empty program as the median of the rounds' ratios.

A session's life is one hit of the create site and one of the free site, of the kinds that the given DPVS has (the stock
1.10.2 if none is given: two jumps behind two instructions that are single-stepped).

Then records: a process with the session functions makes sessions; what a program wrote into the kernel's ring buffer is
taken by bcc's callback, what ours wrote by our consumer into an array, and by the collector into a table of sessions
that are there. Best of the rounds, as processor time.
"""

import argparse
import mmap
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from collector.collector import Collector
from collector.table import SessionTable
from probes import loader
from probes.errors import DpvsProbeError
from probes.loader import Probes
from probes.practice import Practice
from probes.ring import CREATE, Ring, ThreadRings
from probes.sites import COST_NS, Kind, Site, classify, entry_block, session_sites
from probes.target import Image, Target
from probes.uprobe import MultiUprobe, Uprobe
from scripts.bench.ring import RECORD_BYTES, Subject, callback_reader, drained
from scripts.bench.table import XMIT, Pool

OTHERS = b"""
#include <uapi/linux/ptrace.h>
struct event { u64 conn; u64 time_ns; u32 tid; u32 kind; };
BPF_RINGBUF_OUTPUT(events, RING_PAGES);
int empty(struct pt_regs *ctx) { return 0; }
int empty_multi(struct pt_regs *ctx) { return 0; }
static inline int put(struct pt_regs *ctx, u32 kind)
{
    struct event *event = events.ringbuf_reserve(sizeof(*event));
    if (!event) return 0;
    event->conn = ctx->di;
    event->time_ns = bpf_ktime_get_ns();
    event->tid = (u32)bpf_get_current_pid_tgid();
    event->kind = kind;
    events.ringbuf_submit(event, BPF_RB_NO_WAKEUP);
    return 0;
}
int ringbuf(struct pt_regs *ctx) { return put(ctx, 1); }
int ringbuf_multi(struct pt_regs *ctx) { return put(ctx, (u32)bpf_get_attach_cookie(ctx)); }
"""
KINDS: tuple[Kind, ...] = tuple(COST_NS)
# DPVS 1.10.2, stock build: the sites of create and free, and what stands at the entry of these functions
STOCK: tuple[Kind, ...] = ("jump", "jump", "stepped", "stepped")
PROGRAMS = ("empty", "ring buffer", "ours")
KERNEL_PAGES = 4096
ROUND_NS, PARTS = 400_000, 9
GOAL_RATIO, GOAL_SESSION_NS, GOAL_RECORDS = 1.2, 2500, 5e6


class Way(NamedTuple):
    """Three things to measure, one for each program: what they are called, and what is put where."""

    row: str
    how: str  # a perf event or one link
    kind: Kind
    on: str = "site"  # or "entry", "return" of the function that a call calls


def all_ways(has_link: bool) -> list[Way]:
    """What there is to measure, in the order of the table."""
    return [
        Way(row, how, kind, on)
        for row, kind, on in (
            *((kind, kind, "site") for kind in KINDS),
            ("function entry", "call", "entry"),
            ("return probe", "call", "return"),
        )
        for how in (("event", "link") if has_link else ("event",))
    ]


Figures = dict[tuple[str, str], list[float]]  # (row, column): nanoseconds that a hit adds, one for each round


def hits(rounds: int) -> Figures:
    """Nanoseconds that a hit adds, each way once a round."""
    sites = [Site(0, "push", "", "", "rdi"), Site(0, "push", "", "", "rdi")]
    shuffled = random.Random(1)
    with ExitStack() as stack:
        probes = stack.enter_context(Probes(None, sites))
        ring = probes.ring()
        others = loader._compile([f"-DRING_PAGES={KERNEL_PAGES}"], source=OTHERS)
        stack.callback(loader._free, others)
        kernels = stack.enter_context(Ring.map(others[b"events"].map_fd, KERNEL_PAGES * mmap.PAGESIZE))
        sources = {
            "empty": (others, b"empty", b"empty_multi"),
            "ring buffer": (others, b"ringbuf", b"ringbuf_multi"),
            "ours": (probes._bpf, b"session_create", b"session_either"),
        }
        single = {name: loader._load(bpf, one) for name, (bpf, one, _) in sources.items()}
        multi = {name: loader._load_multi(bpf, many) for name, (bpf, _, many) in sources.items()}
        ways = all_ways(None not in multi.values())
        practice = stack.enter_context(Practice([(kind, "rdi") for kind in KINDS for _ in PROGRAMS]))

        def drain() -> None:
            for one in (ring, kernels):
                while len(one.drain(1 << 16)):
                    pass

        def put(way: Way, program: str, which: int) -> Uprobe | MultiUprobe:
            loop = practice.loops[which]
            where, on_return = loop.site if way.on == "site" else loop.called, way.on == "return"
            if way.how == "event":
                return Uprobe(single[program], practice.pid, practice.path, where, on_return=on_return)
            fd = multi[program]
            assert fd is not None
            return MultiUprobe(fd, practice.pid, practice.path, (where,), (CREATE,), on_return=on_return)

        figures: Figures = {(way.row, f"{way.how} {program}"): [] for way in ways for program in PROGRAMS}
        for number in range(rounds + 1):
            for way in shuffled.sample(ways, len(ways)):
                first, count = KINDS.index(way.kind) * len(PROGRAMS), ROUND_NS // COST_NS[way.kind]
                loops = dict(zip(shuffled.sample(PROGRAMS, len(PROGRAMS)), range(first, first + 3), strict=True))
                bare = {name: practice.run(which, ROUND_NS // 10) for name, which in loops.items()}
                taken: dict[str, list[float]] = {name: [] for name in loops}
                with ExitStack() as on:
                    for name, which in loops.items():
                        on.enter_context(put(way, name, which))
                        practice.run(which, 10)
                    for _ in range(PARTS):
                        drain()
                        for name, which in loops.items():
                            taken[name].append(practice.run(which, count))
                drain()
                for name, times in taken.items() if number else ():  # the first is to warm up
                    figures[way.row, f"{way.how} {name}"].append(statistics.median(times) - bare[name])
    return figures


def show_hits(figures: Figures, kinds: Sequence[Kind], where: str) -> bool:
    """Print the table; whether the goals are met."""
    columns = list(dict.fromkeys(column for _, column in figures))
    rows = list(dict.fromkeys(row for row, _ in figures))
    ways = list(dict.fromkeys(column.split()[0] for column in columns))

    def added(row: str, column: str) -> float:
        return statistics.median(figures[row, column])

    def ratio(row: str, way: str) -> float:
        """Ours against the empty program."""
        pairs = zip(figures[row, f"{way} ours"], figures[row, f"{way} empty"], strict=True)
        return statistics.median(ours / empty for ours, empty in pairs)

    titles = [*columns, *(f"{way} ours/empty" for way in ways)]
    print("nanoseconds that a hit adds\n")
    print("| instruction | " + " | ".join(titles) + " |")
    print("|---" * (len(titles) + 1) + "|")
    for row in rows:
        cells = [f"{added(row, column):.0f}" for column in columns] + [f"{ratio(row, way):.2f}" for way in ways]
        print(f"| {row} | " + " | ".join(cells) + " |")
    best = ways[-1]

    def life(kinds: Sequence[str], name: str) -> float:
        return sum(added(kind, f"{best} {name}") for kind in kinds)

    empty, others, ours = (life(kinds[:2], program) for program in PROGRAMS)
    plain = life(kinds[2:], "ours")
    returns = life(("return probe",) * 2, "empty")
    share = statistics.mean(ratio(kind, best) for kind in kinds[:2])
    print(f"\na session's life in {where}, by one {best}, ns:")
    print(
        f"at {kinds[0]} and {kinds[1]}: empty {empty:.0f}, with the kernel's ring buffer {others:.0f}, ours {ours:.0f}"
    )
    print(f"at the entries, {kinds[2]} and {kinds[3]}: ours {plain:.0f}; by return probes: empty {returns:.0f}")
    good = True
    for name, value, goal in (("ours / empty", share, GOAL_RATIO), ("a session's life, ns", ours, GOAL_SESSION_NS)):
        good = good and value < goal
        print(f"{name}: {value:.2f}, goal below {goal}: {'met' if value < goal else 'NOT met'}")
    return good


def records(events: int, rounds: int) -> bool:
    """Records a second: bcc's callback, ours into an array, ours into the table."""
    pages = 1 << (events * RECORD_BYTES // mmap.PAGESIZE).bit_length()
    with ExitStack() as stack:
        subject = Subject(Path(stack.enter_context(tempfile.TemporaryDirectory())), events)
        stack.callback(subject.process.communicate)
        stack.callback(subject.process.kill)
        target = stack.enter_context(Target.open(subject.process.pid))
        sites = session_sites(target.function)
        callback = by_callback(subject, target, sites[0], pages, rounds)
        probes = stack.enter_context(Probes.attach(target, sites, pages))
        ring = probes.ring()
        subject.create()
        while len(ring.drain()):  # its thread has a ring of its own from now on
            pass
        array = drained(lambda: len(ring.drain(1 << 15)), subject, rounds)[1]
        pool = Pool(events)
        table = SessionTable(events)
        collector = Collector(pool, Renamed(ring, events), table, modes={XMIT: 3}, workers={})
        collector.scan_all(1)
        times = []
        for number in range(rounds):
            subject.create()
            before, began = collector.counters["events"], time.process_time_ns()
            while collector.counters["events"] < before + events:
                collector.tick(10**18 + number)
            times.append((time.process_time_ns() - began) / events)
    print("\n| from the ring | ns a record | million/s |\n|---|---|---|")
    for name, cost in (("bcc's callback", callback), ("our array", array), ("our table", min(times))):
        print(f"| {name} | {cost:.0f} | {1e3 / cost:.2f} |")
    rate = 1e9 / min(times)
    print(f"\nring to table: {rate / 1e6:.2f} million/s, goal {GOAL_RECORDS / 1e6:.0f}: "
          f"{'met' if rate >= GOAL_RECORDS else 'NOT met'}")  # fmt: skip
    return rate >= GOAL_RECORDS


def by_callback(subject: Subject, target: Target, site: Site, pages: int, rounds: int) -> float:
    """bcc's way: the kernel's ring buffer, and a Python call for each record; nanoseconds a record."""
    bpf = loader._compile([f"-DRING_PAGES={pages}"], source=OTHERS)
    try:
        with Uprobe(loader._load(bpf, b"ringbuf"), target.pid, target.exe_path, target.file_offset(site.address)):
            return drained(callback_reader(bpf), subject, rounds)[1]
    finally:
        loader._free(bpf)


class Renamed:
    """Our rings, where each event is of the next session: the subject has one only."""

    def __init__(self, ring: ThreadRings, sessions: int) -> None:
        self._ring, self._sessions, self._next = ring, sessions, 0

    def drain(self, maximum: int) -> npt.NDArray[np.void]:
        events = self._ring.drain(maximum)
        numbers = (self._next + np.arange(len(events), dtype=np.uint64)) % np.uint64(self._sessions)
        events["conn"] = numbers * np.uint64(704)
        self._next = (self._next + len(events)) % self._sessions
        return events


def kinds_of(binary: str) -> tuple[Kind, ...]:
    """Kinds of the sites that attach would choose in a DPVS, and of the entries of these functions."""
    image = Image(binary)

    def function(name: str) -> tuple[int, bytes]:
        symbol = image.symbol(name)
        if symbol is None:
            raise DpvsProbeError(f"{binary} has no {name}()")
        return symbol.value, image.code(symbol.value, symbol.size or 512)

    sites = session_sites(function)
    entries = [_first(*function(site.function)) for site in sites]
    for site in sites:
        print(f"{site.function}: {site.mnemonic} ({site.why})")
    return (*(site.kind for site in sites), *(classify(entry) for entry in entries))


def _first(address: int, code: bytes) -> bytes:
    return bytes(entry_block(code, address)[0][0].bytes)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--events", type=int, default=200_000, help="records a round")
    parser.add_argument("--dpvs", metavar="FILE", help="choose the sites of a session's life in this DPVS")
    options = parser.parse_args(arguments)
    kinds, where = (kinds_of(options.dpvs), options.dpvs) if options.dpvs else (STOCK, "stock DPVS 1.10.2")
    good = show_hits(hits(options.rounds), kinds, where)
    good = records(options.events, 5) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
