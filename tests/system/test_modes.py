# SPDX-License-Identifier: GPL-2.0-or-later
"""What survives a failover: each forwarding mode, family and protocol, on one worker and on two; and what cannot."""

import dataclasses
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP

from collector.record import DR
from probes.agent import abi
from probes.agent.client import AgentClient, Door
from probes.target import Target
from tests.conftest import demand
from tests.kinds.outcomes import SURVIVES, name, record
from tests.lab.node import Settings
from tests.lab.pair import Pair, memory_mib
from tests.lab.process import wait_for
from tests.lab.records import answers, fnat_records, packed
from tests.lab.services import ECHO, KINDS, address
from tests.system.kinds import PROTOCOLS, Case, failover, refused

pytestmark = [pytest.mark.dpvs, pytest.mark.needs("bpf", "agent")]
SETTINGS = Settings(kinds=tuple(KINDS), port_pools=2, udp_timeout_s=12, udp_oneway_s=12)
REFUSED = "refused, `unsupported`"
NEVER = ("SNAT", "one-packet UDP", "IPv4 to IPv6", "direct routing, IPv6 to IPv4", "NAT, IPv6 to IPv4")
LIMIT, TOO_MANY = 5, 7  # connections of each real server: that the standby takes, that the active node has
NAT_CONNECTIONS = 7
TCP_ONLY = ("tcp",)
UPSERT, DELETE, CHECK, YIELD, CLAIM = (
    int(abi.RecordOp[name]) for name in ("UPSERT", "DELETE", "CHECK", "YIELD", "CLAIM")
)
_played: dict[tuple[str, str], tuple[dict[Case, str], dict[str, str]]] = {}
Play = Callable[[Settings], tuple[dict[Case, str], dict[str, str]]]


@pytest.fixture
def play(lab_run: Any, lab_pages: Any, pair_kind: str) -> Play:
    """Call it for what became of each case, and of what is refused; played once, when the first asks for it."""

    def once(settings: Settings) -> tuple[dict[Case, str], dict[str, str]]:
        key = (pair_kind, str(settings))
        if key not in _played:
            demand(pair_kind)
            lab_pages(pair_kind)
            settings = dataclasses.replace(settings, memory_mib=memory_mib(pair_kind))
            with Pair(lab_run, kind=pair_kind, settings=settings) as pair:
                pair.replicate()
                never = refused(pair, pair.b)
                _played[key] = failover(pair, settings.workers, TCP_ONLY if settings.synproxy else (*PROTOCOLS,)), never
        return _played[key]

    return once


@pytest.mark.parametrize("proto", PROTOCOLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [1, 2])
def test_survives(play: Play, pair_kind: str, kind: str, proto: str, workers: int) -> None:
    outcomes, _ = play(dataclasses.replace(SETTINGS, workers=workers))
    record(pair_kind, name(kind, proto, workers), outcomes[kind, proto])
    assert outcomes[kind, proto] == SURVIVES


@pytest.mark.parametrize("what", NEVER)
def test_is_refused(play: Play, pair_kind: str, what: str) -> None:
    _, never = play(SETTINGS)
    record(pair_kind, what, never[what])
    assert never[what] == REFUSED


@pytest.mark.parametrize("workers", [1, 2])
def test_behind_a_syn_proxy(play: Play, pair_kind: str, workers: int) -> None:
    """The handshake was the load balancer's: each segment's numbers are moved in both directions."""
    case = f"FullNAT TCP behind a SYN proxy, {workers} worker{'s' * (workers - 1)}"
    soon = dict.fromkeys(("fin_wait", "time_wait", "close_wait", "last_ack"), 2)
    settings = Settings(kinds=("fnat", "fnat6", "fnat64"), synproxy=True, workers=workers, timeouts=soon)
    outcomes, _ = play(settings)
    record(pair_kind, case, "; ".join({outcomes[kind, "tcp"] for kind in settings.kinds}))
    assert {kind: outcomes[kind, "tcp"] for kind in settings.kinds} == dict.fromkeys(settings.kinds, SURVIVES)


def test_a_limit_is_kept(pair: Pair) -> None:
    """Copies fill the real servers' limits to the last place and no further, and afterwards all places are free."""
    service = next(s for s in pair.services() if (s.address, s.port) == (pair.plan.vip, ECHO))
    pair.replicate()
    pair.b.limit(service, LIMIT)
    servers = len(service.servers)
    connections = [pair.connect() for _ in range(TOO_MANY * servers)]
    probe = pair.b.attached[0]
    name_ = f"tcp {service.key}"

    def counted() -> set[tuple[int, int]]:
        return {(s.active, s.inactive) for s in pair.b.counters().servers if s.service == name_}

    over = (TOO_MANY - LIMIT) * servers
    wait_for("all places taken", lambda: counted() == {(0, LIMIT)}, 20)
    wait_for("the rest refused", lambda: probe.status()["injection"]["results"].get("overload", 0) >= over, 20)
    pair.kill("a")
    pair.active("b")
    alive = [connection for connection in connections if _answers(connection)]
    assert len(alive) == LIMIT * servers
    assert counted() == {(LIMIT, 0)}
    with pytest.raises(OSError):
        pair.connect(timeout=1.5)
    for connection in connections:
        connection.close()
    wait_for("b counts nothing any more", lambda: pair.b.counters().idle, 60, 0.3)
    fresh = [pair.connect() for _ in range(LIMIT * servers)]
    assert all(_answers(connection) for connection in fresh)
    assert counted() == {(LIMIT, 0)}
    for connection in fresh:
        connection.close()


