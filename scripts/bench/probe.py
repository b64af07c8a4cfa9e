# SPDX-License-Identifier: GPL-2.0-or-later
"""What probes cost the thread they are on, and how fast their records become rows of a table.

A process of our own runs, in loops, one instruction of each kind that the kernel treats differently (as attach does to
try its probes), and calls a function that is probed where everybody would, on entry and on return: with an empty
program and with ours, by a perf event and by one link for all sites; "lean" is ours where no peer's sessions are in
this DPVS, so that none has to be told from its own. Each round goes through all of them, a millisecond each.
Printed are medians of the rounds, in nanoseconds of processor time of the probed thread, and ours against the empty
program as the median of the rounds' ratios.

A session's life is one hit of the create site and one of the free site, of the kinds that the given DPVS has (the stock
1.10.2 if none is given: two jumps behind two instructions that are single-stepped).

Then records: a process with the session functions fills the ring; it is emptied by bcc's callback, by our consumer into
an array, and by the collector into a table of sessions that are there. Best of the rounds, as processor time.
"""

import argparse
import mmap
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from collector.collector import Collector
from collector.table import SessionTable
from probes import loader
from probes.errors import DpvsProbeError
from probes.layout import Layout
from probes.loader import Probes
from probes.practice import Practice
from probes.ring import CREATE, Ring
from probes.sites import COST_NS, Kind, Site, classify, entry_block, session_sites
from probes.target import Image, Target
from probes.uprobe import MultiUprobe, Uprobe
from scripts.bench.ring import RECORD_BYTES, Subject, callback_reader, drained
from scripts.bench.table import XMIT, Pool

EMPTY = b"""
#include <uapi/linux/ptrace.h>
int empty(struct pt_regs *ctx) { return 0; }
int empty_multi(struct pt_regs *ctx) { return 0; }
"""
KINDS: tuple[Kind, ...] = tuple(COST_NS)
# DPVS 1.10.2, stock build: the sites of create and free, and what stands at the entry of these functions
STOCK: tuple[Kind, ...] = ("jump", "jump", "stepped", "stepped")
PROGRAMS = ("empty", "ours", "lean")
ROUND_NS = 1_000_000
RING_PAGES = 4096
GOAL_RATIO, GOAL_SESSION_NS, GOAL_RECORDS = 1.2, 2500, 5e6


class Way(NamedTuple):
    """One thing to measure, on a loop of its own: what it is called, and what is put where."""

    row: str
    column: str  # "no probe", or how and which program: "event empty", "link ours"
    kind: Kind
    on: str = "site"  # or "entry", "return" of the function that a call calls


def all_ways(has_link: bool) -> list[Way]:
    """What there is to measure, in the order of the table."""
    columns = [f"{how} {program}" for how in (("event", "link") if has_link else ("event",)) for program in PROGRAMS]
    ways = [Way(kind, column, kind) for kind in KINDS for column in ("no probe", *columns)]
    ways += [Way("function entry", column, "call", "entry") for column in ("no probe", *columns)]
    return ways + [Way("return probe", column, "call", "return") for column in ("no probe", *columns)]


Figures = dict[tuple[str, str], list[float]]


