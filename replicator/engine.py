# SPDX-License-Identifier: GPL-2.0-or-later
"""What both ends of a link have in common: frames in and out, introductions, heartbeats, the end and its reason.

Rules: see link.py. An engine is fed bytes and time and asked for bytes, events and the next deadline.
"""

from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from . import wire
from .codec import Buffer
from .replica import Replica
from .transport.interface import Loss
from .wire import Frame, FrameReader, Hello, Opcode, ProtocolError, Reason, Role, SyncReason

MS, SECOND = 1_000_000, 1_000_000_000


@dataclass(frozen=True)
class LinkSettings:
    """Times in ns, sizes in bytes."""

    batch_changes: int = 32  # that many changes go out without waiting
    batch_ns: int = 100 * MS  # nor does a change wait longer than that
    body_bytes: int = 192 << 10  # of one frame, as far as there is that much to say
    window_bytes: int = 4 << 20  # not acknowledged, at most
    window_frames: int = 1024
    heartbeat_ns: int = SECOND
    down_ns: int = 3 * SECOND  # without any frame from the peer
    compress: bool | None = None  # None: when it pays
    zstd: bool = False  # by Zstandard, where the peer understands it, instead of LZ4


class Up(NamedTuple):
    """Both sides have introduced themselves."""

    peer: Hello
    full_sync: SyncReason | None  # sender's side: why all is sent again; None when the link goes on where it was


class Syncing(NamedTuple):
    """A full sync begins (sender)."""

    reason: SyncReason


class Synced(NamedTuple):
    """A full sync is in (receiver), or acknowledged (sender)."""

    sessions: int
    took_ns: int
    replaced: Replica | None = None  # receiver's side: of an earlier run, now let go


class Down(NamedTuple):
    """The link is over."""

    why: str
    refused: int | None = None  # wire.Reason, when one side refused the other
    by_peer: bool = False
    loss: Loss = Loss.ENDED


Event = Up | Syncing | Synced | Down


class State(Enum):
    """Of one connection."""

    IDLE = "idle"  # not connected
    HELLO = "introducing"  # waiting for the peer's HELLO
    SYNCING = "syncing"  # a full sync is under way, or waits for the table to be complete
    LIVE = "live"
    CLOSED = "closed"


class Engine:
    """What both ends share: frames, time, the end."""

    _COUNTERS: tuple[str, ...] = ()

    def __init__(self, me: Hello, settings: LinkSettings) -> None:
        self.me, self.settings = me, settings
        self.state = State.IDLE
        self.peer: Hello | None = None
        self.proven_node: str | None = None  # what the transport has proven: HELLO must say the same
        self.counters: dict[str, int] = dict.fromkeys(self._COUNTERS, 0)
        self._reader = FrameReader()
        self._ready: list[Buffer] = []
        self._events: deque[Event] = deque()
        self._heard_ns = self._said_ns = self._awake_ns = 0
        self._sequence = 0  # of the last frame that counts, sent or taken; a heartbeat says it

    @property
    def closed(self) -> bool:
        """Nothing more will come of this connection: write what ``outgoing`` gives, then close it."""
        return self.state in (State.CLOSED, State.IDLE)

    def next_event(self) -> Event | None:
        """The next thing worth a word to the operator."""
        return self._events.popleft() if self._events else None

    def receive(self, data: Buffer | bytearray, now_ns: int) -> None:
        """Bytes from the peer, in any pieces."""
        self._tick(now_ns)
        if self.closed:
            return
        self._reader.feed(data)
        try:
            while not self.closed and (frame := self._reader.next()) is not None:
                self.counters["frames_received"] += 1
                self._heard_ns = now_ns
                self._handle(frame, now_ns)
        except ProtocolError as error:
            self.counters["protocol_errors"] += 1
            self._refuse(Reason.PROTOCOL, str(error), now_ns)

    def outgoing(self, now_ns: int) -> list[Buffer]:
        """What to write now, in order. Call it after ``receive``, when something changed, and at ``next_deadline``."""
        self._tick(now_ns)
        if not self.closed:
            if now_ns - self._heard_ns >= self.settings.down_ns:
                self._end(
                    Down(f"the peer was silent for {self.settings.down_ns / SECOND:g} s", loss=Loss.SILENT), now_ns
                )
            else:
                self._produce(now_ns)
                if not self._ready and self.state is not State.HELLO and self._beat_due_ns <= now_ns:
                    self._ready.append(wire.pack(Opcode.HEARTBEAT, self._sequence))
        ready, self._ready = self._ready, []
        if ready:
            self._said_ns = now_ns
        return ready

    @property
    def wants_turn(self) -> bool:
        """``outgoing`` may have something to say, or ``next_event``, after what was just received."""
        return True

    def next_deadline(self, now_ns: int) -> int | None:
        """When ``outgoing`` has to be called even if nothing happens; None while there is no connection."""
        if self.closed:
            return now_ns if self._ready else None
        return min(self._heard_ns + self.settings.down_ns, self._beat_due_ns)

    @property
    def _beat_due_ns(self) -> int:
        return self._said_ns + self.settings.heartbeat_ns

    def _start(self, now_ns: int) -> None:
        self._reader = FrameReader()
        self._ready.clear()
        self._heard_ns = self._said_ns = self._awake_ns = now_ns
        self.peer = None
        self.state = State.HELLO

    def _tick(self, now_ns: int) -> None:
        # Time that we slept (a stopped process, a long scan) is not the peer's silence: its frames may lie waiting.
        slept = now_ns - self._awake_ns - self.settings.heartbeat_ns
        if slept > 0:
            self._heard_ns += slept
        self._awake_ns = now_ns

    def _refuse(self, reason: Reason, text: str, now_ns: int) -> None:
        self._ready.append(wire.pack_refuse(reason, text))
        self._end(Down(text, reason), now_ns)

    def _refused(self, frame: Frame, now_ns: int) -> None:
        reason, text = wire.parse_refuse(frame.body)
        self._end(Down(text, reason, by_peer=True), now_ns)

    def _end(self, event: Down, now_ns: int) -> None:
        self._events.append(event)
        self._let_go(now_ns)
        self.state = State.CLOSED

    def _check(self, hello: Hello, wanted: Role) -> tuple[Reason, str] | None:
        """What keeps us from talking to a peer, whichever side we are."""
        low, high = max(hello.versions[0], self.me.versions[0]), min(hello.versions[1], self.me.versions[1])
        if low > high:
            return Reason.VERSION, f"protocol {hello.versions[0]} to {hello.versions[1]} there, {wire.VERSION} here"
        if hello.role is not wanted:
            return Reason.ROLE, f"the peer is a {hello.role.name.lower()} as well"
        if hello.schema != self.me.schema:
            return Reason.SCHEMA, f"session records of schema {hello.schema:#010x} there, {self.me.schema:#010x} here"
        if hello.node_id == self.me.node_id:
            return Reason.SAME_NODE, f"both nodes are called '{hello.node}'"
        if self.proven_node is not None and hello.node != self.proven_node:
            return Reason.NOT_PROVEN, f"it says that it is '{hello.node}', its certificate says '{self.proven_node}'"
        return None

    def _handle(self, frame: Frame, now_ns: int) -> None:
        raise NotImplementedError

    def _produce(self, now_ns: int) -> None:
        raise NotImplementedError

    def _let_go(self, now_ns: int) -> None:
        raise NotImplementedError
