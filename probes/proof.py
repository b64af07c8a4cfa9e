# SPDX-License-Identifier: GPL-2.0-or-later
"""Prove on the live process that the chosen layout is its layout.

Rules: first what the layout says of itself, then structure (sizes, pointers, code addresses, a session's two hash
entries against its own tuple), then a few sessions compared with what DPVS itself says of them, field by field, then
every field that is used and has no evidence so far (``probes.judging``). A check that fails names the field. The
comparison looks sessions up by hash, never by a full list, which would make DPVS's workers walk their tables; DPVS
restarts the timers of the sessions it is asked for. Sessions move while we look: what differs is read and asked again,
and later again, before it counts. Without a live session the checks that need one are "not yet", not "ok": prove again
when there is traffic. Injection has a verdict of its own: capture may run where it is refused.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from probes.anatomy import FORWARDING, Anatomy
from probes.control import ControlSocket
from probes.errors import DpvsProbeError
from probes.evidence import Ledger, Looker, Name, Session, name_of
from probes.judging import (
    CAPTURED,
    FULLNAT_ONLY,
    INJECTED,
    SELDOM,
    faults,
    judge_objects,
    judge_sequences,
    unproven,
)
from probes.layout import SESSION, Layout, release_name
from probes.memory import AF_INET, AF_INET6, POOL_PREFIX, Bools, Conns, SessionPool, Slots
from probes.mempool import TABLE
from probes.poolcheck import POOL_FIELDS, ZONE_FIELDS, look_at_pools
from probes.target import Target

SAMPLES = 16
TCP, ESTABLISHED, FULLNAT = 6, 1, 5
PROTOCOLS = (1, 6, 17, 58, 132)
CANDIDATES = 4096
# Before further looks at what differs: a packet moves a session between our look and DPVS's answer, a copy ends.
PAUSES_S = (0.0, 0.02, 0.05, 0.1)
MAX_COPIES = 64  # of one session that are looked at: a worker has one at most
_INBOUND = np.dtype(
    [("af", "<u4"), ("proto", "u1"), ("caddr", "16u1"), ("vaddr", "16u1"), ("cport", ">u2"), ("vport", ">u2")]
)
Status = Literal["ok", "failed", "not yet"]
XMIT = tuple(FORWARDING)
# Checks without which nothing is captured; the others say whether single fields are what we take them for.
_CAPTURE = {
    "layout", "release", "session size", "session pool", "timer handler", "pool pointer", "hash entries", "fields",
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class Injection:
    """What of the fields that injection uses is ``wrong``, and what is not proven (yet), by its name: ``missing`` for
    any session, ``missing_fullnat`` for those that have a local address."""

    wrong: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    missing_fullnat: tuple[str, ...] = ()


@dataclass(frozen=True)
class Proof:
    """What was proven of one process; ``sampled`` sessions were compared with DPVS's own answers."""

    checks: tuple[Check, ...]
    sampled: int
    injection: Injection = Injection()

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


def prove(
    target: Target, layout: Layout, pool: SessionPool, control: ControlSocket | None, anatomy: Anatomy | None = None
) -> Proof:
    """Check everything that can be checked now. ``control`` None leaves DPVS's own answers out (not yet); ``anatomy``
    None has DPVS's code read now."""
    if wrong := faults(layout):
        return Proof((Check("layout", "failed", "; ".join(wrong)),), 0, Injection(tuple(wrong)))
    return prove_live(target, layout, pool, control, Anatomy.of(target) if anatomy is None else anatomy)


def prove_live(
    target: Target, layout: Layout, pool: SessionPool, control: ControlSocket | None, anatomy: Anatomy
) -> Proof:
    """``prove``, of a layout that agrees with itself."""
    slots, conns = sample(pool, CANDIDATES)
    chosen = slots[spread(len(slots), SAMPLES)]
    checks = [check_release(target, layout, control), check_size(layout, pool), check_pool(pool)]
    checks += [
        check_handler(target, pool, conns, slots),
        check_pool_pointer(pool, conns),
        check_hash_entries(layout, pool, slots),
        check_xmit(target, conns),
    ]
    compared, check = compare_sessions(pool, control, chosen)
    if check.status == "not yet" and control is not None and not len(conns):
        check = check_flags(pool, control) or check
    checks.append(check)
    ledger = _ledger(pool, anatomy, conns, slots)
    regions = target.maps()
    look_at_pools(ledger, Looker(target, layout), POOL_PREFIX, regions, [p.address for p in pool.pools])
    used = (*CAPTURED, *POOL_FIELDS, *(ZONE_FIELDS if any(TABLE in r.path for r in regions) else ()))
    for one in checks:
        if one.status == "ok":
            ledger.prove(_SHOWN.get(one.name, ()), one.name)
    checks.append(check_fields(ledger, used, live=compared > 0))
    return Proof(tuple(checks), compared, _injection(ledger, layout))


