# SPDX-License-Identifier: GPL-2.0-or-later
"""``dpvs-probe decode`` on captures that are made here: what it prints, and how it ends."""

import gzip
import json
import struct
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import CookedLinux, Dot1Q, Ether
from scapy.packet import Packet, Raw
from scapy.utils import wrpcap, wrpcapng

from replicator import codec, wire
from replicator.codec import IPV4
from replicator.dissect import capture, show
from replicator.dissect.links import Said
from replicator.wire import Opcode, Reason, SyncReason
from tests.unit.session_records import sessions
from tests.unit.test_cli import Runner, run  # noqa: F401  (a fixture)
from tests.unit.test_dissect import CLIENT_HELLO, HELLO_A, HELLO_B, A, B, Talk, tls_records

CREATE = bytes(codec.pack_records(Opcode.CREATE, 2, sessions(2), IPV4))
STREAM = [HELLO_A, wire.pack_snapshot_begin(1, 1, SyncReason.FIRST), CREATE, wire.pack_snapshot_end(3, 1)]


def link() -> Talk:
    return Talk().say(A, STREAM[0]).say(B, HELLO_B).say(A, b"".join(STREAM[1:]), 100).say(B, wire.pack(Opcode.ACK, 3))


def packets(talk: Talk, link_layer: Packet | None = None, version: int = 4) -> list[Packet]:
    made = []
    for segment in talk.segments:
        (source, sport), (destination, dport) = segment.source, segment.destination
        if version == 4:
            network = IP(src=source, dst=destination)
        else:
            network = IPv6(src="fd00::" + source.rpartition(".")[2], dst="fd00::" + destination.rpartition(".")[2])
        flags = "S" * segment.syn + "A" * (segment.acknowledged is not None)
        tcp = TCP(sport=sport, dport=dport, seq=segment.sequence, ack=segment.acknowledged or 0, flags=flags)
        below = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") if link_layer is None else link_layer
        packet = below / network / tcp / Raw(segment.data)
        packet.time = segment.time_ns / 1e9
        made.append(packet)
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "link.pcap"


def opcodes(lines: str) -> list[str]:
    return [line.split()[5] for line in lines.splitlines() if not line.startswith(" ")]


EXPECTED = ["HELLO", "HELLO", "SNAPSHOT_BEGIN", "CREATE", "SNAPSHOT_END", "ACK"]


def test_one_line_a_frame(run: Runner, file: Path) -> None:  # noqa: F811
    wrpcap(str(file), packets(link()))
    ran = run("decode", str(file))
    assert ran.status == 0
    assert ran.out.splitlines()[3] == (
        "2023-11-14 22:13:20.007000  10.9.8.1:40000 -> 10.9.8.2:7700  CREATE #2 2 ipv4 sessions, 216 bytes"
    )
    assert "sender a, run 1, 1000 slots" in ran.out
    assert "SNAPSHOT_BEGIN #1 sync 1, first, 24 bytes" in ran.out
    assert opcodes(ran.out) == EXPECTED
    assert ran.err == "6 frames on 1 connection\n"


def test_each_session_when_asked(run: Runner, file: Path) -> None:  # noqa: F811
    wrpcap(str(file), packets(link()))
    lines = run("decode", "-v", str(file)).out.splitlines()
    (at,) = [number for number, line in enumerate(lines) if "CREATE" in line]
    assert lines[at + 1 : at + 3] == [
        f"    {slot}.1 tcp FNAT ESTABLISHED 10.0.0.{slot}:{1024 + slot} -> 11.0.0.0:80 | 12.0.0.0:{1024 + slot} -> "
        "13.0.0.0:8080 timeout 90 s worker - -"
        for slot in (0, 1)
    ]


def test_objects(run: Runner, file: Path) -> None:  # noqa: F811
    wrpcap(str(file), packets(link()))
    lines = [json.loads(line) for line in run("decode", "--json", "-v", str(file)).out.splitlines()]
    assert [line.get("opcode") for line in lines] == [*EXPECTED, None]
    assert lines[0]["node"] == "a"
    assert (lines[3]["from"], lines[3]["to"]) == ("10.9.8.1:40000", "10.9.8.2:7700")
    assert lines[3]["time_ns"] // 1000 == 1_700_000_000_007_000
    assert [row["slot"] for row in lines[3]["sessions"]] == [0, 1]
    assert lines[-1] == {
        "event": "end", "packets": 8, "cut": False, "frames": 6, "faults": 0, "links": 1, "encrypted": 0, "others": 0,
        "given_up": 0, "skipped_bytes": 0, "repeated_bytes": 0,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["pcapng", "gzip", "vlan", "cooked", "ipv6", "raw ip", "nanoseconds", "big endian"])
