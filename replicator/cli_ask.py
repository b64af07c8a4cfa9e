# SPDX-License-Identifier: GPL-2.0-or-later
"""``dpvs-probe status``, ``sessions``, ``peers``, ``promote``, ``demote``, ``detach``: requests to an attach."""

import json
import time
from typing import Any

import click

from probes.errors import DpvsProbeError
from replicator import render
from replicator.admin import ask
from replicator.console import json_option, pid_option, request, run_dir_option, show, wait_option
from replicator.rundir import RunDir

DETACH_S = 30.0


@click.command()
@pid_option
@run_dir_option
@json_option
def status(pid: int | None, run_dir: str | None, as_json: bool) -> None:
    """How a running attach is doing: sessions, probes, injection, counters."""
    for line in request(pid, run_dir, "status"):
        show([json.dumps(line)] if as_json else render.outline(line))


@click.command()
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


@click.command()
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


@click.command()
@pid_option
@run_dir_option
@json_option
@wait_option
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


@click.command()
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


@click.command()
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
