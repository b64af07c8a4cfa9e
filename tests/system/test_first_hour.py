# SPDX-License-Identifier: GPL-2.0-or-later
"""The first minutes of somebody who has never seen it: what ``scripts/demo --stay`` says to type, typed."""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.available import ROOT
from tests.lab.process import Process, wait_for

pytestmark = pytest.mark.needs("bpf", "twin", "agent")
CONNECTIONS = 10
MARK = "      "  # before each command


def shell(lines: list[str]) -> str:
    """Typed line by line; what was said, all of it without a failure."""
    done = subprocess.run(["bash", "-euc", "\n".join(lines)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_the_demonstration_says_to_type(tmp_path: Path) -> None:
    command: list[str | Path] = [sys.executable, "-P", ROOT / "scripts/demo.py", "--stay"]
    demo = Process("demo", [*command, "--connections", str(CONNECTIONS)], tmp_path / "demo.log")
    try:
        wait_for("its words", lambda: "Ctrl-C here" in demo.output() or not demo.alive, 90)
        said = demo.output()
        assert f"node b has {CONNECTIONS} of its sessions" in said
        lines = [line.strip() for line in said.splitlines() if line.startswith(MARK)]
        (end,) = [at for at, line in enumerate(lines) if line.startswith("kill -9 ")]
        # A person looks at `top` until Ctrl-C, and asks `ready` again.
        typed = [line.replace(" top ", " top --once ").replace(" ready ", " ready --wait 240 ") for line in lines]
        answers = shell(typed[:end])
        for words in ("attached: yes", "ESTABLISHED", "real servers", "\nready", "the failover works"):
            assert words in answers
        shell(typed[end:])
        wait_for("the routes", lambda: "the routes move to node b" in demo.output(), 20)
        status = shlex.join([str(ROOT / ".venv/bin/dpvs-probe"), "status", "--json"])

        def carried_on() -> bool:
            return bool(json.loads(shell([typed[end + 1], status]))["sessions"]["own"] == CONNECTIONS)

        wait_for("all connections at node b", carried_on, 30, 0.2)
        demo.signal(signal.SIGINT)
        assert demo.wait(300) == 0, demo.output()
        assert f"{CONNECTIONS} of {CONNECTIONS} connections alive" in demo.output()
    finally:
        if demo.alive:
            demo.stop(60)
