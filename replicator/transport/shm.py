# SPDX-License-Identifier: GPL-2.0-or-later
"""Between two nodes of one host: a pair of rings in memory that both have mapped.

Rules
- The dialer makes the memory (a memfd that cannot shrink any more) and one eventfd for each side, and passes them over
  a Unix socket. Both sides make sure that the other runs as the same user.
- A side that sleeps says so in the ring; then the other writes to its eventfd. Else nobody is disturbed.
- The socket carries nothing after that. Its end, or the end of the process at the other side (pidfd), is the peer's.
- What a dead peer wrote is still there: it is handed out before the loss is raised.
"""

import asyncio
import fcntl
import logging
import mmap
import os
import socket
import stat
import struct
from collections import deque
from contextlib import ExitStack, suppress
from pathlib import Path

from .address import BadAddress, os_words, reason
from .channel import READ_BYTES, Channel
from .interface import PEER_TIMEOUT_S, CannotListen, PeerUnreachable
from .ring import CONTROL_BYTES, BrokenRing, Reader, Writer

RING_BYTES = 2 << 20
PIECE_BYTES = 256 << 10  # copied before the other side, on another core, is shown it
LEAST_RING_BYTES, MOST_RING_BYTES = 64 << 10, 64 << 20
MAX_WAITING = 64  # connections made and not yet taken by accept()
MAX_SETUPS = 16
SCHEMES = ("shm:", "unix:")
LONGEST_PATH = 107  # sockaddr_un.sun_path, with its final zero

# What the dialer says, with three descriptors: memory, bell of the listener, bell of the dialer; and the answer to it.
_OPEN = struct.Struct("<4sHHI4x")  # magic, version, 0, bytes of one ring
_ANSWER = struct.Struct("<4sHH120s")  # magic, version, 0 or 1 for no, why not
_MAGIC = b"DPSM"
_VERSION = 1
_CREDENTIALS = struct.Struct("3i")

_CONTROL = mmap.PAGESIZE  # both rings' control words; the data of one ring and then of the other follow

log = logging.getLogger(__name__)


class BadSetup(Exception):
    """The other side of the socket is no node, or not one that we talk to."""


def parse(text: str) -> Path:
    """The path in ``shm:/path`` or ``unix:/path``; raises BadAddress."""
    how = "Write shm:/PATH, for example shm:/run/dpvs-probe/a.shm."
    for scheme in SCHEMES:
        if text.startswith(scheme):
            path = text.removeprefix(scheme)
            break
    else:
        raise BadAddress(f"'{text}' names no socket on this host", help_text=how)
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise BadAddress(f"'{text}': '{path}' is not the absolute path of a socket", help_text=how)
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise BadAddress(
            f"'{text}' is longer than the {LONGEST_PATH} bytes that a socket's path may have", help_text=how
        )
    return Path(path)


class _Shared:
    """Memory, bells and socket of one connection, until they belong to a ShmConnection."""

    def __init__(self, sock: socket.socket, memory: mmap.mmap, ring_bytes: int, bell: int, peer_bell: int) -> None:
        self.sock, self.memory, self.ring_bytes = sock, memory, ring_bytes
        self.bell, self.peer_bell = bell, peer_bell


class ShmConnection(Channel):
    """One established connection, whichever side opened it."""

    def __init__(self, remote: str, shared: _Shared, pidfd: int, *, dialed: bool) -> None:
        super().__init__(remote)
        self._memory = shared.memory
        whole = memoryview(shared.memory)
        rings = []
        for which in range(2):  # the dialer writes to the first one
            control = which * CONTROL_BYTES
            data = _CONTROL + which * shared.ring_bytes
            rings.append((whole[control : control + CONTROL_BYTES], whole[data : data + shared.ring_bytes]))
        whole.release()
        self._writer, self._reader = Writer(*rings[not dialed]), Reader(*rings[dialed])
        self._sock, self._bell, self._peer_bell, self._pidfd = shared.sock, shared.bell, shared.peer_bell, pidfd
        self._loop.add_reader(self._bell, self._rung)
        self._loop.add_reader(self._sock, self._on_socket)
        if pidfd >= 0:
            self._loop.add_reader(pidfd, self._peer_gone)

    def _put(self, pending: deque[memoryview]) -> bool:
        took = False
        try:
            while pending:
                room = self._writer.room()
                if room == 0:
                    self._writer.sleep()
                    room = self._writer.room()
                    if room == 0:
                        break
                piece = pending[0][: min(room, PIECE_BYTES)]
                self._writer.write(piece)
                if len(piece) == len(pending[0]):
                    pending.popleft()
                else:
                    pending[0] = pending[0][len(piece) :]
                took = True
                if (self._writer.unseen >= PIECE_BYTES or len(piece) == room or not pending) and self._writer.publish():
                    self._ring()
        except BrokenRing as error:
            self._lose(str(error))
        return took

    def _take(self) -> bytes:
        try:
            count = self._reader.available()
            if count == 0:
                self._reader.sleep()
                count = self._reader.available()
        except BrokenRing as error:
            self._lose(str(error))
            return b""
        if count == 0:
            return b""
        data = self._reader.read(min(count, READ_BYTES))
        if self._reader.publish():
            self._ring()
        return data

    def _finished(self) -> bool:
        # In this order: what was written before the end is there once the end is seen.
        return self._reader.ended and self._reader.at_end()

    async def _end(self) -> None:
        if self._writer.end():
            self._ring()

    def _release(self) -> None:
        self._unwatch()
        self._loop.remove_reader(self._bell)
        self._writer.release()
        self._reader.release()
        self._memory.close()
        self._sock.close()
        for descriptor in (self._bell, self._peer_bell):
            os.close(descriptor)
        if self._pidfd >= 0:
            os.close(self._pidfd)

    def _ring(self) -> None:
        with suppress(BlockingIOError):  # it has been rung 2^64 - 2 times and not heard yet: it is awake
            os.eventfd_write(self._peer_bell, 1)

    def _rung(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        self._wake()

    def _on_socket(self) -> None:
        try:
            if self._sock.recv(1):
                self._unwatch()
                self._lose("it speaks where it should not")
                return
        except BlockingIOError:
            return
        except OSError as error:
            log.debug("socket of %s: %s", self.remote, reason(error))
        self._peer_gone()

    def _peer_gone(self) -> None:
        self._unwatch()
        self._lose("closed by the peer" if self._reader.ended else "the peer has ended")

    def _unwatch(self) -> None:
        self._loop.remove_reader(self._sock)
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)


