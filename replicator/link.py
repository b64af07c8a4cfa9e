# SPDX-License-Identifier: GPL-2.0-or-later
"""Both ends of a replication link, without I/O: bytes go in and come out, time is an argument.

Rules:
- Who dialled sends sessions, who listens receives them. Both introduce themselves with HELLO; what does not fit is
  refused with a reason.
- ``Sender`` lives as long as its peer is configured, over many connections; ``Receiver`` is one connection.
- What is sent is the table's state when its turn comes. A frame in flight remembers which slots it told of; when the
  connection ends before its acknowledgement they are marked again. What is in flight is bounded in bytes and frames;
  beyond that marks stay marks, so a slow peer costs no memory.
- A link that has nothing in flight sends a single change at once. Else changes wait for the next acknowledgement, for
  32 of them or for 100 ms, whichever is first; under load they gather to large frames by themselves.
- A full sync is: BEGIN, every session once, beside live changes, END; then the receiver drops what was not named. It
  is made when the receiver cannot be known to hold all that it acknowledged; else a reconnect goes on where it was.
- An engine never raises for what its peer does: it says why in a REFUSE frame and in a ``Down`` event, and is
  ``closed``.

    what happens                            what to call
    a connection is there                   Sender.connected(now) / Receiver(...)
    bytes came                              receive(data, now)
    a mark was set, or a deadline passed    outgoing(now), and write it; next_event() until None
    ``closed`` and all written, or EOF      disconnected(now), and close the connection
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from collector.record import Bools, Slots, words
from collector.table import Dirty, SessionTable, Taken

from . import blocks, codec, packing, wire
from .codec import ENDED, IPV4, IPV6, SIZES, Buffer
from .compression import Pays
from .engine import SECOND, Down, Engine, Event, LinkSettings, State, Synced, Syncing, Up
from .filters import Rate, SessionFilter
from .histogram import Histogram
from .packing import Telling
from .replica import Generations, LinkRefused, Replica, Replicas
from .transport.interface import Loss
from .wanting import Wanted
from .wire import SEQUENCED, Fault, Frame, Hello, Opcode, ProtocolError, Reason, Role, SyncReason

__all__ = ["Down", "Event", "LinkSettings", "Receiver", "Sender", "State", "Synced", "Syncing", "Up"]


@dataclass(slots=True)
class _InFlight:
    """A frame that is not acknowledged."""

    sequence: int
    size: int
    plain: int  # its size before compression
    told: Taken


_SORTS = (
    (packing.CREATE4, IPV4, Opcode.CREATE, "created"),
    (packing.UPDATE4, IPV4, Opcode.UPDATE, "updated"),
    (packing.CREATE6, IPV6, Opcode.CREATE, "created"),
    (packing.UPDATE6, IPV6, Opcode.UPDATE, "updated"),
)
_TOLD_NOTHING = Dirty(0).claim(0)
ENDED_SO = "the connection ended"
CLAIM = 4096  # slots taken from the marks at once
FULL_SYNCS_A_SECOND = 100  # that a receiver takes: each costs it a look at all slots of the origin
Picks = Callable[[Slots], Bools]  # for the slots of n sessions: which of them a peer is to hold


def _chosen(taken: Taken, which: Bools | Slots | slice) -> Taken:
    return Taken(taken.slots[which], taken.since_ns[which], taken.fresh[which])


class Sender(Engine):
    """The dialling side: tells one peer of the sessions in ``table`` that are marked in ``dirty``."""

    _COUNTERS = (
        "connections", "frames_received", "frames_sent", "bytes_sent", "bytes_plain", "frames_compressed", "created",
        "updated", "deleted", "acknowledged", "full_syncs", "partial_syncs", "resyncs_requested", "given_back",
        "wanted", "wanted_found", "wanted_unanswered", "protocol_errors",
    )  # fmt: skip

    def __init__(self, table: SessionTable, dirty: Dirty, me: Hello, settings: LinkSettings | None = None) -> None:
        """``me``: role sender, with the table's slots."""
        super().__init__(me, settings or LinkSettings())
        if me.role is not Role.SENDER or me.slots != table.slots:
            raise ValueError("a sender introduces itself as one, with the slots of its table")
        self._table, self._dirty = table, dirty
        self._told = np.zeros(table.slots, np.bool_)  # slots in which the peer may believe a session to be
        self._telling = Telling(words(table.records), table.shared.view(np.uint8), self._told.view(np.uint8))
        self._picks: Picks | None = None  # what placement and filter say together
        self._placed: Picks | None = None
        self._filter: SessionFilter | None = None
        self._rate = Rate()
        self._wanted = Wanted(table)
        self._asked: Generations | None = None  # the sessions that are the peer's although ``picks`` does not say so
        self._acknowledged = 0
        self._flight: deque[_InFlight] = deque()
        self._flight_bytes = 0
        self._held: tuple[int, int, int] | None = None  # node, run and replica that our marks are about
        self._due: SyncReason | None = SyncReason.FIRST  # a full sync that waits to begin
        self._snapshot: int | None = None  # number of the one that is under way
        self._snapshots = 0
        self._begin_sequence = 0  # SNAPSHOT_BEGIN, while it is not acknowledged
        self._snapshot_ns = 0
        self._snapshot_sessions = 0
        self._end_sequence: int | None = None  # SNAPSHOT_END, while it is not acknowledged
        self._compress = Pays(self.settings.compress)
        self.full_sync_reason: SyncReason | None = None  # of the last one
        self.full_syncs: Counter[str] = Counter()  # by reason
        self.last_sync_ns = 0  # how long it took
        self.latency = Histogram()  # change seen in DPVS -> acknowledged by the peer

    # --- the connection ----------------------------------------------------------------------------------------------

    def connected(self, now_ns: int) -> None:
        """A new connection to the peer; the one before, if any, has ended."""
        self.disconnected(now_ns)
        self._start(now_ns)
        self.counters["connections"] += 1
        self._sequence = self._acknowledged = 0
        self._ready.append(wire.pack_hello(self.me))

    def disconnected(self, now_ns: int, why: str = ENDED_SO, loss: Loss = Loss.ENDED) -> None:
        """The connection is gone."""
        if not self.closed:
            self._end(Down(why, loss=loss), now_ns)
        self._let_go(now_ns)
        self._ready.clear()
        self.state = State.IDLE

    def resync(self, reason: SyncReason = SyncReason.REQUESTED) -> None:
        """Make a full sync as soon as possible."""
        self._due = reason

    def share(self, picks: Picks | None) -> None:
        """From now on tell the peer only of those sessions that ``picks`` says (None: of all), and have it drop what it
        holds of others. What is said of a session must not change as long as the session and ``picks`` are the same.
        """
        self._placed = self._with_asked(picks) if picks is not None else None
        self._choose_anew()

    def use_filter(self, chosen: SessionFilter | None, rate: float = 0.0) -> None:
        """From now on tell the peer only of what passes, and of no more than ``rate`` sessions a second (0: any)."""
        if rate != self._rate.per_s:
            self._rate = Rate(rate)
        if chosen is not self._filter:
            self._filter = chosen
            self._choose_anew()

    def use(self, settings: LinkSettings) -> None:
        """Other settings, in the middle of it all."""
        if settings.compress != self.settings.compress:
            self._compress = Pays(settings.compress)
        self.settings = settings

    def _choose_anew(self) -> None:
        placed, chosen = self._placed, self._filter
        if placed is not None and chosen is not None:
            self._picks = lambda slots: placed(slots) & chosen(slots)
        else:
            self._picks = placed or chosen
        self._due = self._due or SyncReason.SHARED_ANEW

    def _with_asked(self, picks: Picks) -> Picks:
        def wider(slots: Slots) -> Bools:
            chosen = picks(slots)
            return chosen if self._asked is None else chosen | (self._asked[slots] == self._table.generation[slots])

        return wider

    @property
    def share_count(self) -> int:
        """How many of our sessions the peer is to hold."""
        return int(np.count_nonzero(self._share()))

    @property
    def pending(self) -> int:
        """Slots that the peer has to be told of."""
        return self._dirty.pending

    @property
    def held_back(self) -> bool:
        """The way takes less than there is to say: where that is, decides about compression."""
        return self._compress.held_back

    def on_the_way(self, size: int, open_ns: int) -> None:
        """What the transport says of it, before acknowledgements are heard; see ``compression``."""
        self._compress.on_the_way(size, open_ns, self._flight_bytes)

    def delay_ns(self, now_ns: int) -> int:
        """Age of the oldest change, or full sync, that the peer has not acknowledged; 0 if it has everything."""
        oldest = [self._dirty.oldest_ns] if self._dirty.oldest_ns else []
        if self._flight:
            since = self._flight[0].told.since_ns
            oldest += since[since > 0].tolist()
        if self._snapshot is not None:
            oldest.append(self._snapshot_ns)
        return max(0, now_ns - min(oldest)) if oldest else 0

    @property
    def in_flight(self) -> int:
        """Frames that are not acknowledged."""
        return len(self._flight)

    @property
    def settled(self) -> bool:
        """The peer has acknowledged all there is to tell."""
        return self.state is State.LIVE and not self._flight and not self._dirty.pending

    def report(self) -> Mapping[str, object]:
        """For status and metrics."""
        return {
            "state": self.state.value,
            "peer": self.peer.node if self.peer else None,
            **self.counters,
            "pending": self.pending,
            "in_flight_frames": len(self._flight),
            "in_flight_bytes": self._flight_bytes,
            "full_sync_reason": self.full_sync_reason.name.lower() if self.full_sync_reason else None,
            "full_syncs_by_reason": dict(self.full_syncs),
            "full_sync_ns": self.last_sync_ns,
            "latency": self.latency.report(),
            "compressing": self._compress.on,
            "compression": blocks.NAMES[self._format if self._compress.on else blocks.PLAIN],
            "compression_trials": self._compress.trials,
            "held_back_bytes_per_s": self._compress.bytes_per_s,
        }

    @property
    def wants_turn(self) -> bool:
        """Not after most acknowledgements, of which there are many."""
        return bool(
            self._dirty.pending
            or self._ready
            or self._events
            or self._due is not None
            or self._snapshot is not None
            or self._wanted.busy
            or self.closed
        )

    def next_deadline(self, now_ns: int) -> int | None:
        """See the base; also the end of a change's wait for others, and at once while the peer waits for an answer."""
        if self._wanted.busy and not self.closed:
            return now_ns
        due = super().next_deadline(now_ns)
        if due is not None and self._dirty.pending and self._rate.room(now_ns, 1) == 0:
            return min(due, self._rate.next_ns(now_ns))
        if due is not None and self._flight and self._due is None and not self._window_full:
            oldest = self._dirty.oldest_ns
            if oldest is not None:
                due = min(due, oldest + self.settings.batch_ns)
        return due

    # --- frames of the peer ------------------------------------------------------------------------------------------

    def _handle(self, frame: Frame, now_ns: int) -> None:
        if frame.opcode is Opcode.REFUSE:
            self._refused(frame, now_ns)
        elif self.state is State.HELLO:
            if frame.opcode is not Opcode.HELLO:
                raise ProtocolError(Fault.UNEXPECTED, f"{frame.opcode.name} before HELLO")
            self._introduced(wire.parse_hello(frame.body), now_ns)
        elif frame.opcode in (Opcode.ACK, Opcode.HEARTBEAT):  # a heartbeat says again what was acknowledged
            self._acknowledge(frame.sequence, now_ns)
        elif frame.opcode is Opcode.RESYNC:
            reason = wire.parse_resync(frame.body)
            self.counters["resyncs_requested"] += 1
            self.resync(SyncReason(reason) if reason in set(SyncReason) else SyncReason.REQUESTED)
        elif frame.opcode is Opcode.WANT:
            keys = codec.parse_want(frame.body)
            counter = "wanted" if self._wanted.ask(keys, now_ns) else "wanted_unanswered"
            self.counters[counter] += len(keys)
        else:
            raise ProtocolError(Fault.UNEXPECTED, f"{frame.opcode.name} from a receiver")

    def _introduced(self, peer: Hello, now_ns: int) -> None:
        refusal = self._check(peer, Role.RECEIVER)
        if refusal is not None:
            self._refuse(*refusal, now_ns)
            return
        self.peer = peer
        held = (peer.node_id, peer.epoch, peer.replica)
        if self._held is None:
            self._due = SyncReason.FIRST
        elif held[:2] != self._held[:2]:
            self._due = SyncReason.PEER_RESTARTED
        elif held != self._held:
            self._due = SyncReason.NOT_HELD
        self._held = held
        if self._due is None:
            self.counters["partial_syncs"] += 1
        self._settle_state()
        self._events.append(Up(peer, self._due))

    def _acknowledge(self, sequence: int, now_ns: int) -> None:
        if sequence > self._sequence:
            raise ProtocolError(Fault.SEQUENCE, f"{sequence} acknowledged, {self._sequence} sent")
        if sequence <= self._acknowledged:
            return
        self._acknowledged = sequence
        if self._begin_sequence <= sequence:
            self._begin_sequence = 0
        size = plain = 0
        while self._flight and self._flight[0].sequence <= sequence:
            frame = self._flight.popleft()
            size += frame.size
            plain += frame.plain
            self.counters["acknowledged"] += len(frame.told.slots)
            self.latency.add(frame.told.since_ns, now_ns)
        self._flight_bytes -= size
        self._compress.acknowledged(size, plain, self._flight_bytes, now_ns)
        if self._end_sequence is not None and sequence >= self._end_sequence:
            self._snapshot = self._end_sequence = None
            if self._picks is not None:
                # Of others' sessions it holds none any more; but where one is marked, it may hold the one before that.
                self._told &= self._share() | ~self._table.shared | self._dirty.marked
            self.last_sync_ns = now_ns - self._snapshot_ns
            self._events.append(Synced(self._snapshot_sessions, self.last_sync_ns))
            self._settle_state()

    def _settle_state(self) -> None:
        self.state = State.LIVE if self._due is None and self._snapshot is None else State.SYNCING

    # --- frames to the peer ------------------------------------------------------------------------------------------

    @property
    def _window_full(self) -> bool:
        """No room for a whole frame more: what is left of a window is not filled up with crumbs."""
        settings = self.settings
        return len(self._flight) >= settings.window_frames or (
            bool(self._flight) and self._flight_bytes + settings.body_bytes > settings.window_bytes
        )

    def _produce(self, now_ns: int) -> None:
        if self.state is State.HELLO:
            return
        if self._due is not None:
            if not self._table.complete:
                return  # what we have not seen yet would be dropped there
            if self._window_full:
                return  # a peer that asks for it without end and acknowledges nothing costs no memory
            self._begin_full_sync(self._due, now_ns)
        if self._wanted.busy:
            self._give(self._wanted.step(), now_ns)
        while not self._window_full and self._worth_sending(now_ns):
            room = (self.settings.window_bytes - self._flight_bytes) // SIZES[IPV6]
            allowed = self._rate.room(now_ns, max(1, min(room, CLAIM)))
            if allowed == 0:
                break
            self._tell(self._dirty.claim(allowed))
        self._compress.waiting(now_ns, held_back=self._window_full and self._dirty.pending > 0)
        if self._snapshot is not None and self._end_sequence is None and self._dirty.owed == 0:
            self._end_sequence = self._sequence + 1
            self._send(wire.pack_snapshot_end(self._end_sequence, self._snapshot), _TOLD_NOTHING)

    def _give(self, slots: Slots, now_ns: int) -> None:
        """Sessions that the peer asked for: told again, and its from now on."""
        if len(slots) == 0:
            return
        self.counters["wanted_found"] += len(slots)
        if self._picks is not None:
            if self._asked is None:
                self._asked = np.zeros(self._table.slots, np.uint32)
            self._asked[slots] = self._table.generation[slots]
        self._dirty.mark(slots, now_ns, fresh=True)

    def _worth_sending(self, now_ns: int) -> bool:
        changes = self._dirty.changes
        if self._dirty.owed or (changes and not self._flight) or changes >= self.settings.batch_changes:
            return True
        oldest = self._dirty.oldest_ns
        return oldest is not None and now_ns - oldest >= self.settings.batch_ns

    def _begin_full_sync(self, reason: SyncReason, now_ns: int) -> None:
        self._due = None
        self.full_sync_reason = reason
        self.counters["full_syncs"] += 1
        self.full_syncs[reason.name.lower()] += 1
        self._events.append(Syncing(reason))
        self._snapshots += 1
        share = self._share()
        self._snapshot, self._snapshot_ns = self._snapshots, now_ns
        self._snapshot_sessions = int(np.count_nonzero(share))
        self._end_sequence = None
        if reason in (SyncReason.FIRST, SyncReason.PEER_RESTARTED):
            self._told[:] = False
        self._dirty.owe(share)
        self._begin_sequence = self._sequence + 1
        self._send(wire.pack_snapshot_begin(self._begin_sequence, self._snapshot, reason), _TOLD_NOTHING)
        self._settle_state()

    def _tell(self, taken: Taken) -> None:
        """Frames for slots whose marks were just taken: ends first, as another slot may have the same tuple now."""
        if self._picks is not None:
            taken = self._ours(taken, self._picks)
        n = len(taken.slots)
        self._rate.said(n)
        sorts, counts = np.empty(n, np.uint8), np.empty(6, np.int64)
        self._telling.sort(taken.slots, taken.fresh.view(np.uint8), sorts, counts)
        numbers = counts.tolist()
        if numbers[packing.ENDED]:
            gone = _chosen(taken, sorts == packing.ENDED)
            self._say_ended(gone, self._table.generation[gone.slots])
        compress = self._format if self._compress.on else blocks.PLAIN
        for sort, kind, opcode, counter in _SORTS:
            count = numbers[sort]
            if count == 0:
                continue
            group = taken if count == n else _chosen(taken, sorts == sort)
            self.counters[counter] += count
            for part in codec.batches(kind, count, self.settings.body_bytes):
                batch = group if part == slice(0, count) else _chosen(group, part)
                frame = codec.pack_rows(
                    opcode, self._sequence + 1, self._telling, batch.slots, kind, compress=compress
                )  # fmt: skip
                self._send(frame, batch, len(batch.slots) * SIZES[kind])

    @property
    def _format(self) -> int:
        """How frames to this peer may be compressed."""
        understood = self.peer.capabilities if self.peer is not None else 0
        if self.settings.zstd and understood & wire.ZSTD:
            return blocks.ZSTD
        return blocks.LZ4 if understood & wire.LZ4 else blocks.PLAIN

    def _share(self) -> Bools:
        """What the peer is to hold: one flag a slot."""
        if self._picks is None:
            return self._table.shared
        slots = np.flatnonzero(self._table.shared)
        share = np.zeros(self._table.slots, np.bool_)
        share[slots[self._picks(slots)]] = True
        return share

    def _ours(self, taken: Taken, picks: Picks) -> Taken:
        """Without the sessions of other peers.

        Where this peer was told of one that had such a slot before, that one has ended. If it was told of this very
        one, because the shares were other ones then, it drops it at the end of the full sync that begins with the new
        shares: it has not ended, so that must not be said.
        """
        there = np.flatnonzero(self._table.shared[taken.slots])
        others = there[~picks(taken.slots[there])]
        if len(others) == 0:
            return taken
        before = self._table.generation[taken.slots[others]] - np.uint32(1)
        told = self._told[taken.slots[others]] & (before > 0)
        ended = _chosen(taken, others[told])
        if self._due is None and self._snapshot is None:
            self._told[ended.slots] = False
        self._say_ended(ended, before[told])
        ours = np.ones(len(taken.slots), np.bool_)
        ours[others] = False
        return _chosen(taken, ours)

    def _say_ended(self, gone: Taken, generations: Generations) -> None:
        """These generations of n slots have ended, and all before."""
        for part in codec.batches(ENDED, len(gone.slots), self.settings.body_bytes):
            batch = _chosen(gone, part)
            self._send(codec.pack_deletes(self._sequence + 1, batch.slots, generations[part]), batch)
            self.counters["deleted"] += len(batch.slots)

    def _send(self, frame: Buffer, told: Taken, plain_bytes: int = 0) -> None:
        self._sequence += 1
        size = len(frame)
        self._flight.append(_InFlight(self._sequence, size, max(plain_bytes, size), told))
        self._flight_bytes += size
        self._ready.append(frame)
        self.counters["frames_sent"] += 1
        self.counters["bytes_sent"] += size
        self.counters["bytes_plain"] += max(plain_bytes, size)
        if plain_bytes:
            compressed = size < plain_bytes
            self.counters["frames_compressed"] += compressed
            self._compress.packed(smaller=compressed)

    def _let_go(self, now_ns: int) -> None:
        """What is not acknowledged has not been told."""
        self._wanted.forget()
        if self._snapshot is not None:
            if self._begin_sequence:
                self._due, self._snapshot = self.full_sync_reason, None  # perhaps it never heard of it: begin again
            self._end_sequence = None
        for frame in self._flight:
            self._told[frame.told.slots] = True
            self.counters["given_back"] += len(frame.told.slots)
            self._dirty.give_back(frame.told, owed=self._snapshot is not None)
        self._flight.clear()
        self._flight_bytes = 0
        self._compress.reset()


