# SPDX-License-Identifier: GPL-2.0-or-later
"""Synthetic sessions: what they look like, what they are taken after, and that nothing else is ever touched."""

import asyncio
import random
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt
import pytest

from collector import record
from collector.record import Records, pick
from collector.table import SessionTable
from probes.agent import abi
from replicator.drill import LIFE_MS, Drill, NoDrill, invent, synthetic, templates
from tests.unit.session_records import sessions

SLOTS = 400
Codes = npt.NDArray[np.uint8]


class Agent:
    """Makes, claims, yields and deletes as the agent does, in the table of the collector at once."""

    def __init__(self, table: SessionTable, busy_ports: int = 0) -> None:
        self.table, self.busy_ports = table, busy_ports
        self.asked: list[tuple[int, Records]] = []
        self.waiting: dict[int, Codes] = {}
        self.answers: list[Codes] = []
        self.next_slot = 300

    def ask(self, ops: Codes, records: Records) -> "Future[int]":
        op = int(ops[0])
        self.asked.append((op, pick(records, np.arange(len(records)))))
        codes = np.zeros(len(records), np.uint8)
        if op == abi.RecordOp.UPSERT:
            codes[:] = abi.Code.CREATED
            codes[: self.busy_ports] = abi.Code.PORT_BUSY
            self.busy_ports = 0
        elif op == abi.RecordOp.CLAIM:
            codes[:] = abi.Code.LIVE
            self._put(records)
        elif op == abi.RecordOp.YIELD:
            codes[:] = abi.Code.YIELDED
        elif op == abi.RecordOp.DELETE:
            codes[:] = abi.Code.DELETED
            self.table.apply(records["slot"].astype(np.int64), records, np.zeros(len(records), np.bool_), 2)
        self.answers.append(codes)
        future: Future[int] = Future()
        future.set_result(len(self.answers) - 1)
        return future

    def answer(self, request: int) -> Codes | None:
        return self.answers[request]

    def _put(self, records: Records) -> None:
        some = pick(records, np.arange(len(records)))
        some["slot"] = self.next_slot + np.arange(len(some))
        self.next_slot += len(some)
        self.table.apply(some["slot"].astype(np.int64), some, np.ones(len(some), np.bool_), 1)


def a_drill(table: SessionTable, agent: Agent) -> Drill:
    return Drill(table, list, agent, table.sessions, lambda: True)


def a_table(records: Records) -> SessionTable:
    table = SessionTable(SLOTS)
    table.apply(records["slot"].astype(np.int64), records, np.ones(len(records), np.bool_), 1)
    return table


def test_what_they_look_like() -> None:
    like = sessions(3)
    made = invent(like, 1000, random.Random(1))
    assert synthetic(made).all()
    assert not synthetic(like).any()
    assert len(np.unique(record.identity(made))) == 1000
    assert set(made["state"].tolist()) == {record.CLOSE_WAIT}
    assert set(made["timeout_ms"].tolist()) == {LIFE_MS}
    assert set(made["caddr"][:, 0].tolist()) == {198}
    assert set(made["caddr"][:, 1].tolist()) <= {18, 19}
    for name in ("vaddr", "daddr", "laddr", "vport", "dport"):
        assert np.isin(made[name], like[name]).all()


@pytest.mark.parametrize(("name", "value"), [("cport", 10), ("fnat_isn", 1), ("proto", record.UDP)])
def test_what_is_none_of_them(name: str, value: int) -> None:
    one = invent(sessions(1), 1, random.Random(1))
    one[name] = value
    assert not synthetic(one).any()
    other = invent(sessions(1), 1, random.Random(1))
    other["caddr"][:, 1] = 20
    assert not synthetic(other).any()


def test_what_they_are_taken_after() -> None:
    some = sessions(6)
    some["state"][0], some["fwdmode"][1], some["proto"][2] = record.SYN_RECV, record.DR, record.UDP
    some["vport"][3] = 443
    assert sorted(templates(some)["vport"].tolist()) == [80, 443]
    assert len(templates(sessions(4, ipv6=True))) == 0
    with pytest.raises(NoDrill, match="no open FullNAT TCP connection"):
        asyncio.run(a_drill(a_table(some[:3]), Agent(a_table(some[:3]))).begin(5))


def test_from_beginning_to_end() -> None:
    """Ports that were taken are tried again; at the end only synthetic sessions were touched."""
    table = a_table(sessions(20))
    before = table.digest()
    agent = Agent(table, busy_ports=4)
    drill = a_drill(table, agent)
    made = asyncio.run(drill.begin(30))
    assert made == {"asked": 30, "created": 30, "refused": {}}
    assert asyncio.run(drill.count()) == {"own": 30, "copies": 0, "in_dpvs": 30, "told": True}
    assert [(op, len(rows)) for op, rows in agent.asked] == [
        (abi.RecordOp.UPSERT, 30), (abi.RecordOp.UPSERT, 4), (abi.RecordOp.CLAIM, 30),
    ]  # fmt: skip
    assert asyncio.run(drill.end()) == {"removed": 30, "left": 0}
    assert asyncio.run(drill.end()) == {"removed": 0, "left": 0}
    assert table.digest() == before
    assert all(synthetic(rows).all() for _, rows in agent.asked)
