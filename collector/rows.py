# SPDX-License-Identifier: GPL-2.0-or-later
"""The loops over rows that every change goes through, compiled.

Rules:
- Plain Python, compiled by Cython: ``rows.pxd`` beside it says what the types are, and nothing else is needed to make C
  of it. Ticks are many and small (a few sessions), and a numpy call costs the same for one session as for a hundred: a
  step of a dozen calls becomes one loop here.
- The arrays belong to whoever makes one of these objects; they are looked up once, not at each call. Nothing is
  allocated here, and nothing is decided that is not decided for each row by itself.
- Bounds are checked where a call begins, for all of its rows at once (``_inside``, ``_room``): an index that is wrong
  raises IndexError here as anywhere. Inside the loops nobody looks any more, which makes them three times as fast.
- Flags (numpy bool) come as their uint8 view. ``words`` are rows of records, (n, 18) uint64, see ``record.RECORD``.
- It is only to be used compiled: numbers are C integers that wrap, which numpy's are not. ``require_compiled`` says so.
"""

import numpy as np
import numpy.typing as npt

from probes.errors import DpvsProbeError

from . import notes, record

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

# Names of our own for what the other modules say, so that they can be C integers here.
_AF_INET, _AF_INET6, _TCP = record.AF_INET, record.AF_INET6, record.TCP
_NONE, _SYN_SENT, _SYN_RECV, _SYNACK = record.NONE, record.SYN_SENT, record.SYN_RECV, record.SYNACK
_HASHED, _INJECTED, _ONE_PACKET = record.HASHED, record.INJECTED, record.ONE_PACKET
_INACTIVE = record.INACTIVE
_ANY_MODE, _ANY_WORKER = record.UNKNOWN_MODE, record.UNKNOWN_WORKER
_WATCHED, _HEARD, _CHANGED = notes.WATCHED, notes.HEARD, notes.CHANGED
_ANNOUNCED, _DOUBTED, _COPY = notes.ANNOUNCED, notes.DOUBTED, notes.COPY
_CHANGE, _OWED, _FRESH = notes.CHANGE, notes.OWED, notes.FRESH
_CREATE = 1  # kind of an event
_AHEAD = 64  # rows fetched at once
_HALF, _NEGATIVE = 0xFFFFFFFF, 0x80000000
_MODE_BITS, _WORKER_BITS, _PADDING_BITS = 0xFF000000, 0xFF00000000, 0xFFFFFFFFFFFFFF00
_TIMEOUT_WORKER_BITS = 0xFFFFFFFFFF
_SECONDS_MAX = 0xFFFFFFFF // 1000
# Of word 1: families and protocol, and the flags with which DPVS makes another sort of session.
_SORT = 0xFFFFFF | (record.TEMPLATE | record.ONE_PACKET) << 48


class NotCompiled(DpvsProbeError):
    help_text = "Run `./scripts/setup` in a source tree, or install the wheel: pip compiles what has to be compiled."


def _room(enough: bool) -> None:
    """Raise IndexError where an array is shorter than what is to be done with it."""
    if not enough:
        raise IndexError("arrays of sizes that do not fit")


def _inside(slots: I64, limit: int) -> None:
    """Raise IndexError unless all of n slots are from 0 to before ``limit``."""
    outside = 0
    for i in range(slots.shape[0]):
        outside |= slots[i] < 0 or slots[i] >= limit
    if outside:
        raise IndexError(f"a slot that is not among {limit}")


def require_compiled() -> None:
    """Raise NotCompiled where this module is not machine code."""
    if __file__.endswith(".py"):
        raise NotCompiled(f"{__file__} is not compiled")


