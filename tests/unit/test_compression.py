# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/compression.py: when a link is worth LZ4."""

import pytest

from replicator.compression import AGAIN_NS, KEEP_NS, PAUSE_FRAMES, SECOND, UNPAID_FRAMES, Pays

MS = 1_000_000
WINDOW = 4 << 20
RATIO = 0.55  # what LZ4 leaves of sessions


class Way:
    """A link of so many bytes a second to a receiver that takes so many bytes of sessions a second, kept busy."""

    def __init__(
        self,
        link: float,
        receiver: float,
        setting: bool | None = None,
        ratio: float = RATIO,
        *,
        on_the_way: float | None = None,
        window_open: float = 1.0,
    ) -> None:
        """What the transport says: the part of the bytes, and of the time; None: it knows nothing."""
        self.link, self.receiver, self.ratio = link, receiver, ratio
        self.on_the_way, self.window_open = on_the_way, window_open
        self.pays = Pays(setting)
        self.open_ns = 0
        self.now_ns = 10**12
        self.flight: list[tuple[float, float]] = []  # wire and plain bytes, a millisecond's worth each

    def busy(self, ms: int) -> "Way":
        self.pays.waiting(self.now_ns, held_back=True)
        for _ in range(ms):
            while sum(wire for wire, _ in self.flight) < min(WINDOW, self.link / 20):  # 50 ms at the most
                left = self.ratio if self.pays.on else 1.0
                plain = min(self.link / left, self.receiver) / 1000
                self.flight.append((plain * left, plain))
                self.pays.packed(smaller=left < 0.9)
            wire, plain = self.flight.pop(0)
            self.now_ns += MS
            if self.on_the_way is not None:
                self.open_ns += int(MS * self.window_open)
                in_flight = int(sum(w for w, _ in self.flight))
                self.pays.on_the_way(int(in_flight * self.on_the_way), self.open_ns, in_flight)
            self.pays.acknowledged(int(wire), int(plain), int(sum(w for w, _ in self.flight)), self.now_ns)
            self.pays.waiting(self.now_ns, held_back=True)
        return self


def test_a_link_that_never_held_us_back_is_fast() -> None:
    pays = Pays(None)
    pays.acknowledged(10, 10, 0, 10**12)
    pays.waiting(10**12, held_back=False)
    assert not pays.on
    assert (pays.bytes_per_s, pays.trials) == (0, 0)


@pytest.mark.parametrize(
    ("link", "receiver", "on"),
    [
        (1e6, 1e9, True),
        (50e6, 1e9, True),  # half a gigabit
        (120e6, 2e9, False),  # a whole one: not even tried
        (1e9, 50e6, False),  # the receiver is what is slow
        (50e6, 52e6, False),  # both are
        (50e6, 75e6, True),
    ],
)
def test_it_is_tried_and_stays_where_it_pays(link: float, receiver: float, on: bool) -> None:
    way = Way(link, receiver).busy(8000)
    assert way.pays.on is on
    assert way.pays.trials == (0 if min(link, receiver) > 63e6 else 1)
    assert way.pays.bytes_per_s == pytest.approx(min(link / (RATIO if on else 1), receiver), rel=0.1)


@pytest.mark.parametrize(
    ("on_the_way", "window_open", "trials"),
    [(0.0, 0, 0), (0.45, 1, 0), (0.55, 1, 1), (1, 1, 1), (1, 0.45, 0), (1, 0.55, 1), (None, 0, 1)],
)
def test_it_is_tried_only_where_the_way_is_what_is_slow(
    on_the_way: float | None, window_open: float, trials: int
) -> None:
    way = Way(50e6, 1e9, on_the_way=on_the_way, window_open=window_open).busy(2000)
    assert way.pays.trials == trials
    assert way.pays.on is (trials > 0)


def test_a_way_that_becomes_slow_is_noticed() -> None:
    way = Way(50e6, 1e9, on_the_way=0.0).busy(2000)
    assert not way.pays.on
    way.on_the_way = 1.0
    assert way.busy(2000).pays.on


def test_a_trial_that_failed_comes_again_and_ever_more_seldom() -> None:
    way = Way(1e9, 50e6).busy(1000)
    counts = []
    for _ in range(8):
        way.busy(AGAIN_NS // MS)
        counts.append(way.pays.trials)
    assert counts[0] == 2
    assert counts[-1] == 4
    assert not way.pays.on


def test_when_the_receiver_becomes_faster_it_comes_on() -> None:
    way = Way(50e6, 50e6).busy(1000)
    assert not way.pays.on
    way.receiver = 1e9
    assert way.busy(AGAIN_NS // MS + 1000).pays.on


def test_when_the_link_becomes_faster_it_goes_off() -> None:
    way = Way(25e6, 60e6).busy(2000)
    assert way.pays.on
    way.link = 2e9
    assert not way.busy(KEEP_NS // MS + 1000).pays.on


def test_a_few_small_acknowledgements_judge_nothing() -> None:
    assert Way(1000, 1000).busy(19).pays.trials == 0


def test_what_does_not_shrink_is_left_alone_for_a_while() -> None:
    way = Way(50e6, 1e9).busy(2000)
    for _ in range(UNPAID_FRAMES):
        assert way.pays.on
        way.pays.packed(smaller=False)
    for _ in range(PAUSE_FRAMES):
        assert not way.pays.on
        way.pays.packed(smaller=False)
    assert way.pays.on


def test_what_never_shrinks_is_given_up() -> None:
    way = Way(50e6, 1e9, ratio=1.0).busy(5000)
    assert not way.pays.on
    assert way.pays.trials == 1


def test_the_operator_decides() -> None:
    assert Way(1e9, 1e9, True).busy(100).pays.on
    assert not Way(1e6, 1e9, False).busy(3000).pays.on


def test_another_connection_is_measured_anew() -> None:
    way = Way(50e6, 1e9).busy(2000)
    assert way.pays.on
    way.pays.reset()
    assert not way.pays.on
    assert way.now_ns > SECOND
