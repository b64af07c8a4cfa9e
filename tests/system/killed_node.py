# SPDX-License-Identifier: GPL-2.0-or-later
"""Not a test: one node of test_killing.py, a process of its own, on a DPVS that changes thousands of sessions a second.

    python -m tests.system.killed_node NAME KEYS_DIRECTORY SLOTS CHANGES_PER_S [PEER_PORT]

Writes the port that it listens on; then for each line that it reads a line of JSON; ``calm`` ends the changes, the end
of the input ends it.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from collector import record
from collector.record import Bools, Records, Slots
from replicator.transport.address import Address
from replicator.transport.tls import Tls
from tests.unit.simulated_dpvs import BASE, CONN, EVENT, STRIDE, XMIT_FNAT
from tests.unit.simulated_node import LOCALHOST, LiveDpvs, SimulatedNode

STEP_S = 0.005
CLIENTS = 60_000


class BusyDpvs(LiveDpvs):
    """Many changes in one step."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._rng = np.random.default_rng(1)
        self._happened: list[tuple[Slots, int, int]] = []
        self.changes = 0

    def change(self, count: int) -> None:
        """``count`` slots: sessions come where there are none, and change or end where there are."""
        slots = self._rng.permutation(self.slots)[:count]
        live = self.live(slots)
        ends = live & (self._rng.random(count) < 0.5)
        self.conns["flags"][slots[ends]] = 0
        self._note(slots[ends], 2)
        fresh = np.zeros(count - int(live.sum()), CONN)
        clients = self._rng.integers(CLIENTS, size=len(fresh))
        fresh["af"] = fresh["af_out"] = record.AF_INET
        fresh["proto"], fresh["packet_xmit"], fresh["timeout_s"] = record.TCP, XMIT_FNAT, 30
        for name, last in (("caddr", clients & 0xFF), ("vaddr", 100), ("laddr", 200), ("daddr", 10)):
            fresh[name][:, 0], fresh[name][:, 2], fresh[name][:, 3] = 10, clients >> 8, last
        fresh["cport"], fresh["vport"], fresh["lport"], fresh["dport"] = 1024 + clients, 80, 1024 + slots[~live], 8080
        fresh["flags"], fresh["state"] = record.HASHED, record.ESTABLISHED
        self.conns[slots[~live]] = fresh
        self._note(slots[~live], 1)
        others = slots[live & ~ends]
        self.conns["fnat_seq_delta"][others] = self._rng.integers(1, 1 << 32, size=len(others))
        self.changes += count

    def _note(self, slots: Slots, kind: int) -> None:
        if len(slots):
            self._happened.append((slots, time.monotonic_ns(), kind))

    def drain(self, maximum: int) -> Records:
        """Few batches at a time: ``maximum`` is far more than a step makes."""
        taken, self._happened = self._happened, []
        events = np.zeros(sum(len(slots) for slots, _, _ in taken), EVENT)
        start = 0
        for slots, time_ns, kind in taken:
            part = events[start : start + len(slots)]
            part["conn"], part["time_ns"], part["tid"], part["kind"] = BASE + slots * STRIDE, time_ns, 5001, kind
            start += len(slots)
        return events

    def read(self, slots: Slots) -> tuple[Records, Bools]:
        return self.conns[slots], np.ones(len(slots), np.bool_)


async def busy(dpvs: BusyDpvs, per_s: int, calm: asyncio.Event) -> None:
    """Changes at an even rate; what a slow machine misses is made up for."""
    began = time.monotonic()
    while not calm.is_set():
        due = int((time.monotonic() - began) * per_s) - dpvs.changes
        if due > 0:
            dpvs.change(min(due, dpvs.slots // 4))
        await asyncio.sleep(STEP_S)


def report(node: SimulatedNode, dpvs: BusyDpvs) -> dict[str, Any]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    table = node.table
    said: dict[str, Any] = {
        "rss_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "made": dpvs.changes,
        "changes": table.created + table.updated + table.deleted,
        "sessions": len(table),
        "digest": table.digest(),
        "truth": node.truth(),
    }
    for link in node.outbound:
        said["link"] = {**link.sender.report(), "bytes": link.row(time.monotonic_ns())["bytes"]}
    for replica in node.replicas:
        said["replica"] = {"digest": replica.digest(), "sessions": replica.count, "synced": replica.link_up}
        said["counters"] = dict(replica.counters)
    return said


async def main(name: str, keys: str, slots: str, per_s: str, *ports: str) -> None:
    dpvs, calm = BusyDpvs(int(slots)), asyncio.Event()
    peers = tuple(Address(LOCALHOST, int(port)) for port in ports)
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    with tempfile.TemporaryDirectory(prefix="dpvs-probe.") as directory:
        made = SimulatedNode(name, Path(directory), slots=int(slots), peers=peers, dpvs=dpvs, tls=Tls.load(keys))
        async with made as node:
            print(node.address.port, flush=True)
            changing = asyncio.create_task(busy(dpvs, int(per_s), calm))
            while line := await lines.readline():
                if line.strip() == b"calm":
                    calm.set()
                    await changing
                print(json.dumps(report(node, dpvs)), flush=True)
            calm.set()
            await changing


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
