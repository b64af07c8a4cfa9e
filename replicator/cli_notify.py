# SPDX-License-Identifier: GPL-2.0-or-later
"""``dpvs-probe ready`` and ``notify``: what keepalived and routing daemons ask and say (docs/keepalived.md)."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import click

from probes.errors import DpvsProbeError
from replicator.admin import AdminError, ask
from replicator.console import pid_option, request, run_dir_option, show
from replicator.rundir import NotAttached, RunDir

LOOK_S = 0.25
MASTER, BACKUP = "MASTER", "BACKUP"
# What keepalived 2.2 says as a state (keepalived.conf(5), "notify"); all but the first mean: the addresses are away.
STATES = {MASTER: "promote", BACKUP: "demote", "FAULT": "demote", "STOP": "demote", "DELETED": "demote"}
SAME_STATE = ("MASTER_RX_LOWER_PRI",)  # nothing has changed
KINDS = ("INSTANCE", "GROUP")


class BadNotification(DpvsProbeError):
    """Words that keepalived would not say."""

    help_text = f"One of {', '.join(STATES)}; or INSTANCE NAME STATE PRIORITY, as keepalived gives them to its scripts."


@click.command()
@pid_option
@run_dir_option
@click.option("--wait", type=click.FloatRange(0, 86400), default=0.0, metavar="SECONDS", help="Wait so long for it.")
@click.option("--follow", is_flag=True, help="Stay, and say each change; ends by SIGINT or SIGTERM.")
@click.option(
    "--file", type=click.Path(dir_okay=False, path_type=Path),
    help="With --follow: a file that says 0 when ready and 1 when not, for keepalived's track_file.",
)  # fmt: skip
@click.option(
    "--run", "command", metavar="COMMAND",
    help="With --follow: run this with `ready` or `not-ready` after it, at the start and at each change.",
)  # fmt: skip
def ready(pid: int | None, run_dir: str | None, wait: float, follow: bool, **told: Any) -> int:
    """Whether this node may get traffic: its own sessions are read, and those of its peers are here.

    Exit status 0 if it is ready, else 1; what is waited for is said. Once ready, a node stays so until its DPVS ends.
    Peers that do not come are waited for 10 seconds after the start. --wait waits for an attach to start, too.
    """
    if follow:
        return _follow(pid, run_dir, **told)
    if any(told.values()):
        raise click.UsageError("--file and --run need --follow")
    deadline = time.monotonic() + wait
    while True:
        late = time.monotonic() >= deadline
        try:
            (line,) = request(pid, run_dir, "status")
        except (NotAttached, AdminError):  # it may be about to start, or between two DPVS
            if late:
                raise
        else:
            if line["ready"]:
                injection = line["injection"]
                standby = isinstance(injection, dict) and injection.get("role") == "standby"
                show(["ready, standby" if standby else "ready"])
                return 0
            if late:
                show([f"not ready: {line['waiting_for'] or 'DPVS has ended'}"])
                return 1
        time.sleep(0.1)


def _follow(pid: int | None, run_dir: str | None, *, file: Path | None, command: str | None) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    was: bool | None = None
    said = ""
    try:
        while True:
            good, why = _look(pid, run_dir)
            text = "ready" if good else f"not ready: {why}"
            if text != said:
                said = text
                show([text])
            if good is not was:
                was = good
                _tell(good, file, command)
            time.sleep(LOOK_S)
    except _Stopped:
        if was is not False:
            _tell(False, file, command)  # nobody looks any more
        return 0


class _Stopped(Exception):
    pass


def _stop(*_: object) -> None:
    raise _Stopped


def _look(pid: int | None, run_dir: str | None) -> tuple[bool, str]:
    try:
        (line,) = request(pid, run_dir, "status")
    except DpvsProbeError as error:
        return False, str(error)
    return bool(line["ready"]), str(line["waiting_for"] or "DPVS has ended")


def _tell(good: bool, file: Path | None, command: str | None) -> None:
    if file is not None:
        fresh = file.with_name(f".{file.name}.new")
        fresh.write_text("0\n" if good else "1\n")
        os.replace(fresh, file)
    if command is not None:
        import subprocess

        done = subprocess.run([*command.split(), "ready" if good else "not-ready"], check=False)
        if done.returncode != 0:
            click.echo(f"dpvs-probe: {command} ended with status {done.returncode}", err=True)


@click.command(context_settings={"ignore_unknown_options": True})
@run_dir_option
@click.option(
    "--wait", type=click.FloatRange(0, 50), default=10.0, show_default=True, metavar="SECONDS",
    help="As MASTER, wait so long for what DPVS refuses because addresses or services are not there yet.",
)  # fmt: skip
@click.argument("words", nargs=-1, required=True, metavar="STATE | INSTANCE NAME STATE PRIORITY")
def notify(words: tuple[str, ...], run_dir: str | None, wait: float) -> int:
    """What keepalived says of this node: MASTER promotes it, BACKUP, FAULT and STOP demote it.

    Takes keepalived's own arguments, so `notify "dpvs-probe notify"` in keepalived.conf is all there is to write. Every
    attach on this machine is told. The state is kept, and an attach that starts later with `--policy promote` begins
    with it. Exit status 1 if sessions were refused.
    """
    state = state_of(words)
    if state is None:
        show(["nothing has changed"])
        return 0
    where = RunDir(run_dir)
    where.prepare()
    where.remember_role(promoted=state == MASTER)
    pids = where.attached()
    if not pids:
        show([f"{state}: no attach is running, the next one begins so"])
        return 0
    good = True
    for pid in pids:
        fields = {"wait": wait} if state == MASTER else {}
        try:
            (line,) = ask(where.socket_path(pid), STATES[state], **fields)
        except (AdminError, NotAttached) as error:
            show([f"{state}: pid {pid}: {error}"])
            good = False
            continue
        refused = ", ".join(f"{count} {reason}" for reason, count in line["refused"].items())
        text = f"{state}: {line['installed']} sessions of peers are in DPVS, after {line['took_ms']:.0f} ms"
        show([text + (f", refused: {refused}" if refused else "")])
        good = good and not (state == MASTER and refused)
    return 0 if good else 1


def state_of(words: tuple[str, ...]) -> str | None:
    """The state that keepalived means; None where it says that nothing has changed. Raises BadNotification."""
    if len(words) in (3, 4) and words[0].upper() in KINDS:
        words = (words[2],)
    state = words[0].upper()
    if len(words) != 1 or (state not in STATES and state not in SAME_STATE):
        raise BadNotification(f"'{' '.join(words)}' is no state of keepalived's")
    return None if state in SAME_STATE else state
