# SPDX-License-Identifier: GPL-2.0-or-later
"""The command ``dpvs-probe``. Only it and the modules of its commands print (``cli_*``, ``console``); it
turns errors into exit statuses.

Exit statuses: 0 done, 1 an error (one line and what to do on standard error), 2 wrong usage, 3 (attach) the DPVS
process ended while we were attached.
"""

import json
import os
import sys
import time
from typing import Any

import click

from probes.errors import DpvsProbeError
from replicator import render
from replicator.admin import ask
from replicator.cli_agent import agent
from replicator.cli_attach import attach
from replicator.cli_config import config
from replicator.cli_decode import decode
from replicator.cli_diff import diff
from replicator.cli_drill import drill
from replicator.cli_keys import keys
from replicator.cli_live import top, watch
from replicator.cli_notify import notify, ready
from replicator.cli_packets import orphans
from replicator.cli_snapshot import snapshot
from replicator.cli_sysdump import sysdump
from replicator.console import json_option, pid_option, request, run_dir_option, show, version
from replicator.rundir import RunDir

DETACH_S = 30.0


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version(), prog_name="dpvs-probe")
def cli() -> None:
    """Keeps the sessions of a DPVS load balancer alive when the machine under it dies.

    Start `dpvs-probe attach` next to each DPVS; the other commands ask a running attach. All but `decode` need root.
    """


cli.add_command(agent)
cli.add_command(attach)
cli.add_command(config)
cli.add_command(keys)
cli.add_command(decode)
cli.add_command(snapshot)
cli.add_command(sysdump)
cli.add_command(diff)
cli.add_command(drill)
cli.add_command(ready)
cli.add_command(notify)
cli.add_command(orphans)
cli.add_command(top)
cli.add_command(watch)


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
    show(map(json.dumps, lines) if as_json else render.sessions(lines))


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
