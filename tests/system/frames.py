# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames to services, whole and broken, and what a plain reading of the standards makes of each."""

import random
import struct
from typing import Any, NamedTuple

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Raw, raw

VIP, VIP6, OTHER = "10.1.0.1", "fd01::1", "10.1.0.2"
SERVICES = ((2, 6, VIP, 80), (2, 17, VIP, 53), (10, 6, VIP6, 80), (10, 17, VIP6, 53))
EXTENSIONS = {0: 8, 43: 8, 60: 8, 51: 4, 44: 0}


class Flow(NamedTuple):
    """Addresses as 16 bytes, as the program keeps them."""

    caddr: bytes
    vaddr: bytes
    cport: int
    vport: int
    proto: int
    af: int


def outcome(frame: bytes, watched: set[tuple[int, int, bytes, int]]) -> tuple[str, Flow | None, int]:
    """(the counter that this frame belongs to, its flow if it is one of a service, its TCP flags)."""
    kind, at = int.from_bytes(frame[12:14], "big"), 14
    for _ in range(2):
        if kind not in (0x8100, 0x88A8, 0x9100):
            break
        if len(frame) < at + 4:
            return "malformed", None, 0
        kind, at = int.from_bytes(frame[at + 2 : at + 4], "big"), at + 4
    if kind == 0x0800:
        return _ipv4(frame[at:], watched)
    if kind == 0x86DD:
        return _ipv6(frame[at:], watched)
    return "not_ip", None, 0


def _ipv4(ip: bytes, watched: set[tuple[int, int, bytes, int]]) -> tuple[str, Flow | None, int]:
    if len(ip) < 20:
        return "malformed", None, 0
    header, length = (ip[0] & 15) * 4, int.from_bytes(ip[2:4], "big")
    if ip[0] >> 4 != 4 or header < 20 or length < header or length > len(ip):
        return "malformed", None, 0
    if int.from_bytes(ip[6:8], "big") & 0x1FFF:
        return "fragments", None, 0
    ends = ip[12:16].ljust(16, b"\0"), ip[16:20].ljust(16, b"\0")
    return _transport(ip[header:length], ip[9], ends, 2, watched)


def _ipv6(ip: bytes, watched: set[tuple[int, int, bytes, int]]) -> tuple[str, Flow | None, int]:
    if len(ip) < 40 or ip[0] >> 4 != 6 or int.from_bytes(ip[4:6], "big") + 40 > len(ip):
        return "malformed", None, 0
    rest, following = ip[40 : 40 + int.from_bytes(ip[4:6], "big")], ip[6]
    for _ in range(8):
        if following not in EXTENSIONS:
            break
        if len(rest) < 8:
            return "malformed", None, 0
        if following == 44:
            if int.from_bytes(rest[2:4], "big") & 0xFFF8:
                return "fragments", None, 0
            size = 8
        else:
            size = (rest[1] + 2) * 4 if following == 51 else (rest[1] + 1) * 8
        if size > len(rest):
            return "malformed", None, 0
        following, rest = rest[0], rest[size:]
    if following in EXTENSIONS:
        return "deep", None, 0
    return _transport(rest, following, (ip[8:24], ip[24:40]), 10, watched)


def _transport(
    data: bytes, proto: int, ends: tuple[bytes, bytes], af: int, watched: set[tuple[int, int, bytes, int]]
) -> tuple[str, Flow | None, int]:
    if proto not in (6, 17):
        return "other_protocol", None, 0
    if len(data) < (20 if proto == 6 else 8):
        return "malformed", None, 0
    if proto == 6 and not 20 <= (data[12] >> 4) * 4 <= len(data):
        return "malformed", None, 0
    if proto == 17 and int.from_bytes(data[4:6], "big") < 8:
        return "malformed", None, 0
    cport, vport = struct.unpack_from("!HH", data)
    if (af, proto, ends[1], vport) not in watched:
        return "unwatched", None, 0
    return "counted", Flow(*ends, cport, vport, proto, af), data[13] if proto == 6 else 0


def whole(rng: random.Random) -> Any:
    """A sound packet, most often to a service."""
    layer: Any = Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:02")
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        layer /= Dot1Q(vlan=rng.randrange(4095))
    if rng.random() < 0.03:
        return layer / ARP()
    if rng.random() < 0.5:
        destination = rng.choice((VIP, VIP, VIP, OTHER))
        layer /= IP(
            src=f"10.9.{rng.randrange(2)}.{rng.randrange(3)}", dst=destination,
            options=rng.choice(([], [], b"\x01" * rng.choice((4, 8, 40)))),
            flags=rng.choice((0, 0, "MF")), frag=rng.choice((0, 0, 0, 5)),
        )  # fmt: skip
    else:
        layer /= IPv6(src=f"fd09::{rng.randrange(3):x}", dst=rng.choice((VIP6, VIP6, VIP6, "fd01::2")))
        for _ in range(rng.choice((0, 0, 0, 1, 2, 7, 8, 9))):
            layer /= rng.choice(
                (
                    IPv6ExtHdrHopByHop(), IPv6ExtHdrDestOpt(), IPv6ExtHdrRouting(), AH(icv=b"x" * 12),
                    IPv6ExtHdrFragment(offset=rng.choice((0, 0, 3)), m=1),
                )
            )  # fmt: skip
    payload = Raw(bytes(rng.randrange(0, 40)))
    if rng.random() < 0.6:
        flags = rng.choice(("S", "A", "PA", "FA", "R", "SA"))
        options = rng.choice(([], [("MSS", 1460)], [("NOP", None)] * 40))
        return (
            layer
            / TCP(sport=rng.randrange(1, 4), dport=rng.choice((80, 80, 80, 81)), flags=flags, options=options)
            / payload
        )
    if rng.random() < 0.9:
        return layer / UDP(sport=rng.randrange(1, 4), dport=rng.choice((53, 53, 54))) / payload
    return layer / Raw(bytes(20))


def forged(rng: random.Random) -> bytes:
    """A frame of 14 bytes or more: whole, cut, or with some bytes of its headers changed."""
    frame = bytearray(raw(whole(rng)))
    if rng.random() < 0.4:
        for _ in range(rng.choice((1, 1, 2, 8))):
            frame[rng.randrange(12, min(len(frame), 80))] = rng.choice(
                (0, 4, 6, 17, 0x45, 0x60, 0xFF, rng.randrange(256))
            )
    if rng.random() < 0.3:
        del frame[rng.randrange(14, len(frame) + 1) :]
    return bytes(frame)
