# SPDX-License-Identifier: GPL-2.0-or-later
"""Two nodes without DPVS for the benchmarks: the sender in this process, the receiver in one of its own.

Both are made of the project's own parts: tables, engines, links, transports, and for latencies the collector and the
loop of a whole node. Only the session pool and the ring are stand-ins, in this process's memory. Each process is held
on one processor.
"""

import asyncio
import itertools
import logging
import multiprocessing
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from collector import record
from collector.collector import Collector
from collector.record import Records, Slots
from collector.table import Applied, SessionTable
from replicator.link import Event, LinkSettings, Receiver, Sender, Synced
from replicator.links import Links, Outbound
from replicator.node import Node, Parts
from replicator.replica import Replica, Replicas
from replicator.seal import Party
from replicator.transport.choose import Mode, Transport, parse
from replicator.transport.interface import Connection
from replicator.transport.tls import Tls
from replicator.wire import Hello, Role

from .table import XMIT, Pool, size_of

CPUS = sorted(os.sched_getaffinity(0))
SENDER_CPU, RECEIVER_CPU = CPUS[0], CPUS[-1]
MAX_SLOTS = 1 << 20
REALTIME = 10  # priority
PAGE = os.sysconf("SC_PAGE_SIZE")
_TCP_INFO_BYTES_ACKED = 120  # linux/tcp.h, struct tcp_info
Times = npt.NDArray[np.int64]
_epochs = itertools.count(1)


@dataclass(frozen=True)
class Way:
    """How the two nodes talk."""

    name: str  # tcp, tcp+tls, shm, shm+tls
    directory: Path = field(repr=False)  # of the nodes' keys
    settings: LinkSettings = field(default_factory=LinkSettings)

    @property
    def mode(self) -> Mode:
        return Mode(self.name.partition("+")[0])

    def end(self, node: str) -> Transport:
        """The transport of one node."""
        if "+" not in self.name:
            return Transport(self.mode)
        return Transport(self.mode, Tls.load(self.directory / node), Party(node, 1))


def realistic(n: int, seed: int = 1) -> Records:
    """n established FullNAT sessions of clients all over the world: what is random in life is random here."""
    rng = np.random.default_rng(seed)
    records = np.zeros(n, record.RECORD)
    records["slot"] = np.arange(n)
    records["af"] = records["af_out"] = record.AF_INET
    records["proto"], records["fwdmode"] = record.TCP, record.FNAT
    records["state"], records["flags"] = record.ESTABLISHED, record.HASHED | record.IN_TIMER
    records["caddr"][:, :4] = rng.integers(0, 256, (n, 4))
    for name, network, hosts in (("vaddr", 203, 16), ("laddr", 10, 32), ("daddr", 192, 200)):
        records[name][:, 0], records[name][:, 3] = network, rng.integers(1, hosts, n)
    records["cport"], records["lport"] = rng.integers(1024, 65536, (2, n))
    records["vport"], records["dport"] = rng.choice((80, 443), n), 8080
    records["timeout_ms"], records["worker"] = 90_000, rng.integers(0, 8, n)
    for name in ("fnat_isn", "fnat_delta", "fnat_fdata_seq", "rs_end_seq", "rs_end_ack"):
        records[name] = rng.integers(0, 1 << 32, n)
    return records


def full_table(n: int) -> SessionTable:
    """A table in which n sessions were found."""
    table = SessionTable(n)
    table.apply(np.arange(n), realistic(n), np.ones(n, np.bool_), time.monotonic_ns())
    table.complete = True
    return table


def rss() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


# --- the receiver ----------------------------------------------------------------------------------------------------


def receive(way: Way, address: str, pipe: Pipe, timed: bool) -> None:
    """The receiver's process: listens, and answers each question in the pipe with what it has."""
    logging.disable()
    hold(RECEIVER_CPU)
    asyncio.run(_receive(way, address, pipe, timed))


async def _receive(way: Way, address: str, pipe: Pipe, timed: bool) -> None:
    put_ns = _time_puts() if timed else None
    listener = way.end("listener").listener(parse(way.mode, address, listen=True))
    await listener.start()
    replicas = Replicas(Hello("listener", 1, Role.RECEIVER))
    links = Links(
        [],
        replicas,
        listener=listener,
        make_receiver=lambda: Receiver(replicas, way.settings, now_ns=time.monotonic_ns()),
    )
    before = rss()

    def answer() -> None:
        thorough: bool = pipe.recv()
        replica = next(iter(replicas), None)
        pipe.send(
            {
                "cpu_ns": time.process_time_ns(),
                "count": replica.count if replica else 0,
                "digest": replica.digest() if replica and thorough else 0,
                "rss": rss() - before,
                "arrays": size_of(replica, replica.pending) if replica else 0,
                "put_ns": put_ns,
            }
        )
        if put_ns is not None:
            put_ns[:] = 0

    asyncio.get_running_loop().add_reader(pipe.fileno(), answer)
    pipe.send(listener.address)
    await links.run()


def _time_puts() -> Times:
    """From now on the time at which something was first put into a slot, since it was asked, stands in this array."""
    put_ns = np.zeros(MAX_SLOTS, np.int64)
    put = Replica.put

    def timed_put(self: Replica, records: Records, now_ns: int) -> None:
        put(self, records, now_ns)
        slots = records["slot"].astype(np.int64)
        put_ns[slots[put_ns[slots] == 0]] = time.monotonic_ns()

    Replica.put = timed_put  # type: ignore[method-assign]
    return put_ns