# What a check that passes proves.
_SHOWN = {
    "session size": ((SESSION, None),),
    "pool pointer": ((SESSION, "connpool"),),
    "timer handler": ((SESSION, "timer"), ("dpvs_timer", "handler")),
    "hash entries": (
        *((SESSION, member) for member in ("af", "proto", "caddr", "vaddr", "laddr", "daddr")),
        *((SESSION, member) for member in ("cport", "vport", "lport", "dport", "tuplehash")),
        *(("conn_tuple_hash", m) for m in ("direct", "af", "proto", "saddr", "daddr", "sport", "dport", None)),
    ),
    "forwarding mode": ((SESSION, "packet_xmit"),),
    "sessions against DPVS": ((SESSION, "state"), (SESSION, "timeout"), (SESSION, "flags")),
}


def _ledger(pool: SessionPool, anatomy: Anatomy, conns: Conns, slots: Slots) -> Ledger:
    target, layout = pool.target, pool.layout
    modes = {address: mode for name, mode in FORWARDING.items() if (address := target.find(name)) is not None}
    raw = pool.raw(slots)
    sessions = [
        Session(
            address=int(address),
            af=int(conn["af"]), af_out=int(conn["af_out"]), proto=int(conn["proto"]),
            mode=modes.get(int(conn["packet_xmit"]), -1), laddr=conn["laddr"].tobytes(), daddr=conn["daddr"].tobytes(),
            dport=int(conn["dport"]).to_bytes(2, "big"), )
        for conn, address in zip(conns, pool.address_of(slots), strict=True)
        if not conn["flags"] & layout.flag("TEMPLATE")
    ]  # fmt: skip
    ledger = judge_objects(target, layout, anatomy, sessions)
    established = (conns["proto"] == TCP) & (conns["state"] == ESTABLISHED)
    established &= np.isin(conns["packet_xmit"], [address for address, mode in modes.items() if mode == FULLNAT])
    judge_sequences(ledger, layout, raw, established)
    return ledger


def _injection(ledger: Ledger, layout: Layout) -> Injection:
    absent = [name_of(name) for name in INJECTED if not layout.has(*name)]
    wrong = [name_of(name) for name in ledger.bad]
    missing = [name for name in INJECTED if not ledger.proven(name) and layout.has(*name)]
    return Injection(
        tuple(dict.fromkeys((*absent, *wrong))),
        tuple(name_of(name) for name in missing if name[0] not in FULLNAT_ONLY),
        tuple(name_of(name) for name in missing if name[0] in FULLNAT_ONLY),
    )


def check_fields(ledger: Ledger, used: Sequence[Name], *, live: bool) -> Check:
    """Whether every field that is read for the table has evidence; with live sessions all but a few must have it."""
    missing = [name for name in used if not ledger.proven(name)]
    if not missing:
        return Check("fields", "ok", f"{len(used)} that are read")
    late = [name for name in missing if name in ledger.bad or (live and name not in SELDOM)]
    names = ", ".join(unproven(ledger, late or missing))
    return Check("fields", "failed" if late else "not yet", f"no evidence for {names}")


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


def check_handler(target: Target, pool: SessionPool, conns: Conns, slots: Slots) -> Check:
    """All sessions in the timer wheel share one handler: code of the program, dp_vs_conn_expire where it has a name."""
    handlers = set(conns["timer_handler"][(conns["flags"] & pool.layout.flag("IN_TIMER")) != 0].tolist())
    if not handlers:
        return Check("timer handler", "not yet", "no live session")
    if len(handlers) > 1:
        wrong = _wrong_timer(pool, slots)
        return Check("timer handler", "failed", f"{wrong}: sessions have {len(handlers)} different timer handlers")
    handler = handlers.pop()
    known = target.find("dp_vs_conn_expire")
    if not target.is_code(handler) or (known is not None and handler != known):
        return Check("timer handler", "failed", f"{_wrong_timer(pool, slots)}: {handler:#x} is not dp_vs_conn_expire")
    return Check("timer handler", "ok", "dp_vs_conn_expire" if known else "one function of the program")


