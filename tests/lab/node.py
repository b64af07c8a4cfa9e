# SPDX-License-Identifier: GPL-2.0-or-later
"""What twin nodes and real nodes have in common: start, kill, count, list sessions, attach dpvs-probe.

A node is one DPVS in its own network namespace. ``twin.py`` and ``real.py`` say how it is started, how it gets its
services and where its counters are read; everything else is the same, and so are the tests.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from probes.control import ControlSocket, ControlTimeout
from probes.layout import Layout
from replicator.admin import AdminError, ask
from tests.lab import config
from tests.lab.net import Network
from tests.lab.process import LabError, Process, wait_for
from tests.lab.run import Run
from tests.lab.services import Service

ROOT = Path(__file__).resolve().parents[2]
CONTROL_S = 30.0  # polling nodes may share a CPU
PAUSED_S = 2.0  # in which a DPVS answers that no request holds up
LAYOUT = "1.10.2"
PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp"}
SessionTuple = tuple[str, str, str, str, str]  # protocol, client, virtual, local, real server, each "address:port"
COMMAND = Path(sys.executable).parent / "dpvs-probe"


@dataclass(frozen=True)
class RealServer:
    """Connection counters of one real server of one service."""

    service: str  # "tcp 10.9.1.100:80"
    address: str  # "10.9.0.20:80"
    active: int
    inactive: int


@dataclass(frozen=True)
class Counters:
    servers: tuple[RealServer, ...]
    ports_used: int

    @property
    def active(self) -> int:
        return sum(server.active for server in self.servers)

    @property
    def inactive(self) -> int:
        return sum(server.inactive for server in self.servers)

    @property
    def idle(self) -> bool:
        """Nothing left: no connection counted, no local port used."""
        return self.active == self.inactive == self.ports_used == 0


@dataclass(frozen=True)
class Settings:
    """What both nodes of a pair share."""

    workers: int = 1
    workers_of_b: int = 0  # where it is to have another number of them
    established_timeout_s: int = 90
    udp_timeout_s: int = 300
    udp_oneway_s: int = 60
    kinds: tuple[str, ...] = ()  # of services beyond those that every pair has: tests.lab.services.KINDS
    sctp: bool = False  # services of it too
    synproxy: bool = False  # FullNAT TCP services have one
    persistent_s: int = 0  # clients stay with their real server for so long
    port_pools: int = 1  # the ports of a local address, divided by the real server
    pool: int = 65536
    memory_mib: int = 256
    poll: bool = False  # the twin spins as DPVS does
    variant: str = ""  # of the twin (tests/twin/Makefile): "-outwall"
    sanitized: bool = False  # the twin and the agent with address and undefined-behaviour sanitizers
    timeouts: dict[str, int] = field(default_factory=dict)


class Node(ABC):
    """One DPVS and what is attached to it."""

    kind: str
    start_timeout_s = 60.0

    def __init__(self, run: Run, network: Network, name: str, settings: Settings) -> None:
        self.run = run
        self.network = network
        self.plan = network.plan
        self.name = name
        self.settings = settings
        self.directory = run.directory / f"{network.prefix}-{name}"
        self.directory.mkdir(exist_ok=True)
        self.conf = self.directory / "dpvs.conf"
        self.pid_file = self.directory / "dpvs.pid"
        self.ipc = self.directory / "dpvs.ipc"
        self.file_prefix = f"{network.prefix}-{name}"
        self.process: Process | None = None
        self.attached: list[Attached] = []

    # -- life -------------------------------------------------------------------------------------------------------
    @abstractmethod
    def program(self) -> Path:
        """The DPVS to run."""

    @abstractmethod
    def configure(self, services: list[Service]) -> None:
        """Give the running DPVS its addresses and services."""

    @abstractmethod
    def limit(self, service: Service, connections: int) -> None:
        """Each real server of a service takes that many connections, 0: any number; all workers together."""

    @property
    def workers(self) -> int:
        """How many workers this node has."""
        return (self.name == "b" and self.settings.workers_of_b) or self.settings.workers

    @abstractmethod
    def counters(self) -> Counters:
        """Connection counts and used local ports, as DPVS itself says."""

    def argv(self) -> list[str | Path]:
        """Command line of the DPVS."""
        settings = self.settings
        options = config.eal(
            first_cpu={"a": 0}.get(self.name, 1),  # the two masters, and the two workers, on different CPUs
            workers=self.workers,
            prefix=self.file_prefix,
            huge=self.run.huge,
            memory_mib=settings.memory_mib,
        )
        return [self.program(), "-c", self.conf, "-p", self.pid_file, "-x", self.ipc, "--", *options]

    def write_config(self) -> None:
        settings = self.settings
        self.conf.write_text(
            config.text(
                log=self.directory / "dpvs.log",
                workers=self.workers,
                pool=settings.pool,
                established_s=settings.established_timeout_s,
                udp_s=settings.udp_timeout_s,
                oneway_s=settings.udp_oneway_s,
                port_pools=settings.port_pools,
                timeouts=settings.timeouts,
            )
        )

    def environment(self) -> dict[str, str]:
        return {}

    @property
    def pid(self) -> int:
        if self.process is None:
            raise LabError(f"node {self.name} was not started")
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.alive

    def start(self, services: list[Service] | None) -> None:
        """Start the DPVS and wait until it answers; addresses and services included, unless it is to have none yet."""
        if self.alive:
            raise LabError(f"node {self.name} runs already")
        for leftover in (self.ipc, self.pid_file):
            leftover.unlink(missing_ok=True)
        for page in self.run.huge.glob(f"{self.file_prefix}map_*"):
            page.unlink()
        self.write_config()
        log = self.directory / "dpvs.out"
        process = Process(
            f"node {self.name}", self.argv(), log, enter=self.network.enter_in_child(self.name), env=self.environment()
        )
        self.process = process
        self.run.remember(process.pid)

        def up() -> bool:
            if not process.alive:
                raise LabError(f"node {self.name} ended with status {process.status}:\n{process.tail(12)}")
            return self.ipc.exists() and self.pid_file.exists() and bool(self.pid_file.read_text().strip())

        wait_for(f"node {self.name} up ({log})", up, self.start_timeout_s, 0.05)
        if services is not None:
            self.configure(services)

    def kill(self) -> None:
        """kill -9, as a machine dies."""
        if self.process is not None:
            self.process.kill()

    def close(self) -> None:
        for attached in reversed(self.attached):
            attached.close()
        self.attached.clear()
        if self.process is not None:
            self.process.kill()
        for page in self.run.huge.glob(f"{self.file_prefix}map_*"):
            page.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- what it holds ----------------------------------------------------------------------------------------------
    @property
    def layout(self) -> Layout:
        return Layout.load(LAYOUT)

    @property
    def control(self) -> ControlSocket:
        """Client of this node's control socket."""
        return ControlSocket(str(self.ipc), self.layout, connect_seconds=CONTROL_S, reply_seconds=CONTROL_S)

    def sessions(self) -> "npt.NDArray[np.void]":
        """DPVS's own list (GET_CONN_ALL), one row a session."""
        return self.control.sessions()

    def tuples(self) -> set[SessionTuple]:
        """The tuples of DPVS's own list."""
        rows = self.sessions()
        found = {_tuple(row) for row in rows}
        if len(found) != len(rows):
            raise LabError(f"node {self.name} lists {len(rows)} sessions but {len(found)} tuples")
        return found

    # -- dpvs-probe -------------------------------------------------------------------------------------------------
    def probe(self, *arguments: str, wait: bool = True, timeout: float = 60) -> "Attached":
        """Start ``dpvs-probe attach`` on this node, in its namespace, and wait until its admin socket answers.

        Links have the keys of this run's cluster, unless the arguments say something of keys.
        """
        attached = Attached(self, self.with_keys(*arguments))
        self.attached.append(attached)
        if wait:
            attached.wait_ready(timeout)
        return attached

    def with_keys(self, *arguments: str) -> tuple[str, ...]:
        """Arguments for ``attach``, with the keys of this run's cluster if they ask for links and name no keys."""
        if {"--peer", "--listen"} & set(arguments) and not {"--keys", "--insecure"} & set(arguments):
            return (*arguments, "--keys", str(self.run.keys(self.name)))
        return arguments

    def attach_command(self) -> list[str | Path]:
        """The program that ``probe`` starts."""
        return [COMMAND]

    def command(self, *arguments: str, check: bool = False, timeout: float = 300) -> "subprocess.CompletedProcess[str]":
        """Run one ``dpvs-probe`` command in this node's namespace, to its end."""
        return subprocess.run(
            [str(COMMAND), *arguments],
            capture_output=True,
            text=True,
            check=check,
            timeout=timeout,
            env={**os.environ, "DPVS_PROBE_RUNDIR": str(self.run_directory)},
            preexec_fn=self.network.enter_in_child(self.name),
        )

    @property
    def run_directory(self) -> Path:
        return self.directory / "run"


