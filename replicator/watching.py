# SPDX-License-Identifier: GPL-2.0-or-later
"""Each creation, change and end of a session, for who watches: a buffer for each watcher, filled by the node's rounds.

Rules: a round copies the rows it changed into the buffers, and nothing more: filters are applied, and lines packed,
when a watcher's turn comes, and words for people are made in the watcher's own process. A buffer holds so many events
and no more; what finds it full is counted, and the watcher is told. An event has the row as it was right after that
round. A slot that was used again within a round is one creation; it ends what was there before.
"""

import asyncio
import base64
import ipaddress
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from collector import record
from collector.record import RECORD, WORDS, Bools, Records, Slots, Words, words
from collector.table import Applied, SessionTable
from probes.errors import DpvsProbeError
from replicator import query
from replicator.admin import Line
from replicator.wire import SCHEMA

ROOM = 1 << 16  # events of one watcher that wait, 144 bytes each
MAX_WATCHERS = 4
LINE_EVENTS = 512
EACH_TURN = 8192  # events filtered and packed before others have their turn
PAUSE_S = 0.05  # between two looks at a buffer
BEAT_NS = 2_000_000_000


class Kind(IntEnum):
    """What happened to a session."""

    CREATE = 0
    UPDATE = 1
    END = 2


KINDS = tuple(kind.name.lower() for kind in Kind)


class TooMany(DpvsProbeError):
    """No more watchers."""

    help_text = "End one of the others."


class OtherVersion(DpvsProbeError):
    """The attach packs sessions in another way than this command reads them."""

    help_text = "The attach was started by another version of dpvs-probe: use that one, or start the attach again."


class End(NamedTuple):
    """One end of a session: an address or a subnet, and a port, where given."""

    family: int
    net: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]
    port: int | None


def end_of(text: str) -> End:
    """``10.0.0.0/8``, ``10.0.0.1:80``, ``[fd00::1]:80``, ``:80`` as an End; raises BadFilter."""
    host, port = text, None
    if text.startswith("[") or text.count(":") == 1:
        host, _, number = text.rpartition(":") if not text.endswith("]") else (text, "", "")
        if number:
            if not (number.isascii() and number.isdigit() and int(number) < 1 << 16):
                raise query.BadFilter(f"{number!r} is not a port")
            port = int(number)
        host = host.removeprefix("[").removesuffix("]")
    if not host and port is not None:
        return End(0, np.zeros(16, np.uint8), np.zeros(16, np.uint8), port)
    try:
        net = ipaddress.ip_network(host, strict=False)
    except ValueError:
        raise query.BadFilter(f"{text!r} is not ADDRESS[/PREFIX][:PORT]") from None
    family = record.AF_INET if net.version == 4 else record.AF_INET6
    net_bytes, mask = (
        np.frombuffer(address.packed.ljust(16, b"\0"), np.uint8) for address in (net.network_address, net.netmask)
    )
    return End(family, net_bytes, mask, port)


@dataclass(frozen=True)
class Filter:
    """Which events: all that is given must hold."""

    kinds: tuple[Kind, ...] = tuple(Kind)
    proto: int | None = None
    state: str | None = None
    ends: tuple[tuple[str, End], ...] = ()  # of which of the four, by the first letter of the record's fields

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> "Filter":
        """The filter of a request; raises BadFilter. Fields that are absent or None do not filter."""
        for name in ("proto", "state", *ENDS):
            if request.get(name) is not None and not isinstance(request[name], str):
                raise query.BadFilter(f"{name} {request[name]!r} is not a text")
        kinds = request.get("kinds") or KINDS
        if not isinstance(kinds, list | tuple) or not set(kinds) <= set(KINDS):
            raise query.BadFilter(f"{kinds!r} are not some of {', '.join(KINDS)}")
        proto, state = request.get("proto"), request.get("state")
        wanted = cls(
            tuple(Kind(KINDS.index(kind)) for kind in dict.fromkeys(kinds)),
            query.protocol_number(proto) if proto is not None else None,
            state,
            tuple((letter, end_of(request[name])) for name, letter in ENDS.items() if request.get(name) is not None),
        )
        wanted.matches(np.zeros(0, np.uint8), np.zeros(0, RECORD))  # complains now
        return wanted

    def matches(self, kinds: npt.NDArray[np.uint8], records: Records) -> Bools:
        """Which of n events match, (n,) bool."""
        hit = np.isin(kinds, self.kinds)
        if self.proto is not None:
            hit &= records["proto"] == self.proto
        if self.state is not None:
            hit &= query.in_state(records, self.state)
        for letter, end in self.ends:
            if end.family:
                family = records["af" if letter in "cv" else "af_out"]
                hit &= (family == end.family) & ((records[f"{letter}addr"] & end.mask) == end.net).all(axis=1)
            if end.port is not None:
                hit &= records[f"{letter}port"] == end.port
        return hit


ENDS = {"client": "c", "service": "v", "local": "l", "real": "d"}