def _wrong_timer(pool: SessionPool, slots: Slots) -> str:
    """A session's timer hands the session itself to its handler: where that stands, the timer is."""
    at = pool.layout.offset(SESSION, "timer") + pool.layout.offset("dpvs_timer", "priv")
    given = np.ascontiguousarray(pool.raw(slots)[:, at : at + 8]).view("<u8")[:, 0]
    right = np.count_nonzero(given == pool.address_of(slots))
    return "dpvs_timer.handler" if 2 * right > len(slots) else f"{SESSION}.timer"


def check_pool_pointer(pool: SessionPool, conns: Conns) -> Check:
    if not len(conns):
        return Check("pool pointer", "not yet", "no live session")
    wrong = int(np.count_nonzero(~np.isin(conns["connpool"], [p.address for p in pool.pools])))
    if wrong:
        return Check(
            "pool pointer", "failed", f"{SESSION}.connpool: {wrong} of {len(conns)} sessions name another pool"
        )
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
        names = ", ".join(_wrong_entries(layout, pool.raw(wrong)))
        text = f"{names}: {len(wrong)} of {len(slots)} sessions differ from their hash entries"
        return Check("hash entries", "failed", text)
    return Check("hash entries", "ok", f"{len(slots)} sessions agree with their hash entries")


def hash_mismatches(layout: Layout, pool: SessionPool, slots: Slots) -> Slots:
    """The slots whose tuple is not the one of their two hash entries."""
    good = np.logical_and.reduce(list(_entries(layout, pool.raw(slots)).values()))
    wrong: Slots = slots[~good]
    return wrong


def _entries(
    layout: Layout, raw: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]"
) -> dict[tuple[str, str, int], Bools]:
    """Which of the sessions ``raw``, (n, size) uint8, agree with their hash entries: (field of the session, field of
    the entry, direction) -> (n,) bool."""
    out: dict[tuple[str, str, int], Bools] = {}

    def cell(struct: str, name: str, base: int = 0) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
        offset, size = layout.field(struct, name)
        return raw[:, base + offset : base + offset + size]

    first, stride = layout.offset(SESSION, "tuplehash"), layout.size("conn_tuple_hash")
    for direction, names in enumerate((("caddr", "vaddr", "cport", "vport"), ("daddr", "laddr", "dport", "lport"))):
        base = first + direction * stride
        family = cell("conn_tuple_hash", "af", base)[:, 0]
        out["", "af", direction] = np.isin(family, (AF_INET, AF_INET6))
        out["", "direct", direction] = cell("conn_tuple_hash", "direct", base)[:, 0] == direction
        out["proto", "proto", direction] = cell("conn_tuple_hash", "proto", base)[:, 0] == cell(SESSION, "proto")[:, 0]
        for name, entry in zip(names, ("saddr", "daddr", "sport", "dport"), strict=True):
            same = cell(SESSION, name) == cell("conn_tuple_hash", entry, base)
            if same.shape[1] > 4:  # what follows an IPv4 address is rubbish
                same[family == AF_INET, 4:] = True
            out[name, entry, direction] = same.all(axis=1)
    out["af", "af", 0] = cell(SESSION, "af")[:, 0] == cell("conn_tuple_hash", "af", first)[:, 0]
    return out


