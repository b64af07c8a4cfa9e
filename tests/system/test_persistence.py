# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients of a persistent service stay with their real server through a failover: their ties go over with them."""

import socket
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import pytest

from collector.record import HASHED, INJECTED, TEMPLATE
from probes.memory import SessionPool
from probes.target import Target
from tests.kinds.outcomes import SURVIVES, record
from tests.lab.node import Node
from tests.lab.pair import Pair
from tests.lab.process import LabError, wait_for
from tests.lab.services import DATAGRAM, ECHO, address

pytestmark = [pytest.mark.dpvs, pytest.mark.needs("bpf", "agent")]
KINDS, FULLNAT = ("fnat", "fnat6", "fnat64", "nat", "dr6"), 3
FRESH = 5  # connections of a client; more than there are real servers
PERSISTENT_S = 6
TIES = {socket.SOCK_STREAM: ECHO, socket.SOCK_DGRAM: DATAGRAM}


@dataclass(frozen=True)
class Template:
    """One in a DPVS's table."""

    proto: int
    virtual: bytes
    server: bytes
    copy: bool
    controlled: int  # sessions
    counted: int  # persistent connections of its real server, on that worker

    @property
    def tie(self) -> tuple[int, bytes, bytes]:
        return self.proto, self.virtual, self.server


def templates(node: Node) -> list[Template]:
    """As the memory of a node's DPVS has them."""
    layout = node.layout

    def number(row: bytes, name: str) -> int:
        offset, size = layout.field("dp_vs_conn", name)
        return int.from_bytes(row[offset : offset + size], "little")

    def address_in(row: bytes, name: str, family: int) -> bytes:
        offset = layout.offset("dp_vs_conn", name)
        return row[offset : offset + (4 if family == socket.AF_INET else 16)]

    found = []
    with Target.open(node.pid) as target, SessionPool.open(target, layout) as pool:
        for raw in pool.raw(pool.live().nonzero()[0]):
            row = raw.tobytes()
            flags = number(row, "flags")
            if flags & (HASHED | TEMPLATE) != HASHED | TEMPLATE:
                continue
            dest = number(row, "dest")
            inside = int.from_bytes(target.read(dest + layout.offset("dp_vs_dest", "af"), 4), "little")
            counted = int.from_bytes(target.read(dest + layout.offset("dp_vs_dest", "persistconns"), 4), "little")
            found.append(
                Template(
                    number(row, "proto"), address_in(row, "vaddr", number(row, "af")),
                    address_in(row, "daddr", inside), bool(flags & INJECTED), number(row, "n_control"), counted,
                )
            )  # fmt: skip
    return found


def ties(node: Node) -> Counter[tuple[int, bytes, bytes]]:
    return Counter(template.tie for template in templates(node))


def _open(pair: Pair, kind: str, sort: int, stack: ExitStack) -> socket.socket:
    where = address(pair.plan, kind)
    with pair.network.inside("client"):
        made = socket.socket(socket.AF_INET6 if ":" in where else socket.AF_INET, sort)
    stack.callback(made.close)
    made.settimeout(30)
    made.connect((where, TIES[socket.SocketKind(sort)]))
    _exchange(made)
    return made


def _exchange(connection: socket.socket) -> None:
    connection.sendall(b"still here\n")
    assert connection.recv(100) == b"still here\n"


def _servers(node: Node) -> dict[tuple[int, bytes], set[bytes]]:
    """Which real servers the sessions of a node have, by protocol and virtual address."""
    found: dict[tuple[int, bytes], set[bytes]] = {}
    for row in node.sessions():
        outside, inside = (4 if row[name] == socket.AF_INET else 16 for name in ("in_af", "out_af"))
        key = int(row["proto"]), row["vaddr"].tobytes()[:outside]
        found.setdefault(key, set()).add(row["daddr"].tobytes()[:inside])
    return found


