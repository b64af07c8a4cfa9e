# SPDX-License-Identifier: GPL-2.0-or-later
"""Stop DPVS under live connections, start another, bring the sessions back: see scripts/drill-restart."""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.lab.node import Settings
from tests.lab.pair import Pair, hugepages_for, memory_mib
from tests.lab.process import LabError, wait_for
from tests.lab.restart import attach, restart, wait_until_stored
from tests.lab.run import Run

STALL_S = 120.0  # TCP waits twice as long each time, so a pause is up to twice what DPVS was away
TALK_S = 3.0


def own(pair: Pair) -> int:
    """Sessions of node a that had a packet of theirs."""
    return int(pair.a.attached[-1].status()["sessions"]["own"])


def drill(run: Run, kind: str, connections: int, restarts: int, how: int) -> list[str]:
    """Why it failed; empty when it did not."""
    settings = Settings(memory_mib=memory_mib(kind), established_timeout_s=300)
    problems = []
    with Pair(run, kind=kind, settings=settings) as pair:
        pair.kill("b")  # one machine is enough
        attach(pair.a)
        steady = pair.steady(connections, interval=0.1, stall=STALL_S)
        print(f"{connections} connections talk through DPVS, pid {pair.a.pid}; its sessions are stored", flush=True)
        for number in range(restarts):
            wait_until_stored(pair.a, connections)
            time.sleep(TALK_S)
            print(f"restart {number + 1}: routes withdrawn, {signal.Signals(how).name} to DPVS", flush=True)
            done = restart(pair, how=how)
            for line in done.lines():
                print(f"   {line}", flush=True)
            opened = time.monotonic()
            try:
                wait_for("packets for each", lambda: own(pair) >= connections, STALL_S, 0.05)
                print(f"   all {connections} had packets {time.monotonic() - opened:.2f} s after that", flush=True)
            except LabError:
                problems.append(f"restart {number + 1}: not all connections had packets again")
            if done.restored.get("in_dpvs") != connections:
                problems.append(f"restart {number + 1}: {done.restored}")
        time.sleep(TALK_S)
        report = steady.finish(STALL_S)
        if report["alive"] != connections or report["corrupted"]:
            problems.append(f"only {report['alive']} of {connections} connections survived: {report}")
        print(f"{report['alive']} of {connections} connections alive, longest pause {report['longest_gap_ms']:.0f} ms")
    return problems


def main() -> int:
    """Exit status 0 if every connection lives."""
    parser = argparse.ArgumentParser(prog="scripts/drill-restart", description="DPVS restarts, connections live.")
    parser.add_argument("--connections", type=int, default=100)
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--kill", action="store_true", help="SIGKILL instead of SIGTERM")
    options = parser.parse_args()
    ours = os.getpid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1) if os.getpid() == ours else os._exit(1))
    kind = "dpvs" if os.environ.get("DPVS_BIN") else "twin"
    print(f"One node ({'a real DPVS' if kind == 'dpvs' else 'the twin, a stand-in for DPVS'}), a client and a server.")
    how = signal.SIGKILL if options.kill else signal.SIGTERM
    try:
        with Run(hugepages_for(kind)) as run:
            problems = drill(run, kind, options.connections, options.restarts, how)
    except (LabError, OSError, RuntimeError) as error:
        problems = [str(error)]
    print("FAILED: " + "; ".join(problems) if problems else "DPVS was started anew, and no connection was lost.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
