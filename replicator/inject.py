# SPDX-License-Identifier: GPL-2.0-or-later
"""Putting the peers' sessions into this node's DPVS, and keeping them there as long as their owners live.

Rules
- State, not a log: a replica marks slots; what is sent to the agent is what the replica says when a slot's turn comes.
- At most one operation per slot is under way. A slot that changes meanwhile waits until the agent has answered.
- A copy never disturbs the connection it stands for. The agent holds it in a state that ends in silence; here we see
  to it that it is refreshed while its owner's link is up, and that nothing is refreshed or deleted because an owner
  died.
- What DPVS refuses for now (service, real server or address not there yet, port in use) is tried again with the
  refresh. What it will never take is tried again only when the session changes. Every refusal is counted by its reason.
- Under the policy ``promote`` nothing of that happens until the node is promoted (``promotion.py``).
- A session that this node has too is its owner's or ours (``ownership.py``). If it is theirs, ours is made to wait.
- The agent is asked from one thread of our own: DPVS's control socket may be slow, and nothing here may wait for it.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from collector.record import (
    AF_INET,
    AF_INET6,
    CLOSE_WAIT,
    DR,
    ESTABLISHED,
    FIN_WAIT,
    FNAT,
    LAST_ACK,
    NAT,
    ONE_PACKET,
    RECORD,
    SCTP,
    SCTP_ESTABLISHED,
    SCTP_INIT,
    SCTP_SHUTDOWN_ACK_SENT,
    TCP,
    TEMPLATE,
    TUNNEL,
    UDP,
    UDP_NORMAL,
    UDP_ONEWAY,
    Bools,
    Records,
    Slots,
    carried,
    pick,
    words,
)
from collector.table import Dirty
from probes.agent import abi
from probes.agent.client import AgentAbsent, AgentBusy, AgentRefused, code_name
from probes.errors import DpvsProbeError

from .ownership import THEIRS, UNKNOWN, Ownership
from .promotion import SAMPLE, Promotion

log = logging.getLogger(__name__)

REFRESH_NS = 10_000_000_000
LOOK_SHARE, LOOK_MANY = 5, 1 << 16  # copies without an owner are looked at so much more often, unless they are many
MIN_COPY_TIMEOUT_MS = 30_000  # three refreshes, for states that DPVS itself would drop sooner
REFRESH_STEP_NS = 20_000_000  # so often a part of them is looked at: a request for many costs as much as for one
BACK_OFF_NS = 100_000_000  # after the control socket failed
# Words 1 to 10 of a record hold its tuple (and state and flags): what is needed to find a session again.
_FIRST, _LAST = 1, 11
_TUPLE = np.full(_LAST - _FIRST, ~np.uint64(0), np.uint64)
_TUPLE[0] = 0xFFFFFF  # af, af_out, proto
_MODE_SHIFT, _FLAGS_SHIFT = np.uint64(24), np.uint64(48)  # in the first of these words

# What may stand by, as tables for what is in the second word of a record: [protocol's row][state], and
# [forwarding mode][families], as the agent has it.
_OTHER, _TCP, _UDP, _SCTP = range(4)
_ROWS = np.zeros(256, np.uint8)
_ROWS[[TCP, UDP, SCTP]] = _TCP, _UDP, _SCTP
_STATES = np.zeros((4, 16), np.bool_)
_STATES[_TCP, [ESTABLISHED, FIN_WAIT, CLOSE_WAIT, LAST_ACK]] = True
_STATES[_UDP, [UDP_ONEWAY, UDP_NORMAL]] = True
_STATES[_SCTP, SCTP_ESTABLISHED : SCTP_SHUTDOWN_ACK_SENT + 1] = True
_FAMILIES = np.full(1 << 16, 3, np.uint8)  # by the client's side | the real server's side << 8
for _number, (_outside, _inside) in enumerate(((AF_INET, AF_INET), (AF_INET6, AF_INET6), (AF_INET6, AF_INET))):
    _FAMILIES[_outside | _inside << 8] = _number
_KINDS = np.zeros((16, 4), np.bool_)
_KINDS[[FNAT, TUNNEL], :3] = True
_KINDS[[DR, NAT], :2] = True


def _codes(*codes: abi.Code) -> Bools:
    table = np.zeros(256, np.bool_)
    table[list(codes)] = True
    return table


_HERE = _codes(abi.Code.CREATED, abi.Code.UPDATED, abi.Code.LIVE)
_ENDED = _codes(abi.Code.DELETED, abi.Code.ABSENT, abi.Code.LIVE, abi.Code.FOREIGN)
_NOT_HERE = _codes(abi.Code.ABSENT, abi.Code.FOREIGN)
_DISPUTED = _codes(abi.Code.LIVE, abi.Code.FOREIGN)


class Agent(Protocol):
    """What the injector asks of ``probes.agent.client.AgentClient``."""

    @property
    def max_records(self) -> int: ...  # of one request
    def submit(self, ops: npt.NDArray[np.uint8], records: Records) -> int: ...
    def results(self, request_id: int) -> npt.NDArray[np.uint8] | None: ...


class Marks(Protocol):
    """Slots that want a look (``collector.table.Dirty``)."""

    def mark(self, slots: Slots) -> None: ...
    def take(self, limit: int) -> Slots: ...


class Origin(Protocol):
    """What the injector reads of a replica: the sessions of one other node."""

    @property
    def node_id(self) -> int: ...
    @property
    def node(self) -> str: ...
    @property
    def instance(self) -> int: ...  # of the DPVS process
    @property
    def workers(self) -> int: ...  # that it has; 0: not known
    @property
    def slots(self) -> int: ...
    @property
    def records(self) -> Records: ...
    @property
    def present(self) -> Bools: ...
    @property
    def pending(self) -> Marks: ...
    @property
    def link_up(self) -> bool: ...


def injectable(records: Records) -> Bools:
    """Which sessions may stand by here: TCP and SCTP with an open or closing connection behind it, UDP that has seen a
    packet, templates; in the modes and families that DPVS can carry. Not SNAT: its service is found by a packet alone.
    """
    rows = words(records)
    head = rows[:, 1].copy()
    state = np.minimum(head >> np.uint64(32) & np.uint64(0xFFFF), np.uint64(15))
    mode = np.minimum(head >> _MODE_SHIFT & np.uint64(0xFF), np.uint64(15))
    row = _ROWS[head >> np.uint64(16) & np.uint64(0xFF)]
    flags = head >> _FLAGS_SHIFT
    fit: Bools = _STATES[row, state]
    if (row == _SCTP).any():
        # Where the server's packets go past it, DPVS never learns that it is open (ip_vs_proto_sctp.c: sctp_states).
        fit |= (row == _SCTP) & (state == SCTP_INIT) & ((mode == DR) | (mode == TUNNEL))
    odd = flags & np.uint64(TEMPLATE | ONE_PACKET)
    if odd.any():
        # One that DPVS has put out of use has other ports (ip_vs_conn.c: dp_vs_check_template).
        tie = (row != _OTHER) & (records["cport"] == 0) & (records["dport"] == 0)
        fit = np.where(odd == TEMPLATE, tie, fit & (odd == 0))
    fit &= _KINDS[mode, _FAMILIES[head & np.uint64(0xFFFF)]]
    return fit


class _Orphans:
    """Copies of an earlier run of a node that its present run does not name: a replica that wants none of them."""

    link_up = False
    instance = workers = 0
    node = ""

    def __init__(self, node_id: int, count: int) -> None:
        self.node_id, self.slots = node_id, count
        self.records: Records = np.zeros(count, RECORD)
        self.present: Bools = np.zeros(count, np.bool_)
        self.pending = Dirty(count)
        self.pending.mark(np.arange(count))


@dataclass
class _Copies:
    """What we believe stands in DPVS for one origin, by the origin's slot."""

    replica: Origin
    installed: npt.NDArray[np.uint64] = field(init=False)  # (slots, 10): the tuple that was put in
    has: Bools = field(init=False)
    retry: Bools = field(init=False)
    waits: Bools = field(init=False)  # changed while an operation was under way
    contested: Bools = field(init=False)  # DPVS has it too, and it is theirs
    heir: Bools = field(init=False)  # its DPVS is dead and a new one is there: the copy here is the session
    offer: Bools = field(init=False)  # was there at the promotion, and DPVS has not been asked since
    busy: npt.NDArray[np.uint8] = field(init=False)  # operations under way
    code: npt.NDArray[np.uint8] = field(init=False)  # the last answer
    cursor: int = 0
    refreshed_ns: int = 0
    inherited: bool = False
    strange: bool = False  # its DPVS has another number of workers than ours
    refused: int = 0  # at the last look, while a promotion goes on

    def __post_init__(self) -> None:
        n = self.replica.slots
        self.installed = np.zeros((n, _LAST - _FIRST), np.uint64)
        self.has, self.retry, self.waits = (np.zeros(n, np.bool_) for _ in range(3))
        self.contested, self.heir, self.offer = (np.zeros(n, np.bool_) for _ in range(3))
        self.busy, self.code = np.zeros(n, np.uint8), np.zeros(n, np.uint8)


