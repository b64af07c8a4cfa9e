# SPDX-License-Identifier: GPL-2.0-or-later
"""When the probes are to be in DPVS, and when the scan has to do alone.

Rules: pure; time, and what the probes have taken so far, come in as arguments.
- What counts is the share of each worker's time that hits took: number of hits times what one costs. In no window (a
  second) of any worker it is to be above the budget. Short bursts that fit into the window go on being told at once.
- DETACH comes when the window is full, or would be before anybody could act: when what is left of it is less than the
  present rate takes until the breakpoints are out.
- ATTACH comes when a pause is over and what the scan itself sees come and go would take less than ``calm`` of the
  budget (half: so a rate at the limit does not switch to and fro). The scan does not see sessions that come and go
  between two of its looks; so the probes may find more than it said and be taken away again. Each attempt that does not
  last makes the next pause twice as long; one attempt never takes more than the budget of one window.
- Orders are given once; whoever carries them out says ``attached``, ``detached`` or ``failed``. Between, none is given.
"""

from collections import deque
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

MS, SECOND = 1_000_000, 1_000_000_000
Spent = npt.NDArray[np.float64]  # shape (workers,): nanoseconds that probes took of each so far


class Order(Enum):
    """What is to be done now."""

    ATTACH = "attach"
    DETACH = "detach"


@dataclass(frozen=True)
class Limits:
    """Times in ns, shares as fractions of a worker's time."""

    budget: float = 0.05
    window_ns: int = SECOND
    sample_ns: int = 10 * MS  # how finely the window moves
    reaction_ns: int = 40 * MS  # from a look to the next, and from an order to detach until no hit costs any more
    calm: float = 0.5  # of the budget: below it the probes may come back
    calm_ns: int = SECOND  # the scan's view of the rate is taken over so long
    first_pause_ns: int = SECOND
    longest_pause_ns: int = 32 * SECOND
    steady_ns: int = 3 * SECOND  # an attachment that lasted so long was none that failed


class Governor:
    """Holds the probes of one process under their budget."""

    def __init__(self, workers: int, now_ns: int, limits: Limits | None = None, *, attached: bool = True) -> None:
        self.limits = limits or Limits()
        self.attached = attached
        self.shares: Spent = np.zeros(workers)  # of the last window; shorter just after the start
        self.highest = 0.0  # share of any worker in any whole window so far
        self._order: Order | None = None  # given, and not carried out yet
        self._since_ns = now_ns  # of the present state
        self._pause_ns = self.limits.first_pause_ns
        self._samples: deque[tuple[int, Spent]] = deque([(now_ns, np.zeros(workers))])
        self._last: tuple[int, Spent] = self._samples[0]
        self._rate: Spent = np.zeros(workers)  # ns a ns, lately
        self._leaning = 1.0  # of all hits, those of the busiest worker
        self._seen: deque[tuple[int, float]] = deque()

    @property
    def share(self) -> float:
        """Of the worker that the probes took most of, in the last window."""
        return float(self.shares.max(initial=0.0))

    def decide(self, now_ns: int, spent_ns: Spent, seen_ns: float) -> Order | None:
        """What to do. ``spent_ns``: by probes of each worker, ``seen_ns``: what all sessions that the scan saw begin
        and end would have taken of all workers; both since the start, neither ever less than before.
        """
        self._measure(now_ns, spent_ns)
        if self._order is not None:
            return None
        if self.attached:
            self._order = Order.DETACH if self._too_much() else None
        else:
            self._order = Order.ATTACH if self._calm(now_ns, seen_ns) else None
        return self._order

    def carried_out(self, now_ns: int) -> None:
        """The last order is carried out."""
        if self._order is Order.DETACH:
            lasted = now_ns - self._since_ns
            self._longer_pause() if lasted < self.limits.steady_ns else self._shortest_pause()
            self._seen.clear()
        self.attached = self._order is Order.ATTACH
        self._since_ns = now_ns
        self._order = None

    def failed(self, now_ns: int) -> None:
        """The last order could not be carried out; it will be given again after a pause."""
        if self._order is Order.ATTACH:
            self._since_ns = now_ns
            self._longer_pause()
        self._order = None

    @property
    def pause_ns(self) -> int:
        """How long the probes stay away at least, when they are taken away."""
        return self._pause_ns

    def _longer_pause(self) -> None:
        self._pause_ns = min(2 * self._pause_ns, self.limits.longest_pause_ns)

    def _shortest_pause(self) -> None:
        self._pause_ns = self.limits.first_pause_ns

    def _measure(self, now_ns: int, spent_ns: Spent) -> None:
        window = self.limits.window_ns
        last_ns, last = self._last
        if now_ns - last_ns >= self.limits.sample_ns:
            self._rate = (spent_ns - last) / (now_ns - last_ns)
            self._last = now_ns, spent_ns
            self._samples.append(self._last)
        while len(self._samples) > 1 and self._samples[1][0] <= now_ns - window:
            self._samples.popleft()
        began_ns, before = self._samples[0]
        used = spent_ns - before
        self.shares = used / max(window, now_ns - began_ns)  # longer where nobody looked for a while
        self.highest = max(self.highest, self.share)
        total = float(used.sum())
        if self.attached and total > 0:
            self._leaning = float(used.max()) / total

    def _too_much(self) -> bool:
        limits = self.limits
        soon = self.shares + self._rate * (limits.reaction_ns / limits.window_ns)
        return bool((soon > limits.budget).any())

    def _calm(self, now_ns: int, seen_ns: float) -> bool:
        limits = self.limits
        seen = self._seen
        if not seen or now_ns - seen[-1][0] >= limits.sample_ns:
            seen.append((now_ns, seen_ns))
        while len(seen) > 1 and seen[1][0] <= now_ns - limits.calm_ns:
            seen.popleft()
        began_ns, before = seen[0]
        if now_ns - self._since_ns < self._pause_ns or now_ns - began_ns < limits.calm_ns:
            return False
        expected = (seen_ns - before) / (now_ns - began_ns) * self._leaning
        return expected < limits.calm * limits.budget
