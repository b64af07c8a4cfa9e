# SPDX-License-Identifier: GPL-2.0-or-later
"""Sending the agent anything but what it expects gets an error back, and changes nothing."""

import os
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from collector.record import AF_INET, ESTABLISHED, FNAT, RECORD, TCP, pick
from probes.agent import abi
from probes.agent.client import EDPVS_BUSY, AgentClient, Door
from probes.control import SET_CONN_TOKEN
from probes.target import Target
from tests.lab.node import Node
from tests.lab.pair import Pair
from tests.lab.process import wait_for
from tests.lab.records import answers, fnat_records

pytestmark = [pytest.mark.dpvs, pytest.mark.needs("bpf", "agent")]
Records = npt.NDArray[Any]
REQUESTS = int(os.environ.get("DPVS_PROBE_HOSTILE_REQUESTS", "1009"))


class Hostile:
    """A client of node b's agent that says what it likes."""

    def __init__(self, node: Node, target: Target) -> None:
        self.node = node
        self.control = node.control
        self.set_conn = node.layout.sockopt_id("SOCKOPT_SET_CONN")
        door = Door.find(target)
        assert door is not None
        self.door = door
        self.client = AgentClient(target, node.layout, self.control, door)
        self.client.hello()

    def raw(self, request: bytes) -> int:
        """Send bytes to SET_CONN as they are (the handler is proven to be there); DPVS's error code."""
        self.door.prove()
        return self.control.set(self.set_conn, request, allow_set_conn_token=SET_CONN_TOKEN)

    def head(self, **fields: int) -> bytes:
        head = np.zeros((), abi.REQUEST)
        right = {"magic": abi.REQUEST_MAGIC, "abi": abi.ABI, "op": abi.Op.BATCH, "token": self.door.data["token"],
                 "request_id": 0x1234567, "count": 1, "record_bytes": abi.RECORD_BYTES}  # fmt: skip
        for name, value in (right | fields).items():
            head[name] = value
        return head.tobytes()

    def codes(self, records: Records, op: int = abi.RecordOp.UPSERT) -> list[int]:
        request = self.client.submit(np.full(len(records), op, np.uint8), records)
        wait_for("results", lambda: self.client.results(request) is not None, 20)
        codes = self.client.results(request)
        assert codes is not None
        return [int(code) for code in codes]


@pytest.fixture
def hostile(pair: Pair) -> Iterator[Hostile]:
    pair.b.probe("--listen", pair.sync_address("b"))
    with Target.open(pair.b.pid) as target:
        yield Hostile(pair.b, target)
        assert pair.b.alive
        assert pair.request() == b"hello from the real server\n"
        pair.active("b")
        assert pair.request() == b"hello from the real server\n"


def packed(address: str) -> Records:
    return np.frombuffer(socket.inet_aton(address).ljust(16, b"\0"), np.uint8)


def good(pair: Pair, count: int = 1) -> Records:
    """Records that node b could take."""
    records = np.zeros(count, RECORD)
    plan = pair.plan
    records["af"] = records["af_out"] = AF_INET
    records["proto"], records["fwdmode"], records["state"] = TCP, FNAT, ESTABLISHED
    records["caddr"], records["vaddr"] = packed(plan.client), packed(plan.vip)
    records["laddr"], records["daddr"] = packed(plan.local_addresses[0]), packed(plan.servers[0])
    records["cport"], records["vport"], records["dport"] = 20001 + np.arange(count), 7, 7
    records["lport"] = 2001 + np.arange(count)
    records["timeout_ms"], records["worker"] = 90_000, 255
    return records


def test_wrong_requests_are_malformed(pair: Pair, hostile: Hostile) -> None:
    record = good(pair).tobytes()
    op = b"\1".ljust(8, b"\0")
    right = hostile.head() + op + record
    wrong = [
        b"", b"\0", right[:63], right[:64], right[:-1], right + b"\0", b"\xff" * len(right),
        hostile.head(magic=1) + op + record,
        hostile.head(abi=99) + op + record,
        hostile.head(op=77) + op + record,
        hostile.head(token=5) + op + record,
        hostile.head(request_id=0) + op + record,
        hostile.head(count=0) + op + record,
        hostile.head(count=2) + op + record,
        hostile.head(count=4097) + op * 513 + record * 4097,
        hostile.head(count=0xFFFFFFFF) + op + record,
        hostile.head(record_bytes=143) + op + record,
    ]  # fmt: skip
    for request in wrong:
        assert hostile.raw(request) != 0, request[:64].hex()
    assert len(pair.b.sessions()) == 0
    assert hostile.client.counters()["malformed"] + hostile.client.counters()["wrong_token"] >= len(wrong) - 1
    assert hostile.client.state == abi.State.READY


