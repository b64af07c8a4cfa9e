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
    "--layout", "layout_name", help="The struct layout of the DPVS that is to start; needed if there are several."
)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), default=f"{NAME_PART}start.so")
def prepare(file: Path, layout_name: str | None) -> int:
    """Write an agent that DPVS loads as it starts, so that attach needs no ptrace.

    Start DPVS with it among DPDK's options (`dpvs -- -d FILE`), or with LD_PRELOAD=FILE. It does nothing until an
    attach wakes it. An attach that is newer, or finds another layout, loads its own in its place. DPDK takes no
    library out of a directory that everybody may write to, such as /tmp.
    """
    from probes.agent.loading import AgentNotLoaded, prepare
    from probes.layout import Layout

    shipped = Layout.shipped()
    if layout_name is None and len(shipped) != 1:
        raise AgentNotLoaded(
            "there is more than one layout", help_text=f"Give --layout, one of {', '.join(shipped)}, or a file."
        )
    prepare(Layout.load(layout_name or shipped[0]), file)
    path = file.resolve()
    click.echo(f"{path} is for layout {layout_name or shipped[0]}: dpvs ... -- -d {path}, or LD_PRELOAD={path}")
    return 0
