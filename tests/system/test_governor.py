# SPDX-License-Identifier: GPL-2.0-or-later
"""The probes under their budget: away under load, back after it, and none at all; and the table right all the time."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from collector.collector import Collector
from collector.conns import from_conns
from collector.flows import hash_of, keys_of
from collector.governed import Governed
from collector.governor import Limits
from collector.record import Words, words
from collector.table import SessionTable
from probes.loader import Probes
from probes.memory import SessionPool
from probes.sites import session_sites
from probes.target import Target
from replicator.attach import XMIT_MODES
from tests.lab.churn import Churn
from tests.lab.node import Attached
from tests.lab.pair import Pair
from tests.lab.process import wait_for
from tests.lab.twin import TwinNode
from tests.system.test_table import assert_equal

pytestmark = [pytest.mark.needs("bpf", "twin")]
LOAD, TINY_LOAD = 3000, 100  # sessions made in a second that take all of a budget
LIFETIME_MS = 3000
FEW, FEW_RATE, MORE = 501, 500, 307  # within that of LOAD
MANY, MANY_RATE = 12_007, 6000  # over it
TRIES, UNDISTURBED_S = 10, 0.05
WITHIN_S = 150.0
TORN = np.uint64(1)
# Of a record: all but the generation, the worker (which events alone tell) and the claim.
SAME = np.full(18, 0xFFFFFFFFFFFFFFFF, np.uint64)
SAME[0], SAME[11], SAME[17] = 0xFFFFFFFF, 0xFFFFFF00FFFFFFFF, 0xFFFFFFFF


def budget_of(pair: Pair, load: int) -> float:
    """In percent of a worker's time, what so many sessions a second take to be made, on this machine."""
    probe = pair.a.probe("--no-inject")
    hit_ns = int(probe.status()["probes"]["hit_create_ns"])
    assert probe.stop() == 0
    return round(hit_ns * load / 1e7, 3)


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
    budget = budget_of(pair, LOAD)
    probe = pair.a.probe("--no-inject", "--probe-budget", str(budget))
    said = probe.status()["probes"]
    assert (said["attached"], said["budget_percent"], said["hit_cost"]) == (True, budget, "measured")
    assert 100 < said["hit_create_ns"] < 50_000

    synthesize(pair, FEW, FEW_RATE, 3000)  # heard
    settled(pair, probe, FEW)
    status = probe.status()
    assert status["probes"]["attached"]
    assert status["events"]["created"] == FEW
    assert 0 < status["probes"]["highest_share_percent"] < budget

    made = ordered = FEW  # of all, and since it is attached
    for _ in range(TRIES):
        made, ordered = made + MANY, ordered + MANY
        undisturbed = away_under_load(pair, probe, made)
        said = probe.status()["probes"]
        assert said["switches"]["detached_over_budget"] >= 1
        assert said["hits_create"] < ordered
        # what came until the breakpoints were out, unless whoever takes them out was kept waiting for a CPU
        if undisturbed or said["highest_share_percent"] < budget + 0.2:
            break
        assert probe.stop() == 0
        probe, ordered = pair.a.probe("--no-inject", "--probe-budget", str(budget)), 0
    assert said["highest_share_percent"] < budget + 0.2

    wait_for("probes back", lambda: probe.status()["probes"]["attached"], 20)
    before = probe.status()
    synthesize(pair, MORE, FEW_RATE, 60_000)
    settled(pair, probe, made + MORE)
    after = probe.status()
    assert after["events"]["created"] - before["events"]["created"] == MORE
    assert after["events"]["lost"] == 0
    assert pair.a.alive


