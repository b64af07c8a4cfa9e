# SPDX-License-Identifier: GPL-2.0-or-later
"""What live objects of DPVS say of a layout, field by field.

Rules: reading only; DPVS is not asked. A *chain* is what must hold between some fields wherever such objects are:
pointers that lead there and back, counts that agree. Where it holds for one object, all of its fields are proven; where
it holds for none, it is tried with each field moved, and the one whose move mends it is the one that is wrong. Objects
that change while they are looked at fail; others do not. What nothing is said of is "not proven", which is not "wrong".
Facts: DPVS 1.10.2, src/ipvs/ip_vs_conn.c, ip_vs_proto_tcp.c, src/ctrl.c, src/sa_pool.c, src/inetaddr.c.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from probes.anatomy import (
    BUCKET,
    DEST,
    ENTRY,
    HANDLERS,
    IFADDR,
    LADDR,
    MESSAGE_TYPE,
    PORTS,
    SERVICE,
)
from probes.layout import SESSION, Layout
from probes.target import ReadFailed, Target

AF_INET, AF_INET6 = 2, 10
FAMILIES = (AF_INET, AF_INET6)
PROTOCOLS = (1, 6, 17, 58, 132)
MAX_MOVED = 1 << 26  # bytes a session may have carried, for its sequence numbers still to be taken for related
MAX_HASH = 128
MAX_SHIFT = 6  # of 64 workers
MODES, PRIORITIES = (1, 2), (1, 2, 3)  # enum msg_mode, msg_priority, include/ctrl.h; 0 is for none of them
MIN_TYPES = 4
MAX_LCORES = 64
MAX_RING = 256
IFNAMSIZ = 16
PAGE = 4096
ADDRESS_LIMIT = 1 << 47

Name = tuple[str, str | None]  # struct, field; None: the size of the struct


@dataclass
class Ledger:
    """What was found for and against each field."""

    good: dict[Name, str] = field(default_factory=dict)
    bad: dict[Name, str] = field(default_factory=dict)

    def proven(self, name: Name) -> bool:
        return name in self.good and name not in self.bad

    def prove(self, names: Iterable[Name], how: str) -> None:
        for name in names:
            self.good.setdefault(name, how)


def name_of(name: Name) -> str:
    """A field as people call it."""
    return f"sizeof({name[0]})" if name[1] is None else f"{name[0]}.{name[1]}"


class Looker:
    """Fields of structs at addresses of a process, under one layout. Pages are read once and kept: make a new one to
    look again."""

    def __init__(self, target: Target, layout: Layout, pages: dict[int, bytes] | None = None) -> None:
        self.target, self.layout = target, layout
        self._pages = {} if pages is None else pages

    def under(self, layout: Layout) -> "Looker":
        """The same memory by another layout."""
        return Looker(self.target, layout, self._pages)

    def read(self, address: int, size: int) -> bytes:
        first = address & -PAGE
        if not 0 < address < ADDRESS_LIMIT:
            raise ReadFailed(f"{address:#x} is no address")
        if address + size > first + PAGE:
            return self.target.read(address, size)
        page = self._pages.get(first)
        if page is None:
            page = self._pages[first] = self.target.read(first, PAGE)
        return page[address - first : address - first + size]

    def number(self, struct: str, member: str, at: int) -> int:
        offset, size = self.layout.field(struct, member)
        return int.from_bytes(self.read(at + offset, min(size, 8)), "little")

    def bytes(self, struct: str, member: str, at: int) -> bytes:
        offset, size = self.layout.field(struct, member)
        return self.read(at + offset, size)

    def word(self, address: int) -> int:
        return int.from_bytes(self.read(address, 8), "little")

    def ring(self, head: int, limit: int = MAX_RING) -> list[int] | None:
        """The nodes of a list, None where there is none or it is longer than ``limit``."""
        nodes: list[int] = []
        previous, at = head, self.word(head)
        while at != head:
            if at % 8 or len(nodes) >= limit or self.word(at + 8) != previous:
                return None
            nodes.append(at)
            previous, at = at, self.word(at)
        return nodes if self.word(head + 8) == previous else None


def same_address(family: int, a: bytes, b: bytes) -> bool:
    """Whether two ``union inet_addr`` are the same; what follows an IPv4 address is rubbish."""
    size = 4 if family == AF_INET else 16
    return a[:size] == b[:size]


@dataclass(frozen=True)
class Chain:
    """What holds between ``fields`` wherever such objects are. ``holds(looker, object)``; may raise ReadFailed."""

    what: str
    fields: tuple[Name, ...]
    holds: Callable[[Looker, Any], bool]

    def look(self, ledger: Ledger, looker: Looker, objects: Sequence[Any], most: int | None = None) -> None:
        """Judge the fields by these objects; other places of a field are tried on ``most`` of them, None: on all."""
        if self.holds_for(looker, objects):
            ledger.prove(self.fields, self.what)
            return
        mended = [
            (name, offset)
            for name in self.fields
            for offset, layout in moved(looker.layout, name)
            if self.holds_for(looker.under(layout), objects[:most])
        ]
        for name, offset in mended:
            ledger.bad.setdefault(name, f"{self.what}: it would be right at {offset}")

    def holds_for(self, looker: Looker, objects: Sequence[Any]) -> bool:
        """Whether it holds for one of the objects at least."""
        for one in objects:
            try:
                if self.holds(looker, one):
                    return True
            except (ReadFailed, OverflowError):
                continue
        return False


def moved(layout: Layout, name: Name) -> Iterable[tuple[int, Layout]]:
    """The layout with one field elsewhere in its struct, or with the struct of another size; (where, how big)."""
    struct, member = layout.struct(name[0]), name[1]
    if member is None:
        for size in range(8, 2 * struct.size + 8, 8):
            if size != struct.size:
                yield size, layout.changed(replace(struct, size=size))
        return
    old, size = struct.fields[member]
    step = min(size, 8) if size in (1, 2, 4, 8) else 4
    for offset in range(0, struct.size - size + 1, step):
        if offset != old:
            yield offset, layout.changed(replace(struct, fields={**struct.fields, member: (offset, size)}))


def _names(**members: Sequence[str | None]) -> tuple[Name, ...]:
    return tuple((struct, member) for struct, names in members.items() for member in names)


# --- real servers, services, local addresses -------------------------------------------------------------------------


@dataclass(frozen=True)
class Session:
    """What is known of a live session; addresses as 16 bytes and ports as they lie in memory."""

    address: int
    af: int
    af_out: int
    proto: int
    mode: int
    laddr: bytes
    daddr: bytes
    dport: bytes


def _session_server(looker: Looker, one: Session) -> bool:
    number, dest = looker.number, looker.number(SESSION, "dest", one.address)
    return (
        number(DEST, "af", dest) == one.af_out
        and looker.bytes(DEST, "port", dest) == one.dport
        and number(DEST, "fwdmode", dest) == one.mode
        and same_address(one.af_out, looker.bytes(DEST, "addr", dest), one.daddr)
        and _service(looker, number(DEST, "svc", dest), one)
    )


def _session_local(looker: Looker, one: Session) -> bool:
    """Only FullNAT has a local address; its node is on the list of the service."""
    local, dest = (looker.number(SESSION, member, one.address) for member in ("local", "dest"))
    head = looker.number(DEST, "svc", dest) + looker.layout.offset(SERVICE, "laddr_list")
    return (
        looker.number(LADDR, "af", local) == one.af_out
        and same_address(one.af_out, looker.bytes(LADDR, "addr", local), one.laddr)
        and local + looker.layout.offset(LADDR, "list") in (looker.ring(head) or ())
        and _is_port(looker, looker.number(LADDR, "iface", local))
    )


def _service(looker: Looker, at: int, one: Session | None = None) -> bool:
    number = looker.number
    if number(SERVICE, "proto", at) not in (PROTOCOLS if one is None else (one.proto,)):
        return False
    if number(SERVICE, "af", at) not in (FAMILIES if one is None else (one.af,)):
        return False
    head = at + looker.layout.offset(SERVICE, "laddr_list")
    nodes = looker.ring(head)
    return (
        nodes is not None
        and number(SERVICE, "num_laddrs", at) == len(nodes)
        and number(SERVICE, "laddr_curr", at) in (head, *nodes)
    )


def _configured(looker: Looker, node: int) -> bool:
    """A service by its node in the table of services: its real servers name it."""
    at = node - looker.layout.offset(SERVICE, "s_list")
    if not _service(looker, at):
        return False
    servers = looker.ring(at + looker.layout.offset(SERVICE, "dests"))
    if servers is None or looker.number(SERVICE, "num_dests", at) != len(servers):
        return False
    return bool(servers) and all(
        looker.number(DEST, "svc", server - looker.layout.offset(DEST, "n_list")) == at for server in servers or ()
    )


def _configured_local(looker: Looker, nodes: Sequence[int]) -> bool:
    """The local addresses of services are addresses that DPVS has. ``nodes``: all on static lists."""
    known = _addresses(looker, nodes)
    good = 0
    for node in nodes:
        try:
            if not _configured(looker, node):
                continue
            at = node - looker.layout.offset(SERVICE, "s_list")
            for local in looker.ring(at + looker.layout.offset(SERVICE, "laddr_list")) or ():
                laddr = local - looker.layout.offset(LADDR, "list")
                family, address = looker.number(LADDR, "af", laddr), looker.bytes(LADDR, "addr", laddr)
                size = 4 if family == AF_INET else 16
                if (family, address[:size]) not in known or not _is_port(looker, looker.number(LADDR, "iface", laddr)):
                    return False
                good += 1
        except (ReadFailed, OverflowError):
            continue
    return good > 0


def _addresses(looker: Looker, nodes: Sequence[int]) -> set[tuple[int, bytes]]:
    known = set()
    for node in nodes:
        at = node - looker.layout.offset(IFADDR, "h_list")
        try:
            if (family := looker.number(IFADDR, "af", at)) in FAMILIES:
                known.add((family, looker.bytes(IFADDR, "addr", at)[: 4 if family == AF_INET else 16]))
        except (ReadFailed, OverflowError):
            continue
    return known


def _is_port(looker: Looker, address: int) -> bool:
    """Whether a ``struct netif_port`` is there: it begins with its name."""
    name = looker.read(address, IFNAMSIZ).split(b"\0")[0]
    return 1 < len(name) < IFNAMSIZ and name.isascii() and name.decode().isprintable()


# --- local ports -----------------------------------------------------------------------------------------------------


def _ports(looker: Looker, node: int) -> bool:
    """An address with local ports, by its node in the table of addresses: it leads to its pools of ports, and they back
    to it; a free port's entry is where its number says. What is 0 wherever one looks (the flags of a free port, the
    shift of a single worker) is left to the code."""
    layout, number = looker.layout, looker.number
    at = node - layout.offset(IFADDR, "h_list")
    pool = number(IFADDR, "sa_pool", at)
    if pool == 0 or pool % 8 or number(PORTS, "ifa", pool) != at:
        return False
    family, address = number(IFADDR, "af", at), looker.bytes(IFADDR, "addr", at)
    low, high, pools = (number(PORTS, member, pool) for member in ("low", "high", "pool_hash_sz"))
    bucket = number(PORTS, "pool_hash", pool)
    if family not in FAMILIES or not 0 < low < high or not 0 < pools <= MAX_HASH or bucket % 8:
        return False
    entries, shift = number(BUCKET, "sa_entries", bucket), number(BUCKET, "shift", bucket)
    size = layout.size(ENTRY)
    if shift > MAX_SHIFT or entries != bucket + pools * layout.size(BUCKET):  # one piece of memory
        return False
    head = bucket + layout.offset(BUCKET, "free_enties")
    first = looker.word(head)
    if looker.word(first + 8) != head or looker.word(looker.word(head + 8)) != head:
        return False
    for free in (first, looker.word(first)):
        entry = free - layout.offset(ENTRY, "list")
        port = _port(looker, entry)
        if not low <= port <= high or entry != entries + size * (port >> shift):
            return False
        if number(ENTRY, "flags", entry) or not same_address(family, looker.bytes(ENTRY, "addr", entry), address):
            return False
    lowest, highest = low >> shift, high >> shift
    if _port(looker, entries + size * (lowest + 1)) == 0 or _port(looker, entries + size * (highest - 1)) == 0:
        return False
    if lowest and _port(looker, entries + size * (lowest - 1)):
        return False
    return highest + 1 >= (1 << 16) >> shift or _port(looker, entries + size * (highest + 1)) == 0


def _port(looker: Looker, entry: int) -> int:
    return int.from_bytes(looker.bytes(ENTRY, "port", entry), "big")


# --- control handlers and messages -----------------------------------------------------------------------------------


def _handlers(looker: Looker, place: int) -> bool:
    """The handler of the requests for sessions. ``place``: where the numbers of its first and last GET stand."""
    layout, number = looker.layout, looker.number
    at = place - layout.offset(HANDLERS, "get_opt_min")
    link = at + layout.offset(HANDLERS, "list")
    reserved = layout.sockopt_id("SOCKOPT_SET_CONN")
    return (
        number(HANDLERS, "version", at) == layout.sockopt_version
        and number(HANDLERS, "get_opt_min", at) == layout.sockopt_id("SOCKOPT_GET_CONN_ALL")
        and number(HANDLERS, "get_opt_max", at) == layout.sockopt_id("SOCKOPT_GET_CONN_SPECIFIED")
        and number(HANDLERS, "set_opt_min", at) == number(HANDLERS, "set_opt_max", at) == reserved
        and looker.target.is_code(number(HANDLERS, "get", at))
        and _is_handler(looker, number(HANDLERS, "set", at))
        and looker.word(looker.word(link) + 8) == link
        and looker.word(looker.word(link + 8)) == link
    )


def _is_handler(looker: Looker, address: int) -> bool:
    """Nothing, as in stock DPVS, or code: an agent's."""
    return address == 0 or any(r.start <= address < r.end and "x" in r.perms for r in looker.target.maps())