@pytest.mark.pair(workers=2)
def test_one_worker_that_cannot_have_a_copy_speaks_for_all(pair: Pair) -> None:
    """A session without a local port is put in everywhere or nowhere."""
    pair.active("b")
    pair.b.probe("--listen", pair.sync_address("b"))
    own = pair.connect(host=pair.plan.vip_dr)  # on one of the workers, nobody knows which
    assert _answers(own)
    records = fnat_records(pair.plan, 2)
    records["fwdmode"], records["vaddr"], records["daddr"] = DR, packed(pair.plan.vip_dr), packed(pair.plan.servers[0])
    records["caddr"][0] = packed(own.getsockname()[0])
    records["cport"][0] = own.getsockname()[1]
    records["laddr"], records["lport"] = records["caddr"], records["cport"]

    def copies() -> list[bytes]:
        rows = pair.b.sessions()
        return sorted(row["state"] for row in rows if row["cport"] == records["cport"][1])

    with Target.open(pair.b.pid) as target:
        door = Door.find(target)
        assert door is not None
        client = AgentClient(target, pair.b.layout, pair.b.control, door)
        assert answers(client, UPSERT, records).tolist() == [abi.Code.FOREIGN, abi.Code.CREATED]
        assert len(pair.b.sessions()) == 1 + 2  # its own, and the other record's on two workers
        assert answers(client, CHECK, records).tolist() == [abi.Code.FOREIGN, abi.Code.WAITING]
        assert answers(client, UPSERT, records).tolist() == [abi.Code.FOREIGN, abi.Code.UPDATED]
        # Nobody knows which of its copies will get the packets: one is claimed, and all stay.
        assert answers(client, CLAIM, records[1:]).tolist() == [abi.Code.LIVE]
        assert copies() == [b"SYNACK", b"TCP_EST"]
        assert answers(client, CLAIM, records[1:]).tolist() == [abi.Code.LIVE]
        assert answers(client, CHECK, records[1:]).tolist() == [abi.Code.WAITING]
        assert answers(client, UPSERT, records[1:]).tolist() == [abi.Code.LIVE]
        assert answers(client, DELETE, records[1:]).tolist() == [abi.Code.LIVE]
        assert copies() == [b"SYNACK", b"TCP_EST"]
        assert (pair.b.counters().active, pair.b.counters().inactive) == (2, 1)
        assert answers(client, YIELD, records[1:]).tolist() == [abi.Code.YIELDED]
        assert (pair.b.counters().active, pair.b.counters().inactive) == (1, 2)
        assert copies() == [b"SYNACK", b"SYNACK"]
        assert answers(client, DELETE, records).tolist() == [abi.Code.FOREIGN, abi.Code.DELETED]
        assert answers(client, DELETE, records).tolist() == [abi.Code.FOREIGN, abi.Code.ABSENT]
    assert _answers(own)
    assert len(pair.b.sessions()) == 1
    own.close()


@pytest.mark.pair(workers=2, kinds=("nat",))
def test_the_copy_that_waits_for_the_client_stays(pair: Pair) -> None:
    """What a real server sends by itself may come to another worker than what its client sends. The copy there is live
    then, but the one that the client's packets will come to is needed as well, until they come.
    """
    pair.replicate()
    connections = [pair.connect(host=address(pair.plan, "nat")) for _ in range(NAT_CONNECTIONS)]
    assert all(_answers(connection) for connection in connections)
    rows = pair.a.sessions()
    probe = pair.b.attached[0]

    def states() -> Counter[bytes]:
        return Counter(bytes(row["state"]).rstrip(b"\0") for row in pair.b.sessions())

    wait_for("copies on both workers", lambda: states() == {b"SYNACK": 2 * len(rows)}, 20)
    pair.network.gate(is_open=False, hosts=("client",))
    pair.kill("a")
    pair.active("b")
    with pair.network.inside("server"):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with raw:
        for row in rows:
            server, client = (socket.inet_ntoa(row[name].tobytes()[:4]) for name in ("daddr", "caddr"))
            segment = IP(src=server, dst=client) / TCP(sport=int(row["dport"]), dport=int(row["cport"]), flags="A")
            raw.sendto(bytes(segment), (client, 0))
    half = {b"TCP_EST": len(rows), b"SYNACK": len(rows)}
    wait_for("the real servers' packets", lambda: states() == half, 20)
    looked = probe.status()["injection"]["results"].get("waiting", 0)
    enough = looked + 2 * len(rows)
    wait_for("looks at them", lambda: probe.status()["injection"]["results"].get("waiting", 0) >= enough, 30)
    assert states() == half
    pair.network.gate(is_open=True, hosts=("client",))
    assert all(_answers(connection) for connection in connections)
    wait_for("one of each", lambda: states() == {b"TCP_EST": len(rows)}, 30)
    assert (pair.b.counters().active, pair.b.counters().inactive) == (len(rows), 0)
    assert all(_answers(connection) for connection in connections)
    for connection in connections:
        connection.close()


def _answers(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"still here\n")
        return connection.recv(100) == b"still here\n"
    except OSError:
        return False
