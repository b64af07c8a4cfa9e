# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/replica.py: generations, full syncs, runs of a node, links that come and go."""

import numpy as np
import pytest

from collector import record
from collector.record import TEMPLATE, Slots
from replicator.replica import LinkRefused, Replica, Replicas
from replicator.wire import Fault, Hello, ProtocolError, Reason, Role
from tests.unit.session_records import sessions

SECOND = 1_000_000_000
ME = Hello("b", 1, Role.RECEIVER)


def hello(epoch: int = 1, *, node: str = "a", slots: int = 16) -> Hello:
    return Hello(node, epoch, slots=slots)


def generation(n: int, value: int) -> np.ndarray:  # type: ignore[type-arg]
    records = sessions(n)
    records["generation"] = value
    return records


def ends(*pairs: tuple[int, int]) -> tuple[Slots, np.ndarray]:  # type: ignore[type-arg]
    return np.array([slot for slot, _ in pairs], np.int64), np.array([g for _, g in pairs], np.uint32)


@pytest.fixture
def replica() -> Replica:
    return Replica(hello(), 1)


def pending(replica: Replica) -> list[int]:
    return sorted(replica.pending.take(1000).tolist())


def test_new_changed_unchanged(replica: Replica) -> None:
    replica.put(sessions(3), 1)
    assert pending(replica) == [0, 1, 2]
    records = sessions(3)
    records["state"][1] = record.FIN_WAIT
    records["rs_end_seq"][2] = 7
    replica.put(records, 2)
    assert pending(replica) == [1]
    assert replica.sessions().tobytes() == records.tobytes()
    assert (replica.count, replica.counters["created"], replica.counters["updated"]) == (3, 3, 1)


def test_an_older_generation_changes_nothing(replica: Replica) -> None:
    replica.put(generation(1, 5), 1)
    replica.put(generation(1, 4), 1)
    replica.end(*ends((0, 4)), 1)
    assert (replica.count, int(replica.generation[0]), replica.counters["stale"]) == (1, 5, 2)


def test_an_ended_generation_does_not_come_back(replica: Replica) -> None:
    replica.put(generation(1, 5), 1)
    replica.end(*ends((0, 6)), 1)  # 6 came and went without a word
    pending(replica)
    for stale in (4, 5, 6):
        replica.put(generation(1, stale), 1)
    assert (replica.count, pending(replica)) == (0, [])
    replica.put(generation(1, 7), 1)
    assert replica.count == 1


def test_generations_go_round(replica: Replica) -> None:
    replica.put(generation(1, 0xFFFFFFFF), 1)
    replica.put(generation(1, 1), 1)
    assert int(replica.generation[0]) == 1
    replica.end(*ends((0, 0xFFFFFFFF)), 1)
    assert replica.count == 1


def test_the_end_of_an_unknown_session(replica: Replica) -> None:
    replica.end(*ends((3, 9)), 1)
    assert (replica.count, pending(replica)) == (0, [])


def test_a_slot_named_twice(replica: Replica) -> None:
    twice = sessions(2)
    twice["slot"] = 1
    with pytest.raises(ProtocolError) as caught:
        replica.put(twice, 1)
    assert caught.value.fault is Fault.RECORD
    with pytest.raises(ProtocolError):
        replica.end(*ends((3, 1), (3, 2)), 1)
    assert replica.count == 0


def test_a_full_sync_drops_what_it_does_not_name(replica: Replica) -> None:
    replica.put(sessions(4), 1)
    pending(replica)
    replica.begin_full_sync(1, 10)
    replica.put(sessions(2), 11)
    replica.put(sessions(1, first=9), 11)
    assert not replica.synced
    assert replica.end_full_sync(1, 15) == 5
    assert pending(replica) == [2, 3, 9]
    assert (replica.count, replica.synced, replica.counters["swept"]) == (3, True, 2)
    replica.put(sessions(4), 12)  # the origin names them again, with the same generation
    assert replica.count == 5


def test_the_end_of_a_full_sync_that_did_not_begin(replica: Replica) -> None:
    with pytest.raises(ProtocolError):
        replica.end_full_sync(1, 1)
    replica.begin_full_sync(1, 1)
    with pytest.raises(ProtocolError):
        replica.end_full_sync(2, 1)


def test_copies_are_refreshed_only_on_a_link_that_told_all(replica: Replica) -> None:
    replica.connected = True
    assert not replica.link_up
    replica.begin_full_sync(1, 1)
    replica.end_full_sync(1, 1)
    assert replica.link_up
    replica.connected = False
    assert not replica.link_up


def test_digest_does_not_depend_on_how_it_came(replica: Replica) -> None:
    other = Replica(hello(), 2)
    replica.put(sessions(4), 1)
    other.put(record.pick(sessions(4), np.array([3, 1])), 1)
    other.put(sessions(4), 1)
    assert replica.digest() == other.digest() == record.digest(sessions(4))


