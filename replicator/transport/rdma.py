# SPDX-License-Identifier: GPL-2.0-or-later
"""RDMA between nodes: a dialer and a listener on top of those of another transport.

Rules: every connection is set up over a stream that the other transport made, and authenticated if it does that, as
``exchange.py`` says. It then lives in ``slots.py`` on a queue pair of ``verbs.py``, sealed with keys that were agreed
over the stream, one for each direction. Where there is no RDMA this fails: nothing else is used instead.
"""

import asyncio
import logging
from abc import abstractmethod
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from replicator.seal import Agreement, Party, SealError

from .address import reason
from .exchange import BadSetup, Kind, Messages, Side, pack, pack_refuse, parse_refuse
from .interface import (
    CROWDED,
    NOT_SET_UP,
    PEER_TIMEOUT_S,
    CannotListen,
    Connection,
    Dialer,
    LinkLost,
    Listener,
    PeerUnreachable,
)
from .slots import Queue, Seals, SlotConnection
from .verbs import Device, NoRdma, VerbsQueue

MAX_SETUPS = 16
MAX_WAITING = 64

PURPOSE = "rdma"
_FAILED = (OSError, LinkLost, BadSetup, NoRdma, SealError)  # a set-up does so, and no more

log = logging.getLogger(__name__)


class NewQueue(Queue, Protocol):
    """A queue pair that is not connected yet."""

    @abstractmethod
    def side(self, epoch: int = 0, offer: bytes = b"") -> Side:
        """What the peer has to know; ``epoch`` and ``offer`` are of the agreement on keys."""

    @abstractmethod
    def connect(self, peer: Side) -> None:
        """Reach the peer's queue pair, and get ready to write into its ring. Raises BadSetup."""


class MakeQueue(Protocol):
    """``VerbsQueue``."""

    def __call__(self, device: Device, *, like: bytes | None = None) -> NewQueue: ...


class _Talk:
    """The set-up exchange over a stream."""

    def __init__(self, stream: Connection) -> None:
        self.stream = stream
        self.messages = Messages()

    async def say(self, message: bytes) -> None:
        await self.stream.send([message])

    async def refuse(self, why: str) -> None:
        with suppress(LinkLost, TimeoutError):
            async with asyncio.timeout(1):
                await self.say(pack_refuse(why))

    async def expect(self, kind: Kind) -> bytes:
        """The body of the next message, which must be of that kind. Raises BadSetup or LinkLost."""
        while (message := self.messages.next()) is None:
            data = await self.stream.receive()
            if not data:
                raise BadSetup("closed while RDMA was set up (is it in --mode rdma?)")
            self.messages.feed(data)
        if message.kind is Kind.REFUSE:
            raise BadSetup(f"refused: {parse_refuse(message.body)}")
        if message.kind is not kind:
            raise BadSetup(f"{message.kind.name} where {kind.name} should be")
        return message.body


class _Settings(NamedTuple):
    """How this node sets connections up."""

    device: Device
    me: Party | None
    timeout_s: float
    make_queue: MakeQueue


class _Keys:
    """Our part of the agreement on keys for one connection; nothing when it is not sealed."""

    def __init__(self, me: Party | None, stream: Connection, *, dialed: bool) -> None:
        self._node: str | None = getattr(stream, "node", None)
        if me is not None and self._node is None:
            raise BadSetup("what is sealed needs a peer that has proven its name")
        self._agreement = Agreement(me, dialed=dialed, purpose=PURPOSE) if me is not None else None
        self.part = (me.epoch, self._agreement.offer) if me is not None and self._agreement is not None else ()

    def agree(self, peer: Side) -> Seals | None:
        """Raises BadSetup unless both sides seal, or none, and SealError."""
        if bool(peer.offer) != (self._agreement is not None):
            raise BadSetup("one side seals what it sends and the other does not (--insecure)")
        if self._agreement is None or self._node is None:
            return None
        return Seals(*self._agreement.complete(peer.offer, Party(self._node, peer.epoch)))