class Conversion:
    """How one of DPVS's sessions, as it is read, becomes a record."""

    def __init__(self, halves: I64, bytes_: I64, shorts: I64, words: I64, addresses: U64, modes: U8) -> None:
        """Where things are in a session, counted in numbers of their own size.

        ``halves``: (13, 2) the halves of words 2 to 9 and 12 to 16 of a record, 4 bytes each; ``bytes_``: af, af_out,
        proto, wscale_vs, wscale_rs, pp_version, pp_sent; ``shorts``, 2 bytes: state, flags, cport, vport, lport, dport;
        ``words``, 8 bytes: transmit function, timeout in seconds; ``addresses``, ``modes``: which transmit function is
        which mode.
        """
        _room(
            halves.shape[0] == 13 and halves.shape[1] == 2 and bytes_.shape[0] == 7 and shorts.shape[0] == 6
            and words.shape[0] == 2 and addresses.shape[0] == modes.shape[0]
        )  # fmt: skip
        places = [(halves.ravel(), 4), (bytes_, 1), (shorts, 2), (words, 8)]
        _room(all(int(where.min()) >= 0 for where, _ in places))
        self.width = max((int(where.max()) + 1) * size for where, size in places)
        self.halves, self.bytes_, self.shorts, self.words = halves, bytes_, shorts, words
        self.addresses, self.modes = addresses, modes
        self.into(np.zeros(18, np.uint64))
        self.read(np.zeros((0, 8), np.uint64))

    def into(self, row: U64) -> None:
        """Where ``row`` puts its record from now on: (18,)."""
        _room(row.shape[0] == 18)
        self.out = row

    def read(self, conns: U64) -> None:
        """n sessions as they were read, (n, any) words; ``row`` looks at these from now on."""
        _room(conns.shape[0] == 0 or conns.shape[1] * 8 >= self.width)
        self.conns8, self.conns16 = conns.view(np.uint8), conns.view(np.uint16)
        self.conns32, self.conns64 = conns.view(np.uint32), conns

    def byte(self, i: int, k: int) -> int:
        """One of ``bytes_``."""
        value: int = self.conns8[i, self.bytes_[k]]
        return value

    def short(self, i: int, k: int) -> int:
        """One of ``shorts``."""
        value: int = self.conns16[i, self.shorts[k]]
        return value

    def half(self, i: int, k: int) -> int:
        """One word of ``halves``."""
        low: int = self.conns32[i, self.halves[k, 0]]
        high: int = self.conns32[i, self.halves[k, 1]]
        return low | high << 32

    def row(self, i: int, slot: int) -> None:
        """Make a record of session ``i``, but for its generation and its worker. Each word is put together before it is
        stored: to load what was stored in pieces takes the processor ten times as long.
        """
        mode = _ANY_MODE
        xmit = self.conns64[i, self.words[0]]
        for k in range(self.addresses.shape[0]):
            if self.addresses[k] == xmit:
                mode = self.modes[k]
        seconds = self.conns64[i, self.words[1]]
        timeout = seconds * 1000 if seconds <= _SECONDS_MAX else _HALF
        af, af_out = self.byte(i, 0), self.byte(i, 1)
        self.out[0] = slot
        self.out[1] = (
            af | af_out << 8 | self.byte(i, 2) << 16 | mode << 24 | self.short(i, 0) << 32 | self.short(i, 1) << 48
        )  # fmt: skip
        for k in range(8):
            word = self.half(i, k)
            if (af if k < 4 else af_out) == _AF_INET:  # DPVS leaves rubbish above an IPv4 address
                word = 0 if k & 1 else word & _HALF
            self.out[2 + k] = word
        self.out[10] = self.short(i, 2) | self.short(i, 3) << 16 | self.short(i, 4) << 32 | self.short(i, 5) << 48
        self.out[11] = (
            timeout | _ANY_WORKER << 32 | self.byte(i, 3) << 40 | self.byte(i, 4) << 48 | self.byte(i, 5) << 56
        )  # fmt: skip
        for k in range(8, 13):
            self.out[4 + k] = self.half(i, k)
        self.out[17] = self.byte(i, 6)

    def rows(self, slots: I64, out: U64) -> None:
        """Records of all of them to ``out``, (n, 18) words."""
        n = slots.shape[0]
        _room(self.conns64.shape[0] >= n and out.shape[0] >= n and out.shape[1] == 18)
        for i in range(slots.shape[0]):
            self.row(i, slots[i])
            for w in range(18):
                out[i, w] = self.out[w]


