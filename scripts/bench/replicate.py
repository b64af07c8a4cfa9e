# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast one node's sessions are in another node's table: two processes of this machine, one processor each.

Measured, as medians of several rounds:
  - a full sync, from the moment the peer is dialled (so the handshake of TLS counts) to its acknowledgement of the end;
  - what changed while the link was down, 1 % of a million, from dialling again to the last acknowledgement;
  - changes a second that go on and on, from the table of one to the table of the other;
  - from the event to the peer's table, by a whole node with collector and loop, at several rates;
  - bytes on the wire and in memory for a session, with LZ4 and without.

Beside that stand the goals, what a published article claims for DPVS, and a real conntrackd on this machine: as root,
when it is installed (--install does that). As root everything runs with real-time priority, which conntrackd's manual
asks for. Figures of a machine that is shared say little by themselves; ratios say more.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from collector.table import SessionTable
from replicator import keys
from replicator.link import LinkSettings, Sender

from . import conntrackd
from .nodes import Link, Peer, Schedule, Way, full_table, node_of, pinned, receiver, sender_of
from .table import size_of

MEASURES = ("sync", "sustained", "latency", "conntrackd")
WAYS = ("tcp+tls", "tcp", "shm+tls", "shm")
MILLION = 1_000_000
RATES = (100, 10_000, 100_000)
SECONDS_AT_A_RATE = 3.0
CONNTRACKD_A_SECOND = 100_000
PATIENCE_S = 60.0


@dataclass
class Row:
    """One figure: its medians by column, and what stands beside them."""

    what: str
    unit: str
    goal: str = ""
    published: str = ""
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, column: str, figure: float) -> None:
        self.rounds.setdefault(column, []).append(figure)

    def median(self, column: str) -> float | None:
        figures = self.rounds.get(column)
        return statistics.median(figures) if figures else None


