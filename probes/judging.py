# SPDX-License-Identifier: GPL-2.0-or-later
"""Which fields of a layout are proven on a process, and what may be done with it then.

Rules: a field is *used* where something of ours reads or writes it (``probes.memory``, ``probes/agent/agent_abi.h``).
Each needs evidence of its own: live objects (``probes.evidence``), DPVS's own code (``probes.anatomy``), DPVS's own
answers (``probes.proof``). A field of ``OPTIONAL`` that has none is taken out of the layout: then nobody reads it or
writes it, and a session that needs it is not replicated. Any other that has none stops what uses it, capture or
injection, each for itself. What does not even agree with itself is refused before anything is read by it (``faults``).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from probes.agent import abi
from probes.anatomy import (
    BUCKET,
    DEST,
    ENTRY,
    HANDLERS,
    IFADDR,
    LADDR,
    LCORE,
    MESSAGE,
    MESSAGE_TYPE,
    PARAM,
    PORTS,
    SERVICE,
    TIMER,
    Anatomy,
)  # fmt: skip
from probes.errors import DpvsProbeError
from probes.evidence import (
    CONTROL_HANDLERS,
    LOCAL_PORTS,
    LOCALS,
    MESSAGES,
    SERVERS,
    SERVICE_LOCALS,
    SERVICES,
    Ledger,
    Looker,
    Name,
    Session,
    message_types,
    name_of,
)
from probes.layout import LOOKUP, SESSION, Layout
from probes.lists import static_nodes
from probes.poolcheck import POOL_FIELDS, ZONE_FIELDS
from probes.target import ReadFailed, Target

# Fields that DPVS fills in sessions of some kinds only, so that most live sessions say nothing of them.
OPTIONAL = abi.OPTIONAL
# What of a session is read for the table (probes.memory), beyond what is optional.
CAPTURED: tuple[Name, ...] = (
    *(
        (SESSION, member)
        for member in (
            "af", "proto", "caddr", "vaddr", "laddr", "daddr", "cport", "vport", "lport", "dport", "connpool",
            "tuplehash", "refcnt", "timer", "timeout", "fnat_seq", "rs_end_seq", "rs_end_ack", "packet_xmit", "flags",
            "state",
        )
    ),
    (TIMER, "handler"),
    *(("dp_vs_seq", member) for member in ("isn", "delta", "fdata_seq")),
    *(("conn_tuple_hash", member) for member in ("direct", "af", "proto", "saddr", "daddr", "sport", "dport", None)),
)  # fmt: skip
# Of these sessions may say nothing, where none is a FullNAT TCP session under way.
SELDOM: tuple[Name, ...] = (
    *((SESSION, member) for member in ("fnat_seq", "rs_end_seq", "rs_end_ack")),
    *(("dp_vs_seq", member) for member in ("isn", "delta", "fdata_seq")),
)
# What the agent only finds cache lines by that it will need. It proves them itself, on the sessions that it has made,
# and until then reads nothing by them but these sessions (agent/ahead.c): a standby that has none yet need not wait.
AHEAD: tuple[Name, ...] = ((SESSION, "tuplehash"), ("conn_tuple_hash", None))
INJECTED: tuple[Name, ...] = tuple(n for n in abi.fields() if n not in OPTIONAL and n not in AHEAD)
# Structs that arguments of DPVS's functions point to, or lead to.
BY_CODE = (
    SESSION, DEST, SERVICE, LADDR, PARAM, IFADDR, PORTS, BUCKET, ENTRY, HANDLERS, MESSAGE, MESSAGE_TYPE,
)  # fmt: skip
WHOLES = ("timer", "tuplehash")  # structs of their own
FULLNAT_ONLY = (LADDR, IFADDR, PORTS, BUCKET, ENTRY)  # what only FullNAT sessions need
SESSIONS_LOOKED_AT = 64
MOVED_FOR = 8  # of these
CALLBACKS = 40
Bytes = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
FULLNAT = 5
MIN_RELATED = 4  # sessions, to say that a number is elsewhere: by chance that is one in 2 ** 15 for each place
MAX_MOVED = 1 << 26  # bytes that a session may have carried, for its sequence numbers still to be taken for related


def supported(layout: Layout, anatomy: Anatomy) -> tuple[Layout, tuple[str, ...]]:
    """The layout without those of its optional fields that DPVS's code does not show; their names."""
    gone = [
        (struct, member)
        for struct, member in OPTIONAL
        if member is not None and layout.has(struct, member) and not anatomy.shows(layout, struct, member)
    ]
    for struct, member in gone:
        layout = layout.without(struct, [member])
    return layout, tuple(map(name_of, gone))