def _wrong_entries(layout: Layout, raw: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> list[str]:
    """Which field it is. One of the entry is wrong in both directions, one of the session in one of them; a protocol is
    named by all three; where all is wrong, the entries are elsewhere."""
    bad = {key for key, same in _entries(layout, raw).items() if not same.all()}
    directions = {direction for _, _, direction in bad}
    by_direction = [{key for key in bad if key[2] == direction} for direction in (0, 1)]
    if len(by_direction[0]) > 4 and len(by_direction[1]) > 4:
        return [f"{SESSION}.tuplehash"]
    if len(by_direction[1]) > 4 and len(directions) == 1:
        return ["sizeof(conn_tuple_hash)"]
    both = {entry for _, entry, _ in bad if {(e, d) for _, e, d in bad} >= {(entry, 0), (entry, 1)}}
    if "proto" in both:
        offset, entry = layout.offset(SESSION, "tuplehash"), layout.offset("conn_tuple_hash", "proto")
        plausible = np.isin(raw[:, offset + entry], PROTOCOLS).all()
        return [f"{SESSION}.proto" if plausible else "conn_tuple_hash.proto"]
    if both:
        return [f"conn_tuple_hash.{entry}" for entry in sorted(both)]
    return sorted(f"{SESSION}.{name}" if name else f"conn_tuple_hash.{entry}" for name, entry, _ in bad)


def check_xmit(target: Target, conns: Conns) -> Check:
    known = {address: name for name in XMIT if (address := target.find(name)) is not None}
    if not len(conns):
        return Check("forwarding mode", "not yet", "no live session")
    seen = set(conns["packet_xmit"].tolist())
    if strange := seen - known.keys():
        return Check(
            "forwarding mode", "failed", f"{SESSION}.packet_xmit: {min(strange):#x} is no transmit function of DPVS's"
        )
    modes = sorted(known[address].removeprefix("dp_vs_xmit_") for address in seen)
    return Check("forwarding mode", "ok", ", ".join(modes))


# --- against DPVS's own word ------------------------------------------------------------------------------------------


def compare_sessions(pool: SessionPool, control: ControlSocket | None, slots: Slots) -> tuple[int, Check]:
    """Look each session up through the control socket; (how many were compared, the check)."""
    name = "sessions against DPVS"
    if control is None:
        return 0, Check(name, "not yet", "control socket not asked")
    compared, differing = 0, dict[int, list[str]]()
    try:
        for slot in slots.tolist():
            result = _compare(pool, control, [slot])
            compared += result is not None
            if result:
                differing[slot] = result
        for pause_s in PAUSES_S:
            if differing:
                time.sleep(pause_s)
                differing = _still_differing(pool, control, list(differing))
    except DpvsProbeError as error:
        return compared, Check(name, "not yet", f"{error}")
    problems = [problem for found in differing.values() for problem in found]
    if problems:
        counts = {problem: problems.count(problem) for problem in problems}
        worst = sorted(counts, key=lambda problem: -counts[problem])
        return compared, Check(
            name, "failed", f"{', '.join(worst[:4])}: {len(problems)} differences in {compared} sessions"
        )
    if not compared:
        return 0, Check(name, "not yet", "no live session to compare")
    return compared, Check(name, "ok", f"{compared} sessions equal field by field")


def _still_differing(pool: SessionPool, control: ControlSocket, slots: list[int]) -> dict[int, list[str]]:
    """Those of these slots whose session, and each copy of it, differs from what DPVS says now, and in what."""
    results = {slot: _compare(pool, control, [slot, *copies]) for slot, copies in _copies(pool, slots).items()}
    return {slot: result for slot, result in results.items() if result}


def _copies(pool: SessionPool, slots: list[int]) -> dict[int, list[int]]:
    """For each of these slots the others with sessions of the same tuple. Looks at all sessions, once.

    Each worker may have one, and those that saw no packet stay behind in state and timeout; DPVS answers for one of
    them, that of the worker it hears first (DPVS 1.10.2, ip_vs_conn.c: sockopt_conn_get_specified). So a difference is
    one only if all copies of the session have it, from one and the same answer.
    """
    if not slots:
        return {}
    wanted = _inbound(pool.read(np.array(slots))[0])
    found: dict[int, list[int]] = {slot: [] for slot in slots}
    live = np.flatnonzero(pool.live())
    for first in range(0, len(live), CANDIDATES):
        part = live[first : first + CANDIDATES]
        keys = _inbound(pool.read(part)[0])
        for slot, key in zip(slots, wanted, strict=True):
            same = part[keys == key]
            found[slot] += same[same != slot][:MAX_COPIES].tolist()
    return {slot: copies[:MAX_COPIES] for slot, copies in found.items()}


def _inbound(conns: Conns) -> "np.ndarray[tuple[int], np.dtype[np.void]]":
    """What DPVS finds each of n sessions by, from the client's side: values that are equal when that is."""
    keys = np.zeros(len(conns), _INBOUND)
    for name in _INBOUND.names or ():
        keys[name] = conns[name]
    for name in ("caddr", "vaddr"):
        keys[name][conns["af"] == AF_INET, 4:] = 0
    return keys.view(f"V{_INBOUND.itemsize}")


def _compare(pool: SessionPool, control: ControlSocket, slots: Sequence[int]) -> list[str] | None:
    """Differences between the session in the first of these slots and DPVS's answer, None if it was gone. There are
    none where another of them, a copy, is what DPVS answered for.
    """
    conns, ok = pool.read(np.array(slots))
    conn, layout = conns[0], pool.layout
    hashed = ok & ((conns["flags"] & layout.flag("HASHED")) != 0)
    if not hashed[0]:
        return None
    if conn["flags"] & layout.flag("TEMPLATE") or conn["af"] not in (AF_INET, AF_INET6):
        return None
    row = _ask(control, conn)
    if row is None:
        return None if not pool.live(np.array(slots[:1]))[0] else [f"{SESSION}.flags or the tuple of requests"]
    found = [_differences(one, row) for one in conns[hashed]]
    return found[0] if all(found) else []


def _differences(conn: Any, row: Any) -> list[str]:
    """Of one session and one answer, the fields that are not equal."""
    size = 4 if conn["af"] == AF_INET else 16
    outer = 4 if conn["af_out"] == AF_INET else 16

    def address(name: str, length: int) -> bool:
        return bytes(conn[name][:length]) == bytes(row[name][:length])

    equal = {
        "in_af": conn["af"] == row["in_af"],
        "out_af": conn["af_out"] == row["out_af"],
        "proto": conn["proto"] == row["proto"],
        "caddr": address("caddr", size),
        "vaddr": address("vaddr", size),
        "laddr": address("laddr", outer),
        "daddr": address("daddr", outer),
        **{name: conn[name] == row[name] for name in ("cport", "vport", "lport", "dport")},
        "timeout": abs(int(conn["timeout_s"]) - int(row["timeout"])) <= 1,
        "state": _state_agrees(int(conn["proto"]), int(conn["state"]), bytes(row["state"]).split(b"\0")[0]),
    }
    # The tuple agrees with the hash entries, or that check says so: then it is the answer that is read wrongly.
    return [
        f"{SESSION}.{name} or ip_vs_conn_entry.{name}" if name in ("timeout", "state") else f"ip_vs_conn_entry.{name}"
        for name, same in equal.items()
        if not same
    ]


def check_flags(pool: SessionPool, control: ControlSocket) -> Check | None:
    """Where no session seems to be live: whether DPVS knows one of those that look like it but for their flags."""
    layout = pool.layout
    slots = np.arange(pool.slots, dtype=np.int64)[spread(pool.slots, CANDIDATES)]
    conns, ok = pool.read(slots)
    ok &= np.isin(conns["connpool"], [p.address for p in pool.pools]) & (conns["refcnt"] > 0)
    ok &= np.isin(conns["af"], (AF_INET, AF_INET6)) & (conns["dest"] != 0)
    maybe = slots[ok]
    if len(maybe):
        maybe = np.setdiff1d(maybe, hash_mismatches(layout, pool, maybe))
    for slot in maybe[spread(len(maybe), SAMPLES)].tolist():
        conn = pool.read(np.array([slot]))[0][0]
        try:
            row = _ask(control, conn)
        except DpvsProbeError:
            return None
        if row is not None:
            return Check("sessions against DPVS", "failed", f"{SESSION}.flags: DPVS has sessions, memory shows none")
    return None


def _ask(control: ControlSocket, conn: "np.void") -> "np.void | None":
    """DPVS's own row of a session that was read from memory."""
    size = 4 if conn["af"] == AF_INET else 16
    return control.session(  # type: ignore[return-value]
        int(conn["af"]), int(conn["proto"]), conn["caddr"][:size].tobytes(), int(conn["cport"]),
        conn["vaddr"][:size].tobytes(), int(conn["vport"]),
    )  # fmt: skip


# DPVS 1.10.2, ip_vs_conn.c: get_conn_state_name
_TCP = (
    b"TCP_NONE", b"TCP_EST", b"SYN_SENT", b"SYN_RECV", b"FIN_WAIT", b"TIME_WAIT", b"TCP_CLOSE", b"CLOSE_WAIT",
    b"LAST_ACK", b"LISTEN", b"SYNACK",
)  # fmt: skip
_UDP = (b"UDP_NONE", b"UDP_ONEWAY", b"UDP_NORM", b"UDP_LAST")  # in the numbers of 1.10.2, as SessionPool.read has them
_STATES = {6: _TCP, 17: _UDP}


def _state_agrees(proto: int, state: int, name: bytes) -> bool:
    names = _STATES.get(proto)
    return names is None or (state < len(names) and names[state] == name)
