# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP between nodes: one class for both ends of a connection, a dialer and a listener.

Rules: no more than ``BUFFER_BYTES`` and one call's frames wait in user space on either side; beyond that ``send`` waits
and the peer's window closes. A peer that stops answering is noticed by the kernel within ``PEER_TIMEOUT_S``: while
data is on the way by TCP_USER_TIMEOUT (it covers a closed window too), else by keepalive.
"""

import asyncio
import errno
import fcntl
import logging
import socket
import struct
import termios
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from .address import Address, UnknownHost, reason
from .interface import CROWDED, PEER_TIMEOUT_S, CannotListen, LinkLost, Loss, PeerUnreachable, Way

BUFFER_BYTES = 1 << 20
READ_BYTES = 256 << 10
CLOSE_S = 1.0
TCP_INFO_BYTES = 256  # more than any kernel's struct tcp_info
_CHRONO_AT = 168  # of tcpi_busy_time and tcpi_rwnd_limited there, microseconds each (Linux: include/uapi/linux/tcp.h)
_CHRONO = struct.Struct("=QQ")
_INT = struct.Struct("=i")
MAX_WAITING = 64  # connections accepted and not yet taken by accept()

log = logging.getLogger(__name__)


class Reader(Protocol):
    """What a connection needs of an ``asyncio.StreamReader``."""

    async def read(self, n: int, /) -> bytes: ...


class Writer(Protocol):
    """What a connection needs of an ``asyncio.StreamWriter``."""

    @property
    def transport(self) -> asyncio.WriteTransport: ...
    def write(self, data: bytes, /) -> None: ...
    async def drain(self) -> None: ...
    def close(self) -> None: ...
    async def wait_closed(self) -> None: ...
    def get_extra_info(self, name: str, /) -> Any: ...


class TcpConnection:
    """One established TCP connection, whichever side opened it. ``node``: the peer's name, where it has proven it;
    ``silence_s``: how long a peer that answers nothing is borne.
    """

    def __init__(
        self, reader: Reader, writer: Writer, node: str | None = None, *, silence_s: float = PEER_TIMEOUT_S
    ) -> None:
        self._reader, self._writer = reader, writer
        self.node = node
        writer.transport.set_write_buffer_limits(high=BUFFER_BYTES)
        self._socket = writer.get_extra_info("socket")
        _tune(self._socket, silence_s)
        self.remote = name_of(writer.get_extra_info("peername"))
        self.bytes_sent = 0
        self.bytes_received = 0
        self._closed = False

    @property
    def roomy(self) -> bool:
        """What is handed over now need not wait for room."""
        return not self._closed and self._writer.transport.get_write_buffer_size() == 0

    def send_now(self, frames: Iterable[bytes | memoryview]) -> None:
        """Hand frames over, in order, without waiting. Raises LinkLost."""
        data = b"".join(frames)
        try:
            self._writer.write(data)
        except OSError as error:
            raise LinkLost(self.remote, reason(error), loss_of(error)) from error
        self.bytes_sent += len(data)

    async def send(self, frames: Iterable[bytes | memoryview]) -> None:
        """Hand frames over, in order; returns when there is room for more. Raises LinkLost."""
        data = b"".join(frames)
        try:
            if data:
                self._writer.write(data)
                self.bytes_sent += len(data)
            await self._writer.drain()
        except OSError as error:
            raise LinkLost(self.remote, reason(error), loss_of(error)) from error

    async def receive(self) -> bytes:
        """What has come, at least one byte, not cut at frames; b"" when the peer closed in order. Raises LinkLost."""
        try:
            data = await self._reader.read(READ_BYTES)
        except OSError as error:
            raise LinkLost(self.remote, reason(error), loss_of(error)) from error
        self.bytes_received += len(data)
        return data

    async def close(self) -> None:
        """Send what is buffered as far as a second allows, then end. Safe to call twice; raises nothing."""
        if self._closed:
            return
        self._closed = True
        self._writer.close()
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._writer.wait_closed()
        except OSError:  # TimeoutError is one: the peer takes nothing any more
            self._writer.transport.abort()
        except asyncio.CancelledError:
            self._writer.transport.abort()
            raise

    def on_the_way(self) -> Way | None:
        """What is buffered here or not acknowledged by the peer's TCP; for how long ours was busy and the peer's window
        not closed, in steps of a jiffy.
        """
        if self._socket.fileno() < 0:
            return None  # it is gone
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        if len(info) < _CHRONO_AT + _CHRONO.size:
            return None  # Linux before 4.10
        busy_us, window_closed_us = _CHRONO.unpack_from(info, _CHRONO_AT)
        (queued,) = _INT.unpack(fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, bytes(_INT.size)))
        return Way(queued + self._writer.transport.get_write_buffer_size(), (busy_us - window_closed_us) * 1000)


class TcpDialer:
    """Makes TCP connections to one peer; its name is resolved anew each time."""

    def __init__(
        self, address: Address, timeout_s: float = PEER_TIMEOUT_S, *, silence_s: float = PEER_TIMEOUT_S
    ) -> None:
        self._to = address
        self._timeout_s, self._silence_s = timeout_s, silence_s
        self.address = str(address)

    async def dial(self) -> TcpConnection:
        """One attempt. Raises PeerUnreachable."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._connect(self._to.host, self._to.port)
        except (OSError, UnicodeError) as error:
            raise PeerUnreachable(f"cannot reach peer {self.address}: {reason(error)}") from error

    async def _connect(self, host: str, port: int) -> TcpConnection:
        reader, writer = await asyncio.open_connection(host, port, limit=BUFFER_BYTES)
        return TcpConnection(reader, writer, silence_s=self._silence_s)


