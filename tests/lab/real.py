# SPDX-License-Identifier: GPL-2.0-or-later
"""A node that is a real DPVS: ``DPVS_BIN`` names the binary, ``DPVS_TOOLS`` the folder with its ipvsadm and dpip."""

import os
import re
import subprocess
from pathlib import Path

from tests.lab.node import Counters, Node, RealServer, Service
from tests.lab.process import LabError

DEVICE = "dpdk0"
_SERVICE = re.compile(r"^(TCP|UDP)\s+(\S+)")
_SERVER = re.compile(r"^\s+->\s+(\S+)\s+\S+\s+-?\d+\s+(\d+)\s+(\d+)")
_PORTS = re.compile(r"\bsa_used (\d+)")
_SECONDS = {
    "none": 2, "syn_sent": 30, "syn_recv": 30, "fin_wait": 7, "time_wait": 7, "close": 3,
    "close_wait": 7, "last_ack": 7, "listen": 120, "synack": 30, "last": 2,
}  # fmt: skip

CONFIG = """\
global_defs {{
    log_level   INFO
    log_file    {log}
    <init> kni  off
    lldp        off
}}
netif_defs {{
    <init> pktpool_size     65535
    <init> pktpool_cache    256
    <init> device {device} {{
        rx {{
            queue_number        {workers}
            descriptor_number   256
            rss                 all
        }}
        tx {{
            queue_number        {workers}
            descriptor_number   256
        }}
        promisc_mode
    }}
}}
worker_defs {{
    <init> worker cpu0 {{
        type    master
        cpu_id  0
    }}
{worker_blocks}
}}
timer_defs {{
    schedule_interval    500
}}
neigh_defs {{
    <init> unres_queue_length  128
    timeout                    60
}}
ipv4_defs {{
    forwarding                 off
    <init> default_ttl         64
    fragment {{
        <init> bucket_number   4096
        <init> bucket_entries  16
        <init> max_entries     4096
        <init> ttl             1
    }}
}}
ipv6_defs {{
    disable                     off
    forwarding                  off
    route6 {{
        <init> method           hlist
        recycle_time            10
    }}
}}
ctrl_defs {{
    lcore_msg {{
        <init> ring_size                4096
        sync_msg_timeout_us             2000000
        priority_level                  low
    }}
}}
ipvs_defs {{
    conn {{
        <init> conn_pool_size       {pool}
        <init> conn_pool_cache      256
        conn_init_timeout           30
        <init> redirect             {redirect}
    }}
    udp {{
        uoa_mode        opp
        uoa_max_trail   0
        timeout {{
            oneway      60
            normal      300
            last        3
        }}
    }}
    tcp {{
        timeout {{
{timeouts}
        }}
    }}
}}
sa_pool {{
    <init> pool_hash_size  1
    <init> flow_enable     off
}}
"""
WORKER = """\
    <init> worker cpu{cpu} {{
        type    slave
        cpu_id  {cpu}
        port    {device} {{
            rx_queue_ids     {queue}
            tx_queue_ids     {queue}
        }}
    }}"""


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

    def write_config(self) -> None:
        workers = self.settings.workers
        timeouts = {**_SECONDS, "established": self.settings.established_timeout_s, **self.settings.timeouts}
        self.conf.write_text(
            CONFIG.format(
                log=self.directory / "dpvs.log",
                device=DEVICE,
                workers=workers,
                worker_blocks="\n".join(
                    WORKER.format(cpu=queue + 1, queue=queue, device=DEVICE) for queue in range(workers)
                ),
                pool=self.settings.pool,
                redirect="on" if workers > 1 else "off",
                timeouts="\n".join(f"            {state:<12}{seconds}" for state, seconds in timeouts.items()),
            )
        )

    def argv(self) -> list[str]:
        program = binary()
        if program is None:
            raise LabError("set DPVS_BIN and DPVS_TOOLS to a real DPVS and its tools")
        cpus = os.cpu_count() or 1
        first = {"a": 0, "b": 1}[self.name] % cpus  # the two nodes' masters and workers on different CPUs
        lcores = ",".join(f"{lcore}@{(first + lcore) % cpus}" for lcore in range(self.settings.workers + 1))
        return [
            str(program), "-c", str(self.conf), "-p", str(self.pid_file), "-x", str(self.ipc), "--",
            f"--lcores={lcores}", "--main-lcore=0", f"--file-prefix={self.file_prefix}",
            f"--huge-dir={self.run.huge}", "-m", str(self.settings.memory_mib), "--no-pci", "--no-telemetry",
            f"--vdev=net_af_packet0,iface=v0,qpairs={self.settings.workers},blocksz=65536,framesz=2048,framecnt=2048",
        ]  # fmt: skip

    def tool(self, name: str, *arguments: str) -> str:
        """Run DPVS's own ipvsadm or dpip against this node; its output."""
        done = subprocess.run(
            [str(Path(os.environ["DPVS_TOOLS"]) / name), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "DPVS_IPC_FILE": str(self.ipc)},
        )
        if done.returncode != 0:
            raise LabError(f"{name} {' '.join(arguments)} on node {self.name}: {done.stderr.strip()}")
        return done.stdout

    def configure(self, services: list[Service]) -> None:
        self.tool("dpip", "addr", "add", f"{self.plan.node(self.name)}/24", "dev", DEVICE)
        for address in dict.fromkeys(service.address for service in services):
            self.tool("dpip", "addr", "add", f"{address}/32", "dev", DEVICE)
        for service in services:
            key = ("-t" if service.proto == "tcp" else "-u", f"{service.address}:{service.port}")
            self.tool("ipvsadm", "-A", *key, "-s", "rr")
            for server in service.servers:
                mode = "-g" if service.direct else "-b"
                self.tool("ipvsadm", "-a", *key, "-r", f"{server}:{service.port}", mode)
            for local in service.local_addresses:
                self.tool("ipvsadm", "--add-laddr", "-z", local, *key, "-F", DEVICE)

    def counters(self) -> Counters:
        servers, service = [], ""
        for line in self.tool("ipvsadm", "-ln").splitlines():
            if match := _SERVICE.match(line):
                service = f"{match[1].lower()} {match[2]}"
            elif (match := _SERVER.match(line)) and service:
                servers.append(RealServer(service, match[1], int(match[2]), int(match[3])))
        used = sum(int(number) for number in _PORTS.findall(self.tool("dpip", "-s", "addr", "show")))
        return Counters(tuple(servers), used)