class TestReplicas:
    def test_one_table_per_run(self) -> None:
        replicas = Replicas(ME)
        first = replicas.open(hello(1), "x", 1)
        assert replicas.open(hello(1), "y", 2) is first
        second = replicas.open(hello(2), "z", 3)
        assert list(replicas) == [first, second]
        assert replicas.get(first.node_id) is first
        assert replicas.synced(second, 4) is first
        assert list(replicas) == [second]
        assert not first.connected
        assert replicas.synced(second, 5) is None

    def test_sessions_of_a_dpvs_that_is_no_more_have_not_ended(self) -> None:
        replicas = Replicas(ME)
        first = replicas.open(Hello("a", 1, slots=16, instance=7), "x", 0)
        first.put(sessions(2), 0)
        pending(first)
        replicas.close(first, "x", 0)
        second = replicas.open(Hello("a", 2, slots=16, instance=8), "y", SECOND)
        assert replicas.synced(second, SECOND) is first
        assert list(replicas) == [first, second]
        assert replicas.get(first.node_id) is second
        assert (first.link_up, first.count, pending(first)) == (False, 2, [])
        replicas.age(89 * SECOND)
        assert list(replicas) == [first, second]
        replicas.age(91 * SECOND)
        assert list(replicas) == [second]
        assert pending(first) == []

    def test_ties_of_a_node_that_is_gone_are_kept_for_a_while(self) -> None:
        replicas = Replicas(ME)
        first = replicas.open(Hello("a", 1, slots=16, instance=7), "x", 0)
        rows = sessions(2)
        rows["flags"][1], rows["timeout_ms"] = TEMPLATE, 2000
        first.put(rows, 0)
        replicas.close(first, "x", 0)
        replicas.age(3 * SECOND)
        assert first.present.nonzero()[0].tolist() == [1]
        replicas.age(599 * SECOND)
        assert first.count == 1
        replicas.age(600 * SECOND)
        assert first.count == 0

    def test_a_third_run_while_the_second_comes(self) -> None:
        replicas = Replicas(ME)
        replicas.open(hello(1), "x", 1)
        second = replicas.open(hello(2), "y", 2)
        third = replicas.open(hello(3), "z", 3)
        assert second.owner is None
        assert replicas.synced(second, 4) is None
        assert replicas.synced(third, 5) is not None
        assert list(replicas) == [third]

    @pytest.mark.parametrize(
        ("wrong", "reason"),
        [
            (hello(1), Reason.STALE_EPOCH),
            (hello(2, slots=17), Reason.PROTOCOL),
            (hello(9, slots=0), Reason.TOO_LARGE),
            (hello(9, slots=33), Reason.TOO_LARGE),
            (hello(9, node="b"), Reason.SAME_NODE),
            (hello(9, node="c"), Reason.TOO_LARGE),
        ],
    )
    def test_refused(self, wrong: Hello, reason: Reason) -> None:
        replicas = Replicas(ME, max_slots=32, max_origins=1)
        replicas.open(hello(2), "x", 1)
        with pytest.raises(LinkRefused) as caught:
            replicas.open(wrong, "y", 2)
        assert caught.value.reason is reason

    def test_no_memory_is_a_refusal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def nothing_left(*_: object) -> None:
            raise MemoryError

        replicas = Replicas(ME)
        monkeypatch.setattr("replicator.replica.Dirty", nothing_left)
        with pytest.raises(LinkRefused, match="no memory for a pool of 16 slots") as caught:
            replicas.open(hello(1), "x", 1)
        assert caught.value.reason is Reason.TOO_LARGE
        assert list(replicas) == []

    def test_an_earlier_run_is_refused_while_a_later_one_comes(self) -> None:
        replicas = Replicas(ME)
        replicas.open(hello(1), "x", 1)
        replicas.open(hello(3), "y", 1)
        for epoch in (1, 2):
            with pytest.raises(LinkRefused):
                replicas.open(hello(epoch), "z", 2)

    def test_only_the_link_that_owns_a_replica_closes_it(self) -> None:
        replicas = Replicas(ME)
        replica = replicas.open(hello(1), "old", 1)
        replicas.open(hello(1), "new", 2)
        replicas.close(replica, "old", 3)
        assert replica.connected
        replicas.close(replica, "new", 4)
        assert (replica.connected, replica.since_ns) == (False, 4)

    def test_what_was_let_go_gets_another_number(self) -> None:
        replicas = Replicas(ME)
        replica = replicas.open(hello(1), "x", 0)
        replica.begin_full_sync(1, 1)
        replica.put(sessions(2), 1)
        replica.end_full_sync(1, 1)
        number = replica.number
        replicas.age(1000 * SECOND)
        assert (replica.count, replica.number) == (2, number)
        replicas.close(replica, "x", 0)
        replicas.age(89 * SECOND)
        assert replica.count == 2
        replicas.age(90 * SECOND)
        assert replica.count == 0
        assert replica.number != number
        assert not replica.synced
