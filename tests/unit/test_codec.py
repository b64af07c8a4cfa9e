# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/codec.py: golden bodies, records there and back, and bodies of nonsense."""

import contextlib
import itertools
import struct

import lz4.block
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.record import Records
from probes.flow import FLOW_KEY
from replicator import codec
from replicator.blocks import ZSTD
from replicator.codec import BODY, COMPRESSED, ENDED, IPV4, IPV6, FlowKeys
from replicator.wire import HEADER, MAX_BODY, Fault, Frame, FrameReader, Opcode, ProtocolError
from tests.unit.session_records import random_sessions, sessions

SLOTS = 100_000


def frame_of(data: codec.Buffer) -> Frame:
    reader = FrameReader()
    reader.feed(data)
    frame = reader.next()
    assert frame is not None
    assert reader.buffered == 0
    return frame


def golden_session(ipv6: bool) -> Records:
    one = sessions(1, first=0x0102, ipv6=ipv6)
    one["generation"], one["worker"] = 3, 1
    one["flags"] = 0x1100
    one["wscale_vs"], one["wscale_rs"], one["pp_version"], one["pp_sent"] = 7, 8, 2, 1
    one["fnat_fdata_seq"], one["fnat_prev_delta"] = 0x21222324, 0x31323334
    one["sp_isn"], one["sp_delta"], one["sp_fdata_seq"], one["sp_prev_delta"] = 1, 2, 3, 4
    one["rs_end_seq"], one["rs_end_ack"] = 0x41424344, 0x51525354
    return one


def golden_flow() -> FlowKeys:
    one = np.zeros(1, FLOW_KEY)
    one["caddr"][0, :4], one["vaddr"][0, :4] = (10, 0, 1, 2), (11, 0, 0, 0)
    one["cport"], one["vport"], one["proto"], one["af"] = 0x0502, 80, 6, 2
    return one


