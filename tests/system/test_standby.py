# SPDX-License-Identifier: GPL-2.0-or-later
"""A standby's copies are harmless: whatever becomes of them while the owner is healthy, no connection notices.

DPVS resets the client and the real server of an ESTABLISHED session that ends; a copy that did so would kill the live
connection. Resets are counted on the wires of both.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.lab.pair import Pair
from tests.lab.process import wait_for

pytestmark = [pytest.mark.dpvs, pytest.mark.needs("bpf", "agent")]
IDLE, BUSY = 20, 20
LIFETIME_S = 8  # of an idle connection in its owner
# A copy that nobody refreshes lives 30 s, three refreshes, by DPVS's own clock. That counts turns of the worker's loop,
# so it runs slow where two polling nodes share two CPUs.
COPY_GONE_S = 200


@contextmanager
def undisturbed(pair: Pair) -> Iterator[None]:
    """Idle and busy connections go through node a during the block; none of them may notice anything."""
    with pair.resets("client") as at_client, pair.resets("server") as at_server:
        idle = pair.steady(IDLE, interval=LIFETIME_S / 2)
        busy = pair.steady(BUSY, interval=0.05)
        yield
        for steady, count in ((idle, IDLE), (busy, BUSY)):
            report = steady.finish()
            assert report["alive"] == count, report
            assert report["corrupted"] == 0, report
        time.sleep(0.2)
        assert at_client.total == at_server.total == 0, (at_client.resets, at_server.resets)
        assert at_client.segments > 0
        assert at_server.segments > 0
    assert pair.a.alive
    assert pair.b.alive


def copies(pair: Pair) -> int:
    return len(pair.b.sessions())


@pytest.mark.pair(established_timeout_s=LIFETIME_S)
class TestHarmless:
    def test_while_they_wait(self, pair: Pair) -> None:
        pair.replicate()
        with undisturbed(pair):
            wait_for("copies in b", lambda: copies(pair) == IDLE + BUSY, 10)
            time.sleep(LIFETIME_S * 2)
            assert copies(pair) == IDLE + BUSY, "copies must not run out while the owner lives"

    def test_when_they_expire(self, pair: Pair) -> None:
        pair.replicate()
        with undisturbed(pair):
            wait_for("copies in b", lambda: copies(pair) == IDLE + BUSY, 10)
            pair.b.attached[0].process.kill()
            wait_for("copies expired", lambda: copies(pair) == 0, COPY_GONE_S, 0.2)
            assert pair.b.counters().idle

    def test_when_the_standbys_probe_stops_cleanly(self, pair: Pair) -> None:
        pair.replicate()
        with undisturbed(pair):
            wait_for("copies in b", lambda: copies(pair) == IDLE + BUSY, 10)
            assert pair.b.attached[0].stop() == 0
            wait_for("copies gone", lambda: copies(pair) == 0, COPY_GONE_S, 0.2)
            pair.b.probe("--listen", pair.sync_address("b"))
            wait_for("copies back", lambda: copies(pair) == IDLE + BUSY, 15)

    def test_when_they_are_deleted(self, pair: Pair) -> None:
        """The link is cut and comes back: whatever the peer drops and gets again disturbs nobody."""
        pair.replicate()
        with undisturbed(pair):
            for _ in range(3):
                wait_for("copies in b", lambda: copies(pair) == IDLE + BUSY, 15)
                pair.network.set_link("a", "s0", False)
                time.sleep(4)
                pair.network.set_link("a", "s0", True)
            wait_for("copies in b", lambda: copies(pair) == IDLE + BUSY, 15)

    def test_copies_follow_their_originals_to_the_end(self, pair: Pair) -> None:
        pair.replicate()
        with undisturbed(pair):
            short = pair.steady(30)
            wait_for("copies in b", lambda: copies(pair) == IDLE + BUSY + 30, 10)
            assert short.finish()["alive"] == 30
            wait_for("copies of the ended ones gone", lambda: copies(pair) == IDLE + BUSY, 60)
        wait_for("all copies gone", lambda: copies(pair) == 0, 60)
        assert pair.b.counters().idle

    def test_nothing_echoes_back(self, pair: Pair) -> None:
        """Both replicate to each other: a copy is never taken for a session of its own."""
        pair.replicate(both=True)
        with undisturbed(pair):
            wait_for("copies in b", lambda: copies(pair) == IDLE + BUSY, 10)
            time.sleep(2)
            assert pair.b.attached[0].tuples() == set()
            assert len(pair.a.sessions()) == IDLE + BUSY

    @pytest.mark.pair(workers=2)
    def test_with_two_workers(self, pair: Pair) -> None:
        pair.replicate()
        with undisturbed(pair):
            wait_for("copies in b", lambda: copies(pair) == IDLE + BUSY, 10)
            pair.b.attached[0].process.kill()
            wait_for("copies expired", lambda: copies(pair) == 0, COPY_GONE_S, 0.2)
