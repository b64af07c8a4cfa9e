# SPDX-License-Identifier: GPL-2.0-or-later
"""``dpvs-probe config``: the configuration file before it counts, and what is in force."""

import json

import click

from replicator import render, settings
from replicator.admin import ask
from replicator.cli_attach import attach, conflicts
from replicator.console import json_option, pid_option, run_dir_option, show
from replicator.rundir import NotAttached, RunDir
from replicator.settings import DEFAULT_FILE, BadConfiguration, Configuration

COLUMNS = ("setting", "value", "from")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def config() -> None:
    """The configuration file of attach."""


@config.command()
@click.argument("file", default=DEFAULT_FILE, type=click.Path(dir_okay=False))
@json_option
def check(file: str, as_json: bool) -> int:
    """Look for mistakes in FILE, /etc/dpvs-probe.conf by default; each is said with its line.

    Exit status 0 if there are none, else 1.
    """
    mistakes: tuple[settings.Mistake, ...] = ()
    try:
        Configuration(settings.settings_of(attach), file, required=True, conflicts=conflicts)
    except BadConfiguration as error:
        mistakes = error.mistakes
    if as_json:
        show([json.dumps({"file": file, "ok": not mistakes, "mistakes": [m._asdict() for m in mistakes]})])
    else:
        show(f"{settings.place(file, mistake.line)}: {mistake.text}" for mistake in mistakes)
        show([] if mistakes else [f"{file}: no mistakes"])
    return 1 if mistakes else 0


@config.command(name="show")
@click.argument("file", required=False, type=click.Path(dir_okay=False))
@pid_option
@run_dir_option
@json_option
def show_settings(file: str | None, pid: int | None, run_dir: str | None, as_json: bool) -> None:
    """Each setting, its value, and where that comes from: the command line, a line of a file, or the default.

    What a running attach goes by; without one, or with FILE, what an attach would go by that is started with no more
    options than that file.
    """
    where = RunDir(run_dir)
    rows = None
    if file is None:
        try:
            rows = list(ask(where.socket_path(where.choose(pid)), "config"))
        except NotAttached:
            if pid is not None:
                raise
    if rows is None:
        found = Configuration(
            settings.settings_of(attach), file or DEFAULT_FILE, required=file is not None, conflicts=conflicts
        )
        rows = found.rows()
    if as_json:
        show(map(json.dumps, rows))
        return
    show(render.table(rows, COLUMNS))
    for row in rows:
        if row.get("after_restart") is not None:
            show([f"{row['setting']} will be {row['after_restart'] or 'not given'} after a restart"])


@config.command()
def example() -> None:
    """Print a configuration file that has every setting, with what it does, at its default."""
    show(settings.example(settings.settings_of(attach)))