def away_under_load(pair: Pair, probe: Attached, made: int) -> bool:
    """Order too many, with which ``made`` are made, and wait; whether the probe answered all the time as if it had a
    CPU whenever it wanted one.
    """
    longest, last = 0.0, time.monotonic()

    def away() -> bool:
        nonlocal longest, last
        attached = probe.status()["probes"]["attached"]
        now = time.monotonic()
        longest, last = max(longest, now - last), now
        return not attached

    synthesize(pair, MANY, MANY_RATE, 1500)
    wait_for("probes away", away, 20)
    settled(pair, probe, made)
    tick_s = float(probe.status()["loop"]["longest_tick_ms"]) / 1e3
    return max(longest, tick_s) < UNDISTURBED_S


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


@pytest.mark.dpvs
def test_real_connections_take_the_probes_away_and_they_come_back(pair: Pair) -> None:
    budget = budget_of(pair, TINY_LOAD)
    steady = pair.steady(connections=7)
    probe = pair.a.probe("--no-inject", "--probe-budget", str(budget))
    with Churn(pair.network.path("client"), pair.plan.vip, 7) as churn:

        def away() -> bool:
            churn.open(101)
            churn.close(97, ("reset",))
            return not probe.status()["probes"]["attached"]

        wait_for("probes away", away, 20)
        churn.open(101)
        assert assert_equal(pair.a, probe) >= len(churn.open_ones)
        wait_for("probes back", lambda: probe.status()["probes"]["attached"], 60)
        assert assert_equal(pair.a, probe) >= len(churn.open_ones)
        before = probe.status()
        churn.open(3)
        assert assert_equal(pair.a, probe) >= len(churn.open_ones)
        after = probe.status()
        churn.close(len(churn.open_ones), ("reset",))
        assert_equal(pair.a, probe)
    assert after["probes"]["switches"]["detached_over_budget"] >= 1
    assert after["probes"]["switches"]["attached"] >= 2
    if after["probes"]["switches"] == before["probes"]["switches"]:
        assert after["events"]["created"] - before["events"]["created"] == 3
    report = steady.finish()
    print({**after["probes"], "longest_gap_ms": report["longest_gap_ms"]})
    assert report["alive"] == 7
    assert pair.a.alive


class Eyes:
    """Two collectors on one DPVS: one with probes under a budget, the other with the scan alone."""

    def __init__(self, pool: SessionPool, target: Target, probes: Probes) -> None:
        self.pool = pool
        modes = {address: mode for name, mode in XMIT_MODES.items() if (address := target.find(name)) is not None}
        self._modes = modes
        tables = [SessionTable(pool.slots) for _ in range(2)]
        self.probed = Collector(
            pool, probes.ring(), tables[0], modes=modes, workers=target.workers(), lost=probes.lost,
            clock=time.monotonic_ns,
        )  # fmt: skip
        self.alone = Collector(pool, None, tables[1], modes=modes)
        self.both = (self.probed, self.alone)
        limits = Limits(budget=probes.costs.create_ns * LOAD / 1e9)
        self.governed = Governed(probes, self.probed, list(target.worker_cpus().values()), time.monotonic_ns(),
                                 limits=limits)  # fmt: skip
        self._walks = dict.fromkeys(self.both, 0)
        self._began: dict[Collector, tuple[float, Words]] = {}  # the walk that is under way
        self.compared = dict.fromkeys((True, False), 0)  # walks that were, with the probes on and away

    def round(self) -> None:
        """What a node's loop does, and after each walk a comparison with the pool."""
        self.governed.tick(time.monotonic_ns())
        for one in self.both:
            one.tick(time.monotonic_ns())
            one.scan(time.monotonic_ns())
            if one.counters["scan_passes"] == self._walks[one]:
                continue
            self._walks[one] = one.counters["scan_passes"]
            one.tick(time.monotonic_ns())  # what seems gone is looked at once more
            now = self.names()
            if one in self._began:
                began, before = self._began[one]
                self._compare(one, before, now, time.monotonic() - began)
            self._began[one] = time.monotonic(), now

    def names(self) -> Words:
        """Of each slot a word for the session in it as DPVS has it: 0 without one, TORN where DPVS was writing it."""
        out = np.zeros(self.pool.slots, np.uint64)
        slots = np.flatnonzero(self.pool.live())
        conns, whole = self.pool.read(slots)
        out[slots] = hash_of(keys_of(words(from_conns(conns, slots, self._modes))))
        out[slots[~whole]] = TORN
        return out

    def _compare(self, one: Collector, before: Words, now: Words, seconds: float) -> None:
        """One walk lies between ``before`` and ``now``: what was there all the time must be in the table, and what was
        there at neither must not.
        """
        known = np.zeros(self.pool.slots, np.uint64)
        slots = np.flatnonzero(one.table.present)
        known[slots] = hash_of(keys_of(words(one.table.rows(slots))))
        sure = (before != TORN) & (now != TORN)
        missing = sure & (before == now) & (before != 0) & (known != before)
        assert not missing.any(), f"{missing.sum()} sessions are late by more than a walk of {seconds:.3f} s"
        if seconds < LIFETIME_MS / 1000 - 1:  # none came and went between
            extra = sure & (known != 0) & (known != before) & (known != now)
            assert not extra.any(), f"{extra.sum()} ends are late by more than a walk of {seconds:.3f} s"
            self.compared[self.governed.governor.attached] += one is self.probed

    def until(self, what: str, holds: Callable[[], bool], within: float = WITHIN_S) -> None:
        end = time.monotonic() + within
        while not holds():
            assert time.monotonic() < end, f"not within {within} s: {what}"
            self.round()
            time.sleep(0.0005)