class Peer:
    """The receiver, seen from here."""

    def __init__(self, address: str, pipe: Pipe) -> None:
        self.address, self._pipe = address, pipe

    def ask(self, *, thorough: bool = False) -> dict[str, Any]:
        """What it has now; with a digest of it when ``thorough``, which takes a while."""
        self._pipe.send(thorough)
        answer: dict[str, Any] = self._pipe.recv()
        return answer


@contextmanager
def receiver(way: Way, *, timed: bool = False) -> Iterator[Peer]:
    """A receiver that has nothing yet."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    address = f"shm:{way.directory}/{next(_epochs)}" if way.mode is Mode.SHM else "127.0.0.1:0"
    process = context.Process(target=receive, args=(way, address, theirs, timed), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Peer(ours.recv(), ours)
    finally:
        process.kill()
        process.join()


# --- the sender ------------------------------------------------------------------------------------------------------


class Link(Outbound):
    """The real thing, which also says when a full sync is over."""

    def __init__(self, way: Way, peer: Peer, sender: Sender) -> None:
        dialer = way.end("dialer").dialer(parse(way.mode, peer.address))
        super().__init__(dialer, sender, time.monotonic_ns)
        self.synced = asyncio.Event()

    def _on_event(self, event: Event) -> None:
        super()._on_event(event)
        if isinstance(event, Synced):
            self.synced.set()

    @property
    def connection(self) -> Connection:
        """The one that is up."""
        assert self._connection is not None
        return self._connection

    def on_the_wire(self) -> int:
        """Bytes that TCP carried for us, without its headers; of other transports, what they were given."""
        writer: Any = getattr(self.connection, "_writer", None)
        if not hasattr(writer, "get_extra_info"):
            return self.connection.bytes_sent
        info = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        return int(struct.unpack_from("<Q", info, _TCP_INFO_BYTES_ACKED)[0])


def sender_of(table: SessionTable, settings: LinkSettings) -> Sender:
    """An engine that has told nobody anything."""
    epoch = next(_epochs)
    return Sender(table, table.add_peer(str(epoch)), Hello("dialer", epoch, slots=table.slots), settings)


def hold(cpu: int) -> None:
    """On one processor and, as root, before other work: conntrackd's manual recommends it, so both have it."""
    os.sched_setaffinity(0, {cpu})
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(REALTIME))


@contextmanager
def pinned() -> Iterator[None]:
    """On the sender's processor."""
    hold(SENDER_CPU)
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(0, set(CPUS))


# --- a whole node ----------------------------------------------------------------------------------------------------


class Schedule(Pool):
    """A pool and a ring in which sessions are made at given times, whenever somebody looks.

    All slots hold one at first, and ``settle`` leaves ``standing`` of them: every slot was used before, as in a DPVS
    that has run for a while, whose pool goes round. Memory that is used for the first time is given by the kernel in
    that moment, and by the host of a virtual machine, which may take 5 ms for each 2 MiB.
    """

    def __init__(self, slots: int, standing: int) -> None:
        super().__init__(slots)
        self.standing = standing
        self.event_ns: Times = np.zeros(slots, np.int64)
        self._free: Slots = np.arange(standing, slots)
        self._flags = self.conns["flags"]
        self._planned: Times = self.event_ns[:0]  # of the slots from the first of ``_free`` on
        self._plan: Records = self._events  # what the ring says then
        self._next = self._end = 0

    def settle(self) -> None:
        """End all sessions but ``standing``."""
        self._flags[self.standing :] = 0

    def plan(self, rate: int, count: int, seed: int) -> Slots:
        """From a moment from now on, ``count`` sessions in free slots at random times, ``rate`` a second; the slots."""
        gaps = np.random.default_rng(seed).exponential(1e9 / rate, count)
        self._free = self._free[self._next :]
        self._next, self._end = 0, count
        slots = self._free[:count]
        self._planned = time.monotonic_ns() + 50_000_000 + np.cumsum(gaps).astype(np.int64)
        self.event_ns[slots] = self._planned
        self.announce(slots, self._planned)
        self._plan, self._events = self._events, self._events[:0]
        return slots

    @property
    def left(self) -> int:
        return self._end - self._next

    def drain(self, maximum: int) -> Records:
        first = self._next
        due = int(self._planned[first : min(self._end, first + maximum)].searchsorted(time.monotonic_ns()))
        self._next += due
        self._flags[self._free[first : first + due]] = record.HASHED
        return self._plan[first : first + due]


class MarkedTable(SessionTable):
    """A table that remembers when each session came into it."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.marked_ns: Times = np.zeros(slots, np.int64)

    def finish(self) -> Applied:
        applied = super().finish()
        self.marked_ns[applied.created] = time.monotonic_ns()
        return applied


def node_of(pool: Schedule, way: Way, peer: Peer) -> tuple[Node, Link, MarkedTable]:
    """A whole node but for DPVS, with one link."""
    table = MarkedTable(pool.slots)
    link = Link(way, peer, sender_of(table, way.settings))
    collector = Collector(pool, pool, table, modes={XMIT: record.FNAT}, workers={7: 1})
    links = Links([link], Replicas(Hello("dialer", 1, Role.RECEIVER)))
    parts = Parts("dialer", os.getpid(), collector, links, way.directory / f"admin-{next(_epochs)}.sock")
    return Node(parts), link, table
