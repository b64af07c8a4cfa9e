# SPDX-License-Identifier: GPL-2.0-or-later
"""SCTP associations without an SCTP stack: both sides are raw sockets that send what the other side waits for.

Rules: a packet has one chunk and a right checksum (RFC 9260, appendix A: CRC32c), which DPVS looks at and makes anew.
The kernel answers nothing by itself as long as a raw socket of the protocol is open in the namespace.
"""

import ipaddress
import socket
import struct
from dataclasses import dataclass

SCTP = 132
DATA, INIT, INIT_ACK, SACK, HEARTBEAT, SHUTDOWN = 0, 1, 2, 3, 4, 7
SHUTDOWN_ACK, COOKIE_ECHO, COOKIE_ACK, SHUTDOWN_COMPLETE = 8, 10, 11, 14
HANDSHAKE = ((INIT, INIT_ACK), (COOKIE_ECHO, COOKIE_ACK))
GOODBYE = ((SHUTDOWN, SHUTDOWN_ACK),)
TALK = (DATA, SACK)
ECHO = 7
WORDS = b"still here!!"
ANSWER_S = 30.0  # nothing is sent again

_TABLE = []
for _byte in range(256):
    for _ in range(8):
        _byte = _byte >> 1 ^ (0x82F63B78 if _byte & 1 else 0)
    _TABLE.append(_byte)


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def packet(sport: int, dport: int, chunk: int, payload: bytes = b"") -> bytes:
    """One chunk in a packet; its length is padded."""
    body = struct.pack(">BBH", chunk, 0, 4 + len(payload)) + payload + b"\0" * (-len(payload) % 4)
    head = struct.pack(">HHI", sport, dport, 1)
    crc = _crc32c(head + b"\0\0\0\0" + body)
    return head + struct.pack("<I", crc) + body


@dataclass(frozen=True)
class Seen:
    """A packet that came, with a right checksum."""

    source: str
    target: str
    sport: int
    dport: int
    chunk: int
    payload: bytes


def _parsed(source: str, target: str, body: bytes) -> Seen | None:
    sport, dport = struct.unpack(">HH", body[:4])
    chunk, _, length = struct.unpack(">BBH", body[12:16])
    if int.from_bytes(body[8:12], "little") != _crc32c(body[:8] + b"\0\0\0\0" + body[12:]):
        return None
    return Seen(source, target, sport, dport, chunk, body[16 : 12 + length])


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _plain(address: str) -> str:
    return str(ipaddress.ip_address(address))


class Side:
    """One end: sends and receives packets of all associations; to be made inside its namespace. A context manager."""

    def __init__(self, *addresses: str) -> None:
        """``addresses``: of the namespace, of either family, those that it sends from."""
        self._receivers: dict[socket.AddressFamily, socket.socket] = {}
        self._senders: dict[str, socket.socket] = {}
        for address in addresses:
            family = _family(address)
            if family not in self._receivers:
                receiver = self._receivers[family] = socket.socket(family, socket.SOCK_RAW, SCTP)
                receiver.settimeout(ANSWER_S)
                if family == socket.AF_INET6:  # whose header a raw socket does not give
                    receiver.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            sender = self._senders[_plain(address)] = socket.socket(family, socket.SOCK_RAW, SCTP)
            sender.bind((address, 0))

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        for one in (*self._receivers.values(), *self._senders.values()):
            one.close()

    def send(self, source: str, target: str, content: bytes) -> None:
        self._senders[_plain(source)].sendto(content, (target, 0))

    def receive(self, family: socket.AddressFamily, dport: int, chunk: int) -> Seen:
        """The next packet to a port with such a chunk; TimeoutError without one."""
        while True:
            raw, control, _, source = self._receivers[family].recvmsg(2048, 128)
            if family == socket.AF_INET6:
                seen = _parsed(source[0], socket.inet_ntop(family, control[0][2][:16]), raw)
            else:
                size, end = (raw[0] & 0xF) * 4, int.from_bytes(raw[2:4], "big")
                seen = _parsed(source[0], socket.inet_ntoa(raw[16:20]), raw[size:end])
            if seen is not None and (seen.dport, seen.chunk) == (dport, chunk):
                return seen


@dataclass
class Association:
    """Of a client's port with a service."""

    client: Side
    server: Side
    address: str  # the client's
    port: int
    service: str

    def exchange(self, question: int, answer: int) -> Seen:
        """A chunk to the service, and one back; what the real server saw."""
        self.client.send(self.address, self.service, packet(self.port, ECHO, question, WORDS))
        family = _family(self.service)
        seen = self.server.receive(family, ECHO, question)
        self.server.send(seen.target, seen.source, packet(ECHO, seen.sport, answer, seen.payload))
        back = self.client.receive(family, self.port, answer)
        assert (back.source, back.sport, back.payload) == (_plain(self.service), ECHO, WORDS)
        return seen

    def play(self, *steps: tuple[int, int]) -> list[Seen]:
        """``exchange`` for each step."""
        return [self.exchange(question, answer) for question, answer in steps]
