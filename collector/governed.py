# SPDX-License-Identifier: GPL-2.0-or-later
"""The probes of one process, put on and taken off as the governor says, and the scan's pace with them.

Rules: the governor decides; here is what it needs to know and what its orders mean. Putting probes on or taking them
off waits for the kernel (tens of milliseconds), so a thread of our own does it, while the loop goes on draining the
ring. The scan is quick from the moment that the probes are to go, and until a whole walk was made after they came back:
so whatever happened while nobody was told of it is in the table one walk later.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from probes.errors import DpvsProbeError
from probes.practice import Costs

from .governor import MS, Governor, Limits, Order, Spent

LOOK_NS = 5 * MS  # between two looks at the counters

log = logging.getLogger(__name__)


class Probes(Protocol):
    """``probes.loader.Probes``."""

    costs: Costs

    @property
    def how(self) -> str: ...
    def reattach(self) -> None: ...
    def detach(self) -> None: ...
    def hits_by_cpu(self) -> npt.NDArray[np.uint64]: ...


class Collector(Protocol):
    """``collector.collector.Collector``."""

    alone: bool
    counters: dict[str, int]


class Governed:
    """Call ``tick`` each round, from the thread that drains the ring; ``close`` before the probes are closed."""

    def __init__(
        self,
        probes: Probes,
        collector: Collector,
        cpus: Sequence[Collection[int]],
        now_ns: int,
        *,
        limits: Limits | None = None,
        submit: Callable[[Callable[[], None]], "Future[None]"] | None = None,
    ) -> None:
        """``cpus``: of each worker those it may run on; hits on all of them are taken for its own. The probes are on.

        ``submit``: runs a function on another thread; for tests.
        """
        self._probes, self._collector = probes, collector
        possible = len(probes.hits_by_cpu())
        on = [[float(cpu in own) for cpu in range(possible)] for own in cpus] or [[1.0] * possible]
        self._on: npt.NDArray[np.float64] = np.array(on)
        self._costs = np.array([probes.costs.create_ns, probes.costs.free_ns])
        self._before = self._spent()
        self.governor = Governor(len(on), now_ns, limits)
        self._pool = ThreadPoolExecutor(1, "probes") if submit is None else None
        self._submit = submit or self._on_thread
        self._working: Future[None] | None = None
        self._order: Order | None = None
        self._began_ns = self._next_ns = now_ns
        self._walked = 0  # walks of the scan that have to be over before it slows down
        self.counters = {"attached": 1, "detached_over_budget": 0, "failed": 0}
        self.longest_switch_ns = 0

    def use_budget(self, budget: float) -> None:
        """Another share of a worker's time from now on; 0 takes the probes away."""
        self.governor.limits = replace(self.governor.limits, budget=budget)

    def tick(self, now_ns: int) -> None:
        """Look at the counters, if it is time, and act on what the governor says."""
        if now_ns < self._next_ns:
            return
        self._next_ns = now_ns + LOOK_NS
        if self._working is not None and self._working.done():
            self._over(self._working, now_ns)
        order = self.governor.decide(now_ns, self._spent() - self._before, self._seen())
        if order is not None:
            self._begin(order, now_ns)
        elif self._walked and self._collector.counters["scan_passes"] >= self._walked:
            self._walked = 0
            self._collector.alone = False

    def close(self) -> None:
        """Wait for what is under way."""
        if self._pool is not None:
            self._pool.shutdown()

    def status(self) -> dict[str, Any]:
        """For people and metrics: what is, and what has been."""
        governor, costs = self.governor, self._probes.costs
        return {
            "attached": governor.attached,
            "how": self._probes.how,
            "budget_percent": round(100 * governor.limits.budget, 3),
            "share_percent": round(100 * governor.share, 3),
            "highest_share_percent": round(100 * governor.highest, 3),
            "hit_create_ns": round(costs.create_ns),
            "hit_free_ns": round(costs.free_ns),
            "hit_cost": "measured" if costs.measured else "assumed",
            "switches": dict(self.counters),
            "longest_switch_ms": round(self.longest_switch_ns / 1e6, 1),
            "pause_s": governor.pause_ns / 1e9,
        }

    # --- what the governor has to know -------------------------------------------------------------------------------

    def _spent(self) -> Spent:
        """Nanoseconds that hits took of each worker since the probes were loaded."""
        taken: Spent = self._on @ (self._probes.hits_by_cpu() @ self._costs)
        return taken

    def _seen(self) -> float:
        counters = self._collector.counters
        return counters["created"] * float(self._costs[0]) + counters["deleted"] * float(self._costs[1])

    # --- what its orders mean ----------------------------------------------------------------------------------------

    def _begin(self, order: Order, now_ns: int) -> None:
        self._order, self._began_ns = order, now_ns
        if order is Order.DETACH:
            self._walked = 0
            self._collector.alone = True
        self._working = self._submit(self._probes.detach if order is Order.DETACH else self._probes.reattach)

    def _over(self, work: "Future[None]", now_ns: int) -> None:
        self._working = None
        self.longest_switch_ns = max(self.longest_switch_ns, now_ns - self._began_ns)
        share = 100 * self.governor.limits.budget
        error = work.exception()
        if error is not None:
            if not isinstance(error, DpvsProbeError | OSError):
                raise error
            self.governor.failed(now_ns)
            self.counters["failed"] += 1
            log.warning("the probes could not be put back, the scan goes on alone: %s", error)
            return
        self.governor.carried_out(now_ns)
        if self._order is Order.DETACH:
            self.counters["detached_over_budget"] += 1
            log.info("probes taken away: more than %g %% of a worker's time; the scan goes on alone", share)
        else:
            self.counters["attached"] += 1
            self._walked = self._collector.counters["scan_passes"] + 2  # the walk that is under way does not count
            log.info("probes put back: they will take less than %g %% of a worker's time", share)

    def _on_thread(self, work: Callable[[], None]) -> "Future[None]":
        assert self._pool is not None
        return self._pool.submit(work)
