# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/readiness.py: when a node says that traffic may come."""

import asyncio
from pathlib import Path

import numpy as np

from replicator.readiness import ALONE_NS, OWN, Readiness
from replicator.replica import Replica, Replicas
from replicator.wire import Hello, Role
from tests.unit.simulated_node import SimulatedNode, Wire, until


def replica(name: str, *, connected: bool = True, synced: bool = False, pending: int = 0) -> Replica:
    replicas = Replicas(Hello("me", 1, Role.RECEIVER))
    made = replicas.open(Hello(name, 1, Role.SENDER, 64), None, 0)
    made.connected, made.synced = connected, synced
    made.pending.mark(np.arange(pending), 1)
    return made


def test_nothing_to_wait_for_but_our_own() -> None:
    readiness = Readiness(0)
    assert not readiness.look(1, complete=False, replicas=[])
    assert readiness.why == OWN
    assert readiness.look(2, complete=True, replicas=[])
    assert readiness.why == ""
    assert readiness.look(3, complete=False, replicas=[])  # for good


def test_every_peer_that_is_there() -> None:
    readiness = Readiness(0, origins=2)
    here = [replica("b", synced=True)]
    assert not readiness.look(1, complete=True, replicas=here)
    assert readiness.why == "1 of 2 peers have sent their sessions, 10 s more for others"
    late = replica("c")
    assert not readiness.look(2, complete=True, replicas=[*here, late])
    assert readiness.why == "the first full sync of c is under way"
    assert not readiness.look(2 * ALONE_NS, complete=True, replicas=[*here, late])  # it is there: it is waited for
    late.synced = True
    assert readiness.look(3, complete=True, replicas=[*here, late])


def test_a_node_alone() -> None:
    readiness = Readiness(7, origins=1)
    assert not readiness.look(7 + ALONE_NS - 1, complete=True, replicas=[])
    assert readiness.look(7 + ALONE_NS, complete=True, replicas=[])


def test_what_came_has_to_be_put_in() -> None:
    came = replica("b", synced=True, pending=3)
    assert Readiness(0, origins=1).look(1, complete=True, replicas=[came])
    readiness = Readiness(0, origins=1, injecting=True)
    assert not readiness.look(1, complete=True, replicas=[came])
    assert readiness.why == "3 sessions of peers are not put in yet"
    came.pending.clear()
    assert not readiness.look(2, complete=True, replicas=[came], under_way=2)
    assert readiness.why == "2 sessions of peers are not put in yet"
    assert readiness.look(3, complete=True, replicas=[came])


def test_a_node_that_returns(tmp_path: Path) -> None:
    """It is ready when it has the sessions of the one that stood in for it, and not before."""

    async def body() -> None:
        async with Wire() as wire, SimulatedNode("a", tmp_path, peers=(wire.address,)) as a:
            for slot in range(100):
                a.dpvs.create(slot, slot)
            async with SimulatedNode("b", tmp_path, peers=(a.address,)) as b:
                await until(lambda: b.node.ticks > 20)
                assert not b.node.readiness.ready
                assert (b.node.status()["ready"], b.node.status()["waiting_for"][:14]) == (False, "0 of 1 peers h")
                wire.to = b.address
                await until(lambda: b.node.readiness.ready)
                assert b.holds(a)

    asyncio.run(body())
