# SPDX-License-Identifier: GPL-2.0-or-later
"""Between two nodes of one host: a pair of rings in memory that both have mapped.

Rules
- The dialer makes the memory and one eventfd for each side, and passes them over a Unix socket. ``shm_setup.py`` says
  what the listener checks.
- A side that sleeps says so in the ring; then the other writes to its eventfd. Else nobody is disturbed.
- The end of the socket, or of the process at its other end (pidfd), is the peer's. What a dead peer wrote is still
  there: it is handed out before the loss is raised.
- Between nodes that have certificates the socket speaks TLS after the set-up. Keys are agreed there, and what goes
  through the rings is sealed with them; the orderly end counts only if TLS says so too.
"""

import asyncio
import logging
import os
import socket
import struct
from collections import Counter, deque
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from probes.errors import DpvsProbeError
from replicator.seal import HEADER, OFFER_BYTES, OVERHEAD, Agreement, Opener, Party, Sealer, SealError

from . import shm_setup
from .address import os_words, reason
from .channel import READ_BYTES, Channel, cut
from .interface import CROWDED, NOT_SET_UP, PEER_TIMEOUT_S, CannotListen, Loss, PeerUnreachable
from .ring import BrokenRing
from .shm_setup import BadSetup, Shared, parse
from .tls import Tls, TlsStream

__all__ = ["RING_BYTES", "Security", "ShmConnection", "ShmDialer", "ShmListener", "parse"]

RING_BYTES = 2 << 20
PIECE_BYTES = 256 << 10  # copied before the other side, on another core, is shown it
SEALED_BYTES = 64 << 10  # sealed at once
MAX_WAITING = 64  # connections made and not yet taken by accept()
MAX_SETUPS = 16
PURPOSE = "shm"

_KEYS = struct.Struct(f"<Q{OFFER_BYTES}s")  # over TLS: epoch, offer of keys

log = logging.getLogger(__name__)


class Security(NamedTuple):
    """By what a node proves its name on a link, and how it is called there."""

    tls: Tls
    me: Party


class _Secured(NamedTuple):
    """A link between nodes that have proven their names."""

    stream: TlsStream
    node: str
    sealer: Sealer
    opener: Opener


