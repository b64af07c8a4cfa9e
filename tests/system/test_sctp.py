# SPDX-License-Identifier: GPL-2.0-or-later
"""SCTP associations through a failover."""

from collections import Counter
from contextlib import ExitStack

import pytest

from collector.record import SCTP
from tests.kinds.outcomes import SURVIVES, record
from tests.lab.associations import HANDSHAKE, SHUTDOWN, SHUTDOWN_ACK, TALK, Association, Seen, Side
from tests.lab.pair import Pair
from tests.lab.process import wait_for
from tests.lab.services import address
from tests.lab.twin import TwinNode

pytestmark = [pytest.mark.dpvs, pytest.mark.needs("bpf", "agent")]
EACH = 5  # associations of each mode


@pytest.mark.pair(sctp=True)
def test_associations_survive(pair: Pair, pair_kind: str) -> None:
    survive(pair, pair_kind, "")


@pytest.mark.pair(sctp=True, workers=2)
def test_associations_survive_on_two_workers(pair: Pair, pair_kind: str) -> None:
    """Those of the two modes without a local port have a copy on each."""
    survive(pair, pair_kind, ", 2 workers")


def survive(pair: Pair, pair_kind: str, where: str) -> None:
    plan = pair.plan
    services = {
        "FullNAT": plan.vip, "FullNAT, IPv6": address(plan, "fnat6"), "NAT": plan.at(4, 100),
        "direct routing": plan.vip_dr,
    }  # fmt: skip
    clients = {"NAT": plan.at(3, 10), "FullNAT, IPv6": plan.at6(0, 10)}

    def all_talk() -> dict[tuple[str, int], Seen]:
        return {key: association.exchange(*TALK) for key, association in made.items()}

    with ExitStack() as stack:
        with pair.network.inside("client"):
            client = stack.enter_context(Side(plan.client, *clients.values()))
        with pair.network.inside("server"):
            server = stack.enter_context(Side(*plan.servers, plan.vip_dr, *plan.servers6))
        made = {
            (mode, number): Association(client, server, clients.get(mode, plan.client), 3000 + number, service)
            for mode, service in services.items()
            for number in range(EACH)
        }
        for association in made.values():
            association.play(*HANDSHAKE)
        before = all_talk()
        pair.replicate()
        copies = 2 * EACH + 2 * EACH * pair.b.workers
        wait_for("copies on b", lambda: sctp_sessions(pair, "b") == copies, 20, 0.3)
        assert states(pair, "b") == {b"SCTP_NONE": copies}
        assert all_talk() == before
        pair.kill("a")
        pair.active("b")
        assert all_talk() == before
        live = {b"SCTP_ESTABLISHE": len(made)}  # DPVS has room for so much of it
        wait_for("one of each is left", lambda: states(pair, "b") == live, 30, 0.3)
        assert (pair.b.counters().active, pair.b.counters().inactive) == (len(made), 0)
        for mode in services:
            record(pair_kind, f"SCTP, {mode}{where}", SURVIVES)
        for association in made.values():
            association.exchange(SHUTDOWN, SHUTDOWN_ACK)
        fresh = Association(client, server, plan.client, 4000, plan.vip)
        fresh.play(*HANDSHAKE, TALK, (SHUTDOWN, SHUTDOWN_ACK))
    if isinstance(pair.b, TwinNode):
        pair.b.tell("flush")  # no state but the first and the last ends in less than a minute
    wait_for("b counts nothing any more", lambda: pair.b.counters().idle, 240, 0.5)  # 61 s of its own ticks


def sctp_sessions(pair: Pair, name: str) -> int:
    return sum(states(pair, name).values())


def states(pair: Pair, name: str) -> Counter[bytes]:
    """Of the associations that a node has."""
    rows = pair.nodes[name].sessions()
    return Counter(bytes(row["state"]).split(b"\0")[0] for row in rows if row["proto"] == SCTP)
