# SPDX-License-Identifier: GPL-2.0-or-later
"""The links of one node: a sender for each peer that we dial, a receiver for each peer that dials us.

Rules: what to say is the engines' business (``link.py``), how bytes travel the transport's; here the two are put
together. A link that ends is dialled again, soon at first and every two seconds at most, for ever. A state is said
once, not at each attempt. An engine is fed only as fast as its connection takes what it gives.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from probes.errors import DpvsProbeError
from replicator.admin import Line
from replicator.codec import FlowKeys
from replicator.discovery.discovery import Discovery
from replicator.histogram import Histogram
from replicator.link import Down, Event, Receiver, Sender, Synced, Syncing, Up
from replicator.membership import GIVEN
from replicator.replica import Replica, Replicas
from replicator.sharing import Sharing
from replicator.transport.interface import (
    Backoff,
    Connection,
    Dialer,
    Direct,
    LinkLost,
    Listener,
    Loss,
    PeerUnreachable,
)
from replicator.wire import Reason, SyncReason

Clock = Callable[[], int]
WHY = {
    SyncReason.FIRST: "it never had any",
    SyncReason.PEER_RESTARTED: "it is another run of it",
    SyncReason.NOT_HELD: "it has let go of some that it held",
    SyncReason.GAP: "it missed something",
    SyncReason.REQUESTED: "it was asked for",
    SyncReason.SHARED_ANEW: "the peers share them in another way now",
}
MAX_INBOUND = 128
MAX_NODES = 256  # whose counters are kept apart
MAX_SAID = 1000
AGE_S = 1.0
LONGEST_WAIT_S = 1.0
PARTING_S = 0.1
LOOK_NS = 5_000_000  # a tenth of what compression is judged by

log = logging.getLogger(__name__)


class _Driver:
    """Moves bytes between one engine and one connection until either ends."""

    def __init__(
        self,
        engine: Sender | Receiver,
        on_event: Callable[[Event], None],
        clock: Clock,
        hears: Callable[[], None] | None = None,
    ) -> None:
        """``hears``: called before the engine is told what came."""
        self._engine, self._on_event, self._clock = engine, on_event, clock
        self._hears = hears
        self._wake = asyncio.Event()
        self._halted = False
        self._lost: LinkLost | None = None  # how the connection ended, where it was not in order
        self._direct: Direct | None = None  # the connection, where it can be served without a task's turn
        self._waits = False  # the task has said all, and waits for more
        self._alarm: asyncio.TimerHandle | None = None  # it looks again by itself then
        self._alarm_ns = 0
        self._fault: Exception | None = None  # of ours, in what came

    def halt(self) -> None:
        """Say nothing any more, whatever the engine would."""
        self._halted = True
        self._wake.set()

    def wake(self) -> bool:
        """There may be something to say. It is said before this returns, where the connection can do that; else False,
        and the task will do it in its turn.
        """
        direct = self._direct
        if direct is None or not self._waits or self._wake.is_set() or not direct.roomy:
            self._wake.set()
            return False
        now = self._clock()
        frames = self._engine.outgoing(now)
        try:
            if frames:
                direct.send_now(frames)
        except LinkLost as error:
            self._lost = error
        if self._lost is not None or self._engine.closed:
            self._wake.set()
        elif (due := self._engine.next_deadline(now)) is not None and due < self._alarm_ns:
            self._look_again(now, due)
        self._tell()
        return True

    def _hear(self, data: bytes) -> None:
        """What came, from a connection that calls; and at once what there is to say to it."""
        try:
            if self._hears is not None:
                self._hears()
            self._engine.receive(data, self._clock())
            if self._engine.wants_turn:
                self.wake()
        except Exception as error:  # as in ``_read``: the link ends, the node goes on
            self._fault = error
            self._wake.set()

    async def drive(self, connection: Connection) -> None:
        """Returns when the link is over; the connection is closed then. Raises nothing of the transport's."""
        engine = self._engine
        self._lost = self._fault = None
        reading = asyncio.create_task(self._read(connection))
        if isinstance(connection, Direct):
            self._direct = connection
            connection.deliver(self._hear)
        try:
            while not self._halted and self._fault is None:
                self._wake.clear()
                if self._direct is not None and self._lost is not None and not reading.done():
                    raise self._lost
                frames = engine.outgoing(self._clock())
                over = engine.closed  # these frames are its last: it may close at any moment after this
                self._tell()
                if frames:
                    await connection.send(frames)
                if over:
                    break
                if not frames:
                    if reading.done():
                        break
                    await self._wait()
        except LinkLost as error:
            self._lost = error
            await asyncio.wait({reading}, timeout=PARTING_S)  # why it refused us may lie in the socket
        except asyncio.CancelledError:
            self._on_event = _ignore  # it is we who end it: nothing to say
            raise
        finally:
            if self._direct is not None:
                self._direct.deliver(None)
                self._direct = None
            reading.cancel()
            (found,) = await asyncio.gather(reading, return_exceptions=True)
            found = self._fault or found
            if isinstance(found, Exception):  # a fault of ours: the link ends, the node goes on
                log.error("reading from %s failed", connection.remote, exc_info=found)
            if self._lost is None:
                engine.disconnected(self._clock())
            else:
                engine.disconnected(self._clock(), self._lost.why, self._lost.loss)
            self._tell()
            await connection.close()

    async def _read(self, connection: Connection) -> None:
        try:
            while data := await connection.receive():
                if self._hears is not None:
                    self._hears()
                self._engine.receive(data, self._clock())
                self._wake.set()
                await asyncio.sleep(0)  # a peer that always has more to say does not get the loop for itself
        except LinkLost as error:
            self._lost = error
        finally:
            self._wake.set()

    async def _wait(self) -> None:
        now = self._clock()
        self._look_again(now, self._engine.next_deadline(now))
        self._waits = True
        try:
            await self._wake.wait()
        finally:
            self._waits = False
            if self._alarm is not None:
                self._alarm.cancel()

    def _look_again(self, now_ns: int, due_ns: int | None) -> None:
        """Wake the task at that time; ``call_later`` is a third of the cost of a timeout."""
        if self._alarm is not None:
            self._alarm.cancel()
        seconds = LONGEST_WAIT_S if due_ns is None else min(max(due_ns - now_ns, 0) / 1e9, LONGEST_WAIT_S)
        self._alarm_ns = now_ns + int(seconds * 1e9)
        self._alarm = asyncio.get_running_loop().call_later(seconds, self._wake.set)

    def _tell(self) -> None:
        while (event := self._engine.next_event()) is not None:
            self._on_event(event)


