# SPDX-License-Identifier: GPL-2.0-or-later
"""``dpvs-probe diff``: whether two nodes agree on a node's sessions."""

import json
import time
from typing import Any

import click
import numpy as np

from collector.record import identity, pick
from replicator.console import json_option, run_dir_option, show
from replicator.rundir import RunDir

PAUSE_S = 0.5


@click.command()
@run_dir_option
@json_option
@click.option(
    "--settle", type=click.FloatRange(0, 3600), default=3.0, show_default=True, metavar="SECONDS",
    help="Sessions that differ are looked at again for so long: what is on its way is no difference.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(min=0), default=20, show_default=True, help="List not more than so many.")
@click.option("--export", is_flag=True, help="Write the sessions of ONE to standard output, to be compared elsewhere.")
@click.argument("one", metavar="ONE")
@click.argument("other", metavar="OTHER", required=False)
def diff(one: str, other: str | None, run_dir: str | None, as_json: bool, **how: Any) -> int:
    """Compare two tables of sessions: by digest, and where that differs session by session.

    ONE and OTHER are each PID or PID@NODE (an attach here: its own sessions, or its copies of NODE's; @NODE for the
    only attach), /PATH.sock[@NODE], ssh:HOST[@NODE], or a FILE: a store, a snapshot, what --export wrote. On node lb1,
    `dpvs-probe diff @own ssh:lb2@lb1` compares lb1's sessions with lb2's copies of them. Exit status 0 if they are
    equal, 1 if not.
    """
    from replicator.compare import compare, fields
    from replicator.query import describe
    from replicator.sources import Source

    where = RunDir(run_dir)
    left = Source(one, where)
    if how["export"]:
        if other is not None:
            raise click.UsageError("--export takes one source")
        show(map(json.dumps, left.raw()))
        return 0
    if other is None:
        raise click.UsageError("two sources are to be compared")
    right = Source(other, where)
    short = left.digest(), right.digest()
    if short[0] is not None and short[0] == short[1]:
        return _equal(short[0][0], short[0][1], as_json)
    deadline = time.monotonic() + (how["settle"] if left.live or right.live else 0)
    suspects: set[bytes] | None = None
    while True:
        a, b = left.sessions(), right.sessions()
        found = compare(a.records, b.records)
        if found.total == 0:
            return _equal(len(a.records), f"{a.digest:016x}", as_json)
        which = [pick(a.records, found.missing), pick(b.records, found.extra), pick(a.records, found.changed[:, 0])]
        keys = {bytes(key) for part in which for key in identity(part).tolist()}
        suspects = keys if suspects is None else suspects & keys
        if not suspects or time.monotonic() >= deadline:
            break
        time.sleep(PAUSE_S)
    lines: list[dict[str, Any]] = []
    for name, part in zip((f"not in {other}", f"not in {one}"), which, strict=False):
        still = np.array([bytes(key) in suspects for key in identity(part).tolist()], np.bool_)
        lines += [{"what": name, **row} for row in describe(pick(part, still), a.origin)]
    for at, there in found.changed:
        if bytes(identity(a.records[at : at + 1]).tolist()[0]) in suspects:
            (row,) = describe(a.records[at : at + 1], a.origin)
            lines.append({"what": "differs", **row, "fields": fields(a.records[at], b.records[there])})
    if not lines:
        return _equal(len(a.records), f"{a.digest:016x}", as_json, moving=found.total)
    summary = {"equal": False, "sessions": [len(a.records), len(b.records)], "differences": len(lines)}
    if as_json:
        show(map(json.dumps, [*lines[: how["limit"] or None], summary]))
        return 1
    show([f"{len(a.records)} sessions in {one}, {len(b.records)} in {other}: {len(lines)} differ"])
    for line in lines[: how["limit"]]:
        values = "".join(f", {name} {was} / {now}" for name, (was, now) in line.get("fields", {}).items())
        ends = f"{line['client']} {line['virtual']} {line['local']} {line['real']}"
        show([f"{line['what']}: {line['proto']} {ends} {line['state']}{values}"])
    if len(lines) > how["limit"]:
        show([f"and {len(lines) - how['limit']} more"])
    return 1


def _equal(sessions: int, digest: str, as_json: bool, moving: int = 0) -> int:
    said = {"equal": True, "sessions": sessions, "digest": digest, "on_their_way": moving}
    way = f", {moving} on their way" if moving else ""
    show([json.dumps(said) if as_json else f"equal: {sessions} sessions, digest {digest}{way}"])
    return 0
