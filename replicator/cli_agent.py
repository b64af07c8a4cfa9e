# SPDX-License-Identifier: GPL-2.0-or-later
"""``dpvs-probe agent``: the agent apart from an attach."""

from pathlib import Path

import click

from probes.agent.client import NAME_PART


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def agent() -> None:
    """The library that puts peers' sessions into DPVS."""


@agent.command()
@click.option(
    "--layout",
    "layout_name",
    metavar="NAME",
    help="The struct layout of the DPVS that is to start, or ./FILE with one.",
)
@click.option(
    "--program", type=click.Path(dir_okay=False, path_type=Path),
    help="The DPVS that is to start: its debug information, or the layout that was added for its build id.",
)  # fmt: skip
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), default=f"{NAME_PART}start.so")
def prepare(file: Path, layout_name: str | None, program: Path | None) -> int:
    """Write an agent that DPVS loads as it starts, so that attach needs no ptrace.

    Start DPVS with it among DPDK's options (`dpvs -- -d FILE`), or with LD_PRELOAD=FILE. It does nothing until an
    attach wakes it. An attach that is newer, or finds another layout, loads its own in its place. DPDK takes no
    library out of a directory that everybody may write to, such as /tmp.
    """
    from probes import choosing
    from probes.agent.loading import AgentNotLoaded, prepare
    from probes.judging import faults

    if layout_name is not None and program is None:
        layout = choosing.by_name(layout_name)
    elif program is not None and layout_name is None:
        layout = choosing.of_program(program)
    else:
        raise AgentNotLoaded("for which DPVS? Give --layout or --program", help_text=choosing.releases())
    if wrong := faults(layout):
        raise AgentNotLoaded(f"layout {layout.name} does not agree with itself: {'; '.join(wrong)}")
    prepare(layout, file)
    path = file.resolve()
    click.echo(f"{path} is for layout {layout.name}: dpvs ... -- -d {path}, or LD_PRELOAD={path}")
    return 0
