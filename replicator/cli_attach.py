# SPDX-License-Identifier: GPL-2.0-or-later
"""``dpvs-probe attach``: its options, which are the settings of the configuration file too."""

from pathlib import Path
from typing import Any

import click

from replicator import render
from replicator.cli_packets import packet_options
from replicator.console import log_to_stderr, run_dir_option, show, version
from replicator.promotion import Policy
from replicator.rundir import RunDir
from replicator.transport.address import parse as parse_address
from replicator.transport.choose import Mode, parse


@click.command()
@click.option("--pid", type=click.IntRange(min=1), required=True, help="Process id of the DPVS to attach to.")
@click.option("--peer", "peers", multiple=True, metavar="HOST:PORT", help="Send our sessions there; may be repeated.")
@click.option(
    "--peers-from", "peers_from", multiple=True, metavar="URL",
    help="More peers, as they come and go: etcd://HOST:2379[,HOST:2379...]/PREFIX, where this node registers itself"
    " too, or dns+srv://_dpvs-probe._tcp.NAME. May be repeated.",
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
    "--sync-batch-size", type=click.IntRange(1, 1 << 16), default=32, show_default=True, metavar="N",
    help="Changes that go out without waiting for more. On a quiet link each change goes at once.",
)  # fmt: skip
@click.option(
    "--sync-interval", type=click.IntRange(1, 60_000), default=100, show_default=True, metavar="MS",
    help="Longest wait of a change for others, in milliseconds.",
)  # fmt: skip
@click.option(
    "--compress", type=click.Choice(["auto", "lz4", "none"]), default="auto", show_default=True,
    help="LZ4 on links: auto, when a link is too slow for what there is to say; always; never.",
)  # fmt: skip
@click.option(
    "--heartbeat", type=click.FloatRange(0.1, 60), default=1.0, show_default=True, metavar="SECONDS",
    help="A link that has nothing to say says so that often.",
)  # fmt: skip
@click.option(
    "--heartbeat-timeout", type=click.FloatRange(0.5, 300), default=3.0, show_default=True, metavar="SECONDS",
    help="A link on which nothing was heard for so long is down; twice --heartbeat or more, the same on all nodes.",
)  # fmt: skip
@click.option("--no-inject", is_flag=True, help="Keep peers' sessions in tables only: load no agent into DPVS.")
@click.option(
    "--policy", type=click.Choice([policy.value for policy in Policy]), default=Policy.INJECT.value, show_default=True,
    help="inject puts peers' sessions into DPVS as they come, for nodes that both have the addresses; promote keeps"
    " them in memory until `dpvs-probe promote`, for addresses that move with VRRP.",
)  # fmt: skip
@click.option("--node", help="Name of this node, not used by any peer; the host name if not given.")
@run_dir_option
@click.option("--layout", help="Use this struct layout instead of the one that fits; it is proven all the same.")
@click.option(
    "--ring-pages", type=click.IntRange(1, 1 << 16), default=2048, show_default=True,
    help="Size of the ring buffer for events, in pages of 4 KiB; a power of two.",
)  # fmt: skip
@click.option(
    "--probe-budget", type=click.FloatRange(0, 100), default=5.0, show_default=True, metavar="PERCENT",
    help="Largest share of a worker's time that probes may take. Where they would take more they are taken away, and"
    " the scan goes on alone until there is less to do. 0: no probes.",
)  # fmt: skip
@click.option(
    "--scan-only", is_flag=True,
    help="No probes, as with --probe-budget 0: sessions are found by reading DPVS's memory again and again. Needs no"
    " bcc.",
)  # fmt: skip
@click.option(
    "--require-peer", type=click.FloatRange(min=0), metavar="SECONDS",
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
    "--store-flush", type=click.FloatRange(0, 3600), default=0.0, show_default=True, metavar="SECONDS",
    help="Write the store through to its device that often; 0 leaves that to the kernel, which loses nothing unless"
    " the machine itself stops.",
)  # fmt: skip
@packet_options
@click.option("-v", "--verbose", is_flag=True, help="Say more, with the name of the part that says it.")
@click.option(
    "--dry-run", is_flag=True,
    help="Look at all that attach looks at, say what it would do and what would become of the sessions there are, and"
    " touch nothing. Exit status 0 if it would attach, else 1.",
)  # fmt: skip
def attach(**given: Any) -> int:
    """Attach to a running DPVS and replicate its sessions, until SIGINT, SIGTERM or `dpvs-probe detach`.

    Runs in the foreground. Exit status 3 means that the DPVS process ended.
    """
    from replicator.attach import Options, run
    from replicator.discovery.source import parse as parse_source
    from replicator.engine import LinkSettings

    pages, peers, listen = given["ring_pages"], given["peers"], given["listen"]
    if pages & (pages - 1):
        raise click.BadParameter(f"{pages} is not a power of two", param_hint="--ring-pages")
    if given["require_peer"] is not None and not peers:
        raise click.UsageError("--require-peer needs a --peer")
    if given["keys_dir"] and given["insecure"]:
        raise click.UsageError("--keys and --insecure do not go together")
    if given["heartbeat_timeout"] < 2 * given["heartbeat"]:
        raise click.UsageError("--heartbeat-timeout must be twice --heartbeat or more")
    if given["no_inject"] and Policy(given["policy"]) is Policy.PROMOTE:
        raise click.UsageError("--no-inject and --policy promote do not go together")
    mode = Mode(given["mode"])
    if given["peers_from"] and mode is Mode.SHM:
        raise click.UsageError("--peers-from and --mode shm do not go together")
    if given["advertise"] and not (given["peers_from"] and listen):
        raise click.UsageError("--advertise needs --peers-from and --listen")
    options = Options(
        pid=given["pid"],
        mode=mode,
        rdma_device=given["rdma_device"],
        peers=tuple(dict.fromkeys(parse(mode, peer) for peer in peers)),
        peers_from=tuple(dict.fromkeys(parse_source(text) for text in given["peers_from"])),
        advertise=parse_address(given["advertise"]) if given["advertise"] else None,
        listen=parse(mode, listen, listen=True) if listen else None,
        replicas=given["replicas"],
        link=LinkSettings(
            batch_changes=given["sync_batch_size"],
            batch_ns=given["sync_interval"] * 1_000_000,
            compress={"auto": None, "lz4": True, "none": False}[given["compress"]],
            heartbeat_ns=int(given["heartbeat"] * 1e9),
            down_ns=int(given["heartbeat_timeout"] * 1e9),
        ),
        inject=not given["no_inject"],
        policy=Policy(given["policy"]),
        node=given["node"],
        run_dir=RunDir(given["run_dir"]),
        layout=given["layout"],
        ring_pages=pages,
        probe_budget=0.0 if given["scan_only"] else given["probe_budget"] / 100,
        require_peer_s=given["require_peer"],
        keys=given["keys_dir"],
        insecure=given["insecure"],
        xdp=tuple(dict.fromkeys(given["xdp"])),
        xdp_mode=given["xdp_mode"],
        xdp_flows=given["xdp_flows"],
        store=Path(given["store"]) if given["store"] else None,
        store_flush_ns=int(given["store_flush"] * 1e9),
        version=version(),
    )
    if given["dry_run"]:
        from replicator.rehearsal import rehearse

        good = True
        for check in rehearse(options):
            show(render.checks([check._asdict()]))
            good = good and check.ok is not False
        show(["", "would attach; nothing was touched" if good else "would not attach; nothing was touched"])
        return 0 if good else 1
    log_to_stderr(given["verbose"])
    return run(options)
