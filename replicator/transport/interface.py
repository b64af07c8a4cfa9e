# SPDX-License-Identifier: GPL-2.0-or-later
"""What every transport offers: ordered, reliable delivery of frames to one peer, and the loss of it noticed.

Rules: a transport moves bytes and knows nothing of what they mean. ``send`` waits while the peer takes nothing, so
the engine above is held back and nothing queues without bound. A dead peer is noticed within ``PEER_TIMEOUT_S``. After
``LinkLost`` a connection is good for nothing but ``close``; a new one is dialled. Each class is used from one asyncio
loop.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import NamedTuple, Protocol, runtime_checkable

from probes.errors import DpvsProbeError

PEER_TIMEOUT_S = 3
CROWDED, NOT_SET_UP = "crowded", "not_set_up"  # reasons to refuse that several transports have


class Loss(StrEnum):
    """How a connection was lost; names of counters."""

    ENDED = "ended"  # the peer closed it in order
    RESET = "reset"  # by the peer's death, by somebody on the way, by the network
    SILENT = "silent"  # nothing was heard, or nothing taken, for too long
    TAMPERED = "tampered"  # what came was not what the peer sent: changed, repeated, forged


class LinkLost(DpvsProbeError):
    """The connection to a peer is gone: closed, reset or silent for too long. ``why``: in words, without the peer."""

    help_text = "It is dialled again by itself; look at the peer if this repeats."

    def __init__(self, remote: str, why: str, loss: Loss = Loss.RESET) -> None:
        super().__init__(f"link with {remote} lost: {why}")
        self.why, self.loss = why, loss


class PeerUnreachable(DpvsProbeError):
    """A peer did not take our connection."""

    help_text = "Check that `dpvs-probe attach --listen` runs there, the address, the route and the firewall."


class CannotListen(DpvsProbeError):
    """Our own address cannot be listened on."""


class Way(NamedTuple):
    """``size``: bytes handed over that have not reached the peer's machine; ``open_ns``: for how long so far there were
    such bytes and it was not the peer that had no room for them.
    """

    size: int
    open_ns: int


class Connection(Protocol):
    """One link with one peer, established."""

    remote: str
    node: str | None  # the peer's name where the transport has proven it
    bytes_sent: int
    bytes_received: int

    async def send(self, frames: Iterable[bytes | memoryview]) -> None:
        """Hand frames over, in order; returns when there is room for more. Raises LinkLost."""

    async def receive(self) -> bytes:
        """What has come, at least one byte, not cut at frames; b"" when the peer closed in order. Raises LinkLost."""

    async def close(self) -> None:
        """Send what is buffered as far as a second allows, then end. Safe to call twice; raises nothing."""

    def on_the_way(self) -> Way | None:
        """What tells a slow way from a slow peer; None where nobody knows."""


@runtime_checkable
class Direct(Connection, Protocol):
    """One that can also be served without a task's turn, which costs a round of the loop each time."""

    @property
    def roomy(self) -> bool:
        """What is handed over now need not wait for room."""

    def send_now(self, frames: Iterable[bytes | memoryview]) -> None:
        """``send``, while it is roomy. Raises LinkLost."""

    def deliver(self, hear: Callable[[bytes], None] | None) -> None:
        """From now on call ``hear`` with what comes, as it comes; ``receive`` then only tells of the end. None: keep it
        for ``receive`` again.
        """


class Dialer(Protocol):
    """Makes connections to one peer."""

    address: str

    async def dial(self) -> Connection:
        """One attempt. Raises PeerUnreachable."""


class Listener(Protocol):
    """Takes connections from peers. ``refused``: how many came to nothing before they were one, by reason."""

    address: str
    refused: Counter[str]

    async def start(self) -> None:
        """Begin to listen. Raises CannotListen."""

    async def accept(self) -> Connection:
        """The next peer that dialled us."""

    async def close(self) -> None:
        """Listen no more; connections already accepted live on."""


class Backoff:
    """How long to wait before the next attempt: doubling, with jitter so that two nodes do not march in step."""

    def __init__(self, first_s: float = 0.1, most_s: float = 2.0, draw: Callable[[], float] = random.random) -> None:
        self._first_s, self._most_s, self._draw = first_s, most_s, draw
        self._next_s = first_s

    def reset(self) -> None:
        """The last attempt worked."""
        self._next_s = self._first_s

    def wait_s(self) -> float:
        """Seconds to wait now: between half and all of the current step."""
        step, self._next_s = self._next_s, min(self._next_s * 2, self._most_s)
        return step * (0.5 + self._draw() / 2)
