# SPDX-License-Identifier: GPL-2.0-or-later
"""What DPVS's own code says of a layout: which bytes of which struct it touches.

Rules: only functions and tables that every build names are begun with (``--export-dynamic`` keeps them in a stripped
binary): their arguments are structs by DPVS's own headers (1.8.4 to 1.10.2 agree). Read from the program file, run
never. A field that no code is seen to touch where the layout has it is *unproven* by this, not wrong: the compiler may
have hidden it. This needs no session, so it is what a standby that has none is judged by.
"""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from probes.errors import DpvsProbeError
from probes.layout import LOOKUP, SESSION, Layout
from probes.reading import CHUNK_BYTES, ELEMENT, Reader
from probes.reading import Path as Way
from probes.target import Target

DEST, SERVICE, LADDR, PARAM = "dp_vs_dest", "dp_vs_service", "dp_vs_laddr", "dp_vs_conn_param"
IFADDR, PORTS, BUCKET, ENTRY = "inet_ifaddr", "sa_pool", "sa_entry_pool", "sa_entry"
MESSAGE, MESSAGE_TYPE, HANDLERS = "dpvs_msg", "dpvs_msg_type", "dpvs_sockopts"
TIMER = "dpvs_timer"
HANDLER = "handler"  # of a timer: an argument of the functions that start one
# Functions by name -> which arguments are which struct (include/ipvs/conn.h, xmit.h, laddr.h, synproxy.h, dest.h,
# include/sa_pool.h, inetaddr.h, ctrl.h).
FUNCTIONS: Mapping[str, Mapping[int, str]] = {
    **{
        name: {0: SESSION}
        for name in (
            "dp_vs_conn_put", "dp_vs_conn_put_no_reset", "dp_vs_conn_expire_now",
            "dp_vs_conn_set_timeout", "dp_vs_redirect_init", "dp_vs_redirect_free", "dp_vs_laddr_unbind",
        )
    },
    **{
        name: {1: SESSION}
        for name in (
            "dp_vs_xmit_nat", "dp_vs_xmit_fnat", "dp_vs_xmit_dr", "dp_vs_xmit_tunnel",
            "dp_vs_synproxy_snat_handler", "dp_vs_synproxy_synack_rcv",
        )
    },
    "dp_vs_laddr_bind": {0: SESSION, 1: SERVICE},
    "dp_vs_conn_new": {2: PARAM, 3: DEST},
    "dp_vs_dest_lookup": {1: SERVICE},
    "dp_vs_schedule": {0: SERVICE},
    "dp_vs_dest_put": {0: DEST},
    "dp_vs_service_put": {0: SERVICE},
    "sa_pool_create": {0: IFADDR},
    "sa_pool_destroy": {0: IFADDR},
    "sa_fetch": {},
    "sa_release": {},
    "msg_type_register": {0: MESSAGE_TYPE},
    "msg_type_unregister": {0: MESSAGE_TYPE},
    "msg_type_mc_register": {0: MESSAGE_TYPE},
    "sockopt_register": {0: HANDLERS},
    "sockopt_unregister": {0: HANDLERS},
}  # fmt: skip
# Of LOOKUP not the arguments are looked at, but where it takes the last of them from: its lcore, on the stack
# (include/ipvs/service.h; up to 1.9.4 there is one more before it).
LCORE = "cid"
# Functions that start a timer: the timer, how long, what is called then (include/timer.h).
STARTS = ("dpvs_timer_sched", "dpvs_timer_sched_nolock", "dpvs_timer_sched_period")
# Functions whose first argument is a timer.
TIMED = (
    *STARTS, "dpvs_timer_update", "dpvs_timer_update_nolock", "dpvs_timer_cancel", "dpvs_timer_cancel_nolock",
    "dpvs_timer_reset", "dpvs_timer_reset_nolock",
)  # fmt: skip
# Functions by name -> the struct that they return; what is allocated, by whom it is allocated for.
RETURNS = {"inet_addr_ifa_get": IFADDR, "inet_addr_ifa_get_expired": IFADDR}
ALLOCATES = {"sa_pool_create": {"rte_zmalloc": PORTS}}
# A session keeps its forwarding mode as its transmit function (enum dpvs_fwd_mode, include/conf/conn.h).
FORWARDING = {
    "dp_vs_xmit_nat": 0, "dp_vs_xmit_tunnel": 2, "dp_vs_xmit_dr": 3, "dp_vs_xmit_fnat": 5, "dp_vs_xmit_snat": 6,
}  # fmt: skip
# Tables of a protocol's functions, most of which take the session second (include/ipvs/proto.h: struct dp_vs_proto).
TABLES = ("dp_vs_proto_tcp", "dp_vs_proto_udp")
TABLE_BYTES = 256
# Where a pointer to a struct is kept in another: (holder, field, struct).
LINKS = (
    (SESSION, "dest", DEST), (SESSION, "local", LADDR), (DEST, "svc", SERVICE), (IFADDR, "sa_pool", PORTS),
    (PORTS, "pool_hash", BUCKET), (BUCKET, "sa_entries", ENTRY), (PORTS, "ifa", IFADDR),
)  # fmt: skip
ADDRESS_BYTES = 16  # union inet_addr, of which an IPv4 address is the first 4
ETHERNET_BYTES = 6
Places = frozenset[tuple[int, int]]  # (offset, bytes)
Touched = Mapping[Way, Places]
CACHE, CACHE_VARIABLE = "/var/cache/dpvs-probe", "DPVS_PROBE_CACHE"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Anatomy:
    """What was read: path -> (offset, bytes) of each access. Empty where the code cannot be read."""

    touched: Touched = field(default_factory=dict)
    target: Target | None = field(default=None, compare=False)
    functions: dict[tuple[tuple[int, ...], str], Places] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, target: Target) -> "Anatomy":
        """Of the program of a process: read now, which takes seconds, or kept from another time by its build id."""
        kept = _kept(target.build_id)
        if kept is not None and (found := _load(kept)) is not None:
            return cls(found, target)
        log.info("reading the code of %s, once for each build of DPVS: this takes some seconds", target.exe)
        anatomy = cls.read(target)
        if kept is not None:
            _keep(kept, anatomy.touched)
        return anatomy

    @classmethod
    def read(cls, target: Target) -> "Anatomy":
        """Read the program of a process. A function that it lacks is passed over."""
        timed = _addresses(target, dict.fromkeys(TIMED, TIMER))
        reader = Reader(lambda address: _code(target, address), _addresses(target, RETURNS), timed)
        for name, arguments in FUNCTIONS.items():
            if (address := target.find(name)) is not None:
                reader.follow(address, arguments)
        if (address := target.find(LOOKUP)) is not None:
            reader.follow(address, {}, frame=LOOKUP)
        for name in STARTS:
            if (address := target.find(name)) is not None:
                reader.follow(address, {0: TIMER, 2: HANDLER})
        for name, returns in ALLOCATES.items():
            if (address := target.find(name)) is not None:
                other = Reader(reader.code, _addresses(target, returns))
                other.follow(address, {})
                reader.found |= other.found
        for name in TABLES:
            if (table := target.find(name)) is not None:
                raw = target.read(table, TABLE_BYTES)
                for at in range(0, TABLE_BYTES, 8):
                    function = int.from_bytes(raw[at : at + 8], "little")
                    if target.is_code(function):
                        reader.follow(function, {1: SESSION})
        touched: dict[Way, set[tuple[int, int]]] = defaultdict(set)
        for path, offset, size in reader.found:
            touched[path].add((offset, size))
        return cls({path: frozenset(places) for path, places in touched.items()}, target)

    def of_functions(self, functions: Sequence[int], struct: str) -> frozenset[tuple[int, int]]:
        """(offset, bytes) of what functions at these addresses do with their first argument, such a struct."""
        if self.target is None:
            return self.touched.get((struct,), frozenset())
        target, key = self.target, (tuple(functions), struct)
        if key not in self.functions:
            reader = Reader(lambda address: _code(target, address))
            for address in functions:
                reader.follow(address, {0: struct})
            places = ((offset, size) for path, offset, size in reader.found if path == (struct,))
            self.functions[key] = frozenset(places)
        return self.functions[key]

    def places(self, layout: Layout, struct: str) -> frozenset[tuple[int, int]]:
        """(offset, bytes) of all accesses to a struct, its pointers found where the layout has them."""
        return frozenset().union(*(self.touched.get(path, frozenset()) for path in self._paths(layout, struct, 3)))

    def _paths(self, layout: Layout, struct: str, depth: int) -> set[Way]:
        paths: set[Way] = {(struct,)}
        if depth:
            for holder, member, kind in LINKS:
                if kind == struct and layout.has(holder, member):
                    offset = layout.offset(holder, member)
                    for path in self._paths(layout, holder, depth - 1):
                        paths |= {(*path, offset), (*path, offset, ELEMENT)}
        return paths

    def shows(self, layout: Layout, struct: str, member: str) -> bool:
        """Whether the code is seen to touch this field, as wide as the layout says, where the layout says."""
        offset, size = layout.field(struct, member)
        places = self.places(layout, struct)
        return _touches(places, offset, size) or (
            member == "flags" and (offset, 1) in places
        )  # a bit of its first byte

    def shows_timer(self, layout: Layout) -> bool:
        """Whether what the layout takes for a session's timer is given to DPVS's functions for timers."""
        return (layout.offset(SESSION, "timer"), 0) in self.touched.get((SESSION, TIMER), frozenset())

    def shows_handler(self, layout: Layout) -> bool:
        """Whether what a timer calls is kept where the layout has it."""
        return layout.field(TIMER, "handler") in self.touched.get((TIMER, f"={HANDLER}"), frozenset())

    def shows_lookup(self, layout: Layout) -> bool:
        """Whether DPVS's lookup of services takes its lcore from where the layout has it, and nothing from behind."""
        places = self.touched.get((LOOKUP,), frozenset())
        if not layout.has(LOOKUP, LCORE) or not places:
            return False
        at, size = layout.field(LOOKUP, LCORE)
        return max(offset for offset, _ in places) == at and bool({(at, size), (at, 4)} & places)

    def shows_by_node(self, layout: Layout, node: str, members: Sequence[str]) -> bool:
        """The same for fields of a local address that the code reaches by its node on the list of its service."""
        current, first = (layout.offset(SERVICE, member) for member in ("laddr_curr", "laddr_list"))
        paths: list[Way] = [(SERVICE, start, *more) for start in (current, first) for more in ((), (0,), (0, 0))]
        places = frozenset().union(*(self.touched.get(path, frozenset()) for path in paths))
        at = layout.offset(LADDR, node)
        return all(
            _touches(places, offset - at, size) for offset, size in (layout.field(LADDR, member) for member in members)
        )


