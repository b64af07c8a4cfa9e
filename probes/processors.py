# SPDX-License-Identifier: GPL-2.0-or-later
"""Which processors this process runs on: none that a worker of DPVS has, as far as others are left.

Rules: a worker asks its port for packets all the time, so whatever else runs on its processor takes turns with it.
``without`` decides and does nothing. ``KeptOff`` does it for every thread there is; threads and children that come
later begin as the one that makes them (sched_setaffinity(2)). Only our own threads are moved, never DPVS's, and what
the administrator has chosen (cgroups, CPUAffinity=, taskset) is only made smaller.
"""

import logging
import os
from collections.abc import Collection, Iterable
from itertools import groupby
from pathlib import Path

LEAST = 2  # on fewer, the loop and what it has done in threads would hold up each other
THREADS = Path("/proc/self/task")

log = logging.getLogger(__name__)


def without(allowed: Collection[int], workers: Iterable[Collection[int]]) -> frozenset[int] | None:
    """The processors of ``allowed`` that no worker runs on; None where workers leave fewer than LEAST of them."""
    left = frozenset(allowed).difference(*workers)
    return left if len(left) >= LEAST or left == frozenset(allowed) else None


def shown(numbers: Iterable[int]) -> str:
    """As ``taskset`` has them: ``0,2-5``."""
    runs = groupby(enumerate(sorted(set(numbers))), lambda at: at[1] - at[0])
    ends = [(run[0], run[-1]) for run in ([number for _, number in run] for _, run in runs)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


class KeptOff:
    """This process off the processors of ``workers`` until ``close``, which undoes it."""

    def __init__(self, workers: Iterable[Collection[int]]) -> None:
        taken = [frozenset(one) for one in workers]
        allowed = os.sched_getaffinity(0)
        self._before: set[int] | None = None
        left = without(allowed, taken)
        busy = shown(frozenset().union(*taken))
        if left is None:
            log.info("processors %s: those of DPVS's workers (%s) leave too few to keep off them", shown(allowed), busy)
        elif left != allowed and _move(left):
            self._before = allowed
            log.info("processors %s, off those of DPVS's workers (%s)", shown(left), busy)

    def close(self) -> None:
        """Every thread where it might run before."""
        if self._before is not None:
            _move(self._before)
            self._before = None


def _move(processors: Collection[int]) -> bool:
    """Every thread of this process; whether that could be done, else it is said."""
    for thread in THREADS.iterdir():
        try:
            os.sched_setaffinity(int(thread.name), processors)
        except ProcessLookupError:
            continue  # it has just ended
        except OSError as error:
            log.warning("processors cannot be chosen: %s", error.strerror)
            return False
    return True