class ShmDialer:
    """Makes connections to the node that listens at a path."""

    def __init__(self, path: Path, timeout_s: float = PEER_TIMEOUT_S, ring_bytes: int = RING_BYTES) -> None:
        self._path, self._timeout_s, self._ring_bytes = path, timeout_s, ring_bytes
        self.address = f"shm:{path}"

    async def dial(self) -> ShmConnection:
        """One attempt. Raises PeerUnreachable."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._dial()
        except (OSError, BadSetup) as error:
            raise PeerUnreachable(f"cannot reach peer {self.address}: {reason(error)}") from error

    async def _dial(self) -> ShmConnection:
        loop = asyncio.get_running_loop()
        with ExitStack() as undo, ExitStack() as here:
            sock = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.setblocking(False)
            await loop.sock_connect(sock, os.fspath(self._path))
            pid = _peer(sock)
            memfd = _owned(_make_memory(self._ring_bytes), here)  # a mapping stays without its descriptor
            memory = undo.enter_context(mmap.mmap(memfd, _CONTROL + 2 * self._ring_bytes))
            bells = [_owned(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), undo) for _ in range(2)]
            opening = _OPEN.pack(_MAGIC, _VERSION, 0, self._ring_bytes)
            socket.send_fds(sock, [opening], [memfd, *bells])  # small: a socket just connected takes it at once
            # Who answers was alive until then, so that this is its pidfd and not of a later process.
            pidfd = _pidfd(pid, undo)
            _read_answer(await loop.sock_recv(sock, _ANSWER.size))
            undo.pop_all()
        shared = _Shared(sock, memory, self._ring_bytes, bell=bells[1], peer_bell=bells[0])
        return ShmConnection(self.address, shared, pidfd, dialed=True)


class ShmListener:
    """Takes connections at a path."""

    def __init__(self, path: Path, timeout_s: float = PEER_TIMEOUT_S) -> None:
        self._path, self._timeout_s = path, timeout_s
        self.address = f"shm:{path}"
        self._undo = ExitStack()
        self._listening: socket.socket | None = None
        self._open = False
        self._waiting: asyncio.Queue[ShmConnection] = asyncio.Queue(MAX_WAITING)
        self._setups: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Take the address, let nobody in yet. Raises CannotListen."""
        try:
            with ExitStack() as undo:
                _lock(self._path, undo)
                _remove_leftover(self._path)
                listening = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                listening.setblocking(False)
                before = os.umask(0o177)  # the socket is born 0600; nothing else of ours runs between these two lines
                try:
                    listening.bind(os.fspath(self._path))
                finally:
                    os.umask(before)
                undo.callback(self._path.unlink, missing_ok=True)
                self._undo = undo.pop_all()
        except OSError as error:
            how = "Give --listen a path in a directory that exists and is ours, or another name."
            why = os_words(error.errno) if error.errno else error.strerror
            message = f"cannot listen on {self.address}: {why}"
            raise CannotListen(message, help_text=how) from error
        self._listening = listening

    async def accept(self) -> ShmConnection:
        """The next peer that dialled us; the first call opens the door."""
        if self._listening is not None and not self._open:
            self._open = True
            self._listening.listen(MAX_WAITING)
            asyncio.get_running_loop().add_reader(self._listening, self._arrived)
        return await self._waiting.get()

    async def close(self) -> None:
        """Listen no more; connections that were accepted live on, those never taken are dropped."""
        if self._listening is not None:
            asyncio.get_running_loop().remove_reader(self._listening)
            self._listening = None
        self._undo.close()
        for task in self._setups:
            task.cancel()
        await asyncio.gather(*self._setups, return_exceptions=True)
        while not self._waiting.empty():
            await self._waiting.get_nowait().close()

    def _arrived(self) -> None:
        assert self._listening is not None
        try:
            sock, _ = self._listening.accept()
        except OSError as error:
            log.debug("connection lost at once: %s", reason(error))
            return
        if len(self._setups) >= MAX_SETUPS or self._waiting.full():
            log.debug("connection dropped: too many wait")
            sock.close()
            return
        task = asyncio.create_task(self._set_up(sock))
        self._setups.add(task)
        task.add_done_callback(self._setups.discard)

    async def _set_up(self, sock: socket.socket) -> None:
        with ExitStack() as undo:
            undo.enter_context(sock)
            sock.setblocking(False)
            try:
                pid = _peer(sock)
                async with asyncio.timeout(self._timeout_s):
                    await _readable(sock)
                shared = _read_opening(sock, undo)
                # Whose socket still takes our answer below was alive until then: the pidfd is not of a later process.
                pidfd = _pidfd(pid, undo)
                sock.send(_ANSWER.pack(_MAGIC, _VERSION, 0, b""))
            except BadSetup as error:
                log.warning("connection on %s refused: %s", self.address, error)
                with suppress(OSError):
                    sock.send(_ANSWER.pack(_MAGIC, _VERSION, 1, str(error).encode()[:120]))
                return
            except OSError as error:
                log.debug("connection on %s lost while it was set up: %s", self.address, reason(error))
                return
            undo.pop_all()
        connection = ShmConnection(f"{self.address} (pid {pid})", shared, pidfd, dialed=False)
        if self._listening is None or self._waiting.full():
            await connection.close()
        else:
            self._waiting.put_nowait(connection)