TAIL = (
    "0502 0050 0502 1f90 905f0100 01 07 08 02"  # ports; timeout; worker, window scales, PROXY version
    "0f070000 1f0d0000 24232221 34333231 01000000 02000000 03000000 04000000"  # fnat_*, sp_*
    "44434241 54535251 01 00000000000000"  # rs_end_*, pp_sent, padding
)
GOLDEN = {
    "create ipv4": (
        codec.pack_records(Opcode.CREATE, 5, golden_session(ipv6=False), IPV4),
        "4450 01 10 68000000 0500000000000000 04 00 0100 60000000"
        "02010000 03000000 02 02 06 05 0100 0011 0a000102 0b000000 0c000000 0d000000" + TAIL,
    ),
    "update ipv6": (
        codec.pack_records(Opcode.UPDATE, 6, golden_session(ipv6=True), IPV6),
        "4450 01 11 98000000 0600000000000000 06 00 0100 90000000"
        "02010000 03000000 0a 0a 06 05 0100 0011"
        "0a000000000000000000000000000102 0b000000000000000000000000000000"
        "0c000000000000000000000000000000 0d000000000000000000000000000000" + TAIL,
    ),
    "delete": (
        codec.pack_deletes(7, np.array([1, 0x01020304]), np.array([2, 3], np.uint32)),
        "4450 01 12 18000000 0700000000000000 00 00 0200 10000000 01000000 02000000 04030201 03000000",
    ),
    "want": (
        codec.pack_want(golden_flow()),
        "4450 01 08 2c000000 0000000000000000 0100 0000"
        "0a000102000000000000000000000000 0b000000000000000000000000000000 0502 0050 06 02 0000",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_frames(name: str) -> None:
    frame, expected = GOLDEN[name]
    assert bytes(frame).hex() == expected.replace(" ", "")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.booleans(), st.booleans())
def test_records_there_and_back(seed: int, n: int, ipv6: bool, compress: bool) -> None:
    records = random_sessions(np.random.default_rng(seed), n, SLOTS, ipv6=ipv6)
    kind = IPV6 if ipv6 else IPV4
    frame = frame_of(codec.pack_records(Opcode.CREATE, 9, records, kind, compress=compress))
    assert (frame.opcode, frame.sequence) == (Opcode.CREATE, 9)
    assert codec.parse_records(frame.body, SLOTS).tobytes() == records.tobytes()


def test_zstandard_there_and_back_and_tighter_than_lz4() -> None:
    for kind, records in ((IPV4, sessions(700)), (IPV6, sessions(700, ipv6=True))):
        sizes = {}
        for how in (0, COMPRESSED, ZSTD):
            frame = frame_of(codec.pack_records(Opcode.UPDATE, 3, records, kind, compress=how))
            assert codec.parse_records(frame.body, SLOTS).tobytes() == records.tobytes()
            sizes[how] = len(frame.body)
        assert sizes[ZSTD] < sizes[COMPRESSED] < sizes[0]


def test_ipv4_fits_the_wide_kind_as_well() -> None:
    records = sessions(3)
    body = frame_of(codec.pack_records(Opcode.CREATE, 1, records, IPV6)).body
    assert codec.parse_records(body, SLOTS).tobytes() == records.tobytes()


def test_ends_there_and_back() -> None:
    slots, generations = np.arange(5000) * 3, np.arange(1, 5001, dtype=np.uint32)
    body = frame_of(codec.pack_deletes(1, slots, generations)).body
    got_slots, got_generations = codec.parse_deletes(body, SLOTS)
    assert got_slots.tolist() == slots.tolist()
    assert got_generations.tolist() == generations.tolist()
    packed = struct.pack("<BBHI", ENDED, COMPRESSED, 5000, 40_000) + lz4_of(body[8:])
    assert codec.parse_deletes(packed, SLOTS)[0].tolist() == slots.tolist()


def test_compression_only_where_it_pays() -> None:
    alike = codec.pack_records(Opcode.CREATE, 1, sessions(500), IPV4, compress=True)
    assert len(alike) < 500 * 96 // 2
    noise = random_sessions(np.random.default_rng(1), 500, SLOTS)
    assert len(codec.pack_records(Opcode.CREATE, 1, noise, IPV4, compress=True)) == 16 + 8 + 500 * 96


@pytest.mark.parametrize(("kind", "size"), [(IPV4, 96), (IPV6, 144), (ENDED, 8)])
@pytest.mark.parametrize("body_bytes", [1, 1000, 64 << 10, 1 << 30])
def test_batches_fit_their_bodies(kind: int, size: int, body_bytes: int) -> None:
    parts = list(codec.batches(kind, 200_000, body_bytes))
    assert parts[0].start == 0
    assert parts[-1].stop == 200_000
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
    for part in parts:
        n = part.stop - part.start
        assert 0 < n <= 0xFFFF
        assert BODY.size + n * size <= min(max(body_bytes, BODY.size + size), MAX_BODY)
    assert list(codec.batches(kind, 0, body_bytes)) == []


def body(kind: int, flags: int, count: int, raw: int, payload: bytes) -> bytes:
    return struct.pack("<BBHI", kind, flags, count, raw) + payload


def raw_of(records: Records, kind: int = IPV4) -> bytes:
    return frame_of(codec.pack_records(Opcode.CREATE, 1, records, kind)).body[8:]


def changed(name: str, value: object, *, ipv6: bool = False) -> bytes:
    records = sessions(1, first=0x0102, ipv6=ipv6)
    records[name] = value
    return raw_of(records, IPV6 if ipv6 else IPV4)


def lz4_of(raw: bytes) -> bytes:
    return bytes(lz4.block.compress(raw, store_size=False))


def zstd_of(raw: bytes, **how: bool) -> bytes:
    return bytes(zstandard.ZstdCompressor(**how).compress(raw))


ONE = raw_of(sessions(1))
BOMB = lz4_of(bytes(MAX_BODY * 4))


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (body(5, 0, 1, 96, ONE), Fault.RECORD),
        (body(ENDED, 0, 1, 8, bytes(8)), Fault.RECORD),
        (body(IPV4, 0, 0, 0, b""), Fault.COUNT),
        (body(IPV4, 0, 2, 96, ONE), Fault.COUNT),
        (body(IPV4, 0, 1, 97, ONE + b"x"), Fault.COUNT),
        (body(IPV4, 0, 1, 96, ONE + b"x"), Fault.COUNT),
        (body(IPV4, 0, 1, 96, ONE[:-1]), Fault.COUNT),
        (body(IPV4, 0, 65535, 65535 * 96, ONE), Fault.COUNT),
        (body(IPV4, 2, 1, 96, ONE), Fault.COMPRESSION),
        (body(IPV4, 255, 1, 96, ONE), Fault.COMPRESSION),
        (body(IPV4, COMPRESSED, 1, 96, b""), Fault.COMPRESSION),
        (body(IPV4, COMPRESSED, 1, 96, ONE), Fault.COMPRESSION),
        (body(IPV4, COMPRESSED, 1, 96, lz4_of(ONE[:-1])), Fault.COMPRESSION),
        (body(IPV4, COMPRESSED, 1, 96, lz4_of(ONE + b"x")), Fault.COMPRESSION),
        (body(IPV4, COMPRESSED, 1, 96, BOMB), Fault.COMPRESSION),
        (body(IPV4, COMPRESSED, 65535, 65535 * 96, BOMB), Fault.COUNT),
        (body(IPV4, ZSTD, 1, 96, b""), Fault.COMPRESSION),
        (body(IPV4, ZSTD, 1, 96, lz4_of(ONE)), Fault.COMPRESSION),
        (body(IPV4, ZSTD, 1, 96, zstd_of(ONE[:-1])), Fault.COMPRESSION),
        (body(IPV4, ZSTD, 1, 96, zstd_of(ONE + b"x")), Fault.COMPRESSION),
        (body(IPV4, ZSTD, 1, 96, zstd_of(ONE) + b"x"), Fault.COMPRESSION),
        (body(IPV4, ZSTD, 1, 96, zstd_of(ONE)[:-1]), Fault.COMPRESSION),
        (body(IPV4, ZSTD, 1, 96, zstd_of(ONE, write_content_size=False)), Fault.COMPRESSION),
        (body(IPV4, ZSTD, 1, 96, zstd_of(bytes(MAX_BODY * 64))), Fault.COMPRESSION),
        (body(IPV4, COMPRESSED | ZSTD, 1, 96, zstd_of(ONE)), Fault.COMPRESSION),
        (body(IPV4, 0, 1, 96, changed("slot", SLOTS)), Fault.RECORD),
        (body(IPV4, 0, 1, 96, changed("generation", 0)), Fault.RECORD),
        (body(IPV4, 0, 1, 96, changed("af", 10)), Fault.RECORD),
        (body(IPV4, 0, 1, 96, changed("af_out", 10)), Fault.RECORD),
        (body(IPV6, 0, 1, 144, changed("af", 11, ipv6=True)), Fault.RECORD),
        (body(IPV6, 0, 1, 144, changed("af_out", 0, ipv6=True)), Fault.RECORD),
        (body(IPV6, 0, 1, 144, changed("af", 2, ipv6=True)), Fault.RECORD),
    ],
)
def test_bodies_of_nonsense(data: bytes, fault: Fault) -> None:
    with pytest.raises(ProtocolError) as caught:
        codec.parse_records(data, SLOTS)
    assert caught.value.fault is fault


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (body(IPV4, 0, 1, 96, ONE), Fault.RECORD),
        (body(ENDED, 0, 1, 8, struct.pack("<II", SLOTS, 1)), Fault.RECORD),
        (body(ENDED, 0, 1, 8, struct.pack("<II", 1, 0)), Fault.RECORD),
        (body(ENDED, 0, 2, 8, bytes(8)), Fault.COUNT),
    ],
)
def test_ends_of_nonsense(data: bytes, fault: Fault) -> None:
    with pytest.raises(ProtocolError) as caught:
        codec.parse_deletes(data, SLOTS)
    assert caught.value.fault is fault


