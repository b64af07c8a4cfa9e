# SPDX-License-Identifier: GPL-2.0-or-later
"""Which sessions peers are told of at all, and how fast.

Rules
- A session is asked about when it is new or has changed. Once it has passed it is followed to its end, whatever
  becomes of its state: a peer never holds a stale one. One that is held back is not sent, is counted once by what holds
  it back first, and is asked about again when it changes, or is old enough.
- All peers are told of the same sessions. No clock: time is an argument. No filter costs nothing.
- The rate bounds what is said to one peer, full syncs included; what is over it waits as marks, which are state, not
  a log: nothing queues, and what comes later says the latest.
"""

import ipaddress
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from collector import record
from collector.record import Bools, Records, Slots
from collector.table import SessionTable
from probes.errors import DpvsProbeError

SECOND = 1_000_000_000
AGE_STEP_NS = 50_000_000  # sessions whose age is reached within so long are asked about together
BURST_S = 0.1  # what a rate allows at once
PROTOCOLS = {"tcp": record.TCP, "udp": record.UDP}
SERVICE, STATE, AGE = "service", "state", "age"


class BadService(DpvsProbeError):
    """Text that names no service."""

    help_text = "Write ADDRESS, ADDRESS:PORT or NETWORK/BITS, before it tcp: or udp: if only one is meant."


class Service(NamedTuple):
    """A virtual service, or several."""

    family: int
    network: ipaddress.IPv4Network | ipaddress.IPv6Network
    port: int | None = None
    proto: int | None = None

    def matches(self, records: Records) -> Bools:
        """Which of n sessions are of it."""
        size = self.network.max_prefixlen // 8
        mask = np.frombuffer(self.network.netmask.packed, np.uint8)
        net = np.frombuffer(self.network.network_address.packed, np.uint8)
        hit = (records["af"] == self.family) & ((records["vaddr"][:, :size] & mask) == net).all(axis=1)
        if self.port is not None:
            hit &= records["vport"] == self.port
        if self.proto is not None:
            hit &= records["proto"] == self.proto
        return np.asarray(hit)


def parse_service(text: str) -> Service:
    """``10.0.0.1:443``, ``udp:[fd00::1]:53``, ``tcp:10.0.0.0/24``; raises BadService."""
    proto: int | None = None
    word, colon, rest = text.partition(":")
    if colon and word.lower() in PROTOCOLS:
        proto, where = PROTOCOLS[word.lower()], rest
    else:
        where = text
    host, port_text = where, ""
    if where.endswith(":") and not where.endswith("::"):
        raise BadService(f"'{text}': there is no port after the colon")
    if where.startswith("["):
        host, _, tail = where[1:].partition("]")
        if tail and not tail.startswith(":"):
            raise BadService(f"'{text}' is no service")
        port_text = tail[1:]
    elif where.count(":") == 1:
        host, _, port_text = where.partition(":")
    try:
        network = ipaddress.ip_network(host)
    except ValueError as error:
        raise BadService(f"'{text}': {error}") from error
    if port_text and not (port_text.isascii() and port_text.isdigit() and 0 < int(port_text[:6]) < 65536):
        raise BadService(f"'{text}': '{port_text}' is not a port (1 to 65535)")
    family = record.AF_INET if network.version == 4 else record.AF_INET6
    return Service(family, network, int(port_text) if port_text else None, proto)


@dataclass(frozen=True)
class FilterSettings:
    """What may be sent; empty and 0: no bound."""

    services: tuple[Service, ...] = ()
    states: tuple[str, ...] = ()
    min_age_ns: int = 0
    rate: float = 0.0  # sessions a second, to each peer

    @property
    def chooses(self) -> bool:
        """Whether any session may be held back."""
        return bool(self.services or self.states or self.min_age_ns)


