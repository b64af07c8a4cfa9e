# SPDX-License-Identifier: GPL-2.0-or-later
"""Nodes with different numbers of workers: what would not work after a failover is refused before it, and said."""

import signal
from collections import defaultdict

import pytest

from tests.lab.pair import Pair
from tests.lab.process import wait_for
from tests.lab.services import ECHO, address

pytestmark = [pytest.mark.dpvs, pytest.mark.needs("bpf", "agent")]
CONNECTIONS = 20


@pytest.mark.pair(workers=1, workers_of_b=2)
def test_one_to_two_is_refused_and_said(pair: Pair) -> None:
    pair.replicate()
    probe = pair.b.attached[-1]
    steady = pair.steady(CONNECTIONS)
    wait_for(
        "all are refused",
        lambda: probe.status()["injection"]["results"].get("wrong_worker", 0) == CONNECTIONS,
        20,
    )
    assert probe.status()["injection"]["installed"] == 0
    assert pair.b.counters().idle
    assert "DPVS of node a has 1 workers, this one 2" in probe.process.output()
    assert steady.finish()["alive"] == CONNECTIONS


@pytest.mark.pair(workers=2, workers_of_b=1)
def test_two_to_one_works(pair: Pair) -> None:
    pair.replicate()
    probe = pair.b.attached[-1]
    steady = pair.steady(CONNECTIONS)
    wait_for("all have copies", lambda: probe.status()["injection"]["installed"] == CONNECTIONS, 20)
    pair.kill("a")
    pair.active("b")
    wait_for("all carry on at b", lambda: pair.b.counters().active == CONNECTIONS, 20)
    report = steady.finish()
    assert (report["alive"], report["corrupted"]) == (CONNECTIONS, 0), report
    wait_for("nothing is left", lambda: pair.b.counters().idle, 120, 0.5)


@pytest.mark.pair(workers=2, kinds=("dr",))
def test_copies_that_moved_apart_do_not_disprove_the_layout(pair: Pair) -> None:
    """Each worker has a copy, packets of the client move one of the two on, and DPVS answers for either."""
    where = address(pair.plan, "dr")
    pair.replicate()
    made = [pair.connect(ECHO, where) for _ in range(CONNECTIONS)]
    try:
        wait_for("each has two copies", lambda: len(pair.b.sessions()) == 2 * CONNECTIONS, 20)
        pair.kill("a")
        pair.b.attached[-1].stop(signal.SIGKILL)  # nobody is left to end the copies that are not used
        pair.active("b")
        for one in made:
            one.sendall(b"still here\n")
            assert one.recv(100)
        states = defaultdict(set)
        for row in pair.b.sessions():
            states[int(row["cport"])].add(bytes(row["state"]))
        assert [len(seen) for seen in states.values()] == [2] * CONNECTIONS
        probe = pair.b.probe()
        wait_for("the layout is proven", lambda: "live sessions" in probe.process.output(), 10)
        assert probe.alive
    finally:
        for one in made:
            one.close()
