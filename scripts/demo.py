# SPDX-License-Identifier: GPL-2.0-or-later
"""Two DPVS nodes, a client, a real server, live connections, and kill -9 of the node that carries them: twice.

First without replication, so that one sees what is lost; then with it. Or, with --stay, a pair that is left running for
whoever wants to try the commands on it. See scripts/demo.
"""

import argparse
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.lab.node import Settings
from tests.lab.pair import Pair, SteadyRun, hugepages_for, memory_mib
from tests.lab.process import LabError, wait_for
from tests.lab.run import Run

LINE_INTERVAL_S = 0.1
STALL_S = 8.0
REPLICATED_WITHIN_S = 10.0
STAY_S = 24 * 3600.0  # the longest look around
PROGRAMS = Path(__file__).resolve().parents[1] / ".venv/bin"
ECHO = 7  # the port of the connections


class Paint:
    """Colours, where somebody looks."""

    def __init__(self) -> None:
        self.on = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def _wrap(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.on else text

    def good(self, text: str) -> str:
        return self._wrap("32", text)

    def bad(self, text: str) -> str:
        return self._wrap("31", text)

    def strong(self, text: str) -> str:
        return self._wrap("1", text)


paint = Paint()


def say(text: str = "") -> None:
    print(text, flush=True)


def step(text: str) -> None:
    say(f"   {text}")


@dataclass
class Outcome:
    """What became of the connections of one run, and what dpvs-probe said of it."""

    connections: int
    report: dict[str, Any]
    replicated: int | None = None
    event_to_peer_ms: tuple[float, float] | None = None
    problems: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        return self.report[name]


def failover(pair: Pair, connections: int, seconds: float, replicate: bool) -> Outcome:
    """Open the connections, let them talk, kill node a, move the routes, let them talk, look at them."""
    if replicate:
        pair.replicate()
        step("dpvs-probe attached to both: a sends its sessions to b, b puts them into its own DPVS")
        pair.request()
        time.sleep(1)
        step("one request through node a: the struct layout is proven on its session, before anything is sent")
    steady = pair.steady(connections, port=ECHO, interval=LINE_INTERVAL_S, stall=STALL_S)
    step(f"{connections} connections open through node a, a line each way every {LINE_INTERVAL_S * 1000:.0f} ms")
    time.sleep(seconds / 2)
    replicated: int | None = None
    latency: tuple[float, float] | None = None
    if replicate:
        replicated = wait_for_copies(pair, connections)
        step(f"{replicated} of {connections} sessions are in node b as standby copies")
        latency = event_to_peer(pair)
    step(paint.strong(f"kill -9 node a (pid {pair.a.pid}), and the routes move to node b"))
    pair.kill("a")
    pair.active("b")
    time.sleep(seconds / 2 if replicate else 0)
    if replicate:
        outcome = Outcome(connections, steady.finish(STALL_S * 3), replicated, latency)
        if not pair.b.alive:
            outcome.problems.append("node b did not survive")
    else:
        outcome = Outcome(connections, steady.report(STALL_S * 3 + 20))
    alive = outcome["alive"]
    text = f"{alive} of {connections} connections alive"
    step(paint.good(text) if alive == connections else paint.bad(text))
    return outcome


def wait_for_copies(pair: Pair, connections: int) -> int:
    """How many of the connections node b itself lists, as soon as they are all there or time is up.

    The request before them, to another port, may be there too: a session outlives its connection for some seconds.
    """
    service = f"{pair.plan.vip}:{ECHO}"

    def copies() -> int:
        return sum(virtual == service for _, _, virtual, _, _ in pair.b.tuples())

    try:
        wait_for("copies", lambda: copies() >= connections, REPLICATED_WITHIN_S, 0.1)
    except LabError:
        pass
    return copies()


def event_to_peer(pair: Pair) -> tuple[float, float] | None:
    """p50 and p99 in milliseconds, from an event in DPVS to the peer's acknowledgement, as `dpvs-probe peers` says."""
    for row in pair.a.attached[0].peers():
        p50, p99 = row.get("event_to_peer_p50_ms"), row.get("event_to_peer_p99_ms")
        if p50 is not None and p99 is not None:
            return float(p50), float(p99)
    return None


def table(control: Outcome, replicated: Outcome) -> None:
    """Both runs side by side."""

    def row(name: str, left: Any, right: Any) -> None:
        say(f"   {name:<34}{left!s:>12}{right!s:>20}")

    def pause(outcome: Outcome) -> str:
        return f"{outcome['longest_gap_ms']:.0f} ms" if outcome["alive"] else "-"

    say()
    row("", "without", "with")
    for name, key in (
        ("connections", "connections"),
        ("alive at the end", "alive"),
        ("reset", "reset"),
        ("stalled", "stalled"),
        ("corrupted", "corrupted"),
        ("lines exchanged", "lines"),
    ):
        row(name, control[key], replicated[key])
    row("longest pause of a living one", pause(control), pause(replicated))
    row("sessions replicated", "-", replicated.replicated)
    latency = replicated.event_to_peer_ms
    row("event in DPVS to peer, p50 / p99", "-", f"{latency[0]:.1f} / {latency[1]:.1f} ms" if latency else "unknown")


def verdict(control: Outcome, replicated: Outcome) -> list[str]:
    """Why the demo failed; empty when it did not."""
    reasons = list(replicated.problems)
    total = control.connections
    for name, outcome in (("without replication", control), ("with replication", replicated)):
        if outcome["unopened"]:
            reasons.append(f"{name}, {outcome['unopened']} of {total} connections did not even open")
        if outcome["corrupted"]:
            reasons.append(f"{name}, {outcome['corrupted']} connections got wrong bytes")
    if control["alive"]:
        reasons.append(f"without replication {control['alive']} connections survived: the kill did not hit them")
    if replicated["alive"] != total:
        lost = ", ".join(f"{replicated[key]} {key}" for key in ("reset", "stalled", "corrupted") if replicated[key])
        reasons.append(
            f"with replication only {replicated['alive']} of {total} connections survived{f' ({lost})' if lost else ''}"
        )
    return reasons


def show(run: Run, kind: str, connections: int, seconds: float) -> list[str]:
    settings = Settings(memory_mib=memory_mib(kind))
    say(paint.strong("1. Control run: replication off"))
    with Pair(run, kind=kind, settings=settings) as pair:
        control = failover(pair, connections, seconds, replicate=False)
    say(paint.strong("2. Replication on"))
    with Pair(run, kind=kind, settings=settings) as pair:
        replicated = failover(pair, connections, seconds, replicate=True)
    table(control, replicated)
    return verdict(control, replicated)


def stay(run: Run, kind: str, connections: int) -> list[str]:
    """A pair that works, to try commands on, until Ctrl-C. Why connections did not live; empty when they did."""
    settings = Settings(memory_mib=memory_mib(kind), established_timeout_s=300)
    with Pair(run, kind=kind, settings=settings) as pair:
        pair.replicate(both=True)
        pair.request()
        steady = pair.steady(connections, port=ECHO, seconds=STAY_S, interval=LINE_INTERVAL_S, stall=STALL_S)
        copies = wait_for_copies(pair, connections)
        step(f"{connections} connections talk through node a; node b has {copies} of its sessions as standby copies")
        say("\n".join(["", *to_try(pair), ""]))
        until_interrupted(pair, steady)
        outcome = steady.finish(STALL_S * 3)
    alive = outcome["alive"]
    text = f"{alive} of {connections} connections alive"
    step(paint.good(text) if alive == connections else paint.bad(text))
    return [] if alive == connections else [f"only {text}"]


def to_try(pair: Pair) -> list[str]:
    """What to type in another terminal."""
    peer = f"{pair.b.run_directory}/{pair.b.pid}.sock"
    tries = (
        (f"export PATH=$PATH:{PROGRAMS}", ""),
        (f"export DPVS_PROBE_RUNDIR={pair.a.run_directory}", "node a is asked from now on"),
        ("dpvs-probe status", "how it is doing"),
        ("dpvs-probe peers", "its links: to node b, and from it"),
        ("dpvs-probe sessions --limit 5", "what it knows"),
        ("dpvs-probe top", "all of it, live, until Ctrl-C"),
        ("dpvs-probe ready", "whether it may get traffic"),
        (f"dpvs-probe drill --peer {peer}", "a failover rehearsed, without a packet"),
        (f"kill -9 {pair.a.pid}", "lose node a: the routes move to node b"),
        (f"export DPVS_PROBE_RUNDIR={pair.b.run_directory}", "node b is asked from now on"),
    )
    width = max(len(words) for words, _ in tries if len(words) < 40)
    lines = [f"      {words:<{width}}  # {what}" if what else f"      {words}" for words, what in tries]
    return ["   Try, in another terminal, as root:", "", *lines, "", "   Ctrl-C here ends all of it."]


def until_interrupted(pair: Pair, steady: SteadyRun) -> None:
    """Until Ctrl-C, or the end of all connections; the routes move when node a ends, as a router's would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it would be ignored
    moved = False
    try:
        while steady.process.alive:
            if not moved and not pair.a.alive:
                moved = True
                pair.active("b")
                step(paint.strong("node a has ended, and the routes move to node b"))
            time.sleep(0.02)
    except KeyboardInterrupt:
        say()


def end_cleanly_on_sigterm() -> None:
    """SIGTERM gives everything back first; in a forked helper (pyroute2 ends its own that way) it just ends that."""
    ours = os.getpid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1) if os.getpid() == ours else os._exit(1))


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description="A failover that no connection notices.")
    parser.add_argument("--connections", type=int, default=100)
    parser.add_argument(
        "--seconds", type=float, default=8, help="how long the connections talk, half of it before the kill"
    )
    parser.add_argument(
        "--stay", action="store_true", help="leave a pair with replication running, to try commands on, until Ctrl-C"
    )
    options = parser.parse_args()
    end_cleanly_on_sigterm()
    kind = "dpvs" if os.environ.get("DPVS_BIN") else "twin"
    what = "a real DPVS" if kind == "dpvs" else "the twin, a small stand-in for DPVS"
    say(f"Two nodes ({what}), a client and a real server, each in a network namespace of its own.")
    try:
        with Run(hugepages_for(kind)) as run:
            if options.stay:
                reasons = stay(run, kind, options.connections)
            else:
                reasons = show(run, kind, options.connections, options.seconds)
    except KeyboardInterrupt:
        say("interrupted; everything was given back")
        return 130
    except (LabError, OSError, RuntimeError) as error:
        reasons = [str(error)]
    say()
    if reasons:
        say(paint.bad("FAILED: " + "; ".join(reasons)))
        return 1
    total = options.connections
    if options.stay:
        return 0
    say(paint.good(f"Without replication 0 of {total} connections survived, with it {total} of {total}."))
    return 0


if __name__ == "__main__":
    sys.exit(main())
