# SPDX-License-Identifier: GPL-2.0-or-later
"""Attaching to a DPVS: find what is needed, prove it, then touch the process; undo all of it at the end.

Rules: everything that can refuse comes before the first thing that touches the target. Touching is two steps: probes,
and the agent where peers' sessions are to be put in. Each step's undo is on one stack, so an error half-way, a signal
and an orderly end leave the same: nothing but a retired agent that refuses. Steps are said in plain lines.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from collector.collector import Collector
from collector.governed import Governed
from collector.governor import Limits
from collector.record import DR, FNAT, NAT, SNAT, TUNNEL
from collector.table import SessionTable
from probes.agent import loading
from probes.agent.client import AgentClient
from probes.anatomy import Anatomy
from probes.choosing import choose
from probes.control import ControlSocket
from probes.errors import DpvsProbeError, NeedRoot
from probes.judging import faults, supported
from probes.layout import Layout, release_name
from probes.loader import RING_PAGES, Probes
from probes.memory import SessionPool
from probes.packets import FLOWS, Packets
from probes.packets import Mode as XdpMode
from probes.processors import KeptOff
from probes.proof import Injection, LayoutDisproved, Proof, prove
from probes.sites import session_sites
from probes.target import Target
from replicator.activity import Activity
from replicator.admin import Line
from replicator.discovery.discovery import Discovery
from replicator.discovery.source import EtcdPlace, Myself, Place
from replicator.filters import FilterSettings, SessionFilter
from replicator.inject import Injector
from replicator.keyfiles import KeysMissing
from replicator.keys import KEYS_DIRECTORY
from replicator.link import LinkSettings, Receiver, Sender
from replicator.links import Links, Outbound, reach_any
from replicator.membership import Membership
from replicator.node import Node, Parts
from replicator.ownership import Ownership
from replicator.placement import POINTS
from replicator.promotion import Policy, Promotion
from replicator.replica import Replicas
from replicator.rundir import RunDir
from replicator.seal import Party
from replicator.settings import Change
from replicator.sharing import AWAY_NS, Sharing
from replicator.store.keeper import Keeper
from replicator.transport.address import Address, BadAddress, resolve
from replicator.transport.choose import Mode, Transport, Where, parse
from replicator.transport.interface import PEER_TIMEOUT_S, Dialer, Listener
from replicator.transport.tls import Tls
from replicator.trial import tried_first
from replicator.wire import LZ4, MAX_NAME, WANTS, ZSTD, Hello, Role

XMIT_MODES = {
    "dp_vs_xmit_nat": NAT,
    "dp_vs_xmit_tunnel": TUNNEL,
    "dp_vs_xmit_dr": DR,
    "dp_vs_xmit_fnat": FNAT,
    "dp_vs_xmit_snat": SNAT,
}
PROOF_TRIES = 3
DAY_S = 86400.0
EVERYWHERE = ("*", "0.0.0.0", "::")
CLOCK = time.monotonic_ns

log = logging.getLogger(__name__)


class BadNodeName(DpvsProbeError):
    """A node name that cannot travel."""

    help_text = f"Give --node 1 to {MAX_NAME} bytes of printable text, different on each node."


class Source(Protocol):
    """Where options come from, and may come from again."""

    def reload(self) -> list[Change]:
        """Read what can be read again; what has changed. Raises DpvsProbeError, and keeps what it had."""

    def options(self) -> "Options":
        """What is in force: after ``reload`` the live settings are the new ones, the others as they were."""

    def rows(self) -> list[Line]:
        """Each setting, for a person."""


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    pid: int = 0  # 0: that of pid_file or process_name
    pid_file: str | None = None
    process_name: str | None = None
    mode: Mode = Mode.TCP
    rdma_device: str | None = None
    peers: tuple[Where, ...] = ()
    peers_from: tuple[Place, ...] = ()
    advertise: Address | None = None  # where peers reach us, for those who look us up; None: where we listen
    listen: Where | None = None
    inject: bool = True
    policy: Policy = Policy.INJECT
    node: str | None = None
    run_dir: RunDir = field(default_factory=RunDir)
    layout: str | None = None
    ring_pages: int = RING_PAGES
    probe_budget: float = Limits.budget  # of each worker's time; 0: no probes, the scan works alone
    require_peer_s: float | None = None
    link: LinkSettings = field(default_factory=LinkSettings)
    replicas: int | None = None  # of each session; None: at all peers
    keys: str | None = None  # directory; None: the usual one
    insecure: bool = False
    store: Path | None = None  # file that our own sessions are kept in
    store_flush_ns: int = 0  # it is written through that often; 0: when the kernel likes
    xdp: tuple[str, ...] = ()  # interfaces
    xdp_mode: str = XdpMode.AUTO
    xdp_flows: int = FLOWS
    version: str = ""
    filters: FilterSettings = field(default_factory=FilterSettings)
    hash_points: int = POINTS
    away_ns: int = AWAY_NS
    metrics: str | None = None  # where to show them
    spare_workers: bool = True  # run on none of the processors that DPVS's workers run on
    source: Source | None = None

    @property
    def takes_sessions(self) -> bool:
        """Sessions are put into DPVS: the agent is there."""
        return self.inject and (self.listen is not None or self.store is not None)


class Attachment:
    """One attach, from its first check to its last undo."""

    def __init__(self, options: Options, on_node: Callable[[Node], None]) -> None:
        """``on_node``: told of the node once it runs."""
        self._options, self._on_node = options, on_node
        self._node: Node | None = None
        self._task: asyncio.Task[Any] | None = None
        self._interrupted = False
        self._parts: Parts | None = None
        self._tls: Tls | None = None
        self._dates: asyncio.TimerHandle | None = None
        self._apply: Callable[[Options, Options], None] | None = None  # other live settings, once there is a node

    @property
    def pid(self) -> int:
        """Of the DPVS."""
        return self._options.pid

    async def run(self) -> int:
        """Attach, stay attached, detach; the exit status. Raises DpvsProbeError when it cannot be done."""
        self._task = asyncio.current_task()
        try:
            async with AsyncExitStack() as stack:
                node = await self._take_steps(stack)
                await asyncio.sleep(0)
                self._node = node
                status = await node.run(lambda: self._attached(node))
                log.info("detaching")
        except asyncio.CancelledError:
            if not self._interrupted:
                raise
            status = 0
        finally:
            if self._dates is not None:
                self._dates.cancel()
        log.info("detached from pid %d", self._options.pid)
        return status

    def _attached(self, node: Node) -> None:
        log.info("attached")
        self._on_node(node)

    def stop(self) -> None:
        """End ``run`` in order."""
        self._interrupted = True
        if self._node is not None:
            self._node.stop()
        elif self._task is not None:
            self._task.cancel()

    def use(self, options: Options) -> None:
        """What is in force from now on; only live settings differ."""
        before, self._options = self._options, replace(options, pid=self.pid)
        if self._apply is not None:
            self._apply(before, self._options)

    def reload_keys(self) -> None:
        """Read the keys again. What is wrong with the new ones is said, and the old ones stay in use."""
        if self._tls is None:
            log.info("SIGHUP: there are no keys to read again")
            return
        try:
            self._tls.reload()
        except DpvsProbeError as error:
            log.error("SIGHUP: the keys stay as they were: %s", error)
        else:
            log.info("SIGHUP: keys read again; links made from now on use them")
            self._warn_of_dates()

    def _warn_of_dates(self) -> None:
        """Say each day what will soon end."""
        if self._tls is None:
            return
        for warning in self._tls.identity.warnings():
            log.warning("%s", warning)
        if self._dates is not None:
            self._dates.cancel()
        self._dates = asyncio.get_running_loop().call_later(DAY_S, self._warn_of_dates)

    async def _take_steps(self, stack: AsyncExitStack) -> Node:
        options = self._options
        if os.geteuid() != 0:
            raise NeedRoot("attaching to another process needs root")
        self._tls = tls = credentials(options)
        self._warn_of_dates()
        name = node_name(options.node, tls)

        # Look, and refuse. Nothing here changes the target.
        target = stack.enter_context(Target.open(options.pid))
        stack.enter_context(options.run_dir.lock(options.pid))
        if options.spare_workers:
            stack.callback(KeptOff(target.worker_cpus().values()).close)
        layout, source = choose(target, options.layout)
        log.info("layout %s, %s", layout.name, source)
        if wrong := faults(layout):
            raise LayoutDisproved(f"layout {layout.name} does not agree with itself: {'; '.join(wrong)}")
        anatomy = await asyncio.to_thread(Anatomy.of, target)  # seconds: the service manager's watchdog waits for us
        layout, left_out = supported(layout, anatomy)
        if left_out:
            log.warning("not proven, so not used, nor sessions that need it: %s", ", ".join(left_out))
        control = ControlSocket(target.ipc_path, layout)
        release = release_name(control.release())
        log.info("found DPVS %s: pid %d, %s", release, target.pid, target.exe)
        pool = stack.enter_context(SessionPool.open(target, layout))
        proving = Proving(target, layout, pool, control, anatomy)
        proving.first()
        sites = session_sites(target.function) if options.probe_budget else ()

        workers = len(target.workers())
        me = Hello(
            name, time.time_ns(), Role.SENDER, pool.slots, instance=instance_of(target), workers=workers,
            capabilities=LZ4 | WANTS,
        )  # fmt: skip
        keeper = Keeper(options.store, me, CLOCK, flush_ns=options.store_flush_ns)
        stack.callback(keeper.close)
        table = SessionTable(pool.slots)
        keeper.look(table)
        transport = Transport(
            options.mode,
            tls,
            Party(name, me.epoch) if tls else None,
            options.rdma_device,
            max(PEER_TIMEOUT_S, options.link.down_ns / 1e9),
        )
        transport.check()
        dialers = [transport.dialer(peer) for peer in options.peers]
        for peer in options.peers:
            if isinstance(peer, Address):
                await resolve(peer)
        if options.require_peer_s is not None:
            await reach_any(dialers, options.require_peer_s)
        await asyncio.sleep(0)  # signals get in between steps
        probes: Probes | None = None
        if sites:
            probes = stack.enter_context(Probes(target, sites, options.ring_pages))  # compiled, not attached
        await asyncio.sleep(0)
        packets = _packets(options, stack)
        listener = transport.listener(options.listen) if options.listen else None
        if listener is not None:
            stack.push_async_callback(listener.close)
            await listener.start()

        # Touch.
        if probes is not None:
            probes.reattach()
            _say(probes)
        else:
            log.info("no probes: the scan works alone")
        await asyncio.sleep(0)
        replicas = Replicas(Hello(name, me.epoch, Role.RECEIVER, instance=me.instance, capabilities=LZ4 | ZSTD))
        client: AgentClient | None = None
        injector: Injector | None = None
        modes = {address: mode for name, mode in XMIT_MODES.items() if (address := target.find(name)) is not None}
        if options.takes_sessions and not proving.refused():
            client = loading.load(target, layout, control)
            stack.callback(_retire, client, target)
            log.info("agent %s is in DPVS, sessions will be put in", client.door.version)
            await asyncio.sleep(0)

        ring, lost = (probes.ring(), probes.lost) if probes is not None else (None, None)
        collector = Collector(pool, ring, table, modes=modes, workers=target.workers(), lost=lost, clock=CLOCK)
        governed: Governed | None = None
        if probes is not None:
            limits = Limits(budget=options.probe_budget)
            governed = Governed(probes, collector, list(target.worker_cpus().values()), CLOCK(), limits=limits)
            stack.callback(governed.close)
        if client is not None:
            ownership = Ownership(table, me.node_id, collector.release)
            promotion = Promotion(options.policy)
            if options.policy is Policy.PROMOTE and options.run_dir.was_promoted():
                log.info("keepalived said last that this node is MASTER: promoted")
                promotion.promote(CLOCK())
            agent = tried_first(client, layout, pool, control, modes, proving.missing)
            injector = Injector(
                agent, lambda: (*keeper.origins(), *replicas), ownership=ownership, promotion=promotion, workers=workers
            )  # fmt: skip
        keeper.begin(injector)

        def outbound_to(dialer: Dialer) -> Outbound:
            sender = Sender(table, table.add_peer(dialer.address), me, self._options.link)
            if self._parts is not None:  # it joins a node that runs
                sender.use_filter(self._parts.filter, self._options.filters.rate)
            return Outbound(dialer, sender, CLOCK)

        outbound = [outbound_to(dialer) for dialer in dialers]
        sharing: Sharing | None = None
        if options.replicas:
            sharing = Sharing(table, outbound, options.replicas, away_ns=options.away_ns, points=options.hash_points)
        given = [dialer.address for dialer in dialers]
        if options.peers_from:
            discovery = Discovery.of(options.peers_from, given, myself(name, options, listener))
        else:  # the configuration file may give others while we run
            discovery = Discovery(Membership(given), {})
        links = Links(
            outbound,
            replicas,
            listener=listener,
            make_receiver=lambda: Receiver(replicas, options.link, now_ns=CLOCK()),
            sharing=sharing,
            discovery=discovery,
            make_outbound=lambda address: outbound_to(transport.dialer(parse(options.mode, address))),
            forget=table.remove_peer,
        )
        if listener is not None:
            log.info("listening for peers on %s", listener.address)
        elif not dialers and not options.peers_from:
            log.info("neither --peer nor --listen: sessions are only watched")
        activity = Activity(packets, table, links.replicas, control.services, ask=links.want) if packets else None
        parts = Parts(
            name=name,
            pid=target.pid,
            collector=collector,
            links=links,
            admin_path=options.run_dir.socket_path(target.pid),
            injector=injector,
            governed=governed,
            keeper=keeper,
            origins=max(1, len(dialers)) if listener is not None else 0,
            pidfd=target.pidfd,
            release=pool.close,
            activity=activity,
            prove=None if proving.done else proving.again,
            about={
                "exe": target.exe,
                "build_id": target.build_id,
                "release": release,
                "layout": layout.name,
                "version": options.version,
                "slots": pool.slots,
                "memory": "mapped" if pool.shared else "copied",
                "listen": listener.address if listener else None,
                "links": str(transport),
            },
            more=lambda: {
                **_more(probes, governed, client),
                **({"membership": discovery.report()} if options.peers_from else {}),
            },
            settings=lambda: self._options.source.rows() if self._options.source else [],
        )
        self._parts = parts
        use_filters(parts, options.filters)
        self._apply = lambda before, after: apply_live(parts, before, after)
        return Node(parts)


def use_filters(parts: Parts, wanted: FilterSettings) -> None:
    """Which sessions peers are told of, and how fast, from now on."""
    chosen = parts.filter.settings if parts.filter is not None else FilterSettings()
    if replace(chosen, rate=0) != replace(wanted, rate=0):
        parts.filter = SessionFilter(parts.collector.table, wanted) if wanted.chooses else None
    for sender in parts.links.senders():
        sender.use_filter(parts.filter, wanted.rate)


def apply_live(parts: Parts, before: Options, after: Options) -> None:
    """Settings that change while a node runs."""
    if after.link != before.link:
        for sender in parts.links.senders():
            sender.use(after.link)
    if after.filters != before.filters:
        use_filters(parts, after.filters)
    if after.peers != before.peers:
        use_peers(parts.links, before, after)
    if after.probe_budget != before.probe_budget:
        if parts.governed is not None:
            parts.governed.use_budget(after.probe_budget)
        else:
            log.warning("there are no probes until the next start, whatever their budget")


def use_peers(links: Links, before: Options, after: Options) -> None:
    """Other peers than before; whoever stays does not notice."""
    if after.mode is Mode.SHM:
        log.warning("the peers of --mode shm need a restart")
    elif not (before.peers or before.peers_from or before.listen is not None):  # nor were any keys asked for
        log.warning("there were neither peers nor --listen at the start: peers need a restart")
    else:
        links.give(map(str, after.peers))


TAKEN_BACK = (
    "This DPVS was built with other options than the layout knows (docs/layouts.md). No session was told to peers. The "
    "probes were taken off, the agent was retired, and DPVS goes on as before."
)


class Proving:
    """Proves the layout, at once as far as sessions allow, and again when there are some."""

    def __init__(
        self, target: Target, layout: Layout, pool: SessionPool, control: ControlSocket, anatomy: Anatomy
    ) -> None:
        self._prove: Callable[[], Proof] = lambda: prove(target, layout, pool, control, anatomy)
        self._look: Callable[[], Injection] = lambda: prove(target, layout, pool, None, anatomy).injection
        self._injection = Injection()
        self._layout = layout
        self.done = False

    def first(self) -> None:
        """Before anything is touched. Raises LayoutDisproved."""
        if not self._once():
            log.info("layout %s fits; it will be proven as soon as there are sessions", self._layout.name)

    def again(self) -> bool:
        """Whether it is proven now, while attached. Raises LayoutDisproved."""
        return self._once(TAKEN_BACK)

    def refused(self) -> bool:
        """Whether nothing may be put into this DPVS, which is said; capture may go on."""
        if self._injection.wrong:
            wrong = ", ".join(self._injection.wrong)
            log.error(
                "layout %s is not proven for injection, peers' sessions are not put in: %s", self._layout.name, wrong
            )
        return bool(self._injection.wrong)

    def missing(self, *, fullnat: bool) -> tuple[str, ...]:
        """What is not proven yet, of the fields that putting sessions in takes; looks again if there is any.

        From the injector's thread, too: it reads, and asks DPVS nothing.
        """
        found = self._injection
        if found.missing or (fullnat and found.missing_fullnat):
            found = self._injection = self._look()
        return (*found.wrong, *found.missing, *(found.missing_fullnat if fullnat else ()))

    def _once(self, help_text: str | None = None) -> bool:
        proof = self._prove()
        self._injection = proof.injection
        for _ in range(PROOF_TRIES - 1):  # sessions move while we look: what is wrong must be wrong each time
            if not proof.failed:
                break
            proof = self._prove()
        if proof.failed:
            check = proof.failed[0]
            raise LayoutDisproved(
                f"layout {self._layout.name} is not that of this DPVS: {check.name}: {check.detail}",
                help_text=help_text,
            )
        if proof.fields_ok:
            self.done = True
            log.info("layout %s proven on %d live sessions", self._layout.name, proof.sampled)
        return self.done


def instance_of(target: Target) -> int:
    """64 bits that name this very process: pid and start time may repeat after a reboot, a boot id does not."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        name = f"{file.read().strip()} {target.start_time} {target.pid}"
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def credentials(options: Options) -> Tls | None:
    """The keys that links are made with; None without links, or for --insecure, said loudly. Raises KeysError."""
    if not options.peers and not options.peers_from and options.listen is None:
        return None
    if options.insecure:
        log.warning("--insecure: links are NOT PROTECTED, whoever reaches them can read and write sessions")
        return None
    directory = options.keys or KEYS_DIRECTORY
    if not os.path.isdir(directory):
        raise KeysMissing(
            f"links need keys, and there is no {directory}",
            help_text=f"{KeysMissing.help_text} In a laboratory, --insecure does without.",
        )
    return Tls.load(directory)