def _ignore(_: Event) -> None:
    pass


class _Ends(Counter[str]):
    """How connections ended."""

    def __init__(self) -> None:
        super().__init__()
        self.update(lost=0, refused=0, refused_by_peer=0)
        self.update({f"lost_{loss}": 0 for loss in Loss})

    def note(self, event: Down) -> None:
        """Count one end: ``lost``, or ``refused`` by whom, and why."""
        if event.refused is None:
            self["lost"] += 1
            self[f"lost_{event.loss}"] += 1
            return
        who = "refused_by_peer" if event.by_peer else "refused"
        self[who] += 1
        why = Reason(event.refused).name.lower() if event.refused in set(Reason) else str(event.refused)
        self[f"{who}_{why}"] += 1


class Outbound:
    """One peer that we send our sessions to."""

    def __init__(self, dialer: Dialer, sender: Sender, clock: Clock, backoff: Backoff | None = None) -> None:
        self.sender = sender
        self._dialer, self._clock = dialer, clock
        self._backoff = backoff or Backoff()
        self._driver = _Driver(sender, self._on_event, clock, self._look_at_the_way)
        self._said = ""
        self._bytes_before = 0
        self._connection: Connection | None = None
        self._look_ns = 0  # when to look at the way, where nothing is held back
        self.note = ""
        self.node: str | None = None
        self.since_ns = clock()
        self.counters = _Ends()
        self.counters.update(dials=0, dials_failed=0)

    async def run(self) -> None:
        """Dial, talk, dial again; for ever."""
        while True:
            self.counters["dials"] += 1
            try:
                connection = await self._dialer.dial()
            except PeerUnreachable as error:
                self.counters["dials_failed"] += 1
                self._trouble(str(error))
            else:
                self._connection = connection
                self.sender.proven_node = connection.node
                self.sender.connected(self._clock())
                await self._driver.drive(connection)
                self._bytes_before += connection.bytes_sent
                self._connection = None
            await asyncio.sleep(self._backoff.wait_s())

    @property
    def address(self) -> str:
        """Of the peer, as it was given."""
        return self._dialer.address

    def down_ns(self, now_ns: int) -> int | None:
        """For how long the peer has not been there; None if it is."""
        return now_ns - self.since_ns if self._connection is None or self.sender.peer is None else None

    def poke(self) -> bool:
        """The table may have changed; False if the peer is only told of it when the link's task has its turn."""
        return self._connection is None or not self.sender.pending or self._driver.wake()

    def halt(self) -> None:
        """What the table says is not to be trusted: tell nobody."""
        self._driver.halt()

    @property
    def settled(self) -> bool:
        """All that this peer can be told, it has acknowledged; a peer that is not there can be told nothing."""
        return self._connection is None or self.sender.settled

    def row(self, now_ns: int, *, count: bool = True) -> Line:
        """For the command ``peers``. Without ``count``, sessions are not counted, which takes time for many."""
        counters, latency = self.sender.counters, self.sender.latency
        connection = self._connection
        return {
            "direction": "to",
            "node": self.node,
            "address": self._dialer.address,
            "state": self.sender.state.value if connection else "down",
            "for_s": round((now_ns - self.since_ns) / 1e9, 1),
            "sessions": self.sender.share_count if count else None,
            "waiting": self.sender.pending,
            "records": counters["created"] + counters["updated"] + counters["deleted"],
            "bytes": self._bytes_before + (connection.bytes_sent if connection else 0),
            "delay_ns": self.sender.delay_ns(now_ns),
            "note": self.note,
            "event_to_peer_p50_ms": round(latency.percentile_ns(50) / 1e6, 3) if latency.count else None,
            "event_to_peer_p99_ms": round(latency.percentile_ns(99) / 1e6, 3) if latency.count else None,
            "link": {**self.sender.report(), **self.counters},
        }

    def _look_at_the_way(self) -> None:
        now = self._clock()
        if not self.sender.held_back and now < self._look_ns:
            return  # asking takes longer than hearing an acknowledgement
        self._look_ns = now + LOOK_NS
        if self._connection is not None and (way := self._connection.on_the_way()) is not None:
            self.sender.on_the_way(way.size, way.open_ns)

    def _on_event(self, event: Event) -> None:
        now = self._clock()
        if isinstance(event, Up):
            self.node, self.since_ns, self.note, self._said = event.peer.node, now, "", ""
            self._backoff.reset()
            what = "going on where it was" if event.full_sync is None else "it needs all sessions"
            log.info("peer %s (%s) is up, %s", self.node, self._dialer.address, what, extra=self._fields)
        elif isinstance(event, Syncing):
            log.info("sending all sessions to peer %s: %s", self.node, WHY[event.reason], extra=self._fields)
        elif isinstance(event, Synced):
            took_ms = event.took_ns / 1e6
            log.info(
                "peer %s has all %d sessions, after %.0f ms", self.node, event.sessions, took_ms, extra=self._fields
            )
        elif isinstance(event, Down):
            self.counters.note(event)
            who = f"peer {self.node} ({self._dialer.address})" if self.node else f"peer {self._dialer.address}"
            if event.refused is not None:
                self._trouble(f"{who} {'refuses us' if event.by_peer else 'is refused'}: {event.why}")
            else:
                self._trouble(f"{who} is down: {event.why}")

    @property
    def _fields(self) -> dict[str, dict[str, str | None]]:
        return journal_fields(self.node, self._dialer.address)

    def _trouble(self, what: str) -> None:
        if not self.note:
            self.since_ns = self._clock()
        self.note = what
        if what != self._said:
            self._said = what
            log.warning("%s; trying again until it works", what, extra=self._fields)


