# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/filters.py: what peers are told of, alone and in a sender."""

import numpy as np
import pytest

from collector import record
from collector.record import Records
from collector.table import SessionTable
from replicator.filters import BadService, FilterSettings, Rate, SessionFilter, chosen, parse_service
from tests.unit.session_records import sessions
from tests.unit.test_link import MS, SECOND, Joined


class Filtered(Joined):
    """Two engines, the sender with a filter."""

    def __init__(self, settings: FilterSettings, slots: int = 64) -> None:
        super().__init__(slots)
        self.use(settings)
        self.connect()
        self.quiet()

    def use(self, settings: FilterSettings) -> None:
        self.filter = SessionFilter(self.table, settings)
        self.filter.tick(self.now_ns)
        self.sender.use_filter(self.filter, settings.rate)

    def quiet(self, rounds: int = 30) -> "Filtered":
        for _ in range(rounds):
            if hasattr(self, "filter"):
                self.filter.tick(self.now_ns)
            super().quiet(1)
        return self

    def held(self) -> list[int]:
        """Slots that the peer has."""
        return np.flatnonzero(self.replica.present).tolist()


def in_state(records: Records, state: int) -> Records:
    records["state"] = state
    return records


def test_services() -> None:
    four, six = sessions(3), sessions(2, ipv6=True)
    four["vaddr"][:, :4] = [[10, 0, 0, 1], [10, 0, 0, 1], [10, 0, 1, 1]]
    four["vport"] = [80, 443, 80]
    four["proto"][1] = record.UDP
    cases = {
        "10.0.0.1": [True, True, False],
        "10.0.0.1:80": [True, False, False],
        "udp:10.0.0.1": [False, True, False],
        "tcp:10.0.0.1:443": [False, False, False],
        "10.0.0.0/23": [True, True, True],
        "10.0.1.0/24:80": [False, False, True],
        "[b00::]:80": [False, False, False],
        "0.0.0.0/0": [True, True, True],
    }
    for text, expected in cases.items():
        assert parse_service(text).matches(four).tolist() == expected, text
    for text, hit in {
        "b00::": True,
        "[b00::]:80": True,
        "[b00::/16]:81": False,
        "tcp:b00::/8": True,
        "0.0.0.0/0": False,
    }.items():
        assert parse_service(text).matches(six).tolist() == [hit, hit], text


@pytest.mark.parametrize(
    "text",
    ["", "nowhere", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:70000", "10.0.0.1/24", "[fd00::1]x", "[fd00::1]:",
     "sctp:10.0.0.1", "10.0.0.1:x", "fd00::1:70000x", "10.0.0.1:99999999999999999999"],
)  # fmt: skip
def test_what_is_no_service(text: str) -> None:
    with pytest.raises(BadService):
        parse_service(text)


def test_other_services_are_not_sent_and_counted_once() -> None:
    joined = Filtered(chosen(services=["11.0.0.0:80"]))
    records = sessions(10)
    records["vport"][5:] = 81
    joined.put(records)
    assert joined.quiet().held() == [0, 1, 2, 3, 4]
    records["fnat_delta"] += 1
    joined.put(records)
    assert joined.quiet().held() == [0, 1, 2, 3, 4]
    assert joined.filter.held_back == {"service": 5, "state": 0, "age": 0}
    assert (joined.replica.sessions()["fnat_delta"] == records["fnat_delta"][:5]).all()
    assert joined.sender.share_count == 5
    assert joined.sender.settled


def test_a_session_that_passed_is_followed_to_its_end() -> None:
    joined = Filtered(chosen(states=["ESTABLISHED"]))
    records = in_state(sessions(4), record.SYN_RECV)
    joined.put(records)
    assert joined.quiet().held() == []
    joined.put(in_state(records[:2], record.ESTABLISHED))
    assert joined.quiet().held() == [0, 1]
    joined.put(in_state(records[:2], record.TIME_WAIT))
    joined.quiet()
    assert joined.replica.sessions()["state"].tolist() == [record.TIME_WAIT] * 2
    joined.end(0, 2)
    assert joined.quiet().held() == [1]
    assert joined.filter.held_back == {"service": 0, "state": 4, "age": 0}


def test_a_slot_that_another_session_gets_which_does_not_pass() -> None:
    joined = Filtered(chosen(services=["11.0.0.0:80"]))
    records = sessions(1)
    joined.put(records)
    assert joined.quiet().held() == [0]
    records["vport"], records["cport"] = 81, 5
    joined.put(records)
    assert joined.quiet().held() == [], "the one before has ended, and that is said"
    records["vport"], records["cport"] = 80, 6
    joined.put(records)
    assert joined.quiet().held() == [0]
    assert joined.replica.sessions()["cport"].tolist() == [6]


