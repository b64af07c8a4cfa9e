# SPDX-License-Identifier: GPL-2.0-or-later
"""Which sessions of one node are not on another one.

    dpvs-probe diff --export @own >before          on the node that carries the traffic, again and again
    scripts/check_session_loss before dpvs:PID     on the node that took over: its DPVS is asked itself

A session that was younger than --young milliseconds when the export was made may not have been told to the peer yet,
and whoever opened it is still trying. Sessions of kinds and states that no peer puts into its DPVS are counted apart.
Exit status 0 if none is lost, or young ones only; 1 if others are; 2 if it cannot be said.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from collector.record import pick
from probes.errors import DpvsProbeError
from replicator.compare import losses
from replicator.query import describe
from replicator.rundir import RunDir
from replicator.sources import UNKNOWN_MS, Source

YOUNG_MS = 200


def check(before: str, after: str, young_ms: int, run_dir: RunDir) -> dict[str, object]:
    """What became of the sessions of ``before``."""
    was = Source(before, run_dir).sessions()
    loss = losses(was.records, was.age_ms, Source(after, run_dir).tuples(), young_ms)
    lines = []
    for what, at in (("lost", loss.lost), ("young", loss.young)):
        for place, row in zip(at, describe(pick(was.records, at), was.origin), strict=True):
            age = int(was.age_ms[place])
            lines.append({"what": what, "age_ms": age if age < UNKNOWN_MS else None, **row})
    return {
        "node": was.origin,
        "before": len(was.records),
        "kept": len(was.records) - len(loss.lost) - len(loss.young) - len(loss.not_kept),
        "lost": len(loss.lost),
        "young": len(loss.young),
        "not_kept": len(loss.not_kept),
        "sessions": lines,
    }


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="scripts/check_session_loss", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument(
        "before", metavar="BEFORE", help="what the node had: a file of `diff --export`, a store, or a source"
    )
    parser.add_argument("after", metavar="AFTER", help="dpvs:PID, or another source as `dpvs-probe diff` takes it")
    parser.add_argument("--young", type=int, default=YOUNG_MS, metavar="MS", help=f"{YOUNG_MS} if not given")
    parser.add_argument("--limit", type=int, default=20, help="list not more than so many")
    parser.add_argument("--json", action="store_true", help="one object")
    parser.add_argument("--run-dir", help="of the attaches")
    options = parser.parse_args()
    try:
        found = check(options.before, options.after, options.young, RunDir(options.run_dir))
    except DpvsProbeError as error:
        print(f"check_session_loss: {error}", file=sys.stderr)
        return 2
    lines = found["sessions"]
    assert isinstance(lines, list)
    if options.json:
        print(json.dumps(found))
    else:
        print(
            f"{found['before']} sessions of {found['node']}: {found['kept']} kept, {found['lost']} lost,"
            f" {found['young']} lost that were younger than {options.young} ms,"
            f" {found['not_kept']} of kinds or states that no peer keeps"
        )
        for line in lines[: options.limit]:
            age = "" if line["age_ms"] is None else f", {line['age_ms']} ms old"
            ends = f"{line['client']} {line['virtual']} {line['local']} {line['real']}"
            print(f"{line['what']}: {line['proto']} {ends} {line['state']}{age}")
        if len(lines) > options.limit:
            print(f"and {len(lines) - options.limit} more")
    return 1 if found["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