class SessionFilter:
    """Decides for the sessions of one table. Memory: 12 bytes a slot."""

    def __init__(self, table: SessionTable, settings: FilterSettings) -> None:
        self._table, self.settings = table, settings
        self._passed: npt.NDArray[np.uint32] = np.zeros(table.slots, np.uint32)  # generation that did
        self._counted: npt.NDArray[np.uint32] = np.zeros(table.slots, np.uint32)  # generation that was held back
        self._waits: npt.NDArray[np.uint32] = np.zeros(table.slots, np.uint32)  # generation that is too young
        self._young: list[tuple[int, Slots]] = []  # when to ask again, and about which
        self.now_ns = 0  # of the round that is under way
        self.held_back: Counter[str] = Counter({SERVICE: 0, STATE: 0, AGE: 0})
        self._states = {
            proto: np.array([name in settings.states for name in names], np.bool_)
            for proto, names in ((record.TCP, record.TCP_STATES), (record.UDP, record.UDP_STATES))
        }

    def __call__(self, slots: Slots) -> Bools:
        """Which of n shared sessions peers are told of, (n,) bool."""
        generation = self._table.generation[slots]
        passes = self._passed[slots] == generation
        ask = np.flatnonzero(~passes)
        if len(ask):
            passes[ask] = self._judge(slots[ask])
            self._passed[slots[ask]] = np.where(passes[ask], generation[ask], 0)
        return np.asarray(passes, np.bool_)

    def _judge(self, slots: Slots) -> Bools:
        records = self._table.rows(slots)
        left = np.ones(len(slots), np.bool_)
        if self.settings.services:
            of_one = np.zeros(len(slots), np.bool_)
            for service in self.settings.services:
                of_one |= service.matches(records)
            left &= of_one
            self._count(SERVICE, slots[~of_one])
        if self.settings.states:
            wanted = left & ~self._in_state(records)
            self._count(STATE, slots[wanted])
            left &= ~wanted
        if self.settings.min_age_ns:
            due = self._table.born_ns[slots] + self.settings.min_age_ns
            young = left & (due > self.now_ns)
            if young.any():
                self._count(AGE, slots[young])
                self._wait(slots[young], due[young])
            left &= ~young
        return np.asarray(left, np.bool_)

    def _wait(self, slots: Slots, due: npt.NDArray[np.int64]) -> None:
        generation = self._table.generation[slots]
        new = self._waits[slots] != generation
        self._waits[slots[new]] = generation[new]
        steps = due[new] // AGE_STEP_NS + 1
        for step in np.unique(steps):
            self._young.append((int(step) * AGE_STEP_NS, slots[new][steps == step]))

    def _in_state(self, records: Records) -> Bools:
        hit = np.zeros(len(records), np.bool_)
        for proto, wanted in self._states.items():
            which = (records["proto"] == proto) & (records["state"] < len(wanted))
            hit[which] = wanted[records["state"][which]]
        return hit

    def _count(self, why: str, slots: Slots) -> None:
        generation = self._table.generation[slots]
        new = self._counted[slots] != generation
        self._counted[slots[new]] = generation[new]
        self.held_back[why] += int(np.count_nonzero(new))

    def tick(self, now_ns: int) -> bool:
        """To be called often: those that are old enough by now are marked for all peers. Whether there were any."""
        self.now_ns = now_ns
        due = [slots for when, slots in self._young if when <= now_ns]
        if not due:
            return False
        self._young = [item for item in self._young if item[0] > now_ns]
        slots = np.unique(np.concatenate(due))
        self._waits[slots] = 0
        slots = slots[self._table.shared[slots] & (self._passed[slots] != self._table.generation[slots])]
        self._table.mark(slots, now_ns)
        return len(slots) > 0


class Rate:
    """How many sessions may be said to a peer now."""

    def __init__(self, per_s: float = 0.0) -> None:
        self.per_s = per_s
        self._tokens = self._most = max(1.0, per_s * BURST_S)
        self._at_ns: int | None = None

    def room(self, now_ns: int, most: int) -> int:
        """So many, ``most`` at most."""
        if not self.per_s:
            return most
        if self._at_ns is not None:
            self._tokens = min(self._most, self._tokens + (now_ns - self._at_ns) * self.per_s / SECOND)
        self._at_ns = now_ns
        return min(most, int(self._tokens))

    def said(self, count: int) -> None:
        """So many were."""
        if self.per_s:
            self._tokens -= count

    def next_ns(self, now_ns: int) -> int:
        """When there is room for one more."""
        lack = 1.0 - self._tokens
        return now_ns + max(0, int(lack * SECOND / self.per_s) + 1) if self.per_s else now_ns


def chosen(
    services: Sequence[str] = (), states: Sequence[str] = (), min_age_s: float = 0.0, rate: float = 0.0
) -> FilterSettings:
    """What was asked for in words; raises BadService."""
    return FilterSettings(tuple(map(parse_service, services)), tuple(states), int(min_age_s * SECOND), rate)
