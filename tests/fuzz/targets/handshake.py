# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/transport/tls.py: what may come on the socket, from strangers and from a peer whose words are changed.

An input is a part u8 (we dialled, or not) and a list of steps: bytes of a stranger; an honest peer's next words, of
which one byte is changed (where u16, how u8); reading; the end.
"""

import asyncio
import ssl
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from replicator import keys
from replicator.transport.tls import Refused, Tls, TlsStream
from tests.fuzz import frames
from tests.fuzz.frames import Step
from tests.fuzz.judge import must, told
from tests.fuzz.mutation import resize

MAX_BYTES = 1024
WORDS = (
    b"\x16\x03\x01",
    b"\x16\x03\x03",
    b"\x15\x03\x03\x00\x02\x02\x2a",
    b"\x17\x03\x03\x00\x11",
    b"\x14\x03\x03\x00\x01\x01",
)
STRANGER, HONEST, READ, END, KINDS = range(5)
CONNECTION_BYTES = 4 << 20  # read buffers, and what TLS holds of Python's memory


@cache
def _pair() -> tuple[Tls, Tls]:
    with tempfile.TemporaryDirectory() as directory:
        authority = keys.init_authority(Path(directory) / "authority", "east").directory
        made = []
        for name in ("lb-a", "lb-b"):
            made.append(Tls.load(keys.issue(authority, name, Path(directory) / name).directory))
    return made[0], made[1]


def seeds() -> Iterable[bytes]:
    honest, read, end = Step(HONEST, b""), Step(READ, b""), Step(END, b"")
    for part in (b"\0", b"\1"):
        yield part + frames.pack_steps([honest, honest, read, honest, end, read])
        yield part + frames.pack_steps([honest, Step(HONEST, b"\x40\x00\x01"), honest, read])
        yield part + frames.pack_steps([Step(STRANGER, b"\x16\x03\x01\x00\x05hello"), end])
        yield part + frames.pack_steps([Step(STRANGER, b"DP\x01\x01 no TLS at all"), read])


def bound(data: bytes) -> int:
    return CONNECTION_BYTES + 64 * len(data)


class _Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closing = False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def is_reading(self) -> bool:
        return True

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class _Peer:
    """The other end, which keeps to the rules; what it says may be changed."""

    def __init__(self, tls: Tls, *, dialed: bool) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = tls.dialing if dialed else tls.listening
        self._tls = context.wrap_bio(self._in, self._out, server_side=dialed)
        self._done = False

    def answer(self, heard: bytes) -> bytes:
        """What it says next."""
        self._in.write(heard)
        try:
            if not self._done:
                self._tls.do_handshake()
                self._done = True
            self._tls.write(b"a frame")
        except ssl.SSLError:
            pass
        return self._out.read()


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One for all inputs."""
    return asyncio.new_event_loop()


def check(data: bytes) -> None:
    _loop().run_until_complete(_check(data))


async def _check(data: bytes) -> None:
    ours, theirs = _pair()
    dialed = bool(data[:1] and data[0] & 1)
    stream = TlsStream(ours.dialing if dialed else ours.listening, dial=dialed)
    transport, peer = _Transport(), _Peer(theirs, dialed=not dialed)
    stream.connection_made(transport)
    for kind, payload in frames.parse_steps(data[1:], KINDS):
        if kind == STRANGER:
            _feed(stream, payload)
        elif kind == HONEST:
            heard = bytes(transport.written)
            transport.written.clear()
            words = bytearray(peer.answer(heard))
            if len(payload) >= 3 and words and payload[2]:
                words[int.from_bytes(payload[:2], "little") % len(words)] ^= payload[2]
            _feed(stream, bytes(words))
        elif kind == READ and stream.ready.done():
            await _read(stream)
        elif kind == END:
            stream.eof_received()
    if stream.ready.done():
        error = stream.ready.exception()
        must(error is None or isinstance(error, Refused), "a peer's name, or why not")
        if error is not None:
            must(str(error).isprintable(), "the reason can be printed")
        else:
            must(stream.ready.result() == "lb-b", "the name that was proven")
    stream.close()
    stream.connection_lost(None)


def _feed(stream: TlsStream, data: bytes) -> None:
    """As asyncio does: into the buffer, as much as it holds, until the transport is closed."""
    while data and not stream.transport.is_closing():
        room = stream.get_buffer(-1)
        size = min(len(room), len(data))
        room[:size] = data[:size]
        stream.buffer_updated(size)
        data = data[size:]


async def _read(stream: TlsStream) -> None:
    try:
        async with asyncio.timeout(0):
            found = await stream.read(1 << 16)
    except TimeoutError:
        return
    except OSError as error:
        told(error)
        return
    must(found == b"a frame" * (len(found) // 7), "only what the peer said comes out")


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    spares = [b"\x16\x03\x01\x00\x05hello", b"\x10\x00\x01", b"\x15\x03\x03\x00\x02\x02\x2a"]
    steps = frames.mutate_steps(data[1:], longest - 1, seed, resize, kinds=KINDS, feeds=KINDS, spares=spares)
    return (data[:1] or b"\0") + steps
