# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions for a person to read: which ones a filter means, and each as a plain dictionary.

Rules: pure. A filter is applied to a whole block of records at once; only the sessions it lets through become Python
objects.
"""

import ipaddress
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from collector import record
from collector.record import Bools, Records
from probes.errors import DpvsProbeError

PROTOCOLS = {"tcp": record.TCP, "udp": record.UDP, "sctp": record.SCTP, "icmp": 1, "icmp6": 58}
PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}
FLAG_NAMES = {
    record.SYNPROXY: "synproxy",
    record.INACTIVE: "inactive",
    record.TEMPLATE: "template",
    record.ONE_PACKET: "one-packet",
    record.INJECTED: "injected",
}
OWN = "own"
_ENDS = (
    ("client", "caddr", "cport"),
    ("virtual", "vaddr", "vport"),
    ("local", "laddr", "lport"),
    ("real", "daddr", "dport"),
)


class BadFilter(DpvsProbeError):
    """A filter that can match nothing because it is written wrong."""

    help_text = "The --help of the command says how filters are written."


@dataclass(frozen=True)
class Filter:
    """Which sessions: all that is given must hold; an address or a port may be any of the four of a session."""

    address: str | None = None
    port: int | None = None
    proto: str | None = None
    state: str | None = None
    origin: str | None = None
    limit: int = 0  # 0: all

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> "Filter":
        """The filter of a request; raises BadFilter. Fields that are absent or None do not filter."""
        known = {name: request.get(name) for name in ("address", "port", "proto", "state", "origin")}
        for name, value in known.items():
            wanted = int if name == "port" else str
            if value is not None and (not isinstance(value, wanted) or isinstance(value, bool)):
                raise BadFilter(f"{name} {value!r} is not a {'number' if wanted is int else 'text'}")
        wanted_filter = cls(**known, limit=limit_of(request))
        wanted_filter.matches(np.zeros(0, record.RECORD))  # complains now rather than in the middle of an answer
        return wanted_filter

    def wants(self, origin: str) -> bool:
        """Whether sessions of that origin (a node's name, or ``own``) can match at all."""
        return self.origin is None or self.origin == origin

    def matches(self, records: Records) -> Bools:
        """Which of n records match, (n,) bool; the origin is not looked at."""
        hit = np.ones(len(records), np.bool_)
        if self.proto is not None:
            hit &= records["proto"] == protocol_number(self.proto)
        if self.state is not None:
            hit &= in_state(records, self.state)
        if self.port is not None:
            if not 0 <= self.port <= 65535:
                raise BadFilter(f"port {self.port} is not between 0 and 65535")
            hit &= np.logical_or.reduce([records[port] == self.port for _, _, port in _ENDS])
        if self.address is not None:
            family, packed = _packed(self.address)
            ends = []
            for _, address, _ in _ENDS:
                side = records["af"] if address in ("caddr", "vaddr") else records["af_out"]
                ends.append((side == family) & (records[address] == packed).all(axis=1))
            hit &= np.logical_or.reduce(ends)
        return hit


def limit_of(request: Mapping[str, Any]) -> int:
    """How many lines are asked for at most, 0: all; raises BadFilter."""
    limit = request.get("limit") or 0
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
        raise BadFilter(f"limit {limit!r} is not a number of sessions")
    return limit


def protocol_number(text: str) -> int:
    """``tcp`` or ``6`` -> 6; raises BadFilter."""
    if text.lower() in PROTOCOLS:
        return PROTOCOLS[text.lower()]
    if text.isascii() and text.isdigit() and len(text) <= 3 and int(text) < 256:
        return int(text)
    raise BadFilter(f"{text!r} is not a protocol ({', '.join(PROTOCOLS)} or a number)")


def describe(records: Records, origin: str) -> Iterator[dict[str, Any]]:
    """Each record as a dictionary of plain values, in order."""
    for row in records:
        families = (int(row["af"]), int(row["af"]), int(row["af_out"]), int(row["af_out"]))
        flags = int(row["flags"])
        session: dict[str, Any] = {
            "origin": origin,
            "slot": int(row["slot"]),
            "generation": int(row["generation"]),
            "proto": PROTOCOL_NAMES.get(int(row["proto"]), str(row["proto"])),
            "mode": record.MODE_NAMES.get(int(row["fwdmode"]), "?"),
            "state": record.state_name(int(row["proto"]), int(row["state"])),
        }
        for family, (name, address, port) in zip(families, _ENDS, strict=True):
            session[name] = end(family, row[address], int(row[port]))
        session["timeout_s"] = int(row["timeout_ms"]) / 1000
        session["worker"] = None if row["worker"] == record.UNKNOWN_WORKER else int(row["worker"])
        session["flags"] = [name for bit, name in FLAG_NAMES.items() if flags & bit]
        yield session


def end(family: int, address: npt.NDArray[np.uint8], port: int) -> str:
    """An address (16 bytes) and a port as text."""
    if family == record.AF_INET:
        return f"{socket.inet_ntop(socket.AF_INET, address[:4].tobytes())}:{port}"
    return f"[{socket.inet_ntop(socket.AF_INET6, address.tobytes())}]:{port}"


def _packed(text: str) -> tuple[int, npt.NDArray[np.uint8]]:
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise BadFilter(f"{text!r} is not an IP address") from error
    family = record.AF_INET if address.version == 4 else record.AF_INET6
    return family, np.frombuffer(address.packed.ljust(16, b"\0"), np.uint8)


def in_state(records: Records, text: str) -> Bools:
    """Which of n sessions are in the state of that name; raises BadFilter."""
    wanted = text.upper()
    hit = np.zeros(len(records), np.bool_)
    known = False
    for proto, names in ((record.TCP, record.TCP_STATES), (record.UDP, record.UDP_STATES)):
        if wanted in names:
            known = True
            hit |= (records["proto"] == proto) & (records["state"] == names.index(wanted))
    if not known:
        names_of_all = dict.fromkeys(record.TCP_STATES + record.UDP_STATES)
        raise BadFilter(f"{text!r} is not a state of a session ({', '.join(names_of_all)})")
    return hit
