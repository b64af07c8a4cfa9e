# SPDX-License-Identifier: GPL-2.0-or-later
"""``dpvs-probe top`` and ``watch`` on a node that carries traffic: in a terminal, in a pipe, and as JSON."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import pytest

from tests.lab.churn import Churn
from tests.lab.node import COMMAND, Node
from tests.lab.pair import Pair
from tests.lab.process import wait_for

pytestmark = [pytest.mark.needs("bpf"), pytest.mark.dpvs]
OPEN, PRIME = 13, 503
TERMINAL = {"TERM": "xterm", "LINES": "50", "COLUMNS": "160"}


@contextmanager
def command(node: Node, *arguments: str, stdout: int | IO[str]) -> Iterator["subprocess.Popen[str]"]:
    """A command that goes on, in the node's namespace."""
    process = subprocess.Popen(
        [str(COMMAND), *arguments], stdout=stdout, text=True,
        env={**os.environ, "DPVS_PROBE_RUNDIR": str(node.run_directory), **TERMINAL},
        preexec_fn=node.network.enter_in_child(node.name),
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def on_a_terminal(node: Node, wanted: str) -> str:
    """What ``top`` draws until something is there; it ends with Ctrl-C and leaves the terminal as it was."""
    ours, theirs = pty.openpty()
    drawn = ""
    with command(node, "top", "--interval", "0.2", stdout=theirs) as process:
        os.close(theirs)
        end = time.monotonic() + 120
        while not re.search(wanted, drawn):
            assert time.monotonic() < end, drawn
            if select.select([ours], [], [], 0.2)[0]:
                drawn += os.read(ours, 65536).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        while True:
            try:
                more = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if not more:
                break
            drawn += more.decode(errors="replace")
        assert process.wait(60) == 130
    os.close(ours)
    return drawn


def test_top_and_watch(pair: Pair) -> None:
    node = pair.a
    probe = node.probe("--no-inject", "--peer", pair.sync_address("b"))
    echo = f"{pair.plan.vip}:7"
    outputs = [(node.directory / f"watch-{number}.out").open("w+") for number in range(3)]
    with (
        command(
            node, "watch", "--json", "--service", ":7", "--client", f"{pair.plan.client}/32", stdout=outputs[0]
        ) as one,
        command(node, "watch", "--event", "end", "--real", pair.plan.servers[0], stdout=outputs[1]) as two,
        command(node, "watch", "--json", "--event", "create", "--service", ":80", stdout=outputs[2]) as three,
    ):
        wait_for("all three listen", lambda: probe.status()["watchers"] == 3, 20)
        with Churn(pair.network.path("client"), pair.plan.vip, 7, 1) as churn:
            churn.open(OPEN)
            wait_for("sessions", lambda: len(probe.tuples()) == OPEN, 5)
            (text,) = [
                line
                for line in node.command("top", "--once", "--interval", "0.2").stdout.splitlines()
                if f"tcp {echo}" in line
            ]
            assert text.split() == ["tcp", echo, str(OPEN), str(OPEN)]
            piped = node.command("top", "--interval", "0.2").stdout
            assert f"sessions {OPEN}, copies in DPVS 0" in piped
            assert "\x1b" not in piped
            assert "real servers" in piped
            (line,) = node.command("top", "--json", "--once", "--interval", "0.2").stdout.splitlines()
            said = json.loads(line)
            assert said["states"] == {"tcp ESTABLISHED": OPEN}
            assert sum(row["sessions"] for row in said["real_servers"]) == sum(said["workers"].values()) == OPEN
            assert said["rates"]["created"] == 0
            assert said["peers"][0]["state"] == "down"
            drawn = on_a_terminal(node, re.escape(f"sessions {OPEN},"))
            assert "\x1b[?1049h" in drawn
            assert "\x1b[?1049l" in drawn  # its own screen, and back
            while churn.opened < PRIME:
                churn.open(min(50, PRIME - churn.opened))
            churn.echo()
            churn.close(PRIME)
        gone_s = pair.settings.established_timeout_s + 60  # a reset is sent once, and may be lost
        wait_for("all sessions ended", lambda: not probe.tuples(), gone_s, 0.1)
        assert probe.stop() == 0  # the attach has ended, and so do they
        assert [process.wait(60) for process in (one, two, three)] == [0, 0, 0]
        for output in outputs:
            output.seek(0)
        everything, ends, nothing = (output.read().splitlines() for output in outputs)
        for output in outputs:
            output.close()
        events = [json.loads(line) for line in everything]
        assert {(event["virtual"], event["proto"]) for event in events} == {(echo, "tcp")}
        created, ended = (
            [(event["slot"], event["generation"]) for event in events if event["event"] == kind]
            for kind in ("create", "end")
        )
        assert len(created) == len(set(created)) == PRIME
        assert set(ended) <= set(created)
        assert len(ended) > PRIME // 2  # all but those whose slot was used again at once
        assert {event["state"] for event in events if event["event"] == "update"} >= {"ESTABLISHED"}
        real = re.escape(pair.plan.servers[0])
        assert all(re.match(r"[\d:]+\.\d{6} end    tcp \S+ -> \S+:7, \S+ -> " + real, line) for line in ends)
        assert 0 < len(ends) < len(ended)
        assert nothing == []
