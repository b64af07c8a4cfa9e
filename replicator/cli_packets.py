# SPDX-License-Identifier: GPL-2.0-or-later
"""What concerns packets on the command line: the options of ``attach`` and the command ``dpvs-probe orphans``.

Rules: like ``cli.py``: errors are raised and ``main`` prints them.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

from replicator import render
from replicator.console import json_option, pid_option, request, run_dir_option, show

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--xdp", multiple=True, metavar="IFACE",
        help="Count the packets to DPVS's services that this interface receives, by an XDP program; may be repeated."
        " For interfaces that the kernel sees: a mirror port, a port of AF_XDP, tap or af_packet.",
    ),
    click.option(
        "--xdp-mode", type=click.Choice(["auto", "native", "generic"]), default="auto", show_default=True,
        help="native: in the driver; generic: by the kernel, for any driver; auto: native where the driver can.",
    ),
    click.option(
        "--xdp-flows", type=click.IntRange(1 << 10, 1 << 24), default=1 << 18, show_default=True, metavar="N",
        help="Flows that are kept; beyond them those that were silent longest make room. About 200 bytes each.",
    ),
)  # fmt: skip


def packet_options(command: F) -> F:
    """The options of ``attach`` for packets."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@pid_option
@run_dir_option
@json_option
@click.option("--limit", type=click.IntRange(min=1), default=1000, show_default=True, help="Not more than so many.")
def orphans(pid: int | None, run_dir: str | None, as_json: bool, limit: int) -> None:
    """Flows to a service that no session here covers, those active last first.

    As `attach --xdp` saw them: nothing in this DPVS or in its peers' tables has their client and service.
    """
    lines = list(request(pid, run_dir, "orphans", limit=limit))
    if as_json:
        show(map(json.dumps, lines))
    else:
        show(render.table(lines, render.ORPHAN_COLUMNS) if lines else ["no orphans"])
