# SPDX-License-Identifier: GPL-2.0-or-later
"""Segments for a service that belong to no session: which of them are answered, and how.

DPVS 1.10.2, ip_vs_synproxy.c (dp_vs_synproxy_ack_rcv): an acknowledgement is reset, whether the service has a SYN proxy
or not.
"""

import socket
import time
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP
from scapy.packet import Raw
from scapy.utils import PcapReader

from tests.lab.pair import Pair
from tests.lab.process import wait_for
from tests.lab.record import Recorder

pytestmark = [pytest.mark.dpvs]
SEQUENCE, ACKNOWLEDGED = 0x10000000, 0xFFFFFFF0
ANSWERED = {
    20001: ("A", b""),
    20002: ("PA", b"one line\n"),
    20003: ("PA", b"x" * 1000),
}
SILENT = {
    20011: ("R", b""),
    20012: ("RA", b""),
    20013: ("FA", b""),
    20014: ("SA", b""),
    20015: ("F", b""),
    20016: ("P", b"no acknowledgement"),
}
NO_SERVICE = {20021: ("A", b"")}


def test_which_are_reset(pair: Pair, tmp_path: Path) -> None:
    pair.request()  # the way is known to all
    path = tmp_path / "client.pcap"
    vip, client = pair.plan.vip, pair.plan.client
    with pair.network.inside("client"):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    recorder = Recorder(path, "v0", pair.network.path("client"), incoming=True)
    with raw, recorder, pair.resets("client") as heard:
        for port, (flags, data) in {**SILENT, **NO_SERVICE, **ANSWERED}.items():
            to = 81 if port in NO_SERVICE else 80
            segment = TCP(
                sport=port, dport=to, seq=SEQUENCE, ack=ACKNOWLEDGED, flags=flags, window=500,
                options=[("NOP", None), ("NOP", None), ("Timestamp", (7, 8))],
            )  # fmt: skip
            raw.sendto(bytes(IP(src=client, dst=vip, ttl=60, tos=8) / segment / Raw(data)), (vip, 0))
        wait_for("answers", lambda: {way[3] for way in tuple(heard.resets)} >= set(ANSWERED), 10)
        time.sleep(0.5)
    with PcapReader(str(path)) as reader:
        segments = [packet for packet in reader if TCP in packet]
    answers = {packet[TCP].dport: packet for packet in segments if packet[TCP].dport in range(20_000, 21_000)}
    assert sorted(answers) == sorted(ANSWERED)
    for port, (_, data) in ANSWERED.items():
        ip, tcp = answers[port][IP], answers[port][TCP]
        assert (ip.src, ip.dst, tcp.sport) == (vip, client, 80)
        assert str(tcp.flags) == "RA"
        assert (tcp.seq, tcp.ack, tcp.window) == (ACKNOWLEDGED, SEQUENCE + len(data), 0)
        assert len(tcp.payload) == 0
        assert ip.tos == 0
        fresh = ip.copy()
        del fresh.chksum
        del fresh[TCP].chksum
        fresh = IP(bytes(fresh))
        assert (ip.chksum, tcp.chksum) == (fresh.chksum, fresh[TCP].chksum)
    assert pair.a.alive
