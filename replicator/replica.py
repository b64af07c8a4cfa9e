# SPDX-License-Identifier: GPL-2.0-or-later
"""The sessions of the other nodes, one table per run of a node, by that node's slots.

Rules:
- A replica says what its origin said last; it decides nothing. What changes is marked in ``pending``, for the injector.
- A generation that is older than what is known of its slot changes nothing, and one that is known to have ended does
  not come back.
- A full sync names every session the origin has (mark); what it did not name is dropped at its end (sweep).
- A later run of a node (a newer epoch) gets a table of its own, which takes the place of the old one when its first
  full sync is in. An earlier run than one that is known is refused.
- If the later run is of another DPVS process, the earlier one's sessions have not ended, they were lost there: this may
  be the node that has them now. Their table stays, as after the end of a link.
- The end of a link ends no session. Without a link, sessions are kept for as long as their own timeouts say.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from collector.record import COMPARE, RECORD, TEMPLATE, WORDS, Bools, Records, Slots, digest, pick, words
from collector.rows import Copies
from collector.table import Dirty

from . import packing
from .wire import Fault, Hello, ProtocolError, Reason

TIE_MS = 600_000  # a tie of a client to its real server is kept that long at least after its owner is gone

Generations = npt.NDArray[np.uint32]


class LinkRefused(Exception):
    """Why a link of an origin is not taken."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason, self.text = reason, text


class Replica:
    """The sessions of one run of one node. Arrays are read-only to others and valid as long as the replica."""

    def __init__(self, hello: Hello, number: int) -> None:
        self.node, self.node_id, self.epoch, self.instance = hello.node, hello.node_id, hello.epoch, hello.instance
        self.workers = hello.workers  # of its DPVS; 0: not known
        self.number = number  # names what we hold; another number after anything was let go
        self.slots = hello.slots
        self._words = np.zeros((self.slots, WORDS), np.uint64)
        self.records: Records = self._words.view(RECORD).reshape(self.slots)
        self.generation: Generations = self.records["generation"]  # the last that was heard of; 0 for none
        self.present: Bools = np.zeros(self.slots, np.bool_)
        self.pending = Dirty(self.slots)
        self._named = np.zeros(self.slots, np.uint8)  # by the full sync that is under way
        self._copies = Copies(self._words, self.present.view(np.uint8), self._named, COMPARE)
        self._full_sync: int | None = None  # number of the one that has begun and not ended
        self._full_sync_ns = 0
        self._full_sync_in: int | None = None  # number of the last one that ended
        self.count = 0
        self.synced = False  # a full sync is in, and nothing was missed since
        self.connected = False
        self.since_ns = 0  # when the link went up or down last
        self.synced_ns = 0  # when the last full sync was in
        self.owner: object = None  # the link that may write here
        self.counters: dict[str, int] = dict.fromkeys(
            ("created", "updated", "unchanged", "deleted", "swept", "stale", "full_syncs", "aged"), 0
        )

    def __len__(self) -> int:
        return self.count

    @property
    def link_up(self) -> bool:
        """The origin is connected and what stands here is all it has: copies may be refreshed."""
        return self.connected and self.synced

    def sessions(self) -> Records:
        """All present records, (n,), by slot; a copy."""
        return pick(self.records, self.present)

    def digest(self) -> int:
        """``record.digest`` of all sessions here; in quiet that of the origin's table is equal."""
        return digest(self.sessions())

    def put(self, records: Records, now_ns: int) -> None:
        """The origin's rows of n slots. Raises ProtocolError when a slot stands there twice."""
        new = words(records)
        if not packing.rising(new):
            _distinct(records["slot"].astype(np.int64))
        changed, fresh = np.empty(len(records), np.int64), np.empty(len(records), np.uint8)
        rows = self._copies
        n = rows.put(new, self._full_sync is not None, changed, fresh)
        self.count += rows.more
        count = self.counters
        count["created"] += rows.created
        count["updated"] += rows.updated
        count["unchanged"] += len(records) - rows.stale - n
        count["stale"] += rows.stale
        if n:
            self.pending.mark(changed[:n], now_ns, fresh[:n].view(np.bool_))

    def end(self, slots: Slots, generations: Generations, now_ns: int) -> None:
        """Sessions that ended: those generations and all before. Raises ProtocolError when a slot is named twice."""
        slots = _distinct(slots)
        known = self.generation[slots]
        accept = (known == 0) | ((generations - known).astype(np.int32) >= 0)
        self.counters["stale"] += int(np.count_nonzero(~accept))
        gone = slots[accept & self.present[slots]]
        self.generation[slots[accept]] = generations[accept]
        self.present[gone] = False
        self.count -= len(gone)
        self.counters["deleted"] += len(gone)
        self.pending.mark(gone, now_ns, fresh=False)

    def begin_full_sync(self, number: int, now_ns: int) -> None:
        """From here on, what is named counts."""
        self._named[:] = 0
        self._full_sync, self._full_sync_ns = number, now_ns

    def end_full_sync(self, number: int, now_ns: int) -> int:
        """Drop what was not named; how long it all took. Raises ProtocolError if no such full sync was begun."""
        if number == self._full_sync_in and self._full_sync is None:
            return 0  # its acknowledgement was lost with the connection, so it comes again
        if number != self._full_sync:
            raise ProtocolError(Fault.UNEXPECTED, f"the end of full sync {number}, which did not begin")
        self._full_sync, self._full_sync_in = None, number
        gone = np.flatnonzero(self.present & (self._named == 0))
        self.present[gone] = False
        # The origin said nothing of how these ended: whatever it names there next is right.
        self.generation[gone] = 0
        self.count -= len(gone)
        self.counters["swept"] += len(gone)
        self.counters["full_syncs"] += 1
        self.pending.mark(gone, now_ns, fresh=False)
        self.synced, self.synced_ns = True, now_ns
        return now_ns - self._full_sync_ns

    def age(self, now_ns: int) -> int:
        """Forget sessions whose timeout has passed since the link went down; how many. Copies end by themselves."""
        if self.connected or self.count == 0:
            return 0
        slots = np.flatnonzero(self.present)
        down_ms = (now_ns - self.since_ns) // 1_000_000
        timeout_ms = self.records["timeout_ms"][slots].copy()
        # A template that has controlled sessions once says two seconds (DPVS 1.10.2, ip_vs_conn.c: dp_vs_conn_expire).
        tie = (self.records["flags"][slots] & TEMPLATE) != 0
        timeout_ms[tie] = np.maximum(timeout_ms[tie], TIE_MS)
        gone = slots[timeout_ms <= down_ms]
        self.present[gone] = False
        self.generation[gone] = 0
        self.count -= len(gone)
        self.counters["aged"] += len(gone)
        return len(gone)


