# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames out of one direction of a captured link, whatever the capture lacks.

Rules: pure. At the beginning of a connection frames begin at the first byte. Where the beginning was not captured,
after a hole, and after what the protocol does not allow, the next frame has to be looked for: something that a header
can be, and with sessions the beginning of a body that fits it. What was passed over is said (``Skipped``). A hole that
ends inside the body of a frame costs that frame only. What is TLS, or nothing that we know, is said once and kept no
longer. At most one frame, and what was fed behind it, is held.
"""

import re
from enum import Enum
from typing import NamedTuple

from replicator import blocks
from replicator.codec import BODY, SIZES
from replicator.wire import BODY_BYTES, HEADER, MAGIC, MAX_BODY, VERSION, Fault, Frame, FrameReader, Opcode
from replicator.wire import ProtocolError as BadFrame

SEARCH_BYTES = 2 * (HEADER.size + MAX_BODY)  # in these a frame has to begin, wherever the capture began
_MARK = MAGIC.to_bytes(2, "little") + bytes((VERSION,))
_WHOLE_PREFIX = HEADER.size + BODY.size
_NO_SEQUENCE = (Opcode.HELLO, Opcode.HEARTBEAT, Opcode.RESYNC, Opcode.REFUSE, Opcode.WANT)
_SESSIONS = (Opcode.CREATE, Opcode.UPDATE, Opcode.DELETE)
# TLS records: handshake, alert, change of cipher, data; version 3.1 to 3.3; at most 2**14 + 2048 bytes (RFC 8446, 5.1).
_TLS = re.compile(rb"[\x14-\x17]\x03[\x01-\x03]([\x00-\x48].)", re.DOTALL)
_TLS_HEADER = 5
_TLS_WINDOW = 3 * ((1 << 14) + 2048 + _TLS_HEADER)


class Kind(Enum):
    """What a direction carries."""

    UNKNOWN = "unknown"  # yet
    SYNC = "sync"
    TLS = "tls"
    OTHER = "other"


class Skipped(NamedTuple):
    """Bytes that no frame was made of."""

    size: int
    why: str


class Refused(NamedTuple):
    """Something that the protocol does not allow stands where a frame should begin."""

    error: BadFrame


Item = Frame | Skipped | Refused


class Scanner:
    """See above. ``feed`` pieces of the stream; ``kind`` says what it turned out to be."""

    def __init__(self, from_start: bool) -> None:
        """``from_start``: what is fed first is the beginning of the connection."""
        self.kind = Kind.UNKNOWN
        self.starts_with = b""  # of something else
        self._buffer = bytearray()
        self._in_step = from_start  # a frame begins at the beginning of the buffer
        self._passed = 0  # bytes, while looking for the next frame
        self._why = "the capture begins within the connection"
        self._drop = 0  # bytes to come of a frame that is not complete in the capture

    @property
    def held(self) -> int:
        """Bytes kept."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[Item]:
        """More of the stream."""
        if self.kind in (Kind.TLS, Kind.OTHER):
            return []
        if self._drop:
            dropped = min(self._drop, len(data))
            self._drop -= dropped
            data = data[dropped:]
        self._buffer += data
        found: list[Item] = []
        while self._step(found):
            pass
        return found

    def missing(self, size: int) -> list[Item]:
        """So many bytes are not in the capture; what is fed next comes after them."""
        if self.kind in (Kind.TLS, Kind.OTHER):
            return []
        if self._drop >= size:
            self._drop -= size
            return []
        have = len(self._buffer)
        found: list[Item] = []
        if self._in_step and not self._drop and have >= HEADER.size:
            _, _, code, length, sequence = HEADER.unpack_from(self._buffer)
            left = HEADER.size + length - have
            name = f"{Opcode(code).name} #{sequence}"
            found.append(Skipped(have, f"the rest of {name} is not in the capture ({size} bytes are missing)"))
            self._buffer.clear()
            if left >= size:
                self._drop = left - size
                return found
        elif self._in_step:
            found.append(Skipped(have, f"{size} bytes are missing in the capture"))
        else:
            self._passed += have
            found.append(Skipped(self._passed, self._why))
        self._buffer.clear()
        self._lose_step(f"after {size} bytes that are missing in the capture")
        return found

    def finish(self) -> list[Item]:
        """The stream is over."""
        if self.kind is Kind.UNKNOWN and self._buffer:
            self._judge(_TLS.match(self._buffer) is not None)
            return []
        if self.kind is not Kind.SYNC:
            return []
        if not self._in_step:
            left = self._passed + len(self._buffer)
            return [Skipped(left, self._why)] if left else []
        return [Skipped(len(self._buffer), "the capture ends within a frame")] if self._buffer else []

    def _step(self, found: list[Item]) -> bool:
        """One frame, or one thing that is none; False when more bytes are needed."""
        if self.kind in (Kind.TLS, Kind.OTHER) or self._drop:
            return False
        if not self._in_step and not self._search(found):
            return False
        if len(self._buffer) < HEADER.size:
            if self.kind is Kind.UNKNOWN and len(self._buffer) >= _TLS_HEADER and _TLS.match(self._buffer):
                self._judge(tls=True)
            return False
        reader = FrameReader()  # holds no copy of more than it is given: the header decides
        reader.feed(memoryview(self._buffer)[: HEADER.size])
        try:
            reader.next()
        except BadFrame as error:
            self._no_frame(error, found)
            return True
        _, _, code, length, sequence = HEADER.unpack_from(self._buffer)
        self.kind = Kind.SYNC
        end = HEADER.size + length
        if len(self._buffer) < end:
            return False
        found.append(Frame(Opcode(code), sequence, bytes(memoryview(self._buffer)[HEADER.size : end])))
        del self._buffer[:end]
        return True

    def _no_frame(self, error: BadFrame, found: list[Item]) -> None:
        if self.kind is Kind.UNKNOWN and error.fault is Fault.MAGIC:
            self._judge(_TLS.match(self._buffer) is not None)
            return
        self.kind = Kind.SYNC
        found.append(Refused(error))
        self._passed = 1
        del self._buffer[:1]
        self._lose_step("no frame", passed=1)

    def _lose_step(self, why: str, passed: int = 0) -> None:
        self._in_step, self._why, self._passed, self._drop = False, why, passed, 0

    def _search(self, found: list[Item]) -> bool:
        """Go to the next thing that can be a frame."""
        buffer = self._buffer
        if self.kind is Kind.UNKNOWN and _chained_tls(buffer):
            self._judge(tls=True)
            return False
        start = 0
        while (at := buffer.find(_MARK, start)) >= 0:
            fits = _plausible(buffer, at)
            if fits is None:
                break  # wait for more of it
            if fits:
                self._in_step = True
                if self._passed + at:
                    found.append(Skipped(self._passed + at, self._why))
                self._passed = 0
                del buffer[:at]
                return True
            start = at + 1
        keep = at if at >= 0 else len(buffer) - len(_MARK) + 1
        if self.kind is Kind.UNKNOWN:
            keep = min(keep, len(buffer) - _TLS_WINDOW)  # in which a chain of TLS records has to show
        if keep > 0:
            self._passed += keep
            del buffer[:keep]
        if self.kind is Kind.UNKNOWN and self._passed + len(buffer) > SEARCH_BYTES:
            self._judge(tls=False)
        return False

    def _judge(self, tls: bool) -> None:
        self.kind = Kind.TLS if tls else Kind.OTHER
        self.starts_with = bytes(self._buffer[:16])
        self._buffer.clear()


