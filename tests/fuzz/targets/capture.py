# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/dissect/capture.py: a capture file that anybody may have made. An input is the file."""

import gzip
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether
from scapy.packet import Raw
from scapy.utils import PcapNgWriter, PcapWriter

from replicator.dissect import show
from replicator.dissect.capture import MAX_READ, BadCapture, Capture
from replicator.dissect.links import MAX_HELD, Links
from replicator.wire import Role
from tests.fuzz import frames
from tests.fuzz.judge import must, only
from tests.fuzz.targets.segments import shown

MAX_BYTES = 2048
WORDS = (
    b"\xd4\xc3\xb2\xa1", b"\x4d\x3c\xb2\xa1", b"\x0a\x0d\x0d\x0a", b"\x4d\x3c\x2b\x1a", b"\x06\x00\x00\x00",
    b"\x01\x00\x00\x00", b"\xff\xff\xff\x7f", b"\x65\x00\x00\x00", b"\x71\x00\x00\x00",
    b"\x08\x00\x45", b"\x86\xdd\x60",
)  # fmt: skip


@cache
def _packets() -> list[Ether]:
    stream = frames.hello("lb-a", Role.SENDER) + frames.small_frames()[0] + frames.session_frames()[0]
    packets, sequence = [], 100
    for flags, data in (("S", b""), ("A", stream[:150]), ("PA", stream[150:])):
        ends = {"src": "10.0.0.1", "dst": "10.0.0.2"}
        tcp = TCP(sport=40000, dport=7700, seq=sequence, flags=flags)
        packets.append(Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / IP(id=1, **ends) / tcp / Raw(data))
        packets[-1].time = 1_700_000_000 + len(packets)
        sequence += len(data) + ("S" in flags)
    return packets


def _written(writer: type[PcapWriter] | type[PcapNgWriter]) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        with writer(file.name) as made:
            made.write(_packets())
        return Path(file.name).read_bytes()


def seeds() -> Iterable[bytes]:
    pcap = _written(PcapWriter)
    yield pcap
    yield _written(PcapNgWriter)
    yield gzip.compress(pcap, mtime=0)
    yield pcap[:200]


def bound(data: bytes) -> int:
    packed = MAX_HELD if data[:2] == b"\x1f\x8b" else 0
    return (1 << 20) + 2 * MAX_READ + 1024 * len(data) + packed


@contextmanager
def _file(data: bytes) -> Iterator[Path]:
    fd = os.memfd_create("capture")
    try:
        os.write(fd, data)
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def check(data: bytes) -> None:
    links = Links()
    with _file(data) as path, only(BadCapture):
        capture = Capture(path)
        with capture:
            for segment in capture:
                for found in links.segment(segment):
                    shown(found)
        for found in links.finish():
            shown(found)
        must(all(line.isprintable() for line in show.remarks(capture, links.counts)), "remarks can be printed")
        must(show.end(capture, links.counts), "and an end")
