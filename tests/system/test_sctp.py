# SPDX-License-Identifier: GPL-2.0-or-later
"""SCTP associations through a failover of a DPVS that has SCTP, as 1.10.2 has it."""

from collections import Counter
from contextlib import ExitStack

import pytest

from collector.record import SCTP
from tests.kinds.outcomes import SURVIVES, record
from tests.lab.associations import HANDSHAKE, SHUTDOWN, SHUTDOWN_ACK, TALK, Association, Seen, Side
from tests.lab.pair import Pair
from tests.lab.process import wait_for

pytestmark = [pytest.mark.dpvs, pytest.mark.needs("bpf", "agent")]
EACH = 5  # associations of each mode


@pytest.fixture
def with_sctp(pair_kind: str) -> None:
    """To be asked for before the pair."""
    if pair_kind == "twin":
        for mode in ("FullNAT", "NAT", "direct routing"):
            record(pair_kind, f"SCTP, {mode}", "has no SCTP")
        pytest.skip("the twin has no SCTP")


@pytest.mark.pair(sctp=True)
def test_associations_survive(with_sctp: None, pair: Pair, pair_kind: str) -> None:
    plan = pair.plan
    services = {"FullNAT": plan.vip, "NAT": plan.at(4, 100), "direct routing": plan.vip_dr}

    def all_talk() -> dict[tuple[str, int], Seen]:
        return {key: association.exchange(*TALK) for key, association in made.items()}

    with ExitStack() as stack:
        with pair.network.inside("client"):
            client = stack.enter_context(Side(plan.client, plan.at(3, 10)))
        with pair.network.inside("server"):
            server = stack.enter_context(Side(*plan.servers, plan.vip_dr))
        made = {
            (mode, number): Association(
                client, server, plan.at(3, 10) if mode == "NAT" else plan.client, 3000 + number, address
            )
            for mode, address in services.items()
            for number in range(EACH)
        }
        for association in made.values():
            association.play(*HANDSHAKE)
        before = all_talk()
        pair.replicate()
        wait_for("copies on b", lambda: sctp_sessions(pair, "b") == len(made), 20, 0.3)
        assert states(pair, "b") == {b"SCTP_NONE": len(made)}
        assert all_talk() == before
        pair.kill("a")
        pair.active("b")
        assert all_talk() == before
        assert states(pair, "b") == {b"SCTP_ESTABLISHE": len(made)}  # DPVS has room for so much of it
        assert (pair.b.counters().active, pair.b.counters().inactive) == (len(made), 0)
        for mode in services:
            record(pair_kind, f"SCTP, {mode}", SURVIVES)
        for association in made.values():
            association.exchange(SHUTDOWN, SHUTDOWN_ACK)
        fresh = Association(client, server, plan.client, 4000, plan.vip)
        fresh.play(*HANDSHAKE, TALK, (SHUTDOWN, SHUTDOWN_ACK))
    wait_for("b counts nothing any more", lambda: pair.b.counters().idle, 90, 0.5)  # DPVS's own 61 s


def sctp_sessions(pair: Pair, name: str) -> int:
    return sum(states(pair, name).values())


def states(pair: Pair, name: str) -> Counter[bytes]:
    """Of the associations that a node has."""
    rows = pair.nodes[name].sessions()
    return Counter(bytes(row["state"]).split(b"\0")[0] for row in rows if row["proto"] == SCTP)
