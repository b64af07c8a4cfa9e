# SPDX-License-Identifier: GPL-2.0-or-later
"""Counts of durations in logarithmic buckets: 128 of them, four an octave, from 1 microsecond to over an hour."""

import numpy as np
import numpy.typing as npt

from . import packing

_BUCKETS = 128
_PER_OCTAVE = 4
_LEAST_NS = 1_000


def upper_ns() -> npt.NDArray[np.float64]:
    """What the durations in each bucket do not exceed, (128,)."""
    bounds: npt.NDArray[np.float64] = _LEAST_NS * 2 ** (np.arange(1, _BUCKETS + 1) / _PER_OCTAVE)
    return bounds


class Histogram:
    """Durations in ns; memory and time of an answer do not depend on how many were added."""

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(_BUCKETS, np.int64)
        self.greatest_ns = 0

    @property
    def count(self) -> int:
        """How many were added."""
        return int(self.counts.sum())

    def add(self, since_ns: npt.NDArray[np.int64], now_ns: int) -> None:
        """n durations, from each time until now; those since 0 do not count, negative ones count as 0."""
        self.greatest_ns = max(self.greatest_ns, packing.tally(since_ns, now_ns, self.counts))

    def percentile_ns(self, percent: float) -> int:
        """The duration that ``percent`` of all do not exceed, to a fifth; 0 when there are none."""
        count = self.count
        if count == 0:
            return 0
        rank = max(1, -(-count * percent // 100))
        bucket = int(np.searchsorted(np.cumsum(self.counts), rank))
        return min(int(_LEAST_NS * 2 ** ((bucket + 1) / _PER_OCTAVE)), self.greatest_ns)

    def report(self) -> dict[str, int]:
        """What a person wants to see of it."""
        return {
            "count": self.count,
            "p50_ns": self.percentile_ns(50),
            "p99_ns": self.percentile_ns(99),
            "max_ns": self.greatest_ns,
        }
