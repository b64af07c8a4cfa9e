# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/histogram.py against plain percentiles."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from replicator.histogram import Histogram


def test_empty() -> None:
    assert Histogram().report() == {"count": 0, "p50_ns": 0, "p99_ns": 0, "max_ns": 0}


@given(st.lists(st.integers(1000, 10**12), min_size=1, max_size=300), st.sampled_from([1, 50, 90, 99, 100]))
def test_percentiles_are_right_to_a_fifth(values: list[int], percent: int) -> None:
    h = Histogram()
    h.add(np.array(values[::2], np.int64))
    h.add(np.array(values[1::2], np.int64))
    exact = sorted(values)[max(1, -(-len(values) * percent // 100)) - 1]
    assert exact <= h.percentile_ns(percent) + 1 <= exact * 1.2 + 2
    assert h.count == len(values)


def test_whatever_is_out_of_range_is_counted() -> None:
    h = Histogram()
    h.add(np.array([-5, 0, 2**62], np.int64))
    assert h.count == 3
    assert h.percentile_ns(50) <= 1200
    assert h.greatest_ns == 2**62