class Report:
    """All rows, in the order in which they are shown."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def row(self, what: str, unit: str, goal: str = "", published: str = "") -> Row:
        return self.rows.setdefault(what, Row(what, unit, goal, published))


# --- measures --------------------------------------------------------------------------------------------------------


async def until(done: Callable[[], bool], pause_s: float = 0.0005) -> None:
    """Look again and again; a measure that does not end is an error."""
    async with asyncio.timeout(PATIENCE_S):
        while not done():
            await asyncio.sleep(pause_s)


async def linked(link: Link, work: Callable[[], Awaitable[None]]) -> None:
    """Do something while a link is served."""
    serving = asyncio.create_task(link.run())
    try:
        await work()
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


def check(answer: dict[str, Any], table: SessionTable) -> None:
    """Figures of what did not arrive as it was are none."""
    if answer["digest"] != table.digest():
        sys.exit(f"the peer has {answer['count']} sessions of {len(table)}, and not the same")


@dataclass(frozen=True)
class Column:
    """Where the figures of one way belong."""

    report: Report
    name: str
    way: Way

    def add(self, what: str, unit: str, figure: float) -> None:
        self.report.row(what, unit).add(self.name, figure)


def syncs(column: Column, table: SessionTable, *, largest: bool) -> None:
    """A full sync; of the largest table also what it costs, and what changed while the link was down."""
    n, way = table.count, column.way
    with receiver(way) as peer, pinned():
        sender = sender_of(table, way.settings)
        link = Link(way, peer, sender)
        theirs_ns, own_ns, began = peer.ask()["cpu_ns"], time.process_time_ns(), time.perf_counter()

        async def full() -> None:
            await asyncio.wait_for(link.synced.wait(), PATIENCE_S)
            column.add(f"full sync of {n}", "s", time.perf_counter() - began)
            if largest:
                column.add("full sync, processor, sender", "ns each", (time.process_time_ns() - own_ns) / n)
                column.add("on the wire", "bytes each", link.on_the_wire() / n)

        asyncio.run(linked(link, full))
        answer = peer.ask(thorough=True)
        check(answer, table)
        if largest:
            column.add("full sync, processor, receiver", "ns each", (answer["cpu_ns"] - theirs_ns) / n)
            column.add("memory, receiver", "bytes each", answer["rss"] / n)
            column.add("memory, sender", "bytes each", size_of(table, sender, sender._dirty) / n)
            again(column, table, peer, sender)


def again(column: Column, table: SessionTable, peer: Peer, sender: Sender) -> None:
    """1 % changed, and the link comes back."""
    n, changed = table.count, table.count // 100
    slots = np.random.default_rng(2).choice(n, changed, replace=False)
    records = table.rows(slots)
    records["fnat_delta"] += 1
    table.apply(slots, records, np.ones(changed, np.bool_), time.monotonic_ns())
    link = Link(column.way, peer, sender)
    began = time.perf_counter()

    async def rest() -> None:
        await until(lambda: sender.settled)
        column.add(f"incremental, {changed} of {n}", "s", time.perf_counter() - began)

    asyncio.run(linked(link, rest))
    if sender.counters["full_syncs"] != 1:
        sys.exit("the second sync was a full one as well")
    check(peer.ask(thorough=True), table)


def sustained(column: Column, table: SessionTable, seconds: float) -> None:
    """As many changes of random sessions as get through, with one processor on each side."""
    n, block = table.count, 2048
    rng = np.random.default_rng(3)
    prepared = []
    for _ in range(64):
        slots = rng.choice(n, block, replace=False)
        prepared.append((slots, table.rows(slots)))
    valid = np.ones(block, np.bool_)
    with receiver(column.way) as peer, pinned():
        sender = sender_of(table, column.way.settings)
        link = Link(column.way, peer, sender)

        async def work() -> None:
            await asyncio.wait_for(link.synced.wait(), PATIENCE_S)
            await until(lambda: sender.settled)
            told = sender.counters["acknowledged"]
            theirs_ns, own_ns = peer.ask()["cpu_ns"], time.process_time_ns()
            began, apply_ns = time.perf_counter(), 0
            for slots, records in itertools.cycle(prepared):
                if time.perf_counter() - began > seconds:
                    break
                records["fnat_delta"] += 1
                at = time.process_time_ns()
                table.apply(slots, records, valid, time.monotonic_ns())
                apply_ns += time.process_time_ns() - at
                link.poke()
                await asyncio.sleep(0)
                while sender.pending > 8 * block:  # what is not told yet would be told once instead of twice
                    await asyncio.sleep(0)
            await until(lambda: sender.settled, 0)
            took, own_ns = time.perf_counter() - began, time.process_time_ns() - own_ns
            count = sender.counters["acknowledged"] - told
            column.add("sustained changes", "a second", count / took)
            column.add("sustained, processor, own table", "ns each", apply_ns / count)
            column.add("sustained, processor, sender", "ns each", (own_ns - apply_ns) / count)
            column.add("sustained, processor, receiver", "ns each", (peer.ask()["cpu_ns"] - theirs_ns) / count)

        asyncio.run(linked(link, work))
        check(peer.ask(thorough=True), table)


def latencies(column: Column, slots: int, seconds: float, seed: int) -> None:
    """From the event, and from its mark in our own table, to the peer's table."""
    with receiver(column.way, timed=True) as peer, pinned():
        pool = Schedule(slots, slots // 3)
        node, link, table = node_of(pool, column.way, peer)

        async def work() -> None:
            running = asyncio.create_task(node.run())
            await until(lambda: link.sender.settled and link.sender.peer is not None, 0.01)
            pool.settle()
            await until(lambda: len(table) == pool.standing and link.sender.settled, 0.01)
            peer.ask()
            for rate in RATES:
                own_ns, began = time.process_time_ns(), time.perf_counter()
                made = pool.plan(rate, int(rate * seconds), seed)
                await until(lambda: not pool.left and link.sender.settled, 0.02)
                share = (time.process_time_ns() - own_ns) / 1e9 / (time.perf_counter() - began)
                there_ns = peer.ask()["put_ns"][made]
                if not there_ns.all():
                    sys.exit(f"{np.count_nonzero(there_ns == 0)} of {len(made)} sessions did not arrive")
                for what, since_ns in (("event", pool.event_ns), ("own table", table.marked_ns)):
                    for percent in (50, 99):
                        wait = np.percentile(there_ns - since_ns[made], percent) / 1e6
                        column.add(f"{what} to peer's table, {rate}/s, p{percent}", "ms", float(wait))
                column.add(f"event to peer's table, {rate}/s, processor, sender", "share", share)
            node.stop()
            await running

        asyncio.run(work())


# --- all of it -------------------------------------------------------------------------------------------------------


def goals(report: Report, sizes: list[int]) -> None:
    """The rows that somebody promised something of, in order."""
    published = {100_000: ("0.1", "2.1"), MILLION: ("1.0", "18.7")}
    for n in sizes:
        report.row(f"full sync of {n}", "s", *published.get(n, ("", "")))
    largest = sizes[-1]
    report.row(
        f"incremental, {largest // 100} of {largest}", "s", *(("0.1", "1.2") if largest == MILLION else ("", ""))
    )
    report.row("sustained changes", "a second", "1000000")
    for rate in RATES:
        p50, p99 = {10_000: ("0.4", "1.5"), 100_000: ("", "5")}.get(rate, ("", ""))
        report.row(f"event to peer's table, {rate}/s, p50", "ms", p50, "0.015")
        report.row(f"event to peer's table, {rate}/s, p99", "ms", p99)
        for percent in (50, 99):
            report.row(f"own table to peer's table, {rate}/s, p{percent}", "ms")
    report.row("on the wire", "bytes each")
    for side in ("sender", "receiver"):
        report.row(f"memory, {side}", "bytes each", "200")


def ours(report: Report, options: argparse.Namespace, directory: Path) -> None:
    """All measures of our own, through the ways in turn, so that a busy moment hits them alike."""
    columns = [Column(report, name, Way(name, directory)) for name in options.ways]
    first = options.ways[0]
    lz4 = [Column(report, f"{first} lz4 {how}", Way(first, directory, LinkSettings(compress=on)))
           for how, on in (("off", False), ("on", True))]  # fmt: skip
    tables = [full_table(n) for n in options.sizes]
    for seed, column in itertools.product(range(options.rounds), columns + lz4):
        for table in tables:
            if "sync" in options.only:
                syncs(column, table, largest=table is tables[-1])
        if "sustained" in options.only:
            sustained(column, tables[-1], options.seconds)
        for table in tables:
            for key in list(table._peers):
                table.remove_peer(key)
        if "latency" in options.only and column in columns:
            latencies(column, options.slots, options.seconds, seed)


def theirs(report: Report, options: argparse.Namespace) -> str:
    """The same of conntrackd; why not, if not."""
    try:
        conntrackd.require(install=options.install)
        for _ in range(options.rounds):
            measured: list[conntrackd.Figures] = []
            with tempfile.TemporaryDirectory(prefix="dpvs-probe-bench.") as made:
                directory = Path(made)
                for n in options.sizes if "sync" in options.only else []:
                    measured.append(conntrackd.syncs(n, directory, partial=n == options.sizes[-1]))
                if "sustained" in options.only:
                    measured.append(conntrackd.sustained(int(options.seconds * CONNTRACKD_A_SECOND), directory))
                if "latency" in options.only:
                    measured += [conntrackd.latencies(rate, options.seconds, directory) for rate in RATES]
            for what, number in (item for figures in measured for item in figures.items()):
                report.row(what, conntrackd.UNITS.get(what.rpartition(", ")[2], "")).add("conntrackd", number)
    except conntrackd.Unavailable as error:
        return f"no figures of conntrackd: {error}"
    return ""


def show(report: Report) -> None:
    """A line for each row."""
    columns = list(dict.fromkeys(column for row in report.rows.values() for column in row.rounds))
    print(f"{'':50}{'':>11}" + "".join(f"{column:>18}" for column in columns) + f"{'goal':>10}{'published':>11}")
    for row in report.rows.values():
        if row.rounds:
            cells = "".join(f"{figure(row.median(column)):>18}" for column in columns)
            print(f"{row.what:50}{row.unit:>11}{cells}{row.goal:>10}{row.published:>11}")


def figure(number: float | None) -> str:
    """Three digits that count."""
    if number is None:
        return ""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of little")
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, MILLION], help="sessions of a full sync")
    parser.add_argument("--slots", type=int, default=MILLION, help="of the pool whose latencies are measured")
    parser.add_argument("--seconds", type=float, default=SECONDS_AT_A_RATE, help="of each measure that goes on and on")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--install", action="store_true", help="install conntrackd by apt if it is not there")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.sizes, options.slots, options.seconds = 1, [100_000], 200_000, 1.0
    report = Report()
    goals(report, options.sizes)
    with tempfile.TemporaryDirectory(prefix="dpvs-probe-bench.") as made:
        directory = Path(made)
        keys.init_authority(directory / "authority", "bench")
        for node in ("dialer", "listener"):
            keys.issue(directory / "authority", node, directory / node)
        ours(report, options, directory)
    note = theirs(report, options) if "conntrackd" in options.only else ""
    if options.json:
        print(json.dumps({"note": note, "rows": [vars(row) for row in report.rows.values() if row.rounds]}))
    else:
        print(f"medians of {options.rounds} rounds, {os.cpu_count()} processors, kernel {os.uname().release}")
        show(report)
        print(note, end="\n" if note else "")


if __name__ == "__main__":
    main()
