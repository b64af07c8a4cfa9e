# SPDX-License-Identifier: GPL-2.0-or-later
"""``dpvs-probe drill``: a failover rehearsed with synthetic sessions, on nodes that work."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from probes.errors import DpvsProbeError
from replicator.admin import Line, ask
from replicator.console import json_option, pid_option, request, run_dir_option, show

STEPS = ("begin", "count", "take", "end")
PAUSE_S = 0.05
SSH_S = 60
Ask = Callable[..., Line]


class DrillFailed(DpvsProbeError):
    """A node that takes part cannot be asked."""

    help_text = "The peer is /PATH.sock of an attach, or ssh:HOST where dpvs-probe can be run as root."


@click.command()
@pid_option
@run_dir_option
@json_option
@click.option("--sessions", "count", type=click.IntRange(1, 10_000), default=100, show_default=True, help="How many.")
@click.option("--peer", metavar="ssh:HOST|/PATH.sock", help="The node that is to take over; without it nobody does.")
@click.option(
    "--within", type=click.FloatRange(0.1, 60), default=10.0, show_default=True, metavar="SECONDS",
    help="Longest wait for each step.",
)  # fmt: skip
@click.option("--step", type=click.Choice(STEPS), help="Only this step, on this node; what a drill asks of its peer.")
def drill(pid: int | None, run_dir: str | None, as_json: bool, **how: Any) -> int:
    """Rehearse a failover with synthetic sessions on nodes that work, and say how it went.

    This node makes sessions of clients in 198.18.0.0/15, port 9, in its DPVS, after the pattern of real ones; peers get
    them as any; the peer named by --peer takes them over as if this node had died; then all are taken out again. No
    packet is sent, and real sessions are not touched. Exit status 0 if every one was there at each step and none is
    left.
    """

    def here(step: str, **fields: Any) -> Line:
        (line,) = request(pid, run_dir, "drill", step=step, **fields)
        return line

    if how["step"]:
        show([json.dumps(here(how["step"], **({"sessions": how["count"]} if how["step"] == "begin" else {})))])
        return 0
    report = _play(here, _peer(how["peer"]) if how["peer"] else None, how["count"], how["within"])
    show([json.dumps(report)] if as_json else _text(report))
    return 0 if report["good"] else 1


def _peer(text: str) -> Ask:
    def by_socket(step: str) -> Line:
        (line,) = ask(Path(text), "drill", step=step)
        return line

    def by_ssh(step: str) -> Line:
        words = ["ssh", "-o", "BatchMode=yes", "--", text[4:], "dpvs-probe", "drill", "--step", step]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=SSH_S, check=True)
            line = json.loads(done.stdout)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise DrillFailed(f"{text} cannot be asked: {error}") from error
        if not isinstance(line, dict):
            raise DrillFailed(f"{text} gave no answer")
        return line

    if re.fullmatch(r"ssh:[^-].*", text):
        return by_ssh
    if text.startswith("/"):
        return by_socket
    raise DrillFailed(f"'{text}' names no peer")


def _play(here: Ask, there: Ask | None, count: int, within_s: float) -> dict[str, Any]:
    """The drill, and always its end. What each step reached, and after how many milliseconds."""
    report: dict[str, Any] = {"sessions": count}

    def until(name: str, look: Callable[[], tuple[int, bool]]) -> bool:
        began = time.monotonic()
        while True:
            reached, good = look()
            took_s = time.monotonic() - began
            if good or took_s > within_s:
                report[name] = {"reached": reached, "good": good, "after_ms": round(1000 * took_s)}
                return good
            time.sleep(PAUSE_S)

    def own(node: Ask, wanted: int) -> Callable[[], tuple[int, bool]]:
        return lambda: ((said := node("count"))["own"], said["own"] == wanted)

    def told() -> tuple[int, bool]:
        said = here("count")
        return said["own"], bool(said["told"])

    def put_in() -> tuple[int, bool]:
        assert there is not None
        said = there("count")
        return min(said["copies"], said["in_dpvs"]), said["copies"] == said["in_dpvs"] == made["created"]

    def over(node: Ask) -> Callable[[], tuple[int, bool]]:
        def look() -> tuple[int, bool]:
            node("end")
            said = node("count")
            left = said["own"] + said["copies"] + said["in_dpvs"]
            return left, left == 0

        return look

    try:
        made = here("begin", sessions=count)
        report["made"] = {"reached": made["created"], "good": made["created"] == count, "refused": made["refused"]}
        good = until("in_our_table", own(here, made["created"])) and until("told_to_peers", told)
        if there is not None and good and until("in_the_peers_dpvs", put_in):
            there("take")
            until("taken_over", own(there, made["created"]))
    finally:
        nodes = [("left_at_the_peer", there)] if there is not None else []
        for _ in range(2):  # what the one gives up may have gone to the other meanwhile
            for name, node in [*nodes, ("left_here", here)]:
                assert node is not None
                until(name, over(node))
    steps = [value for value in report.values() if isinstance(value, dict)]
    report["good"] = all(step["good"] for step in steps) and (there is None or "taken_over" in report)
    return report


def _text(report: dict[str, Any]) -> list[str]:
    names = {
        "made": "made in this node's DPVS",
        "in_our_table": "found there by the scan",
        "told_to_peers": "acknowledged by the peers",
        "in_the_peers_dpvs": "waiting in the peer's DPVS",
        "taken_over": "taken over by the peer",
        "left_at_the_peer": "left at the peer at the end",
        "left_here": "left here at the end",
    }
    lines = []
    for name, title in names.items():
        if name in report:
            step = report[name]
            after = f" after {step['after_ms']} ms" if "after_ms" in step else ""
            why = ", ".join(f"{n} {reason}" for reason, n in step.get("refused", {}).items())
            mark = "ok" if step["good"] else "FAILED"
            lines.append(f"{mark:<7} {title:<28} {step['reached']}{after}{f', refused: {why}' if why else ''}")
    verdict = "the failover works" if report["good"] else "the failover does not work as it should"
    return [*lines, "", f"{report['sessions']} synthetic sessions: {verdict}"]