def node_name(given: str | None, tls: Tls | None = None) -> str:
    """The name of this node: its certificate's, where there is one; raises BadNodeName."""
    if tls is not None:
        if given not in (None, tls.identity.node):
            raise BadNodeName(f"--node {given}, but the keys are of node {tls.identity.node}")
        given = tls.identity.node
    name = socket.gethostname() if given is None else given
    if not name or not name.isprintable() or len(name.encode(errors="replace")) > MAX_NAME or name == "own":
        raise BadNodeName(f"'{name}' cannot be a node's name")
    return name


def myself(name: str, options: Options, listener: Listener | None) -> Myself:
    """This node, as those have to know it who look it up. Raises BadAddress where that cannot be said."""
    if listener is None:
        return Myself(name, None, None)
    port = int(listener.address.rpartition(":")[2])
    if options.advertise is not None:
        return Myself(name, str(options.advertise), port)
    if isinstance(options.listen, Address) and options.listen.host not in EVERYWHERE:
        return Myself(name, str(Address(options.listen.host, port)), port)
    if any(isinstance(place, EtcdPlace) for place in options.peers_from):
        raise BadAddress(
            f"peers that find us in etcd cannot dial {options.listen}",
            help_text="Give --advertise HOST:PORT, where peers reach this node.",
        )
    return Myself(name, None, port)


