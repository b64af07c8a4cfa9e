# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose a session is, as routes move with both nodes alive, and as a node dies and returns."""

import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import pytest

from probes.agent.abi import Code, RecordOp
from probes.agent.client import AgentClient, Door
from probes.memory import SessionPool
from probes.target import Target
from tests.lab.backends import WHO
from tests.lab.node import Attached, Node
from tests.lab.pair import Pair
from tests.lab.process import LabError, wait_for
from tests.lab.records import answers, fnat_records
from tests.lab.twin import TwinNode

pytestmark = pytest.mark.needs("bpf", "agent")
CONNECTIONS, IDLE = 40, 10
LIFETIME_S = 6  # of an idle connection
PORT = 23456
MANY = int(os.environ.get("DPVS_PROBE_FAILOVER_SESSIONS", "2000"))
TALKING = 200
POOL = 1 << 17
FOLLOWED = ("lport", "fnat_seq_isn", "fnat_seq_delta", "fnat_seq_fdata_seq", "wscale_vs", "wscale_rs")


def probe(node: Node) -> Attached:
    """What is attached to a node now."""
    return node.attached[-1]


def own(node: Node) -> int:
    return int(probe(node).status()["sessions"]["own"])


def copies(node: Node) -> int:
    return int(probe(node).status()["sessions"]["copies"])


def has_all(pair: Pair, owner: str, count: int, timeout: float = 20) -> None:
    """Wait until ``owner`` says of all sessions that they are its own, and the other holds a copy of each."""
    here, there = pair.nodes[owner], pair.nodes["b" if owner == "a" else "a"]

    def settled() -> bool:
        return (own(here), copies(here), own(there), copies(there)) == (count, 0, 0, count)

    try:
        wait_for(f"all sessions are {owner}'s", settled, timeout)
    except Exception:
        seen = [(node.name, own(node), copies(node), probe(node).status()["injection"]) for node in (here, there)]
        raise AssertionError(seen) from None


@pytest.mark.dpvs
@pytest.mark.pair(established_timeout_s=LIFETIME_S)
def test_routes_that_move_and_come_back(pair: Pair) -> None:
    """The node that they left keeps nothing that could end badly: DPVS resets what is ESTABLISHED as it expires."""
    pair.replicate(both=True)
    with pair.resets("client") as at_client, pair.resets("server") as at_server:
        steady = pair.steady(CONNECTIONS)
        has_all(pair, "a", CONNECTIONS)
        for active in ("b", "a", "b"):
            pair.active(active)
            has_all(pair, active, CONNECTIONS)
            assert pair.nodes[active].counters().active == CONNECTIONS
            other = pair.nodes["a" if active == "b" else "b"].counters()
            assert (other.active, other.inactive) == (0, CONNECTIONS)
        time.sleep(2 * LIFETIME_S)
        assert copies(pair.a) == CONNECTIONS, "the copies in the node that was left are refreshed"
        report = steady.finish()
        assert report["alive"] == CONNECTIONS, report
        assert report["corrupted"] == 0, report
        assert at_client.total == at_server.total == 0, (at_client.resets, at_server.resets)
    wait_for("nothing is left", lambda: pair.a.counters().idle and pair.b.counters().idle, 120, 0.5)
    assert probe(pair.a).status()["injection"]["contested"]["yielded"] >= CONNECTIONS


@pytest.mark.dpvs
def test_routes_that_move_while_the_nodes_cannot_talk(pair: Pair) -> None:
    """Both have all sessions as their own then. When they hear of each other, it is the one that has the packets."""
    pair.replicate(both=True)
    steady = pair.steady(CONNECTIONS, interval=0.05)
    has_all(pair, "a", CONNECTIONS)
    pair.network.set_link("a", "s0", False)
    pair.active("b")
    wait_for("they are b's", lambda: own(pair.b) == CONNECTIONS, 20)
    assert own(pair.a) == CONNECTIONS
    pair.network.set_link("a", "s0", True)
    has_all(pair, "b", CONNECTIONS)
    report = steady.finish()
    assert report["alive"] == CONNECTIONS, report
    assert report["corrupted"] == 0, report


