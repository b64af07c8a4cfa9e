# SPDX-License-Identifier: GPL-2.0-or-later
"""Many sessions, a failover, and what was lost: see scripts/dpvs-test."""

import argparse
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.lab.loss import fail_over
from tests.lab.node import Settings
from tests.lab.pair import Pair, hugepages_for, memory_mib
from tests.lab.process import LabError
from tests.lab.run import Run


def sync_test(run: Run, kind: str, create: int) -> bool:
    """Whether nothing was lost."""
    with Pair(run, kind=kind, settings=Settings(memory_mib=memory_mib(kind), pool=1 << 17)) as pair:
        pair.replicate()
        done = fail_over(pair, create)
        loss = done.loss
        print(f"   {done.made} of {create} sessions made on node a within {done.made_s:.2f} s")
        print(f"   all in node b's table after {done.told_s:.2f} s, tables equal (digest {done.digest})")
        print(f"   all in node b's DPVS after {done.put_in_s:.2f} s")
        print("   node a killed with SIGKILL")
        print(
            f"   {loss['kept']} of {loss['before']} sessions kept, {loss['lost']} lost, {loss['young']} young ones lost"
        )
        return done.good


def main() -> int:
    """Exit status 0 if nothing was lost."""
    parser = argparse.ArgumentParser(
        prog="scripts/dpvs-test", description="Sessions made, a node killed, sessions looked for."
    )
    parser.add_argument("--sync-test", action="store_true", required=True, help="the one test there is")
    parser.add_argument(
        "--create", type=int, default=10_000, metavar="N", help="sessions; 10000 if not given, at most 55000"
    )
    options = parser.parse_args()
    ours = os.getpid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1) if os.getpid() == ours else os._exit(1))
    kind = "dpvs" if os.environ.get("DPVS_BIN") else "twin"
    what = "a real DPVS" if kind == "dpvs" else "the twin, a stand-in for DPVS"
    print(f"Two nodes ({what}), {options.create} sessions.")
    try:
        with Run(hugepages_for(kind)) as run:
            good = sync_test(run, kind, options.create)
    except (LabError, OSError, RuntimeError) as error:
        print(f"FAILED: {error}")
        return 1
    print("No session was lost." if good else "FAILED: sessions were lost.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
