# SPDX-License-Identifier: GPL-2.0-or-later
"""How two nodes of one host come to share memory: what the dialer hands over, and what the listener checks.

Rules: nothing that came over the socket is believed. The memory cannot shrink any more, or a peer could kill us by
cutting it off; it has the size that was announced; what should be an eventfd is one; and the peer runs as our user. Of
two that listen at one path the second is told so, and what a dead one left there is removed.
"""

import fcntl
import mmap
import os
import socket
import stat
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from .address import BadAddress, os_words
from .ring import CONTROL_BYTES, Reader, Writer

LEAST_RING_BYTES, MOST_RING_BYTES = 64 << 10, 64 << 20
SCHEMES = ("shm:", "unix:")
LONGEST_PATH = 107  # sockaddr_un.sun_path, with its final zero
HOW_TO_WRITE = "Write shm:/PATH, for example shm:/run/dpvs-probe/a.shm."

# What the dialer says, with three descriptors: memory, bell of the listener, bell of the dialer; and the answer to it.
_OPEN = struct.Struct("<4sHHI4x")  # magic, version, whether the link is sealed, bytes of one ring
ANSWER = struct.Struct("<4sHH120s")  # magic, version, 0 or 1 for no, why not
_MAGIC = b"DPSM"
_VERSION = 1
_CREDENTIALS = struct.Struct("3i")
_CONTROL = mmap.PAGESIZE  # both rings' control words; the data of one ring and then of the other follow


class BadSetup(Exception):
    """The other side of the socket is no node, or not one that we talk to."""


def parse(text: str) -> Path:
    """The path in ``shm:/path`` or ``unix:/path``; raises BadAddress."""
    scheme = next((scheme for scheme in SCHEMES if text.startswith(scheme)), None)
    if scheme is None:
        raise BadAddress(f"'{text}' names no socket on this host", help_text=HOW_TO_WRITE)
    path = text.removeprefix(scheme)
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise BadAddress(f"'{text}': '{path}' is not the absolute path of a socket", help_text=HOW_TO_WRITE)
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise BadAddress(f"'{text}': a socket's path has {LONGEST_PATH} bytes at most", help_text=HOW_TO_WRITE)
    return Path(path)


class Shared(NamedTuple):
    """What both sides of a connection have."""

    memory: mmap.mmap
    ring_bytes: int
    bell: int  # rung by the peer
    peer_bell: int

    def rings(self, *, dialed: bool) -> tuple[Writer, Reader]:
        """Ours to write and ours to read; the dialer writes to the first."""
        halves = []
        with memoryview(self.memory) as whole:
            for which in range(2):
                control = which * CONTROL_BYTES
                data = _CONTROL + which * self.ring_bytes
                halves.append((whole[control : control + CONTROL_BYTES], whole[data : data + self.ring_bytes]))
        return Writer(*halves[not dialed]), Reader(*halves[dialed])


def offer(sock: socket.socket, ring_bytes: int, undo: ExitStack, *, sealed: bool) -> Shared:
    """Make what is shared, and hand it over. ``undo`` takes what has to be given back."""
    size = _CONTROL + 2 * ring_bytes
    with ExitStack() as here:  # a mapping stays without its descriptor
        memfd = _owned(os.memfd_create("dpvs-probe-link", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), here)
        os.ftruncate(memfd, size)
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        memory = undo.enter_context(mmap.mmap(memfd, size))
        theirs, ours = (_owned(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), undo) for _ in range(2))
        # So few bytes are taken at once by a socket that was just connected.
        socket.send_fds(sock, [_OPEN.pack(_MAGIC, _VERSION, sealed, ring_bytes)], [memfd, theirs, ours])
    return Shared(memory, ring_bytes, bell=ours, peer_bell=theirs)


def take(sock: socket.socket, undo: ExitStack, *, sealed: bool) -> Shared:
    """What a dialer hands over, all of it checked; the socket is readable. Raises BadSetup."""
    message, descriptors, flags, _ = socket.recv_fds(sock, _OPEN.size + 1, 3)
    with ExitStack() as here:
        for number, descriptor in enumerate(descriptors):
            _owned(descriptor, undo if number else here)
        if len(message) != _OPEN.size or not message.startswith(_MAGIC):
            raise BadSetup("this is no set-up of a link")
        _, version, theirs_sealed, ring_bytes = _OPEN.unpack(message)
        if version != _VERSION:
            raise BadSetup(f"version {version} of the set-up, {_VERSION} is spoken here")
        if theirs_sealed != sealed:
            raise BadSetup("one side seals what it sends and the other does not (--insecure)")
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
    return Shared(memory, ring_bytes, bell, peer_bell)


def answer(refusal: str = "") -> bytes:
    """What the listener says: yes, or why not."""
    return ANSWER.pack(_MAGIC, _VERSION, bool(refusal), refusal.encode()[:120])


def read_answer(message: bytes) -> None:
    """Raises BadSetup unless it is a yes."""
    if len(message) != ANSWER.size or not message.startswith(_MAGIC):
        raise BadSetup("who listens there is no node" if message else "closed while the link was set up")
    _, _, refused, why = ANSWER.unpack(message)
    if refused:
        text = why.rstrip(b"\0").decode(errors="replace")
        raise BadSetup(f"refused: {''.join(c if c.isprintable() else '?' for c in text)}")


def peer_of(sock: socket.socket) -> int:
    """Process id at the other end, 0 when it has none that we could see; raises BadSetup for another user's."""
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid != os.geteuid():
        raise BadSetup(f"it runs as user {uid}, we as user {os.geteuid()}")
    return int(pid)


def watch(pid: int, undo: ExitStack) -> int:
    """A pidfd; -1 when the process is of another pid namespace: then only its socket tells of its end."""
    return _owned(os.pidfd_open(pid), undo) if pid > 0 else -1


def bind(path: Path, undo: ExitStack) -> socket.socket:
    """A socket at ``path``, not listening yet. Raises OSError; ``strerror`` says why in our words."""
    lock = _owned(os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), undo)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(0, "another node listens there") from None
    _remove_leftover(path)
    bound = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    bound.setblocking(False)
    before = os.umask(0o177)  # the socket is born 0600; nothing else of ours runs between these two lines
    try:
        bound.bind(os.fspath(path))
    finally:
        os.umask(before)
    undo.callback(path.unlink, missing_ok=True)
    return bound


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


def _owned(descriptor: int, undo: ExitStack) -> int:
    undo.callback(os.close, descriptor)
    return descriptor
