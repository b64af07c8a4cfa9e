# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``dpvs-probe``. The only module that prints, and the only one that turns errors into exit statuses.

Exit statuses: 0 done, 1 an error (one line and what to do on standard error), 2 wrong usage, 3 (attach) the DPVS
process ended while we were attached.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from typing import Any, TypeVar

import click

from probes.errors import DpvsProbeError
from replicator import render
from replicator.admin import Line, ask
from replicator.cli_agent import agent
from replicator.cli_decode import decode
from replicator.cli_keys import keys
from replicator.promotion import Policy
from replicator.rundir import ENVIRONMENT, RunDir
from replicator.transport.choose import Mode, parse

F = TypeVar("F", bound=Callable[..., Any])
DETACH_S = 30.0

pid_option = click.option(
    "--pid", type=click.IntRange(min=1), help="Process id of the DPVS; may be left out when just one attach runs."
)
run_dir_option = click.option(
    "--run-dir",
    type=click.Path(file_okay=False),
    envvar=ENVIRONMENT,
    show_envvar=True,
    help="Where running attaches keep their admin sockets; /run/dpvs-probe by default.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Answer in JSON, one object a line.")


def version() -> str:
    """The version of the installed package."""
    try:
        return package_version("dpvs-probe")
    except PackageNotFoundError:
        return "0+unknown"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version(), prog_name="dpvs-probe")
def cli() -> None:
    """Keeps the sessions of a DPVS load balancer alive when the machine under it dies.

    Start `dpvs-probe attach` next to each DPVS; the other commands ask a running attach. All but `decode` need root.
    """


cli.add_command(agent)
cli.add_command(keys)
cli.add_command(decode)