class Watcher:
    """What one watcher has not been told yet."""

    def __init__(self, wanted: Filter, room: int = ROOM) -> None:
        self._wanted, self._room = wanted, room
        self._waiting: deque[tuple[Kind, Words, int]] = deque()
        self.count = 0  # events that wait
        self.dropped = 0

    def put(self, kind: Kind, rows: Words, now_ns: int) -> None:
        """n events of one round; ``rows`` is not changed by anybody any more."""
        if self.count + len(rows) > self._room:
            self.dropped += len(rows)
            return
        self._waiting.append((kind, rows, now_ns))
        self.count += len(rows)

    def take(self) -> list[Line]:
        """Lines for what waits, or for the first part of it."""
        parts: list[tuple[Kind, Words, int]] = []
        taken = 0
        while self._waiting and taken < EACH_TURN:
            parts.append(self._waiting.popleft())
            taken += len(parts[-1][1])
        if not parts:
            return []
        self.count -= taken
        lengths = [len(rows) for _, rows, _ in parts]
        kinds = np.repeat(np.array([kind for kind, _, _ in parts], np.uint8), lengths)
        times = np.repeat(np.array([now_ns for _, _, now_ns in parts], np.int64), lengths)
        rows = np.concatenate([rows for _, rows, _ in parts])
        hit = np.flatnonzero(self._wanted.matches(kinds, rows.view(RECORD).reshape(len(rows))))
        return [
            {name: _text(array[hit[at : at + LINE_EVENTS]]) for name, array in _columns(kinds, times, rows)}
            for at in range(0, len(hit), LINE_EVENTS)
        ]


def _columns(
    kinds: npt.NDArray[np.uint8], times: npt.NDArray[np.int64], rows: Words
) -> tuple[tuple[str, npt.NDArray[Any]], ...]:
    return ("kinds", kinds), ("times", times), ("records", rows)


def _text(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode()


class Watchers:
    """All who watch one table."""

    def __init__(self, table: SessionTable) -> None:
        self._table = table
        self._all: list[Watcher] = []

    def __len__(self) -> int:
        return len(self._all)

    def add(self, wanted: Filter) -> Watcher:
        """One more; raises TooMany."""
        if len(self._all) >= MAX_WATCHERS:
            raise TooMany(f"{MAX_WATCHERS} watch already")
        self._all.append(Watcher(wanted))
        return self._all[-1]

    def remove(self, watcher: Watcher) -> None:
        """It is told no more."""
        self._all.remove(watcher)

    def note(self, applied: Applied, now_ns: int) -> None:
        """What one round changed."""
        for kind, slots in (
            (Kind.END, applied.deleted),
            (Kind.CREATE, applied.created),
            (Kind.UPDATE, applied.updated),
        ):
            if len(slots):
                rows = self._rows(slots)
                for watcher in self._all:
                    watcher.put(kind, rows, now_ns)

    def _rows(self, slots: Slots) -> Words:
        return words(self._table.rows(slots))


async def watch(
    watchers: Watchers, wanted: Filter, clock: Callable[[], int], over: Callable[[], bool]
) -> AsyncGenerator[list[Line], None]:
    """Blocks of lines for one more watcher, for as long as they are taken and it is not ``over``; raises TooMany."""
    watcher = watchers.add(wanted)
    try:
        yield [head(clock(), time.time_ns())]
        beat_ns, dropped = clock(), 0
        while not over():
            lines = watcher.take()
            if watcher.dropped != dropped or clock() - beat_ns >= BEAT_NS:
                beat_ns, dropped = clock(), watcher.dropped
                lines.append({"dropped": dropped})
            if lines:
                yield lines
            await asyncio.sleep(0 if watcher.count else PAUSE_S)
    finally:
        watchers.remove(watcher)


def head(now_ns: int, wall_ns: int) -> Line:
    """The first line for a watcher: how to read the others."""
    return {"schema": SCHEMA, "wall_ns": wall_ns - now_ns}


class Reader:
    """The other side: events out of a watcher's lines. ``dropped``: how many there was no room for, so far."""

    def __init__(self, first: Line) -> None:
        """Raises OtherVersion."""
        if first.get("schema") != SCHEMA:
            raise OtherVersion("sessions come in a form that is not known here")
        self._wall_ns = int(first["wall_ns"])
        self.dropped = 0

    def read(self, line: Line) -> Iterator[tuple[int, str, Line]]:
        """(wall clock in ns, kind of the event, session as ``query.describe`` has it) of each event of a line."""
        self.dropped = line.get("dropped", self.dropped)
        if "records" not in line:
            return
        kinds, times, rows = (
            np.frombuffer(base64.b64decode(line[name]), dtype)
            for name, dtype in (("kinds", np.uint8), ("times", np.int64), ("records", np.uint64))
        )
        records = rows.reshape(-1, WORDS).view(RECORD).reshape(len(kinds))
        sessions = query.describe(records, query.OWN)
        for kind, time_ns, session in zip(kinds.tolist(), times.tolist(), sessions, strict=True):
            yield time_ns + self._wall_ns, KINDS[kind], session
