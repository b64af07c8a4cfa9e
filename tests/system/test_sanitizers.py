# SPDX-License-Identifier: GPL-2.0-or-later
"""The twin and the agent in it, both built with address and undefined-behaviour sanitizers, do what they always do."""

import random

import numpy as np
import pytest

from collector.record import AF_INET, AF_INET6, DR, FNAT, NAT, RECORD, TCP, TEMPLATE, TUNNEL, UDP
from probes.agent import abi
from probes.agent.client import AgentClient, Door
from probes.target import Target
from tests.lab.churn import Churn
from tests.lab.node import Node
from tests.lab.pair import Pair
from tests.lab.process import wait_for
from tests.lab.records import churn, fnat_records
from tests.lab.services import address
from tests.lab.twin import build_sanitized

pytestmark = [pytest.mark.needs("bpf", "agent", "twin"), pytest.mark.slow, pytest.mark.timeout(600)]
CONNECTIONS = 20
KINDS = ("fnat6", "fnat64", "dr6", "nat", "tunnel", "tunnel64")
FAMILIES = ((AF_INET, AF_INET), (AF_INET6, AF_INET6), (AF_INET6, AF_INET))
COMPLAINTS = ("AddressSanitizer", "runtime error", "UndefinedBehaviorSanitizer")


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build_sanitized()


def assert_clean(node: Node) -> None:
    said = (node.directory / "dpvs.out").read_text(errors="replace")
    assert not [word for word in COMPLAINTS if word in said], said[-4000:]


def nonsense(node: Node, requests: int) -> None:
    """Hand the agent records that are none, and requests that are none."""
    rng = random.Random(7)
    with Target.open(node.pid) as target:
        door = Door.find(target)
        assert door is not None
        client = AgentClient(target, node.layout, node.control, door)
        for _ in range(requests):
            count = rng.randint(1, abi.MAX_RECORDS)
            records = np.frombuffer(rng.randbytes(count * RECORD.itemsize), RECORD).copy()
            records["af"], records["af_out"] = rng.choice(FAMILIES)
            records["proto"], records["fwdmode"] = rng.choice((TCP, UDP)), rng.choice((NAT, TUNNEL, DR, FNAT))
            templates = rng.randint(0, count)
            for name in ("cport", "lport", "dport"):
                records[name][:templates] = 0
            records["flags"][:templates] |= TEMPLATE
            ops = np.frombuffer(rng.randbytes(count), np.uint8) % (max(abi.RecordOp) + 1)
            request = client.submit(ops.astype(np.uint8), records)
            wait_for("results", lambda request=request: client.results(request) is not None, 10)  # type: ignore[misc]
        client.hello()
        churn(client, fnat_records(node.plan, 40_600)[40_000:], 2, np.random.default_rng(7))  # ports nobody has yet


@pytest.mark.pair(sanitized=True, workers=2, kinds=KINDS, persistent_s=20)
def test_a_failover_with_churn_and_nonsense(pair: Pair) -> None:
    pair.replicate(both=True)
    others = [pair.connect(host=address(pair.plan, kind)) for kind in KINDS]
    steady = pair.steady(CONNECTIONS)
    with Churn(pair.network.path("client"), pair.plan.vip, 7) as churn:
        for _ in range(5):
            churn.open(40)
            churn.close(30)
        nonsense(pair.b, 30)
        churn.close(1000, ("close",))
    wait_for("copies in b", lambda: len(pair.b.sessions()) >= CONNECTIONS + len(KINDS), 20)
    for active, other in (("b", "a"), ("a", "b")):  # those that talk change hands
        pair.active(active)
        talking = CONNECTIONS if active == "b" else CONNECTIONS + len(KINDS)
        wait_for(f"traffic on {active}", lambda: pair.nodes[active].counters().active == talking, 20)  # noqa: B023
        left = CONNECTIONS + len(KINDS) - talking
        wait_for(f"{other} gives way", lambda: pair.nodes[other].counters().active == left, 20)  # noqa: B023
    pair.kill("a")
    pair.active("b")
    for connection in others:
        connection.sendall(b"still here\n")
        assert connection.recv(100) == b"still here\n"
    wait_for("traffic on b", lambda: pair.b.counters().active == CONNECTIONS + len(KINDS), 30)
    for connection in others:
        connection.close()
    report = steady.finish()
    assert report["alive"] == CONNECTIONS, report
    assert report["corrupted"] == 0, report
    assert pair.b.attached[0].stop() == 0
    wait_for("b counts nothing any more", lambda: pair.b.counters().idle, 90, 0.5)
    assert pair.b.alive
    assert_clean(pair.b)
    assert_clean(pair.a)