@pytest.mark.dpvs
def test_udp_flows_that_move_and_come_back(pair: Pair) -> None:
    """They have no sequence numbers that could tell who saw them last."""
    pair.replicate(both=True)
    with ExitStack() as stack:
        with pair.network.inside("client"):
            flows = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(CONNECTIONS)]
        for flow in flows:
            flow.settimeout(1)
            flow.connect((pair.plan.vip, 53))
        before = [seen_as(flow) for flow in flows]
        has_all(pair, "a", CONNECTIONS)
        for active in ("b", "a"):
            pair.active(active)
            assert [seen_as(flow) for flow in flows] == before
            has_all(pair, active, CONNECTIONS)


@pytest.mark.dpvs
@pytest.mark.pair(workers=2)
def test_a_node_that_returns_gets_everything_back(pair: Pair) -> None:
    """a dies, b carries on, new ones come to b; a returns empty, is given all, and takes over; b dies. Some connections
    say nothing all that while.
    """
    pair.replicate(both=True)
    idle = pair.steady(IDLE, interval=600)
    old = pair.steady(CONNECTIONS)
    has_all(pair, "a", CONNECTIONS + IDLE)
    pair.kill("a")
    probe(pair.a).process.wait(60)
    pair.active("b")
    wait_for("those that talk are b's", lambda: own(pair.b) == CONNECTIONS, 20)
    new = pair.steady(CONNECTIONS)
    wait_for("the new ones are b's", lambda: own(pair.b) == 2 * CONNECTIONS, 20)
    pair.start("a")
    pair.a.probe("--listen", pair.sync_address("a"), "--peer", pair.sync_address("b"))
    has_all(pair, "b", 2 * CONNECTIONS + IDLE)
    assert pair.b.counters().active == 2 * CONNECTIONS + IDLE
    pair.active("a")
    wait_for("those that talk are a's", lambda: (own(pair.a), own(pair.b)) == (2 * CONNECTIONS, IDLE), 20)
    assert copies(pair.a) == IDLE
    pair.kill("b")
    for steady, count in ((idle, IDLE), (old, CONNECTIONS), (new, CONNECTIONS)):
        report = steady.finish()
        assert report["alive"] == count, report
        assert report["corrupted"] == 0, report
    wait_for("a counts nothing any more", lambda: pair.a.counters().idle, 120, 0.5)


@pytest.mark.dpvs
def test_addresses_that_come_with_the_promotion(pair: Pair) -> None:
    """VRRP: node b has neither addresses nor services while it stands by."""
    pair.kill("b")
    pair.b.start(None)
    pair.replicate(both=True, extra=("--policy", "promote"))
    steady = pair.steady(CONNECTIONS, stall=20)
    wait_for("b knows them", lambda: probe(pair.b).status()["sessions"]["of_peers"] == {"a": CONNECTIONS}, 15)
    assert (copies(pair.b), probe(pair.b).status()["injection"]["role"]) == (0, "standby")
    assert pair.b.command("ready", "--wait", "50").stdout == "ready, standby\n"
    assert [row["note"] for row in probe(pair.b).peers() if row["direction"] == "from"] == ["standby"]
    pair.kill("a")
    early = pair.b.command("promote", "--wait", "0")
    assert early.returncode == 1
    assert f"refused: {CONNECTIONS} no_service" in early.stdout
    pair.b.configure(pair.services())
    done = pair.b.command("promote")
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith(f"{CONNECTIONS} sessions of peers are in DPVS, after ")
    pair.active("b")
    wait_for("traffic on b", lambda: own(pair.b) == CONNECTIONS, 40)
    report = steady.finish()
    assert report["alive"] == CONNECTIONS, report
    assert pair.b.command("demote").returncode == 0
    assert probe(pair.b).status()["injection"]["role"] == "standby"


@pytest.mark.dpvs
def test_demotion_takes_out_what_waits(pair: Pair) -> None:
    pair.replicate(both=True, extra=("--policy", "promote"))
    with pair.resets("client") as at_client:
        steady = pair.steady(CONNECTIONS)
        wait_for("b knows them", lambda: probe(pair.b).status()["sessions"]["of_peers"] == {"a": CONNECTIONS}, 15)
        for _ in range(2):
            assert f"{CONNECTIONS} sessions" in pair.b.command("promote").stdout
            assert len(pair.b.sessions()) == CONNECTIONS
            assert pair.b.command("demote").stdout.startswith("0 sessions")
            assert len(pair.b.sessions()) == 0
        assert pair.b.counters().idle
        assert steady.finish()["alive"] == CONNECTIONS
        assert at_client.total == 0


