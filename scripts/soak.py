# SPDX-License-Identifier: GPL-2.0-or-later
"""A week of operation, compressed: see scripts/soak."""

import argparse
import dataclasses
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.lab.pair import Pair, hugepages_for, memory_mib
from tests.lab.process import LabError
from tests.lab.run import Run
from tests.lab.soak import ALLOWED_KIB, SETTINGS, Soak


def main() -> int:
    """Exit status 0 if all was flat."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description="Sessions come and go; is memory flat?")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--rate", type=int, default=200, help="connections a second; 200 if not given")
    parser.add_argument("--standing", type=int, default=300, help="connections open at a time; 300 if not given")
    parser.add_argument("--trouble", type=float, default=20.0, metavar="SECONDS", help="between cuts of the sync link")
    parser.add_argument("--allow", type=float, default=ALLOWED_KIB, metavar="KIB", help="growth that is no failure")
    parser.add_argument("--seed", type=int, default=1, help="which connections end how")
    options = parser.parse_args()
    ours = os.getpid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1) if os.getpid() == ours else os._exit(1))
    kind = "dpvs" if os.environ.get("DPVS_BIN") else "twin"
    what = "a real DPVS" if kind == "dpvs" else "the twin, a stand-in for DPVS"
    print(f"Two nodes ({what}), {options.rate} connections a second for {options.minutes:g} minutes.", flush=True)
    settings = dataclasses.replace(SETTINGS, memory_mib=memory_mib(kind))
    try:
        with Run(hugepages_for(kind)) as run, Pair(run, kind=kind, settings=settings) as pair:
            soak = Soak(pair, pair.directory, seed=options.seed)
            soak.attach()
            report = soak.run(
                options.minutes * 60, rate=options.rate, standing=options.standing, trouble_s=options.trouble,
                say=lambda line: print(f"   {line}", flush=True),
            )  # fmt: skip
            print("\n".join(report.lines()))
            problems = report.problems(options.allow)
    except (LabError, OSError, RuntimeError) as error:
        problems = [str(error)]
    print("FAILED: " + "; ".join(problems) if problems else "All was flat.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