@settings(max_examples=300, deadline=None)
@given(
    st.binary(min_size=8, max_size=400),
    st.sampled_from([b"", b"\x04\x00\x01\x00\x60\x00\x00\x00", b"\x04\x01\x02\x00\xc0\x00\x00\x00"]),
)
def test_noise_gives_records_or_a_protocol_error(noise: bytes, start: bytes) -> None:
    for parse in (codec.parse_records, codec.parse_deletes):
        with contextlib.suppress(ProtocolError):
            parse(start + noise, 1 << 32)


@pytest.mark.parametrize("n", [1, 255, 256])
def test_wanted_flows_there_and_back(n: int) -> None:
    keys = np.repeat(golden_flow(), n).astype(FLOW_KEY)
    keys["cport"] = np.arange(n)
    keys["af"][::2], keys["caddr"][::2, 7] = 10, 9
    assert (codec.parse_want(codec.pack_want(keys)[HEADER.size :]) == keys).all()


def want(**changed: object) -> bytes:
    one = golden_flow()
    for name, value in changed.items():
        one[name] = value
    return codec.pack_want(one)[HEADER.size :]


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (want(af=3), Fault.RECORD),
        (want(zero=1), Fault.RECORD),
        (want(caddr=1), Fault.RECORD),
        (want(vaddr=1), Fault.RECORD),
        (want()[:-1], Fault.COUNT),
        (want() + bytes(40), Fault.COUNT),
        (b"\0\0\0\0", Fault.COUNT),
        (b"\1\0\1\0" + want()[4:], Fault.COUNT),
    ],
)
def test_wanted_flows_of_nonsense(data: bytes, fault: Fault) -> None:
    with pytest.raises(ProtocolError) as caught:
        codec.parse_want(data)
    assert caught.value.fault is fault
