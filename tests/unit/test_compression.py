# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/compression.py: when a link is worth LZ4."""

import pytest

from replicator.compression import PAUSE_FRAMES, UNPAID_FRAMES, Pays

MS = 1_000_000


def busy(pays: Pays, bytes_per_ms: int, ms: int = 100) -> None:
    pays.waiting(0, held_back=True)
    for now in range(1, ms + 1):
        pays.acknowledged(bytes_per_ms, now * MS)
        pays.waiting(now * MS, held_back=True)


def test_a_link_that_never_held_us_back_is_fast() -> None:
    pays = Pays(None)
    pays.acknowledged(10, 10**12)
    pays.waiting(10**12, held_back=False)
    assert not pays.on
    assert pays.bytes_per_s == 0


@pytest.mark.parametrize(("bytes_per_ms", "on"), [(1000, True), (150_000, True), (160_000, False), (1_000_000, False)])
def test_slow_links_compress(bytes_per_ms: int, on: bool) -> None:
    pays = Pays(None)
    busy(pays, bytes_per_ms)
    assert pays.on is on
    assert pays.bytes_per_s == pytest.approx(bytes_per_ms * 1000)


def test_a_few_small_acknowledgements_judge_nothing() -> None:
    pays = Pays(None)
    busy(pays, 1, ms=19)
    assert not pays.on


def test_what_does_not_shrink_is_left_alone_for_a_while() -> None:
    pays = Pays(None)
    busy(pays, 1000)
    for _ in range(UNPAID_FRAMES):
        assert pays.on
        pays.packed(smaller=False)
    for _ in range(PAUSE_FRAMES):
        assert not pays.on
        pays.packed(smaller=False)
    assert pays.on


def test_the_operator_decides() -> None:
    pays = Pays(True)
    assert pays.on
    pays = Pays(False)
    busy(pays, 1)
    assert not pays.on


def test_another_connection_is_measured_anew() -> None:
    pays = Pays(None)
    busy(pays, 1000)
    pays.reset()
    assert not pays.on