class Rows:
    """The rows of a session table, and what the last calls changed in it."""

    def __init__(
        self, words: U64, present: U8, shared: U8, born_ns: I64, compare: U64, row: U64, changed: I64, fresh: U8
    ) -> None:  # fmt: skip
        """``compare``: (18,) bits that make a row a changed one; ``row``: (18,) scratch; ``changed``: (5, n) and
        ``fresh``: (n,), room for what n rows change: slots created, updated and deleted, slots that peers are to hear
        of, since when, and whether each of those is a new generation.
        """
        n = words.shape[0]
        _room(
            words.shape[1] == compare.shape[0] == row.shape[0] == 18 and changed.shape[0] == 5
            and present.shape[0] == shared.shape[0] == born_ns.shape[0] == n and changed.shape[1] == fresh.shape[0]
        )  # fmt: skip
        self.words, self.present, self.shared, self.born_ns, self.compare = words, present, shared, born_ns, compare
        self.row_, self.changed, self.fresh = row, changed, fresh
        self.frozen = False
        self.claim = 0  # of what becomes ours; one more where it was carried on from another node
        self.created = self.updated = self.deleted = self.marked = self.more = 0
        self.fetched = 0

    def begin(self) -> None:
        """Forget what was changed so far; to be called before n rows."""
        self.created = self.updated = self.deleted = self.marked = self.more = 0

    def may(self, slots: I64) -> None:
        """Raise IndexError unless n rows of these slots may be changed now."""
        n = slots.shape[0]
        _inside(slots, self.words.shape[0])
        _room(max(self.created, self.updated, self.deleted, self.marked) + n <= self.fresh.shape[0])

    def apply(self, new: U64, slots: I64, valid: U8, renewed: U8, worker: U8, since_ns: I64, now_ns: int) -> None:
        """n rows, see ``SessionTable.apply``."""
        n = slots.shape[0]
        self.may(slots)
        _room(new.shape[0] == valid.shape[0] == renewed.shape[0] == worker.shape[0] == since_ns.shape[0] == n)
        _room(new.shape[1] == 18)
        for i in range(slots.shape[0]):
            if i % _AHEAD == 0:
                self.fetch(slots, i)
            if valid[i]:
                for w in range(18):
                    self.row_[w] = new[i, w]
            self.one(slots[i], valid[i], renewed[i], worker[i], since_ns[i], now_ns)

    def fetch(self, slots: I64, first: int) -> None:
        """Touch the next rows: the processor waits for all of them at once instead of for each in its turn."""
        seen = self.fetched
        for i in range(first, min(first + _AHEAD, slots.shape[0])):
            slot = slots[i]
            seen ^= self.words[slot, 0] ^ self.words[slot, 8] ^ self.words[slot, 17]
            seen ^= self.present[slot] ^ self.shared[slot]
        self.fetched = seen

    def one(self, slot: int, valid: bool, renewed: bool, worker: int, since_ns: int, now_ns: int) -> bool:
        """Make one row what ``row`` says, or end its session; whether that changed anything."""
        if self.frozen:
            return False
        told = self.shared[slot]
        fresh = False
        if not valid:
            if not self.present[slot]:
                return False
            self.present[slot] = self.shared[slot] = 0
            self.more -= 1
            self.changed[2, self.deleted] = slot
            self.deleted += 1
        else:
            lcore = (self.words[slot, 11] >> 32) & 0xFF
            differs = False
            if not self.present[slot]:
                fresh = True
                self.more += 1
            else:
                fresh = renewed or (self.words[slot, 1] ^ self.row_[1]) & _SORT != 0
                for w in range(2, 11):
                    if self.words[slot, w] != self.row_[w]:
                        fresh = True
            if fresh:
                lcore = worker
            else:
                for w in range(1, 18):
                    if (self.words[slot, w] ^ self.row_[w]) & self.compare[w]:
                        differs = True
                if worker not in (_ANY_WORKER, lcore):
                    lcore = worker
                    differs = True
                if not differs:
                    return False
            generation, claim = self.words[slot, 0] >> 32, self.words[slot, 17] >> 32
            if fresh:
                claim = self.claim + 1 if (self.row_[1] >> 48) & _INJECTED else self.claim
                generation = (generation + 1) & _HALF
                if generation == 0:  # after 2**32 sessions in one slot: 0 stays "never used"
                    generation = 1
            for w in range(1, 18):
                self.words[slot, w] = self.row_[w]
            self.words[slot, 0] = (generation << 32) | slot
            self.words[slot, 11] = (self.row_[11] & ~_WORKER_BITS) | (lcore << 32)
            # Rubbish in the padding would go out to peers.
            self.words[slot, 17] = (self.row_[17] & ~_PADDING_BITS) | (claim << 32)
            self.shared[slot] = not (self.row_[1] >> 48) & _ONE_PACKET  # record.replicable
            if fresh:
                self.born_ns[slot] = now_ns
                self.present[slot] = 1
                self.changed[0, self.created] = slot
                self.created += 1
            else:
                self.changed[1, self.updated] = slot
                self.updated += 1
        if told or self.shared[slot]:
            self.changed[3, self.marked] = slot
            self.changed[4, self.marked] = since_ns
            self.fresh[self.marked] = fresh
            self.marked += 1
        return True