def _message_types(looker: Looker, nodes: Sequence[int]) -> bool:
    """The kinds of messages that the lcores take: each once an lcore, of at least two lcores. ``nodes``: all on static
    lists."""
    kinds = [(looker.number(MESSAGE_TYPE, "type", at), looker.number(MESSAGE_TYPE, "cid", at))
             for at in message_types(looker, nodes)]  # fmt: skip
    return (
        len(set(kinds)) == len(kinds) >= MIN_TYPES
        and len({lcore for _, lcore in kinds}) > 1
        and all(0 < kind < 1 << 31 and lcore < MAX_LCORES for kind, lcore in kinds)
    )


def message_types(looker: Looker, nodes: Sequence[int]) -> list[int]:
    """Addresses of what looks like a ``struct dpvs_msg_type``, among the nodes of static lists."""
    found = []
    for node in nodes:
        at = node - looker.layout.offset(MESSAGE_TYPE, "list")
        try:
            if (
                looker.number(MESSAGE_TYPE, "mode", at) in MODES
                and looker.number(MESSAGE_TYPE, "prio", at) in PRIORITIES
                and looker.target.is_code(looker.number(MESSAGE_TYPE, "unicast_msg_cb", at))
            ):
                found.append(at)
        except (ReadFailed, OverflowError):
            continue
    return found