class TcpListener:
    """Takes TCP connections from peers."""

    def __init__(self, address: Address, *, silence_s: float = PEER_TIMEOUT_S) -> None:
        self._at, self._silence_s = address, silence_s
        self.address = str(address)
        self._server: asyncio.Server | None = None
        self.refused: Counter[str] = Counter()
        self._waiting: asyncio.Queue[TcpConnection] = asyncio.Queue(MAX_WAITING)

    async def start(self) -> None:
        """Begin to listen. Raises CannotListen or UnknownHost. Port 0 becomes the one that the system chose."""
        host = None if self._at.host == "*" else self._at.host
        try:
            self._server = await self._serve(host, self._at.port)
        except socket.gaierror as error:
            raise UnknownHost(f"cannot listen on {self.address}: {reason(error)}") from error
        except (OSError, UnicodeError) as error:
            message = f"cannot listen on {self.address}: {_why(error)}"
            raise CannotListen(message, help_text=_help(error, self._at)) from error
        if self._at.port == 0:
            self._at = self._at._replace(port=self._server.sockets[0].getsockname()[1])
            self.address = str(self._at)

    async def accept(self) -> TcpConnection:
        """The next peer that dialled us."""
        return await self._waiting.get()

    async def close(self) -> None:
        """Listen no more; connections that were accepted live on, those never taken are dropped."""
        if self._server is not None:
            self._server.close()
            self._server = None
        while not self._waiting.empty():
            self._waiting.get_nowait()._writer.transport.abort()

    async def _serve(self, host: str | None, port: int) -> asyncio.Server:
        return await asyncio.start_server(self._arrived, host, port, limit=BUFFER_BYTES)

    def _arrived(self, reader: Reader, writer: Writer) -> None:
        self._accept(lambda: TcpConnection(reader, writer, silence_s=self._silence_s), writer)

    def _accept(self, make: Callable[[], TcpConnection], writer: Writer) -> None:
        if self._server is None or self._waiting.full():
            log.debug("connection from %s dropped: too many wait", name_of(writer.get_extra_info("peername")))
            self.refused[CROWDED] += 1
            writer.transport.abort()
            return
        try:
            self._waiting.put_nowait(make())
        except OSError as error:  # reset before we could look at it
            log.debug("connection lost at once: %s", reason(error))
            writer.transport.abort()


def loss_of(error: OSError) -> Loss:
    """What an error of a connection says of its end."""
    return Loss.SILENT if isinstance(error, TimeoutError) else getattr(error, "loss", Loss.RESET)


def _tune(sock: socket.socket, silence_s: float) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_s * 1000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, int(silence_s) - 1))


def name_of(peername: tuple[str, int] | None) -> str:
    """The other end of a socket, as ``remote`` has it."""
    return str(Address(peername[0], peername[1])) if peername else "?"


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return "the port is in use"
    if isinstance(error, OSError) and error.errno == errno.EADDRNOTAVAIL:
        return "this machine does not have that address"
    return reason(error)


def _help(error: Exception, address: Address) -> str:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"See who has it with `ss -ltnp 'sport = :{address.port}'`, or give --listen another port."
    return "Give --listen an address of this machine, or *:PORT for all of them."