class Looks:
    """What the collector notes on each slot between two looks at it."""

    def __init__(
        self, rows: Rows, conversion: Conversion, notes: U8, since_ns: I64, until_ns: I64, lcore: U8, prints: U32
    ) -> None:
        """``since_ns``: first event not acted on yet, 0 without one; ``until_ns``: a young session is looked at each
        tick until then; ``lcore``: from a creation not acted on yet; ``prints``: what the scan compares.
        """
        self.rows, self.conversion = rows, conversion
        n = self.rows.words.shape[0]
        _room(notes.shape[0] == since_ns.shape[0] == until_ns.shape[0] == lcore.shape[0] == prints.shape[0] >= n)
        self.notes, self.since_ns, self.until_ns, self.lcore = notes, since_ns, until_ns, lcore
        self.prints = prints
        self.fetched = 0
        self.events_created = self.events_freed = self.events_unknown_slot = 0
        self.torn = 0
        self.malformed = self.one_packet = self.never_hashed = self.renewed_by_event = self.copies = self.adopted = 0

    def hear(self, events: U64, slots: I64, tids: U32, lcores: U8, heard: I64) -> int:
        """Note what n events, (n, 3) of dtype EVENT, say of their slots; how many distinct slots they name.

        ``slots``: -1 for addresses of no session; ``tids`` ascending, with their ``lcores``; ``heard``: room for n.
        """
        n, limit, found = slots.shape[0], self.notes.shape[0], 0
        _room(events.shape[0] == n and events.shape[1] >= 3 and heard.shape[0] >= n)
        _room(tids.shape[0] == lcores.shape[0])
        for i in range(slots.shape[0]):
            slot = slots[i]
            if slot < 0:
                self.events_unknown_slot += 1
                continue
            if slot >= limit:
                raise IndexError(f"slot {slot} of {limit}")
            time_ns = events[i, 1]
            tid = events[i, 2] & _HALF
            created = events[i, 2] >> 32 == _CREATE
            if self.since_ns[slot] == 0:
                self.since_ns[slot] = time_ns
            note = self.notes[slot] & ~_ANNOUNCED  # the last event counts
            if time_ns > self.rows.born_ns[slot]:
                note |= _CHANGED
                if created:
                    note |= _ANNOUNCED
            if created:
                self.events_created += 1
                lcore = _ANY_WORKER
                for k in range(tids.shape[0]):
                    if tids[k] == tid:
                        lcore = lcores[k]
                self.lcore[slot] = lcore
            else:
                self.events_freed += 1
            if not note & _HEARD:
                heard[found] = slot
                found += 1
            self.notes[slot] = note | _HEARD
        return found

    def look(self, whole: U8, slots: I64, now_ns: int, read_ns: int, young_ns: int, again: I64) -> int:
        """Bring n distinct slots into the table, whose sessions ``conversion`` was just told to read; how many of them
        to look at again soon.

        ``whole``: which were not torn; ``read_ns``: when the last of them had been read; ``again``: room for n slots.
        ``rows.begin`` goes before it.
        """
        n, found = slots.shape[0], 0
        self.rows.may(slots)
        _room(whole.shape[0] == self.conversion.conns64.shape[0] == n and again.shape[0] >= n)
        for i in range(n):
            if i % _AHEAD == 0:
                self.rows.fetch(slots, i)
                self.fetch(slots, i)
            slot = slots[i]
            self.prints[slot] = 0
            self.notes[slot] &= ~_HEARD
            if not whole[i]:
                self.torn += 1
            if not whole[i] or self._one(i, slot, now_ns, read_ns, young_ns):
                again[found] = slot
                found += 1
        return found

    def fetch(self, slots: I64, first: int) -> None:
        """Like ``Rows.fetch``."""
        seen = self.fetched
        for i in range(first, min(first + _AHEAD, slots.shape[0])):
            slot = slots[i]
            seen ^= self.notes[slot] ^ self.lcore[slot] ^ self.prints[slot]
            seen ^= self.since_ns[slot] ^ self.until_ns[slot] ^ self.rows.born_ns[slot]
        self.fetched = seen

    def _one(self, i: int, slot: int, now_ns: int, read_ns: int, young_ns: int) -> bool:
        """One slot; whether it has to be looked at again soon."""
        rows, record = self.rows, self.conversion
        record.row(i, slot)
        head = record.out[1]
        flags = head >> 48
        note = self.notes[slot]
        present = rows.present[slot]
        known = self._family(head & 0xFF) and self._family((head >> 8) & 0xFF)
        copy = flags & _HASHED and self._waiting()
        valid = flags & _HASHED and not copy and known
        if flags & _HASHED and not known:
            self.malformed += 1

        gone = present and not valid
        sure = gone and (copy or note & (_CHANGED | _DOUBTED))
        awaited = False
        if not valid and not copy and note & _ANNOUNCED:
            if flags & _ONE_PACKET:
                self.one_packet += 1
            elif now_ns - self.since_ns[slot] > young_ns:
                self.never_hashed += 1
            else:
                awaited = True
        if valid or sure:
            renewed = note & _CHANGED != 0
            since = self.since_ns[slot]
            if renewed and present and valid:
                self.renewed_by_event += 1
            born = rows.created
            if rows.one(slot, valid, renewed, self.lcore[slot], since if since else now_ns, read_ns) and valid:
                self.until_ns[slot] = now_ns + young_ns
                if flags & _INJECTED and rows.created != born:
                    self.adopted += 1

        if note & _COPY:
            self.copies -= 1
        left = note & _WATCHED
        if copy:
            self.copies += 1
            left |= _COPY
        if gone and not sure:
            left |= _DOUBTED
        if awaited:
            left |= _ANNOUNCED
        else:
            self.since_ns[slot] = 0
            self.lcore[slot] = _ANY_WORKER
        self.notes[slot] = left
        if (gone and not sure) or awaited:
            return True
        return valid and self.until_ns[slot] > now_ns and self._unsettled()

    def _waiting(self) -> bool:
        """``record.waiting``."""
        head = self.conversion.out[1]
        if not (head >> 48) & _INJECTED:
            return False
        state = (head >> 32) & 0xFFFF
        if state == _NONE:
            return True
        return bool((head >> 16) & 0xFF == _TCP and state == _SYNACK and (head >> 48) & _INACTIVE != 0)

    def _family(self, number: int) -> bool:
        return number in (_AF_INET, _AF_INET6)

    def _unsettled(self) -> bool:
        """Whether the state or the sequence delta of this session will change at any moment without an event."""
        record = self.conversion
        if (record.out[1] >> 16) & 0xFF != _TCP:
            return False
        state = (record.out[1] >> 32) & 0xFFFF
        if state in (_NONE, _SYN_SENT, _SYN_RECV, _SYNACK):
            return True
        # The first segment to the real server carries the PROXY header and moves the delta (proto_tcp.c:
        # tcp_in_add_toa).
        return bool(record.out[11] >> 56 != 0 and record.out[17] == 0)