def _kept(build_id: str) -> Path | None:
    """Where what was read of a build is kept; another edition of what reads it keeps another file."""
    if not build_id:
        return None
    ours = blake2b(b"".join(Path(__file__).with_name(name).read_bytes() for name in ("anatomy.py", "reading.py")))
    directory = os.environ.get(CACHE_VARIABLE) or CACHE
    return Path(directory, f"{build_id}-{ours.hexdigest()[:16]}.json")


def _load(path: Path) -> Touched | None:
    """What was kept; None if nothing was, or it is not what root alone could have written."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid() or os.fstat(file.fileno()).st_mode & 0o022:
                return None
            data = json.load(file)
        return {tuple(path): frozenset((int(o), int(s)) for o, s in places) for path, places in data}
    except (OSError, ValueError, TypeError):
        return None


def _keep(path: Path, touched: Touched) -> None:
    """Keep it if there is a place for it: without, it is read again the next time."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps([[list(path), sorted(places)] for path, places in touched.items()]))
        fresh.replace(path)
    except OSError as error:
        log.debug("what was read of this build is not kept: %s", error)


def _touches(places: frozenset[tuple[int, int]], offset: int, size: int) -> bool:
    if size == ADDRESS_BYTES:  # an address, two words of a list, or the four numbers of struct dp_vs_seq
        return any((offset, width) in places for width in (4, 8, 16)) or (offset + 4, 4) in places
    if size == ETHERNET_BYTES:
        return {(offset, 4), (offset + 4, 2)} <= places
    return (offset, size) in places


def _addresses(target: Target, returns: Mapping[str, str]) -> dict[int, str]:
    return {address: name for function, name in returns.items() if (address := target.find(function)) is not None}


def _code(target: Target, address: int) -> bytes:
    if not target.is_code(address):
        return b""
    try:
        return target.image.code(address - target.load_base, CHUNK_BYTES)
    except DpvsProbeError:
        return b""
