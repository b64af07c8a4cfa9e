# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions counted by service, real server, state and worker, block by block, so that a node's loop can breathe."""

import asyncio
from typing import Any

import numpy as np
import numpy.typing as npt

from collector import record
from collector.record import Records, Words, words
from collector.table import SessionTable
from replicator import query

BLOCK = 1 << 13  # slots: about a millisecond
MAX_GROUPS = 1 << 16  # services, and real servers, that are told apart
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class _Groups:
    """Sessions by one end and protocol: how many, and how many of them are open."""

    def __init__(self, address: str, port: str, family: str) -> None:
        self._address, self._port, self._family = address, port, family
        self._found: dict[int, list[Any]] = {}  # hash -> [name, sessions, open]
        self.rest = 0  # sessions of more groups than are told apart

    def add(self, keys: Words, records: Records, is_open: npt.NDArray[np.bool_]) -> None:
        values, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        counts = np.bincount(inverse, minlength=len(values)).tolist()
        opens = np.bincount(inverse, weights=is_open, minlength=len(values)).tolist()
        for value, at, count, opened in zip(values.tolist(), first.tolist(), counts, opens, strict=True):
            known = self._found.get(value)
            if known is None:
                if len(self._found) >= MAX_GROUPS:
                    self.rest += count
                    continue
                known = self._found[value] = [self._name(records[at]), 0, 0]
            known[1] += count
            known[2] += int(opened)

    def _name(self, row: Any) -> str:
        proto = int(row["proto"])
        end = query.end(int(row[self._family]), row[self._address], int(row[self._port]))
        return f"{query.PROTOCOL_NAMES.get(proto, proto)} {end}"

    def rows(self, limit: int) -> list[dict[str, Any]]:
        """The largest, largest first."""
        ordered = sorted(self._found.values(), key=lambda group: (-group[1], group[0]))
        return [{"name": name, "sessions": count, "open": opened} for name, count, opened in ordered[:limit]]

    def __len__(self) -> int:
        return len(self._found)


class Summary:
    """``add`` records in blocks of some thousand; ``result`` is one object for ``top``."""

    def __init__(self) -> None:
        self.sessions = 0
        self._services = _Groups("vaddr", "vport", "af")
        self._servers = _Groups("daddr", "dport", "af_out")
        self._states: dict[tuple[int, int], int] = {}
        self._workers = np.zeros(256, np.int64)

    def add(self, records: Records) -> None:
        """n more sessions."""
        if len(records) == 0:
            return
        self.sessions += len(records)
        rows = words(records)
        open_state = np.where(records["proto"] == record.UDP, record.UDP_NORMAL, record.ESTABLISHED)
        is_open = records["state"] == open_state
        kind, ports = rows[:, 1], rows[:, 10]
        services = _mix(rows[:, 4:6], kind & np.uint64(0xFF00FF), ports & np.uint64(0xFFFF0000))  # proto, af; vport
        servers = _mix(rows[:, 8:10], kind & np.uint64(0xFFFF00), ports >> np.uint64(48))  # proto, af_out; dport
        self._services.add(services, records, is_open)
        self._servers.add(servers, records, is_open)
        states, counts = np.unique(records["proto"].astype(np.int64) << 16 | records["state"], return_counts=True)
        for value, count in zip(states.tolist(), counts.tolist(), strict=True):
            key = value >> 16, value & 0xFFFF
            self._states[key] = self._states.get(key, 0) + count
        self._workers += np.bincount(records["worker"], minlength=256)

    def result(self, limit: int) -> dict[str, Any]:
        """Counts; of services and of real servers the ``limit`` largest."""
        states: dict[str, int] = {}
        for (proto, state), count in sorted(self._states.items(), key=lambda item: -item[1]):
            name = f"{query.PROTOCOL_NAMES.get(proto, proto)} {record.state_name(proto, state)}"
            states[name] = states.get(name, 0) + count
        return {
            "counted": self.sessions,
            "services": self._services.rows(limit),
            "services_total": len(self._services),
            "real_servers": self._servers.rows(limit),
            "real_servers_total": len(self._servers),
            "states": states,
            "workers": {
                "?" if number == record.UNKNOWN_WORKER else str(number): int(self._workers[number])
                for number in np.flatnonzero(self._workers).tolist()
            },
        }


async def summarize(table: SessionTable) -> Summary:
    """All sessions of a table, which changes meanwhile: other tasks have their turn after each block."""
    summary = Summary()
    for start in range(0, table.slots, BLOCK):
        slots = np.flatnonzero(table.present[start : start + BLOCK]) + start
        summary.add(table.rows(slots))
        await asyncio.sleep(0)
    return summary


def _mix(address: Words, kind: Words, port: Words) -> Words:
    out: Words = kind * _FACTOR ^ port
    for column in range(2):
        out = (out ^ (out >> np.uint64(29))) * _FACTOR ^ address[:, column]
    return (out ^ (out >> np.uint64(32))) * _FACTOR