@dataclass
class _Batch:
    copies: _Copies
    slots: Slots
    ops: npt.NDArray[np.uint8]
    records: Records
    sent: Future[int] | None = None
    request_id: int = 0


def _tuples(rows: npt.NDArray[np.uint64]) -> npt.NDArray[np.void]:
    """Rows of words 1 to 10, (n, 10), as n values that are equal when the tuples are."""
    masked = np.ascontiguousarray(rows & _TUPLE)
    return masked.view(f"V{8 * (_LAST - _FIRST)}").reshape(len(rows))


def _first(slots: Slots) -> Bools:
    """Of slots that are each there once, or twice side by side: which are not the second of a pair."""
    first = np.ones(len(slots), np.bool_)
    np.not_equal(slots[1:], slots[:-1], out=first[1:])
    return first


class Injector:
    """Feeds one agent from any number of replicas. ``tick`` does a little and never blocks."""

    def __init__(
        self,
        agent: Agent,
        replicas: Callable[[], Iterable[Origin]],
        *,
        refresh_ns: int = REFRESH_NS,
        executor: Executor | None = None,
        ownership: Ownership | None = None,
        promotion: Promotion | None = None,
        workers: int = 0,
    ) -> None:
        """``workers``: how many this DPVS has; 0: not known, and nothing depends on it."""
        self._agent = agent
        self._workers = workers
        self.promotion = promotion or Promotion()
        self._ownership = ownership
        self._now_ns = 0
        self._replicas = replicas
        self._refresh_ns = refresh_ns
        self._executor = executor or ThreadPoolExecutor(1, "inject")
        self._copies: dict[int, _Copies] = {}
        self._orphans: dict[int, _Orphans] = {}
        self._batches: list[_Batch] = []
        self._not_before_ns = 0
        self.stopped: DpvsProbeError | None = None
        self.by_code: npt.NDArray[np.int64] = np.zeros(64, np.int64)
        self.requests = self.busy_answers = self.socket_errors = 0

    def tick(self, now_ns: int) -> None:
        """Take in what the agent answered, send it what changed, and refresh a part of the rest."""
        self._now_ns = now_ns
        self._collect(now_ns)
        current: dict[int, Origin] = {id(replica): replica for replica in self._replicas()}
        for key in self._copies.keys() - current.keys() - self._orphans.keys():
            self._leave(self._copies.pop(key), current)
        for key, orphans in list(self._orphans.items()):
            if self._copies[key].has.any():
                current[key] = orphans
            else:
                del self._orphans[key], self._copies[key]
        if self.promotion.retry_due(now_ns):
            self._retry_refused()
        for key, replica in current.items():
            copies = self._copies.get(key)
            if copies is None:
                copies = self._copies[key] = self._meet(replica, now_ns)
            if self.stopped or now_ns < self._not_before_ns:
                continue
            if self._ownership is not None and not copies.inherited and len(current) > 1:
                self._inherit(copies, current)
            if self._room():
                self._send(copies, replica.pending.take(self._room() // 2))
            self._refresh(copies, now_ns)

    def promote(self, now_ns: int) -> None:
        """Everything that peers have is to be in DPVS, as soon as it takes it."""
        self.promotion.promote(now_ns)
        for c in self._copies.values():
            c.offer[:] = c.replica.present
            c.refused = 0
            c.replica.pending.mark(np.flatnonzero(c.offer))

    def demote(self) -> None:
        """Under the policy ``promote``: copies that wait are taken out, and no more go in."""
        self.promotion.demote()
        if not self.promotion.puts_in:
            for c in self._copies.values():
                c.offer[:] = False
                c.replica.pending.mark(np.flatnonzero(c.has))

    def progress(self) -> dict[str, Any]:
        """How far the last promotion or demotion is: ``waiting`` sessions that DPVS was not asked about yet, how many
        stand there, and how many it refused by reason.
        """
        refused: npt.NDArray[np.int64] = np.zeros(64, np.int64)
        for c in self._copies.values():
            at = c.replica.present & ~c.has & (c.code >= abi.RETRYABLE)
            refused += np.bincount(c.code[at], minlength=64)[:64]
        offers = sum(int(np.count_nonzero(c.offer)) for c in self._copies.values())
        withdrawn = 0 if self.promotion.puts_in else self.installed()
        return {
            "role": self.promotion.role,
            "waiting": offers + withdrawn,
            "installed": self.installed(),
            "refused": {code_name(int(code)): int(refused[code]) for code in np.flatnonzero(refused)},
            "retrying": sum(int(np.count_nonzero(c.retry)) for c in self._copies.values()),
        }

    def _retry_refused(self) -> None:
        for c in self._copies.values():
            slots = np.flatnonzero(c.retry & (c.busy == 0))
            helped = len(slots) < c.refused
            c.refused = len(slots)
            c.replica.pending.mark(slots if helped else slots[:SAMPLE])

    def ask(self, ops: npt.NDArray[np.uint8], records: Records) -> "Future[int]":
        """A request that is not about replicas, in turn with ours; its number, for ``answer``."""
        return self._executor.submit(self._agent.submit, ops, records)

    def answer(self, request: int) -> npt.NDArray[np.uint8] | None:
        """The codes of such a request; None while it is under way."""
        return self._agent.results(request)

    def idle(self) -> bool:
        """Nothing is under way (changes may still wait in the replicas)."""
        return not self._batches

    def unanswered(self) -> int:
        """Sessions that are being put in and of which nothing is known yet: DPVS never answered for their slots."""
        none_yet = [b.copies.code[b.slots[b.ops == abi.RecordOp.UPSERT]] == abi.Code.PENDING for b in self._batches]
        return sum(int(np.count_nonzero(each)) for each in none_yet)

    def codes(self, replica: Origin) -> npt.NDArray[np.uint8]:
        """The agent's last answer for each slot of a replica (``probes.agent.abi.Code``); a view."""
        copies = self._copies.get(id(replica))
        return copies.code if copies else np.zeros(replica.slots, np.uint8)

    def installed(self) -> int:
        """Sessions of other nodes that stand in this DPVS because of us."""
        return sum(int(np.count_nonzero(c.has)) for c in self._copies.values())

    def counters(self) -> dict[str, Any]:
        """What happened so far, for status and metrics."""
        return {
            "policy": self.promotion.policy.value,
            "role": self.promotion.role,
            "installed": self.installed(),
            "requests": self.requests,
            "agent_busy": self.busy_answers,
            "socket_errors": self.socket_errors,
            "under_way": sum(len(b.slots) for b in self._batches),
            "results": {code_name(int(c)): int(self.by_code[c]) for c in np.flatnonzero(self.by_code)},
            "stopped": str(self.stopped) if self.stopped else None,
            "contested": dict(self._ownership.counters) if self._ownership else {},
        }

    def close(self) -> None:
        """Wait for the request that is being sent, if any; nothing more is sent."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _leave(self, copies: _Copies, current: Mapping[int, Origin]) -> None:
        """A replica is no more. If a later run of its node took its place, what that run does not name has ended."""
        heirs = [r for r in current.values() if r.node_id == copies.replica.node_id]
        if not heirs or not copies.has.any():
            return  # nothing is known about the owner: its copies live as long as they would anyway
        rows = copies.installed[copies.has]
        named = np.concatenate([words(h.records[h.present])[:, _FIRST:_LAST] for h in heirs])
        rows = rows[~np.isin(_tuples(rows), _tuples(named))]
        if len(rows):
            orphans = _Orphans(copies.replica.node_id, len(rows))
            left = self._copies[id(orphans)] = _Copies(orphans)
            left.installed[:], left.has[:] = rows, True
            self._orphans[id(orphans)] = orphans

    def _inherit(self, c: _Copies, current: Mapping[int, Origin]) -> None:
        """A node has come back with another DPVS process: what waits here of the one that died is ours from now on, so
        that the node gets it back like any session of ours, also where no packet has come meanwhile.
        """
        dead = c.replica
        c.inherited = not dead.link_up and any(
            r.node_id == dead.node_id and r.instance != dead.instance and r.link_up for r in current.values()
        )
        if c.inherited:
            c.heir[:] = c.has
            dead.pending.mark(np.flatnonzero(c.heir))

    def _room(self) -> int:
        """Records that the agent would take now."""
        return max(0, abi.MAX_REQUESTS - len(self._batches)) * self._agent.max_records

    def _collect(self, now_ns: int) -> None:
        waiting = []
        for batch in self._batches:
            try:
                codes = self._answer(batch)
            except AgentBusy:
                self.busy_answers += 1
                self._give_back(batch)
            except (AgentAbsent, AgentRefused) as error:
                self.stopped = self.stopped or error
                self._give_back(batch)
            except (DpvsProbeError, OSError):
                self.socket_errors += 1
                self._not_before_ns = now_ns + BACK_OFF_NS
                self._give_back(batch)
            else:
                if codes is None:
                    waiting.append(batch)
                else:
                    self._settle(batch, codes)
        self._batches = waiting

    def _answer(self, batch: _Batch) -> npt.NDArray[np.uint8] | None:
        if batch.sent is not None:
            if not batch.sent.done():
                return None
            batch.request_id = batch.sent.result()
            batch.sent = None
            self.requests += 1
        return self._agent.results(batch.request_id)

    def _release(self, batch: _Batch) -> None:
        """The operations of a batch are over; slots that changed meanwhile get their turn."""
        c, first = batch.copies, _first(batch.slots)
        slots = batch.slots[first]
        c.busy[slots] -= 1
        c.busy[batch.slots[~first]] -= 1
        again = slots[c.waits[slots] & (c.busy[slots] == 0)]
        c.waits[again] = False
        c.replica.pending.mark(again)

    def _give_back(self, batch: _Batch) -> None:
        batch.copies.waits[batch.slots] = True
        self._release(batch)

    def _settle(self, batch: _Batch, codes: npt.NDArray[np.uint8]) -> None:
        c, slots = batch.copies, batch.slots
        self.by_code += np.bincount(codes, minlength=64)[:64]
        c.code[slots] = codes
        c.offer[slots] = False
        upsert = batch.ops == abi.RecordOp.UPSERT
        delete = batch.ops == abi.RecordOp.DELETE
        gone = (delete & _ENDED[codes]) | (~upsert & _NOT_HERE[codes])
        new = ~c.has[slots]
        c.has[slots[gone]] = False
        here = upsert & _HERE[codes]
        if here.all():
            c.installed[slots] = words(batch.records)[:, _FIRST:_LAST]
        else:
            c.installed[slots[here]] = words(batch.records)[here, _FIRST:_LAST]
        c.has[slots[here]] = True
        # Where a copy could not be taken back from every worker, what stood here may still stand on one.
        c.has[slots[upsert & ~here & (codes != abi.Code.BUSY)]] = False
        later = (codes >= abi.RETRYABLE) & (codes < abi.PERMANENT)
        c.retry[slots[upsert | delete]] = later[upsert | delete]
        c.heir[slots[(batch.ops == abi.RecordOp.CLAIM) & later]] = True
        c.waits[slots[delete & later]] = True  # a delete that did not work: look again
        if self._ownership is not None:
            self._weigh(self._ownership, batch, codes, new)
        self._release(batch)

    def _weigh(self, ownership: Ownership, batch: _Batch, codes: npt.NDArray[np.uint8], new: Bools) -> None:
        """What the answers say of sessions that two nodes have; ``new``: nothing stood here for this peer."""
        c, slots, node_id = batch.copies, batch.slots, batch.copies.replica.node_id
        upsert, give = batch.ops == abi.RecordOp.UPSERT, batch.ops == abi.RecordOp.YIELD
        both = np.flatnonzero(upsert & _DISPUTED[codes])
        if len(both):
            verdict = ownership.contested(pick(batch.records, both), node_id)
            theirs = slots[both[verdict == THEIRS]]
            c.contested[theirs] = c.waits[theirs] = True
            c.retry[slots[both[verdict == UNKNOWN]]] = True  # the table does not say yet
        again = upsert & new & (codes == abi.Code.UPDATED)
        if len(self._copies) > 1 and again.any():
            ownership.moved(pick(batch.records, again), slots[again], c.has, node_id, self._now_ns)
        later = (codes >= abi.RETRYABLE) & (codes < abi.PERMANENT)
        c.retry[slots[give & later]] = True
        done = np.flatnonzero(give & np.isin(codes, (abi.Code.YIELDED, abi.Code.ABSENT)))
        if len(done):
            yielded = codes[done] == abi.Code.YIELDED
            ownership.released(pick(batch.records, done), self._now_ns, yielded=int(np.count_nonzero(yielded)))
            if not self.promotion.puts_in:
                return  # it is left to end: packets that still come here would be reset without it
            at, given = slots[done], pick(batch.records, done[yielded])
            c.installed[at[yielded]] = words(given)[:, _FIRST:_LAST]
            c.has[at[yielded]] = c.waits[at] = True  # the next look puts it in, refreshes it or takes it out
            if len(self._copies) > 1:
                ownership.moved(given, at[yielded], c.has, node_id, self._now_ns)

    def _send(self, c: _Copies, slots: Slots) -> None:
        """Bring DPVS to what the replica says of these slots: delete what was, then make what is."""
        blocked = c.busy[slots] != 0
        c.waits[slots[blocked]] = True
        slots = slots[~blocked]
        if len(slots) == 0:
            return
        records = pick(c.replica.records, slots)
        want = c.replica.present[slots] & injectable(records) & self.promotion.puts_in
        if c.strange:
            want = self._without_fnat(c, slots, records, want)
        c.offer[slots[~want]] = False
        same = c.has[slots]
        if same.any():
            same &= ~((words(records)[:, _FIRST:_LAST] ^ c.installed.take(slots, axis=0)) & _TUPLE).any(axis=1)
        delete = c.has[slots] & ~(want & same)
        if not c.replica.link_up and delete.any():
            # Of an owner that is gone: clients may use the tie here, and DPVS ends it by itself.
            tie = (c.installed[slots, 0] >> _FLAGS_SHIFT & np.uint64(TEMPLATE)) != 0
            delete[tie] = False
            c.has[slots[tie & ~want]] = False
        give = np.zeros(len(slots), np.bool_)
        if self._ownership is not None:
            give = self._contest(self._ownership, c, slots, records, same)
            want &= ~give
        claim = c.heir[slots] & want & same  # what is the same as the copy that stands here
        c.heir[slots] = False
        c.retry[slots[~want]] = False
        records["timeout_ms"] = np.maximum(records["timeout_ms"], MIN_COPY_TIMEOUT_MS)
        put = want | give
        how = np.full(len(slots), abi.RecordOp.UPSERT, np.uint8)
        how[claim], how[give] = abi.RecordOp.CLAIM, abi.RecordOp.YIELD
        if not delete.any():
            if put.all():
                self._submit(c, slots, how, records)
            else:
                self._submit(c, slots[put], how[put], pick(records, put))
            return
        standing = self._standing(c, slots)
        if self._ownership is not None:
            ended = np.flatnonzero(delete & ~put)
            stay = ended[self._ownership.stay(words(standing)[ended], c.replica.node_id, self._now_ns)]
            delete[stay] = c.has[slots[stay]] = False
        # side by side, so that what was goes before what is: as words, which numpy copies many times faster than fields
        pairs = np.stack((words(standing), words(records)), axis=1).reshape(2 * len(slots), -1)
        ops = np.stack((np.full(len(slots), abi.RecordOp.DELETE, np.uint8), how), axis=1).ravel()
        chosen = np.flatnonzero(np.stack((delete, put), axis=1).ravel())
        self._submit(c, np.repeat(slots, 2)[chosen], ops[chosen], pairs[chosen].view(RECORD).ravel())

    def _without_fnat(self, c: _Copies, slots: Slots, records: Records, want: Bools) -> Bools:
        """``want`` without the FullNAT sessions, which are refused: their local port belongs to one worker, and the
        client's packets would come to another one.
        """
        lost = want & (records["fwdmode"] == FNAT) & ((records["flags"] & TEMPLATE) == 0)
        again = c.code[slots[lost]] == abi.Code.WRONG_WORKER
        self.by_code[abi.Code.WRONG_WORKER] += int(np.count_nonzero(~again))
        c.code[slots[lost]] = abi.Code.WRONG_WORKER
        return np.asarray(want & ~lost)

    def _meet(self, replica: Origin, now_ns: int) -> _Copies:
        """A replica that we did not know."""
        strange = self._workers > 1 and replica.workers not in (0, self._workers)
        if strange:
            log.warning(
                "DPVS of node %s has %d workers, this one %d: a FullNAT session of it would get its packets on another "
                "worker than the one that has its local port, so none is put in (wrong_worker)",
                replica.node, replica.workers, self._workers,
            )  # fmt: skip
        return _Copies(replica, refreshed_ns=now_ns, strange=strange)

    def _contest(self, ownership: Ownership, c: _Copies, slots: Slots, records: Records, stands: Bools) -> Bools:
        """Which of n sessions of a peer stand in our table too, and are theirs. ``stands``: a copy of it is here."""
        present = c.replica.present[slots]
        ownership.hear(records["claim"][present])
        check = np.flatnonzero(present & ((carried(records) & ~stands) | c.contested[slots]))
        c.contested[slots] = False
        give = np.zeros(len(slots), np.bool_)
        if len(check):
            give[check] = ownership.judge(pick(records, check), c.replica.node_id) == THEIRS
        return give

    @staticmethod
    def _standing(c: _Copies, slots: Slots) -> Records:
        """What finds the copies of these slots again: their tuples, as they were put in."""
        standing = np.zeros(len(slots), RECORD)
        standing.view(np.uint64).reshape(len(slots), -1)[:, _FIRST:_LAST] = c.installed[slots]
        standing["timeout_ms"] = MIN_COPY_TIMEOUT_MS
        return standing

    def _submit(self, c: _Copies, slots: Slots, ops: npt.NDArray[np.uint8], records: Records) -> None:
        first = _first(slots)
        c.busy[slots[first]] += 1
        c.busy[slots[~first]] += 1
        size = self._agent.max_records
        for begin in range(0, len(slots), size):
            part = slice(begin, begin + size)
            batch = _Batch(c, slots[part], ops[part], records[part])
            batch.sent = self._executor.submit(self._agent.submit, batch.ops, batch.records)
            self._batches.append(batch)

    def _refresh(self, c: _Copies, now_ns: int) -> None:
        """Once in ``refresh_ns``, every copy whose owner's link is up is put in again, which restarts its timer.

        Without the owner, what may stand on several workers is looked at: a copy that carries traffic ends the others.
        That has to be seen before it ends, so it is done more often.
        """
        elapsed, slots = now_ns - c.refreshed_ns, c.replica.slots
        room = self._room() // 2
        if elapsed < REFRESH_STEP_NS or room == 0:
            return
        period = self._refresh_ns
        if not c.replica.link_up and np.count_nonzero(c.has) <= LOOK_MANY:
            period //= LOOK_SHARE
        owed = share = min(slots, slots * elapsed // period)
        while share > 0 and room > 0:
            end = min(c.cursor + min(share, 1 << 16), slots)
            look = np.arange(c.cursor, end)
            idle = c.busy[look] == 0
            if c.replica.link_up:
                due = look[(c.has[look] | c.retry[look]) & idle]
            else:
                head = c.installed[look, 0]
                local = (head >> _MODE_SHIFT & np.uint64(0xFF)) == FNAT
                template = (head >> _FLAGS_SHIFT & np.uint64(TEMPLATE)) != 0
                due = look[c.has[look] & idle & ~local & ~template & (c.code[look] != abi.Code.LIVE)]
                c.replica.pending.mark(look[c.heir[look] & idle])
            if len(due) > room:
                due = due[:room]
                end = int(due[-1]) + 1
            share -= end - c.cursor
            room -= len(due)
            c.cursor = end % slots
            if c.replica.link_up:
                self._send(c, due)
            elif len(due):
                self._submit(c, due, np.full(len(due), abi.RecordOp.CHECK, np.uint8), self._standing(c, due))
        done_ns = (owed - share) * period // slots  # what there was no room for stays owed
        c.refreshed_ns = max(c.refreshed_ns + done_ns, now_ns - period)
