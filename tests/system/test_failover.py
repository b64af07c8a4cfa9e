# SPDX-License-Identifier: GPL-2.0-or-later
"""kill -9 of the active node: what survives without replication, and with it; and what is left behind afterwards."""

import pytest

from tests.lab.pair import Pair
from tests.lab.process import wait_for

pytestmark = [pytest.mark.dpvs]
CONNECTIONS = 50


def test_without_replication_nothing_survives(pair: Pair) -> None:
    steady = pair.steady(CONNECTIONS, stall=5)
    assert pair.a.counters().active == CONNECTIONS
    pair.kill("a")
    pair.active("b")
    report = steady.report()
    assert report["reset"] == CONNECTIONS, report  # a segment of no session is answered, see test_stray_segments.py


@pytest.mark.needs("bpf", "agent")
class TestWithReplication:
    def survive(self, pair: Pair) -> None:
        """The whole story: replicate, kill, survive, close, and node b is as clean as new."""
        pair.replicate()
        before = pair.b.pid
        steady = pair.steady(CONNECTIONS)
        wait_for("all sessions injected in b", lambda: len(pair.b.sessions()) == CONNECTIONS, 10)
        pair.kill("a")
        pair.active("b")
        moved = wait_for("traffic on b", lambda: pair.b.counters().active == CONNECTIONS, 20)
        assert moved
        report = steady.finish()
        assert report["alive"] == CONNECTIONS, report
        assert report["corrupted"] == report["reset"] == report["stalled"] == 0, report
        wait_for("b counts nothing any more", lambda: pair.b.counters().idle, 120, 0.5)
        assert len(pair.b.sessions()) == 0
        assert pair.b.pid == before
        assert pair.b.alive
        assert pair.request() == b"hello from the real server\n"

    def test_every_connection_survives(self, pair: Pair) -> None:
        self.survive(pair)

    @pytest.mark.pair(workers=2)
    def test_with_two_workers(self, pair: Pair) -> None:
        self.survive(pair)

    def test_connections_of_before_the_attach_survive(self, pair: Pair) -> None:
        steady = pair.steady(CONNECTIONS)
        pair.replicate()
        wait_for("all sessions injected in b", lambda: len(pair.b.sessions()) == CONNECTIONS, 10)
        pair.kill("a")
        pair.active("b")
        wait_for("traffic on b", lambda: pair.b.counters().active == CONNECTIONS, 20)
        report = steady.finish()
        assert report["alive"] == CONNECTIONS, report
        assert report["corrupted"] == 0, report

    def test_the_dead_nodes_probe_says_so_and_deletes_nothing(self, pair: Pair) -> None:
        pair.replicate()
        steady = pair.steady(5)
        wait_for("all sessions injected in b", lambda: len(pair.b.sessions()) == 5, 10)
        probe = pair.a.attached[0]
        pair.kill("a")
        assert probe.process.wait(60) == 3
        assert "ended" in probe.process.tail() or "died" in probe.process.tail() or "gone" in probe.process.tail()
        assert len(pair.b.sessions()) == 5
        pair.active("b")
        wait_for("traffic on b", lambda: pair.b.counters().active == 5, 20)
        assert steady.finish()["alive"] == 5