class ShmConnection(Channel):
    """One established connection, whichever side opened it."""

    def __init__(
        self, remote: str, sock: socket.socket, shared: Shared, pidfd: int, secured: _Secured | None, *, dialed: bool
    ) -> None:
        super().__init__(remote)
        self.node = secured.node if secured else None
        self._sock, self._shared, self._pidfd, self._secured = sock, shared, pidfd, secured
        self._writer, self._reader = shared.rings(dialed=dialed)
        self._plain = memoryview(bytearray(READ_BYTES + SEALED_BYTES if secured else 0))
        self._scratch = memoryview(bytearray(SEALED_BYTES + OVERHEAD if secured else 0))
        self._goodbye = secured is None
        self._loop.add_reader(shared.bell, self._rung)
        if pidfd >= 0:
            self._loop.add_reader(pidfd, self._peer_gone)
        if secured is None:
            self._loop.add_reader(sock, self._on_socket)
        else:
            self._watching = asyncio.create_task(self._watch_stream(secured.stream))

    # --- sending -----------------------------------------------------------------------------------------------------

    def _put(self, pending: deque[memoryview]) -> bool:
        took = False
        try:
            while pending:
                room = self._free()
                if room <= 0:
                    self._writer.sleep()
                    room = self._free()
                    if room <= 0:
                        break
                took = True
                full = self._write(pending, room)
                if (full or self._writer.unseen >= PIECE_BYTES or not pending) and self._writer.publish():
                    self._ring()
        except (BrokenRing, DpvsProbeError) as error:
            self._lose(str(error))
        return took

    def _free(self) -> int:
        """Bytes that can be sent now."""
        room = self._writer.room()
        return room if self._secured is None else min(room - OVERHEAD, SEALED_BYTES)

    def _write(self, pending: deque[memoryview], room: int) -> bool:
        """Move what fits into the ring; whether it is full."""
        pieces = cut(pending, min(room, PIECE_BYTES))
        total = sum(map(len, pieces))
        if self._secured is not None:
            size = self._secured.sealer.seal_into(pieces[0] if len(pieces) == 1 else b"".join(pieces), self._scratch)
            pieces = [self._scratch[:size]]
        for piece in pieces:
            self._writer.write(piece)
        return total == room

    async def _end(self) -> None:
        if self._writer.end():
            self._ring()

    # --- receiving ---------------------------------------------------------------------------------------------------

    def _take(self) -> bytes:
        try:
            count = self._reader.available()
            if count == 0:
                self._reader.sleep()
                count = self._reader.available()
            if count == 0:
                return b""
            data = self._read(count) if self._secured is None else self._open(count, self._secured.opener)
        except (BrokenRing, DpvsProbeError) as error:
            self._lose(str(error), Loss.TAMPERED)
            return b""
        if self._reader.publish():
            self._ring()
        return data

    def _read(self, count: int) -> bytes:
        return self._reader.read(min(count, READ_BYTES))

    def _open(self, count: int, opener: Opener) -> bytes:
        """Sealed pieces lie in the ring one after the other, each of them whole once it is seen."""
        at = 0
        while count and at < READ_BYTES:
            size = OVERHEAD + int.from_bytes(self._reader.peek(4), "little") if count >= HEADER.size else 0
            if not OVERHEAD < size <= min(count, len(self._scratch)):
                raise BrokenRing(f"a sealed piece of {size} bytes among {count}")
            at += opener.open_into(self._reader.read(size), self._plain[at:])
            count -= size
        return bytes(self._plain[:at])

    def _finished(self) -> bool:
        # In this order: what was written before the end is there once the end is seen.
        return self._goodbye and self._reader.ended and self._reader.at_end()

    # --- waking, and the end -----------------------------------------------------------------------------------------

    def _ring(self) -> None:
        with suppress(BlockingIOError):  # it has been rung 2^64 - 2 times and not heard yet: it is awake
            os.eventfd_write(self._shared.peer_bell, 1)

    def _rung(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._shared.bell)
        self._wake()

    def _on_socket(self) -> None:
        try:
            if self._sock.recv(1):
                self._peer_gone("it speaks where it should not")
                return
        except BlockingIOError:
            return
        except OSError as error:
            log.debug("socket of %s: %s", self.remote, reason(error))
        self._peer_gone()

    async def _watch_stream(self, stream: TlsStream) -> None:
        why = "the peer has ended"
        try:
            if await stream.read(1):
                why = "it speaks where it should not"
            else:
                self._goodbye = True
        except OSError as error:
            log.debug("stream of %s: %s", self.remote, reason(error))
        self._peer_gone(why)

    def _peer_gone(self, why: str = "the peer has ended") -> None:
        if not self._released:
            self._unwatch()
            self._lose(why)

    def _unwatch(self) -> None:
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
        if self._secured is None:
            self._loop.remove_reader(self._sock)

    def _release(self) -> None:
        self._unwatch()
        self._loop.remove_reader(self._shared.bell)
        if self._secured is not None:
            self._watching.cancel()
            self._secured.stream.close()
        else:
            self._sock.close()
        self._writer.release()
        self._reader.release()
        self._shared.memory.close()
        for descriptor in (self._shared.bell, self._shared.peer_bell):
            os.close(descriptor)
        if self._pidfd >= 0:
            os.close(self._pidfd)


