# SPDX-License-Identifier: GPL-2.0-or-later
"""``attach --dry-run``: everything that attach looks at before it touches the process, and what it would then do.

Rules: as ``probes.doctor``, and more of what the given options need. No probe is attached, no agent loaded, no port
listened on, no peer called; DPVS is asked what ``doctor`` asks it. The sessions are read from the pool's memory.
"""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from collector.conns import from_conns
from collector.record import (
    AF_INET,
    INJECTED,
    MODE_NAMES,
    ONE_PACKET,
    SCTP,
    SCTP_ESTABLISHED,
    TCP,
    TEMPLATE,
    UDP,
    Bools,
    Records,
    state_name,
)
from probes import loader
from probes.choosing import choose
from probes.doctor import Check, examine
from probes.errors import DpvsProbeError
from probes.memory import SessionPool
from probes.packets import Mode as XdpMode
from probes.packets import foresee
from probes.target import Target
from replicator.attach import XMIT_MODES, Options, credentials, instance_of, node_name
from replicator.discovery.source import name_of
from replicator.inject import injectable
from replicator.seal import Party
from replicator.store.format import ForeignStore, StoreRefused
from replicator.store.reader import boot_id, now, read
from replicator.store.restored import fit
from replicator.store.writer import StoreUnusable
from replicator.transport.address import Address, reason, resolve
from replicator.transport.choose import Transport

BLOCK = 1 << 16  # sessions read at a time


def rehearse(options: Options) -> Iterator[Check]:
    """What attach would look at and do, in its order; ``ok`` False where it would refuse."""
    takes = options.takes_sessions
    yield from examine(
        options.pid,
        layout_name=options.layout,
        lock_holder=options.run_dir.holder(options.pid),
        inject=takes,
        probes=options.probe_budget > 0,
    )
    if not takes:
        why = "--no-inject" if not options.inject else "neither --listen nor --store"
        yield Check("agent", True, f"would not be loaded ({why})")
    yield from _links(options)
    if options.xdp and options.probe_budget <= 0:
        yield from _compiler()
    for interface in options.xdp:
        yield _packets(interface, XdpMode(options.xdp_mode))
    if options.store is not None:
        yield _store(options, options.store)
    try:
        yield from _sessions(options)
    except DpvsProbeError as error:
        yield Check("sessions", False, str(error), error.help_text)


def _links(options: Options) -> Iterator[Check]:
    try:
        tls = credentials(options)
        name = node_name(options.node, tls)
        transport = Transport(options.mode, tls, Party(name, 1) if tls else None, options.rdma_device)
        transport.check()
    except DpvsProbeError as error:
        yield Check("links", False, str(error), error.help_text)
        return
    yield Check("links", True, f"node {name}, {transport}")
    for peer in options.peers:
        try:
            if isinstance(peer, Address):
                asyncio.run(resolve(peer))
            yield Check("peer", True, f"sessions would be sent to {peer}")
        except DpvsProbeError as error:
            yield Check("peer", False, str(error), error.help_text)
    for place in options.peers_from:
        yield Check("peers from", True, f"{name_of(place)} would be asked")
    if options.listen is not None:
        yield _listen(options.listen)


def _compiler() -> Iterator[Check]:
    """What the packet program needs, where no probes have asked for it already."""
    try:
        loader.available()
    except DpvsProbeError as error:
        yield Check("bcc and headers", False, str(error), error.help_text)


def _packets(interface: str, mode: XdpMode) -> Check:
    """What --xdp would do on one interface."""
    try:
        how = foresee(interface, mode)
    except DpvsProbeError as error:
        return Check("packets", False, str(error), error.help_text)
    return Check("packets", True, f"packets of {interface} would be counted: XDP, {how}")


