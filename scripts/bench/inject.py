# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions into one node of the laboratory, as fast as it takes them, beside a flow of datagrams through its worker.

Each round puts all sessions in, by requests alone or by the injector from a peer's table as a node does, refreshes
them, and takes them out again. Printed: seconds, what the agent says a session and a callback took on the worker, how
much of the time the worker was ours, processor time of this process, datagrams lost. What the flow loses with nobody
injecting comes first. With two processors the worker shares its own with whatever else runs: how often the system took
it away, and for how long, is printed beside the callbacks that took more than 100 us.

The twin by default; --kind dpvs for the DPVS that DPVS_BIN and DPVS_TOOLS name. A million takes 2.5 GiB of hugepages.
"""

import argparse
import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from collector.record import RECORD, Bools, Records
from collector.table import Dirty
from probes.agent import abi, loading
from probes.agent.client import AgentBusy, AgentClient
from probes.target import Target
from replicator.inject import Injector
from tests.lab.config import DEVICE
from tests.lab.node import Settings
from tests.lab.pair import SPARE_PAGES, Pair
from tests.lab.process import Process, wait_for
from tests.lab.real import RealNode
from tests.lab.records import PORTS, fnat_records
from tests.lab.run import Run
from tests.lab.twin import TwinNode

POOL_BYTES = 768  # of one session in DPVS's pool, and its entries in the hash
LOCAL_BYTES = 8 << 20  # of the port pools of one local address
TICK_S = 0.001


class Peer:
    """The table of a peer that has all these sessions."""

    node_id = 1
    link_up = False  # nothing is refreshed by itself

    def __init__(self, records: Records) -> None:
        self.slots = len(records)
        self.records = records
        self.present: Bools = np.ones(len(records), np.bool_)
        self.pending = Dirty(len(records))

    def mark_all(self) -> None:
        self.pending.mark(np.arange(self.slots))


class Bench:
    """One node with an agent in it."""

    def __init__(self, pair: Pair, target: Target, options: argparse.Namespace) -> None:
        self.pair, self.options = pair, options
        self._threads = [Path(f"/proc/{target.pid}/task/{tid}") for tid in target.workers()]
        node = pair.b
        count = options.sessions
        locals_ = [f"10.9.2.{n}" for n in range(100, 100 + -(-count // PORTS))]
        for address in locals_:
            if isinstance(node, TwinNode):
                node.tell(f"laddr add tcp {pair.plan.vip}:7 {address}")
            elif isinstance(node, RealNode):
                node.tool("ipvsadm", "--add-laddr", "-z", address, "-t", f"{pair.plan.vip}:7", "-F", DEVICE)
        self.records = fnat_records(pair.plan, count, tuple(locals_))
        self.client = loading.load(target, node.layout, node.control)
        self.clear()

    def clear(self) -> None:
        """Begin to count the workers' longest callbacks from here."""
        self._before = self._stats()

    def _stats(self) -> npt.NDArray[np.void]:
        door = self.client.door.read().data
        stats: npt.NDArray[np.void] = door["workers"][: int(door["n_workers"])].copy()
        return stats

    def _away(self) -> npt.NDArray[np.int64]:
        """How often the workers' threads had to give their processor away, and ns for which they waited for it."""
        times, waited = 0, 0
        for thread in self._threads:
            (switches,) = re.findall(r"nonvoluntary_ctxt_switches:\s+(\d+)", (thread / "status").read_text())
            times += int(switches)
            waited += int((thread / "schedstat").read_text().split()[1])
        return np.array([times, waited])

    def flow(self) -> Process:
        process = self.pair.spawn(
            "client", "flow", "python3", "-m", "scripts.bench.flow", self.pair.plan.vip, "53", str(self.options.flow)
        )
        wait_for("the flow", lambda: "ready" in process.output(), 20)
        return process

    def end(self, process: Process) -> dict[str, Any]:
        process.signal(signal.SIGTERM)
        process.wait(20)
        answer: dict[str, Any] = json.loads(process.output().splitlines()[-1])
        return answer

    def said(self, flow: dict[str, Any]) -> str:
        return (
            f"datagrams {flow['sent']:6} lost {flow['lost']:3}  round trip p50 {flow['p50_ms']:.2f}"
            f" p99 {flow['p99_ms']:.2f} max {flow['max_ms']:.1f} ms"
        )

    def baseline(self) -> None:
        process = self.flow()
        time.sleep(self.options.calm)
        print(f"{'nobody injects':20} {self.options.calm:6.2f} s  {self.said(self.end(process))}", flush=True)

    def measured(self, name: str, work: Callable[[], None]) -> None:
        process = self.flow()
        before, present = self._stats(), self._away()
        cpu, began = time.process_time(), time.perf_counter()
        work()
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
        times, waited = (self._away() - present).tolist()
        flow = self.end(process)
        after = self._stats()
        records = int((after["records"] - before["records"]).sum())
        busy = int((after["busy_ns"] - before["busy_ns"]).sum())
        chunks = int((after["chunks"] - before["chunks"]).sum())
        late = int((after["late"] - before["late"]).sum())
        print(
            f"{name:20} {took:6.2f} s  worker {busy / max(1, records):5.0f} ns a session,"
            f" {busy / took / 1e7:3.0f} % ours, python {cpu:5.2f} s"
        )
        longest = after["max_ns"].max() / 1000
        print(
            f"{'':31}{chunks} callbacks of {busy / max(1, chunks) / 1000:.1f} us, {late} over 100 us,"
            f" longest so far {longest:.0f}"
        )
        print(f"{'':31}worker without its processor {times} times, {waited / took / 1e7:.1f} % of the time")
        print(f"{'':31}{self.said(flow)}", flush=True)

    def by_requests(self, op: abi.RecordOp, expected: set[int]) -> None:
        """Hand everything over, as many requests outstanding as the agent takes."""
        client, size = self.client, self.client.max_records
        ops = np.full(size, op, np.uint8)
        parts = [self.records[begin : begin + size] for begin in range(0, len(self.records), size)]
        waiting: list[int] = []
        while parts or waiting:
            while parts and len(waiting) < abi.MAX_REQUESTS:
                try:
                    waiting.append(client.submit(ops[: len(parts[0])], parts[0]))
                except AgentBusy:
                    break
                parts.pop(0)
            for request in list(waiting):
                codes = client.results(request)
                if codes is None:
                    break
                waiting.remove(request)
                assert set(codes.tolist()) <= expected, np.bincount(codes)
            time.sleep(TICK_S)

    def by_injector(self, injector: Injector, peer: Peer, *, present: bool) -> None:
        """Ticks as a node makes them, until all is as the peer's table says."""
        peer.present[:] = present
        peer.mark_all()
        wanted = peer.slots if present else 0
        while True:
            injector.tick(time.monotonic_ns())
            if injector.idle() and injector.installed() == wanted:
                return
            assert not injector.stopped, injector.stopped
            time.sleep(TICK_S)


