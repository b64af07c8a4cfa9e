# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/summary.py and top.py: counts by service, real server, state and worker, rates, and text of all that."""

import asyncio
from collections import Counter
from typing import Any

import numpy as np
import pytest

from collector import record
from collector.table import SessionTable
from replicator import summary as module
from replicator import top
from replicator.cli_live import can_draw
from replicator.summary import Summary, summarize
from tests.unit.session_records import sessions

COUNT = 1009


def mixed() -> record.Records:
    rng = np.random.default_rng(5)
    records = np.zeros(2 * COUNT, record.RECORD)
    records[:COUNT], records[COUNT:] = sessions(COUNT), sessions(COUNT, first=COUNT, ipv6=True)
    records["vport"] = rng.choice((80, 443, 53), len(records))
    records["daddr"][:, 1] = rng.integers(0, 7, len(records))
    records["proto"] = np.where(records["vport"] == 53, record.UDP, record.TCP)
    records["state"] = rng.integers(0, 3, len(records))
    records["worker"] = rng.choice((1, 2, record.UNKNOWN_WORKER), len(records))
    return records


def test_counts_are_those_of_a_loop_over_all() -> None:
    records, summary = mixed(), Summary()
    for start in range(0, len(records), 100):
        summary.add(records[start : start + 100])
    found = summary.result(1000)
    described = list(module.query.describe(records, "own"))
    services = Counter(f"{row['proto']} {row['virtual']}" for row in described)
    servers = Counter(f"{row['proto']} {row['real']}" for row in described)
    opened = Counter(
        f"{row['proto']} {row['virtual']}" for row in described if row["state"] in ("ESTABLISHED", "NORMAL")
    )
    assert {row["name"]: row["sessions"] for row in found["services"]} == services
    assert {row["name"]: row["open"] for row in found["services"]} == {name: opened[name] for name in services}
    assert {row["name"]: row["sessions"] for row in found["real_servers"]} == servers
    assert found["states"] == Counter(f"{row['proto']} {row['state']}" for row in described)
    workers = Counter("?" if row["worker"] is None else str(row["worker"]) for row in described)
    assert found["workers"] == workers
    assert (found["counted"], found["services_total"], found["real_servers_total"]) == (2 * COUNT, 6, len(servers))
    largest = [row["sessions"] for row in found["real_servers"]]
    assert largest == sorted(largest, reverse=True)
    assert summary.result(2)["services"] == found["services"][:2]


def test_more_groups_than_are_told_apart(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "MAX_GROUPS", 4)
    summary = Summary()
    records = sessions(10)
    records["vport"] = np.arange(10)
    summary.add(records)
    found = summary.result(100)
    assert (len(found["services"]), found["counted"]) == (4, 10)


def test_a_table_is_counted_whole_while_others_have_their_turn() -> None:
    table = SessionTable(1 << 15)
    records = sessions(2003)
    records["slot"] *= 16
    table.apply(records["slot"].astype(np.int64), records, np.ones(2003, np.bool_), 1)

    async def body() -> int:
        turns, counting = 0, asyncio.create_task(summarize(table))
        while not counting.done():
            turns += 1
            await asyncio.sleep(0)
        assert counting.result().sessions == 2003
        return turns

    assert asyncio.run(body()) >= 4


def answer(at_s: float, **more: Any) -> dict[str, Any]:
    summary = Summary()
    summary.add(sessions(11))
    return {
        "at_ns": int(at_s * 1e9),
        "totals": {"created": int(100 * at_s), "updated": 5, "ended": int(40 * at_s)},
        **summary.result(5),
        "peers": [
            {"direction": "to", "node": "b", "address": "10.0.0.2:1", "state": "live", "sessions": 11, "waiting": 2,
             "records": int(7 * at_s), "event_to_peer_p50_ms": 0.4, "event_to_peer_p99_ms": 1.9},
            {"direction": "listen", "address": "x", "state": "listening"},
        ],
        "status": {
            "node": "a", "pid": 7, "state": "attached", "for_s": at_s, "ready": True, "waiting_for": None,
            "sessions": {"own": 11, "copies": 2, "of_peers": {"b": 3, "c": 4}}, "events": {"total": int(140 * at_s)},
            "packets": "off", **more,
        },
    }  # fmt: skip


def test_rates_are_of_the_time_between() -> None:
    found = top.rates(answer(10), answer(12))
    assert found == {"created": 100, "updated": 0, "ended": 40, "events": 140, "told_to_peers": 7}
    assert top.rates(answer(10), answer(10)) == {}


def test_text() -> None:
    probes = {
        "attached": True, "how": "one link", "share_percent": 1.5, "budget_percent": 5, "hit_create_ns": 900,
        "hit_free_ns": 800, "hit_cost": "measured",
    }  # fmt: skip
    packets = {"interfaces": [{"interface": "eth1", "mode": "native"}], "counted": 9, "flows": 8, "orphans": 1}
    now = answer(12, probes=probes, packets=packets)
    lines = list(top.plain(now, top.rates(answer(10, packets={**packets, "counted": 1}), now)))
    assert lines[0] == "node a, DPVS pid 7, attached for 12 s, ready"
    assert lines[1] == "sessions 11, copies in DPVS 2, peers' 7"
    assert lines[2] == "a second: created 100, updated 0, ended 40, events 140, told to peers 7, packets 4"
    assert lines[3] == "probes on: one link, 1.5 % of a worker's time (budget 5 %), 900 + 800 ns a session (measured)"
    assert lines[4] == "packets: eth1 native; 8 flows, 1 orphans"
    assert "  tcp 11.0.0.0:80  11        11" in lines
    assert "  TO         b     10.0.0.2:1  live   11        2        0.4         1.9".lower() in [
        x.lower() for x in lines
    ]


@pytest.mark.parametrize(
    ("terminal", "kind", "drawn"),
    [(True, "xterm", True), (True, "", True), (True, "dumb", False), (False, "xterm", False)],
)
def test_only_what_has_a_cursor_is_drawn_on(terminal: bool, kind: str, drawn: bool) -> None:
    assert can_draw(terminal, kind) is drawn
