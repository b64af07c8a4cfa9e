# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/histogram.py against plain percentiles."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from replicator.histogram import Histogram

NOW = 2**62


def test_empty() -> None:
    assert Histogram().report() == {"count": 0, "p50_ns": 0, "p99_ns": 0, "max_ns": 0}


@given(st.lists(st.integers(1000, 10**12), min_size=1, max_size=300), st.sampled_from([1, 50, 90, 99, 100]))
def test_percentiles_are_right_to_a_fifth(values: list[int], percent: int) -> None:
    h = Histogram()
    for part in (values[::2], values[1::2]):
        h.add(NOW - np.array(part, np.int64), NOW)
    exact = sorted(values)[max(1, -(-len(values) * percent // 100)) - 1]
    upper = h.percentile_ns(percent)
    assert exact <= upper * 1.004 + 1  # the buckets' bounds are known to one in 256
    assert upper <= exact * 1.2 + 1
    assert h.count == len(values)


def test_whatever_is_out_of_range_is_counted() -> None:
    h = Histogram()
    h.add(NOW - np.array([-5, 0, NOW - 1], np.int64), NOW)
    assert h.count == 3
    assert h.percentile_ns(50) <= 1200
    assert h.greatest_ns == NOW - 1