@cli.command()
@click.option("--pid", type=click.IntRange(min=1), required=True, help="Process id of the DPVS to attach to.")
@click.option("--peer", "peers", multiple=True, metavar="HOST:PORT", help="Send our sessions there; may be repeated.")
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
    options = Options(
        pid=given["pid"],
        mode=mode,
        rdma_device=given["rdma_device"],
        peers=tuple(dict.fromkeys(parse(mode, peer) for peer in peers)),
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
        require_peer_s=given["require_peer"],
        keys=given["keys_dir"],
        insecure=given["insecure"],
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


@cli.command()
@click.option("--pid", type=click.IntRange(min=1), required=True, help="Process id of the DPVS to look at.")
@run_dir_option
@click.option("--layout", help="Try this struct layout instead of the one that fits.")
@json_option
def doctor(pid: int, run_dir: str | None, layout: str | None, as_json: bool) -> int:
    """Look for each thing that attach needs, and say what to do about what is missing.

    Only looks: attaches no probes, loads nothing. Exit status 0 if attach would work, else 1.
    """
    from probes.doctor import examine

    found = []
    for check in examine(pid, layout_name=layout, lock_holder=RunDir(run_dir).holder(pid)):
        found.append(check._asdict())
        if not as_json:
            show(render.checks(found[-1:]))
    good = all(check["ok"] is not False for check in found)
    if as_json:
        show([json.dumps({"pid": pid, "ok": good, "checks": found})])
    else:
        show(["", "attach would work" if good else "attach would not work"])
    return 0 if good else 1


@cli.command()
@pid_option
@run_dir_option
@json_option
def status(pid: int | None, run_dir: str | None, as_json: bool) -> None:
    """How a running attach is doing: sessions, probes, injection, counters."""
    for line in request(pid, run_dir, "status"):
        show([json.dumps(line)] if as_json else render.outline(line))


@cli.command()
@pid_option
@run_dir_option
@json_option
@click.option("--address", metavar="ADDRESS", help="Only sessions with this client, virtual, local or real address.")
@click.option("--port", type=click.IntRange(0, 65535), help="Only sessions with this port on any of the four.")
@click.option("--proto", metavar="tcp|udp|...", help="Only this protocol, by name or number.")
@click.option("--state", metavar="STATE", help="Only this state, as in ESTABLISHED or TIME_WAIT.")
@click.option("--origin", metavar="own|NODE", help="Only our own sessions, or the copies of that node's.")
@click.option("--limit", type=click.IntRange(min=1), help="Not more than so many.")
def sessions(pid: int | None, run_dir: str | None, as_json: bool, **wanted: Any) -> None:
    """Sessions that a running attach knows: of its own DPVS, and copies of its peers'."""
    lines = request(pid, run_dir, "sessions", **wanted)
    show(map(json.dumps, lines) if as_json else render.table(lines, render.SESSION_COLUMNS))


@cli.command()
@pid_option
@run_dir_option
@json_option
@click.option("-v", "--verbose", is_flag=True, help="All there is to say of each link: every counter, one a line.")
def peers(pid: int | None, run_dir: str | None, as_json: bool, verbose: bool) -> None:
    """Links with peers: to those that take our sessions, and from those that send us theirs."""
    lines = list(request(pid, run_dir, "peers"))
    if as_json:
        show(map(json.dumps, lines))
    elif verbose:
        show(render.outline({render.link_title(line): line for line in lines}))
    else:
        show(render.table(lines, render.PEER_COLUMNS) if lines else ["no peers"])


@cli.command()
@pid_option
@run_dir_option
@click.option("--wait", type=click.FloatRange(0, 86400), default=0.0, metavar="SECONDS", help="Wait so long for it.")
def ready(pid: int | None, run_dir: str | None, wait: float) -> int:
    """Whether this node may get traffic: its own sessions are read, and those of its peers are here.

    Exit status 0 if it is ready, else 1; what is waited for is said. Once ready, a node stays so until its DPVS ends.
    Peers that do not come are waited for 10 seconds after the start.
    """
    deadline = time.monotonic() + wait
    while True:
        (line,) = request(pid, run_dir, "status")
        if line["ready"]:
            injection = line["injection"]
            standby = isinstance(injection, dict) and injection.get("role") == "standby"
            show(["ready, standby" if standby else "ready"])
            return 0
        if time.monotonic() >= deadline:
            show([f"not ready: {line['waiting_for'] or 'DPVS has ended'}"])
            return 1
        time.sleep(0.1)


@cli.command()
@pid_option
@run_dir_option
@json_option
@click.option(
    "--wait", type=click.FloatRange(0, 50), default=10.0, show_default=True, metavar="SECONDS",
    help="Wait so long for what DPVS refuses because addresses or services are not there yet.",
)  # fmt: skip
def promote(pid: int | None, run_dir: str | None, as_json: bool, wait: float) -> int:
    """The addresses come to this node: put all that its peers have into DPVS, and say how many and how long it took.

    For keepalived's notify scripts, with `attach --policy promote`. Exit status 1 if something was refused to the end;
    it is tried again all the same.
    """
    (line,) = request(pid, run_dir, "promote", wait=wait)
    refused = sum(line["refused"].values())
    if as_json:
        show([json.dumps(line)])
    else:
        reasons = ", ".join(f"{count} {reason}" for reason, count in line["refused"].items())
        show([f"{line['installed']} sessions of peers are in DPVS, after {line['took_ms']:.0f} ms"])
        show([f"refused: {reasons}"] if refused else [])
    return 1 if refused or line["waiting"] else 0


@cli.command()
@pid_option
@run_dir_option
@json_option
def demote(pid: int | None, run_dir: str | None, as_json: bool) -> None:
    """The addresses leave this node: take out the copies that wait for packets.

    Sessions that carry traffic stay until another node announces that it carries them on. With `attach --policy inject`
    nothing changes, as copies always stand in DPVS then.
    """
    (line,) = request(pid, run_dir, "demote")
    text = f"{line['installed']} sessions of peers are in DPVS, after {line['took_ms']:.0f} ms"
    show([json.dumps(line)] if as_json else [text])


@cli.command()
@pid_option
@run_dir_option
def detach(pid: int | None, run_dir: str | None) -> None:
    """End a running attach cleanly, and wait until it has left the DPVS process."""
    where = RunDir(run_dir)
    chosen = where.choose(pid)
    for _ in ask(where.socket_path(chosen), "detach"):
        pass
    deadline = time.monotonic() + DETACH_S
    while where.holder(chosen) is not None:
        if time.monotonic() > deadline:
            raise DpvsProbeError(f"the attach to pid {chosen} is still ending", help_text="Look at what it printed.")
        time.sleep(0.02)
    show([f"detached from pid {chosen}"])


def request(pid: int | None, run_dir: str | None, command: str, **fields: Any) -> Iterator[Line]:
    """Ask the attach that is meant, give its answer line by line."""
    where = RunDir(run_dir)
    return ask(where.socket_path(where.choose(pid)), command, **fields)


def show(lines: Iterable[str]) -> None:
    """Print lines on standard output."""
    for line in lines:
        click.echo(line)


class PlainFormatter(logging.Formatter):
    """``12:34:56 what happened``; warnings and errors say that they are."""

    def __init__(self, verbose: bool) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")
        self._verbose = verbose

    def format(self, entry: logging.LogRecord) -> str:
        text = super().format(entry)
        clock, _, message = text.partition(" ")
        level = f"{entry.levelname.lower()}: " if entry.levelno >= logging.WARNING else ""
        part = f"[{entry.name}] " if self._verbose else ""
        return f"{clock} {part}{level}{message}"


def log_to_stderr(verbose: bool) -> None:
    """All that the parts have to say goes to standard error, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter(verbose))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def main(arguments: list[str] | None = None) -> None:
    """The console entry point."""
    try:
        code = cli.main(arguments, prog_name="dpvs-probe", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except DpvsProbeError as error:
        click.echo(f"dpvs-probe: {error}", err=True)
        if error.help_text:
            click.echo(f"  {error.help_text}", err=True)
        code = 1
    except BrokenPipeError:  # `dpvs-probe sessions | head`: nobody reads on, which is nobody's fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1  # as click itself does where it notices first
    except (KeyboardInterrupt, click.Abort):
        code = 130
    sys.exit(code)