@contextmanager
def eyes_on(pair: Pair) -> Iterator[Eyes]:
    with ExitStack() as stack:
        target = stack.enter_context(Target.open(pair.a.pid))
        pool = stack.enter_context(SessionPool.open(target, pair.a.layout))
        probes = stack.enter_context(Probes.attach(target, session_sites(target.function)))
        eyes = Eyes(pool, target, probes)
        stack.callback(eyes.governed.close)
        yield eyes


def test_with_probes_and_without_the_same_table_never_late_by_more_than_a_walk(pair: Pair) -> None:
    made = 0

    def order(count: int, rate: int, lifetime_ms: int = LIFETIME_MS) -> None:
        nonlocal made
        made += count
        synthesize(pair, count, rate, lifetime_ms)

    with eyes_on(pair) as eyes:
        governor, switches = eyes.governed.governor, eyes.governed.counters
        order(FEW, FEW_RATE)
        eyes.until("a few heard", lambda: eyes.probed.counters["events_created"] == FEW)
        assert governor.attached
        order(MANY, MANY_RATE)
        eyes.until("probes away", lambda: not governor.attached)

        def compared_without() -> bool:
            """Only quick walks are: as long as there were too few, the probes are kept away."""
            if eyes.compared[False] > 3:
                return True
            if synthetic(pair) == made:
                order(MANY, MANY_RATE)
            return False

        eyes.until("walks without probes", compared_without)
        eyes.until("all made", lambda: synthetic(pair) == made)
        eyes.until("probes back", lambda: governor.attached)
        order(MORE, FEW_RATE, 60_000)
        eyes.until("more made", lambda: synthetic(pair) == made)
        eyes.until("all others ended", lambda: int(np.count_nonzero(eyes.pool.live())) == MORE)
        eyes.until("walks with probes", lambda: eyes.compared[True] > 3)
        walks = {one: one.counters["scan_passes"] + 2 for one in eyes.both}
        eyes.until("two walks", lambda: all(one.counters["scan_passes"] >= n for one, n in walks.items()))
        probed, alone = eyes.probed.table, eyes.alone.table
        assert int(np.count_nonzero(probed.present)) == MORE
        assert (probed.present == alone.present).all()
        rows = [words(table.records)[table.present] & SAME for table in (probed, alone)]
        assert (rows[0] == rows[1]).all()
        assert switches["detached_over_budget"] >= 1
        assert switches["attached"] >= 2
        assert switches["failed"] == 0
        assert min(eyes.compared.values()) > 3, eyes.compared
