# SPDX-License-Identifier: GPL-2.0-or-later
"""collector/governor.py: each rule of the module, then any load: no window is ever above the budget."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as limits_of_runs
from hypothesis import strategies as st

from collector.governor import MS, SECOND, Governor, Limits, Order

LIMITS = Limits()
Load = Callable[[int], list[float]]  # time in ns -> share that the probes would take of each worker, were they on


class World:
    """Workers under a load, probes that take time to switch, and a governor that is asked every ``step_ns``.

    ``hidden``: the part of the sessions that is too short for the scan to see.
    """

    def __init__(self, workers: int = 1, *, step_ns: int = 5 * MS, switch_ns: int = 15 * MS, hidden: float = 0) -> None:
        self.now_ns = 0
        self.step_ns, self.switch_ns, self.hidden = step_ns, switch_ns, hidden
        self.spent = np.zeros(workers)
        self.seen = 0.0
        self.on = True
        self.governor = Governor(workers, 0, LIMITS)
        self.history = [(0, self.spent.copy())]
        self.switches: list[tuple[int, Order]] = []
        self._order: tuple[int, Order] | None = None

    def run(self, seconds: float, load: Load) -> "World":
        end = self.now_ns + int(seconds * SECOND)
        while self.now_ns < end:
            self.step(load(self.now_ns))
        return self

    def step(self, shares: list[float]) -> None:
        self.now_ns += self.step_ns
        if self.on:
            self.spent = self.spent + np.array(shares) * self.step_ns
        self.seen += sum(shares) * self.step_ns * (1 - self.hidden)
        self.history.append((self.now_ns, self.spent))
        if self._order is not None and self.now_ns >= self._order[0]:
            order = self._order[1]
            self.on = order is Order.ATTACH
            self.governor.carried_out(self.now_ns)
            self.switches.append((self.now_ns, order))
            self._order = None
        order_now = self.governor.decide(self.now_ns, self.spent, self.seen)
        if order_now is not None:
            assert self._order is None
            self._order = self.now_ns + self.switch_ns, order_now

    def highest(self, window_ns: int = SECOND) -> float:
        """Share of any worker in any window."""
        times = np.array([at for at, _ in self.history])
        spent = np.array([taken for _, taken in self.history])
        ends = np.searchsorted(times, times + window_ns, "right") - 1
        return float(((spent[ends] - spent) / window_ns).max())


def steady(*shares: float) -> Load:
    return lambda _: list(shares)


def test_a_load_below_the_budget_is_left_alone() -> None:
    world = World(2).run(30, steady(0.045, 0.01))
    assert world.on
    assert world.switches == []
    assert world.governor.share == pytest.approx(0.045, rel=0.02)


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_a_load_above_it_costs_no_more_than_the_budget(hidden: float) -> None:
    world = World(hidden=hidden).run(120, steady(0.4))
    assert world.highest() <= LIMITS.budget
    taken = world.spent[0] / world.now_ns
    assert taken < 0.05 / 10
    if hidden:  # attempts, less and less often
        pauses = [b - a for (a, order), (b, _) in pairwise(world.switches) if order is Order.DETACH]
        assert pauses[-1] > 30 * SECOND
        assert all(later >= 1.9 * earlier for earlier, later in pairwise(pauses[:5]))
    else:  # the scan says that there is no use in trying
        assert len(world.switches) == 1


def test_one_worker_is_enough() -> None:
    world = World(3).run(5, steady(0.0, 0.0, 0.2))
    assert not world.on
    assert world.highest() <= LIMITS.budget


def test_a_burst_that_fits_into_a_second_is_heard_at_once() -> None:
    world = World().run(10, lambda now: [0.4 if now % (2 * SECOND) < 50 * MS else 0.001])
    assert world.switches == []
    assert world.highest() <= LIMITS.budget


def test_the_probes_come_back_soon_after_the_load_has_gone() -> None:
    world = World().run(20, steady(0.3)).run(4, steady(0.002))
    assert world.on
    back = world.switches[-1]
    assert back[1] is Order.ATTACH
    assert back[0] - 20 * SECOND < LIMITS.calm_ns + 100 * MS
    world.run(20, steady(0.002))
    assert len(world.switches) == 2


def test_a_load_between_calm_and_budget_does_not_bring_them_back() -> None:
    world = World().run(5, steady(0.3)).run(60, steady(0.04))
    assert not world.on
    assert len(world.switches) == 1


def test_of_many_workers_only_what_the_busiest_takes_counts() -> None:
    """Eight workers at 2 % each are 16 % in all, and no reason to stay away."""
    world = World(8).run(3, steady(*[0.3] * 8)).run(5, steady(*[0.02] * 8))
    assert world.on


def test_a_load_that_swings_switches_no_more_often_than_it_swings() -> None:
    world = World().run(100, lambda now: [0.4 if now // (10 * SECOND) % 2 else 0.001])
    assert len(world.switches) == 9  # away five times, back four times
    assert world.highest() <= LIMITS.budget


def test_an_order_that_fails_is_given_again_later_and_later() -> None:
    governor = Governor(1, 0, LIMITS, attached=False)
    orders = []
    for now in range(0, 60 * SECOND, 5 * MS):
        if governor.decide(now, np.zeros(1), 0.0) is not None:
            orders.append(now)
            governor.failed(now)
    gaps = np.diff(orders)
    assert len(orders) == 5
    assert (gaps[1:] > 1.9 * gaps[:-1]).all()


def test_no_order_while_one_is_carried_out() -> None:
    governor = Governor(1, 0, LIMITS)
    spent = np.array([SECOND / 2])
    assert governor.decide(10 * MS, spent, 0.0) is Order.DETACH
    assert governor.decide(20 * MS, 2 * spent, 0.0) is None
    governor.failed(30 * MS)
    assert governor.attached
    assert governor.decide(40 * MS, 2 * spent, 0.0) is Order.DETACH


def test_a_look_that_comes_late_is_no_peak() -> None:
    """3 % all the time; for three seconds nobody looked."""
    governor = Governor(1, 0, LIMITS)
    for now in (*range(0, 2 * SECOND, 5 * MS), *range(5 * SECOND, 7 * SECOND, 5 * MS)):
        assert governor.decide(now, np.array([0.03 * now]), 0.0) is None


@limits_of_runs(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.02, 3), st.lists(st.floats(0, 0.5), min_size=2, max_size=2)), min_size=1, max_size=4
    ),
    st.integers(4, 10),
    st.integers(0, 15),
    st.floats(0, 1),
)
def test_whatever_comes_no_second_is_above_the_budget(
    loads: list[tuple[float, list[float]]], step_ms: int, switch_ms: int, hidden: float
) -> None:
    """But for what comes between the last look before a sudden load and the end of the breakpoints."""
    world = World(2, step_ns=step_ms * MS, switch_ns=switch_ms * MS, hidden=hidden)
    for seconds, shares in loads:
        world.run(seconds, steady(*shares))
    unseen = 2 * step_ms * MS + switch_ms * MS + LIMITS.sample_ns
    assert world.highest() <= LIMITS.budget + 0.5 * unseen / SECOND
    world.run(40, steady(0.001, 0.0))  # and it never stays away for ever
    assert world.on