def test_kinds_of_captures(run: Runner, file: Path, kind: str) -> None:  # noqa: F811
    if kind == "pcapng":
        wrpcapng(str(file), packets(link()))
    elif kind == "raw ip":
        wrpcap(str(file), [packet[IP] for packet in packets(link())], linktype=101)
    else:
        below = {"vlan": Ether() / Dot1Q(vlan=7), "cooked": CookedLinux()}.get(kind)
        wrpcap(
            str(file), packets(link(), below, 6 if kind == "ipv6" else 4), nano=kind == "nanoseconds",
            endianness=">" if kind == "big endian" else "<", gz=kind == "gzip",
        )  # fmt: skip
    ran = run("decode", str(file))
    assert (ran.status, opcodes(ran.out)) == (0, EXPECTED), ran.err
    if kind == "ipv6":
        assert "[fd00::1]:40000 -> [fd00::2]:7700" in ran.out


def test_padding_of_ethernet_is_no_data(run: Runner, file: Path) -> None:  # noqa: F811
    wrpcap(str(file), [Ether(bytes(packet).ljust(60, b"\0")) for packet in packets(link())])
    assert opcodes(run("decode", str(file)).out) == EXPECTED


def test_only_one_port(run: Runner, file: Path) -> None:  # noqa: F811
    other = Talk(("10.9.8.3", 50_000), ("10.9.8.2", 80)).say(("10.9.8.3", 50_000), b"GET / HTTP/1.1\r\n\r\n")
    wrpcap(str(file), packets(link()) + packets(other))
    assert run("decode", str(file)).err == "6 frames on 1 connection; 1 connection of something else\n"
    assert run("decode", "--port", "7700", str(file)).err == "6 frames on 1 connection\n"
    assert "no frame" in run.complains("decode", "--port", "7701", str(file))
    ran = run("decode", "--port", "80", str(file))
    assert ran.status == 1
    assert "not the sync protocol: it begins with b'GET / HTTP" in ran.out


def test_what_is_wrong_is_shown(run: Runner, file: Path) -> None:  # noqa: F811
    beyond = bytes(codec.pack_records(Opcode.CREATE, 4, sessions(1, first=1000), IPV4))
    refuse = wire.pack_refuse(Reason.PROTOCOL, "bad record")
    talk = link().say(A, CREATE + beyond + b"rubbish" + wire.pack(Opcode.HEARTBEAT)).say(B, refuse)
    wrpcap(str(file), packets(talk))
    ran = run("decode", str(file))
    assert ran.status == 0
    assert "CREATE #2 2 ipv4 sessions, 216 bytes (again, or late: #3 came before)" in ran.out
    assert "FAULT bad record: slot 1000 of 1000" in ran.out
    assert "refused: bad magic: a frame begins with 0x7572" in ran.out
    assert "skipped 7 bytes: no frame" in ran.out
    assert "REFUSE protocol, 'bad record', 30 bytes" in ran.out
    assert "2 faults; 7 bytes passed over" in ran.err


def test_lost_and_late(run: Runner, file: Path) -> None:  # noqa: F811
    made = packets(link())
    wrpcap(str(file), made[3:])
    ran = run("decode", str(file))
    assert (ran.status, opcodes(ran.out)) == (0, EXPECTED[1:])
    wrpcap(str(file), made[:5] + made[6:])
    ran = run("decode", str(file))
    assert (ran.status, opcodes(ran.out)) == (0, ["HELLO", "HELLO", "SNAPSHOT_BEGIN", "ACK", "skipped", "SNAPSHOT_END"])
    assert "the rest of CREATE #2 is not in the capture (100 bytes are missing)" in ran.out
    for packet in made:
        packet.time += 1
    short = [Ether(bytes(packet)[:120]) for packet in made]
    wrpcap(str(file), short)
    assert run("decode", str(file)).status == 0


