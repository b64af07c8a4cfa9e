# SPDX-License-Identifier: GPL-2.0-or-later
"""collector/governed.py: what the governor is told, what its orders do. And the scan alone makes the same table."""

from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from collector.collector import Collector
from collector.governed import Governed
from collector.governor import MS, SECOND, Limits
from collector.record import UNKNOWN_WORKER
from collector.table import SessionTable
from probes.practice import Costs
from probes.uprobe import ProbeFailed
from tests.unit.simulated_dpvs import EVENT, MODES, WORKERS, SimulatedDpvs


class FakeProbes:
    """Probes that count what a test says."""

    how = "not at all"
    costs = Costs(1000.0, 2000.0, measured=True)

    def __init__(self) -> None:
        self.hits = np.zeros((4, 2), np.uint64)
        self.on = True
        self.refuses: Exception | None = None

    def hits_by_cpu(self) -> npt.NDArray[np.uint64]:
        return self.hits.copy()

    def reattach(self) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.on = True

    def detach(self) -> None:
        self.on = False


class FakeCollector:
    def __init__(self) -> None:
        self.alone = False
        self.counters = {"created": 0, "deleted": 0, "scan_passes": 0}


class World:
    """Governed, and a thread that works when it is told to."""

    def __init__(self, *cpus: set[int]) -> None:
        self.probes, self.collector = FakeProbes(), FakeCollector()
        self.probes.hits[:] = 1_000_000  # of before
        self.now_ns = 0
        self.waiting: list[tuple[Callable[[], None], Future[None]]] = []
        self.governed = Governed(
            self.probes, self.collector, list(cpus or [{1}]), 0, limits=Limits(budget=0.05), submit=self._submit
        )

    def _submit(self, work: Callable[[], None]) -> "Future[None]":
        future: Future[None] = Future()
        self.waiting.append((work, future))
        return future

    def switch(self) -> None:
        """The thread does what waits."""
        for work, future in self.waiting:
            try:
                work()
                future.set_result(None)
            except Exception as error:
                future.set_exception(error)
        self.waiting.clear()

    def tick(self, seconds: float = 0.005, creates: int = 0, frees: int = 0, cpu: int = 1) -> dict[str, object]:
        if self.probes.on:
            self.probes.hits[cpu] += np.array([creates, frees], np.uint64)
        self.now_ns += int(seconds * SECOND)
        self.governed.tick(self.now_ns)
        return self.governed.status()


def test_hits_times_costs_are_the_share() -> None:
    world = World({1}, {2, 3})
    for _ in range(400):
        status = world.tick(creates=50, frees=25)  # 50 us + 50 us in 5 ms
        if world.waiting:
            break
    assert status["share_percent"] == pytest.approx(2, rel=0.02)
    assert status["highest_share_percent"] == pytest.approx(2, rel=0.02)
    assert status["attached"] is True


@pytest.mark.parametrize("cpu", [2, 3])
def test_hits_on_any_cpu_of_a_worker_are_its_own(cpu: int) -> None:
    world = World({1}, {2, 3})
    for _ in range(100):
        world.tick(creates=500, cpu=cpu)
    assert len(world.waiting) == 1


def test_hits_on_other_cpus_are_nobodys() -> None:
    world = World({1}, {2, 3})
    for _ in range(100):
        world.tick(creates=500, cpu=0)
    assert not world.waiting


def test_without_workers_all_cpus_count_as_one() -> None:
    world = World()
    world.governed = Governed(world.probes, world.collector, [], 0, submit=world._submit)
    for _ in range(100):
        world.tick(creates=500, cpu=0)
    assert len(world.waiting) == 1


