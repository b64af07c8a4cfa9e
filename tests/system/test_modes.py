# SPDX-License-Identifier: GPL-2.0-or-later
"""What else survives a failover: each forwarding mode and protocol that is put into a peer, and what it leaves."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.lab.backends import WHO
from tests.lab.node import Node
from tests.lab.pair import Pair
from tests.lab.process import LabError, wait_for

pytestmark = [pytest.mark.dpvs, pytest.mark.needs("bpf", "agent")]
FLOWS = 40
TRIES = 10


class Flows:
    """UDP flows, each from a port of its own; who the real server takes them for says which session carries them."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        self._sockets = sockets

    def seen_as(self) -> list[bytes]:
        """For each flow: the source that its real server sees, and which server that is. A datagram may be lost."""
        return [self._ask(flow) for flow in self._sockets]

    def _ask(self, flow: socket.socket) -> bytes:
        for _ in range(TRIES):
            flow.send(WHO)
            try:
                return flow.recv(200)
            except TimeoutError:
                continue
        raise LabError(f"no answer to {TRIES} datagrams")


@contextmanager
def udp_flows(pair: Pair, count: int) -> Iterator[Flows]:
    with ExitStack() as stack:
        with pair.network.inside("client"):
            sockets = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(count)]
        for flow in sockets:
            flow.settimeout(1)
            flow.connect((pair.plan.vip, 53))
        yield Flows(sockets)


def copies(node: Node) -> int:
    return len(node.sessions())


@pytest.mark.pair(udp_timeout_s=40)
def test_udp_flows_keep_their_session(pair: Pair) -> None:
    """QUIC is this too: the real server must go on to see the same address and port."""
    pair.replicate()
    with udp_flows(pair, FLOWS) as flows:
        before = flows.seen_as()
        assert len(set(before)) == FLOWS
        wait_for("all flows in b", lambda: copies(pair.b) == FLOWS, 15)
        assert flows.seen_as() == before
        pair.kill("a")
        pair.active("b")
        assert flows.seen_as() == before
        assert copies(pair.b) == FLOWS
        assert flows.seen_as() == before
    wait_for("b counts nothing any more", lambda: pair.b.counters().idle, 150, 0.5)
    assert copies(pair.b) == 0
    assert pair.datagram(b"a new one") == b"a new one"


@pytest.mark.pair(workers=2)
def test_udp_flows_on_two_workers(pair: Pair) -> None:
    pair.replicate()
    with udp_flows(pair, FLOWS) as flows:
        before = flows.seen_as()
        wait_for("all flows in b", lambda: copies(pair.b) == FLOWS, 15)
        pair.kill("a")
        pair.active("b")
        assert flows.seen_as() == before


def test_direct_routing(pair: Pair) -> None:
    """The real server is the one thing that a session of this mode must remember."""
    pair.replicate()
    steady = pair.steady(FLOWS, host=pair.plan.vip_dr)
    wait_for("all sessions in b", lambda: copies(pair.b) == FLOWS, 15)
    pair.kill("a")
    pair.active("b")
    wait_for("traffic on b", lambda: pair.b.counters().active == FLOWS, 20)
    report = steady.finish()
    assert report["alive"] == FLOWS, report
    assert report["corrupted"] == report["reset"] == report["stalled"] == 0, report
    wait_for("b counts nothing any more", lambda: pair.b.counters().idle, 120, 0.5)
    assert copies(pair.b) == 0


@pytest.mark.pair(workers=2)
def test_direct_routing_where_nobody_knows_the_worker(pair: Pair) -> None:
    """Without a local port only the network card knows which worker gets the packets: refused, and said."""
    pair.replicate()
    steady = pair.steady(5, host=pair.plan.vip_dr)
    probe = pair.b.attached[0]
    wait_for("refused", lambda: probe.status()["injection"]["results"].get("wrong_worker") == 5, 15)
    assert copies(pair.b) == 0
    assert steady.finish()["alive"] == 5
