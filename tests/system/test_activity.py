# SPDX-License-Identifier: GPL-2.0-or-later
"""``attach --xdp``: sessions say when packets came and how many, and flows that no session covers are listed."""

import json
import socket
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP
from scapy.packet import Raw, raw

from probes.packets import Packets
from tests.lab.node import Attached
from tests.lab.pair import Pair
from tests.lab.process import wait_for

pytestmark = [pytest.mark.dpvs, pytest.mark.needs("bpf")]


def stray(pair: Pair, cport: int, *, flags: str = "A") -> None:
    """One segment to the echo service in the middle of a connection that is nobody's here."""
    segment = (
        IP(src=pair.plan.client, dst=pair.plan.vip) / TCP(sport=cport, dport=7, flags=flags, seq=1, ack=1) / Raw(b"x")
    )
    with pair.network.inside("client"):
        out = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with out:
        out.sendto(raw(segment), (pair.plan.vip, 0))


def test_sessions_say_when_they_were_active(pair: Pair) -> None:
    node = pair.a
    probe = node.probe("--xdp", "v0", "--no-inject")

    def packets() -> dict[str, Any]:
        said: dict[str, Any] = probe.status()["packets"]
        return said

    wait_for("the services are known", lambda: packets()["services_watched"] == 5, 5)
    assert packets()["services_from"] == "control socket"
    assert packets()["interfaces"] == [{"interface": "v0", "mode": "native"}]
    connections = [pair.connect() for _ in range(7)]
    for connection in connections:
        connection.sendall(b"hello")
        assert connection.recv(5) == b"hello"

    def rows() -> list[dict[str, Any]]:
        return [row for row in probe.sessions(origin="own", port=7) if "packets" in row]

    # SYN, ACK, the line, and the acknowledgement of its echo; more where one was sent again
    wait_for("all sessions have their packets", lambda: [row["packets"] >= 4 for row in rows()] == [True] * 7, 5)
    assert {tuple(row["tcp_flags"]) for row in rows()} == {("SYN", "ACK", "PSH")}

    def counts() -> dict[str, int]:
        return {row["client"]: row["packets"] for row in rows()}

    def stood_still() -> dict[str, int]:
        """The counts, if two whole looks find no more: an acknowledgement may be late."""
        seen, looks = counts(), packets()["looks"]
        wait_for("more looks", lambda: packets()["looks"] >= looks + 3, 20)
        return seen if counts() == seen else {}

    before = wait_for("no more come", stood_still, 20)
    assert len(before) == 7
    first = f"{pair.plan.client}:{connections[0].getsockname()[1]}"
    connections[0].sendall(b"again")
    assert connections[0].recv(5) == b"again"
    wait_for(
        "one was active again",
        lambda: [row["client"] for row in rows() if row["packets"] > before[row["client"]]] == [first],
        5,
    )
    latest = min(rows(), key=lambda row: float(row["last_active_s"]))
    assert latest["client"] == first
    assert "LAST ACTIVE" in node.command("sessions", "--port", "7").stdout

    assert node.command("orphans").stdout == "no orphans\n"
    stray(pair, 4444)
    stray(pair, 4445, flags="S")

    def orphans() -> set[str]:
        stray(pair, 4444)
        return {json.loads(line)["client"] for line in node.command("orphans", "--json").stdout.splitlines()}

    wait_for("an orphan is seen", lambda: f"{pair.plan.client}:4444" in orphans(), 10, 0.3)
    assert not {f"{pair.plan.client}:{one.getsockname()[1]}" for one in connections} & orphans()

    def agreed() -> dict[str, Any]:
        """What it says of packets, once its last look was at the sessions that are there."""
        said = packets()
        return said if said["flows_of_sessions"] == 7 + (4445 in ports_of(probe)) else {}

    said = wait_for("the last look agrees", agreed, 20, 0.1)
    assert said["packets"] == sum(
        said[name] for name in ("counted", "unwatched", "not_ip", "other_protocol", "fragments", "malformed", "deep")
    )
    assert (said["malformed"], said["failures"]) == (0, 0)
    for connection in connections:
        connection.close()
    assert probe.stop() == 0
    with pair.network.inside("a"), Packets(["v0"]) as after:  # raises OtherProgram if ours were still there
        assert after.interfaces() == [{"interface": "v0", "mode": "native"}]


def test_orphans_are_asked_for_and_told(pair: Pair) -> None:
    """A node that holds a part of the sessions gets the traffic of all, and then has all sessions.

    For those of which it had none it is late: DPVS resets segments that find no session (test_stray_segments.py).
    """
    nobody = f"{pair.plan.sync('b')}:1"  # the other part's peer; it is waited for all the time
    b = pair.b.probe("--listen", pair.sync_address("b"), "--xdp", "v0")
    a = pair.a.probe("--peer", pair.sync_address("b"), "--peer", nobody, "--replicas", "1", "--away-timeout", "600")

    def to_b() -> dict[str, Any]:
        return next(row for row in a.peers() if row["address"] == pair.sync_address("b"))

    wait_for("b is there", lambda: to_b()["state"] == "live", 10)
    steady = pair.steady(connections=24)

    def settled() -> bool:
        b_s = to_b()
        return len(a.tuples()) == 24 and b_s["waiting"] == 0 and b_s["link"]["in_flight_frames"] == 0

    wait_for("all are settled", settled, 5)
    held = len(b.sessions(origin="a"))
    assert 0 < held < 24
    wait_for("they are in b's DPVS", lambda: len(pair.b.sessions()) == held, 20)
    pair.active("b")
    wait_for("b has all", lambda: {row["client"] for row in b.sessions(port=7)} == a_clients(a), 8, 0.1)
    assert to_b()["link"]["wanted_found"] >= 24 - held
    assert b.status()["packets"]["orphans_asked_for"] >= 24 - held
    assert steady.finish()["alive"] >= held


def a_clients(probe: Attached) -> set[str]:
    """The clients of a node's own sessions."""
    return {row["client"] for row in probe.sessions(origin="own", port=7)}


def ports_of(probe: Attached) -> set[int]:
    """Ports of the client that have a session: a SYN that nobody meant may have made one."""
    return {int(row["client"].rpartition(":")[2]) for row in probe.sessions(origin="own", port=7)}
