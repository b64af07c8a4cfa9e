# SPDX-License-Identifier: GPL-2.0-or-later
"""One failover with sessions of every kind at once, and what became of each kind.

Rules: kinds are judged one by one, so that one that fails hides no other. A kind survives if the standby had a copy of
each session before the active node was killed; if each connection and flow went on with the same real server, which saw
the same client; and if afterwards the standby counted exactly what was alive, and at the end nothing.
"""

import selectors
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TypeVar

from collector.record import AF_INET6, DR, NAT, ONE_PACKET, SNAT, UDP, UDP_NORMAL
from probes.agent import abi
from probes.agent.client import AgentClient, Door
from probes.target import Target
from tests.kinds.outcomes import SURVIVES
from tests.lab.backends import WHO
from tests.lab.node import Node
from tests.lab.pair import Pair
from tests.lab.process import LabError, wait_for
from tests.lab.records import answers, fnat_records
from tests.lab.services import DATAGRAM, ECHO, KINDS, address, endpoint

CONNECTIONS, FLOWS = 10, 5
ANSWER_S, TRIES = 4.0, 8
COPIES_S, SETTLED_S, IDLE_S = 30.0, 40.0, 90.0
PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
Case = tuple[str, str]  # kind, protocol
T = TypeVar("T")


@dataclass
class Traffic:
    """The connections or flows of one case, in the client's namespace."""

    case: Case
    sockets: list[socket.socket]
    before: list[bytes]


def _open(pair: Pair, case: Case, stack: ExitStack) -> Traffic:
    kind, proto = case
    where = address(pair.plan, kind)
    sockets = []
    with pair.network.inside("client"):
        for _ in range(CONNECTIONS if proto == "tcp" else FLOWS):
            family = socket.AF_INET6 if ":" in where else socket.AF_INET
            made = socket.socket(family, socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM)
            stack.callback(made.close)
            made.settimeout(30)
            made.connect((where, ECHO if proto == "tcp" else DATAGRAM))
            made.setblocking(False)
            sockets.append(made)
    return Traffic(case, sockets, [])