@pytest.mark.pair(
    kinds=KINDS, persistent_s=PERSISTENT_S, workers=2, udp_timeout_s=30, udp_oneway_s=30, timeouts={"time_wait": 1}
)
def test_the_tie_survives(pair: Pair, pair_kind: str) -> None:
    with ExitStack() as stack:
        pair.replicate()
        old = [_open(pair, kind, sort, stack) for kind in KINDS for sort in TIES]
        before = ties(pair.a)
        assert len(before) == len(KINDS) * len(TIES)
        assert set(before.values()) == {1}
        wait_for("all ties on b", lambda: ties(pair.b) == before, 20, 0.2)
        # One copy of what has a local port, one on each worker of the rest.
        copies = [1] * 2 * FULLNAT + [2] * 2 * (len(KINDS) - FULLNAT)
        wait_for("all sessions on b", lambda: sorted(o.controlled for o in templates(pair.b)) == copies, 20, 0.2)
        assert all(one.copy and one.counted > 0 for one in templates(pair.b))
        pair.kill("a")
        pair.active("b")
        for connection in old:
            _exchange(connection)
        for kind in KINDS:
            for sort in TIES:
                for _ in range(FRESH):
                    _open(pair, kind, sort, stack)
        servers = _servers(pair.b)
        wanted = {(proto, virtual): {server} for proto, virtual, server in before}
        assert {key: servers.get(key) for key in wanted} == wanted, "a client has another real server now"
        assert ties(pair.b) == before
        record(pair_kind, "sessions of a persistent service, and the tie of its clients", SURVIVES)
    if pair_kind == "dpvs":  # it takes its time: at least that which copies are given while their owner lives
        with suppress(LabError):
            wait_for("no ties left on b", lambda: not templates(pair.b), 60, 0.5)
        assert (templates(pair.b), pair.b.sessions().tolist()) == ([], [])
        wait_for("b counts nothing any more", lambda: pair.b.counters().idle, 30, 0.3)


@pytest.mark.pair(persistent_s=6, udp_timeout_s=6, udp_oneway_s=6)
def test_a_tie_goes_when_its_owner_s_does(pair: Pair) -> None:
    """Also one that controls no session any more, and stays until then."""
    pair.replicate()
    with ExitStack() as stack:
        _open(pair, "fnat", socket.SOCK_DGRAM, stack)
    wait_for("the tie on b", lambda: len(templates(pair.b)) == 1, 10, 0.1)
    wait_for("the tie has ended on a", lambda: not templates(pair.a), 20, 0.1)
    wait_for("and on b", lambda: not templates(pair.b), 5, 0.1)
    assert pair.b.counters().idle


@pytest.mark.pair(kinds=("fnat", "dr6"), persistent_s=60, workers=2, udp_timeout_s=2, udp_oneway_s=2)
def test_ties_come_back(pair: Pair) -> None:
    """a dies, b carries on, a returns empty and gets all ties from b, also that of a client without any session;
    and its clients are still tied when it takes over again.
    """

    def idle(node: Node) -> int:
        return sum(one.controlled == 0 for one in templates(node))

    pair.replicate(both=True)
    with ExitStack() as stack:
        old = [_open(pair, "fnat", socket.SOCK_STREAM, stack), _open(pair, "dr6", socket.SOCK_STREAM, stack)]
        with ExitStack() as soon:
            _open(pair, "fnat", socket.SOCK_DGRAM, soon)
        before = ties(pair.a)
        assert len(before) == 3
        wait_for("all ties on b, one without a session", lambda: (ties(pair.b), idle(pair.b)) == (before, 1), 30, 0.2)
        pair.kill("a")
        pair.a.attached[-1].process.wait(60)
        pair.active("b")
        for connection in old:
            _exchange(connection)
        assert ties(pair.b) == before
        pair.start("a")
        pair.a.probe("--listen", pair.sync_address("a"), "--peer", pair.sync_address("b"))
        wait_for("all ties on a", lambda: ties(pair.a) == before, 30, 0.2)
        ports = {connection.getsockname()[1] for connection in old}
        wait_for("their sessions", lambda: ports <= {int(row["cport"]) for row in pair.a.sessions()}, 30, 0.2)
        pair.active("a")
        for connection in old:
            _exchange(connection)
        for kind in ("fnat", "dr6"):
            for _ in range(FRESH):
                _open(pair, kind, socket.SOCK_STREAM, stack)
        for flow in [_open(pair, "fnat", socket.SOCK_DGRAM, stack) for _ in range(FRESH)]:
            _exchange(flow)  # one without packets ends soon
        wanted = {(proto, virtual): {server} for proto, virtual, server in before}
        assert _servers(pair.a) == wanted
        assert ties(pair.a) == before
