# SPDX-License-Identifier: GPL-2.0-or-later
"""collector/flows.py: which flows belong to which sessions, and which are orphans, over a history of looks."""

import numpy as np
import pytest

from collector import record
from collector.flows import ASK_AGAIN_NS, ORPHAN_NS, FlowJoin, Sessions, hash_of, key_words, keys_of
from collector.record import Records, words
from probes.flow import FLOW, FLOW_KEY
from tests.unit.session_records import sessions

SECOND = 1_000_000_000
SLOTS = 4096


def flows_of(records: Records, packets: int = 3, last_ns: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The flows that these sessions have."""
    keys, values = np.zeros(len(records), FLOW_KEY), np.zeros(len(records), FLOW)
    for name in ("caddr", "vaddr", "cport", "vport", "proto", "af"):
        keys[name] = records[name]
    values["packets"], values["last_ns"], values["flags"] = packets, last_ns, 0x12
    values["bytes"] = packets * 100
    return keys, values


def table_of(records: Records) -> Sessions:
    rows, present = np.zeros(SLOTS, record.RECORD), np.zeros(SLOTS, np.bool_)
    rows[records["slot"]] = records
    present[records["slot"]] = True
    return Sessions(rows, present)


NONE = table_of(sessions(0))


@pytest.mark.parametrize("ipv6", [False, True])
def test_keys_of_sessions_are_keys_of_their_flows(ipv6: bool) -> None:
    records = sessions(1009, ipv6=ipv6)
    keys, _ = flows_of(records)
    assert (keys_of(words(records)) == key_words(keys)).all()
    assert len(np.unique(hash_of(key_words(keys)))) == 1009


def test_flows_are_joined_to_the_sessions_they_are_of() -> None:
    records = sessions(1009)
    keys, values = flows_of(records[:503])
    values["packets"] = np.arange(503) + 1
    order = np.random.default_rng(3).permutation(503)
    join = FlowJoin(SLOTS)
    join.look(keys[order], values[order], table_of(records), [], SECOND)
    known, slots = join.of(records)
    assert known.tolist() == [True] * 503 + [False] * 506
    assert join.packets[slots[:503]].tolist() == list(range(1, 504))
    assert (join.flows, join.joined, join.covered) == (503, 503, 0)
    again = records.copy()
    again["generation"] += 1  # another session in the slot: what is known is not of it
    assert not join.of(again)[0].any()


def test_another_protocol_service_or_client_is_another_flow() -> None:
    records = sessions(5)
    keys, values = flows_of(records)
    keys["proto"][0], keys["vport"][1], keys["cport"][2], keys["vaddr"][3][3] = record.UDP, 81, 9, 7
    join = FlowJoin(SLOTS)
    join.look(keys, values, table_of(records), [], SECOND)
    assert join.of(records)[0].tolist() == [False] * 4 + [True]


def test_templates_and_sessions_of_one_packet_cover_nothing() -> None:
    records = sessions(3)
    records["flags"][0] |= record.TEMPLATE
    records["flags"][1] |= record.ONE_PACKET
    join = FlowJoin(SLOTS)
    join.look(*flows_of(records), table_of(records), [], SECOND)
    assert join.of(records)[0].tolist() == [False, False, True]


class History:
    """Looks, a second apart."""

    def __init__(self) -> None:
        self.join, self.now = FlowJoin(SLOTS), 100 * SECOND

    def look(self, records: Records, packets: int, own: Sessions = NONE, others: tuple[Sessions, ...] = ()) -> int:
        """How many orphans there are after flows of ``records`` had so many packets, the last just now."""
        self.now += SECOND
        self.join.look(*flows_of(records, packets, self.now), own, others, self.now)
        assert self.join.orphans is not None
        return len(self.join.orphans.keys)


def test_a_flow_that_nothing_covers_is_an_orphan_at_the_second_look() -> None:
    history, records = History(), sessions(7)
    assert [history.look(records, 3), history.look(records, 3), history.look(records, 4)] == [0, 7, 7]
    assert history.look(records, 5, own=table_of(records)) == 0  # its session came
    assert history.join.joined == 7


def test_a_flow_of_a_peers_session_is_covered() -> None:
    history, records = History(), sessions(7)
    peer = (NONE, table_of(records[:5]))
    assert [history.look(records, 3, others=peer), history.look(records, 4, others=peer)] == [0, 2]
    assert (history.join.joined, history.join.covered) == (0, 5)


def test_a_session_that_ended_leaves_no_orphan_until_more_packets_come() -> None:
    history, records = History(), sessions(7)
    history.look(records, 3, own=table_of(records))
    # what came between the last look that saw the session and its end belongs to it
    assert [history.look(records, 5), history.look(records, 5), history.look(records, 5)] == [0, 0, 0]
    assert history.look(records, 6) == 7


def test_a_flow_that_began_anew_is_judged_anew() -> None:
    history, records = History(), sessions(7)
    history.look(records, 100, own=table_of(records))
    assert [history.look(records, 100), history.look(records, 2), history.look(records, 3)] == [0, 7, 7]


def test_a_silent_flow_is_nobodys_concern() -> None:
    join, records = FlowJoin(SLOTS), sessions(7)
    for now in (SECOND, 2 * SECOND, SECOND + ORPHAN_NS):
        join.look(*flows_of(records, 3, SECOND), NONE, [], now)
        assert join.orphans is not None
        assert len(join.orphans.keys) == (7 if now == 2 * SECOND else 0)


def test_peers_are_asked_now_and_then_and_not_for_what_only_begins() -> None:
    join, records = FlowJoin(SLOTS), sessions(11)
    keys, values = flows_of(records, 3)
    values["flags"][0], values["flags"][1], keys["proto"][2] = 2, 2 | 4, record.UDP
    values["flags"][2] = 0
    now, asked = SECOND, []
    assert len(join.ask(100, now)) == 0
    for _ in range(60):
        now += SECOND
        values["last_ns"], values["packets"] = now, values["packets"] + 1
        join.look(keys, values, NONE, [], now)
        asked.append(len(join.ask(5, now)))
    # nine of them, five at a time, each again after ten seconds, three times
    assert sum(asked) == 27
    assert asked[:3] == [0, 5, 4]
    pause = ASK_AGAIN_NS // SECOND
    assert asked[1 + pause : 4 + pause] == [5, 4, 0]
    assert asked[4 + 2 * pause :] == [0] * (60 - 4 - 2 * pause)
