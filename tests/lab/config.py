# SPDX-License-Identifier: GPL-2.0-or-later
"""DPVS's configuration file and command line, which the twin takes as well."""

import os
from collections.abc import Mapping
from pathlib import Path

DEVICE = "dpdk0"
TIMEOUTS_S = {
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
            oneway      {oneway_s}
            normal      {udp_s}
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
    <init> pool_hash_size  {port_pools}
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


def text(*, log: Path, workers: int, pool: int, established_s: int, udp_s: int, oneway_s: int, port_pools: int,
         timeouts: Mapping[str, int]) -> str:  # fmt: skip
    """The configuration file."""
    seconds = {**TIMEOUTS_S, "established": established_s, **timeouts}
    return CONFIG.format(
        log=log,
        device=DEVICE,
        workers=workers,
        worker_blocks="\n".join(WORKER.format(cpu=queue + 1, queue=queue, device=DEVICE) for queue in range(workers)),
        pool=pool,
        udp_s=udp_s,
        oneway_s=oneway_s,
        port_pools=port_pools,
        redirect="on" if workers > 1 else "off",
        timeouts="\n".join(f"            {state:<12}{value}" for state, value in seconds.items()),
    )


def eal(*, first_cpu: int, workers: int, prefix: str, huge: Path, memory_mib: int) -> list[str]:
    """DPDK's part of the command line: the master and its workers on CPUs from ``first_cpu`` on, going round."""
    cpus = os.cpu_count() or 1
    lcores = ",".join(f"{lcore}@{(first_cpu + lcore) % cpus}" for lcore in range(workers + 1))
    return [
        f"--lcores={lcores}",
        "--main-lcore=0",
        f"--file-prefix={prefix}",
        f"--huge-dir={huge}",
        "-m",
        str(memory_mib),
        "--no-pci",
        "--no-telemetry",
        f"--vdev=net_af_packet0,iface=v0,qpairs={workers},blocksz=65536,framesz=2048,framecnt=8192",
    ]