class ShmDialer:
    """Makes connections to the node that listens at a path."""

    def __init__(
        self,
        path: Path,
        security: Security | None = None,
        *,
        timeout_s: float = PEER_TIMEOUT_S,
        ring_bytes: int = RING_BYTES,
    ) -> None:
        self._path, self._security = path, security
        self._timeout_s, self._ring_bytes = timeout_s, ring_bytes
        self.address = f"shm:{path}"

    async def dial(self) -> ShmConnection:
        """One attempt. Raises PeerUnreachable."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._dial()
        except (OSError, BadSetup, SealError) as error:
            raise PeerUnreachable(f"cannot reach peer {self.address}: {reason(error)}") from error

    async def _dial(self) -> ShmConnection:
        loop = asyncio.get_running_loop()
        with ExitStack() as undo:
            sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.setblocking(False)
            await loop.sock_connect(sock, os.fspath(self._path))
            pid = shm_setup.peer_of(sock)
            shared = shm_setup.offer(sock, self._ring_bytes, undo, sealed=self._security is not None)
            # Who answers was alive until then, so that this is its pidfd and not of a later process.
            pidfd = shm_setup.watch(pid, undo)
            shm_setup.read_answer(await loop.sock_recv(sock, shm_setup.ANSWER.size))
            secured = await _secure(sock, self._security, undo, dialed=True) if self._security else None
            undo.pop_all()
        return ShmConnection(self.address, sock, shared, pidfd, secured, dialed=True)


class ShmListener:
    """Takes connections at a path."""

    def __init__(self, path: Path, security: Security | None = None, *, timeout_s: float = PEER_TIMEOUT_S) -> None:
        self._path, self._security, self._timeout_s = path, security, timeout_s
        self.address = f"shm:{path}"
        self._undo = ExitStack()
        self._socket: socket.socket | None = None
        self._open = False
        self._waiting: asyncio.Queue[ShmConnection] = asyncio.Queue(MAX_WAITING)
        self._setups: set[asyncio.Task[None]] = set()
        self.refused: Counter[str] = Counter()

    async def start(self) -> None:
        """Take the address, let nobody in yet. Raises CannotListen."""
        try:
            with ExitStack() as undo:
                self._socket = shm_setup.bind(self._path, undo)
                self._undo = undo.pop_all()
        except OSError as error:
            why = os_words(error.errno) if error.errno else error.strerror
            how = "Give --listen a path in a directory that exists and is ours, or another name."
            raise CannotListen(f"cannot listen on {self.address}: {why}", help_text=how) from error

    async def accept(self) -> ShmConnection:
        """The next peer that dialled us; the first call opens the door."""
        if self._socket is not None and not self._open:
            self._open = True
            self._socket.listen(MAX_WAITING)
            asyncio.get_running_loop().add_reader(self._socket, self._arrived)
        return await self._waiting.get()

    async def close(self) -> None:
        """Listen no more; connections that were accepted live on, those never taken are dropped."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket = None
        self._undo.close()
        for task in self._setups:
            task.cancel()
        await asyncio.gather(*self._setups, return_exceptions=True)
        while not self._waiting.empty():
            await self._waiting.get_nowait().close()

    def _arrived(self) -> None:
        assert self._socket is not None
        try:
            sock, _ = self._socket.accept()
        except OSError as error:
            log.debug("connection lost at once: %s", reason(error))
            return
        if len(self._setups) >= MAX_SETUPS or self._waiting.full():
            log.debug("connection dropped: too many wait")
            self.refused[CROWDED] += 1
            sock.close()
            return
        task = asyncio.create_task(self._set_up(sock))
        self._setups.add(task)
        task.add_done_callback(self._setups.discard)

    async def _set_up(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._answer(sock)
        except (BadSetup, SealError) as error:
            self.refused[NOT_SET_UP] += 1
            log.warning("connection on %s refused: %s", self.address, error)
        except OSError as error:
            self.refused[NOT_SET_UP] += 1
            log.debug("connection on %s lost while it was set up: %s", self.address, reason(error))
        else:
            if self._socket is None or self._waiting.full():
                await connection.close()
            else:
                self._waiting.put_nowait(connection)

    async def _answer(self, sock: socket.socket) -> ShmConnection:
        with ExitStack() as undo:
            undo.enter_context(sock)
            try:
                pid = shm_setup.peer_of(sock)
                await _readable(sock)
                shared = shm_setup.take(sock, undo, sealed=self._security is not None)
            except BadSetup as error:
                with suppress(OSError):
                    sock.send(shm_setup.answer(str(error)))
                raise
            # Whose socket still takes our answer was alive until then: the pidfd is not of a later process.
            pidfd = shm_setup.watch(pid, undo)
            sock.send(shm_setup.answer())
            secured = await _secure(sock, self._security, undo, dialed=False) if self._security else None
            undo.pop_all()
        return ShmConnection(f"{self.address} (pid {pid})", sock, shared, pidfd, secured, dialed=False)


async def _secure(sock: socket.socket, security: Security, undo: ExitStack, *, dialed: bool) -> _Secured:
    """TLS on the socket, which belongs to the stream from now on; keys agreed there. Raises OSError or SealError."""
    context = security.tls.dialing if dialed else security.tls.listening
    _, stream = await asyncio.get_running_loop().create_connection(lambda: TlsStream(context, dial=dialed), sock=sock)
    undo.callback(stream.transport.abort)
    node = await stream.ready
    agreement = Agreement(security.me, dialed=dialed, purpose=PURPOSE)
    stream.write(_KEYS.pack(security.me.epoch, agreement.offer))
    await stream.drain()
    answer = b""
    while len(answer) < _KEYS.size:
        piece = await stream.read(_KEYS.size - len(answer))
        if not piece:
            raise ConnectionError("closed while keys were agreed")
        answer += piece
    epoch, offer = _KEYS.unpack(answer)
    return _Secured(stream, node, *agreement.complete(offer, Party(node, epoch)))


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def now() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock, now)
    try:
        await ready
    finally:
        loop.remove_reader(sock)