class RdmaDialer:
    """Makes RDMA connections to the peer that ``stream`` reaches."""

    def __init__(
        self,
        stream: Dialer,
        device: Device,
        seal_as: Party | None = None,
        *,
        timeout_s: float = PEER_TIMEOUT_S,
        make_queue: MakeQueue = VerbsQueue,
    ) -> None:
        self._stream = stream
        self._settings = _Settings(device, seal_as, timeout_s, make_queue)
        self.address = stream.address

    async def dial(self) -> SlotConnection:
        """One attempt. Raises PeerUnreachable."""
        stream = await self._stream.dial()
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                return await _dial(_Talk(stream), self._settings)
        except BaseException as error:
            await stream.close()
            if not isinstance(error, _FAILED):
                raise
            message = f"cannot reach peer {self.address} by RDMA: {reason(error)}"
            raise PeerUnreachable(message, help_text=error.help_text if isinstance(error, NoRdma) else None) from error


async def _dial(talk: _Talk, settings: _Settings) -> SlotConnection:
    keys = _Keys(settings.me, talk.stream, dialed=True)
    queue = settings.make_queue(settings.device)
    try:
        await talk.say(queue.side(*keys.part).pack(Kind.OFFER))
        peer = Side.parse(await talk.expect(Kind.ANSWER))
        seals = keys.agree(peer)
        queue.connect(peer)
        await talk.say(pack(Kind.READY))
        return SlotConnection(queue, talk.stream, seals, talk.messages)
    except BaseException:
        queue.close()
        raise


class RdmaListener:
    """Takes RDMA connections from peers that come by way of ``stream``."""

    def __init__(
        self,
        stream: Listener,
        device: Device,
        seal_as: Party | None = None,
        *,
        timeout_s: float = PEER_TIMEOUT_S,
        make_queue: MakeQueue = VerbsQueue,
    ) -> None:
        self._stream = stream
        self._settings = _Settings(device, seal_as, timeout_s, make_queue)
        self._waiting: asyncio.Queue[SlotConnection | CannotListen] = asyncio.Queue(MAX_WAITING)
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = False
        self.address = stream.address
        self.refused = stream.refused  # counts of both in one

    async def start(self) -> None:
        """Take the address, let nobody in yet. Raises CannotListen."""
        await self._stream.start()
        self.address = self._stream.address

    async def accept(self) -> SlotConnection:
        """The next peer that dialled us; the first call opens the door. Raises CannotListen."""
        if not self._open:
            self._open = True
            self._spawn(self._arrivals())
        arrived = await self._waiting.get()
        if isinstance(arrived, CannotListen):
            raise arrived
        return arrived

    async def close(self) -> None:
        """Listen no more; connections that were accepted live on, those never taken are dropped."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stream.close()
        while not self._waiting.empty():
            arrived = self._waiting.get_nowait()
            if isinstance(arrived, SlotConnection):
                await arrived.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _arrivals(self) -> None:
        while True:
            try:
                stream = await self._stream.accept()
            except CannotListen as error:
                await self._waiting.put(error)
                return
            if len(self._tasks) > MAX_SETUPS or self._waiting.full():
                log.debug("connection from %s dropped: too many wait", stream.remote)
                self.refused[CROWDED] += 1
                self._spawn(stream.close())
            else:
                self._spawn(self._set_up(_Talk(stream)))

    async def _set_up(self, talk: _Talk) -> None:
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                connection = await _answer(talk, self._settings)
        except BaseException as error:
            self.refused[NOT_SET_UP] += 1
            if isinstance(error, BadSetup | NoRdma | SealError):
                log.warning("RDMA with %s not set up: %s", talk.stream.remote, error)
                await talk.refuse(str(error))
            await talk.stream.close()
            if not isinstance(error, _FAILED):
                raise
            log.debug("RDMA with %s not set up: %s", talk.stream.remote, reason(error))
            return
        if self._waiting.full():
            await connection.close()
        else:
            self._waiting.put_nowait(connection)


async def _answer(talk: _Talk, settings: _Settings) -> SlotConnection:
    keys = _Keys(settings.me, talk.stream, dialed=False)
    peer = Side.parse(await talk.expect(Kind.OFFER))
    seals = keys.agree(peer)
    queue = settings.make_queue(settings.device, like=peer.gid)
    try:
        queue.connect(peer)
        await talk.say(queue.side(*keys.part).pack(Kind.ANSWER))
        await talk.expect(Kind.READY)
        return SlotConnection(queue, talk.stream, seals, talk.messages)
    except BaseException:
        queue.close()
        raise
