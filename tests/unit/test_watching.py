# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/watching.py: what watchers get, what filters let through, and what a slow one costs."""

import asyncio
from typing import Any

import numpy as np
import pytest

from collector import record
from collector.record import Records, words
from collector.table import NO_SLOTS, Applied, SessionTable
from replicator.query import BadFilter
from replicator.watching import (
    BEAT_NS,
    LINE_EVENTS,
    MAX_WATCHERS,
    Filter,
    Kind,
    OtherVersion,
    Reader,
    TooMany,
    Watcher,
    Watchers,
    end_of,
    head,
    watch,
)
from tests.unit.session_records import sessions

NOW, WALL = 5_000_000_000, 1_700_000_000_000_000_000


def read(lines: list[dict[str, Any]]) -> list[tuple[int, str, dict[str, Any]]]:
    reader = Reader(head(NOW, WALL))
    return [event for line in lines for event in reader.read(line)]


def through(records: Records, **wanted: Any) -> list[int]:
    """Slots of creations that a filter lets through."""
    watcher = Watcher(Filter.of(wanted))
    watcher.put(Kind.CREATE, words(records), NOW)
    return [session["slot"] for _, _, session in read(watcher.take())]


def test_events_arrive_in_order_with_their_times() -> None:
    watcher = Watcher(Filter())
    rows = words(sessions(3))
    for kind, row, now in ((Kind.CREATE, 0, 1), (Kind.UPDATE, 0, 2), (Kind.CREATE, 1, 3), (Kind.END, 0, 4)):
        watcher.put(kind, rows[row : row + 1], NOW + now)
    found = read(watcher.take())
    assert [(time - WALL, kind, session["slot"]) for time, kind, session in found] == [
        (1, "create", 0), (2, "update", 0), (3, "create", 1), (4, "end", 0),
    ]  # fmt: skip
    assert found[0][2]["client"] == "10.0.0.0:1024"
    assert found[0][2]["state"] == "ESTABLISHED"
    assert watcher.take() == []


def test_many_events_come_in_lines_of_some() -> None:
    watcher = Watcher(Filter())
    watcher.put(Kind.CREATE, words(sessions(LINE_EVENTS * 2 + 7)), NOW)
    lines = watcher.take()
    assert len(lines) == 3
    assert [session["slot"] for _, _, session in read(lines)] == list(range(LINE_EVENTS * 2 + 7))


def test_a_full_buffer_drops_and_counts() -> None:
    watcher = Watcher(Filter(), room=10)
    for _ in range(3):
        watcher.put(Kind.CREATE, words(sessions(4)), NOW)
    assert (watcher.count, watcher.dropped) == (8, 4)
    assert len(read(watcher.take())) == 8
    watcher.put(Kind.CREATE, words(sessions(4)), NOW)
    assert (watcher.count, watcher.dropped) == (4, 4)


def test_filters() -> None:
    records = sessions(20)
    records["state"][3] = record.TIME_WAIT
    records["proto"][4] = record.UDP
    records["vport"][5], records["dport"][6], records["daddr"][7][3] = 443, 99, 9
    assert through(records, state="TIME_WAIT") == [3]
    assert through(records, proto="udp") == [4]
    assert through(records, service=":443") == [5]
    assert through(records, service="11.0.0.0:443") == [5]
    assert through(records, real=":99") == [6]
    assert through(records, real="13.0.0.9") == [7]
    assert through(records, client="10.0.0.8/29", local=":1040") == []
    assert through(records, client="10.0.0.8/29") == list(range(8, 16))
    assert through(records, client="10.0.0.8/29", local=":1034") == [10]
    assert through(records, client="::/0") == []
    assert through(records, kinds=["update", "end"]) == []
    six = sessions(20, ipv6=True)
    assert through(six, client="[a00::1]:1025") == [1]
    assert through(six, client="a00::/126") == [0, 1, 2, 3]
    assert through(six, client="10.0.0.0/8") == []


@pytest.mark.parametrize(
    "wanted",
    [
        {"client": "10.0.0.300"}, {"service": "10.0.0.1:65536"}, {"service": ":http"}, {"state": "UP"}, {"proto": "x"},
        {"kinds": ["begin"]}, {"kinds": "create"}, {"real": 7}, {"local": ""},
    ],
)  # fmt: skip
def test_filters_that_mean_nothing(wanted: dict[str, Any]) -> None:
    with pytest.raises(BadFilter):
        Filter.of(wanted)


def test_ends_as_they_are_written() -> None:
    assert end_of("10.1.2.3:80").port == 80
    assert end_of("10.1.2.3").port is None
    assert end_of("[fd00::1]:80").port == 80
    assert end_of("[fd00::1]").family == end_of("fd00::1").family == record.AF_INET6
    assert end_of("10.0.0.0/8").mask.tolist() == [255] + [0] * 15


def test_another_schema_is_refused() -> None:
    with pytest.raises(OtherVersion):
        Reader({**head(NOW, WALL), "schema": 1})


def filled() -> tuple[SessionTable, Applied]:
    table = SessionTable(64)
    records = sessions(5)
    return table, table.apply(records["slot"].astype(np.int64), records, np.ones(5, np.bool_), NOW)


def test_a_watcher_gets_what_rounds_change_from_then_on_and_is_forgotten_when_it_goes() -> None:
    async def body() -> None:
        table, applied = filled()
        watchers, over, now = Watchers(table), False, NOW
        assert not watchers
        told = watch(watchers, Filter(), lambda: now, lambda: over)
        reader = Reader((await anext(told))[0])
        assert watchers
        watchers.note(applied, NOW)
        ended = table.apply(np.array([2]), sessions(1), np.zeros(1, np.bool_), NOW)
        watchers.note(ended, NOW)
        events = [(kind, session["slot"]) for line in await anext(told) for _, kind, session in reader.read(line)]
        assert events == [("create", slot) for slot in range(5)] + [("end", 2)]
        now += BEAT_NS
        assert await anext(told) == [{"dropped": 0}]  # so that a client that went away is noticed
        await told.aclose()
        assert not watchers
        watchers.note(Applied(np.array([1]), NO_SLOTS, NO_SLOTS), NOW)

    asyncio.run(body())


def test_the_end_of_the_attach_is_the_end_of_the_answer() -> None:
    async def body() -> None:
        watchers, over = Watchers(SessionTable(8)), False
        told = watch(watchers, Filter(), lambda: NOW, lambda: over)
        await anext(told)
        over = True
        assert [block async for block in told] == []
        assert not watchers

    asyncio.run(body())


def test_there_is_room_for_some() -> None:
    watchers = Watchers(SessionTable(8))
    for _ in range(MAX_WATCHERS):
        watchers.add(Filter())
    with pytest.raises(TooMany, match="4 watch already"):
        watchers.add(Filter())
