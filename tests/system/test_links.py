# SPDX-License-Identifier: GPL-2.0-or-later
"""Links as an operator sets and sees them: shares, readiness, times, counters."""

import time
from typing import Any

import pytest

from tests.lab.pair import Pair
from tests.lab.process import wait_for

pytestmark = [pytest.mark.needs("bpf", "agent")]
CONNECTIONS = 60


def test_a_peer_that_never_comes_is_stood_in_for(pair: Pair) -> None:
    steady = pair.steady(CONNECTIONS)
    pair.b.probe("--listen", pair.sync_address("b"))
    probe = pair.a.probe("--peer", pair.sync_address("b"), "--peer", pair.sync_address("b", 9), "--replicas", "1")
    part = wait_for("b has a part", lambda: len(pair.b.sessions()), 10)
    there, absent, *_ = probe.peers()
    assert 0 < part < CONNECTIONS
    assert there["sessions"] + absent["sessions"] == CONNECTIONS
    assert there["share"] + absent["share"] == pytest.approx(1, abs=0.001)
    assert absent["link"]["dials_failed"] > 0
    wait_for("b has all of them", lambda: len(pair.b.sessions()) == CONNECTIONS, 30)
    assert probe.peers()[0]["link"]["full_sync_reason"] == "shared_anew"
    pair.kill("a")
    pair.active("b")
    wait_for("traffic on b", lambda: pair.b.counters().active == CONNECTIONS, 20)
    assert steady.finish()["alive"] == CONNECTIONS


def test_ready_when_the_peers_sessions_are_here(pair: Pair) -> None:
    steady = pair.steady(CONNECTIONS)
    pair.b.probe("--listen", pair.sync_address("b"))
    waiting = pair.b.command("ready")
    assert (waiting.returncode, waiting.stdout[:11]) == (1, "not ready: ")
    assert "0 of 1 peers have sent their sessions" in waiting.stdout
    pair.a.probe("--peer", pair.sync_address("b"))
    ready = pair.b.command("ready", "--wait", "50")
    assert (ready.returncode, ready.stdout) == (0, "ready\n")
    assert len(pair.b.sessions()) == CONNECTIONS
    assert pair.a.command("ready").returncode == 0  # nobody sends to it: nothing to wait for
    assert steady.finish()["alive"] == CONNECTIONS


def test_times_are_settings_and_losses_are_counted(pair: Pair) -> None:
    pair.replicate(extra=("--heartbeat", "0.2", "--heartbeat-timeout", "1.5"))
    probe = pair.a.attached[0]

    def to_b() -> dict[str, Any]:
        return probe.peers()[0]

    wait_for("link up", lambda: to_b()["state"] == "live", 10)
    assert to_b()["link"]["lost"] == 0
    pair.b.attached[0].pause()
    began = time.monotonic()
    wait_for("link down", lambda: to_b()["link"]["lost"] == 1, 10, 0.01)
    assert time.monotonic() - began < 2.9  # the usual 3 s would not do
    assert "silent for 1.5 s" in str(to_b()["note"])
    pair.b.attached[0].resume()
    wait_for("link up again", lambda: to_b()["state"] == "live", 15)
    assert to_b()["link"]["connections"] == 2
    listing = pair.b.command("peers", "-v", check=True).stdout
    assert "connections: 2" in listing
    assert "partial_syncs" not in listing  # names are for people here