class Receiver(Engine):
    """The listening side, one connection: writes what an origin tells into its replica."""

    _COUNTERS = ("frames_received", "records_received", "duplicates", "gaps", "wanted", "protocol_errors")

    def __init__(self, replicas: Replicas, settings: LinkSettings | None = None, *, now_ns: int) -> None:
        super().__init__(replicas.me, settings or LinkSettings())
        self.replica: Replica | None = None
        self._replicas = replicas
        self._acknowledged = 0
        self._gap = False  # something was missed since the last SNAPSHOT_BEGIN
        self._second_ns, self._begun = now_ns, 0  # full syncs that began in this second
        self._start(now_ns)

    def disconnected(self, now_ns: int, why: str = ENDED_SO, loss: Loss = Loss.ENDED) -> None:
        """The connection is gone."""
        if not self.closed:
            self._end(Down(why, loss=loss), now_ns)
        self._ready.clear()

    def want(self, keys: codec.FlowKeys) -> bool:
        """Ask the origin for the sessions of n flows, at most MAX_WANT; False if it could not answer."""
        if self.closed or self.peer is None or not self.peer.capabilities & wire.WANTS:
            return False
        self._ready.append(codec.pack_want(keys))
        self.counters["wanted"] += len(keys)
        return True

    def report(self) -> Mapping[str, object]:
        """For status and metrics."""
        return {"state": self.state.value, "peer": self.peer.node if self.peer else None, **self.counters}

    def _handle(self, frame: Frame, now_ns: int) -> None:
        if frame.opcode is Opcode.REFUSE:
            self._refused(frame, now_ns)
        elif self.replica is None:
            if frame.opcode is not Opcode.HELLO:
                raise ProtocolError(Fault.UNEXPECTED, f"{frame.opcode.name} before HELLO")
            self._introduced(wire.parse_hello(frame.body), now_ns)
        elif self.replica.owner is not self:
            self._refuse(Reason.REPLACED, "a newer connection has taken over", now_ns)
        elif frame.opcode in SEQUENCED:
            if self._in_order(frame.sequence, self.replica):
                self._take(frame, self.replica, now_ns)
        elif frame.opcode is not Opcode.HEARTBEAT:
            raise ProtocolError(Fault.UNEXPECTED, f"{frame.opcode.name} from a sender")
        elif self._gap or frame.sequence > self._sequence:  # all that was sent should be here, and is not
            self._sequence = max(self._sequence, frame.sequence)
            self._missed(self.replica)

    def _introduced(self, peer: Hello, now_ns: int) -> None:
        refusal = self._check(peer, Role.SENDER)
        if refusal is not None:
            self._refuse(*refusal, now_ns)
            return
        try:
            self.replica = self._replicas.open(peer, self, now_ns)
        except LinkRefused as refused:
            self._refuse(refused.reason, refused.text, now_ns)
            return
        self.peer = peer
        self.state = State.LIVE if self.replica.synced else State.SYNCING
        self._ready.append(wire.pack_hello(replace(self.me, replica=self.replica.number)))
        self._events.append(Up(peer, None))

    def _in_order(self, sequence: int, replica: Replica) -> bool:
        """Whether a frame is to be taken; asks for a full sync when one before it is missing."""
        if sequence <= self._sequence:
            self.counters["duplicates"] += 1
            return False
        if sequence != self._sequence + 1 and not self._gap:
            self._missed(replica)
        self._sequence = sequence
        return True

    def _missed(self, replica: Replica) -> None:
        """Something was: ask for a full sync, and again where it should be there and is not."""
        self._ready.append(wire.pack_resync(SyncReason.GAP))
        if not self._gap:
            self._gap = True
            self.counters["gaps"] += 1
            self.state = State.SYNCING
            self._replicas.distrust(replica)

    def _bound(self, now_ns: int) -> None:
        """One more full sync begins; raises ProtocolError where that is more than makes sense."""
        if now_ns - self._second_ns >= SECOND:
            self._second_ns, self._begun = now_ns, 0
        self._begun += 1
        if self._begun > FULL_SYNCS_A_SECOND:
            raise ProtocolError(Fault.UNEXPECTED, f"more than {FULL_SYNCS_A_SECOND} full syncs in a second")

    def _take(self, frame: Frame, replica: Replica, now_ns: int) -> None:
        if frame.opcode is Opcode.DELETE:
            slots, generations = codec.parse_deletes(frame.body, replica.slots)
            self.counters["records_received"] += len(slots)
            replica.end(slots, generations, now_ns)
        elif frame.opcode is Opcode.SNAPSHOT_BEGIN:
            number, _ = wire.parse_snapshot_begin(frame.body)
            self._bound(now_ns)
            self._gap = False
            self.state = State.SYNCING
            replica.begin_full_sync(number, now_ns)
        elif frame.opcode is Opcode.SNAPSHOT_END:
            number = wire.parse_snapshot_end(frame.body)
            if self._gap:
                self._missed(replica)  # not the one we asked for, or part of that was missed too
                return
            took_ns = replica.end_full_sync(number, now_ns)
            self.state = State.LIVE
            self._events.append(Synced(replica.count, took_ns, self._replicas.synced(replica, now_ns)))
        else:
            records = codec.parse_records(frame.body, replica.slots)
            self.counters["records_received"] += len(records)
            replica.put(records, now_ns)

    def _produce(self, now_ns: int) -> None:
        if self._acknowledged < self._sequence:
            self._acknowledged = self._sequence
            self._ready.append(wire.pack(Opcode.ACK, self._sequence))

    def _let_go(self, now_ns: int) -> None:
        if self.replica is not None:
            self._replicas.close(self.replica, self, now_ns)
