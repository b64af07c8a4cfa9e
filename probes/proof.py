# SPDX-License-Identifier: GPL-2.0-or-later
"""Prove on the live process that the chosen layout is its layout.

Rules: structure first (sizes, pointers, code addresses, a session's two hash entries against its own tuple), then a few
sessions compared with what DPVS itself says of them, field by field. The comparison looks sessions up by hash, never by
a full list, which would make DPVS's workers walk their tables; DPVS restarts the timers of the sessions it is asked
for. Sessions move while we look: what differs is read and asked once more before it counts. Without a live session the
checks that need one are "not yet", not "ok": prove again when there is traffic.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from probes.control import ControlSocket
from probes.errors import DpvsProbeError
from probes.layout import SESSION, Layout, release_name
from probes.memory import AF_INET, AF_INET6, Conns, SessionPool, Slots
from probes.target import Target

SAMPLES = 16
CANDIDATES = 4096
Status = Literal["ok", "failed", "not yet"]
XMIT = ("dp_vs_xmit_nat", "dp_vs_xmit_tunnel", "dp_vs_xmit_dr", "dp_vs_xmit_fnat", "dp_vs_xmit_snat")
# Checks without which nothing is captured; the others say whether single fields are what we take them for.
_CAPTURE = {"release", "session size", "session pool", "timer handler", "pool pointer", "hash entries"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class Proof:
    """What was proven of one process; ``sampled`` sessions were compared with DPVS's own answers."""

    checks: tuple[Check, ...]
    sampled: int

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.status == "failed"]

    @property
    def capture_ok(self) -> bool:
        """Nothing that capture rests on is wrong, though some may be "not yet"."""
        return not any(check.name in _CAPTURE for check in self.failed)

    @property
    def fields_ok(self) -> bool:
        """Every check was made, on live sessions, and none failed: records may be sent to peers."""
        return all(check.status == "ok" for check in self.checks)


class LayoutDisproved(DpvsProbeError):
    help_text = "This DPVS was built with other options than the layout knows. Nothing was attached."


def require(proof: Proof) -> None:
    """Raise LayoutDisproved, naming the first failed check, unless capture may go on."""
    if not proof.capture_ok:
        check = proof.failed[0]
        raise LayoutDisproved(f"{check.name}: {check.detail}")


def prove(target: Target, layout: Layout, pool: SessionPool, control: ControlSocket | None) -> Proof:
    """Check everything that can be checked now. ``control`` None leaves DPVS's own answers out (not yet)."""
    checks = [check_release(target, layout, control), check_size(layout, pool), check_pool(pool)]
    slots, conns = sample(pool, CANDIDATES)
    checks += [
        check_handler(target, pool, conns),
        check_pool_pointer(pool, conns),
        check_hash_entries(layout, pool, slots),
        check_xmit(target, conns),
    ]
    compared, check = compare_sessions(pool, control, slots[spread(len(slots), SAMPLES)])
    return Proof((*checks, check), compared)


def sample(pool: SessionPool, limit: int) -> tuple[Slots, Conns]:
    """Up to ``limit`` slots that look like sessions of DPVS by their flag alone, and their contents."""
    live = np.flatnonzero(pool.live())
    slots = live[spread(len(live), limit)]
    conns, ok = pool.read(slots)
    ok &= (conns["flags"] & pool.layout.flag("HASHED")) != 0
    return slots[ok], conns[ok]


def spread(count: int, limit: int) -> Slots:
    """At most ``limit`` indices spread evenly over ``count``."""
    return np.unique(np.linspace(0, count - 1, min(count, limit), dtype=np.int64)) if count else np.empty(0, np.int64)


# --- structure -----------------------------------------------------------------------------------------------------


def check_release(target: Target, layout: Layout, control: ControlSocket | None) -> Check:
    version = target.global_u32("g_version")
    if not version and control is not None:
        try:
            version = control.release()
        except DpvsProbeError as error:
            return Check("release", "not yet", str(error))
    if not version:
        return Check("release", "not yet", "the binary does not say which release it is")
    name = release_name(version)
    if name in layout.releases:
        return Check("release", "ok", f"DPVS {name}")
    return Check("release", "failed", f"DPVS {name}, but layout {layout.name} is for {', '.join(layout.releases)}")


