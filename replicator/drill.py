# SPDX-License-Identifier: GPL-2.0-or-later
"""A rehearsal of a failover on nodes that work: synthetic sessions go the way of real ones, and are taken out.

Rules
- Their clients are of 198.18.0.0/15, the range for measuring devices (RFC 2544), from port 9 (discard), and their
  sequence translation starts with a number that says drill: what is not all three is never touched.
- Service, real server and local address are those of real sessions of this node, the local port is any that is free. No
  packet is sent by any of it, and none is expected: they stand in CLOSE_WAIT, in which DPVS ends a session in silence,
  for two minutes at the most, whatever becomes of us.
- The agent makes them in our DPVS. From there on they are sessions as any: the scan finds them, peers are told, their
  injectors put them in. Taken over is done by CLAIM, as for a node that does not return.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from collector.record import AF_INET, CLOSE_WAIT, ESTABLISHED, FNAT, TCP, Bools, Records, pick, words
from collector.table import SessionTable
from probes.agent import abi
from probes.agent.client import AgentBusy, code_name
from probes.errors import DpvsProbeError
from replicator.replica import Replica

DISCARD = 9
SIGN = 0x4452494C  # "DRIL"
LIFE_MS = 120_000
MOST = 10_000
ROUNDS = 8  # of other local ports for those that were taken
PAUSE_S = 0.002
ANSWER_S = 20.0
TEMPLATES = 16

Codes = npt.NDArray[np.uint8]


class NoDrill(DpvsProbeError):
    """There is nothing to rehearse with."""

    help_text = (
        "A drill needs an attach that puts sessions in, and one open FullNAT TCP connection over IPv4 to take after."
    )


class Injector(Protocol):
    """What is asked of ``replicator.inject.Injector``."""

    def ask(self, ops: Codes, records: Records) -> "Future[int]": ...
    def answer(self, request: int) -> Codes | None: ...


def synthetic(records: Records) -> Bools:
    """Which of n sessions are a drill's."""
    client = records["caddr"]
    inside = (client[:, 0] == 198) & ((client[:, 1] & 0xFE) == 18)
    said = (records["cport"] == DISCARD) & (records["fnat_isn"] == SIGN)
    return np.asarray((records["af"] == AF_INET) & (records["proto"] == TCP) & inside & said)


def templates(records: Records) -> Records:
    """Sessions to take after: real ones, of different services and real servers as far as there are."""
    fit = (records["fwdmode"] == FNAT) & (records["proto"] == TCP) & (records["state"] == ESTABLISHED)
    fit &= (records["af"] == AF_INET) & (records["af_out"] == AF_INET) & ~synthetic(records)
    some = pick(records, np.flatnonzero(fit)[:4096])
    ways = np.stack([some[name].astype(np.int64) for name in ("vport", "dport")], axis=1)
    ways = np.concatenate([ways, *(some[name][:, :4].astype(np.int64) for name in ("vaddr", "laddr", "daddr"))], axis=1)
    _, first = np.unique(ways, axis=0, return_index=True)
    return pick(some, np.sort(first)[:TEMPLATES])


def invent(like: Records, count: int, chance: random.Random) -> Records:
    """``count`` synthetic sessions; local ports by chance."""
    out = pick(like, np.arange(count) % len(like))
    out["slot"], out["generation"], out["flags"], out["claim"] = np.arange(count), 1, 0, 0
    start = chance.randrange(1 << 17)
    numbers = (start + np.arange(count)) % (1 << 17)
    out["caddr"] = 0
    out["caddr"][:, 0], out["caddr"][:, 1] = 198, 18 + (numbers >> 16)
    out["caddr"][:, 2], out["caddr"][:, 3] = numbers >> 8 & 0xFF, numbers & 0xFF
    out["cport"], out["state"], out["timeout_ms"] = DISCARD, CLOSE_WAIT, LIFE_MS
    for name in ("fnat_delta", "fnat_fdata_seq", "fnat_prev_delta", "rs_end_seq", "rs_end_ack"):
        out[name] = 0
    out["fnat_isn"] = SIGN
    out["lport"] = _ports(count, chance)
    return out


def _ports(count: int, chance: random.Random) -> npt.NDArray[np.int64]:
    return np.array([chance.randrange(1025, 65535) for _ in range(count)], np.int64)


