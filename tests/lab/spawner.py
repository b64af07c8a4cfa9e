# SPDX-License-Identifier: GPL-2.0-or-later
"""dpvs-probe, started often and at once: a process that has imported all of it forks for each start.

``python -m tests.lab.spawner`` reads a line of JSON for each, ``{"log": FILE, "arguments": [...]}``, and answers with
the process id. ``"load": [pid, socket, layout]`` instead of arguments does nothing but load the agent. What was started
dies with this process.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import probes.loader
import probes.proof  # noqa: F401
import replicator.attach
import replicator.cli_attach
import replicator.service  # noqa: F401
from probes.agent import loading
from probes.control import ControlSocket
from probes.layout import Layout
from probes.target import Target
from replicator.cli import main as command
from tests.lab.process import die_with_parent, start_time


def run(request: dict[str, Any]) -> None:
    """What was asked for, in the child. Ends the process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((null, 0), (log, 1), (log, 2)):
        os.dup2(old, new)
    if "load" in request:
        pid, socket, name = request["load"]
        with Target.open(pid) as target:
            layout = Layout.load(name)
            loading.load(target, layout, ControlSocket(socket, layout))
        os._exit(0)
    command(request["arguments"])


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: the dead are gone at once
    print("ready", flush=True)
    parent = os.getpid()
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            die_with_parent(parent)
            run(request)
        print(pid, flush=True)


class Spawned:
    """One process that was started so; not our child."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log
        self.started = start_time(pid)

    @property
    def alive(self) -> bool:
        return self.started is not None and start_time(self.pid) == self.started

    def kill(self) -> None:
        """kill -9, where it still lives."""
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