def journal_fields(node: str | None, address: str) -> dict[str, dict[str, str | None]]:
    """For ``extra`` of a log entry: whose link it is about, for the journal."""
    return {"fields": {"PEER": node, "PEER_ADDRESS": address}}


class _Inbound:
    """One peer that has dialled us."""

    def __init__(
        self,
        receiver: Receiver,
        connection: Connection,
        clock: Clock,
        said: set[str],
        counters: Callable[[str | None], "_Ends"],
    ) -> None:
        """``said``: complaints that were made already, shared by all links; ``counters``: those of a node, or of all
        who never said who they are.
        """
        self.receiver, self.connection, self._clock, self._said = receiver, connection, clock, said
        self._counters = counters
        receiver.proven_node = connection.node
        self.node: str | None = None
        self.since_ns = clock()
        self.driver = _Driver(receiver, self._on_event, clock)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Up):
            self.node, self.since_ns = event.peer.node, self._clock()
            self._counters(self.node)["connections"] += 1
            self._said.clear()
            fields, remote = self._fields, self.connection.remote
            log.info("peer %s (%s) is up, it sends us its sessions", self.node, remote, extra=fields)
        elif isinstance(event, Synced):
            fields, took_ms = self._fields, event.took_ns / 1e6
            log.info("%d sessions of peer %s are here, after %.0f ms", event.sessions, self.node, took_ms, extra=fields)
        elif isinstance(event, Down):
            self._counters(self.node).note(event)
            if event.refused is not None:
                side = "ended the link" if event.by_peer else "is refused"
                self._complain(f"peer {self.node or self.connection.remote.rpartition(':')[0]} {side}: {event.why}")
            elif self.node is not None:
                log.warning("peer %s is gone (%s); its sessions are kept", self.node, event.why, extra=self._fields)
            else:
                log.debug("connection from %s came to nothing: %s", self.connection.remote, event.why)

    @property
    def _fields(self) -> dict[str, dict[str, str | None]]:
        return journal_fields(self.node, self.connection.remote)

    def _complain(self, what: str) -> None:
        """Once, as a refused peer comes again every two seconds."""
        if what not in self._said:
            if len(self._said) >= MAX_SAID:
                self._said.clear()
            self._said.add(what)
            log.warning("%s", what, extra=self._fields)