def _make_memory(ring_bytes: int) -> int:
    memfd = os.memfd_create("dpvs-probe-link", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memfd, _CONTROL + 2 * ring_bytes)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return memfd


def _read_opening(sock: socket.socket, undo: ExitStack) -> _Shared:
    """What a dialer sends first, all of it checked. Raises BadSetup."""
    message, descriptors, flags, _ = socket.recv_fds(sock, _OPEN.size + 1, 3)
    with ExitStack() as here:
        for descriptor in descriptors:
            _owned(descriptor, undo if descriptor in descriptors[1:] else here)
        if len(message) != _OPEN.size or not message.startswith(_MAGIC):
            raise BadSetup("this is no set-up of a link")
        _, version, _, ring_bytes = _OPEN.unpack(message)
        if version != _VERSION:
            raise BadSetup(f"version {version} of the set-up, {_VERSION} is spoken here")
        if not LEAST_RING_BYTES <= ring_bytes <= MOST_RING_BYTES or ring_bytes & (ring_bytes - 1):
            raise BadSetup(f"a ring of {ring_bytes} bytes")
        if len(descriptors) != 3 or flags & socket.MSG_CTRUNC:
            raise BadSetup(f"{len(descriptors)} descriptors")
        memfd, bell, peer_bell = descriptors
        for descriptor in (bell, peer_bell):
            if os.readlink(f"/proc/self/fd/{descriptor}") != "anon_inode:[eventfd]":
                raise BadSetup("what should be an eventfd is none")
            os.set_blocking(descriptor, False)
        size = _CONTROL + 2 * ring_bytes
        try:
            seals = fcntl.fcntl(memfd, fcntl.F_GET_SEALS)
            if not seals & fcntl.F_SEAL_SHRINK or os.fstat(memfd).st_size != size:
                raise BadSetup("memory of another size, or that can shrink")
            memory = undo.enter_context(mmap.mmap(memfd, size))
        except OSError as error:
            raise BadSetup("what should be memory is none") from error
        return _Shared(sock, memory, ring_bytes, bell, peer_bell)


def _read_answer(message: bytes) -> None:
    if len(message) != _ANSWER.size or not message.startswith(_MAGIC):
        raise BadSetup("closed while the link was set up" if not message else "who listens there is no node")
    _, _, refused, why = _ANSWER.unpack(message)
    if refused:
        raise BadSetup(f"refused: {why.rstrip(bytes(1)).decode(errors='replace')}")


def _peer(sock: socket.socket) -> int:
    """Process id at the other end, 0 when it has none that we could see; raises BadSetup for another user's."""
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid != os.geteuid():
        raise BadSetup(f"it runs as user {uid}, we as user {os.geteuid()}")
    return int(pid)


def _pidfd(pid: int, undo: ExitStack) -> int:
    """-1 when the process is of another pid namespace; then only its socket tells of its end."""
    return _owned(os.pidfd_open(pid), undo) if pid > 0 else -1


def _owned(descriptor: int, undo: ExitStack) -> int:
    undo.callback(os.close, descriptor)
    return descriptor


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


def _lock(path: Path, undo: ExitStack) -> None:
    """Of two that listen at one path the second finds out here, and a leftover is told from a live socket."""
    lock = _owned(os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), undo)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(0, "another node listens there") from None


def _remove_leftover(path: Path) -> None:
    """Remove the socket of one that died; anything else stays, and is an error."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(0, "what is there is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise OSError(0, os_words(error.errno or 0)) from error
    raise OSError(0, "another program listens there")