SERVERS = Chain(
    "sessions, their real server and its service",
    _names(dp_vs_conn=("dest",), dp_vs_dest=("af", "addr", "port", "fwdmode", "svc"))
    + _names(dp_vs_service=("af", "proto", "laddr_list", "num_laddrs", "laddr_curr")),
    _session_server,
)
LOCALS = Chain(
    "sessions and their local address",
    _names(dp_vs_conn=("local",), dp_vs_laddr=("af", "addr", "list", "iface")),
    _session_local,
)
SERVICES = Chain(
    "services and their real servers",
    _names(
        dp_vs_service=("af", "proto", "laddr_list", "num_laddrs", "laddr_curr", "dests", "num_dests"),
        dp_vs_dest=("svc", "n_list"),
    ),
    _configured,
)
SERVICE_LOCALS = Chain(
    "services and their local addresses", _names(dp_vs_laddr=("af", "addr", "list", "iface")), _configured_local
)
LOCAL_PORTS = Chain(
    "addresses and their local ports",
    _names(
        inet_ifaddr=("af", "addr", "sa_pool"),
        sa_pool=("ifa", "low", "high", "pool_hash", "pool_hash_sz"),
        sa_entry_pool=("sa_entries", "free_enties", None),
        sa_entry=("list", "addr", "port", None),
    ),
    _ports,
)
CONTROL_HANDLERS = Chain(
    "the handler of requests for sessions",
    _names(
        dpvs_sockopts=(
            "version", "list", "set_opt_min", "set_opt_max", "set", "get_opt_min", "get_opt_max", "get",
        )
    ),
    _handlers,
)  # fmt: skip
MESSAGES = Chain(
    "kinds of messages", _names(dpvs_msg_type=("type", "prio", "cid", "mode", "unicast_msg_cb")), _message_types
)
