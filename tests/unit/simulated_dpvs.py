# SPDX-License-Identifier: GPL-2.0-or-later
"""A session pool and a ring buffer without a DPVS: what the collector sees, under a test's control."""

import numpy as np

from collector import record
from collector.conns import from_conns
from collector.record import Bools, Records, Slots, Words
from probes.mapping import Prints, folded

CONN = np.dtype(
    [
        ("af", "<u4"), ("af_out", "<u4"), ("proto", "u1"), ("packet_xmit", "<u8"), ("state", "<u2"), ("flags", "<u2"),
        ("caddr", "16u1"), ("vaddr", "16u1"), ("laddr", "16u1"), ("daddr", "16u1"),
        ("cport", ">u2"), ("vport", ">u2"), ("lport", ">u2"), ("dport", ">u2"), ("timeout_s", "<u8"),
        ("wscale_vs", "u1"), ("wscale_rs", "u1"), ("pp_version", "u1"), ("pp_sent", "u1"),
        *((f"{name}_{part}", "<u4") for name in ("fnat_seq", "syn_proxy_seq")
          for part in ("isn", "delta", "fdata_seq", "prev_delta")),
        ("rs_end_seq", "<u4"), ("rs_end_ack", "<u4"),
    ],
    align=True,
)  # fmt: skip
EVENT = np.dtype([("conn", "<u8"), ("time_ns", "<u8"), ("tid", "<u4"), ("kind", "<u4")])
BASE, STRIDE = 0x1000_0000, 704
XMIT_FNAT = 0x40_0000
MODES = {XMIT_FNAT: record.FNAT}
WORKERS = {5001: 1, 5002: 2}


class SimulatedDpvs:
    """Pool, ring and count of lost events; ``now_ns`` moves on with each call that does something."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.conns = np.zeros(slots, CONN)
        self.torn: set[int] = set()  # slots whose next read is torn
        self.losing = False
        self.now_ns = 1_000_000_000
        self._events: list[tuple[int, int, int, int]] = []
        self._lost = 0

    # What DPVS does.

    def create(self, slot: int, client: int, *, flags: int = 0, hashed: bool = True, tid: int = 5001) -> None:
        """dp_vs_conn_new: object filled, create point, hash."""
        conn = self.conns[slot]
        assert not conn["flags"] & record.HASHED
        fresh = np.zeros((), CONN)
        fresh["af"] = fresh["af_out"] = record.AF_INET
        fresh["proto"] = record.TCP
        fresh["packet_xmit"] = XMIT_FNAT
        for name, last in (("caddr", client & 0xFF), ("vaddr", 100), ("laddr", 200), ("daddr", 10)):
            fresh[name][:4] = (10, 0, client >> 8 & 0xFF, last)
            fresh[name][4:] = 0xEE  # DPVS leaves rubbish there
        fresh["cport"], fresh["vport"], fresh["lport"], fresh["dport"] = 1024 + client, 80, 5000 + slot, 8080
        fresh["timeout_s"] = 30
        fresh["flags"] = flags | (record.HASHED if hashed else 0)
        self.conns[slot] = fresh
        self._event(slot, 1, tid)

    def hash(self, slot: int) -> None:
        self.conns["flags"][slot] |= record.HASHED

    def unhash(self, slot: int) -> None:
        self.conns["flags"][slot] &= ~record.HASHED & 0xFFFF

    def free(self, slot: int, tid: int = 5001) -> None:
        """dp_vs_conn_expire: unhash, free point; memory stays as it is."""
        self.unhash(slot)
        self._event(slot, 2, tid)

    def inject(self, slot: int, client: int) -> None:
        """What the agent does: a copy that waits for its first packet."""
        self.create(slot, client, flags=record.INJECTED)
        self.wait(slot)

    def wait(self, slot: int) -> None:
        """A session is made to wait: what the agent does to one that another node has."""
        self.conns["flags"][slot] |= record.INJECTED | record.INACTIVE
        self.conns["state"][slot] = record.SYNACK if self.conns["proto"][slot] == record.TCP else record.NONE

    def wake(self, slot: int) -> None:
        """A packet of a session that waits."""
        self.conns["flags"][slot] &= 0xFFFF ^ record.INACTIVE
        udp = self.conns["proto"][slot] == record.UDP
        self.conns["state"][slot] = record.UDP_NORMAL if udp else record.ESTABLISHED

    def slot_of_client(self, client: int) -> int:
        """Where the session of a client is; -1 for nowhere."""
        conns = self.conns
        found = np.flatnonzero(((conns["flags"] & record.HASHED) != 0) & (conns["cport"] == 1024 + client))
        return int(found[0]) if len(found) else -1

    def establish(self, slot: int, delta: int = 77) -> None:
        self.conns["state"][slot] = record.ESTABLISHED
        self.conns["fnat_seq_delta"][slot] = delta

    def packet(self, slot: int) -> None:
        self.conns["rs_end_seq"][slot] += 1

    def _event(self, slot: int, kind: int, tid: int) -> None:
        self.now_ns += 1000
        if self.losing:
            self._lost += 1
        else:
            self._events.append((slot, self.now_ns, tid, kind))

    # What the collector sees.

    def slot_of(self, addresses: Words) -> Slots:
        found = (addresses.astype(np.int64) - BASE) // STRIDE
        exact = (addresses.astype(np.int64) - BASE) % STRIDE == 0
        return np.where(exact & (found >= 0) & (found < self.slots), found, -1)

    def read(self, slots: Slots) -> tuple[Records, Bools]:
        whole = np.array([slot not in self.torn for slot in slots.tolist()], np.bool_)
        self.torn -= set(slots.tolist())
        conns = self.conns[slots]
        conns["caddr"][~whole] = 0xAA
        return conns, whole

    def scan_prints(self, first: int, last: int) -> Prints:
        conns = self.conns[first:last]
        hot = np.zeros((len(conns), 4), np.uint64)
        hot[:, 0], hot[:, 1] = conns["cport"], conns["fnat_seq_isn"].astype(np.uint64) << 32 | conns["fnat_seq_delta"]
        hot[:, 2] = conns["flags"].astype(np.uint64) << 16 | conns["state"]
        hot[:, 3] = np.ascontiguousarray(conns["caddr"][:, :8]).view(np.uint64)[:, 0]
        return folded(hot)

    def live(self, slots: Slots) -> Bools:
        return np.asarray((self.conns["flags"][slots] & record.HASHED) != 0)

    def drain(self, maximum: int) -> Records:
        taken, self._events = self._events[:maximum], self._events[maximum:]
        events = np.zeros(len(taken), EVENT)
        for event, (slot, time_ns, tid, kind) in zip(events, taken, strict=True):
            event["conn"], event["time_ns"], event["tid"], event["kind"] = BASE + slot * STRIDE, time_ns, tid, kind
        return events

    def stray_event(self, address: int) -> None:
        self._events.append(((address - BASE) // STRIDE, self.now_ns, 5001, 1))

    def lost(self) -> int:
        return self._lost

    def clock(self, more_ns: int = 1_000_000) -> int:
        self.now_ns += more_ns
        return self.now_ns

    def expected(self) -> Records:
        """The records of the sessions that a table must hold, in order of slots."""
        slots = np.flatnonzero((self.conns["flags"] & record.HASHED) != 0)
        records = from_conns(self.conns[slots], slots, MODES)
        return records[~record.waiting(records)]