class Drill:
    """This node's part of a drill, step by step; each step may be asked for again."""

    def __init__(
        self,
        table: SessionTable,
        replicas: Callable[[], Iterable[Replica]],
        injector: Injector,
        listed: Callable[[], Records],
        settled: Callable[[], bool],
    ) -> None:
        """``listed``: the tuples that DPVS itself says it has (slow: asked in a thread); ``settled``: all peers that
        are there have acknowledged all there is.
        """
        self._table, self._replicas, self._injector = table, replicas, injector
        self._listed, self._settled = listed, settled
        self._chance = random.Random()

    async def begin(self, count: int) -> dict[str, Any]:
        """Make so many sessions in our DPVS, this node's own."""
        if not 0 < count <= MOST:
            raise NoDrill(f"a drill has 1 to {MOST} sessions", help_text="")
        like = templates(self._table.sessions())
        if len(like) == 0:
            raise NoDrill("this node has no open FullNAT TCP connection over IPv4")
        left = invent(like, count, self._chance)
        made: list[npt.NDArray[np.uint64]] = []
        refused: Counter[str] = Counter()
        for turn in range(ROUNDS):
            codes = await self._ask(abi.RecordOp.UPSERT, left)
            made.append(words(pick(left, np.isin(codes, (abi.Code.CREATED, abi.Code.UPDATED)))))
            again = np.isin(codes, (abi.Code.PORT_BUSY, abi.Code.BUSY))
            if turn == 0 or not again.any():
                refused = Counter(code_name(int(code)) for code in codes if code >= abi.RETRYABLE)
            left = pick(left, again)
            if len(left) == 0:
                break
            left["lport"] = _ports(len(left), self._chance)
        ours = np.concatenate(made).view(self._table.records.dtype).reshape(-1)
        codes = await self._ask(abi.RecordOp.CLAIM, ours)
        created = int(np.count_nonzero(codes == abi.Code.LIVE))
        return {"asked": count, "created": created, "refused": dict(refused) if created < count else {}}

    async def count(self) -> dict[str, Any]:
        """How many this node has: of its own, as copies in its table, and as its DPVS says."""
        copies = sum(
            int(np.count_nonzero(synthetic(pick(replica.records, replica.present)))) for replica in self._replicas()
        )
        listed = await asyncio.to_thread(self._listed)
        client = listed["caddr"]
        inside = (client[:, 0] == 198) & ((client[:, 1] & 0xFE) == 18) & (listed["cport"] == DISCARD)
        return {
            "own": len(self._own()),
            "copies": copies,
            "in_dpvs": int(np.count_nonzero(inside)),
            "told": self._settled(),
        }

    async def take(self) -> dict[str, Any]:
        """The node that they are of is taken for dead: its copies here become this node's own."""
        taken = 0
        for replica in list(self._replicas()):
            records = pick(replica.records, replica.present)
            records = pick(records, synthetic(records))
            if len(records):
                taken += int(np.count_nonzero(await self._ask(abi.RecordOp.CLAIM, records) == abi.Code.LIVE))
        return {"taken": taken}

    async def end(self) -> dict[str, Any]:
        """Take out all that are this node's own; the copies of others' go when those have ended theirs."""
        own = self._own()
        if len(own) == 0:
            return {"removed": 0, "left": 0}
        own["timeout_ms"] = 1000  # what is not taken out now is over in a second
        await self._ask(abi.RecordOp.YIELD, own)
        codes = await self._ask(abi.RecordOp.DELETE, own)
        gone = int(np.count_nonzero(np.isin(codes, (abi.Code.DELETED, abi.Code.ABSENT))))
        return {"removed": gone, "left": len(own) - gone}

    def _own(self) -> Records:
        own = self._table.sessions()
        return pick(own, synthetic(own))

    async def _ask(self, op: abi.RecordOp, records: Records) -> Codes:
        parts = [np.empty(0, np.uint8)]
        for first in range(0, len(records), abi.MAX_RECORDS):
            part = pick(records, np.arange(first, min(first + abi.MAX_RECORDS, len(records))))
            parts.append(await self._request(np.full(len(part), op, np.uint8), part))
        return np.concatenate(parts)

    async def _request(self, ops: Codes, records: Records) -> Codes:
        async with asyncio.timeout(ANSWER_S):
            while True:
                try:
                    request = await asyncio.wrap_future(self._injector.ask(ops, records))
                    break
                except AgentBusy:
                    await asyncio.sleep(PAUSE_S)
            while (codes := self._injector.answer(request)) is None:
                await asyncio.sleep(PAUSE_S)
            return codes
