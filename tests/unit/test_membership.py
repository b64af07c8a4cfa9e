# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/membership.py: who joins and who leaves, and that nothing else does."""

from collections.abc import Iterable

import pytest

from replicator.membership import Membership
from replicator.placement import MAX_PEERS

SETTLE, LEAVE = 5, 50
SOURCES = ("etcd", "dns")


class Play:
    """A membership, a clock, and which links work."""

    def __init__(self, given: Iterable[str] = ()) -> None:
        self.membership = Membership(given, SOURCES, settle_ns=SETTLE, leave_ns=LEAVE)
        self.now = 1000
        self.up: set[str] = set()

    def hear(self, *members: str, source: str = "etcd") -> bool:
        return self.membership.heard(source, members, self.now)

    def decide(self, after: int = 0) -> tuple[list[str], list[str]]:
        self.now += after
        joins, leaves = self.membership.decide(self.now, self.up.__contains__)
        return joins, leaves

    def with_members(self, *members: str) -> "Play":
        self.hear(*members)
        self.decide()
        assert sorted(self.decide(SETTLE)[0]) == sorted(members)
        self.up |= set(members)
        return self


NOTHING: tuple[list[str], list[str]] = ([], [])


@pytest.fixture
def play() -> Play:
    return Play(["g:1"])


def test_who_is_listed_joins_after_a_moment(play: Play) -> None:
    play.hear("b:1")
    assert play.decide() == NOTHING
    assert play.decide(SETTLE - 1) == NOTHING
    assert play.decide(1) == (["b:1"], [])
    assert play.decide(1) == NOTHING
    assert play.membership.members == {"g:1", "b:1"}


def test_who_flickers_never_joins(play: Play) -> None:
    for _ in range(20):
        play.hear("b:1")
        assert play.decide(SETTLE - 1) == NOTHING
        play.hear()
        assert play.decide(1) == NOTHING


def test_who_vanishes_from_the_list_stays_while_its_link_works(play: Play) -> None:
    play.with_members("b:1")
    play.hear()
    for _ in range(10):
        assert play.decide(LEAVE) == NOTHING
    assert play.membership.source_of("b:1") == "etcd, no longer listed"
    play.up.clear()
    assert play.decide(1) == NOTHING
    assert play.decide(LEAVE - 1) == NOTHING
    assert play.decide(1) == ([], ["b:1"])


def test_a_link_that_comes_back_in_time_starts_the_wait_anew(play: Play) -> None:
    play.with_members("b:1")
    play.hear()
    for _ in range(5):
        play.up.clear()
        assert play.decide(1) == NOTHING
        assert play.decide(LEAVE - 1) == NOTHING
        play.up.add("b:1")
        assert play.decide(1) == NOTHING


def test_who_is_listed_again_in_time_stays(play: Play) -> None:
    play.with_members("b:1")
    play.up.clear()
    play.hear()
    assert play.decide(1) == NOTHING
    assert play.decide(LEAVE - 1) == NOTHING
    play.hear("b:1")
    for _ in range(5):
        assert play.decide(LEAVE) == NOTHING


def test_a_link_that_is_down_removes_nobody_who_is_listed(play: Play) -> None:
    play.with_members("b:1")
    play.up.clear()
    for _ in range(5):
        assert play.decide(LEAVE) == NOTHING


def test_a_source_that_fails_has_told_nothing(play: Play) -> None:
    play.with_members("b:1", "c:1")
    play.up.clear()
    assert play.membership.failed("etcd", "no answer")
    assert not play.membership.failed("etcd", "connection refused")  # said once, whichever endpoint it is about
    assert not play.membership.failed("etcd", "no answer")
    for _ in range(5):
        assert play.decide(LEAVE) == NOTHING
    assert play.membership.report(play.now)["sources"]["etcd"]["trouble"] == "no answer"
    assert play.hear("b:1", "c:1")  # the same list, but news: it answers again
    assert play.membership.report(play.now)["sources"]["etcd"]["trouble"] == ""
    assert not play.hear("b:1", "c:1")


def test_who_is_given_stays_whatever_lists_say(play: Play) -> None:
    play.hear("g:1")
    play.decide(SETTLE)
    play.hear()
    for _ in range(5):
        assert play.decide(LEAVE) == NOTHING
    assert play.membership.source_of("g:1") == "given"


def test_one_of_two_sources_is_enough(play: Play) -> None:
    play.with_members("b:1")
    play.hear("b:1", source="dns")
    play.decide()
    assert play.membership.source_of("b:1") == "etcd, dns"
    play.hear()
    play.up.clear()
    assert play.decide(LEAVE) == NOTHING
    assert play.decide(LEAVE) == NOTHING
    assert play.membership.source_of("b:1") == "dns"


def test_there_are_as_many_as_can_be_placed(play: Play) -> None:
    members = [f"m{number:03}:1" for number in range(MAX_PEERS + 5)]
    play.hear(*members)
    play.decide()
    joins, _ = play.decide(SETTLE)
    assert len(joins) == MAX_PEERS - 1  # one was given
    assert play.membership.report(play.now)["waiting_to_join"] == 6
    play.hear(*(set(members) - {joins[0]}))
    play.decide(1)
    joins, leaves = play.decide(LEAVE)
    assert len(leaves) == 1
    assert len(play.decide(1)[0]) == 1  # there is room for one more


def test_others_are_given(play: Play) -> None:
    play.with_members("b:1")
    play.membership.give(["g:2", "b:1"])
    assert play.decide() == (["g:2"], ["g:1"]), "at once, whether their links work or not"
    assert play.membership.members == {"g:2", "b:1"}
    assert play.decide(LEAVE) == NOTHING
    assert play.membership.source_of("b:1") == "given, etcd"
    play.membership.give(["g:2"])
    assert play.decide() == NOTHING, "b is listed all the same"
    play.hear()
    play.up.discard("b:1")
    play.decide()
    assert play.decide(LEAVE) == ([], ["b:1"])
    play.membership.give([])
    play.membership.give(["g:2"])
    assert play.decide() == NOTHING, "what was taken back before anybody looked was never said"
    play.membership.give([f"n:{number}" for number in range(MAX_PEERS + 3)])
    joins, leaves = play.decide()
    assert (len(joins), leaves) == (MAX_PEERS - 1, ["g:2"])
    assert len(play.decide()[0]) == 1
    assert len(play.membership.members) == MAX_PEERS
