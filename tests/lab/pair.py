# SPDX-License-Identifier: GPL-2.0-or-later
"""The pair: two nodes with the same services, a client and a real server.

with Pair.up() as pair:
    pair.active("a")
    steady = pair.steady(connections=100)
    pair.kill("a"); pair.active("b")
    print(steady.report())
"""

import json
import os
import shutil
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.lab import real
from tests.lab.net import Network, Plan
from tests.lab.node import ROOT, Node, Settings
from tests.lab.process import LabError, Process, wait_for
from tests.lab.run import Run
from tests.lab.services import KINDS, Service, services
from tests.lab.sniff import ResetCounter
from tests.lab.twin import TwinNode

SYNC_PORT = 7777
REAL_MEMORY_MIB = 1024
TWIN_MEMORY_MIB = 256
SPARE_PAGES = 32  # DPDK wants a little more than -m says
ANSWER_S = 30.0  # to a segment or a datagram, on a busy machine
OPENING_S = 60


def memory_mib(kind: str) -> int:
    return REAL_MEMORY_MIB if kind == "dpvs" else TWIN_MEMORY_MIB


def hugepages_for(kind: str, nodes: int = 2) -> int:
    """2 MiB pages that so many nodes of a kind need."""
    return nodes * (memory_mib(kind) // 2 + SPARE_PAGES)


class SteadyRun:
    """tests.lab.steady running in the client's namespace."""

    def __init__(self, process: Process, connections: int) -> None:
        self.process = process
        self.connections = connections

    def finish(self, timeout: float = 300) -> dict[str, Any]:
        """End it now; its report."""
        self.process.signal(signal.SIGTERM)
        return self.report(timeout)

    def report(self, timeout: float = 300) -> dict[str, Any]:
        """Wait for its end; its report."""
        self.process.wait(timeout)
        lines = [line for line in self.process.output().splitlines() if line.startswith("{")]
        if not lines:
            raise LabError(f"steady said nothing:\n{self.process.tail()}")
        answer = json.loads(lines[-1])
        assert isinstance(answer, dict)
        return answer


class Pair:
    """Two nodes of one kind; a context manager by way of ``up``."""

    def __init__(self, run: Run, *, kind: str = "twin", settings: Settings | None = None, net: int = 9) -> None:
        self.run = run
        self.kind = kind
        self.settings = settings or Settings(memory_mib=memory_mib(kind))
        self.plan = Plan(net)
        self._stack = ExitStack()
        self._count = 0
        self.nodes: dict[str, Node] = {}

    # -- life -------------------------------------------------------------------------------------------------------
    def __enter__(self) -> "Pair":
        try:
            number = self.run.next_pair()
            self.directory = self.run.directory / f"pair-{number}"
            self.directory.mkdir()
            self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            prefix = f"{self.run.prefix}-{number}"
            self.network = self._stack.enter_context(Network(prefix, self.plan))
            for name in ("a", "b"):
                self.nodes[name] = self._make(name)
                self._stack.callback(self.nodes[name].close)
            self._backends()
            for name in ("a", "b"):
                self.start(name)
            self.active("a")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _make(self, name: str) -> Node:
        if self.kind == "dpvs":
            return real.RealNode(self.run, self.network, name, self.settings)
        return TwinNode(self.run, self.network, name, self.settings)

    def _backends(self) -> None:
        backends = self.spawn("server", "backends", sys.executable, "-m", "tests.lab.backends", *self.plan.servers,
                              *self.plan.servers6, *self.plan.server_vips)  # fmt: skip
        wait_for("backends ready", lambda: "ready" in backends.output() or not backends.alive, 20)
        if not backends.alive:
            raise LabError(f"backends ended:\n{backends.tail()}")
        if any(KINDS[kind][0] == "tunnel" for kind in self.settings.kinds):
            unwrap = self.spawn("server", "unwrap", sys.executable, "-m", "tests.lab.unwrap")
            wait_for("tunnels end", lambda: "ready" in unwrap.output() or not unwrap.alive, 20)
            if not unwrap.alive:
                raise LabError(f"unwrap ended:\n{unwrap.tail()}")

    def services(self) -> list[Service]:
        return services(self.plan, self.settings.kinds, sctp=self.settings.sctp)

    # -- what an operator, or fate, does ----------------------------------------------------------------------------
    def active(self, name: str) -> None:
        self.network.active(name)

    def kill(self, name: str) -> None:
        self.nodes[name].kill()

    def start(self, name: str) -> None:
        self.nodes[name].start(self.services())

    @property
    def a(self) -> Node:
        return self.nodes["a"]

    @property
    def b(self) -> Node:
        return self.nodes["b"]

    # -- traffic ----------------------------------------------------------------------------------------------------
    def spawn(self, host: str, name: str, *argv: str | Path) -> Process:
        """Run a program in a namespace; it ends with the pair at the latest."""
        self._count += 1
        base = self.directory / f"{self._count:03d}-{name}"
        process = Process(
            name,
            argv,
            base.with_suffix(".log"),
            stdout=base.with_suffix(".out"),
            enter=self.network.enter_in_child(host),
            env={"PYTHONPATH": str(ROOT)},
        )
        self.run.remember(process.pid)
        self._stack.callback(process.kill)
        return process

    def steady(self, connections: int = 1, *, seconds: float = 1800, interval: float = 0.2, stall: float = 10,
               port: int = 7, host: str | None = None) -> SteadyRun:  # fmt: skip
        """Connections that exchange lines all the time; returns once all are open."""
        process = self.spawn(
            "client", "steady", sys.executable, "-m", "tests.lab.steady", host or self.plan.vip, str(port),
            "--connections", str(connections), "--seconds", str(seconds), "--interval", str(interval),
            "--stall", str(stall), "--opening", str(OPENING_S),
        )  # fmt: skip
        wait_for("steady ready", lambda: "ready" in process.output() or not process.alive, 40)
        return SteadyRun(process, connections)

    def connect(
        self, port: int = 7, host: str | None = None, *, timeout: float = ANSWER_S, source_port: int = 0
    ) -> socket.socket:
        """One TCP connection from the client's namespace through the load balancer."""
        host = host or self.plan.vip
        with self.network.inside("client"):
            connection = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        connection.settimeout(timeout)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if source_port:
            connection.bind((self.plan.client, source_port))
        connection.connect((host, port))
        return connection

    def datagram(self, data: bytes, port: int = 53, timeout: float = ANSWER_S) -> bytes:
        """One UDP datagram from a port of its own; the answer."""
        with self.network.inside("client"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
            connection.settimeout(timeout)
            connection.connect((self.plan.vip, port))
            connection.send(data)
            return connection.recv(65536)

    def request(self, timeout: float = ANSWER_S) -> bytes:
        """One HTTP request; the body."""
        with self.connect(80, timeout=timeout) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            answer = b""
            while data := connection.recv(65536):
                answer += data
        return answer.partition(b"\r\n\r\n")[2]

    def resets(self, host: str) -> ResetCounter:
        """Counts the resets on the interface of a host; a context manager."""
        return ResetCounter(self.network.path(host))

    # -- replication --------------------------------------------------------------------------------------------------
    def sync_address(self, name: str, port: int = SYNC_PORT) -> str:
        return f"{self.plan.sync(name)}:{port}"

    def replicate(self, *, both: bool = False, extra: tuple[str, ...] = ()) -> None:
        """Attach to both nodes: b receives what a sends, and with ``both`` the other way round as well."""
        listen_a = ("--listen", self.sync_address("a")) if both else ()
        peer_b = ("--peer", self.sync_address("a")) if both else ()
        self.b.probe("--listen", self.sync_address("b"), *peer_b, *extra)
        self.a.probe("--peer", self.sync_address("b"), *listen_a, *extra)


def kinds() -> list[str]:
    """Kinds of nodes that this environment names: the twin always, a real DPVS when DPVS_BIN is set."""
    return ["twin", "dpvs"] if os.environ.get("DPVS_BIN") else ["twin"]