def seen_as(flow: socket.socket) -> bytes:
    """The source that the real server of a UDP flow sees, and which server it is. A datagram may be lost."""
    for _ in range(10):
        flow.send(WHO)
        try:
            return flow.recv(200)
        except TimeoutError:
            continue
    raise LabError("no answer to 10 datagrams")


def in_memory(node: Node, port: int) -> list[dict[str, int]]:
    """What a copy has of its original: the sessions of a client port, from the memory of a node's DPVS."""
    with Target.open(node.pid) as target, SessionPool.open(target, node.layout) as pool:
        conns, _ = pool.read(np.flatnonzero(pool.live()))
        return [{name: int(conn[name]) for name in FOLLOWED} for conn in conns[conns["cport"] == port]]


@pytest.mark.dpvs
def test_a_client_port_that_is_used_again(pair: Pair) -> None:
    """DPVS takes the session in TIME_WAIT up again: the same slot and tuple, and new sequence numbers."""
    pair.replicate(both=True)
    seen = []
    for _ in range(3):
        with pair.connect(80, source_port=PORT) as connection:

            def alike() -> list[dict[str, int]]:
                original = in_memory(pair.a, PORT)
                return original if len(original) == 1 and original == in_memory(pair.b, PORT) else []

            (copy,) = wait_for("the same in b", alike, 10)  # read once: a trial session is taken out again
            seen.append(copy["fnat_seq_fdata_seq"])
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            while connection.recv(65536):
                pass
        wait_for("none in b: its original is over", lambda: not in_memory(pair.b, PORT), 10)
    assert len(set(seen)) == 3
    assert len(in_memory(pair.a, PORT)) == 1, "all three were one session of DPVS"


def test_what_the_standby_drops_by_itself_comes_back(pair: Pair) -> None:
    pair.replicate(both=True)
    steady = pair.steady(CONNECTIONS)
    wait_for("copies in b", lambda: len(pair.b.sessions()) == CONNECTIONS, 10)
    assert isinstance(pair.b, TwinNode)
    probe(pair.b).pause()  # it puts back at once what it misses as it looks
    pair.b.tell("flush")
    assert len(pair.b.sessions()) < CONNECTIONS
    probe(pair.b).resume()
    wait_for("copies in b again", lambda: len(pair.b.sessions()) == CONNECTIONS, 25)
    assert steady.finish()["alive"] == CONNECTIONS


def fill(pair: Pair) -> None:
    """Idle connections of node a, as many as it is to have."""
    if isinstance(pair.a, TwinNode):
        pair.a.tell(f"synthesize {MANY} 0 600000")
        return
    records = fnat_records(pair.plan, MANY)  # put in, and declared to be what they look like
    records["timeout_ms"] = 600_000
    with Target.open(pair.a.pid) as target:
        door = Door.find(target)
        assert door is not None
        client = AgentClient(target, pair.a.layout, pair.a.control, door)
        for op, code in ((RecordOp.UPSERT, Code.CREATED), (RecordOp.CLAIM, Code.LIVE)):
            assert set(answers(client, int(op), records).tolist()) == {code}


@pytest.mark.dpvs
@pytest.mark.pair(pool=POOL, established_timeout_s=600)
def test_many(pair: Pair, record_property: Callable[[str, object], None]) -> None:
    """Idle connections and some that talk are taken over. DPVS_PROBE_FAILOVER_SESSIONS says how many are idle."""
    pair.replicate(both=True)
    fill(pair)
    steady = pair.steady(TALKING, interval=0.05)
    wait_for("copies of all in b", lambda: copies(pair.b) == MANY + TALKING, 120)
    killed = time.monotonic()
    pair.kill("a")
    pair.active("b")
    wait_for("traffic on b", lambda: pair.b.counters().active > 0, 20, 0.001)
    first_ms = 1000 * (time.monotonic() - killed)
    wait_for("all that talk are b's", lambda: own(pair.b) == TALKING, 30)
    report = steady.finish()
    assert report["alive"] == TALKING, report
    assert report["corrupted"] == 0, report
    figures = f"{MANY} idle: first packet after {first_ms:.0f} ms, longest pause {report['longest_gap_ms']} ms"
    record_property("failover", figures)
    print(figures)