def test_each_bad_record_gets_its_own_code(pair: Pair, hostile: Hostile) -> None:
    def one(**fields: object) -> Records:
        record = good(pair)
        for name, value in fields.items():
            record[name] = value
        return record

    elsewhere = packed("203.0.113.9")
    cases = [
        (one(vport=8), abi.Code.NO_SERVICE),
        (one(vaddr=elsewhere), abi.Code.NO_SERVICE),
        (one(daddr=elsewhere), abi.Code.NO_DEST),
        (one(dport=9), abi.Code.NO_DEST),
        (one(laddr=elsewhere), abi.Code.NO_LADDR),
        (one(fwdmode=6), abi.Code.UNSUPPORTED),
        (one(fwdmode=255), abi.Code.UNSUPPORTED),
        (one(fwdmode=3), abi.Code.BAD_RECORD),  # with a local address
        (one(fwdmode=3, laddr=packed(pair.plan.client), lport=20001), abi.Code.MODE_MISMATCH),
        (one(proto=132), abi.Code.NO_SERVICE),
        (one(proto=132, state=14), abi.Code.BAD_RECORD),
        (one(proto=50), abi.Code.UNSUPPORTED),
        (one(proto=17), abi.Code.NO_SERVICE),
        (one(proto=17, state=3), abi.Code.BAD_RECORD),
        (one(af=10), abi.Code.NO_SERVICE),  # IPv6 outside, IPv4 inside: there could be one
        (one(af_out=10), abi.Code.UNSUPPORTED),
        (one(af=1), abi.Code.UNSUPPORTED),
        (one(flags=0x0400), abi.Code.BAD_RECORD),  # a template with ports
        (one(flags=0x0400, cport=0, lport=0, dport=0), abi.Code.NO_SERVICE),  # none that ties its clients
        (one(flags=0x0400, cport=0, lport=0, dport=0, vport=0), abi.Code.UNSUPPORTED),
        (one(flags=0x0C00, cport=0, lport=0, dport=0), abi.Code.UNSUPPORTED),
        (one(flags=0x0800), abi.Code.UNSUPPORTED),
        (one(cport=0), abi.Code.BAD_RECORD),
        (one(lport=0), abi.Code.BAD_RECORD),
        (one(timeout_ms=0), abi.Code.BAD_RECORD),
        (one(timeout_ms=0xFFFFFFFF), abi.Code.BAD_RECORD),
        (one(state=11), abi.Code.BAD_RECORD),
        (one(state=65535), abi.Code.BAD_RECORD),
        (one(wscale_vs=255), abi.Code.BAD_RECORD),
    ]
    records = np.zeros(len(cases), RECORD)  # concatenate would drop the padding of the record
    for place, (record, _) in enumerate(cases):
        records[place] = record[0]
    assert hostile.codes(records) == [int(code) for _, code in cases]
    assert len(pair.b.sessions()) == 0
    assert pair.b.counters().idle


def test_one_bad_record_does_not_spoil_the_others(pair: Pair, hostile: Hostile) -> None:
    records = good(pair, 5)
    records["vport"][2] = 8
    assert hostile.codes(records) == [1, 1, abi.Code.NO_SERVICE, 1, 1]
    assert len(pair.b.sessions()) == 4
    assert hostile.codes(records, abi.RecordOp.DELETE) == [3, 3, abi.Code.ABSENT, 3, 3]
    assert len(pair.b.sessions()) == 0
    assert pair.b.counters().idle


def test_dpvs_own_sessions_and_ports_are_not_touched(pair: Pair, hostile: Hostile) -> None:
    pair.active("b")
    with pair.connect(7) as connection:
        connection.sendall(b"mine\n")
        assert connection.recv(100) == b"mine\n"
        (row,) = pair.b.sessions()
        taken = good(pair, 2)
        for name in ("vaddr", "laddr", "daddr", "vport", "lport", "dport"):
            taken[name] = row[name]
        for name in ("vaddr", "laddr", "daddr"):
            taken[name][:, 4:] = 0
        taken["cport"] = row["cport"], 4444
        assert hostile.codes(taken) == [abi.Code.FOREIGN, abi.Code.PORT_BUSY]
        assert hostile.codes(taken, abi.RecordOp.DELETE) == [abi.Code.FOREIGN, abi.Code.ABSENT]
        connection.sendall(b"still mine\n")
        assert connection.recv(100) == b"still mine\n"
        assert len(pair.b.sessions()) == 1


def test_records_of_nonsense(pair: Pair, hostile: Hostile) -> None:
    rng = random.Random(1009)
    for _ in range(40):
        count = rng.randint(1, abi.MAX_RECORDS)
        records = np.frombuffer(rng.randbytes(count * abi.RECORD_BYTES), RECORD).copy()
        assert all(code >= 16 for code in hostile.codes(records))
        mutated = good(pair, 64)
        raw = mutated.view(np.uint8).reshape(64, -1)
        for row in raw:  # nearly right is the harder case
            row[rng.randrange(8, 72)] ^= 1 << rng.randrange(8)
        hostile.codes(mutated)
        hostile.codes(mutated, abi.RecordOp.DELETE)
        hostile.codes(good(pair, 64), abi.RecordOp.DELETE)
    wait_for("nothing is left", lambda: pair.b.counters().idle, 10)
    assert len(pair.b.sessions()) == 0
    assert hostile.client.state == abi.State.READY