def _distinct(slots: Slots) -> Slots:
    rising = slots[1:] > slots[:-1]
    if not rising.all():
        order = np.sort(slots)
        if (order[1:] == order[:-1]).any():
            raise ProtocolError(Fault.RECORD, "a slot named twice in one frame")
    return slots


class Replicas:
    """The replicas of all origins of this node."""

    def __init__(self, me: Hello, *, max_slots: int = 1 << 25, max_origins: int = 64) -> None:
        """``me``: what this node says of itself; ``max_slots``: of one origin's pool."""
        self.me = me
        self.max_slots, self.max_origins = max_slots, max_origins
        self._current: dict[int, Replica] = {}
        self._coming: dict[int, Replica] = {}  # later runs whose first full sync is not in yet
        self._former: list[Replica] = []  # of DPVS processes that are no more, oldest first
        self._numbers = 0

    def __iter__(self) -> Iterator[Replica]:
        """All replicas: of a node that began a new run, the old one too until the new one's first full sync is in, or
        until its sessions are too old if its DPVS is no more.
        """
        yield from self._former
        yield from self._current.values()
        yield from self._coming.values()

    def get(self, node_id: int) -> Replica | None:
        """The replica that counts for a node."""
        return self._current.get(node_id)

    def open(self, hello: Hello, owner: object, now_ns: int) -> Replica:
        """The replica that a link introduced by ``hello`` writes to from now on; raises LinkRefused.

        ``owner`` stands for the link; one that wrote here before may not any more.
        """
        if hello.node_id == self.me.node_id:
            raise LinkRefused(Reason.SAME_NODE, f"both nodes are called '{hello.node}'")
        if not 0 < hello.slots <= self.max_slots:
            raise LinkRefused(Reason.TOO_LARGE, f"a pool of {hello.slots} slots, {self.max_slots} are taken here")
        replica = self._find(hello)
        if replica is None:
            self._numbers += 1
            try:
                replica = Replica(hello, self._numbers)
            except MemoryError:
                text = f"no memory for a pool of {hello.slots} slots"
                raise LinkRefused(Reason.TOO_LARGE, text) from None
            table = self._coming if hello.node_id in self._current else self._current
            _disown(table.get(hello.node_id), now_ns)
            table[hello.node_id] = replica
        replica.owner, replica.connected, replica.since_ns = owner, True, now_ns
        return replica

    def _find(self, hello: Hello) -> Replica | None:
        for table in (self._coming, self._current):
            known = table.get(hello.node_id)
            if known is None:
                continue
            if hello.epoch < known.epoch:
                raise LinkRefused(Reason.STALE_EPOCH, f"a later run of '{hello.node}' is known here")
            if hello.epoch == known.epoch:
                if hello.slots != known.slots:
                    raise LinkRefused(Reason.PROTOCOL, "one run with two sizes of its pool")
                return known
        if hello.node_id not in self._current and len(self._current) >= self.max_origins:
            raise LinkRefused(Reason.TOO_LARGE, f"{self.max_origins} nodes replicate to here already")
        return None

    def close(self, replica: Replica, owner: object, now_ns: int) -> None:
        """A link ended; nothing if another one has taken over."""
        if replica.owner is owner:
            replica.owner, replica.connected, replica.since_ns = None, False, now_ns

    def synced(self, replica: Replica, now_ns: int) -> Replica | None:
        """A full sync of ``replica`` is in; the replica of an earlier run that it replaced, if any."""
        if self._coming.get(replica.node_id) is not replica:
            return None
        del self._coming[replica.node_id]
        old = self._current.get(replica.node_id)
        _disown(old, now_ns)
        self._current[replica.node_id] = replica
        if old is not None and old.instance != replica.instance and old.count:
            self._former.append(old)
            del self._former[: -self.max_origins]
        return old

    def age(self, now_ns: int) -> None:
        """To be called about once a second: let go of what no link keeps alive any more."""
        for replica in self:
            if replica.age(now_ns):
                self.distrust(replica)
        self._former = [replica for replica in self._former if replica.count]

    def distrust(self, replica: Replica) -> None:
        """What stands there is not what the origin believes: only a full sync puts that right."""
        self._numbers += 1
        replica.number, replica.synced = self._numbers, False


def _disown(replica: Replica | None, now_ns: int) -> None:
    if replica is not None:
        if replica.connected:
            replica.since_ns = now_ns
        replica.owner, replica.connected = None, False