def test_sessions_are_sent_when_they_are_old_enough() -> None:
    joined = Filtered(chosen(min_age_s=2))
    joined.put(sessions(3))
    born = joined.now_ns
    joined.quiet(20)
    joined.put(sessions(2, first=3))
    joined.end(1)
    while joined.now_ns < born + 2 * SECOND - 20 * MS:
        assert joined.quiet(1).held() == []
    assert joined.quiet(10).held() == [0, 2]
    assert joined.quiet(40).held() == [0, 2, 3, 4]
    assert joined.filter.held_back["age"] == 5
    assert not joined.filter._young, "nothing waits any more"


def test_a_busy_young_session_waits_in_one_place() -> None:
    joined = Filtered(chosen(min_age_s=2))
    records = sessions(1)
    for number in range(50):
        records["fnat_delta"] = number
        joined.put(records)
        joined.quiet(1)
    assert len(joined.filter._young) == 1


def test_other_filters_in_the_middle() -> None:
    joined = Filtered(chosen(services=["11.0.0.0:80"]))
    records = sessions(6)
    records["vport"][3:] = 81
    joined.put(records)
    assert joined.quiet().held() == [0, 1, 2]
    joined.use(chosen(services=["11.0.0.0:81"]))
    assert joined.quiet().held() == [3, 4, 5]
    joined.sender.use_filter(None)
    assert joined.quiet().held() == [0, 1, 2, 3, 4, 5]
    joined.check_equal()


def test_a_link_that_was_cut_goes_on_where_it_was() -> None:
    joined = Filtered(chosen(states=["ESTABLISHED"]))
    records = sessions(4)
    joined.put(records)
    joined.quiet()
    joined.cut()
    joined.put(in_state(records[:2], record.CLOSE_WAIT))
    joined.put(in_state(sessions(1, first=9), record.SYN_RECV))
    joined.connect()
    assert joined.quiet().held() == [0, 1, 2, 3]
    assert joined.sender.counters["partial_syncs"] == 1


def test_each_random_history_leaves_what_passed_and_lives() -> None:
    random = np.random.default_rng(7)
    for _ in range(20):
        joined = Filtered(chosen(services=["11.0.0.0:80"], states=["ESTABLISHED"]), slots=16)
        passed: dict[int, int] = {}  # slot -> generation
        for _ in range(60):
            slot = int(random.integers(16))
            row = sessions(1, first=slot)
            row["state"] = random.integers(1, 8)
            row["vport"] = random.choice([80, 81])
            row["cport"] = random.integers(3)
            if random.random() < 0.3:
                joined.end(slot)
            else:
                joined.put(row)
            joined.quiet(1 + int(random.integers(2)))  # each state is seen by the filter
            generation = int(joined.table.generation[slot])
            now = joined.table.records[slot]
            if not joined.table.present[slot]:
                passed.pop(slot, None)
            elif now["vport"] == 80 and now["state"] == record.ESTABLISHED:
                passed[slot] = generation
            elif passed.get(slot) != generation:
                passed.pop(slot, None)
            if random.random() < 0.1:
                joined.connect()
                joined.quiet(5)
        assert joined.quiet().held() == sorted(passed)


def test_no_filter_says_everything() -> None:
    assert not chosen().chooses
    table = SessionTable(4)
    assert not FilterSettings(rate=5).chooses
    assert SessionFilter(table, chosen())(np.arange(0)).tolist() == []


def test_a_rate_bounds_what_a_peer_is_told_a_second() -> None:
    joined = Filtered(chosen(rate=100), slots=512)
    joined.put(sessions(500))
    joined.quiet(50)  # a second
    told = joined.sender.counters["created"]
    assert 100 <= told <= 115
    joined.quiet(250)
    joined.check_equal()
    assert joined.sender.counters["created"] == 500


def test_a_full_sync_is_bounded_too() -> None:
    joined = Filtered(chosen(rate=100), slots=512)
    joined.cut()
    joined.put(sessions(300))
    joined.sender.resync()
    joined.connect()
    joined.quiet(50)
    assert 100 <= joined.replica.count <= 115
    joined.quiet(150)
    joined.check_equal()
    assert joined.replica.link_up


def test_rate_by_the_clock() -> None:
    rate = Rate(10)
    assert rate.room(0, 100) == 1
    rate.said(1)
    assert rate.room(50 * MS, 100) == 0
    assert 99 * MS <= rate.next_ns(50 * MS) <= 101 * MS
    assert rate.room(100 * MS, 100) == 1
    assert rate.room(60 * SECOND, 100) == 1, "what was not said is not saved up"
    assert Rate().room(0, 7) == 7
