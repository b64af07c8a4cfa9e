# SPDX-License-Identifier: GPL-2.0-or-later
"""The probes of a running attach under their budget, on the twin: away under load, back after it; and none at all."""

import pytest

from tests.lab.node import Attached
from tests.lab.pair import Pair
from tests.lab.process import wait_for
from tests.lab.twin import TwinNode
from tests.system.test_table import assert_equal

pytestmark = [pytest.mark.needs("bpf", "twin")]
BUDGET = 0.4  # percent: what some two thousand sessions a second take


def synthesize(pair: Pair, count: int, rate: int, lifetime_ms: int) -> None:
    assert isinstance(pair.a, TwinNode)
    pair.a.tell(f"synthesize {count} {rate} {lifetime_ms}")


def synthetic(pair: Pair) -> int:
    assert isinstance(pair.a, TwinNode)
    return sum(worker["synthetic"] for worker in pair.a.tell("stats")["workers"])


def settled(pair: Pair, probe: Attached, made: int) -> None:
    """All of an order are made, and the table is DPVS's list."""
    wait_for("the order carried out", lambda: synthetic(pair) >= made, 30)
    assert_equal(pair.a, probe)


def test_away_under_load_and_back_after_it(pair: Pair) -> None:
    probe = pair.a.probe("--no-inject", "--probe-budget", str(BUDGET))
    said = probe.status()["probes"]
    assert (said["attached"], said["budget_percent"], said["hit_cost"]) == (True, BUDGET, "measured")
    assert 100 < said["hit_create_ns"] < 50_000

    synthesize(pair, 501, 500, 3000)  # a few: heard
    settled(pair, probe, 501)
    status = probe.status()
    assert status["probes"]["attached"]
    assert status["events"]["created"] == 501
    assert 0 < status["probes"]["highest_share_percent"] < BUDGET

    synthesize(pair, 12_007, 6000, 1500)  # too many
    wait_for("probes away", lambda: not probe.status()["probes"]["attached"], 10)
    settled(pair, probe, 501 + 12_007)
    said = probe.status()["probes"]
    assert said["switches"]["detached_over_budget"] >= 1
    assert said["highest_share_percent"] < BUDGET + 0.2  # what came until the breakpoints were out
    assert said["hits_create"] < 501 + 12_007

    wait_for("probes back", lambda: probe.status()["probes"]["attached"], 20)
    before = probe.status()
    synthesize(pair, 307, 500, 60_000)
    settled(pair, probe, 501 + 12_007 + 307)
    after = probe.status()
    assert after["events"]["created"] - before["events"]["created"] == 307
    assert after["events"]["lost"] == 0
    assert pair.a.alive


@pytest.mark.parametrize("how", [("--scan-only",), ("--probe-budget", "0")])
def test_the_scan_alone(pair: Pair, how: tuple[str, ...]) -> None:
    probe = pair.a.probe("--no-inject", *how)
    synthesize(pair, 5003, 5000, 1000)
    wait_for("some there", lambda: synthetic(pair) > 1000, 10)
    settled(pair, probe, 5003)
    wait_for("all ended", lambda: not pair.a.tuples(), 20)
    assert assert_equal(pair.a, probe) == 0
    status = probe.status()
    assert status["probes"] == {"attached": False, "how": "scan only"}
    assert status["events"]["total"] == 0
    assert status["collector"]["created"] > 1000
