# SPDX-License-Identifier: GPL-2.0-or-later
"""Table and codec by themselves: medians of several runs, in processor time of this one process.

Printed: nanoseconds an item and items a second. Processor time, so that other work on the machine disturbs little;
caches are shared all the same, so look twice on a busy machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from collector import record
from collector.collector import Collector
from collector.conns import from_conns
from collector.record import Bools, Records, Slots
from collector.table import SessionTable
from probes.mapping import Prints, folded
from replicator import codec
from replicator.link import LinkSettings, Receiver, Sender, Synced
from replicator.replica import Replicas
from replicator.wire import FrameReader, Hello, Opcode, Role

CONN = np.dtype(
    [
        ("af", "<u4"), ("af_out", "<u4"), ("packet_xmit", "<u8"), ("state", "<u2"), ("flags", "<u2"),
        ("caddr", "16u1"), ("vaddr", "16u1"), ("laddr", "16u1"), ("daddr", "16u1"),
        ("cport", ">u2"), ("vport", ">u2"), ("lport", ">u2"), ("dport", ">u2"), ("timeout_s", "<u8"),
        *((f"{name}_{part}", "<u4") for name in ("fnat_seq", "syn_proxy_seq")
          for part in ("isn", "delta", "fdata_seq", "prev_delta")),
        ("rs_end_seq", "<u4"), ("rs_end_ack", "<u4"), ("proto", "u1"), ("wscale_vs", "u1"), ("wscale_rs", "u1"),
        ("pp_version", "u1"), ("pp_sent", "u1"),
    ],
    align=True,
)  # fmt: skip
EVENT = np.dtype([("conn", "<u8"), ("time_ns", "<u8"), ("tid", "<u4"), ("kind", "<u4")])
XMIT, STRIDE = 1, 704
_STRIDE = np.uint64(STRIDE)


class Pool:
    """A session pool in this process's memory, and a ring that hands out prepared events."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.conns = np.zeros(slots, CONN)
        numbers = np.arange(slots)
        self.conns["af"] = self.conns["af_out"] = record.AF_INET
        self.conns["proto"], self.conns["packet_xmit"] = record.TCP, XMIT
        self.conns["state"], self.conns["flags"] = record.ESTABLISHED, record.HASHED
        for byte in range(3):
            self.conns["caddr"][:, 1 + byte] = numbers >> (8 * byte) & 0xFF
        self.conns["cport"], self.conns["fnat_seq_delta"] = numbers & 0xFFFF, numbers * 7
        self.conns["timeout_s"] = 90
        self._rows = self.conns.view(f"V{CONN.itemsize}")
        self._whole = np.ones(slots, np.bool_)
        self._events = np.zeros(0, EVENT)
        self.behind = False

    def slot_of(self, addresses: npt.NDArray[np.uint64]) -> Slots:
        return (addresses // _STRIDE).view(np.int64)

    def read(self, slots: Slots) -> tuple[Records, Bools]:
        return self._rows.take(slots).view(CONN), self._whole[: len(slots)]

    def scan_prints(self, first: int, last: int) -> Prints:
        part = self.conns[first:last]
        hot = np.empty((len(part), 4), np.uint64)
        hot[:, 0], hot[:, 1] = part["cport"], part["fnat_seq_delta"]
        hot[:, 2], hot[:, 3] = part["state"], part["flags"]
        return folded(hot)

    def live(self, slots: Slots) -> Bools:
        return np.asarray((self.conns["flags"][slots] & record.HASHED) != 0)

    def announce(self, slots: Slots, time_ns: int | npt.NDArray[np.int64]) -> None:
        self._events = np.zeros(len(slots), EVENT)
        self._events["conn"] = slots * STRIDE
        self._events["time_ns"], self._events["tid"], self._events["kind"] = time_ns, 7, 1

    def drain(self, maximum: int) -> Records:
        taken, self._events = self._events[:maximum], self._events[maximum:]
        return taken


class Report:
    """Collects processor time by name, over several runs."""

    def __init__(self) -> None:
        self.runs: dict[str, list[float]] = {}
        self.bytes: dict[str, float] = {}  # a session

    @contextmanager
    def timed(self, name: str, items: int) -> Iterator[None]:
        began = time.process_time_ns()
        yield
        self.add(name, (time.process_time_ns() - began) / items)

    def add(self, name: str, ns_an_item: float) -> None:
        self.runs.setdefault(name, []).append(ns_an_item)

    def show(self) -> None:
        for name, figures in self.runs.items():
            median = statistics.median(figures)
            print(f"{name:58} {median:8.0f} ns {1000 / median:8.2f} million/s   (best {min(figures):.0f} ns)")
        for name, figure in self.bytes.items():
            print(f"{name:58} {figure:8.0f} bytes a session")


def sessions(n: int) -> Records:
    pool = Pool(n)
    return from_conns(pool.conns, np.arange(n), {XMIT: record.FNAT})


def bench_collector(report: Report, n: int) -> None:
    pool = Pool(n)
    table = SessionTable(n)
    table.add_peer("b")
    collector = Collector(pool, pool, table, modes={XMIT: record.FNAT}, workers={7: 1})
    order = np.random.default_rng(1).permutation(n)
    pool.announce(order, 10)
    with report.timed(f"ring to table, {n} created", n):
        while collector.tick(20) and table.count < n:
            pass
    collector.scan_all(30)
    collector.scan(40)
    looks = collector.settings.slice_least
    now, passes = 50, collector.counters["scan_passes"]
    with report.timed(f"scan, {n} sessions, none changed", 8 * n):
        while collector.counters["scan_passes"] < passes + 8:
            now += collector.settings.pass_large_ns * looks // n + 1
            collector.scan(now)
    report.bytes["memory, collector"] = size_of(collector) / n
    collector.scan_soon()
    with report.timed(f"full scan, {n} sessions, none changed", n):
        while collector._hurry:
            collector.scan(now)


def bench_table(report: Report, n: int, block: int) -> None:
    table = SessionTable(n)
    dirty = table.add_peer("b")
    records = sessions(n)
    slots = np.arange(n)
    valid = np.ones(n, np.bool_)

    def apply(valid: Bools) -> None:
        for start in range(0, n, block):
            part = slice(start, start + block)
            table.apply(slots[part], records[part], valid[part], 1)

    for name, state in (("created", record.SYN_RECV), ("unchanged", record.SYN_RECV), ("updated", record.ESTABLISHED)):
        records["state"] = state
        with report.timed(f"table, {n} {name}, {block} at a time", n):
            apply(valid)
        dirty.clear()
    with report.timed(f"table, {n} ended, {block} at a time", n):
        apply(~valid)


def bench_codec(report: Report, n: int) -> None:
    records = sessions(n)
    records["generation"] = 1
    for compress in (False, True):
        how = "LZ4" if compress else "plain"
        frames = []
        with report.timed(f"encode, {how}", n):
            for part in codec.batches(codec.IPV4, n, 64 << 10):
                frames.append(codec.pack_records(Opcode.CREATE, 1, records[part], codec.IPV4, compress=compress))
        reader = FrameReader()
        with report.timed(f"decode, {how}", n):
            for data in frames:
                reader.feed(data)
                frame = reader.next()
                assert frame is not None
                codec.parse_records(frame.body, n)
        size = sum(map(len, frames))
        report.bytes[f"on the wire, {how}"] = size / n


class Clocked:
    """Two engines hand in hand, each one's processor time counted."""

    def __init__(self, table: SessionTable, *, compress: bool) -> None:
        settings = LinkSettings(compress=compress)
        self.now_ns = 10**12
        self.replicas = Replicas(Hello("b", 1, Role.RECEIVER))
        self.sender = Sender(table, table.add_peer("b"), Hello("a", 1, slots=table.slots), settings)
        self.receiver = Receiver(self.replicas, settings, now_ns=self.now_ns)
        self.sender.connected(self.now_ns)
        self.sent_ns = self.received_ns = 0

    def exchange(self) -> None:
        self.now_ns += 100_000
        began = time.process_time_ns()
        down = self.sender.outgoing(self.now_ns)
        sent = time.process_time_ns()
        for data in down:
            self.receiver.receive(data, self.now_ns)
        up = self.receiver.outgoing(self.now_ns)
        received = time.process_time_ns()
        for data in up:
            self.sender.receive(data, self.now_ns)
        self.sent_ns += sent - began + time.process_time_ns() - received
        self.received_ns += received - sent

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.exchange()


def bench_link(report: Report, n: int, *, compress: bool) -> None:
    how = "LZ4" if compress else "plain"
    table = SessionTable(n)
    table.complete = True
    records = sessions(n)
    slots, valid = np.arange(n), np.ones(n, np.bool_)
    table.apply(slots, records, valid, 1)
    link = Clocked(table, compress=compress)
    link.until(lambda: any(isinstance(e, Synced) for e in iter(link.sender.next_event, None)))
    report.add(f"full sync of {n}, {how}, sender", link.sent_ns / n)
    report.add(f"full sync of {n}, {how}, receiver", link.received_ns / n)
    link.sent_ns = link.received_ns = 0
    rng, block, applied_ns = np.random.default_rng(1), 1000, 0
    changes = min(n, 200_000) // block * block
    for _ in range(changes // block):
        chosen = rng.choice(n, block, replace=False)
        changed = record.pick(records, chosen)
        changed["fnat_delta"] += 1
        records["fnat_delta"][chosen] += 1
        began = time.process_time_ns()
        table.apply(chosen, changed, valid[:block], link.now_ns)
        applied_ns += time.process_time_ns() - began
        link.exchange()
    link.until(lambda: link.sender.settled)
    report.add(f"{block} random changes of {n} at a time, {how}, table", applied_ns / changes)
    report.add(f"{block} random changes of {n} at a time, {how}, sender", link.sent_ns / changes)
    report.add(f"{block} random changes of {n} at a time, {how}, receiver", link.received_ns / changes)
    (replica,) = link.replicas
    assert replica.digest() == table.digest()
    report.bytes["memory, table and one sender"] = size_of(table, link.sender, table.add_peer("b")) / n
    report.bytes["memory, replica"] = size_of(replica, replica.pending) / n


def size_of(*things: object) -> int:
    """Bytes of all arrays that some objects own."""
    arrays = {
        id(a): a for thing in things for a in vars(thing).values() if isinstance(a, np.ndarray) and a.base is None
    }
    return sum(array.nbytes for array in arrays.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    report = Report()
    for _ in range(options.runs):
        bench_codec(report, 100_000)
        for n in options.sessions:
            bench_collector(report, n)
            bench_table(report, n, 1000)
            bench_table(report, n, n)
            bench_link(report, n, compress=False)
        bench_link(report, options.sessions[0], compress=True)
    report.show()


if __name__ == "__main__":
    main()