class Links:
    """All links of a node. ``run`` serves them until cancelled."""

    def __init__(
        self,
        outbound: Iterable[Outbound],
        replicas: Replicas,
        *,
        listener: Listener | None = None,
        make_receiver: Callable[[], Receiver] | None = None,
        sharing: Sharing | None = None,
        discovery: Discovery | None = None,
        make_outbound: Callable[[str], Outbound] | None = None,
        forget: Callable[[str], None] = lambda address: None,
        clock: Clock = time.monotonic_ns,
    ) -> None:
        """``listener``: started already; ``make_receiver``: an engine for a new connection; ``sharing``: where not all
        peers hold all sessions; ``discovery``: where peers come and go, with ``make_outbound`` for one that comes and
        ``forget`` for one that went.
        """
        self._outbound = list(outbound)
        self._discovery, self._make_outbound, self._forget = discovery, make_outbound, forget
        self._tasks: asyncio.TaskGroup | None = None
        self._running: dict[str, asyncio.Task[None]] = {}
        self._replicas = replicas
        self._listener, self._make_receiver = listener, make_receiver
        self._sharing, self._clock = sharing, clock
        self._inbound: dict[asyncio.Task[None], _Inbound] = {}
        self._ended: dict[str | None, _Ends] = {}  # by node; None: who never said a name
        self._crowded = 0
        self._said: set[str] = set()

    def replicas(self) -> Iterable[Replica]:
        """The sessions of all peers that sent us any."""
        return self._replicas

    async def run(self) -> None:
        """Serve all links; returns only by being cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for link in self._outbound:
                self._running[link.address] = tasks.create_task(link.run())
            if self._discovery is not None:
                tasks.create_task(self._discovery.run(self))
            if self._listener is not None and self._make_receiver is not None:
                tasks.create_task(self._accept(self._listener, self._make_receiver))
            tasks.create_task(self._age())

    async def close(self) -> None:
        """End what ``run`` did not: the listener, and the links that peers opened."""
        if self._listener is not None:
            await self._listener.close()
        tasks = list(self._inbound)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def peers_known(self) -> int:
        """To how many peers we send, or try to."""
        return len(self._outbound)

    def join(self, address: str) -> None:
        """One more peer, from now on; ``run`` is running."""
        if self._make_outbound is None or self._tasks is None:
            raise ValueError("no peers can join here")
        link = self._make_outbound(address)
        self._outbound.append(link)
        if self._sharing is not None:
            self._sharing.add(link)
        self._running[address] = self._tasks.create_task(link.run())

    async def leave(self, address: str) -> None:
        """That peer is none any more: its link ends, and what it was told is forgotten."""
        self._outbound = [link for link in self._outbound if link.address != address]
        if self._sharing is not None:
            self._sharing.remove(address)
        task = self._running.pop(address)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._forget(address)

    def give(self, addresses: Iterable[str]) -> None:
        """These are the peers that are given by hand, from now on; ``run`` makes and ends links."""
        if self._discovery is None:
            raise ValueError("no peers can join here")
        self._discovery.membership.give(addresses)

    def is_up(self, address: str) -> bool:
        """Whether the peer at this address is there."""
        now = self._clock()
        return any(link.address == address and link.down_ns(now) is None for link in self._outbound)

    def senders(self) -> Iterator[Sender]:
        """To all peers that we dial."""
        return (link.sender for link in self._outbound)

    def poke(self) -> bool:
        """Our table may have changed; False if some peer is only told of it when its link's task has its turn."""
        said = True
        for link in self._outbound:
            said &= link.poke()
        return said

    def want(self, keys: FlowKeys) -> int:
        """Ask all peers that send us their sessions for those of n flows; how many were asked."""
        asked = 0
        for link in self._inbound.values():
            if link.receiver.want(keys):
                link.driver.wake()
                asked += 1
        return asked

    def halt(self) -> None:
        """Our table is not to be trusted: no peer hears another word of it."""
        for link in self._outbound:
            link.halt()

    def settled(self) -> bool:
        """All peers that are there have acknowledged all there is."""
        return all(link.settled for link in self._outbound)

    def latencies(self) -> dict[str, Histogram]:
        """Of each peer that we dial: from a change to its acknowledgement."""
        return {link.address: link.sender.latency for link in self._outbound}

    def peers(self, now_ns: int, *, injecting: bool, count: bool = True) -> list[Line]:
        """One line a link, and one for each replica whose link is gone. ``injecting``: what waits in a replica is taken
        from there. ``count``: see ``Outbound.row``.
        """
        rows = [link.row(now_ns, count=count) for link in self._outbound]
        for row, link in zip(rows, self._outbound, strict=True):
            row["source"] = self._discovery.membership.source_of(link.address) if self._discovery else GIVEN
        if self._sharing is not None:
            for row, link in zip(rows, self._outbound, strict=True):
                row["share"] = round(self._sharing.part(link.address), 4)
        live = {id(link.receiver): link for link in self._inbound.values()}
        for replica in self._replicas:
            arrived = live.get(id(replica.owner))
            counters = Counter(self._of(replica.node))
            counters.update(arrived.receiver.counters if arrived else {})
            row = {
                "direction": "from",
                "node": replica.node,
                "address": arrived.connection.remote if arrived else None,
                "state": arrived.receiver.state.value if arrived else "gone",
                "for_s": round((now_ns - replica.since_ns) / 1e9, 1),
                "sessions": replica.count,
                "waiting": replica.pending.pending if injecting else None,
                "records": sum(replica.counters[name] for name in ("created", "updated", "deleted")),
                "bytes": arrived.connection.bytes_received if arrived else None,
                "incomplete": not replica.synced,
                "note": "" if replica.synced else "not complete",
                "link": {**replica.counters, **counters},
            }
            rows.append(row)
        if self._listener is not None:
            rows.append(self._door(self._listener))
        return rows

    def _door(self, listener: Listener) -> Line:
        """What came to nothing before it was a peer."""
        strangers = self._of(None)
        refused = sum(listener.refused.values()) + strangers["refused"] + strangers["refused_by_peer"] + self._crowded
        return {
            "direction": "listen",
            "address": listener.address,
            "state": "listening",
            "note": f"{refused} refused" if refused else "",
            "link": {**strangers, "crowded": self._crowded, "refused_at_the_door": dict(listener.refused)},
        }

    def _of(self, node: str | None) -> _Ends:
        if node not in self._ended and len(self._ended) > MAX_NODES:
            node = None
        return self._ended.setdefault(node, _Ends())

    async def _accept(self, listener: Listener, make_receiver: Callable[[], Receiver]) -> None:
        while True:
            connection = await listener.accept()
            if len(self._inbound) >= MAX_INBOUND:
                self._crowded += 1
                log.warning("connection from %s refused: %d are open", connection.remote, len(self._inbound))
                await connection.close()
                continue
            link = _Inbound(make_receiver(), connection, self._clock, self._said, self._of)
            task = asyncio.create_task(link.driver.drive(connection))
            self._inbound[task] = link
            task.add_done_callback(self._on_inbound_end)

    def _on_inbound_end(self, task: asyncio.Task[None]) -> None:
        link = self._inbound.pop(task)
        self._of(link.node).update(link.receiver.counters)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("link from %s failed", link.connection.remote, exc_info=error)

    async def _age(self) -> None:
        while True:
            await asyncio.sleep(AGE_S)
            now = self._clock()
            self._replicas.age(now)
            if self._sharing is not None:
                self._sharing.tick(now)
                self.poke()


async def reach_any(dialers: Iterable[Dialer], within_s: float) -> None:
    """Wait until one of the peers takes a connection; raises the last PeerUnreachable when none does in time."""
    waiting = {asyncio.create_task(_reach(dialer, within_s)): dialer for dialer in dialers}
    errors: list[DpvsProbeError] = []
    try:
        for next_done in asyncio.as_completed(waiting):
            try:
                await next_done
                return
            except PeerUnreachable as error:
                errors.append(error)
        raise errors[-1]
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _reach(dialer: Dialer, within_s: float) -> None:
    backoff = Backoff()
    last = PeerUnreachable(f"cannot reach peer {dialer.address}: no answer within {within_s:g} s")
    try:
        async with asyncio.timeout(within_s):
            while True:
                try:
                    connection = await dialer.dial()
                except PeerUnreachable as error:
                    last = error
                    await asyncio.sleep(backoff.wait_s())
                else:
                    await connection.close()
                    return
    except TimeoutError:
        raise last from None