def check_size(layout: Layout, pool: SessionPool) -> Check:
    sizes = {p.element_bytes for p in pool.pools}
    good = sizes == {layout.size(SESSION)}
    detail = f"{', '.join(map(str, sorted(sizes)))} bytes in DPVS, {layout.size(SESSION)} in layout {layout.name}"
    return Check("session size", "ok" if good else "failed", detail)


def check_pool(pool: SessionPool) -> Check:
    """The pool's objects were counted and numbered when it was opened; say again what was found."""
    populated = sum(p.populated for p in pool.pools)
    how = "mapped read-only" if pool.shared else "copied (not shared memory)"
    names = ", ".join(p.name for p in pool.pools)
    return Check("session pool", "ok" if populated == pool.slots else "failed", f"{names}: {pool.slots} slots, {how}")


def check_handler(target: Target, pool: SessionPool, conns: Conns) -> Check:
    """All sessions in the timer wheel share one handler: code of the program, dp_vs_conn_expire where it has a name."""
    handlers = set(conns["timer_handler"][(conns["flags"] & pool.layout.flag("IN_TIMER")) != 0].tolist())
    if not handlers:
        return Check("timer handler", "not yet", "no live session")
    if len(handlers) > 1:
        return Check("timer handler", "failed", f"sessions have {len(handlers)} different timer handlers")
    handler = handlers.pop()
    known = target.find("dp_vs_conn_expire")
    if not target.is_code(handler) or (known is not None and handler != known):
        return Check("timer handler", "failed", f"{handler:#x} is not dp_vs_conn_expire")
    return Check("timer handler", "ok", "dp_vs_conn_expire" if known else "one function of the program")


def check_pool_pointer(pool: SessionPool, conns: Conns) -> Check:
    if not len(conns):
        return Check("pool pointer", "not yet", "no live session")
    wrong = int(np.count_nonzero(~np.isin(conns["connpool"], [p.address for p in pool.pools])))
    if wrong:
        return Check("pool pointer", "failed", f"{wrong} of {len(conns)} sessions name another pool")
    return Check("pool pointer", "ok", f"{len(conns)} sessions name their pool")


def check_hash_entries(layout: Layout, pool: SessionPool, slots: Slots) -> Check:
    """tuplehash[0] is client -> virtual address, tuplehash[1] real server -> local address (dp_vs_conn_new)."""
    if not len(slots):
        return Check("hash entries", "not yet", "no live session")
    wrong = hash_mismatches(layout, pool, slots)
    if len(wrong):
        wrong = hash_mismatches(layout, pool, wrong)
        wrong = wrong[pool.live(wrong)]  # one that ended meanwhile does not count
    if len(wrong):
        return Check("hash entries", "failed", f"{len(wrong)} of {len(slots)} sessions differ from their hash entries")
    return Check("hash entries", "ok", f"{len(slots)} sessions agree with their hash entries")


def hash_mismatches(layout: Layout, pool: SessionPool, slots: Slots) -> Slots:
    """The slots whose tuple is not the one of their two hash entries."""
    raw = pool.raw(slots)
    af4 = raw[:, layout.offset(SESSION, "af")] == AF_INET
    good = af4 | (raw[:, layout.offset(SESSION, "af")] == AF_INET6)

    def cell(struct: str, name: str, base: int = 0) -> tuple[int, int]:
        offset, size = layout.field(struct, name)
        return base + offset, size

    first, stride = layout.offset(SESSION, "tuplehash"), layout.size("conn_tuple_hash")
    for direction, names in enumerate((("caddr", "vaddr", "cport", "vport"), ("daddr", "laddr", "dport", "lport"))):
        base = first + direction * stride
        family = raw[:, cell("conn_tuple_hash", "af", base)[0]]
        good &= raw[:, cell("conn_tuple_hash", "direct", base)[0]] == direction
        good &= raw[:, cell("conn_tuple_hash", "proto", base)[0]] == raw[:, layout.offset(SESSION, "proto")]
        for name, entry in zip(names, ("saddr", "daddr", "sport", "dport"), strict=True):
            at, size = layout.field(SESSION, name)
            there, _ = cell("conn_tuple_hash", entry, base)
            same = raw[:, at : at + size] == raw[:, there : there + size]
            if size > 4:  # what follows an IPv4 address is rubbish
                same[family == AF_INET, 4:] = True
            good &= same.all(axis=1)
    wrong: Slots = slots[~good]
    return wrong