class Marks:
    """The marks of one reader of a table, see ``table.Dirty``."""

    def __init__(self, marks: U8, since_ns: I64) -> None:
        _room(marks.shape[0] == since_ns.shape[0])
        self.marks, self.since_ns = marks, since_ns
        self.overlap = 0  # slots with both kinds of mark, since it was asked
        self.fetched = 0

    def one(self, slot: int, since_ns: int, fresh: bool) -> bool:
        """Mark one slot as changed; whether it was not waiting yet."""
        before = self.marks[slot]
        self.marks[slot] = before | (_CHANGE | _FRESH if fresh else _CHANGE)
        if before & _CHANGE:
            self.since_ns[slot] = min(self.since_ns[slot], since_ns)
            return False
        self.since_ns[slot] = since_ns
        if before & _OWED:
            self.overlap += 1
        return True

    def mark(self, slots: I64, since_ns: I64, fresh: U8, added: I64) -> int:
        """n distinct slots; how many were not waiting yet, now in ``added``."""
        n, found = slots.shape[0], 0
        _inside(slots, self.marks.shape[0])
        _room(since_ns.shape[0] == fresh.shape[0] == n and added.shape[0] >= n)
        for i in range(slots.shape[0]):
            if self.one(slots[i], since_ns[i], fresh[i]):
                added[found] = slots[i]
                found += 1
        return found

    def fetch(self, rows: Rows, first: int) -> None:
        """Like ``Rows.fetch``."""
        seen = self.fetched
        for i in range(first, min(first + _AHEAD, rows.marked)):
            seen ^= self.marks[rows.changed[3, i]] ^ self.since_ns[rows.changed[3, i]]
        self.fetched = seen

    def mark_rows(self, rows: Rows, added: I64) -> int:
        """The same of what the last calls changed in a table."""
        found = 0
        _room(rows.words.shape[0] <= self.marks.shape[0] and added.shape[0] >= rows.marked)
        for i in range(rows.marked):
            if i % _AHEAD == 0:
                self.fetch(rows, i)
            if self.one(rows.changed[3, i], rows.changed[4, i], rows.fresh[i]):
                added[found] = rows.changed[3, i]
                found += 1
        return found

    def take(self, slots: I64, since_ns: I64, fresh: U8) -> int:
        """Take the marks off n slots that changed and say what they were; how many of them a full sync owed too."""
        n, both = slots.shape[0], 0
        _inside(slots, self.marks.shape[0])
        _room(since_ns.shape[0] == fresh.shape[0] == n)
        for i in range(slots.shape[0]):
            slot = slots[i]
            before = self.marks[slot]
            self.marks[slot] = 0
            since_ns[i] = self.since_ns[slot]
            fresh[i] = before & (_OWED | _FRESH) != 0
            if before & _OWED:
                both += 1
        return both