def run(bench: Bench, client: AgentClient, options: argparse.Namespace) -> None:
    bench.baseline()
    new, known = {int(abi.Code.CREATED)}, {int(abi.Code.UPDATED)}
    gone = {int(abi.Code.DELETED)}
    for _ in range(options.rounds):
        bench.measured("requests: create", lambda: bench.by_requests(abi.RecordOp.UPSERT, new))
        bench.measured("requests: refresh", lambda: bench.by_requests(abi.RecordOp.UPSERT, known))
        bench.measured("requests: delete", lambda: bench.by_requests(abi.RecordOp.DELETE, gone))
    for _ in range(options.rounds):
        peer = Peer(bench.records)
        injector = Injector(client, lambda peer=peer: [peer])  # type: ignore[misc]
        for name, present in (("injector: create", True), ("injector: refresh", True), ("injector: delete", False)):
            bench.measured(
                name,
                lambda i=injector, p=peer, present=present: bench.by_injector(i, p, present=present),  # type: ignore[misc]
            )
        injector.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="20 000 sessions, once")
    parser.add_argument("--kind", choices=("twin", "dpvs"), default="twin")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--flow", type=int, default=1000, metavar="PER_SECOND", help="datagrams through the worker")
    parser.add_argument("--calm", type=float, default=3.0, metavar="SECONDS", help="of the flow with nobody injecting")
    options = parser.parse_args()
    if options.quick:
        options.sessions, options.calm = min(options.sessions, 20_000), 1.0
    pool = max(65536, options.sessions + options.sessions // 8)
    spare = 900 if options.kind == "dpvs" else 200
    local = -(-options.sessions // PORTS) * LOCAL_BYTES
    memory = -(-(pool * POOL_BYTES * 5 // 4 + local) // (1 << 20)) + spare
    settings = Settings(pool=pool, memory_mib=memory, workers=options.workers, poll=True, established_timeout_s=900)
    with (
        Run(2 * (memory // 2 + SPARE_PAGES)) as lab,  # node a is there for a moment
        Pair(lab, kind=options.kind, settings=settings) as pair,
    ):
        pair.active("b")
        pair.kill("a")
        print(f"{options.kind}, {options.sessions} sessions of {RECORD.itemsize} bytes, {options.workers} workers")
        with Target.open(pair.b.pid) as target:
            bench = Bench(pair, target, options)
            run(bench, bench.client, options)


if __name__ == "__main__":
    main()