def check_xmit(target: Target, conns: Conns) -> Check:
    known = {address: name for name in XMIT if (address := target.find(name)) is not None}
    if not len(conns):
        return Check("forwarding mode", "not yet", "no live session")
    seen = set(conns["packet_xmit"].tolist())
    if strange := seen - known.keys():
        return Check("forwarding mode", "failed", f"transmit function {min(strange):#x} is none of DPVS's")
    modes = sorted(known[address].removeprefix("dp_vs_xmit_") for address in seen)
    return Check("forwarding mode", "ok", ", ".join(modes))


# --- against DPVS's own word ------------------------------------------------------------------------------------------


def compare_sessions(pool: SessionPool, control: ControlSocket | None, slots: Slots) -> tuple[int, Check]:
    """Look each session up through the control socket; (how many were compared, the check)."""
    name = "sessions against DPVS"
    if control is None:
        return 0, Check(name, "not yet", "control socket not asked")
    compared, problems = 0, []
    for slot in slots.tolist():
        try:
            result = _compare_twice(pool, control, slot)
        except DpvsProbeError as error:
            return compared, Check(name, "not yet", f"{error}")
        if result is not None:
            compared += 1
            problems += result
    if problems:
        return compared, Check(name, "failed", f"{len(problems)} differences in {compared} sessions: {problems[0]}")
    if not compared:
        return 0, Check(name, "not yet", "no live session to compare")
    return compared, Check(name, "ok", f"{compared} sessions equal field by field")


def _compare_twice(pool: SessionPool, control: ControlSocket, slot: int) -> list[str] | None:
    """Differences of one session, None if it was gone. A difference must be seen twice."""
    first = _compare_one(pool, control, slot)
    return _compare_one(pool, control, slot) if first else first


def _compare_one(pool: SessionPool, control: ControlSocket, slot: int) -> list[str] | None:
    conns, ok = pool.read(np.array([slot]))
    conn = conns[0]
    layout = pool.layout
    if not ok[0] or not conn["flags"] & layout.flag("HASHED"):
        return None
    if conn["flags"] & layout.flag("TEMPLATE") or conn["af"] not in (AF_INET, AF_INET6):
        return None
    size = 4 if conn["af"] == AF_INET else 16
    row = control.session(
        int(conn["af"]), int(conn["proto"]), conn["caddr"][:size].tobytes(), int(conn["cport"]),
        conn["vaddr"][:size].tobytes(), int(conn["vport"]),
    )  # fmt: skip
    if row is None:
        return None if not pool.live(np.array([slot]))[0] else ["DPVS does not know a session that its memory shows"]
    outer = 4 if conn["af_out"] == AF_INET else 16

    def address(name: str, length: int) -> bool:
        return bytes(conn[name][:length]) == bytes(row[name][:length])

    equal = {
        "af": conn["af"] == row["in_af"],
        "outbound af": conn["af_out"] == row["out_af"],
        "proto": conn["proto"] == row["proto"],
        "client address": address("caddr", size),
        "virtual address": address("vaddr", size),
        "local address": address("laddr", outer),
        "real server": address("daddr", outer),
        **{name: conn[name] == row[name] for name in ("cport", "vport", "lport", "dport")},
        "timeout": abs(int(conn["timeout_s"]) - int(row["timeout"])) <= 1,
        "state": _state_agrees(int(conn["proto"]), int(conn["state"]), bytes(row["state"]).split(b"\0")[0]),
    }
    return [name for name, same in equal.items() if not same]


# DPVS 1.10.2, ip_vs_conn.c: get_conn_state_name
_TCP = (
    b"TCP_NONE", b"TCP_EST", b"SYN_SENT", b"SYN_RECV", b"FIN_WAIT", b"TIME_WAIT", b"TCP_CLOSE", b"CLOSE_WAIT",
    b"LAST_ACK", b"LISTEN", b"SYNACK",
)  # fmt: skip
_UDP = (b"UDP_NONE", b"UDP_ONEWAY", b"UDP_NORM", b"UDP_LAST")
_STATES = {6: _TCP, 17: _UDP}


def _state_agrees(proto: int, state: int, name: bytes) -> bool:
    names = _STATES.get(proto)
    return names is None or (state < len(names) and names[state] == name)