def judge_objects(target: Target, layout: Layout, anatomy: Anatomy, sessions: Sequence[Session]) -> Ledger:
    """What live objects and the code say of each field; nothing here asks DPVS or takes it from its work."""
    ledger, looker = Ledger(), Looker(target, layout)
    chosen = sessions[:SESSIONS_LOOKED_AT]
    if chosen:
        SERVERS.look(ledger, looker, chosen, MOVED_FOR)
        if full := [one for one in chosen if one.mode == FULLNAT]:
            LOCALS.look(ledger, looker, full, MOVED_FOR)
    nodes = _nodes(target)
    if nodes and (chosen or SERVICES.holds_for(looker, nodes)):
        SERVICES.look(ledger, looker, nodes)
        if not chosen:
            SERVICE_LOCALS.look(ledger, looker, [nodes])
    LOCAL_PORTS.look(ledger, looker, nodes)
    MESSAGES.look(ledger, looker, [nodes])
    CONTROL_HANDLERS.look(ledger, looker, _handler_places(target, layout))
    judge_code(ledger, layout, anatomy)
    _judge_messages(ledger, looker, anatomy, nodes)
    return ledger


def judge_code(ledger: Ledger, layout: Layout, anatomy: Anatomy) -> None:
    """Note for every field used whether DPVS's own code is seen to use it where the layout has it."""
    how = "DPVS's own code"
    for struct, member in {*CAPTURED, *INJECTED, *OPTIONAL}:
        if member is None:
            if struct in (PARAM, HANDLERS, MESSAGE_TYPE) and layout.has(struct):
                ends = [offset + size for offset, size in anatomy.places(layout, struct)]
                if ends and max(ends) <= layout.size(struct):
                    ledger.prove([(struct, None)], how)
        elif struct not in BY_CODE or member in WHOLES or not layout.has(struct, member):
            continue
        elif anatomy.shows(layout, struct, member):
            ledger.prove([(struct, member)], how)
    if anatomy.shows_timer(layout):
        ledger.prove([(SESSION, "timer")], how)
    if anatomy.shows_handler(layout):
        ledger.prove([(TIMER, "handler")], how)
    if anatomy.shows_lookup(layout):
        ledger.prove([(LOOKUP, LCORE)], how)
    if anatomy.shows_by_node(layout, "list", ("addr", "iface")):
        ledger.prove([(LADDR, "list"), (LADDR, "addr"), (LADDR, "iface")], how)
    places = anatomy.places(layout, SESSION)
    for member in ("isn", "delta", "fdata_seq"):
        if (layout.offset(SESSION, "fnat_seq") + layout.offset("dp_vs_seq", member), 4) in places:
            ledger.prove([("dp_vs_seq", member)], how)


def judge_sequences(ledger: Ledger, layout: Layout, raw: Bytes, established: Bools) -> None:
    """The numbers of FullNAT TCP sessions under way belong together two by two: what the real server has acknowledged
    follows the first number that it was sent (DPVS 1.10.2, ip_vs_proto_tcp.c: tcp_in_init_seq, tcp_out_save_seq); where
    its own data ends follows where it begins (tcp_out_init_seq). ``raw``: sessions whole, (n, size) uint8;
    ``established``: (n,) bool, which are FullNAT, TCP and established."""
    raw = raw[established]
    if not len(raw):
        return

    def numbers(offset: int, order: str) -> npt.NDArray[np.uint32]:
        return np.ascontiguousarray(raw[:, offset : offset + 4]).view(f"{order}u4")[:, 0].astype(np.uint32)

    def related(end: int, beginning: int) -> int:
        one, other = numbers(end, ">"), numbers(beginning, "<")
        return int(np.count_nonzero((one != 0) & (other != 0) & (one - other < MAX_MOVED)))

    everywhere = range(0, layout.size(SESSION) - 3, 4)
    seq = layout.offset(SESSION, "fnat_seq")
    for later, earlier in (("rs_end_ack", "isn"), ("rs_end_seq", "fdata_seq")):
        end, beginning = layout.offset(SESSION, later), seq + layout.offset("dp_vs_seq", earlier)
        if (count := related(end, beginning)) and 2 * count >= len(raw):
            names = [(SESSION, later), ("dp_vs_seq", earlier), (SESSION, "fnat_seq")]
            ledger.prove(names, f"numbers of {count} sessions")
        elif len(raw) >= MIN_RELATED:
            for name, places in (
                ((SESSION, later), [at for at in everywhere if related(at, beginning) == len(raw)]),
                ((SESSION, "fnat_seq"), [at for at in everywhere if related(end, at) == len(raw)]),
            ):
                if places:
                    ledger.bad[name] = "numbers that belong together are not where it says"