def hits(rounds: int) -> Figures:
    """Nanoseconds a time, each way once a round. All probes are on all the time, each on an instruction of its own."""
    sites = [Site(0, "push", "", "", "rdi"), Site(0, "push", "", "", "rdi")]
    with ExitStack() as stack:
        probes = stack.enter_context(Probes(cast(Target, None), Layout.load("1.10.2"), sites, RING_PAGES))
        lean = stack.enter_context(Probes(cast(Target, None), Layout.load("1.10.2"), sites, RING_PAGES))
        lean.drop_copies(False)
        rings = probes.ring(), lean.ring()
        empty = loader._compile([], source=EMPTY)
        stack.callback(loader._free, empty)
        sources = {
            "empty": (empty, b"empty", b"empty_multi"),
            "ours": (probes._bpf, b"session_create", b"session_either"),
            "lean": (lean._bpf, b"session_create", b"session_either"),
        }
        single = {name: loader._load(bpf, one) for name, (bpf, one, _) in sources.items()}
        multi = {name: loader._load_multi(bpf, many) for name, (bpf, _, many) in sources.items()}
        ways = all_ways(None not in multi.values())
        practice = stack.enter_context(Practice([(way.kind, "rdi") for way in ways]))
        for way, loop in zip(ways, practice.loops, strict=True):
            if way.column == "no probe":
                continue
            how, program = way.column.split()
            where, on_return = loop.site if way.on == "site" else loop.called, way.on == "return"
            if how == "link":
                fd = multi[program]
                assert fd is not None
                probe: Uprobe | MultiUprobe = MultiUprobe(
                    fd, practice.pid, practice.path, (where,), (CREATE,), on_return=on_return
                )
            else:
                probe = Uprobe(single[program], practice.pid, practice.path, where, on_return=on_return)
            stack.callback(probe.close)
        figures: Figures = {(way.row, way.column): [] for way in ways}
        for number in range(rounds + 1):
            for which, way in enumerate(ways):
                expected = 10 if way.column == "no probe" else COST_NS[way.kind]
                taken = practice.run(which, ROUND_NS // expected)
                if number:  # the first is to warm up
                    figures[way.row, way.column].append(taken)
            for ring in rings:
                while len(ring.drain(1 << 16)):
                    pass
    return figures


def show_hits(figures: Figures, kinds: Sequence[Kind], where: str) -> bool:
    """Print the table; whether the goals are met."""
    columns = list(dict.fromkeys(column for _, column in figures if column != "no probe"))
    rows = list(dict.fromkeys(row for row, _ in figures))

    def added(row: str, column: str) -> float | None:
        """Nanoseconds that the probe adds to a call."""
        if (row, column) not in figures:
            return None
        bare = figures[row, "no probe"]
        return statistics.median(a - b for a, b in zip(figures[row, column], bare, strict=True))

    def ratio(row: str, way: str, program: str = "ours") -> float | None:
        if (row, f"{way} {program}") not in figures:
            return None
        bare = figures[row, "no probe"]
        ours, empty = figures[row, f"{way} {program}"], figures[row, f"{way} empty"]
        return statistics.median((o - b) / (e - b) for o, e, b in zip(ours, empty, bare, strict=True))

    ways = list(dict.fromkeys(column.split()[0] for column in columns))
    titles = [*columns, *(f"{way} {program}/empty" for way in ways for program in PROGRAMS[1:])]
    print("nanoseconds that a hit adds\n")
    print("| instruction | " + " | ".join(titles) + " |")
    print("|---" * (len(titles) + 1) + "|")
    for row in rows:
        values = [added(row, column) for column in columns]
        cells = ["" if value is None else f"{value:.0f}" for value in values]
        cells += [
            "" if (r := ratio(row, way, program)) is None else f"{r:.2f}" for way in ways for program in PROGRAMS[1:]
        ]
        print(f"| {row} | " + " | ".join(cells) + " |")
    best = ways[-1]

    def life(kinds: Sequence[str], name: str) -> float:
        return sum(added(kind, f"{best} {name}") or 0 for kind in kinds)

    empty, ours, lean = (life(kinds[:2], program) for program in PROGRAMS)
    plain = life(kinds[2:], "ours")
    returns = life(("return probe",) * 2, "empty")
    share, leaner = (statistics.mean(ratio(kind, best, name) or 0 for kind in kinds[:2]) for name in PROGRAMS[1:])
    print(f"\na session's life in {where}, by one {best}, ns:")
    print(f"at {kinds[0]} and {kinds[1]}: empty {empty:.0f}, ours {ours:.0f}, lean {lean:.0f}")
    print(f"at the entries, {kinds[2]} and {kinds[3]}: ours {plain:.0f}; by return probes: empty {returns:.0f}")
    met = [
        ("ours / empty", share, GOAL_RATIO),
        ("lean / empty", leaner, GOAL_RATIO),
        ("a session's life, ns", ours, GOAL_SESSION_NS),
    ]
    good = True
    for name, value, goal in met:
        good = good and value < goal
        print(f"{name}: {value:.2f}, goal below {goal}: {'met' if value < goal else 'NOT met'}")
    return good


def records(events: int, rounds: int) -> bool:
    """Records a second: bcc's callback, ours into an array, ours into the table."""
    layout = Layout.load("1.10.2")
    pages = 1 << (events * RECORD_BYTES // mmap.PAGESIZE).bit_length()
    with ExitStack() as stack:
        subject = Subject(Path(stack.enter_context(tempfile.TemporaryDirectory())), layout, events)
        stack.callback(subject.process.communicate)
        stack.callback(subject.process.kill)
        target = stack.enter_context(Target.open(subject.process.pid))
        probes = stack.enter_context(Probes.attach(target, layout, session_sites(target.function), pages))
        ring = probes.ring()
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
        callback = drained(callback_reader(probes), subject, rounds)[1]
    print("\n| from the ring | ns a record | million/s |\n|---|---|---|")
    for name, cost in (("bcc's callback", callback), ("our array", array), ("our table", min(times))):
        print(f"| {name} | {cost:.0f} | {1e3 / cost:.2f} |")
    rate = 1e9 / min(times)
    print(f"\nring to table: {rate / 1e6:.2f} million/s, goal {GOAL_RECORDS / 1e6:.0f}: "
          f"{'met' if rate >= GOAL_RECORDS else 'NOT met'}")  # fmt: skip
    return rate >= GOAL_RECORDS


class Renamed:
    """Our ring, where each event is of the next session: the subject has one only."""

    def __init__(self, ring: Ring, sessions: int) -> None:
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
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--events", type=int, default=200_000, help="records a round")
    parser.add_argument("--dpvs", metavar="FILE", help="choose the sites of a session's life in this DPVS")
    options = parser.parse_args(arguments)
    kinds, where = (kinds_of(options.dpvs), options.dpvs) if options.dpvs else (STOCK, "stock DPVS 1.10.2")
    good = show_hits(hits(options.rounds), kinds, where)
    good = records(options.events, 5) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