class Copies:
    """The rows of another node's table."""

    def __init__(self, words: U64, present: U8, named: U8, compare: U64) -> None:
        _room(words.shape[1] == compare.shape[0] == 18 and words.shape[0] == present.shape[0] == named.shape[0])
        self.words, self.present, self.named, self.compare = words, present, named, compare
        self.created = self.updated = self.stale = self.more = 0
        self.fetched = 0

    def fetch(self, new: U64, first: int) -> None:
        """Like ``Rows.fetch``."""
        seen = self.fetched
        for i in range(first, min(first + _AHEAD, new.shape[0])):
            slot = new[i, 0] & _HALF
            seen ^= self.words[slot, 0] ^ self.words[slot, 8] ^ self.words[slot, 17] ^ self.present[slot]
        self.fetched = seen

    def put(self, new: U64, naming: bool, changed: I64, fresh: U8) -> int:
        """Take n rows of distinct slots, see ``Replica.put``; how many changed anything, their slots in ``changed``.

        ``naming``: note them in ``named``; ``fresh``: which of the changed are new generations.
        """
        n, limit, found, outside = new.shape[0], self.words.shape[0], 0, 0
        self.created = self.updated = self.stale = self.more = 0
        _room(new.shape[1] == 18 and changed.shape[0] >= n and fresh.shape[0] >= n)
        for i in range(n):
            outside |= new[i, 0] & _HALF >= limit
        if outside:
            raise IndexError(f"a slot that is not among {limit}")
        for i in range(n):
            if i % _AHEAD == 0:
                self.fetch(new, i)
            slot = new[i, 0] & _HALF
            known = self.words[slot, 0] >> 32
            ahead = ((new[i, 0] >> 32) - known) & _HALF
            was = self.present[slot]
            if known != 0 and (ahead >= _NEGATIVE or (ahead == 0 and not was)):
                self.stale += 1
                continue
            anew = not was or ahead != 0
            differs = anew
            if not anew:
                for w in range(1, 18):
                    if (self.words[slot, w] ^ new[i, w]) & self.compare[w]:
                        differs = True
            for w in range(18):
                self.words[slot, w] = new[i, w]
            if not was:
                self.present[slot] = 1
                self.more += 1
            if naming:
                self.named[slot] = 1
            if differs:
                if anew:
                    self.created += 1
                else:
                    self.updated += 1
                changed[found] = slot
                fresh[found] = anew
                found += 1
        return found
