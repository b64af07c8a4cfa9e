# SPDX-License-Identifier: GPL-2.0-or-later
"""``dpvs-probe doctor``: whether attach would work."""

import json

import click

from replicator import render
from replicator.console import json_option, run_dir_option, show
from replicator.rundir import RunDir


@click.command()
@click.option(
    "--pid", type=click.IntRange(min=1), help="Process id of the DPVS to look at; may be left out when just one runs."
)
@run_dir_option
@click.option("--layout", help="Try this struct layout instead of the one that fits.")
@json_option
def doctor(pid: int | None, run_dir: str | None, layout: str | None, as_json: bool) -> int:
    """Look for each thing that attach needs, and say what to do about what is missing.

    Only looks: attaches no probes, loads nothing. Exit status 0 if attach would work, else 1.
    """
    from probes.doctor import examine

    pid = pid or _only_one()
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


def _only_one() -> int:
    from probes.candidates import advice, running

    found = running()
    if len(found) != 1:
        raise click.UsageError(f"which DPVS? Give --pid\n{advice(found)}")
    return found[0].pid