class Attached:
    """A running ``dpvs-probe attach``."""

    def __init__(self, node: Node, arguments: tuple[str, ...]) -> None:
        self.node = node
        number = len(list(node.directory.glob("probe-*.log")))
        self.log = node.directory / f"probe-{number}.log"
        which: tuple[str, ...] = () if "--pid-file" in arguments else ("--pid", str(node.pid))
        self.process = Process(
            f"dpvs-probe on node {node.name}",
            [*node.attach_command(), "attach", "--config", "/dev/null", *which, "--node", node.name, *arguments],
            self.log,
            enter=node.network.enter_in_child(node.name),
            env={"DPVS_PROBE_RUNDIR": str(node.run_directory)},
        )
        node.run.remember(self.process.pid)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.alive

    def wait_ready(self, timeout: float = 60) -> None:
        def up() -> bool:
            if not self.process.alive:
                raise LabError(f"{self.process.name} ended with status {self.process.status}:\n{self.process.tail()}")
            try:
                return bool(self.status()["probe_pid"] == self.pid)
            except AdminError:
                return False

        wait_for(f"{self.process.name} answers ({self.log})", up, timeout)

    def ask(self, command: str, **fields: Any) -> list[dict[str, Any]]:
        """What the admin socket answers, which is what ``dpvs-probe COMMAND --json`` prints."""
        return list(ask(self.node.run_directory / f"{self.node.pid}.sock", command, **fields))

    def status(self) -> dict[str, Any]:
        (answer,) = self.ask("status")
        return answer

    def sessions(self, **wanted: Any) -> list[dict[str, Any]]:
        return self.ask("sessions", **wanted)

    def peers(self) -> list[dict[str, Any]]:
        return self.ask("peers")

    def tuples(self) -> set[SessionTuple]:
        """The tuples of this node's own sessions, as the table has them."""
        rows = self.sessions(origin="own")
        found = {(row["proto"], row["client"], row["virtual"], row["local"], row["real"]) for row in rows}
        if len(found) != len(rows):
            raise LabError(f"the table has {len(rows)} sessions but {len(found)} tuples")
        return found

    def pause(self) -> None:
        """Stop it, between two requests to its DPVS: of one that has begun, DPVS's master waits for the rest."""

        def stopped_between() -> bool:
            self.process.signal(signal.SIGSTOP)
            try:
                ControlSocket(str(self.node.ipc), self.node.layout, reply_seconds=PAUSED_S).release()
            except ControlTimeout:
                self.resume()
                return False
            return True

        wait_for(f"{self.process.name} is between two requests", stopped_between, 30)

    def resume(self) -> None:
        self.process.signal(signal.SIGCONT)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 30) -> int:
        """End it cleanly; its exit status."""
        self.process.signal(number)
        return self.process.wait(timeout)

    def close(self) -> None:
        if self.process.alive:
            self.process.stop()


def _tuple(row: "np.void") -> SessionTuple:
    ends = []
    for family, address, port in (
        ("in_af", "caddr", "cport"),
        ("in_af", "vaddr", "vport"),
        ("out_af", "laddr", "lport"),
        ("out_af", "daddr", "dport"),
    ):
        raw = row[address].tobytes()
        if row[family] == socket.AF_INET:
            ends.append(f"{socket.inet_ntop(socket.AF_INET, raw[:4])}:{row[port]}")
        else:
            ends.append(f"[{socket.inet_ntop(socket.AF_INET6, raw)}]:{row[port]}")
    return (PROTOCOLS.get(int(row["proto"]), str(row["proto"])), ends[0], ends[1], ends[2], ends[3])
