# SPDX-License-Identifier: GPL-2.0-or-later
"""A node that is a real DPVS: ``DPVS_BIN`` names the binary, ``DPVS_TOOLS`` the folder with its ipvsadm and dpip."""

import os
import re
import subprocess
from pathlib import Path

from probes.choosing import choose
from probes.layout import Layout
from probes.target import Target
from tests.lab.config import DEVICE
from tests.lab.node import Counters, Node, RealServer
from tests.lab.process import LabError
from tests.lab.services import Service, endpoint

PROTOCOL = {"tcp": "-t", "udp": "-u", "sctp": "--sctp-service"}
MODES = {"fnat": "-b", "dr": "-g", "nat": "-m", "tunnel": "-i"}
_SERVICE = re.compile(r"^(TCP|UDP|SCTP)\s+(\S+)")
_SERVER = re.compile(r"^\s+->\s+(\S+)\s+\S+\s+-?\d+\s+(\d+)\s+(\d+)")
_PORTS = re.compile(r"\bsa_used (\d+)")


def binary() -> Path | None:
    """The real DPVS that the environment names, if it is there with its tools."""
    name, tools = os.environ.get("DPVS_BIN"), os.environ.get("DPVS_TOOLS")
    if not name or not tools:
        return None
    if not os.access(name, os.X_OK):
        raise LabError(f"DPVS_BIN={name} cannot be executed")
    for tool in ("ipvsadm", "dpip"):
        if not os.access(Path(tools) / tool, os.X_OK):
            raise LabError(f"DPVS_TOOLS={tools} has no {tool}")
    return Path(name)


class RealNode(Node):
    kind = "dpvs"
    start_timeout_s = 120.0
    _layout: Layout | None = None

    def program(self) -> Path:
        found = binary()
        if found is None:
            raise LabError("set DPVS_BIN and DPVS_TOOLS to a real DPVS and its tools")
        return found

    @property
    def layout(self) -> Layout:
        """Of the release that runs; asked of it once."""
        if self._layout is None:
            with Target.open(self.pid) as target:
                self._layout = choose(target)[0]
        return self._layout

    def tool(self, name: str, *arguments: str) -> str:
        """Run DPVS's own ipvsadm or dpip against this node; its output."""
        done = subprocess.run(
            [str(Path(os.environ["DPVS_TOOLS"]) / name), *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "DPVS_IPC_FILE": str(self.ipc)},
        )
        if done.returncode != 0:
            raise LabError(f"{name} {' '.join(arguments)} on node {self.name}: {done.stderr.strip()}")
        return done.stdout

    def configure(self, services: list[Service]) -> None:
        for prefix in self.plan.node_prefixes(self.name):
            self.add_address(prefix)
        for address in dict.fromkeys(service.address for service in services):
            self.add_address(f"{address}/{128 if ':' in address else 32}")
        for service in services:
            key = (PROTOCOL[service.proto], service.key)
            proxy = (
                ("-j", "enable") if self.settings.synproxy and service.proto == "tcp" and service.mode == "fnat" else ()
            )
            persistent = ("-p", str(self.settings.persistent_s)) if self.settings.persistent_s else ()
            self.tool("ipvsadm", "-A", *key, "-s", "rr", *proxy, *persistent)
            for server in service.servers:
                self.tool("ipvsadm", "-a", *key, "-r", endpoint(server, service.port), MODES[service.mode])
            for local in service.local_addresses:
                self.tool("ipvsadm", "--add-laddr", "-z", local, *key, "-F", DEVICE)

    def limit(self, service: Service, connections: int) -> None:
        key = (PROTOCOL[service.proto], service.key)
        for server in service.servers:
            where = endpoint(server, service.port)
            self.tool("ipvsadm", "-e", *key, "-r", where, MODES[service.mode], "-w", "1", "-x", str(connections))

    def add_address(self, prefix: str) -> None:
        self.tool("dpip", *(("-6",) if ":" in prefix else ()), "addr", "add", prefix, "dev", DEVICE)

    def counters(self) -> Counters:
        servers, service = [], ""
        for line in self.tool("ipvsadm", "-ln").splitlines():
            if match := _SERVICE.match(line):
                service = f"{match[1].lower()} {match[2]}"
            elif (match := _SERVER.match(line)) and service:
                servers.append(RealServer(service, match[1], int(match[2]), int(match[3])))
        used = sum(int(number) for number in _PORTS.findall(self.tool("dpip", "-s", "addr", "show")))
        return Counters(tuple(servers), used)
