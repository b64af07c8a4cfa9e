# SPDX-License-Identifier: GPL-2.0-or-later
"""What the commands share: options that several of them have, how they ask an attach, how they print.

Nothing here may be slow to import, as in ``admin``.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import click

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
wait_option = click.option(
    "--wait", type=click.FloatRange(0, 50), default=10.0, show_default=True, metavar="SECONDS",
    help="Wait so long for what DPVS refuses because addresses or services are not there yet.",
)  # fmt: skip


def version() -> str:
    """The version of the installed package."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as package_version

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
