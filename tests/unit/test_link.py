# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/link.py: two engines joined by streams of bytes that a test holds, cuts and loses. See also
test_link_model.py.
"""

from collections import deque

import numpy as np
import pytest

from collector.record import RECORD, Records, pick
from collector.table import SessionTable
from replicator import blocks, wire
from replicator.link import FULL_SYNCS_A_SECOND, Down, Event, LinkSettings, Receiver, Sender, State, Synced, Syncing, Up
from replicator.replica import Replica, Replicas
from replicator.wire import Hello, Opcode, Reason, Role, SyncReason
from tests.unit.session_records import sessions

MS, SECOND = 1_000_000, 1_000_000_000


def events(engine: Sender | Receiver) -> list[Event]:
    """What happened since the last call, but for the beginnings of full syncs."""
    found = []
    while (event := engine.next_event()) is not None:
        if not isinstance(event, Syncing):
            found.append(event)
    return found


class Joined:
    """Node a with a table, node b with replicas, and a connection between them when there is one."""

    def __init__(self, slots: int = 16, *, epoch: int = 1, **wanted: int) -> None:
        self.settings = LinkSettings(**wanted)  # type: ignore[arg-type]
        self.now_ns = 1000 * SECOND
        self.replicas = Replicas(Hello("b", epoch=100, role=Role.RECEIVER))
        self.receiver: Receiver | None = None
        self.down: deque[bytes] = deque()  # from a to b, on the way
        self.up: deque[bytes] = deque()
        self.start_a(slots, epoch)

    def start_a(self, slots: int, epoch: int) -> None:
        self.table = SessionTable(slots)
        self.table.complete = True
        self.dirty = self.table.add_peer("b")
        self.sender = Sender(self.table, self.dirty, Hello("a", epoch=epoch, slots=slots), self.settings)

    def start_b(self) -> None:
        self.replicas = Replicas(Hello("b", epoch=self.replicas.me.epoch + 1, role=Role.RECEIVER))

    def put(self, records: Records) -> None:
        n = len(records)
        self.table.apply(records["slot"].astype(np.int64), records, np.ones(n, np.bool_), self.now_ns)

    def end(self, *slots: int) -> None:
        n = len(slots)
        self.table.apply(np.array(slots, np.int64), np.zeros(n, RECORD), np.zeros(n, np.bool_), self.now_ns)

    def connect(self) -> None:
        self.cut()
        self.sender.connected(self.now_ns)
        self.receiver = Receiver(self.replicas, self.settings, now_ns=self.now_ns)

    def cut(self) -> None:
        self.down.clear()
        self.up.clear()
        self.sender.disconnected(self.now_ns)
        if self.receiver is not None:
            self.receiver.disconnected(self.now_ns)
            self.receiver = None

    def pump(self) -> None:
        """What the engines have to say goes on its way."""
        if self.receiver is not None:
            self.down.extend(bytes(b) for b in self.sender.outgoing(self.now_ns))
            self.up.extend(bytes(b) for b in self.receiver.outgoing(self.now_ns))

    def deliver(self) -> None:
        """All that is on the way arrives."""
        if self.receiver is None:
            return
        while self.down:
            self.receiver.receive(self.down.popleft(), self.now_ns)
        while self.up:
            self.sender.receive(self.up.popleft(), self.now_ns)

    def quiet(self, rounds: int = 30) -> "Joined":
        for _ in range(rounds):
            self.now_ns += 20 * MS
            self.pump()
            self.deliver()
        return self

    @property
    def replica(self) -> Replica:
        found = self.replicas.get(self.sender.me.node_id)
        assert found is not None
        return found

    def check_equal(self) -> None:
        mine, theirs = pick(self.table.records, self.table.shared), self.replica.sessions()
        assert mine.tobytes() == theirs.tobytes()
        assert self.table.digest() == self.replica.digest()
        assert self.replica.count == len(theirs)


@pytest.fixture
def joined() -> Joined:
    joined = Joined()
    joined.connect()
    return joined.quiet()


def test_introductions_and_first_full_sync() -> None:
    joined = Joined()
    joined.put(sessions(5))
    joined.connect()
    joined.quiet()
    joined.check_equal()
    assert joined.receiver is not None
    up, synced = events(joined.sender)
    assert isinstance(up, Up)
    assert (up.peer.node, up.full_sync) == ("b", SyncReason.FIRST)
    assert isinstance(synced, Synced)
    assert synced.sessions == 5
    up, synced = events(joined.receiver)
    assert isinstance(up, Up)
    assert isinstance(synced, Synced)
    assert joined.replica.link_up
    assert joined.sender.settled


def test_nothing_is_told_before_the_table_is_complete() -> None:
    joined = Joined()
    joined.table.complete = False
    joined.put(sessions(3))
    joined.connect()
    joined.quiet()
    assert joined.replica.count == 0
    assert joined.sender.state is State.SYNCING
    joined.table.complete = True
    joined.quiet()
    joined.check_equal()


def test_a_quiet_link_sends_a_single_change_at_once(joined: Joined) -> None:
    joined.put(sessions(1))
    before = joined.now_ns
    joined.pump()
    joined.deliver()
    assert joined.replica.count == 1
    joined.now_ns = before + 300_000
    joined.pump()
    joined.deliver()
    assert joined.sender.settled
    assert joined.sender.latency.count == 1
    assert 250_000 < joined.sender.latency.percentile_ns(50) <= 300_000


def test_changes_wait_for_the_acknowledgement_or_32_or_100_ms(joined: Joined) -> None:
    joined = Joined(slots=100)
    joined.connect()
    joined.quiet()
    sent = joined.sender.counters

    def frames_after(n: int, first: int, later_ns: int = 0) -> int:
        before = sent["frames_sent"]
        if n:
            joined.put(sessions(n, first=first))
        joined.now_ns += later_ns
        joined.pump()
        return sent["frames_sent"] - before

    assert frames_after(1, 0) == 1
    assert frames_after(1, 1) == 0  # one frame is in flight
    assert frames_after(30, 2) == 0
    assert frames_after(1, 32) == 1  # 32 changes
    assert frames_after(1, 33, 99 * MS) == 0
    deadline = joined.sender.next_deadline(joined.now_ns)
    assert deadline is not None
    assert deadline <= joined.now_ns + 1 * MS
    assert frames_after(0, 0, 1 * MS) == 1  # 100 ms
    assert frames_after(1, 34) == 0
    joined.deliver()
    joined.pump()
    joined.deliver()
    assert frames_after(0, 0) == 1  # acknowledged
    joined.quiet()
    joined.check_equal()


def test_a_session_that_came_and_went_is_not_worth_a_frame(joined: Joined) -> None:
    before = joined.sender.counters["frames_sent"]
    joined.put(sessions(1))
    joined.end(0)
    joined.quiet()
    assert joined.sender.counters["frames_sent"] == before
    assert joined.sender.settled


def test_a_slot_used_again_is_one_record(joined: Joined) -> None:
    joined.put(sessions(1))
    joined.quiet()
    joined.end(0)
    other = sessions(1)
    other["cport"] = 7
    joined.put(other)
    joined.quiet()
    joined.check_equal()
    assert joined.replica.generation[0] == 2
    assert joined.sender.counters["deleted"] == 0


def test_an_end_is_told(joined: Joined) -> None:
    joined.put(sessions(4))
    joined.quiet()
    joined.end(1, 2)
    joined.quiet()
    joined.check_equal()
    assert joined.replica.counters["deleted"] == 2


def test_ipv4_and_ipv6_side_by_side(joined: Joined) -> None:
    joined.put(sessions(4))
    joined.put(sessions(4, first=8, ipv6=True))
    mixed = sessions(1, first=14, ipv6=True)
    mixed["af_out"] = 2
    mixed["laddr"][:, 4:] = mixed["daddr"][:, 4:] = 0
    joined.put(mixed)
    joined.quiet()
    joined.check_equal()


@pytest.mark.parametrize("compress", [True, False])
def test_large_tables_go_in_bounded_frames_and_windows(compress: bool) -> None:
    joined = Joined(slots=5000, body_bytes=4096, window_bytes=16384, compress=compress)
    joined.put(sessions(5000))
    joined.connect()
    most = 0
    for _ in range(2000):
        joined.now_ns += MS
        joined.pump()
        most = max(most, sum(map(len, joined.down)))
        assert all(len(frame) <= 4096 + 16 for frame in joined.down)
        joined.deliver()
    assert most <= 16384 + 4096
    joined.check_equal()
    assert (joined.sender.counters["frames_compressed"] > 0) == compress


@pytest.mark.parametrize("understood", [wire.LZ4 | wire.ZSTD, wire.LZ4, 0])
def test_a_peer_gets_what_it_understands(understood: int) -> None:
    joined = Joined(slots=600, compress=True, zstd=True)
    joined.replicas = Replicas(Hello("b", epoch=100, role=Role.RECEIVER, capabilities=understood))
    joined.put(sessions(600))
    joined.connect()
    flags = set()
    for _ in range(20):
        joined.now_ns += 20 * MS
        joined.pump()
        flags |= {frame[17] for frame in joined.down if frame[3] == Opcode.CREATE}
        joined.deliver()
    joined.check_equal()
    best = blocks.ZSTD if understood & wire.ZSTD else blocks.LZ4 if understood else blocks.PLAIN
    assert flags == {best}
    assert joined.sender.report()["compression"] == blocks.NAMES[best]


def test_back_pressure_keeps_marks_as_marks() -> None:
    joined = Joined(slots=5000, window_bytes=10_000)
    joined.connect()
    joined.quiet()
    for _ in range(50):
        records = sessions(5000)
        records["fnat_delta"] = joined.now_ns & 0xFFFF
        joined.put(records)
        joined.now_ns += MS
        joined.pump()
    assert sum(map(len, joined.down)) <= 10_000 + 200
    assert joined.sender.pending <= 5000
    joined.quiet(300)
    joined.check_equal()


def test_live_changes_do_not_wait_for_a_full_sync() -> None:
    joined = Joined(slots=20_000, window_bytes=20_000)
    joined.put(sessions(19_000))
    joined.dirty.clear()
    joined.connect()
    joined.quiet(4)
    assert joined.sender.state is State.SYNCING
    joined.put(sessions(1, first=19_999))
    joined.quiet(2)
    assert joined.replica.present[19_999]
    assert joined.sender.state is State.SYNCING
    joined.quiet(300)
    joined.check_equal()


def test_a_full_sync_drops_what_is_no_more() -> None:
    joined = Joined()
    joined.put(sessions(6))
    joined.connect()
    joined.quiet()
    joined.cut()
    joined.end(2, 3)
    joined.sender.resync()
    joined.dirty.clear()  # nobody told of the ends
    joined.replica.pending.clear()
    joined.connect()
    joined.quiet()
    joined.check_equal()
    assert joined.replica.counters["swept"] == 2
    assert sorted(joined.replica.pending.take(10).tolist()) == [2, 3]  # unchanged ones are nothing to the injector


def test_a_reconnect_goes_on_where_it_was(joined: Joined) -> None:
    joined.put(sessions(6))
    joined.quiet()
    joined.cut()
    assert not joined.replica.link_up
    joined.end(2)
    joined.put(sessions(1, first=9))
    before = joined.sender.counters["frames_sent"]
    joined.connect()
    joined.quiet()
    joined.check_equal()
    assert joined.sender.counters["frames_sent"] - before == 2
    assert joined.sender.counters["partial_syncs"] == 1
    assert joined.replica.link_up


def test_a_full_sync_broken_in_the_middle_goes_on() -> None:
    joined = Joined(slots=10_000, window_bytes=100_000, compress=False)
    joined.put(sessions(10_000))
    joined.connect()
    joined.quiet(9)
    done = joined.replica.count
    assert 2000 < done < 5000
    joined.connect()
    joined.end(0, 9_999)
    joined.quiet(100)
    joined.check_equal()
    assert joined.sender.counters["full_syncs"] == 1
    assert joined.sender.counters["created"] < 10_000 + 1100


def test_a_peer_that_restarted_gets_everything(joined: Joined) -> None:
    joined.put(sessions(6))
    joined.quiet()
    joined.cut()
    joined.start_b()
    joined.connect()
    joined.quiet()
    joined.check_equal()
    assert joined.sender.full_sync_reason is SyncReason.PEER_RESTARTED


def test_a_new_run_of_the_origin_takes_over_after_its_full_sync() -> None:
    joined = Joined()
    joined.put(sessions(6))
    joined.connect()
    joined.quiet()
    old = joined.replica
    joined.cut()
    joined.start_a(32, epoch=2)
    joined.table.complete = False
    joined.put(sessions(3, first=20))
    joined.connect()
    joined.quiet()
    assert joined.replica is old
    assert len(list(joined.replicas)) == 2
    joined.table.complete = True
    joined.quiet()
    joined.check_equal()
    assert list(joined.replicas) == [joined.replica]
    assert joined.receiver is not None
    assert [e.replaced for e in events(joined.receiver) if isinstance(e, Synced)] == [old]


def test_an_earlier_run_is_refused(joined: Joined) -> None:
    joined.cut()
    joined.start_a(16, epoch=0)
    joined.connect()
    joined.quiet(2)
    (down,) = events(joined.sender)
    assert down == Down("a later run of 'a' is known here", Reason.STALE_EPOCH, by_peer=True)
    assert joined.sender.closed


def refusal(sender: Hello, receiver: Hello, **limits: int) -> Reason:
    """What the receiver says to this introduction."""
    engine = Receiver(Replicas(receiver, **limits), now_ns=0)
    engine.receive(wire.pack_hello(sender), 0)
    (down,) = events(engine)
    assert isinstance(down, Down)
    reader = wire.FrameReader()
    for data in engine.outgoing(0):
        reader.feed(data)
    frame = reader.next()
    assert frame is not None
    assert frame.opcode is Opcode.REFUSE
    assert wire.parse_refuse(frame.body) == (down.refused, down.why)
    assert engine.closed
    return Reason(down.refused or 0)


def test_refusals() -> None:
    a, b = Hello("a", 1, slots=8), Hello("b", 1, Role.RECEIVER)
    assert refusal(Hello("b", 1, slots=8), b) is Reason.SAME_NODE
    assert refusal(Hello("a", 1, slots=8, schema=7), b) is Reason.SCHEMA
    assert refusal(Hello("a", 1, slots=8, versions=(2, 3)), b) is Reason.VERSION
    assert refusal(Hello("a", 1, Role.RECEIVER), b) is Reason.ROLE
    assert refusal(a, b, max_slots=7) is Reason.TOO_LARGE
    assert refusal(Hello("a", 1, slots=0), b) is Reason.TOO_LARGE
    assert refusal(a, b, max_origins=0) is Reason.TOO_LARGE


def test_two_senders_refuse_each_other() -> None:
    joined = Joined()
    joined.sender.connected(0)
    joined.sender.receive(wire.pack_hello(Hello("c", 1, slots=3)), 0)
    (down,) = events(joined.sender)
    assert isinstance(down, Down)
    assert down.refused == Reason.ROLE


def test_the_newest_connection_of_an_origin_wins(joined: Joined) -> None:
    first = joined.receiver
    assert first is not None
    joined.sender.connected(joined.now_ns)
    joined.down.clear()
    joined.receiver = Receiver(joined.replicas, now_ns=joined.now_ns)
    joined.quiet()
    first.receive(wire.pack_snapshot_begin(first._sequence + 1, 9, SyncReason.GAP), joined.now_ns)
    down = events(first)[-1]
    assert isinstance(down, Down)
    assert down.refused == Reason.REPLACED
    first.disconnected(joined.now_ns)
    assert joined.replica.connected


def test_heartbeats_keep_a_quiet_link_up_and_silence_ends_it(joined: Joined) -> None:
    for _ in range(100):
        joined.now_ns += 100 * MS
        joined.pump()
        joined.deliver()
    assert joined.sender.state is State.LIVE
    assert joined.receiver is not None
    for _ in range(31):
        joined.now_ns += 100 * MS
        joined.pump()
        joined.down.clear()
        joined.up.clear()
    assert joined.sender.closed
    assert joined.receiver.closed
    assert isinstance(events(joined.sender)[-1], Down)
    assert not joined.replica.link_up
    assert joined.replica.since_ns == pytest.approx(joined.now_ns, abs=SECOND)


def test_sleeping_ourselves_is_not_the_peers_silence(joined: Joined) -> None:
    joined.pump()
    joined.now_ns += 10 * SECOND
    joined.pump()
    assert joined.sender.state is State.LIVE
    joined.deliver()
    joined.quiet()
    assert joined.sender.state is State.LIVE


def test_a_missing_frame_is_noticed_and_repaired(joined: Joined) -> None:
    joined.put(sessions(3))
    joined.quiet()
    joined.put(sessions(1, first=5))
    joined.pump()
    joined.down.clear()
    joined.put(sessions(1, first=6))
    joined.now_ns += 200 * MS
    joined.pump()
    joined.deliver()
    assert not joined.replica.link_up
    joined.quiet()
    joined.check_equal()
    assert joined.sender.full_sync_reason is SyncReason.GAP
    assert joined.receiver is not None
    assert joined.receiver.counters["gaps"] == 1
    assert joined.replica.link_up


def test_a_last_frame_that_is_missing_is_noticed_by_the_heartbeat(joined: Joined) -> None:
    joined.put(sessions(1))
    joined.pump()
    joined.down.clear()
    for _ in range(150):  # an old release's heartbeat says 0, which changes nothing
        joined.quiet(1)
    joined.check_equal()
    assert joined.sender.settled
    assert joined.sender.full_sync_reason is SyncReason.GAP


def test_a_last_acknowledgement_that_is_missing_comes_with_the_heartbeat(joined: Joined) -> None:
    joined.put(sessions(1))
    joined.pump()
    while joined.down:
        assert joined.receiver is not None
        joined.receiver.receive(joined.down.popleft(), joined.now_ns)
    assert joined.receiver is not None
    assert joined.receiver.outgoing(joined.now_ns)  # lost
    joined.quiet(150)
    assert joined.sender.settled
    assert joined.sender.counters["full_syncs"] == 1


@pytest.mark.parametrize("lost", [Opcode.RESYNC, Opcode.SNAPSHOT_BEGIN, Opcode.SNAPSHOT_END])
def test_a_repair_that_is_lost_too_is_asked_for_again(joined: Joined, lost: Opcode) -> None:
    joined.put(sessions(3))
    joined.pump()
    joined.down.clear()
    missing = 1
    for _ in range(300):
        joined.now_ns += 20 * MS
        joined.pump()
        for queue in (joined.down, joined.up):
            for frame in list(queue):
                if missing and frame[3] == lost:
                    queue.remove(frame)
                    missing -= 1
        joined.deliver()
    assert not missing
    joined.check_equal()
    assert joined.sender.settled
    assert joined.replica.link_up


def test_the_end_of_a_full_sync_may_come_again_after_a_reconnect() -> None:
    joined = Joined(window_frames=1)
    joined.put(sessions(5))
    joined.connect()
    assert joined.receiver is not None
    while joined.receiver.state is not State.LIVE:
        joined.deliver()
        joined.now_ns += 20 * MS
        joined.pump()
        while joined.down:
            joined.receiver.receive(joined.down.popleft(), joined.now_ns)
    joined.cut()  # the acknowledgement of the end is on its way
    joined.connect()
    joined.quiet()
    joined.check_equal()
    assert joined.sender.settled
    assert joined.sender.counters["full_syncs"] == 1
    assert joined.replica.counters["full_syncs"] == 1


def test_a_frame_that_comes_twice_or_late_changes_nothing(joined: Joined) -> None:
    joined.put(sessions(1))
    joined.pump()
    (create,) = joined.down
    joined.quiet()
    joined.end(0)
    joined.quiet()
    assert joined.receiver is not None
    joined.receiver.receive(create, joined.now_ns)
    assert joined.receiver.counters["duplicates"] == 1
    assert joined.replica.count == 0


def test_an_acknowledgement_of_what_was_never_sent_ends_the_link(joined: Joined) -> None:
    joined.sender.receive(wire.pack(Opcode.ACK, 999), joined.now_ns)
    assert joined.sender.closed
    assert joined.sender.counters["protocol_errors"] == 1


@pytest.mark.parametrize("opcode", [Opcode.HELLO, Opcode.ACK, Opcode.RESYNC])
def test_frames_that_are_not_a_senders_to_send(joined: Joined, opcode: Opcode) -> None:
    assert joined.receiver is not None
    body = {Opcode.HELLO: wire.pack_hello(joined.sender.me)[16:], Opcode.RESYNC: b"\0\0\0\0"}.get(opcode, b"")
    joined.receiver.receive(wire.pack(opcode, 0, body), joined.now_ns)
    assert joined.receiver.closed


def test_noise_ends_the_link_with_a_word(joined: Joined) -> None:
    assert joined.receiver is not None
    joined.receiver.receive(b"GET / HTTP/1.1\r\n\r\n", joined.now_ns)
    down = events(joined.receiver)[-1]
    assert isinstance(down, Down)
    assert down.refused == Reason.PROTOCOL
    joined.up.extend(bytes(b) for b in joined.receiver.outgoing(joined.now_ns))
    joined.sender.receive(joined.up.popleft(), joined.now_ns)
    assert events(joined.sender)[-1] == down._replace(by_peer=True)


def test_full_syncs_without_end_end_the_link(joined: Joined) -> None:
    receiver = joined.receiver
    assert receiver is not None

    def begin_and_end(number: int, now_ns: int) -> None:
        for pack in (wire.pack_snapshot_begin, wire.pack_snapshot_end):
            more = (SyncReason.GAP,) if pack is wire.pack_snapshot_begin else ()
            receiver.receive(pack(receiver._sequence + 1, number, *more), now_ns)

    number = 10
    for second in range(3):  # as many as are taken, again and again
        for _ in range(FULL_SYNCS_A_SECOND - 1):
            number += 1
            begin_and_end(number, joined.now_ns + (second + 1) * SECOND)
    assert not receiver.closed
    begin_and_end(number + 1, joined.now_ns + 3 * SECOND)
    begin_and_end(number + 2, joined.now_ns + 3 * SECOND)
    assert receiver.closed
    (down,) = (event for event in events(receiver) if isinstance(event, Down))
    assert "full syncs in a second" in down.why


def test_data_before_hello_ends_the_link() -> None:
    engine = Receiver(Replicas(Hello("b", 1, Role.RECEIVER)), now_ns=0)
    engine.receive(wire.pack_snapshot_begin(1, 1, SyncReason.FIRST), 0)
    assert engine.closed


def test_sessions_of_a_dead_origin_live_as_long_as_their_timeouts(joined: Joined) -> None:
    records = sessions(3)
    records["timeout_ms"] = (10_000, 20_000, 90_000)
    joined.put(records)
    joined.quiet()
    joined.replica.pending.clear()
    joined.cut()
    joined.replicas.age(joined.now_ns + 9 * SECOND)
    assert joined.replica.count == 3
    joined.replicas.age(joined.now_ns + 21 * SECOND)
    assert joined.replica.count == 1
    assert joined.replica.pending.pending == 0  # copies end by themselves
    joined.connect()
    joined.quiet()
    assert joined.sender.full_sync_reason is SyncReason.NOT_HELD
    joined.check_equal()


def test_each_full_sync_says_why_when_it_begins() -> None:
    joined = Joined()
    joined.put(sessions(5))
    joined.connect()
    joined.quiet()
    joined.sender.resync()
    joined.quiet()
    said = []
    while (event := joined.sender.next_event()) is not None:
        said += [event.reason] if isinstance(event, Syncing) else []
    assert said == [SyncReason.FIRST, SyncReason.REQUESTED]
    assert joined.sender.report()["full_syncs_by_reason"] == {"first": 1, "requested": 1}


def test_a_peer_that_asks_without_end_and_acknowledges_nothing() -> None:
    joined = Joined(window_frames=8)
    joined.put(sessions(5))
    joined.connect()
    joined.quiet()
    for _ in range(100):
        joined.sender.receive(wire.pack_resync(SyncReason.REQUESTED), joined.now_ns)
        joined.sender.outgoing(joined.now_ns)
        assert joined.sender.in_flight <= 8 + 2
    joined.connect()
    joined.quiet()
    joined.check_equal()


def test_compression_is_measured() -> None:
    joined = Joined(slots=60_000, window_bytes=64 << 10)
    joined.put(sessions(60_000))
    joined.connect()
    for _ in range(40):
        joined.now_ns += 50 * MS  # 64 KiB each 50 ms
        joined.pump()
        joined.deliver()
    assert joined.sender.counters["frames_compressed"] > 0
    fast = Joined(slots=60_000, window_bytes=64 << 10)
    fast.put(sessions(60_000))
    fast.connect()
    for _ in range(300):
        fast.now_ns += MS // 10
        fast.pump()
        fast.deliver()
    assert fast.sender.counters["frames_compressed"] == 0


def test_a_peer_that_cannot_unpack_gets_plain_frames() -> None:
    joined = Joined(slots=1000, compress=True)
    joined.replicas = Replicas(Hello("b", epoch=100, role=Role.RECEIVER, capabilities=0))
    joined.put(sessions(1000))
    joined.connect()
    joined.quiet()
    joined.check_equal()
    assert joined.sender.counters["frames_compressed"] == 0


def test_another_peers_session_in_a_slot_that_was_ours_during_the_full_sync() -> None:
    joined = Joined(window_frames=2)
    joined.sender.share(lambda slots: joined.table.records["cport"][slots] != 7)
    joined.put(sessions(5))
    joined.connect()
    other = sessions(1)
    other["cport"] = 7
    for _ in range(8):
        joined.quiet(1)
        if joined.receiver is not None and joined.replica.present[0] and joined.table.generation[0] == 1:
            assert joined.sender.state is State.SYNCING
            joined.put(other)  # the end of the full sync is acknowledged before this is looked at
    joined.quiet()
    assert joined.table.generation[0] == 2
    assert np.flatnonzero(joined.replica.present).tolist() == [1, 2, 3, 4]