def unproven(ledger: Ledger, names: Iterable[Name]) -> list[str]:
    """What of the names has no evidence, or some against it."""
    return [name_of(name) for name in names if not ledger.proven(name)]


def faults(layout: Layout) -> list[str]:
    """Where a layout does not agree with itself, or with what is built for it: each begins with the field's name."""
    found = []
    for struct in layout.structs.values():
        if struct.name.startswith("rte_"):  # DPDK's have unions: what is used of them
            names = {member for kind, member in (*ZONE_FIELDS, *POOL_FIELDS) if kind == struct.name and member}
            struct = replace(struct, fields={m: at for m, at in struct.fields.items() if m in names})  # noqa: PLW2901
        end, last = 0, ""
        for member, (offset, size) in sorted(struct.fields.items(), key=lambda item: (item[1], item[0])):
            name = name_of((struct.name, member))
            if offset < end:
                found.append(f"{name} overlaps {name_of((struct.name, last))}")
            elif struct.name in PROTOCOL and offset - end >= 8:
                found.append(f"{name} leaves room after {last or 'the beginning'} that no compiler does")
            if size in (2, 4, 8) and offset % size:
                found.append(f"{name} is not aligned")
            end, last = max(end, offset + size), member
        if end > struct.size:
            found.append(f"{name_of((struct.name, last))} lies outside its struct")
    for member, at in SEQUENCE.items():
        if layout.has("dp_vs_seq", member) and layout.field("dp_vs_seq", member) != (at, 4):
            found.append(f"dp_vs_seq.{member} is not at {at}")
    return found


# What a request is packed by, before any answer can say that it was wrong.
PROTOCOL = (
    "dpvs_sock_msg", "dpvs_sock_msg_reply", "dp_vs_getinfo", "ip_vs_conn_entry", "ip_vs_conn_req", "ip_vs_sockpair",
    "ip_vs_conn_array",
)  # fmt: skip
SEQUENCE = {"isn": 0, "delta": 4, "fdata_seq": 8, "prev_delta": 12}  # of the session record, and of the agent


def _nodes(target: Target) -> list[int]:
    try:
        return [int(node) for node in static_nodes(target)]
    except ReadFailed:
        return []


def _handler_places(target: Target, layout: Layout) -> list[int]:
    """Where in the program's variables the first and the last number of the GET requests for sessions stand."""
    first, last = (layout.sockopt_id(f"SOCKOPT_GET_CONN_{which}") for which in ("ALL", "SPECIFIED"))
    places = []
    for segment in target.image.segments:
        if segment.executable or not segment.filesz:
            continue
        start = -(-(target.load_base + segment.vaddr) // 4) * 4
        try:
            words = np.frombuffer(target.read(start, segment.filesz // 4 * 4 - 4), np.uint32)
        except DpvsProbeError:
            continue
        places += (start + 4 * np.flatnonzero((words[:-1] == first) & (words[1:] == last))).tolist()
    return places


def _judge_messages(ledger: Ledger, looker: Looker, anatomy: Anatomy, nodes: Sequence[int]) -> None:
    """What the functions that take messages read of them: their data begins behind their length."""
    if not ledger.proven((MESSAGE_TYPE, "unicast_msg_cb")):
        return
    layout = looker.layout
    callbacks = {
        looker.number(MESSAGE_TYPE, "unicast_msg_cb", at): None for at in message_types(looker, nodes)
    }  # in order, each once
    places = anatomy.of_functions(tuple(callbacks)[:CALLBACKS], MESSAGE)
    length = sum(layout.field(MESSAGE, "len"))
    behind = [offset for offset, _ in places if offset >= length]
    if layout.field(MESSAGE, "len") in places and behind:
        if min(behind) == layout.offset(MESSAGE, "data"):
            ledger.prove([(MESSAGE, "data"), (MESSAGE, "len")], "DPVS's own code")
        else:
            ledger.bad[MESSAGE, "data"] = f"DPVS's own code reads from {min(behind)} on"