def _plausible(buffer: bytearray, at: int) -> bool | None:
    """Whether a frame can begin there; None when more bytes are needed to say so."""
    if len(buffer) - at < HEADER.size:
        return None
    _, _, code, length, sequence = HEADER.unpack_from(buffer, at)
    limits = BODY_BYTES.get(code)
    if limits is None or not limits[0] <= length <= limits[1]:
        return False
    if code in _SESSIONS:
        if len(buffer) - at < _WHOLE_PREFIX:
            return None
        kind, flags, count, raw = BODY.unpack_from(buffer, at + HEADER.size)
        if raw != count * SIZES.get(kind, 0) or not 0 < raw <= MAX_BODY or flags not in blocks.NAMES:
            return False
        if sequence == 0 or (not flags and length != BODY.size + raw):
            return False
    elif code in _NO_SEQUENCE and sequence:
        return False
    follows = at + HEADER.size + length
    behind = bytes(buffer[follows : follows + len(_MARK)])
    return _MARK.startswith(behind)


def _chained_tls(buffer: bytearray) -> bool:
    """Whether three TLS records stand one behind the other somewhere."""
    for record in _TLS.finditer(buffer):
        at, links = record.start(), 0
        while links < 3 and (match := _TLS.match(buffer, at)) is not None:
            links += 1
            at += _TLS_HEADER + int.from_bytes(match[1], "big")
        if links == 3:
            return True
    return False
