# SPDX-License-Identifier: GPL-2.0-or-later
"""Packets that interfaces see, beside a running node: services watched, flows joined to sessions, orphans asked for.

Rules: all that takes time (the list of services from the control socket, the reading of the maps, the join) is done on
one thread, about once a second and never more than a tenth of the time. A list of services that cannot be had leaves
the old one in use. Where the control socket cannot list them, the services of the sessions that are known are watched.
Whatever goes wrong here is said once, counted, and ends nothing.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from collector.flows import ACK, FIN, RST, SYN, FlowJoin, Flows, Sessions
from collector.record import Records
from collector.table import SessionTable
from probes.errors import DpvsProbeError
from probes.flow import SERVICE
from replicator import query
from replicator.admin import Line

LOOK_S = 1.0
SHARE = 10  # a look that takes long is followed by so many times as much pause
SERVICES_NS = 5_000_000_000
ASKED_AT_ONCE = 256
_OPAQUE = f"V{SERVICE.itemsize}"
FLAG_NAMES = ((SYN, "SYN"), (ACK, "ACK"), (8, "PSH"), (FIN, "FIN"), (RST, "RST"))

log = logging.getLogger(__name__)


class Packets(Protocol):
    """``probes.packets.Packets``."""

    limit: int

    @property
    def watched(self) -> int: ...
    def watch(self, services: npt.NDArray[np.void]) -> int: ...
    def read(self) -> tuple[Flows, Flows]: ...
    def counters(self) -> dict[str, int]: ...
    def interfaces(self) -> list[dict[str, str]]: ...


class Activity:
    """``run`` in the node's loop; the rest answers from what the last look saw."""

    def __init__(
        self,
        packets: Packets,
        table: SessionTable,
        replicas: Callable[[], Iterable[Any]],
        services: Callable[[], npt.NDArray[np.void] | None],
        *,
        ask: Callable[[Flows], int] = lambda _: 0,
        clock: Callable[[], int] = time.monotonic_ns,
        look_s: float = LOOK_S,
    ) -> None:
        """``replicas``: of all peers; ``services``: what the control socket lists, None where it cannot; ``ask``: ask
        peers for the sessions of these flows, how many peers were.
        """
        self._packets, self._table, self._replicas = packets, table, replicas
        self._services, self._ask_peers, self._clock = services, ask, clock
        self._join = FlowJoin(table.slots)
        self._look_s = look_s
        self._listed_ns: int | None = None
        self._said = ""
        self.looks = self.failures = 0
        self.look_ns = 0  # how long the last one took
        self.services_refused = 0  # for which there was no room
        self.asked = 0  # flows that peers were asked for
        self.evicted = 0  # flows that made room for others
        self.listed = True  # the control socket lists the services

    async def run(self) -> None:
        """Look again and again; returns only by being cancelled."""
        while True:
            began = self._clock()
            try:
                replicas = [Sessions(replica.records, replica.present) for replica in self._replicas()]
                await asyncio.to_thread(self.look, replicas)
                self._said = ""
            except (DpvsProbeError, OSError) as error:
                self.failures += 1
                if str(error) != self._said:
                    self._said = str(error)
                    log.warning("packets: %s; trying again", error)
            if self._table.complete:
                self.ask()
            took_s = (self._clock() - began) / 1e9
            await asyncio.sleep(max(self._look_s, SHARE * took_s) - took_s)

    def look(self, replicas: Sequence[Sessions]) -> None:
        """One look; ``replicas``: the sessions of all peers. Raises DpvsProbeError or OSError on trouble."""
        began = self._clock()
        own = Sessions(self._table.records, self._table.present)
        trouble: DpvsProbeError | None = None
        if self._listed_ns is None or began - self._listed_ns >= SERVICES_NS:
            self._listed_ns = began
            try:
                self._list_services([own, *replicas])
            except DpvsProbeError as error:
                trouble = error
        if self._table.complete:
            ever = self._packets.counters()["flows_new"]
            keys, values = self._packets.read()
            self.evicted = max(self.evicted, ever - len(keys))  # nothing but want of room takes a flow away
            self._join.look(keys, values, own, replicas, self._clock())
            self.looks += 1
        self.look_ns = self._clock() - began
        if trouble is not None:
            raise trouble

    def _list_services(self, tables: Iterable[Sessions]) -> None:
        services = self._services()
        self.listed = services is not None
        self.services_refused = self._packets.watch(services_of(tables) if services is None else services)

    def ask(self) -> None:
        """Ask the peers for sessions of orphans."""
        wanted = self._join.ask(ASKED_AT_ONCE, self._clock())
        if len(wanted) and self._ask_peers(wanted):
            self.asked += len(wanted)

    def describe(self, sessions: list[Line], records: Records) -> None:
        """Add to n sessions of ours, as ``query.describe`` gives them, what their packets say."""
        known, slots = self._join.of(records)
        now = self._clock()
        for line, one, slot in zip(sessions, known.tolist(), slots.tolist(), strict=True):
            if one:
                line["last_active_s"] = round(max(0, now - int(self._join.last_ns[slot])) / 1e9, 3)
                line["packets"] = int(self._join.packets[slot])
                line["bytes"] = int(self._join.bytes[slot])
                line["tcp_flags"] = flag_names(int(self._join.flags[slot]))

    def orphans(self, limit: int) -> Iterator[Line]:
        """Flows that no session here covers, those active last first."""
        found, now = self._join.orphans, self._clock()
        if found is None:
            return
        for key, value in zip(found.keys[:limit], found.values[:limit], strict=True):
            family, proto = int(key["af"]), int(key["proto"])
            yield {
                "proto": query.PROTOCOL_NAMES.get(proto, str(proto)),
                "client": query.end(family, key["caddr"], int(key["cport"])),
                "virtual": query.end(family, key["vaddr"], int(key["vport"])),
                "last_active_s": round(max(0, now - int(value["last_ns"])) / 1e9, 3),
                "packets": int(value["packets"]),
                "bytes": int(value["bytes"]),
                "tcp_flags": flag_names(int(value["flags"])),
            }

    def report(self) -> Line:
        """For status."""
        return {
            "interfaces": self._packets.interfaces(),
            "services_watched": self._packets.watched,
            "services_from": "control socket" if self.listed else "known sessions",
            "services_no_room": self.services_refused,
            "flows": self._join.flows,
            "flows_limit": self._packets.limit,
            "flows_evicted": self.evicted,
            "flows_of_sessions": self._join.joined,
            "flows_of_peers_sessions": self._join.covered,
            "orphans": len(self._join.orphans.keys) if self._join.orphans is not None else 0,
            "orphans_asked_for": self.asked,
            "looks": self.looks,
            "look_ms": round(self.look_ns / 1e6, 2),
            "failures": self.failures,
            **self._packets.counters(),
        }


def flag_names(flags: int) -> list[str]:
    """TCP flags by name."""
    return [name for bit, name in FLAG_NAMES if flags & bit]


def services_of(tables: Iterable[Sessions]) -> npt.NDArray[np.void]:
    """The services that sessions belong to, dtype SERVICE, each once."""
    found = [np.empty(0, _OPAQUE)]
    for records, present in tables:
        slots = np.flatnonzero(present)
        for start in range(0, len(slots), 1 << 16):
            rows = records[slots[start : start + (1 << 16)]]
            part = np.zeros(len(rows), SERVICE)
            for name in ("proto", "af"):
                part[name] = rows[name]
            part["addr"], part["port"] = rows["vaddr"], rows["vport"]
            part = part[(part["port"] != 0) & part["addr"].any(axis=1)]
            found.append(np.unique(part.view(_OPAQUE)))
    return np.unique(np.concatenate(found)).view(SERVICE)
