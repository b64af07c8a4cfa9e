# SPDX-License-Identifier: GPL-2.0-or-later
"""A node that is the twin of tests/twin, configured over its own control socket: a line in, JSON out."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.available import ROOT, TWIN
from tests.lab.node import Counters, Node, RealServer
from tests.lab.process import LabError
from tests.lab.services import Service, endpoint

REPLY_S = 30.0
SANITIZED_TWIN = TWIN.with_name("dpvs-twin-asan")
SANITIZED_AGENT = TWIN.with_name("agent-asan.so")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
_ATTACH_WITH_AGENT = (
    "import sys; from pathlib import Path; from probes.agent import loading; loading.LIBRARY = Path(sys.argv.pop(1));"
    "from replicator.cli import main; main()"
)


def build_sanitized() -> None:
    """Build what ``Settings(sanitized=True)`` runs; make does what is to be done only."""
    agent = ROOT / "probes" / "agent"
    commands: list[list[str | Path]] = [
        ["make", "-s", "-C", ROOT / "tests" / "twin", f"OUT={TWIN.parent}", "SANITIZE=1"],
        ["cc", "-std=gnu11", "-O1", "-g", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror", *SANITIZERS,
         "-o", SANITIZED_AGENT, *sorted(agent.glob("*.c"))],
    ]  # fmt: skip
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise LabError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")


def build_variants() -> Path:
    """Build what ``Settings(variant=...)`` runs, of what is compiled already; the directory it is in."""
    make = ["make", "-s", "-C", str(ROOT / "tests" / "twin"), f"OUT={TWIN.parent}", "variants"]
    subprocess.run(make, check=True, timeout=300)
    return TWIN.parent


class TwinNode(Node):
    kind = "twin"

    def program(self) -> Path:
        program = SANITIZED_TWIN if self.settings.sanitized else TWIN.with_name(TWIN.name + self.settings.variant)
        if not program.exists():
            raise LabError("the twin is not built: run ./scripts/setup")
        return program

    def attach_command(self) -> list[str | Path]:
        if self.settings.sanitized:
            return [sys.executable, "-c", _ATTACH_WITH_AGENT, SANITIZED_AGENT]
        return super().attach_command()

    def environment(self) -> dict[str, str]:
        return {"TWIN_POLL": "1" if self.settings.poll else "0"}

    def tell(self, line: str) -> dict[str, Any]:
        """One command to the twin itself; its answer. Commands: tests/twin/README.md."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(REPLY_S)
            connection.connect(f"{self.ipc}.twin")
            connection.sendall(line.encode() + b"\n")
            with connection.makefile("rb") as answer:
                reply = json.loads(answer.read())
        if not isinstance(reply, dict) or reply.get("ok") is not True:
            raise LabError(f"node {self.name} refused '{line}': {reply}")
        return reply

    def configure(self, services: list[Service]) -> None:
        for prefix in self.plan.node_prefixes(self.name):
            self.tell(f"addr add {prefix}")
        for address in dict.fromkeys(service.address for service in services):
            self.tell(f"addr add {address}")
        for service in services:
            key = f"{service.proto} {service.key}"
            self.tell(f"service add {key} sched rr")
            if self.settings.synproxy and service.proto == "tcp" and service.mode == "fnat":
                self.tell(f"service synproxy {key} on")
            if self.settings.persistent_s:
                self.tell(f"service persist {key} {self.settings.persistent_s}")
            for server in service.servers:
                self.tell(f"dest add {key} {endpoint(server, service.port)} {service.mode}")
            for local in service.local_addresses:
                self.tell(f"laddr add {key} {local}")

    def limit(self, service: Service, connections: int) -> None:
        for server in service.servers:
            where = f"{service.proto} {service.key} {endpoint(server, service.port)}"
            self.tell(f"dest edit {where} {service.mode} max_conn {connections}")

    def counters(self) -> Counters:
        servers: dict[tuple[str, str], RealServer] = {}
        used = 0
        for worker in self.tell("stats")["workers"]:  # each worker counts for itself
            used += sum(address["used"] for address in worker["addresses"])
            for service in worker["services"]:
                name = f"{service['proto']} {endpoint(service['vip'], service['port'])}"
                for dest in service["dests"]:
                    address = endpoint(dest["addr"], dest["port"])
                    before = servers.get((name, address))
                    servers[name, address] = RealServer(
                        name,
                        address,
                        dest["actconns"] + (before.active if before else 0),
                        dest["inactconns"] + (before.inactive if before else 0),
                    )
        return Counters(tuple(servers.values()), used)