def exchange(all_traffic: list[Traffic]) -> dict[Case, list[bytes]]:
    """What each connection and flow of each case answers to the same question; b"" for none."""
    answers: dict[Case, list[bytes]] = {}
    waiting: dict[socket.socket, tuple[Case, int]] = {}
    with selectors.DefaultSelector() as selector:
        for traffic in all_traffic:
            answers[traffic.case] = [b""] * len(traffic.sockets)
            for number, flow in enumerate(traffic.sockets):
                waiting[flow] = (traffic.case, number)
                selector.register(flow, selectors.EVENT_READ)
        for attempt in range(TRIES):  # a datagram may be lost; a line must not be repeated
            for flow, (case, _) in waiting.items():
                if attempt == 0 or case[1] == "udp":
                    with suppress(OSError):  # the answer will be missing
                        flow.send(WHO if case[1] == "udp" else b"still here\n")
            end = time.monotonic() + ANSWER_S
            while waiting and (left := end - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    ready = key.fileobj
                    assert isinstance(ready, socket.socket)
                    selector.unregister(ready)
                    case, number = waiting.pop(ready)
                    try:
                        answers[case][number] = ready.recv(200) or b"closed"
                    except OSError as error:
                        answers[case][number] = type(error).__name__.encode()
            if not waiting:
                break
    return answers


def refused(pair: Pair, node: Node) -> dict[str, str]:
    """What the agent answers to sessions that no DPVS could carry on from a record alone, by name."""
    wrong: dict[str, dict[str, int]] = {
        "SNAT": {"fwdmode": SNAT},
        "one-packet UDP": {"proto": UDP, "state": UDP_NORMAL, "flags": ONE_PACKET},
        "IPv4 to IPv6": {"af_out": AF_INET6},
        "direct routing, IPv6 to IPv4": {"af": AF_INET6, "fwdmode": DR},
        "NAT, IPv6 to IPv4": {"af": AF_INET6, "fwdmode": NAT},
    }
    records = fnat_records(pair.plan, len(wrong))
    for number, fields in enumerate(wrong.values()):
        for name, value in fields.items():
            records[name][number] = value
    with Target.open(node.pid) as target:
        door = Door.find(target)
        assert door is not None
        codes = answers(AgentClient(target, node.layout, node.control, door), abi.RecordOp.UPSERT, records)
    names = {int(abi.Code.UNSUPPORTED): "refused, `unsupported`"}
    return {name: names.get(int(code), f"code {code}") for name, code in zip(wrong, codes, strict=True)}


def held(pair: Pair, node: Node) -> Counter[Case]:
    """Sessions of a node by case, a copy on each of several workers counted as such."""
    cases = {
        (PROTOCOLS[proto], socket.inet_pton(socket.AF_INET6 if ":" in where else socket.AF_INET, where)): (kind, proto)
        for kind in KINDS
        for where in [address(pair.plan, kind)]
        for proto in PROTOCOLS
    }
    found: Counter[Case] = Counter()
    for row in node.sessions():
        size = 4 if row["in_af"] == socket.AF_INET else 16
        case = cases.get((int(row["proto"]), row["vaddr"].tobytes()[:size]))
        if case is not None:
            found[case] += 1
    return found


def counted(pair: Pair, node: Node) -> dict[Case, tuple[int, int]]:
    """What the real servers of each case count together: active, inactive."""
    servers = node.counters().servers
    found = {}
    for kind in KINDS:
        for proto, port in (("tcp", ECHO), ("udp", DATAGRAM)):
            name = f"{proto} {endpoint(address(pair.plan, kind), port)}"
            mine = [server for server in servers if server.service == name]
            found[kind, proto] = (sum(s.active for s in mine), sum(s.inactive for s in mine))
    return found


def failover(pair: Pair, workers: int, protocols: tuple[str, ...] = tuple(PROTOCOLS)) -> dict[Case, str]:
    """Play it through; ``SURVIVES`` or what went wrong, for each case."""
    cases = [(kind, proto) for kind in pair.settings.kinds for proto in protocols]
    faults: defaultdict[Case, list[str]] = defaultdict(list)

    def fault(case: Case, text: str) -> None:
        faults[case].append(text)

    with ExitStack() as stack:
        traffic = []
        for case in cases:
            try:
                traffic.append(_open(pair, case, stack))
            except OSError as error:
                fault(case, f"cannot be opened: {error}")
        first = exchange(traffic)
        for one in traffic:
            one.before = first[one.case]
            if b"" in one.before:
                fault(one.case, f"{one.before.count(b'')} without an answer before the failover")
        size = {one.case: len(one.sockets) for one in traffic}
        copies = {case: n if KINDS[case[0]][0] == "fnat" else n * workers for case, n in size.items()}
        flows = [one for one in traffic if one.case[1] == "udp"]

        def held_by_b() -> Counter[Case]:
            exchange(flows)  # a flow without packets ends
            return held(pair, pair.b)

        seen = _until(COPIES_S, held_by_b, lambda now: all(now[case] == copies[case] for case in copies))
        for case, wanted in copies.items():
            if seen[case] != wanted:
                fault(case, f"{seen[case]} copies instead of {wanted}")
        _same(traffic, fault, "with the standby full of copies")
        pair.kill("a")
        pair.active("b")
        _same(traffic, fault, "after the failover")
        _same(traffic, fault, "a second time after the failover")
        seen = _until(SETTLED_S, held_by_b, lambda now: all(now[case] == size[case] for case in size))
        counts = counted(pair, pair.b)
        status = pair.b.attached[-1].status()
        names = ("results", "under_way", "stopped", "contested", "socket_errors")
        said = {name: status["injection"][name] for name in names}
        for case, n in size.items():
            if seen[case] != n:
                fault(case, f"{seen[case]} sessions for {n} that are alive ({said}, agent {status.get('agent')})")
            if counts[case] != ((n, 0) if case[1] == "tcp" else (0, n)):
                fault(case, f"counted (active, inactive) {counts[case]} for {n} that are alive")
        _same(traffic, fault, "at the end")
    left = _until(IDLE_S, lambda: (held(pair, pair.b), counted(pair, pair.b)), lambda now: not any(now[0].values())
                  and all(count == (0, 0) for count in now[1].values()))  # fmt: skip
    for case in cases:
        if left[0][case] or left[1][case] != (0, 0):
            fault(case, f"left behind: {left[0][case]} sessions, counted {left[1][case]}")
    if pair.b.counters().ports_used:
        for case in cases:
            if KINDS[case[0]][0] == "fnat":
                fault(case, f"left behind: {pair.b.counters().ports_used} local ports in use")
    for case in cases:
        with ExitStack() as stack:
            try:
                fresh = _open(pair, case, stack)
            except OSError as error:
                fault(case, f"no new ones afterwards: {error}")
                continue
            if b"" in exchange([fresh])[case]:
                fault(case, "new ones afterwards without an answer")
    return {case: "; ".join(faults[case]) or SURVIVES for case in cases}


def _same(all_traffic: list[Traffic], fault: Callable[[Case, str], None], when: str) -> None:
    answers = exchange(all_traffic)
    for traffic in all_traffic:
        pairs = [(old, new) for old, new in zip(traffic.before, answers[traffic.case], strict=True) if old != new]
        if pairs:
            fault(traffic.case, f"{len(pairs)} of {len(traffic.sockets)} lost {when}, such as {pairs[0]}")


def _until(seconds: float, look: Callable[[], T], good: Callable[[T], bool]) -> T:
    """The latest look, good or not once the time is over: the caller says what is missing, kind by kind."""
    latest = look()

    def check() -> bool:
        nonlocal latest
        latest = look()
        return good(latest)

    with suppress(LabError):
        wait_for("what is expected", check, seconds, 0.3)
    return latest
