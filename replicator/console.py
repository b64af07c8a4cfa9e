# SPDX-License-Identifier: GPL-2.0-or-later
"""What the commands share: options that several of them have, how they ask an attach, how they print and log."""

import logging
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from typing import Any

import click

from replicator import systemd
from replicator.admin import Line, ask
from replicator.rundir import ENVIRONMENT, RunDir

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
    """All that the parts have to say goes to standard error, a line each; where that is the journal, with fields."""
    handler: logging.Handler
    if systemd.under_journal():
        handler = systemd.JournalHandler()
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(PlainFormatter(verbose))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
