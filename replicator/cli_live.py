# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands that stay: ``dpvs-probe top``, a live view of a running attach, and ``dpvs-probe watch``, its events.

Rules: like ``cli.py``: errors are raised and ``main`` prints them. Rich, which draws, is imported where there is a
terminal to be drawn on.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import click

from replicator import render
from replicator import top as view
from replicator.admin import Line
from replicator.console import json_option, pid_option, request, run_dir_option, show
from replicator.watching import KINDS, Reader

ROWS_ONCE, ROWS_LIVE = 20, 200


@click.command()
@pid_option
@run_dir_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object each time, with all that is known; no view.")
@click.option("--once", is_flag=True, help="Show it once, as text, and end. So it is where no terminal is.")
@click.option(
    "--interval", type=click.FloatRange(0.1, 60), default=1.0, show_default=True, metavar="SECONDS",
    help="Between two looks; rates are of that time.",
)  # fmt: skip
@click.option(
    "--rows", type=click.IntRange(1, 10_000), help="Services and real servers shown; as many as fit if not given."
)
def top(pid: int | None, run_dir: str | None, *, as_json: bool, once: bool, interval: float, rows: int | None) -> None:
    """A live view of a running attach: sessions by service, real server, state and worker, rates, peers and their lag.

    Ends with Ctrl-C.
    """
    live = can_draw(sys.stdout.isatty(), os.environ.get("TERM", "")) and not once and not as_json

    def answer() -> Line:
        (line,) = request(pid, run_dir, "top", limit=rows or (ROWS_LIVE if live else ROWS_ONCE))
        return line

    looks = _looks(answer, interval)
    if live:
        _draw(looks, rows)
        return
    for now, rate in looks:
        show([json.dumps({**now, "rates": rate})] if as_json else view.plain(now, rate))
        if once or not as_json:
            return


def can_draw(terminal: bool, kind: str) -> bool:
    """Whether standard output can be drawn on. A terminal without a cursor (in an editor, say) is as good as a pipe."""
    return terminal and kind not in ("dumb", "unknown")


def _looks(answer: Any, interval: float) -> Iterator[tuple[Line, Mapping[str, float]]]:
    """Answers, and the rates since the one before each."""
    before = answer()
    while True:
        time.sleep(interval)
        now = answer()
        yield now, view.rates(before, now)
        before = now


def _draw(looks: Iterator[tuple[Line, Mapping[str, float]]], rows: int | None) -> None:
    from rich.columns import Columns
    from rich.console import Console, Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    console = Console()

    def table(section: view.Section, most: int) -> Table:
        out = Table(title=section.title, title_justify="left", box=None, pad_edge=False)
        for column in section.columns:
            out.add_column(render.heading(column), justify="left" if column == "name" else "right", no_wrap=True)
        for row in section.rows[:most]:
            out.add_row(*(render.cell(row.get(column)) for column in section.columns))
        return out

    def whole(now: Line, rate: Mapping[str, float]) -> Group:
        lines = list(view.headline(now, rate))
        fits = rows or max(3, console.height - len(lines) - len(now["peers"]) - len(now["states"]) - 9)
        services, servers, states, workers, peers = (table(section, fits) for section in view.sections(now))
        return Group(
            Text("\n".join(lines)), "", Columns([services, servers], padding=(0, 4)), "",
            Columns([states, workers], padding=(0, 4)), "", peers,
        )  # fmt: skip

    with Live(console=console, screen=True, auto_refresh=False) as live:
        for now, rate in looks:
            live.update(whole(now, rate), refresh=True)


@click.command()
@pid_option
@run_dir_option
@json_option
@click.option(
    "--event", "kinds", type=click.Choice(KINDS), multiple=True, help="Only these; may be repeated. All if not given."
)
@click.option("--proto", metavar="tcp|udp|...", help="Only this protocol, by name or number.")
@click.option("--state", metavar="STATE", help="Only sessions that are in this state then, as in ESTABLISHED.")
@click.option("--service", metavar="END", help="Only sessions of this virtual address, port, or both.")
@click.option("--client", metavar="END", help="Only of this client; END is ADDRESS[/PREFIX][:PORT], or :PORT.")
@click.option("--real", metavar="END", help="Only of this real server.")
@click.option("--local", metavar="END", help="Only of this local address.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many events.")
def watch(pid: int | None, run_dir: str | None, as_json: bool, count: int | None, **wanted: Any) -> None:
    """A line for each session that is created, changes or ends in the DPVS of a running attach, as it happens.

    Whoever reads too slowly misses events, and is told how many. Ends with the attach, or with Ctrl-C.
    """
    wanted["kinds"] = list(wanted["kinds"]) or None
    answer = request(pid, run_dir, "watch", **wanted)
    reader = Reader(next(answer))
    shown = missed = 0
    for line in answer:
        for time_ns, kind, session in reader.read(line):
            show([_as_json(time_ns, kind, session) if as_json else _as_text(time_ns, kind, session)])
            shown += 1
            if shown == count:
                return
        if reader.dropped != missed:
            lost, missed = reader.dropped - missed, reader.dropped
            show([json.dumps({"event": "missed", "events": lost})] if as_json else [])
            click.echo(f"{lost} events missed: they came faster than they were read", err=True)


def _as_json(time_ns: int, kind: str, session: Line) -> str:
    return json.dumps({"time": _clock(time_ns).isoformat(), "event": kind, **session})


def _as_text(time_ns: int, kind: str, session: Line) -> str:
    ends = f"{session['client']} -> {session['virtual']}, {session['local']} -> {session['real']}"
    worker = "" if session["worker"] is None else f" worker {session['worker']}"
    flags = f" ({','.join(session['flags'])})" if session["flags"] else ""
    clock = _clock(time_ns).strftime("%H:%M:%S.%f")
    return f"{clock} {kind:<6} {session['proto']} {ends} {session['mode']} {session['state']}{worker}{flags}"


def _clock(time_ns: int) -> datetime:
    return datetime.fromtimestamp(time_ns / 1e9, UTC)
