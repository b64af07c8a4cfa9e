# SPDX-License-Identifier: GPL-2.0-or-later
"""One node while it runs: collector, links and injector in one asyncio loop, until it is told to stop.

Rules
- Nothing in the loop waits for the disk, the DPVS or a peer: the collector reads memory, links are asynchronous, the
  injector asks its agent from a thread of its own. The one exception is the proof of the layout, when there were no
  sessions to prove it on before: it asks DPVS a few questions, before the first session is sent to anybody.
- When the DPVS process ends, its sessions have not ended: one last look at its memory, which is still there, then the
  table is frozen, its pages are given back (a new DPVS needs them), and what peers do not have yet is sent for a moment
  more. Exit status 3.
- What goes wrong with a peer is said once and tried again. What goes wrong with our own DPVS ends the node with an
  error.
"""

import asyncio
import gc
import logging
import os
import select
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from collector.record import Bools, Records
from collector.table import Applied, SessionTable
from probes.errors import DpvsProbeError
from replicator import query
from replicator.activity import Activity
from replicator.admin import Line
from replicator.admin_server import AdminServer, BadRequest
from replicator.drill import Drill
from replicator.filters import SessionFilter
from replicator.histogram import Histogram
from replicator.links import Links
from replicator.promotion import Promotion
from replicator.readiness import Readiness
from replicator.sources import export, told_by_dpvs
from replicator.store.keeper import Keeper
from replicator.summary import summarize
from replicator.ticker import Ticker
from replicator.watching import Filter, Watchers, watch

# Between two ticks: this one brought events, they came lately, not so lately, long ago. Shorter pauses than the first
# make nothing sooner: at 10 000 sessions a second the processor is then busy all the time.
HURRY_S, BUSY_S, CALM_S, IDLE_S = 0.00015, 0.0003, 0.002, 0.005
CALM_AFTER_NS, IDLE_AFTER_NS = 50_000_000, 1_000_000_000
PROOF_PAUSE_NS = 100_000_000
LAST_WORDS_S = 1.0  # for peers, after the DPVS ended
ADMIN_BLOCK = 1 << 15  # slots looked at for an answer before the loop does something else
ADMIN_LINES = 500
TOP_ROWS = 20
ORPHANS = 1000  # listed, where no limit is asked for
LONGEST_PROMOTION_S = 50.0  # less than a client of the admin socket waits
FORGOTTEN = 1 << 16  # changes of a peer's sessions a round, where none is put in
PROGRESS_S = 0.01  # between two looks at how far a promotion is
TARGET_ENDED = 3  # exit status

log = logging.getLogger(__name__)


class NotProven(DpvsProbeError):
    """Nothing may be told of the sessions yet."""

    help_text = "The struct layout is proven on the first session of this DPVS; wait for one."


class NotInjecting(DpvsProbeError):
    """There is nothing to promote."""

    help_text = "Attach with --listen and without --no-inject."


class NoPackets(DpvsProbeError):
    """Nothing is known of flows."""

    help_text = "Attach with --xdp INTERFACE."


class Collector(Protocol):
    """``collector.collector.Collector``."""

    table: SessionTable
    copies: int
    behind: bool
    counters: dict[str, int]

    def tick(self, now_ns: int) -> Applied: ...
    def scan(self, now_ns: int) -> Applied: ...
    def scan_all(self, now_ns: int) -> None: ...


class Injector(Protocol):
    """``replicator.inject.Injector``."""

    stopped: DpvsProbeError | None
    promotion: Promotion

    def tick(self, now_ns: int) -> None: ...
    def promote(self, now_ns: int) -> None: ...
    def demote(self) -> None: ...
    def progress(self) -> dict[str, Any]: ...
    def unanswered(self) -> int: ...
    def ask(self, ops: npt.NDArray[np.uint8], records: Records) -> "Future[int]": ...
    def answer(self, request: int) -> npt.NDArray[np.uint8] | None: ...
    def codes(self, replica: Any) -> npt.NDArray[np.uint8]: ...
    def counters(self) -> Mapping[str, Any]: ...
    def close(self) -> None: ...


class Governed(Protocol):
    """``collector.governed.Governed``."""

    def tick(self, now_ns: int) -> None: ...
    def status(self) -> dict[str, Any]: ...
    def use_budget(self, budget: float) -> None: ...