def mutated(rng: random.Random, request: bytes) -> bytes:
    """A request with something wrong in it: a few bytes, a field of its head, its length."""
    out = bytearray(request)
    for _ in range(rng.choice((1, 1, 2, 5))):
        kind, head = rng.random(), abi.REQUEST.fields
        assert head is not None
        if kind < 0.3:
            at = head[rng.choice(list(head))][1]
            out[at : at + 4] = rng.choice((0, 1, 2, 511, 4096, 4097, 0x7FFFFFFF, 0xFFFFFFFF)).to_bytes(4, "little")
        elif kind < 0.7:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        elif kind < 0.8:
            at = rng.randrange(len(out))
            out[at : at + rng.randrange(1, 40)] = rng.randbytes(rng.randrange(0, 40))
        elif kind < 0.9:
            del out[rng.randrange(len(out)) :]
        else:
            out += rng.randbytes(rng.randrange(1, 200))
        if not out:
            break
    return bytes(out)


@pytest.mark.pair(workers=2)
def test_mutated_requests(pair: Pair, hostile: Hostile) -> None:
    """What is half right is taken in part or not at all, and everything that was taken is accounted for."""
    rng = random.Random(REQUESTS)
    records = fnat_records(pair.plan, 4096)
    taken = 0
    for _ in range(REQUESTS):
        count = rng.randint(1, 40)
        some = pick(records, np.array(rng.sample(range(len(records)), count)))
        ops = bytes(rng.choices((1, 1, 2, 3, 0, 255), k=count)).ljust(-(-count // 8) * 8, b"\0")
        right = hostile.head(count=count, request_id=rng.getrandbits(63) | 1)
        request = mutated(rng, right + ops + some.tobytes())
        if abi.Op.RETIRE.to_bytes(4, "little") == request[12:16] or abi.RecordOp.CLAIM in request[64 : 64 + count]:
            continue  # that it may be told: to stop, and that a copy is the session from now on
        while (answer := hostile.raw(request)) == EDPVS_BUSY:
            time.sleep(0.001)  # it takes eight at a time; nothing of this one was taken
        taken += answer == 0
    assert taken > REQUESTS // 5, "too few are half right"
    wait_for("nothing is under way", lambda: hostile.client.counters()["outstanding"] == 0, 10)
    said = hostile.client.counters()
    assert said["state"] == "ready"
    assert said["malformed"] > REQUESTS // 5
    assert sum(said["records"].values()) == int(hostile.client.door.data["accepted"]) > 0

    def whole() -> bool:  # nothing is there in part; some have been given a second to live
        counters = pair.b.counters()
        return (counters.inactive, counters.active, counters.ports_used) == (
            len(pair.b.sessions()),
            0,
            counters.inactive,
        )

    wait_for("each session has its port and is counted", whole, 20)
    rows = pair.b.sessions()
    assert 0 < len(rows) <= said["records"]["created"] - said["records"].get("deleted", 0)
    rest = np.zeros(len(rows), RECORD)
    rest["af"], rest["af_out"], rest["proto"], rest["fwdmode"] = rows["in_af"], rows["out_af"], rows["proto"], FNAT
    for name in ("caddr", "vaddr", "laddr", "daddr"):
        rest[name][:, :4] = rows[name][:, :4]
    for name in ("cport", "vport", "lport", "dport"):
        rest[name] = rows[name]
    rest["timeout_ms"] = 1000
    ended = answers(hostile.client, int(abi.RecordOp.DELETE), rest)
    assert set(ended.tolist()) <= {abi.Code.DELETED, abi.Code.ABSENT}
    wait_for("nothing is left", lambda: pair.b.counters().idle, 10)


def test_unknown_operations(pair: Pair, hostile: Hostile) -> None:
    for op in (0, max(abi.RecordOp) + 1, 255):
        assert all(code >= 16 for code in hostile.codes(good(pair, 3), op))
    assert len(pair.b.sessions()) == 0


def test_requests_of_another_protocol_version_get_no_answer(pair: Pair, hostile: Hostile) -> None:
    layout = pair.b.layout
    for kind in (0, 1):
        message = hostile.control._build(
            "dpvs_sock_msg", version=layout.sockopt_version + 1, id=hostile.set_conn, type=kind, len=0
        )
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(pair.b.ipc))
            connection.sendall(message)
            assert connection.recv(1) == b""
    assert len(pair.b.sessions()) == 0


def test_a_half_sent_request_does_not_stop_traffic(pair: Pair, hostile: Hostile) -> None:
    steady = pair.steady(10, interval=0.05)
    message = hostile.control._build(
        "dpvs_sock_msg", version=pair.b.layout.sockopt_version, id=hostile.set_conn, type=1, len=4096
    )
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(pair.b.ipc))
        connection.sendall(message + b"x" * 100)
    assert hostile.client.state == abi.State.READY
    assert hostile.client.hello()
    assert steady.finish()["alive"] == 10
