# SPDX-License-Identifier: GPL-2.0-or-later
"""Three nodes of which two carry on the same sessions of the third at the same moment: all come to the same end.

The third node stands beside b, in its namespace, and gets no packets: that its DPVS has a session is said to its agent.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from probes.agent.abi import Code, RecordOp
from probes.agent.client import AgentClient, Door
from probes.target import Target
from tests.lab.net import Network
from tests.lab.node import Node
from tests.lab.pair import Pair, hugepages_for
from tests.lab.process import wait_for
from tests.lab.records import Records, answers, fnat_records
from tests.lab.run import Run
from tests.lab.twin import TwinNode

pytestmark = pytest.mark.needs("bpf", "agent")
SESSIONS = 211
AT = {"a": ("a", 7777), "b": ("b", 7777), "c": ("b", 7778)}  # namespace and port of each


class Beside(TwinNode):
    """A twin without packets in the namespace of node b."""

    def argv(self) -> list[str | Path]:
        return [word for word in super().argv() if not str(word).startswith("--vdev")]


class InB:
    """The network, for a node that has no namespace of its own."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def enter_in_child(self, _host: str) -> Any:
        return self._network.enter_in_child("b")


@pytest.fixture
def nodes(pair: Pair, lab_run: Run) -> Iterator[dict[str, Node]]:
    """All three, each attached and with links to the two others."""
    lab_run.grow(hugepages_for("twin", 1))
    c = Beside(lab_run, InB(pair.network), "c", pair.settings)  # type: ignore[arg-type]
    nodes: dict[str, Node] = {**pair.nodes, "c": c}
    addresses = {name: pair.sync_address(*at) for name, at in AT.items()}
    try:
        c.start(pair.services())
        for name, node in nodes.items():
            peers = [word for other in nodes if other != name for word in ("--peer", addresses[other])]
            node.probe("--listen", addresses[name], *peers)
        yield nodes
    finally:
        c.close()


def ask(node: Node, op: RecordOp, records: Records) -> set[Code]:
    """What a node's agent answers to an operation on each record."""
    with Target.open(node.pid) as target:
        door = Door.find(target)
        assert door is not None
        client = AgentClient(target, node.layout, node.control, door)
        return {Code(code) for code in answers(client, int(op), records).tolist()}


def held(node: Node) -> tuple[int, int]:
    """Own sessions and copies."""
    said = node.attached[-1].status()["sessions"]
    return said["own"], said["copies"]


def yielded(node: Node) -> int:
    return int(node.attached[-1].status()["injection"]["contested"]["yielded"])


def test_two_of_three_claim_the_same(pair: Pair, nodes: dict[str, Node]) -> None:
    a, b, c = nodes.values()
    records = fnat_records(pair.plan, SESSIONS)
    records["timeout_ms"] = 600_000
    assert ask(a, RecordOp.UPSERT, records) == {Code.CREATED}
    assert ask(a, RecordOp.CLAIM, records) == {Code.LIVE}
    wait_for("copies in both", lambda: held(b) == held(c) == (0, SESSIONS), 30)
    for node in (b, c):
        node.attached[-1].pause()
    for node in (b, c):
        assert ask(node, RecordOp.CLAIM, records) == {Code.LIVE}
        assert node.counters().active == SESSIONS
    for node in (b, c):
        node.attached[-1].resume()

    def settled() -> bool:
        own, copies = zip(*(held(node) for node in nodes.values()), strict=True)
        return own[0] == 0 and sum(own) == SESSIONS and all(sum(h) == SESSIONS for h in zip(own, copies, strict=True))

    # Before all three have heard of both claims it looks settled, too: the one that has not looked yet has copies.
    wait_for("a gave way to the one", lambda: yielded(a) >= SESSIONS, 60)
    wait_for("one of the two gave way to the other", lambda: yielded(b) + yielded(c) >= SESSIONS, 60)
    wait_for("each session is one node's", settled, 60)
    tuples = [node.attached[-1].tuples() for node in (b, c)]
    assert not tuples[0] & tuples[1]
    assert len(tuples[0] | tuples[1]) == SESSIONS

    def counted() -> bool:  # DPVS is told after the tables have agreed
        counters = {node: node.counters() for node in nodes.values()}
        return all((counters[node].active, counters[node].inactive) == held(node) for node in counters)

    wait_for("DPVS counts them so", counted, 20)
    assert settled(), "it stays like that"
