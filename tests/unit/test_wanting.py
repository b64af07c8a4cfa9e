# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/wanting.py and WANT on a link: a receiver asks for sessions by their flows and gets them at once."""

from dataclasses import replace

import numpy as np
import pytest

from collector.record import Records
from collector.table import SessionTable
from probes.flow import FLOW_KEY
from replicator import codec, wanting, wire
from replicator.codec import FlowKeys
from replicator.link import Down, Sender
from replicator.wanting import PAUSE_NS, Wanted
from replicator.wire import LZ4, WANTS, Hello, Role
from tests.unit.session_records import sessions
from tests.unit.test_link import MS, SECOND, Joined, events


def flows_of(records: Records) -> FlowKeys:
    keys = np.zeros(len(records), FLOW_KEY)
    for name in ("caddr", "vaddr", "cport", "vport", "proto", "af"):
        keys[name] = records[name]
    return keys


def table_of(records: Records, slots: int = 4096) -> SessionTable:
    table = SessionTable(slots)
    table.apply(records["slot"].astype(np.int64), records, np.ones(len(records), np.bool_), 1)
    return table


class Asking(Joined):
    """A link whose sender answers WANT."""

    def start_a(self, slots: int, epoch: int) -> None:
        super().start_a(slots, epoch)
        me = Hello("a", epoch=epoch, slots=slots, capabilities=LZ4 | WANTS)
        self.sender = Sender(self.table, self.dirty, me, self.settings)

    def want(self, records: Records) -> bool:
        assert self.receiver is not None
        return self.receiver.want(flows_of(records))


@pytest.mark.parametrize("ipv6", [False, True])
def test_sessions_are_found_by_client_and_service(ipv6: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wanting, "SLICE", 300)
    records = sessions(1009, ipv6=ipv6)
    wanted = Wanted(table_of(records))
    asked = flows_of(records[[5, 299, 300, 1008]])
    others = flows_of(records[[6, 7, 8, 9]])
    others["cport"][0], others["vport"][1], others["proto"][2], others["caddr"][3, 3] = 9, 9, 17, 99
    assert not wanted.busy
    assert wanted.ask(np.concatenate((asked, others)).astype(FLOW_KEY), SECOND)
    found, steps = [], 0
    while wanted.busy:
        found += wanted.step().tolist()
        steps += 1
    assert (found, steps) == ([5, 299, 300, 1008], 14)


def test_one_question_at_a_time() -> None:
    records = sessions(7)
    wanted = Wanted(table_of(records))
    assert wanted.ask(flows_of(records), SECOND)
    assert not wanted.ask(flows_of(records), SECOND + 2 * PAUSE_NS)  # the first is not answered yet
    while wanted.busy:
        wanted.step()
    assert not wanted.ask(flows_of(records), SECOND + PAUSE_NS - 1)
    assert wanted.ask(flows_of(records), SECOND + PAUSE_NS)
    wanted.forget()
    assert not wanted.busy


def test_what_is_wanted_is_told_at_once() -> None:
    link = Asking(slots=64)
    link.put(sessions(7))
    link.connect()
    link.quiet()
    # as if it were lost there
    link.replica.end(np.array([3]), link.replica.generation[[3]], link.now_ns)
    link.replica.generation[3] = 0
    assert link.want(sessions(7)[[3]])
    link.now_ns += MS
    for _ in range(4):
        link.pump()
        link.deliver()
    assert link.replica.present.tolist()[:7] == [True] * 7
    assert (link.sender.counters["wanted"], link.sender.counters["wanted_found"]) == (1, 1)
    assert link.want(sessions(7))
    link.quiet(1)
    assert link.sender.counters["wanted_unanswered"] == 7
    assert not [event for event in events(link.sender) if isinstance(event, Down)]


def test_a_sender_that_does_not_know_it_is_not_asked() -> None:
    link = Joined(slots=64)
    link.connect()
    link.quiet()
    assert link.receiver is not None
    assert not link.receiver.want(flows_of(sessions(3)))
    link.receiver.disconnected(link.now_ns)
    assert not link.receiver.want(flows_of(sessions(3)))


def test_only_a_receiver_asks() -> None:
    link = Asking(slots=64)
    link.connect()
    link.quiet()
    assert link.receiver is not None
    link.receiver.receive(codec.pack_want(flows_of(sessions(1))), link.now_ns)
    assert [event.refused for event in events(link.receiver) if isinstance(event, Down)] == [wire.Reason.PROTOCOL]


def test_a_session_of_another_peers_share_is_this_ones_from_then_on() -> None:
    link = Asking(slots=64)
    link.put(sessions(9))
    link.sender.share(lambda slots: slots % 2 == 0)
    link.connect()
    link.quiet()
    assert np.flatnonzero(link.replica.present).tolist() == [0, 2, 4, 6, 8]
    assert link.want(sessions(9)[[3]])
    link.quiet()
    assert np.flatnonzero(link.replica.present).tolist() == [0, 2, 3, 4, 6, 8]
    changed = sessions(9)
    changed["fnat_delta"] += 1
    link.put(changed)  # what becomes of it is told as well
    link.quiet()
    assert link.replica.records["fnat_delta"][3] == changed["fnat_delta"][3]
    link.sender.resync()
    link.quiet()
    assert np.flatnonzero(link.replica.present).tolist() == [0, 2, 3, 4, 6, 8]
    other = sessions(9)
    other["cport"][3] += 1000  # another session in that slot is not
    link.put(other)
    link.quiet()
    assert np.flatnonzero(link.replica.present).tolist() == [0, 2, 4, 6, 8]
    assert link.sender.settled


def test_the_capability_travels() -> None:
    me = Hello("a", 1, Role.SENDER, 16, capabilities=LZ4 | WANTS)
    body = wire.pack_hello(me)[wire.HEADER.size :]
    assert wire.parse_hello(body) == me
    assert not wire.parse_hello(wire.pack_hello(replace(me, capabilities=LZ4))[wire.HEADER.size :]).capabilities & WANTS
