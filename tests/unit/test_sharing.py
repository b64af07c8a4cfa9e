# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/sharing.py: each session at k of several peers, over TCP, while peers come and go."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from collector.record import Records, digest, pick, words
from replicator import links
from replicator.placement import Placement
from replicator.wire import SyncReason
from tests.unit.simulated_node import LiveDpvs, SimulatedNode, Wire, until

SLOTS = 2048
AWAY_NS = 300_000_000


class Cluster:
    """Node a, and three peers that it reaches by wires which can be cut."""

    def __init__(self, a: SimulatedNode, peers: list[SimulatedNode], wires: list[Wire]) -> None:
        self.a, self.peers, self.wires = a, peers, wires

    def right(self, counting: Iterable[int], replicas: int) -> bool:
        """The peers that count hold exactly their shares."""
        counting = list(counting)
        keys = [str(self.wires[number].address) for number in counting]
        placement = Placement(keys, replicas)
        sessions = pick(self.a.table.records, self.a.table.shared)
        return self.a.table.digest() == self.a.truth() and all(
            self._held(number) == digest(pick(sessions, placement.held_by(key, sessions)))
            for number, key in zip(counting, keys, strict=True)
        )

    def _held(self, number: int) -> int | None:
        replica = self.peers[number].replica_of("a")
        return replica.digest() if replica is not None and replica.synced else None

    def holders(self) -> "np.ndarray":
        """For each of a's sessions, how many peers hold it just as it is."""
        mine = pick(self.a.table.records, self.a.table.shared)
        count = np.zeros(SLOTS, np.int64)
        for peer in self.peers:
            replica = peer.replica_of("a")
            if replica is not None:
                theirs: Records = pick(replica.records, replica.present)
                same = np.isin(words(theirs).view("V144").ravel(), words(mine).view("V144").ravel())
                count[theirs["slot"][same]] += 1
        return count[mine["slot"]]

    def away(self, number: int) -> None:
        self.wires[number].refuses = True
        self.wires[number].cut()

    def back(self, number: int) -> None:
        self.wires[number].refuses = False

    def members(self) -> int:
        assert self.a.sharing is not None
        return len(self.a.sharing.members)


@asynccontextmanager
async def cluster(directory: Path, replicas: int) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        dpvs = LiveDpvs(SLOTS)
        for slot in range(600):
            dpvs.create(slot, slot)
        wires, peers = [], []
        for name in ("b", "c", "d"):
            wires.append(await stack.enter_async_context(Wire()))
            peers.append(await stack.enter_async_context(SimulatedNode(name, directory)))
            wires[-1].to = peers[-1].address
        a = SimulatedNode(
            "a", directory, slots=SLOTS, dpvs=dpvs, peers=tuple(wire.address for wire in wires), share=replicas,
            away_ns=AWAY_NS,
        )  # fmt: skip
        yield Cluster(await stack.enter_async_context(a), peers, wires)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "AGE_S", 0.02)


def run(directory: Path, replicas: int, body: Callable[[Cluster], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        async with cluster(directory, replicas) as joined:
            await body(joined)

    asyncio.run(all_of_it())


@pytest.mark.parametrize("replicas", [1, 2])
def test_each_session_at_k_peers(tmp_path: Path, replicas: int) -> None:
    async def body(joined: Cluster) -> None:
        await until(lambda: joined.right(range(3), replicas))
        random = np.random.default_rng(replicas)
        for _ in range(20):
            joined.a.dpvs.churn(random, 100)
            await asyncio.sleep(0.01)
        await until(lambda: joined.right(range(3), replicas))
        assert (joined.holders() == replicas).all()
        rows = joined.a.links.peers(0, injecting=False)[:3]
        assert sum(row["share"] for row in rows) == pytest.approx(replicas, abs=0.001)
        assert [row["sessions"] for row in rows] == [
            replica.count for peer in joined.peers if (replica := peer.replica_of("a")) is not None
        ]
        assert all(row["link"]["full_syncs"] == 1 for row in rows)

    run(tmp_path, replicas, body)


def test_a_slot_whose_next_session_is_of_another_peer(tmp_path: Path) -> None:
    """The peer that held the one before must hear that it ended, though the one after is none of its business."""

    async def body(joined: Cluster) -> None:
        await until(lambda: joined.right(range(3), 1))
        for turn in range(1, 6):
            for slot in range(600):
                joined.a.dpvs.free(slot)
                joined.a.dpvs.create(slot, 10_000 + 997 * turn + slot)
            await until(lambda: joined.right(range(3), 1))
        assert joined.a.links.peers(0, injecting=False)[0]["link"]["full_syncs"] == 1

    run(tmp_path, 1, body)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_peer_that_goes_and_returns(tmp_path: Path, replicas: int) -> None:
    async def body(joined: Cluster) -> None:
        await until(lambda: joined.right(range(3), replicas))
        random = np.random.default_rng(7)
        joined.away(2)
        joined.a.dpvs.churn(random, 200)
        await until(lambda: joined.members() == 2)
        await until(lambda: joined.right((0, 1), replicas))
        joined.a.dpvs.churn(random, 200)
        await until(lambda: joined.right((0, 1), replicas))

        joined.back(2)
        least = replicas
        while joined.members() == 2:
            least = min(least, int(joined.holders().min()))
            await asyncio.sleep(0.002)
        await until(lambda: joined.right(range(3), replicas))
        assert least == replicas  # nobody let go before it was there
        joined.a.dpvs.churn(random, 500)
        await until(lambda: joined.right(range(3), replicas))
        assert joined.a.outbound[0].sender.full_sync_reason is SyncReason.SHARED_ANEW

    run(tmp_path, replicas, body)


def test_nobody_is_left_out_while_nobody_is_there(tmp_path: Path) -> None:
    async def body(joined: Cluster) -> None:
        await until(lambda: joined.right(range(3), 2))
        for number in range(3):
            joined.away(number)
        await asyncio.sleep(2 * AWAY_NS / 1e9)
        assert joined.members() == 3
        joined.a.dpvs.churn(np.random.default_rng(3), 100)
        for number in range(3):
            joined.back(number)
        await until(lambda: joined.right(range(3), 2))
        assert {link.sender.full_sync_reason for link in joined.a.outbound} == {SyncReason.FIRST}

    run(tmp_path, 2, body)


def test_more_replicas_than_are_left(tmp_path: Path) -> None:
    async def body(joined: Cluster) -> None:
        await until(lambda: joined.right(range(3), 2))
        joined.away(0)
        joined.away(1)
        await until(lambda: joined.members() == 1)
        await until(lambda: joined.right((2,), 2))
        joined.back(0)
        joined.back(1)
        await until(lambda: joined.members() == 3 and joined.right(range(3), 2))

    run(tmp_path, 2, body)