def test_encrypted_links(run: Runner, file: Path) -> None:  # noqa: F811
    tls = Talk(("10.9.8.3", 50_000), B).say(("10.9.8.3", 50_000), CLIENT_HELLO).say(B, tls_records(900))
    wrpcap(str(file), packets(tls))
    assert run.complains("decode", str(file)) == f"no frame in {file} can be read: 1 connection of TLS"
    ran = run("decode", str(file))
    assert ran.out.count("\n") == 1
    assert ran.out.endswith("encrypted: this connection is TLS, what it carries cannot be read\n")
    wrpcap(str(file), packets(tls) + packets(link()))
    ran = run("decode", str(file))
    assert ran.status == 0
    assert ran.err == "6 frames on 1 connection; 1 connection of TLS\n"


def test_files_that_are_no_captures(run: Runner, tmp_path: Path) -> None:  # noqa: F811
    missing, noise, empty = tmp_path / "missing", tmp_path / "noise", tmp_path / "empty"
    noise.write_bytes(b"\x00\x01 this is no capture" * 50)
    empty.write_bytes(b"")
    assert run.complains("decode", str(missing)) == f"{missing} cannot be read: No such file or directory"
    assert run.complains("decode", str(tmp_path)) == f"{tmp_path} cannot be read: Is a directory"
    for path in (noise, empty):
        assert run.complains("decode", str(path)) == f"{path} is not a capture"
    packed = tmp_path / "packed.gz"
    packed.write_bytes(b"\x1f\x8b" + b"rubbish" * 9)
    assert run.complains("decode", str(packed)) == f"{packed} is not a capture"
    packed.write_bytes(gzip.compress(noise.read_bytes()))
    assert run.complains("decode", str(packed)) == f"{packed} is not a capture"
    packed.write_bytes(gzip.compress(gzip.compress(b"x")))
    assert run.complains("decode", str(packed)) == f"{packed} is not a capture"
    wrpcap(str(noise), [])
    assert "there is no frame of the sync protocol" in run.complains("decode", str(noise))


@pytest.mark.parametrize("kind", ["pcap", "pcapng", "gzip"])
def test_captures_that_end_too_early_or_are_damaged(run: Runner, file: Path, kind: str) -> None:  # noqa: F811
    (wrpcapng if kind == "pcapng" else wrpcap)(str(file), packets(link()))
    whole = file.read_bytes()
    for cut in range(len(whole) - 1, 24, -101):
        part = whole[:cut]
        file.write_bytes(gzip.compress(part) if kind == "gzip" else part)
        ran = run("decode", str(file))
        assert "Traceback" not in ran.err
        assert ran.status == (0 if "HELLO" in ran.out else 1)
    if kind == "gzip":
        packed = gzip.compress(whole)
        file.write_bytes(packed[:-12])
    else:
        file.write_bytes(whole[:-9])
    ran = run("decode", str(file))
    assert "ends within a packet" in ran.err
    for at in range(24, len(whole), 41):
        damaged = bytearray(whole)
        damaged[at] ^= 0xFF
        file.write_bytes(damaged)
        ran = run("decode", str(file))
        assert ran.status in (0, 1)
        assert "Traceback" not in ran.err


def test_a_length_of_gigabytes_reads_nothing_of_that_size(file: Path) -> None:
    file.write_bytes(
        struct.pack("<IHHiIIIIIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1, 1, 1, 0xFFFFFFFF, 0xFFFFFFFF) + bytes(1 << 20)
    )
    with capture.Capture(file) as opened:
        assert list(opened) == []
        assert opened.cut


def test_a_time_that_no_calendar_has() -> None:
    (line,) = show.lines(Said(10**29 + 5000, A, B, "skipped", "no frame", 3), verbose=False)
    assert line == f"{10**20}.000005  10.9.8.1:40000 -> 10.9.8.2:7700  skipped 3 bytes: no frame"


def test_wrong_usage(run: Runner) -> None:  # noqa: F811
    assert run("decode").status == 2
    assert run("decode", "--port", "0", "x").status == 2
    assert "capture" in run("decode", "--help").out