def _say(probes: Probes) -> None:
    """Where the probes are and what they cost, once."""
    for site in probes.sites:
        log.info("probe at %s: %s (%s)", site.function, site.mnemonic, site.why)
    costs = probes.costs
    known = "measured" if costs.measured else "assumed"
    log.info("%s, %.1f us of a worker's time a session (%s)", probes.how, costs.session_ns / 1000, known)


def _packets(options: Options, stack: AsyncExitStack) -> Packets | None:
    """The packet program on the interfaces that were named: nothing of DPVS, so it comes before the probes."""
    if not options.xdp:
        return None
    packets = stack.enter_context(Packets(options.xdp, options.xdp_flows, XdpMode(options.xdp_mode)))
    for one in packets.attached:
        log.info("packets of %s are counted: XDP, %s%s", one.interface, one.mode, f" ({one.why})" if one.why else "")
    return packets


def _more(probes: Probes | None, governed: Governed | None, client: AgentClient | None) -> Mapping[str, Any]:
    """For status: what the probes and the agent say now."""
    said: dict[str, Any] = {"probes": {"attached": False, "how": "scan only"}}
    if probes is not None and governed is not None:
        said["probes"] = {
            **governed.status(),
            "sites": [{"function": s.function, "instruction": s.mnemonic, "kind": s.kind} for s in probes.sites],
            "ring_bytes": probes.ring_bytes,
            **probes.counters(),
        }
    if client is not None:
        try:
            said["agent"] = client.counters()
        except (DpvsProbeError, OSError) as error:
            said["agent"] = {"unreadable": str(error)}
    return said


def _retire(client: AgentClient, target: Target) -> None:
    if not target.alive():
        return
    try:
        loading.unload(client)
        log.info("agent retired")
    except (DpvsProbeError, OSError) as error:
        log.warning("the agent stays in DPVS as it is: %s", error)
