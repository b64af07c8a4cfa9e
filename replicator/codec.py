# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions to bodies of frames and back, a block at a time.

Rules: a body is kind u8, flags u8, count u16, raw length u32 and then ``count`` items of one size, as they are or as
one block of LZ4 or Zstandard. Kind 4: records with 4-byte addresses (both families IPv4), 96 bytes. Kind 6: records as
they are, 144 bytes. Kind 0: slot and generation of sessions that ended, 8 bytes. The raw length must be count times
size, and is checked before anything is unpacked. What a peer sends is checked for all that indexing with it relies on.
"""

import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from collector.record import AF_INET, AF_INET6, RECORD, Records, Slots, words
from probes.flow import FLOW_KEY

from . import blocks, packing
from .packing import Telling
from .wire import HEADER, MAGIC, MAX_BODY, VERSION, WANT, WANT_BYTES, Fault, Opcode, ProtocolError, pack

BODY = struct.Struct("<BBHI")
IPV4, IPV6, ENDED = 4, 6, 0
SIZES = {IPV4: 96, IPV6: RECORD.itemsize, ENDED: 8}
COMPRESSED = blocks.LZ4  # flag of a body; blocks.ZSTD is the other one
PAYS_BELOW = 0.9  # compressed bodies larger than that share of the plain one are sent plain
MAX_COUNT = 0xFFFF

Buffer = bytes | memoryview
FlowKeys = npt.NDArray[np.void]  # probes.flow.FLOW_KEY
_PREFIX = HEADER.size + BODY.size
_WRONG = {
    packing.NO_GENERATION: "a session without a generation",
    packing.NOT_IPV4: "a session that is not IPv4 among IPv4 records",
    packing.NO_FAMILY: "a session of an unknown address family",
    packing.LONG_ADDRESS: "an IPv4 address of more than 4 bytes",
}


def batches(kind: int, n: int, body_bytes: int) -> Iterator[slice]:
    """Cut n items of a kind into runs whose bodies hold at most ``body_bytes`` (and at least one item)."""
    step = min(max(1, (min(body_bytes, MAX_BODY) - BODY.size) // SIZES[kind]), MAX_COUNT)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def pack_records(opcode: Opcode, sequence: int, records: Records, kind: int, *, compress: int = blocks.PLAIN) -> Buffer:
    """A CREATE or UPDATE frame of n records, all of one kind."""
    n = len(records)
    nobody = np.zeros(n, np.uint8)
    telling = Telling(words(records), nobody, nobody)
    return pack_rows(opcode, sequence, telling, np.arange(n), kind, compress=compress)


def pack_rows(
    opcode: Opcode, sequence: int, rows: Telling, slots: Slots, kind: int, *, compress: int = blocks.PLAIN
) -> Buffer:
    """A CREATE or UPDATE frame of n rows of a table, all of one kind."""
    n = len(slots)
    frame = np.empty(_PREFIX + n * SIZES[kind], np.uint8)
    items = frame[_PREFIX:].view(np.uint64).reshape(n, SIZES[kind] // 8)
    if kind == IPV4:
        rows.pack4(slots, items)
    else:
        rows.pack6(slots, items)
    return _finish(frame, opcode, sequence, kind, compress=compress)


def pack_deletes(sequence: int, slots: Slots, generations: npt.NDArray[np.uint32]) -> Buffer:
    """A DELETE frame of n sessions that ended; numbers that count up are nothing to LZ4, so it is never compressed."""
    n = len(slots)
    frame = np.empty(_PREFIX + n * SIZES[ENDED], np.uint8)
    pairs = frame[_PREFIX:].view(np.uint32).reshape(n, 2)
    pairs[:, 0] = slots
    pairs[:, 1] = generations
    return _finish(frame, Opcode.DELETE, sequence, ENDED, compress=blocks.PLAIN)


def _finish(frame: npt.NDArray[np.uint8], opcode: Opcode, sequence: int, kind: int, *, compress: int) -> Buffer:
    raw = len(frame) - _PREFIX
    n = raw // SIZES[kind]
    if compress:
        block = blocks.pack(compress, frame[_PREFIX:].data)
        if len(block) < raw * PAYS_BELOW:
            header = HEADER.pack(MAGIC, VERSION, opcode, BODY.size + len(block), sequence)
            return header + BODY.pack(kind, compress, n, raw) + block
    HEADER.pack_into(frame.data, 0, MAGIC, VERSION, opcode, BODY.size + raw, sequence)
    BODY.pack_into(frame.data, HEADER.size, kind, 0, n, raw)
    return frame.data


def parse_records(body: bytes, slots: int) -> Records:
    """The records of a CREATE or UPDATE body, a copy. Raises ProtocolError.

    Slots are below ``slots``, generations are not 0. A slot may stand in it twice: whoever indexes with it has to look.
    """
    kind, n, payload = _open(body, (IPV4, IPV6))
    records = np.empty(n, RECORD)
    items = np.frombuffer(payload, np.uint64).reshape(n, SIZES[kind] // 8)
    wrong = (packing.unpack4 if kind == IPV4 else packing.unpack6)(items, slots, words(records))
    if wrong == packing.NO_SUCH_SLOT:
        raise ProtocolError(Fault.RECORD, f"slot {int((items[:, 0] & 0xFFFFFFFF).max())} of {slots}")
    if wrong:
        raise ProtocolError(Fault.RECORD, _WRONG[wrong])
    return records


def parse_deletes(body: bytes, slots: int) -> tuple[Slots, npt.NDArray[np.uint32]]:
    """Slots and generations of a DELETE body, copies. Raises ProtocolError."""
    _, n, payload = _open(body, (ENDED,))
    pairs = np.frombuffer(payload, np.uint32).reshape(n, 2)
    _check_names(pairs, slots)
    return pairs[:, 0].astype(np.int64), pairs[:, 1].copy()


def _open(body: bytes, kinds: tuple[int, ...]) -> tuple[int, int, bytes | memoryview]:
    """Kind, count and items of a body."""
    kind, flags, n, raw = BODY.unpack_from(body)
    if kind not in kinds:
        raise ProtocolError(Fault.RECORD, f"kind {kind}")
    if n == 0 or raw != n * SIZES[kind] or raw > MAX_BODY:
        raise ProtocolError(Fault.COUNT, f"{n} items of kind {kind} in {raw} bytes")
    block = memoryview(body)[BODY.size :]
    if flags == 0:
        if len(block) != raw:
            raise ProtocolError(Fault.COUNT, f"{len(block)} bytes of items where {raw} are announced")
        return kind, n, block
    if flags not in (blocks.LZ4, blocks.ZSTD):
        raise ProtocolError(Fault.COMPRESSION, f"flags {flags:#x}")
    try:
        payload = blocks.unpack(flags, block, raw)
    except blocks.BadBlock as error:
        raise ProtocolError(Fault.COMPRESSION, str(error)) from None
    return kind, n, payload


def _check_names(items: npt.NDArray[np.uint32], slots: int) -> None:
    """First word slot, second generation."""
    if int(items[:, 0].max()) >= slots:
        raise ProtocolError(Fault.RECORD, f"slot {int(items[:, 0].max())} of {slots}")
    if not items[:, 1].all():
        raise ProtocolError(Fault.RECORD, "a session without a generation")


def pack_want(keys: FlowKeys) -> bytes:
    """A WANT frame for n flows, at most MAX_WANT."""
    return pack(Opcode.WANT, 0, WANT.pack(len(keys), 0) + keys.astype(FLOW_KEY).tobytes())


def parse_want(body: bytes) -> FlowKeys:
    """The flows of a WANT body, a copy. Raises ProtocolError."""
    count, zero = WANT.unpack_from(body)
    if count == 0 or zero or len(body) != WANT.size + count * WANT_BYTES:
        raise ProtocolError(Fault.COUNT, f"{count} flows in {len(body)} bytes")
    keys = np.frombuffer(body, FLOW_KEY, count, WANT.size).copy()
    four = keys["af"] == AF_INET
    if not (four | (keys["af"] == AF_INET6)).all() or keys["zero"].any():
        raise ProtocolError(Fault.RECORD, "a flow of no family")
    if keys["caddr"][four, 4:].any() or keys["vaddr"][four, 4:].any():
        raise ProtocolError(Fault.RECORD, "an IPv4 address that is longer")
    return keys