def _store(options: Options, path: Path) -> Check:
    """What would become of a store: what is there is read, nothing is written."""
    try:
        if not path.parent.is_dir():
            raise StoreUnusable(f"there is no directory {path.parent} for a store")
        if not path.exists():
            return Check("store", True, f"{path} would be begun")
        contents = read(path)
        contents.require_node(node_name(options.node, credentials(options)))
        contents.require_whole()
        with Target.open(options.pid) as target:
            same = contents.head.instance == instance_of(target)
        found = fit(contents, boot_id(), now(), own=not same)
    except StoreRefused as error:
        if isinstance(error, ForeignStore):
            return Check("store", False, str(error), error.help_text)
        return Check("store", None, f"{error}", "It would be put aside, and a new one begun.")
    except DpvsProbeError as error:
        return Check("store", False, str(error), error.help_text)
    return Check("store", True, f"{path}: {len(found.records)} sessions would be put back, {found.expired} are too old")


def _listen(where: object) -> Check:
    if isinstance(where, Address):
        try:
            for family, kind, proto, _, address in socket.getaddrinfo(
                None if where.host == "*" else where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            ):
                with socket.socket(family, kind, proto) as trying:
                    trying.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        trying.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    trying.bind(address)
        except OSError as error:
            return Check("listen", False, f"cannot listen on {where}: {reason(error)}", "Another address or port.")
    return Check("listen", True, f"peers would be waited for on {where}")


def _sessions(options: Options) -> Iterator[Check]:
    """What is in this DPVS now, and what a peer would do with it."""
    with Target.open(options.pid) as target:
        layout, _ = choose(target, options.layout)
        modes = {address: mode for name, mode in XMIT_MODES.items() if (address := target.find(name)) is not None}
        said: dict[str, int] = {}
        example: dict[str, str] = {}
        copies = fit = 0
        with SessionPool.open(target, layout) as pool:
            live = np.flatnonzero(pool.live())
            for first in range(0, len(live), BLOCK):
                slots = live[first : first + BLOCK]
                conns, ok = pool.read(slots)
                ok &= pool.valid(conns)
                records = from_conns(conns[ok], slots[ok], modes)
                own = (records["flags"] & INJECTED) == 0
                copies += int(np.count_nonzero(~own))
                can = injectable(records) & own
                fit += int(np.count_nonzero(can))
                for why, which in refusals(records):
                    at = np.flatnonzero(which & own & ~can)
                    if len(at):
                        said[why] = said.get(why, 0) + len(at)
                        example.setdefault(why, _tuple(records[at[0]]))
    total = fit + sum(said.values())
    yield Check(
        "sessions", True, f"{total} of its own in DPVS; {fit} would be put into a peer's DPVS, {total - fit} not"
    )
    for why, count in sorted(said.items(), key=lambda item: -item[1]):
        yield Check("not put in", None, f"{count}: {why}, as {example[why]}", "Peers have them in their tables only.")
    if copies:
        yield Check("copies", True, f"{copies} of other nodes' sessions stand in DPVS")


def refusals(records: Records) -> list[tuple[str, Bools]]:
    """Why sessions are not put in: (reason, which), each session under the first that holds for it."""
    left = ~injectable(records)
    out: list[tuple[str, Bools]] = []

    def take(why: str, which: npt.NDArray[np.bool_]) -> None:
        nonlocal left
        out.append((why, left & which))
        left = left & ~which

    take("a template of persistence that is out of use", (records["flags"] & TEMPLATE) != 0)
    take("of one packet only", (records["flags"] & ONE_PACKET) != 0)
    for proto in np.unique(records["proto"][left]):
        if proto not in (TCP, UDP, SCTP):
            take(f"protocol {proto}", records["proto"] == proto)
    open_ = records.copy()
    open_["state"] = np.where(records["proto"] == SCTP, SCTP_ESTABLISHED, 1)  # established, or one-way
    take("not open yet, or ended", injectable(open_))
    for mode in np.unique(records["fwdmode"][left]):
        name = MODE_NAMES.get(int(mode), "?")
        take(f"forwarding mode {name}, or its address families", records["fwdmode"] == mode)
    return out


def _tuple(record: "np.void") -> str:
    family = socket.AF_INET if record["af"] == AF_INET else socket.AF_INET6
    size = 4 if record["af"] == AF_INET else 16
    client, virtual = (socket.inet_ntop(family, record[name].tobytes()[:size]) for name in ("caddr", "vaddr"))
    state = state_name(int(record["proto"]), int(record["state"]))
    return f"{client} port {record['cport']} to {virtual} port {record['vport']} ({state})"
