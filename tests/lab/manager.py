# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m tests.lab.manager DIRECTORY``: a running systemd with the units of DIRECTORY/config/systemd/user.

Rules: it has namespaces of its own (processes, mounts, cgroups), sees an empty /run, and ends with all that it started
when this process ends. It is a manager as ``systemd --user`` is: notification, watchdog, reload and restart are its
own; what confines a service is tested elsewhere (``confined``). Lines of standard input are arguments for
``systemctl``; each answer is a line of JSON: status, output.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

SYSTEMD = "/lib/systemd/systemd"
START_S = 120.0


def inside(directory: Path) -> None:
    """In the namespaces: start it, and do what is asked."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    Path("/run/systemd/system").mkdir(parents=True)  # or it says that the machine was not booted with it
    (directory / "run").mkdir(mode=0o700)
    environment = {
        **os.environ, "XDG_RUNTIME_DIR": str(directory / "run"), "XDG_CONFIG_HOME": str(directory / "config"),
        "HOME": str(directory), "SYSTEMD_LOG_TARGET": "console", "DBUS_SESSION_BUS_ADDRESS": "",
    }  # fmt: skip
    with (directory / "systemd.log").open("ab") as log:
        manager = subprocess.Popen(
            [SYSTEMD, "--user", "--unit=basic.target"],
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
    end = time.monotonic() + START_S
    while not (directory / "run/systemd/private").exists():
        if manager.poll() is not None or time.monotonic() > end:
            sys.exit(f"systemd does not come up: {(directory / 'systemd.log').read_text()}")
        time.sleep(0.05)
    print("ready", flush=True)
    for line in sys.stdin:
        done = subprocess.run(
            ["systemctl", "--user", *line.split()], env=environment, capture_output=True, text=True, check=False,
            timeout=300, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        print(json.dumps([done.returncode, done.stdout + done.stderr]), flush=True)


class Manager:
    """A context manager; ``directory``: of this test alone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.units = directory / "config/systemd/user"
        self.units.mkdir(parents=True)

    def __enter__(self) -> "Manager":
        self._process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--cgroup", "--fork", "--mount-proc", "--kill-child", sys.executable, "-m",
             "tests.lab.manager", str(self.directory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[2],
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def ctl(self, *words: str) -> tuple[int, str]:
        """``systemctl``: its status, and what it said."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()
        status, said = json.loads(self._process.stdout.readline())
        return int(status), str(said)

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        status, said = self.ctl("show", "-p", name, "--value", unit)
        assert status == 0, said
        return said.strip()


if __name__ == "__main__":
    inside(Path(sys.argv[1]))