def test_away_and_back_again(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    caplog.set_level("INFO")
    while not world.waiting:
        world.tick(creates=1000)
    assert world.collector.alone  # from the order on, not only when it is carried out
    assert world.governed.status()["attached"] is True
    world.switch()
    status = world.tick()
    assert status["attached"] is False
    assert status["switches"] == {"attached": 1, "detached_over_budget": 1, "failed": 0}
    while not world.waiting:
        world.collector.counters["created"] += 1  # 200 a second
        world.tick()
    assert world.now_ns < 3 * SECOND
    world.switch()
    status = world.tick()
    assert status["attached"] is True
    assert world.collector.alone  # until a whole walk is over
    world.collector.counters["scan_passes"] = 1
    world.tick()
    assert world.collector.alone
    world.collector.counters["scan_passes"] = 2
    world.tick()
    assert not world.collector.alone
    assert [r.getMessage() for r in caplog.records if "probes" in r.getMessage()] == [
        "probes taken away: more than 5 % of a worker's time; the scan goes on alone",
        "probes put back: they will take less than 5 % of a worker's time",
    ]


def test_what_the_scan_sees_come_and_go_keeps_them_away() -> None:
    world = World()
    while not world.waiting:
        world.tick(creates=1000)
    world.switch()
    for _ in range(4000):  # 20 s
        world.collector.counters["created"] += 60  # 12 000 a second: 3.6 %, and half of the budget is 2.5
        world.collector.counters["deleted"] += 60
        world.tick()
    assert not world.waiting
    assert world.governed.status()["attached"] is False


def test_probes_that_cannot_be_put_back(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    while not world.waiting:
        world.tick(creates=1000)
    world.switch()
    world.probes.refuses = ProbeFailed("process 1 has ended")
    while not world.waiting:
        world.tick()
    world.switch()
    status = world.tick()
    assert (status["attached"], status["switches"]["failed"]) == (False, 1)  # type: ignore[index]
    assert world.collector.alone
    assert "process 1 has ended" in caplog.text
    world.probes.refuses = RuntimeError("a bug")
    while not world.waiting:
        world.tick()
    world.switch()
    with pytest.raises(RuntimeError, match="a bug"):
        world.tick()


def test_the_thread_is_one_of_its_own_and_ends() -> None:
    world = World()
    governed = Governed(world.probes, world.collector, [{1}], 0)
    now = 0
    while world.probes.on:
        world.probes.hits[1] += np.uint64(1000)
        now += 5 * MS
        governed.tick(now)
    governed.close()
    assert not world.probes.on


class BothWays(RuleBasedStateMachine):
    """One DPVS, three collectors: by events and scan, by the scan alone, and one whose events come and go."""

    SLOTS = 24

    @initialize()
    def begin(self) -> None:
        self.dpvs = SimulatedDpvs(self.SLOTS)
        self.clients = 0
        self.events, self.alone, self.both = (self._collector(ring) for ring in ("own", None, "own"))
        self.ring: list[npt.NDArray[np.void]] = []
        self.heard = True
        for collector in (self.events, self.alone, self.both):
            collector.scan_all(self.dpvs.clock())

    def _collector(self, ring: str | None) -> Collector:
        queue = Queue() if ring else None
        table = SessionTable(self.SLOTS)
        collector = Collector(self.dpvs, queue, table, modes=MODES, workers=WORKERS)
        collector.queue = queue  # type: ignore[attr-defined]
        return collector

    @rule(slot=st.integers(0, SLOTS - 1), tid=st.sampled_from([5001, 5002]))
    def create(self, slot: int, tid: int) -> None:
        if not self.dpvs.live(np.array([slot]))[0]:
            self.clients += 1
            self.dpvs.create(slot, self.clients, tid=tid)

    @rule(slot=st.integers(0, SLOTS - 1))
    def free(self, slot: int) -> None:
        if self.dpvs.live(np.array([slot]))[0]:
            self.dpvs.free(slot)

    @rule(slot=st.integers(0, SLOTS - 1), state=st.integers(1, 8))
    def change(self, slot: int, state: int) -> None:
        self.dpvs.conns["state"][slot] = state

    @rule(on=st.booleans())
    def switch(self, on: bool) -> None:
        self.deliver()
        self.heard = on
        self.both.alone = not on

    @rule()
    def deliver(self) -> None:
        events = self.dpvs.drain(1 << 16)
        self.events.queue.put(events)  # type: ignore[attr-defined]
        if self.heard:
            self.both.queue.put(events)  # type: ignore[attr-defined]
        for collector in (self.events, self.alone, self.both):
            collector.tick(self.dpvs.clock())

    @invariant()
    def the_same_table_after_a_scan(self) -> None:
        self.deliver()
        for collector in (self.events, self.alone, self.both):
            for _ in range(2):  # what seems gone is doubted once where no event told of it
                collector.scan_all(self.dpvs.clock())
                collector.tick(self.dpvs.clock())
        rows = [told(collector.table) for collector in (self.events, self.alone, self.both)]
        assert (rows[0] == rows[1]).all()
        assert (rows[0] == rows[2]).all()
        live = np.flatnonzero(self.dpvs.live(np.arange(self.SLOTS)))
        assert rows[0]["slot"].tolist() == live.tolist()


class Queue:
    """Events that are handed on."""

    def __init__(self) -> None:
        self.waiting: list[npt.NDArray[np.void]] = []

    def put(self, events: npt.NDArray[np.void]) -> None:
        self.waiting.append(events)

    def drain(self, maximum: int) -> npt.NDArray[np.void]:
        events, self.waiting = np.concatenate((np.empty(0, EVENT), *self.waiting)), []
        return events


def told(table: SessionTable) -> npt.NDArray[np.void]:
    """The sessions, but for what only an event can tell: how often the slot was used, and on which worker it is."""
    rows = table.sessions()
    rows["generation"], rows["worker"] = 1, UNKNOWN_WORKER
    return rows


TestBothWays = BothWays.TestCase
TestBothWays.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
