# SPDX-License-Identifier: GPL-2.0-or-later
"""``dpvs-probe snapshot``: this node's own sessions in a file, and back (docs/store.md)."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click

from replicator import render
from replicator.console import json_option, pid_option, request, run_dir_option, show, wait_option


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def snapshot() -> None:
    """This node's own sessions in a file, so that DPVS can be started anew and go on with them."""


@snapshot.command()
@pid_option
@run_dir_option
@json_option
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def save(file: Path, pid: int | None, run_dir: str | None, as_json: bool) -> None:
    """Write the sessions of this node's DPVS to FILE, as they are now.

    What `attach --store` keeps all the time, once, in the same format. An earlier snapshot is replaced when the new one
    is whole; any other file is refused.
    """
    (line,) = request(pid, run_dir, "snapshot", what="save", file=str(file.absolute()))
    show([json.dumps(line) if as_json else f"{line['sessions']} sessions in {line['file']}, {line['bytes']} bytes"])


@snapshot.command()
@pid_option
@run_dir_option
@json_option
@wait_option
@click.option("--partly", is_flag=True, help="Take what is whole of a file that is damaged.")
@click.option("--node", metavar="NAME", help="Take the file of that node, whose traffic comes to this one from now on.")
@click.argument("file", type=click.Path(dir_okay=False, exists=True, path_type=Path))
def restore(file: Path, pid: int | None, run_dir: str | None, as_json: bool, **how: Any) -> int:
    """Put the sessions of FILE into the DPVS that runs now.

    They wait for packets as peers' sessions do, for what is left of their timeouts, and become this node's own with
    the first one. Exit status 1 if some were refused.
    """
    (line,) = request(pid, run_dir, "snapshot", what="restore", file=str(file.absolute()), **how)
    refused = ", ".join(f"{count} {reason}" for reason, count in line["refused"].items())
    if as_json:
        show([json.dumps(line)])
    else:
        show([f"{line['in_dpvs']} of {line['sessions']} sessions are in DPVS"])
        show([f"refused: {refused}"] if refused else [])
        show([f"{line['expired']} were too old"] if line["expired"] else [])
        show([f"{line['not_to_be_put_in']} of kinds or states that are not put in"] if line["not_to_be_put_in"] else [])
        show(["this node stands by: they go in with `dpvs-probe promote`"] if line["role"] == "standby" else [])
    return 1 if refused or (line["unsettled"] and line["role"] != "standby") else 0


@snapshot.command()
@json_option
@click.option("--sessions", "listed", is_flag=True, help="List the sessions.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def inspect(file: Path, as_json: bool, listed: bool) -> int:
    """What a store or snapshot holds, how old that is, and whether it is whole. Needs no running attach.

    Exit status 0 if `restore` and `attach --store` would take it, 1 if not, and why.
    """
    from replicator.query import OWN, describe
    from replicator.store.format import StoreRefused
    from replicator.store.reader import age_ns, boot_id, now, read

    contents = read(file)
    head, stamp = contents.head, contents.stamp
    states = Counter(row["state"] for row in describe(contents.own, OWN))
    why = ""
    age: float | None = None
    try:
        age = round(age_ns(stamp.at, head.boot_id, now(), boot_id()) / 1e9, 1)
        contents.require_whole()
    except StoreRefused as error:
        why = str(error)
    said = {
        "file": str(file),
        "node": head.node,
        "sessions": len(contents.own),
        "states": dict(states),
        "waiting": len(contents.waiting),
        "age_s": age,
        "of_this_boot": head.boot_id == boot_id(),
        "dpvs_had_ended": stamp.ended,
        "instance": f"{head.instance:016x}",
        "run": head.epoch,
        "slots": head.slots,
        "workers": head.workers or None,
        "blocks": head.blocks,
        "interrupted": contents.interrupted,
        "damaged": len(contents.damaged),
        "refused": why or None,
    }
    if as_json:
        show([json.dumps(said)])
        if listed:
            show(map(json.dumps, describe(contents.own, OWN)))
            show(map(json.dumps, describe(contents.waiting, "waiting")))
    else:
        show(render.outline(said))
        if listed:
            rows = [*describe(contents.own, OWN), *describe(contents.waiting, "waiting")]
            show(["", *render.table(rows, render.SESSION_COLUMNS)])
    return 1 if why else 0
