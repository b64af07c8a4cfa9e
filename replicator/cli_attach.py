# SPDX-License-Identifier: GPL-2.0-or-later
"""``dpvs-probe attach``: its options, which are the settings of the configuration file too (``settings.py``)."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from collector.record import TCP_STATES, UDP_STATES
from probes.errors import DpvsProbeError
from replicator import render
from replicator.admin import Line
from replicator.cli_packets import packet_options
from replicator.console import run_dir_option, show, version
from replicator.logs import log_to_stderr
from replicator.placement import POINTS
from replicator.promotion import Policy
from replicator.rundir import RunDir
from replicator.settings import DEFAULT_FILE, Change, Configuration, Live, Milliseconds, Seconds
from replicator.transport.address import metrics_address
from replicator.transport.address import parse as parse_address
from replicator.transport.choose import Mode, parse

if TYPE_CHECKING:
    from replicator.attach import Options

STATES = tuple(dict.fromkeys(TCP_STATES + UDP_STATES))


@click.command()
@click.option(
    "--config", type=click.Path(dir_okay=False), metavar="FILE",
    help=f"Settings for what is not said here; {DEFAULT_FILE} by default, if it is there. /dev/null: none.",
)  # fmt: skip
@click.option("--pid", type=click.IntRange(min=1), help="Process id of the DPVS to attach to.")
@click.option(
    "--pid-file", type=click.Path(dir_okay=False), metavar="FILE",
    help="Attach to the DPVS that this file names, such as /var/run/dpvs.pid; wait for one, and for the next one when"
    " it has ended.",
)  # fmt: skip
@click.option("--name", metavar="PROGRAM", help="The same by the name of its program, such as dpvs.")
@click.option(
    "--enable/--no-enable", default=True, show_default=True,
    help="no: neither peers nor listen are used, sessions are only watched.",
)  # fmt: skip
@click.option(
    "--peer", "peers", cls=Live, multiple=True, metavar="HOST:PORT", help="Send our sessions there; may be repeated."
)
@click.option(
    "--peers-from", "peers_from", multiple=True, metavar="URL",
    help="More peers, as they come and go: etcd://HOST:2379[,HOST:2379...]/PREFIX, where this node registers itself"
    " too (etcd+tls:// with ?ca=FILE&cert=FILE&key=FILE&user=NAME&password_file=FILE), or"
    " dns+srv://_dpvs-probe._tcp.NAME. May be repeated.",
)  # fmt: skip
@click.option(
    "--advertise", metavar="HOST:PORT",
    help="Where peers that look this node up reach it; the address of --listen by default.",
)  # fmt: skip
@click.option("--listen", metavar="HOST:PORT", help="Take peers' sessions here; *:PORT listens on all addresses.")
@click.option(
    "--mode", type=click.Choice([mode.value for mode in Mode]), default=Mode.TCP.value, show_default=True,
    help="How links travel: rdma is set up over TCP at the same addresses; shm is for nodes on one host, at shm:/PATH.",
)  # fmt: skip
@click.option("--rdma-device", metavar="NAME[:PORT]", help="Device for --mode rdma; the first that is up if not given.")
@click.option(
    "--replicas", type=click.IntRange(min=1), metavar="K",
    help="Peers that hold each session; all of them if not given. A peer that is away is stood in for by others.",
)  # fmt: skip
@click.option(
    "--hash-points", type=click.IntRange(1, 4096), default=POINTS, show_default=True, metavar="N",
    help="Points of each peer on the hash ring of --replicas; the same on all nodes whose routes follow the ring.",
)  # fmt: skip
@click.option(
    "--away-timeout", type=Seconds(1, 3600), default=10.0, show_default=True, metavar="SECONDS",
    help="With --replicas, a peer that was away for so long is stood in for.",
)  # fmt: skip
@click.option(
    "--sync-batch-size", cls=Live, type=click.IntRange(1, 1 << 16), default=32, show_default=True, metavar="N",
    help="Changes that go out without waiting for more. On a quiet link each change goes at once.",
)  # fmt: skip
@click.option(
    "--sync-interval", cls=Live, type=Milliseconds(1, 60_000), default=100, show_default=True, metavar="MS",
    help="Longest wait of a change for others, in milliseconds.",
)  # fmt: skip
@click.option(
    "--compress", cls=Live, type=click.Choice(["auto", "lz4", "zstd", "none"]), default="auto", show_default=True,
    help="auto: LZ4 when a link is too slow for what there is to say; lz4, zstd: always; none: never. zstd packs"
    " tighter for more processor time; a peer that does not understand it gets LZ4.",
)  # fmt: skip
@click.option(
    "--heartbeat", type=Seconds(0.1, 60), default=1.0, show_default=True, metavar="SECONDS",
    help="A link that has nothing to say says so that often.",
)  # fmt: skip
@click.option(
    "--heartbeat-timeout", type=Seconds(0.5, 300), default=3.0, show_default=True, metavar="SECONDS",
    help="A link on which nothing was heard for so long is down; twice --heartbeat or more, the same on all nodes.",
)  # fmt: skip
@click.option(
    "--inject/--no-inject", default=True, show_default=True,
    help="Put peers' sessions into DPVS, which needs the agent in it; no: keep them in tables only.",
)  # fmt: skip
@click.option(
    "--policy", type=click.Choice([policy.value for policy in Policy]), default=Policy.INJECT.value, show_default=True,
    help="inject puts peers' sessions into DPVS as they come, for nodes that both have the addresses; promote keeps"
    " them in memory until `dpvs-probe promote`, for addresses that move with VRRP.",
)  # fmt: skip
@click.option(
    "--filter-service", "filter_services", cls=Live, multiple=True, metavar="[PROTO:]ADDRESS[/BITS][:PORT]",
    help="Peers are told of sessions of these services only, such as tcp:10.0.0.1:443 or 10.0.1.0/24; may be repeated.",
)  # fmt: skip
@click.option(
    "--filter-state", "filter_states", cls=Live, type=click.Choice(STATES, case_sensitive=False),
    multiple=True,
    help="Peers are told of a session once it is in one of these states, such as ESTABLISHED, and then of all that"
    " becomes of it; may be repeated.",
)  # fmt: skip
@click.option(
    "--filter-min-age", cls=Live, type=Seconds(0, 86400), default=0.0, show_default=True, metavar="SECONDS",
    help="Peers are told of sessions that live for so long.",
)  # fmt: skip
@click.option(
    "--filter-rate", cls=Live, type=click.FloatRange(0, 1e8), default=0.0, show_default=True, metavar="N",
    help="Each peer is told of so many sessions a second at most, full syncs included; what is over it waits. 0: any"
    " number.",
)  # fmt: skip
@click.option(
    "--metrics", metavar="[ADDRESS:]PORT",
    help="Show metrics to Prometheus there, at /metrics; a port alone is on the loopback interface. Not if not given.",
)  # fmt: skip
@click.option(
    "--node",
    help="Name of this node where it has no keys, not used by any peer; the host name if not given.",
)
@run_dir_option
@click.option("--layout", help="Use this struct layout instead of the one that fits; it is proven all the same.")
@click.option(
    "--ring-pages", type=click.IntRange(1, 1 << 16), default=2048, show_default=True,
    help="Size of the workers' rings for events together, in pages of 4 KiB; a power of two.",
)  # fmt: skip
@click.option(
    "--probe-budget", cls=Live, type=click.FloatRange(0, 100), default=5.0, show_default=True, metavar="PERCENT",
    help="Largest share of a worker's time that probes may take. Where they would take more they are taken away, and"
    " the scan goes on alone until there is less to do. 0: no probes.",
)  # fmt: skip
@click.option(
    "--scan-only", is_flag=True,
    help="No probes, as with --probe-budget 0: sessions are found by reading DPVS's memory again and again. Needs no"
    " bcc.",
)  # fmt: skip
@click.option(
    "--require-peer", type=Seconds(min=0), metavar="SECONDS",
    help="Attach only if at least one peer can be reached within this time. Without it, a peer that is not there yet"
    " is tried again and again.",
)  # fmt: skip
@click.option(
    "--keys", "keys_dir", type=click.Path(file_okay=False), metavar="DIR",
    help="Keys of this node, made with `dpvs-probe keys`: both ends of a link prove who they are, what it carries is"
    " encrypted, and the node has the name in its certificate. /etc/dpvs-probe/keys by default.",
)  # fmt: skip
@click.option(
    "--insecure", is_flag=True,
    help="Links without keys, even where there are some: whoever reaches one can read and write sessions. For"
    " laboratories.",
)  # fmt: skip
@click.option(
    "--store", type=click.Path(dir_okay=False), metavar="FILE",
    help="Keep this node's own sessions in this file, and put them back when DPVS was started anew.",
)  # fmt: skip
@click.option(
    "--store-flush", type=Seconds(0, 3600), default=0.0, show_default=True, metavar="SECONDS",
    help="Write the store through to its device that often; 0 leaves that to the kernel, which loses nothing unless"
    " the machine itself stops.",
)  # fmt: skip
@click.option(
    "--spare-workers/--no-spare-workers", default=True, show_default=True,
    help="Run on none of the processors that DPVS's workers run on, where at least two others are left.",
)  # fmt: skip
@packet_options
@click.option("-v", "--verbose", cls=Live, is_flag=True, help="Say more, with the name of the part that says it.")
@click.option(
    "--dry-run", is_flag=True,
    help="Look at all that attach looks at, say what it would do and what would become of the sessions there are, and"
    " touch nothing. Exit status 0 if it would attach, else 1.",
)  # fmt: skip
@click.pass_context
def attach(context: click.Context, /, **given: Any) -> int:
    """Attach to a running DPVS and replicate its sessions, until SIGINT, SIGTERM or `dpvs-probe detach`.

    Runs in the foreground. Exit status 3 means that the DPVS that --pid names has ended. What is not given here is
    taken from the configuration file; SIGHUP reads that, and the keys, again.
    """
    from replicator.service import found_now, run

    source = Given(Configuration.of(context, given["config"], conflicts), given["pid"])
    options = source.options()
    if given["dry_run"]:
        from replicator.rehearsal import rehearse

        good = True
        for check in rehearse(found_now(options)):
            show(render.checks([check._asdict()]))
            good = good and check.ok is not False
        show(["", "would attach; nothing was touched" if good else "would not attach; nothing was touched"])
        return 0 if good else 1
    log_to_stderr(source.verbose)
    return run(options)


def conflicts(values: Mapping[str, Any]) -> Iterator[tuple[str, Exception]]:
    """What is wrong with settings that are each right by themselves: keys, and what to say."""
    from replicator.discovery.source import parse as parse_source
    from replicator.filters import parse_service

    pages, peers, mode = values["ring_pages"], values["peers"], Mode(values["mode"])
    if pages & (pages - 1):
        yield "ring_pages", click.BadParameter(f"{pages} is not a power of two", param_hint="--ring-pages")
    if values["require_peer"] is not None and not peers:
        yield "require_peer", click.UsageError("--require-peer needs a --peer")
    if values["pid_file"] and values["name"]:
        yield "name", click.UsageError("--pid-file and --name do not go together")
    if values["keys_dir"] and values["insecure"]:
        yield "insecure", click.UsageError("--keys and --insecure do not go together")
    if values["heartbeat_timeout"] < 2 * values["heartbeat"]:
        yield "heartbeat_timeout", click.UsageError("--heartbeat-timeout must be twice --heartbeat or more")
    if not values["inject"] and Policy(values["policy"]) is Policy.PROMOTE:
        yield "policy", click.UsageError("--no-inject and --policy promote do not go together")
    if values["peers_from"] and mode is Mode.SHM:
        yield "peers_from", click.UsageError("--peers-from and --mode shm do not go together")
    if values["advertise"] and not (values["peers_from"] and values["listen"]):
        yield "advertise", click.UsageError("--advertise needs --peers-from and --listen")
    readers: tuple[tuple[str, Any, Iterable[str]], ...] = (
        ("peers", lambda text: parse(mode, text), peers),
        ("peers_from", parse_source, values["peers_from"]),
        ("listen", lambda text: parse(mode, text, listen=True), filter(None, [values["listen"]])),
        ("advertise", parse_address, filter(None, [values["advertise"]])),
        ("metrics", metrics_address, filter(None, [values["metrics"]])),
        ("filter_services", parse_service, values["filter_services"]),
    )
    for key, reads, texts in readers:
        for text in texts:
            try:
                reads(text)
            except DpvsProbeError as error:
                yield key, error


class Given:
    """What the command line and the file say, as options of ``replicator.attach``."""

    def __init__(self, configuration: Configuration, pid: int | None) -> None:
        self._configuration, self._pid = configuration, pid or 0
        if not (pid or configuration.values["pid_file"] or configuration.values["name"]):
            from probes.candidates import advice

            raise click.UsageError(f"which DPVS? Give --pid, --pid-file or --name\n{advice()}")

    @property
    def verbose(self) -> bool:
        return bool(self._configuration.values["verbose"])

    def rows(self) -> list[Line]:
        """Each setting, for a person."""
        return self._configuration.rows()

    def reload(self) -> list[Change]:
        """Read the file again. Raises BadConfiguration."""
        before = self.verbose
        changes = self._configuration.reload()
        if self.verbose != before:
            log_to_stderr(self.verbose)
        return changes

    def options(self) -> "Options":
        """All that is in force."""
        from replicator.attach import Options
        from replicator.discovery.source import parse as parse_source
        from replicator.engine import LinkSettings
        from replicator.filters import chosen

        values = self._configuration.values
        mode = Mode(values["mode"])
        peers = values["peers"] if values["enable"] else ()
        listen = values["listen"] if values["enable"] else None
        return Options(
            pid=self._pid,
            pid_file=values["pid_file"],
            process_name=values["name"],
            mode=mode,
            rdma_device=values["rdma_device"],
            peers=tuple(dict.fromkeys(parse(mode, peer) for peer in peers)),
            peers_from=tuple(dict.fromkeys(parse_source(text) for text in values["peers_from"] if values["enable"])),
            advertise=parse_address(values["advertise"]) if values["advertise"] else None,
            listen=parse(mode, listen, listen=True) if listen else None,
            replicas=values["replicas"],
            hash_points=values["hash_points"],
            away_ns=int(values["away_timeout"] * 1e9),
            link=LinkSettings(
                batch_changes=values["sync_batch_size"],
                batch_ns=values["sync_interval"] * 1_000_000,
                compress={"auto": None, "none": False}.get(values["compress"], True),
                zstd=values["compress"] == "zstd",
                heartbeat_ns=int(values["heartbeat"] * 1e9),
                down_ns=int(values["heartbeat_timeout"] * 1e9),
            ),
            filters=chosen(
                values["filter_services"], values["filter_states"], values["filter_min_age"], values["filter_rate"]
            ),
            inject=values["inject"],
            policy=Policy(values["policy"]),
            node=values["node"],
            run_dir=RunDir(values["run_dir"]),
            layout=values["layout"],
            ring_pages=values["ring_pages"],
            probe_budget=0.0 if values["scan_only"] else values["probe_budget"] / 100,
            require_peer_s=values["require_peer"] if peers else None,
            keys=values["keys_dir"],
            insecure=values["insecure"],
            xdp=tuple(dict.fromkeys(values["xdp"])),
            xdp_mode=values["xdp_mode"],
            xdp_flows=values["xdp_flows"],
            store=Path(values["store"]) if values["store"] else None,
            store_flush_ns=int(values["store_flush"] * 1e9),
            version=version(),
            metrics=values["metrics"],
            spare_workers=values["spare_workers"],
            source=self,
        )
