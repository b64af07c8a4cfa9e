# SPDX-License-Identifier: GPL-2.0-or-later
"""One node: its answers, its end, the proof it owes, and what it does when parts of it fail."""

import asyncio
import gc
import json
import logging
import threading
import time
from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import Any

import pytest

from collector import record
from probes.errors import DpvsProbeError
from replicator.admin import AdminError, ask
from replicator.promotion import Policy, Promotion
from replicator.transport.address import Address
from tests.unit.simulated_dpvs import SimulatedDpvs
from tests.unit.simulated_node import SimulatedNode, Wire, until

pytestmark = pytest.mark.timeout(300)


def run(body: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(120):
            await body

    asyncio.run(bounded())


async def answer(node: SimulatedNode, command: str, **fields: Any) -> list[dict[str, Any]]:
    """What a client in another process would get."""
    return await asyncio.to_thread(lambda: list(ask(node.admin_path, command, **fields)))


class FakeInjector:
    def __init__(self) -> None:
        self.stopped: DpvsProbeError | None = None
        self.ticks = 0
        self.closed = False
        self.role, self.left = "standby", 0
        self.promotion = Promotion(Policy.PROMOTE)

    def tick(self, now_ns: int) -> None:
        assert not self.closed
        self.ticks += 1

    def promote(self, now_ns: int) -> None:
        self.role, self.left = "promoted", 3

    def demote(self) -> None:
        self.role, self.left = "standby", 0

    def progress(self) -> dict[str, Any]:
        self.left = max(0, self.left - 1)
        refused = {"no_laddr": 2} if self.role == "promoted" else {}
        return {"role": self.role, "waiting": self.left, "installed": 5, "refused": refused, "retrying": len(refused)}

    def unanswered(self) -> int:
        return 0

    def counters(self) -> Mapping[str, Any]:
        return {"installed": 5}

    def close(self) -> None:
        self.closed = True


def test_status(tmp_path: Path) -> None:
    async def body() -> None:
        async with SimulatedNode("b", tmp_path) as b, SimulatedNode("a", tmp_path, peers=(b.address,)) as a:
            for slot in range(5):
                a.dpvs.create(slot, slot)
            a.dpvs.create(9, 9, flags=record.INJECTED)
            a.dpvs.free(4)
            await until(lambda: b.holds(a) and len(a.table) == 4 and a.collector.copies == 1)
            (status,) = await answer(a, "status")
            assert (status["node"], status["pid"], status["state"]) == ("a", 4711, "attached")
            assert status["sessions"] == {"own": 4, "copies": 1, "of_peers": {}}
            assert status["events"]["created"] == 6  # the copy too
            assert status["events"]["freed"] == 1
            assert status["events"]["lost"] == 0
            assert status["complete"] is True
            assert status["scans"] >= 0
            assert status["injection"] == "off"
            (other,) = await answer(b, "status")
            assert other["sessions"] == {"own": 0, "copies": 0, "of_peers": {"a": 4}}
            json.dumps([status, other])

    run(body())


def test_peers(tmp_path: Path) -> None:
    async def body() -> None:
        async with SimulatedNode("b", tmp_path) as b:
            async with SimulatedNode("a", tmp_path, peers=(b.address, Address("127.0.0.1", 1))) as a:
                await until(lambda: b.holds(a))
                for slot in range(7):
                    a.dpvs.create(slot, slot)
                await until(lambda: b.holds(a) and len(a.table) == 7 and a.outbound[0].sender.settled)
                to_b, to_nobody, door = await answer(a, "peers")
                assert (to_b["direction"], to_b["node"], to_b["address"]) == ("to", "b", str(b.address))
                assert (to_b["state"], to_b["sessions"], to_b["waiting"], to_b["records"]) == ("live", 7, 0, 7)
                assert 0 < to_b["event_to_peer_p50_ms"] <= to_b["event_to_peer_p99_ms"] < 5000
                assert to_nobody["state"] == "down"
                assert 0 < to_nobody["link"]["dials_failed"] <= to_nobody["link"]["dials"]
                assert (door["direction"], door["address"], door["note"]) == ("listen", str(a.address), "")
                assert "cannot reach peer 127.0.0.1:1: connection refused" in to_nobody["note"]
                from_a, _ = await answer(b, "peers")
                assert (from_a["direction"], from_a["node"], from_a["state"]) == ("from", "a", "live")
                assert (from_a["sessions"], from_a["waiting"]) == (7, None)
                while from_a["bytes"] != to_b["bytes"]:  # a heartbeat between the two answers
                    (to_b, _, _), (from_a, _) = await answer(a, "peers"), await answer(b, "peers")
            replica = b.replica_of("a")
            assert replica is not None
            await until(lambda: not replica.connected)
            from_a, _ = await answer(b, "peers")
            assert (from_a["state"], from_a["sessions"]) == ("gone", 7)

    run(body())


def test_counters_of_what_went_wrong(tmp_path: Path) -> None:
    """Each moves when it is made to, on both sides."""

    async def body() -> None:
        async with (
            SimulatedNode("b", tmp_path) as b,
            Wire() as wire,
            SimulatedNode("a", tmp_path, peers=(wire.address,)) as a,
        ):
            wire.to = b.address
            await until(lambda: b.holds(a))
            to_b, from_a, door = (*(await answer(a, "peers"))[:1], *await answer(b, "peers"))
            assert (to_b["link"]["connections"], to_b["link"]["lost"]) == (1, 0)
            assert (from_a["link"]["connections"], from_a["link"]["lost"]) == (1, 0)
            assert door["link"] == {
                "lost": 0, "lost_ended": 0, "lost_reset": 0, "lost_silent": 0, "lost_tampered": 0,
                "refused": 0, "refused_by_peer": 0, "crowded": 0, "refused_at_the_door": {},
            }  # fmt: skip

            wire.cut()
            await until(lambda: a.outbound[0].sender.counters["partial_syncs"] == 1 and b.holds(a))
            a.dpvs.create(1, 1)
            await until(lambda: b.holds(a) and a.outbound[0].sender.settled)
            to_b, from_a, door = (*(await answer(a, "peers"))[:1], *await answer(b, "peers"))
            assert (to_b["link"]["connections"], to_b["link"]["lost"]) == (2, 1)
            assert (from_a["link"]["connections"], from_a["link"]["lost"]) == (2, 1)
            assert to_b["link"]["lost_reset"] + to_b["link"]["lost_ended"] == 1
            assert from_a["link"]["records_received"] == 1

            b.links._said.clear()
            async with SimulatedNode("b", tmp_path, peers=(b.address,), admin_name="other.sock") as same_name:
                await until(lambda: same_name.outbound[0].counters["refused_by_peer"] > 0)
                (to_b, _), (_, door) = await answer(same_name, "peers"), await answer(b, "peers")
                assert to_b["link"]["refused_by_peer_same_node"] == to_b["link"]["refused_by_peer"]
                assert door["link"]["refused_same_node"] > 0
                assert door["note"].endswith(" refused")

            before = door["link"]["refused"]
            _, writer = await asyncio.open_connection(b.address.host, b.address.port)
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            await until(lambda: b.links._of(None)["refused_protocol"] == 1)
            writer.close()
            await until(lambda: b.links._of(None)["protocol_errors"] == 1)  # told when its task has ended
            _, door = await answer(b, "peers")
            assert door["link"]["refused"] > before
            assert door["link"]["protocol_errors"] == 1

    run(body())


def test_sessions(tmp_path: Path) -> None:
    async def body() -> None:
        async with (
            SimulatedNode("b", tmp_path, slots=60_000) as b,
            SimulatedNode("a", tmp_path, slots=60_000, peers=(b.address,)) as a,
        ):
            for slot in (*range(1009), 50_000, 59_999):
                a.dpvs.create(slot, slot)
                b.dpvs.create(slot, 5)
            await until(lambda: b.holds(a) and len(a.table) == len(b.table) == 1011)
            own = await answer(a, "sessions")
            assert [row["slot"] for row in own] == [*range(1009), 50_000, 59_999]
            assert {row["origin"] for row in own} == {"own"}
            assert own == await answer(a, "sessions", origin="own", proto="tcp", port=80)
            everything = await answer(b, "sessions")
            assert [row["origin"] for row in everything] == ["own"] * 1011 + ["a"] * 1011
            copies = await answer(b, "sessions", origin="a")
            assert [{**row, "origin": "own"} for row in copies] == own
            assert len(await answer(b, "sessions", limit=1015)) == 1015
            assert len(await answer(b, "sessions", origin="a", limit=3)) == 3
            assert await answer(b, "sessions", origin="c") == []
            assert [r["slot"] for r in await answer(a, "sessions", address="10.0.3.5")] == [3 * 256 + 5]
            with pytest.raises(AdminError, match="'UP' is not a state"):
                await answer(a, "sessions", state="UP")
            with pytest.raises(AdminError, match="there is no command 'dance'"):
                await answer(a, "dance")

    run(body())


def test_detach(tmp_path: Path) -> None:
    async def body() -> None:
        injector = FakeInjector()
        async with SimulatedNode("a", tmp_path, injector=injector) as a:
            await until(lambda: injector.ticks > 3)
            (status,) = await answer(a, "status")
            assert status["injection"] == {"installed": 5}
            assert await answer(a, "detach") == []
            assert a.task is not None
            assert await a.task == 0
            assert injector.closed
            assert not a.admin_path.exists()
            assert a.released == 0
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(*a.address)

    run(body())


def test_injection_that_stops_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        injector = FakeInjector()
        async with SimulatedNode("a", tmp_path, injector=injector) as a:
            injector.stopped = DpvsProbeError("the agent is poisoned")
            before = injector.ticks
            await until(lambda: injector.ticks > before + 5)
            assert a.task is not None
            assert not a.task.done()
        assert caplog.text.count("no more sessions are put into DPVS: the agent is poisoned") == 1

    with caplog.at_level(logging.INFO):
        run(body())


def test_nothing_is_sent_before_the_layout_is_proven(tmp_path: Path) -> None:
    async def body() -> None:
        asked: list[int] = []
        async with SimulatedNode("b", tmp_path) as b:

            def prove() -> bool:
                replica = b.replica_of("a")
                asked.append(len(replica) if replica else 0)
                return len(asked) == 2

            async with SimulatedNode("a", tmp_path, peers=(b.address,), prove=prove) as a:
                await until(lambda: b.holds(a))
                await asyncio.sleep(0.05)
                assert asked == [], "there is nothing to prove it on"
                a.dpvs.create(1, 1)
                await until(lambda: len(asked) == 2 and b.holds(a))
                assert asked[0] == 0
                a.dpvs.create(2, 2)
                await until(lambda: len(a.table) == 2 and b.holds(a))
                assert len(asked) == 2

    run(body())


def test_a_layout_that_is_disproved_ends_the_node(tmp_path: Path) -> None:
    async def body() -> None:
        def prove() -> bool:
            raise DpvsProbeError("not this layout")

        async with SimulatedNode("b", tmp_path) as b:
            async with SimulatedNode("a", tmp_path, peers=(b.address,), prove=prove) as a:
                await until(lambda: b.holds(a))
                a.dpvs.create(1, 1)
                assert a.task is not None
                with pytest.raises(DpvsProbeError, match="not this layout"):
                    await a.task
                assert not a.admin_path.exists()
            replica = b.replica_of("a")
            assert replica is not None
            assert len(replica) == 0, "what may be wrong never left"

    run(body())


def test_an_error_of_the_collector_ends_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with SimulatedNode("a", tmp_path) as a:

            def broken(self: SimulatedDpvs, maximum: int) -> Any:
                raise DpvsProbeError("the ring is broken")

            monkeypatch.setattr(SimulatedDpvs, "drain", broken)
            assert a.task is not None
            with pytest.raises(DpvsProbeError, match="the ring is broken"):
                await a.task

    run(body())


def test_a_long_answer_does_not_hold_up_the_loop(tmp_path: Path) -> None:
    async def body() -> None:
        async with SimulatedNode("a", tmp_path, slots=1 << 15) as a:
            for slot in range(20_000):
                a.dpvs.create(slot, slot)
            await until(lambda: len(a.table) == 20_000)
            got: list[Any] = []
            reading = threading.Thread(target=lambda: got.extend(ask(a.admin_path, "sessions")))
            before = a.node.ticks
            reading.start()
            gc.collect()
            gc.freeze()  # as attach does: what all tests before have made is not looked through meanwhile
            worst, start = 0.0, time.thread_time()
            while reading.is_alive():
                began = time.thread_time()  # of this thread alone: the machine may have other things to do
                await asyncio.sleep(0)
                worst = max(worst, time.thread_time() - began)
            whole = time.thread_time() - start
            gc.unfreeze()
            assert len(got) == 20_000
            assert a.node.ticks > before + 10
            assert worst < whole / 5, (worst, whole)

    run(body())


def test_promotion_and_demotion(tmp_path: Path) -> None:
    async def body() -> None:
        async with SimulatedNode("a", tmp_path, injector=FakeInjector()) as a:
            began = time.monotonic()
            (line,) = await answer(a, "promote", wait=0.5)
            assert time.monotonic() - began >= 0.5, "what is refused is waited for"
            assert line["took_ms"] >= 500
            assert (line["role"], line["waiting"], line["refused"]) == ("promoted", 0, {"no_laddr": 2})
            (line,) = await answer(a, "demote")
            assert line["role"] == "standby"
            for wrong in ("soon", -1, True, 1e9):
                with pytest.raises(AdminError, match="not a number of seconds"):
                    await answer(a, "promote", wait=wrong)
        async with SimulatedNode("b", tmp_path) as b:
            with pytest.raises(AdminError, match="not put into this DPVS"):
                await answer(b, "promote")

    asyncio.run(body())


def test_what_nobody_puts_in_does_not_pile_up(tmp_path: Path) -> None:
    async def body() -> None:
        async with SimulatedNode("b", tmp_path) as b, SimulatedNode("a", tmp_path, peers=(b.address,)) as a:
            for slot in range(20):
                a.dpvs.create(slot, slot)
            await until(lambda: len(a.table) == 20 and b.holds(a))
            replica = b.replica_of("a")
            assert replica is not None
            await until(lambda: replica.pending.pending == 0)

    asyncio.run(body())