@dataclass
class Parts:
    """What a node is made of; attach makes the real ones."""

    name: str
    pid: int  # of the DPVS
    collector: Collector
    links: Links
    admin_path: Path
    injector: Injector | None = None
    governed: Governed | None = None  # the probes; None where the scan works alone
    keeper: Keeper | None = None
    origins: int = 0  # peers expected to send us their sessions
    pidfd: int = -1  # readable once the DPVS has ended; -1: nobody watches
    release: Callable[[], None] = lambda: None  # give back what we hold of the DPVS's memory
    prove: Callable[[], bool] | None = None  # whether the layout is proven now; None: it was
    activity: Activity | None = None  # what packets say of sessions
    about: Mapping[str, Any] = field(default_factory=dict)  # for status: what never changes
    more: Callable[[], Mapping[str, Any]] = dict  # for status: what probes and agent say now
    filter: SessionFilter | None = None  # which of our sessions peers are told of
    settings: Callable[[], list[Line]] = list  # for the command config: what is in force


class Node:
    """Runs the parts. ``run`` returns the exit status: 0 after ``stop``, 3 when the DPVS has ended."""

    def __init__(self, parts: Parts, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._parts = parts
        self._clock = clock
        self._table = parts.collector.table
        self._watchers = Watchers(self._table)
        self._admin = AdminServer(parts.admin_path, self.answer)
        self._began_ns = clock()
        self._busy_ns = clock()
        self._done: asyncio.Future[int] | None = None
        self._target_ended = False
        self._prove = parts.prove
        self._prove_at_ns = 0
        self._injection_said = False
        self.readiness = Readiness(clock(), origins=parts.origins, injecting=parts.injector is not None)
        self._complete_said = False
        self._heard = False  # the first half of a round is over, and links have their turn before the second
        self._tick_ns = 0  # when the round began
        self.ticks = 0
        self.longest_tick_ns = 0
        self.scan_ns = 0  # spent on the scan

    @property
    def name(self) -> str:
        """Of this node."""
        return self._parts.name

    async def run(self, started: Callable[[], None] = lambda: None) -> int:
        """Work until told to stop; ``started`` is called once all is up."""
        loop = asyncio.get_running_loop()
        self._done = loop.create_future()
        parts = self._parts
        tasks: list[asyncio.Task[Any]] = []
        watched = parts.pidfd >= 0
        try:
            await self._admin.start()
            if watched:
                loop.add_reader(parts.pidfd, self._on_target_end)
            tasks = [asyncio.create_task(self._tick_loop()), asyncio.create_task(parts.links.run())]
            if parts.activity is not None:
                tasks.append(asyncio.create_task(parts.activity.run()))
            for task in tasks:
                task.add_done_callback(self._on_task_end)
            started()
            gc.collect()
            gc.freeze()  # what is there now stays: else a full collection looks at it all, and takes ten milliseconds
            status = await self._done
            if status == TARGET_ENDED:
                await self._last_words()
            return status
        finally:
            if watched:
                loop.remove_reader(parts.pidfd)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await parts.links.close()
            if parts.injector is not None:
                parts.injector.close()
            await self._admin.close()
            if parts.keeper is not None:
                if not self._target_ended:  # else it was told at that moment
                    parts.keeper.end(ended=False, proven=self._prove is None)
                parts.keeper.close()

    def stop(self, status: int = 0) -> None:
        """End ``run``."""
        if self._done is not None and not self._done.done():
            self._done.set_result(status)

    # --- the loop ----------------------------------------------------------------------------------------------------

    async def _tick_loop(self) -> None:
        with Ticker() as ticker:
            await ticker.run(self._turn)

    def _turn(self) -> float | None:
        """One round, or one of its halves; in how many seconds the next one is due, None when there is none."""
        if self._target_ended:
            return None
        now = self._clock()
        try:
            if not self._heard:
                self._tick_ns = now
                self._heard = True
                if not self.hear(now):
                    return 0.0  # peers are told of it before anything else is done
            self._heard = False
            self.look(self._clock())
        except DpvsProbeError:
            if not self._ended():
                self._parts.links.halt()
                raise
            self._on_target_end()  # we met its end before we were told of it
            return None
        self.longest_tick_ns = max(self.longest_tick_ns, self._clock() - self._tick_ns)
        if self._parts.collector.behind:
            return 0.0
        quiet = self._tick_ns - self._busy_ns
        if quiet <= 0:
            return HURRY_S
        return BUSY_S if quiet < CALM_AFTER_NS else CALM_S if quiet < IDLE_AFTER_NS else IDLE_S

    def tick(self, now_ns: int) -> None:
        """One round: what the probes say, a slice of the scan, what that means for peers, and for our own DPVS."""
        self.hear(now_ns)
        self.look(now_ns)

    def hear(self, now_ns: int) -> bool:
        """First half of a round: what the probes say; False if links have to have their turn, to tell peers of it."""
        self.ticks += 1
        if self._parts.governed is not None:
            self._parts.governed.tick(now_ns)
        self._note(self._parts.collector.tick(now_ns), now_ns)
        return self._prove is not None or self._parts.links.poke()

    def look(self, now_ns: int) -> None:
        """Second half: a slice of the scan, and what that means for peers and for our own DPVS."""
        parts = self._parts
        self._note(parts.collector.scan(now_ns), now_ns)
        self.scan_ns += self._clock() - now_ns
        if self._table.complete and not self._complete_said:
            self._complete_said = True
            log.info("%d sessions found in DPVS", len(self._table))
        if self._prove is not None and now_ns >= self._prove_at_ns and (len(self._table) or parts.collector.copies):
            self._try_to_prove(self._prove)
        if parts.filter is not None:
            parts.filter.tick(now_ns)
        parts.links.poke()
        if not self.readiness.ready and parts.origins:
            self.readiness.expect(parts.links.peers_known)
        if not self.readiness.ready and self.readiness.look(
            now_ns,
            complete=self._table.complete,
            replicas=parts.links.replicas(),
            under_way=parts.injector.unanswered() if parts.injector is not None else 0,
            restoring=parts.keeper.why_not_ready(now_ns) if parts.keeper is not None else "",
        ):
            log.info("ready")
        if parts.injector is not None:
            parts.injector.tick(now_ns)
            if parts.injector.stopped is not None and not self._injection_said:
                self._injection_said = True
                log.error("no more sessions are put into DPVS: %s", parts.injector.stopped)
        else:
            for replica in parts.links.replicas():
                replica.pending.take(FORGOTTEN)  # nobody else does
        if parts.keeper is not None:
            parts.keeper.tick(now_ns, proven=self._prove is None)

    def _note(self, applied: Applied, now_ns: int) -> None:
        if self._watchers:
            self._watchers.note(applied, now_ns)
        if len(applied.created) or len(applied.updated) or len(applied.deleted):
            self._busy_ns = now_ns

    def _try_to_prove(self, prove: Callable[[], bool]) -> None:
        began = self._clock()
        if prove():
            self._prove = None
        ended = self._clock()
        self._prove_at_ns = ended + max(PROOF_PAUSE_NS, 20 * (ended - began))

    def _on_task_end(self, task: "asyncio.Task[Any]") -> None:
        if task.cancelled() or self._done is None or self._done.done():
            return
        error = task.exception()
        if error is not None and not self._target_ended:
            self._done.set_exception(error)

    def _over(self) -> bool:
        return self._done is None or self._done.done()

    def _ended(self) -> bool:
        if self._parts.pidfd < 0:
            return False
        poll = select.poll()
        poll.register(self._parts.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    # --- the end of the DPVS -----------------------------------------------------------------------------------------

    def _on_target_end(self) -> None:
        if self._target_ended:
            return
        self._target_ended = True
        asyncio.get_running_loop().remove_reader(self._parts.pidfd)
        now = self._clock()
        try:
            self._parts.collector.tick(now)
            self._parts.collector.scan_all(now)
        except (DpvsProbeError, OSError) as error:
            log.debug("no last look at the memory of pid %d: %s", self._parts.pid, error)
        self._table.freeze()
        self._parts.release()
        if self._parts.keeper is not None:
            self._parts.keeper.end(ended=True, proven=self._prove is None)
        log.error(
            "DPVS (pid %d) has ended; its %d sessions are kept by the peers as they were",
            self._parts.pid,
            len(self._table),
        )
        self.stop(TARGET_ENDED)

    async def _last_words(self) -> None:
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                while not self._parts.links.settled():
                    self._parts.links.poke()
                    await asyncio.sleep(0.005)
        except TimeoutError:
            log.warning("a peer did not take all of it in time")

    # --- answers -----------------------------------------------------------------------------------------------------

    async def answer(self, request: Mapping[str, Any]) -> AsyncGenerator[list[Line], None]:
        """What the admin socket asks: blocks of lines."""
        command, parts = request["command"], self._parts
        if command == "status":
            yield [self.status()]
        elif command == "peers":
            yield self._peers()
        elif command == "config":
            yield self._parts.settings()
        elif command == "sessions":
            async for block in self._sessions(query.Filter.of(request)):
                yield block
        elif command == "top":
            yield [await self._top(query.limit_of(request) or TOP_ROWS)]
        elif command == "watch":
            async with aclosing(watch(self._watchers, Filter.of(request), self._clock, self._over)) as blocks:
                async for block in blocks:
                    yield block
        elif command == "orphans":
            if parts.activity is None:
                raise NoPackets("this attach looks at no packets")
            yield list(parts.activity.orphans(query.limit_of(request) or ORPHANS))
        elif command in ("promote", "demote"):
            yield [await self._change_role(command, request.get("wait"))]
        elif command == "drill":
            yield [await self._play(request)]
        elif command == "records":
            async for block in self._records(request):
                yield block
        elif command == "snapshot":
            yield [await self._snapshot(request)]
        elif command == "detach":
            log.info("told to detach")
            yield []
            self.stop()
        else:
            raise BadRequest(f"there is no command '{command}'")

    async def _change_role(self, command: str, wait_s: Any) -> Line:
        """Promote or demote, and wait until DPVS was asked about all sessions; for a promotion, also until it takes
        those that it refuses for now, up to ``wait_s``.
        """
        injector = self._parts.injector
        if injector is None:
            raise NotInjecting("peers' sessions are not put into this DPVS")
        wait_s = _wait_s(wait_s)
        began = self._clock()
        if command == "promote":
            injector.promote(began)
        else:
            injector.demote()
        log.info("told to %s", command)
        while True:
            progress = injector.progress()
            took = self._clock() - began
            late = took > wait_s * 1e9
            over = progress["waiting"] == 0 and (command == "demote" or progress["retrying"] == 0 or late)
            if over or injector.stopped is not None or took > LONGEST_PROMOTION_S * 1e9 or self._target_ended:
                break
            await asyncio.sleep(PROGRESS_S)
        log.info("%s: %d sessions of peers are in DPVS after %.0f ms", command, progress["installed"], took / 1e6)
        return {**progress, "took_ms": round(took / 1e6, 1)}

    async def _play(self, request: Mapping[str, Any]) -> Line:
        """A step of a drill."""
        parts, step, count = self._parts, request.get("step"), request.get("sessions")
        if parts.injector is None:
            raise NotInjecting("sessions are not put into this DPVS")
        drill = Drill(
            self._table, parts.links.replicas, parts.injector, lambda: told_by_dpvs(parts.pid), parts.links.settled
        )
        if step == "begin":
            if isinstance(count, bool) or not isinstance(count, int):
                raise BadRequest(f"{count!r} is not a number of sessions")
            return await drill.begin(count)
        steps = {"count": drill.count, "take": drill.take, "end": drill.end}
        if step not in steps:
            raise BadRequest(f"a drill has no step {step!r}")
        return await steps[step]()

    def _records(self, request: Mapping[str, Any]) -> AsyncIterator[list[Line]]:
        """All of one table, to be compared with another node's."""
        origin, whole = request.get("origin"), request.get("whole") is True
        if origin == query.OWN:
            table = self._table
            age_ms = (self._clock() - table.born_ns) // 1_000_000
            return export(table.records, table.shared, age_ms, self._parts.name, whole=whole)
        for replica in self._parts.links.replicas():
            if replica.node == origin:
                return export(replica.records, replica.present, None, replica.node, whole=whole)
        raise BadRequest(f"there are no sessions of a node '{origin}'")

    async def _snapshot(self, request: Mapping[str, Any]) -> Line:
        """Save our sessions to a file, or bring back those of one."""
        keeper, what, file, node = (
            self._parts.keeper, request.get("what"), request.get("file"), request.get("node")
        )  # fmt: skip
        if keeper is None or what not in ("save", "restore") or not isinstance(file, str):
            raise BadRequest("a snapshot is to be saved to a file or restored from one")
        if node is not None and not isinstance(node, str):
            raise BadRequest(f"node {node!r} is not a name")
        if what == "save":
            if self._prove is not None:
                raise NotProven("the struct layout of this DPVS is not proven yet")
            return await keeper.save(file)
        wait_s = _wait_s(request.get("wait"))
        return await keeper.restore(file, wait_s, partly=request.get("partly") is True, node=node)

    async def _top(self, rows: int) -> Line:
        """Sessions counted, beside what ``status`` and ``peers`` say; ``rows`` of services and real servers."""
        table = self._table
        return {
            "at_ns": self._clock(),
            "totals": {"created": table.created, "updated": table.updated, "ended": table.deleted},
            **(await summarize(table)).result(rows),
            "peers": self._peers(),
            "status": self.status(),
        }

    def _peers(self) -> list[Line]:
        injector = self._parts.injector
        rows = self._parts.links.peers(self._clock(), injecting=injector is not None)
        if injector is not None and not injector.promotion.puts_in:
            for row in rows:
                if row["direction"] == "from":
                    row["note"] = row["note"] or injector.promotion.role
        return rows

    def status(self) -> Line:
        """How we are, as one object."""
        parts, counters = self._parts, self._parts.collector.counters
        events = {name.removeprefix("events_"): n for name, n in counters.items() if name.startswith("events_")}
        return {
            "node": parts.name,
            "pid": parts.pid,
            "state": "target ended" if self._target_ended else "attached",
            "ready": self.readiness.ready and not self._target_ended,
            "waiting_for": self.readiness.why,
            "for_s": round((self._clock() - self._began_ns) / 1e9, 1),
            **parts.about,
            "probe_pid": os.getpid(),
            "sessions": {
                "own": len(self._table),
                "copies": parts.collector.copies,
                "of_peers": {replica.node: replica.count for replica in parts.links.replicas()},
            },
            "complete": self._table.complete,
            "events": {"total": counters.get("events", 0), **events},
            "scans": counters.get("scan_passes", 0),
            "collector": {n: v for n, v in counters.items() if not n.startswith("events") and n != "scan_passes"},
            **parts.more(),
            "packets": parts.activity.report() if parts.activity is not None else "off",
            "injection": parts.injector.counters() if parts.injector is not None else "off",
            "store": parts.keeper.report() if parts.keeper is not None else {"state": "off"},
            "held_back_by_filter": dict(parts.filter.held_back) if parts.filter is not None else "off",
            "loop": {
                "ticks": self.ticks,
                "longest_tick_ms": round(self.longest_tick_ns / 1e6, 2),
                "scan_s": round(self.scan_ns / 1e9, 3),
            },
            "watchers": len(self._watchers),
            "injections_waiting": sum(replica.pending.pending for replica in parts.links.replicas()),
        }

    def links_now(self) -> list[Line]:
        """As ``peers`` says it, without what takes time."""
        return self._parts.links.peers(self._clock(), injecting=self._parts.injector is not None, count=False)

    def latencies(self) -> dict[str, Histogram]:
        """Of each peer that we send to: from a change to its acknowledgement."""
        return self._parts.links.latencies()

    def tables(self) -> list[tuple[str, Records, Bools]]:
        """Each origin of sessions: its name, the rows of its slots, and which of them hold one. Views."""
        of_peers = [(replica.node, replica.records, replica.present) for replica in self._parts.links.replicas()]
        return [(query.OWN, self._table.records, self._table.present), *of_peers]

    async def _sessions(self, wanted: query.Filter) -> AsyncGenerator[list[Line], None]:
        room = wanted.limit or -1
        sources = [(query.OWN, self._table.records, self._table.present)] if wanted.wants(query.OWN) else []
        for replica in self._parts.links.replicas():
            if wanted.wants(replica.node):
                sources.append((replica.node, replica.records, replica.present))
        for origin, records, present in sources:
            for start in range(0, len(records), ADMIN_BLOCK):
                part = slice(start, start + ADMIN_BLOCK)
                found: Records = records[part][present[part]]
                found = found[wanted.matches(found)]
                if room >= 0:
                    found = found[:room]
                    room -= len(found)
                for first in range(0, len(found), ADMIN_LINES):
                    block = found[first : first + ADMIN_LINES]
                    lines = list(query.describe(block, origin))
                    if origin == query.OWN and self._parts.activity is not None:
                        self._parts.activity.describe(lines, block)
                    yield lines
                if room == 0:
                    return
                await asyncio.sleep(0)


def _wait_s(given: Any) -> float:
    if given is None:
        return 0.0
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= LONGEST_PROMOTION_S:
        raise BadRequest(f"wait {given!r} is not a number of seconds")
    return float(given)
