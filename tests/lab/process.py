# SPDX-License-Identifier: GPL-2.0-or-later
"""Child processes of a laboratory: each has a log file, dies with its parent, and is ended by its own pid only."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
PR_SET_PDEATHSIG = 1
PATIENCE = 6  # a busy machine takes so many times as long as an idle one, on which waits are measured
_libc = ctypes.CDLL(None, use_errno=True)


class LabError(RuntimeError):
    """The laboratory itself could not do what it was asked to."""


def die_with_parent(parent: int) -> None:
    """For a child that was just forked by ``parent``: it gets SIGKILL when that ends, or has ended."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot: with the pid it names one process for ever."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[19])


def wait_for(what: str, condition: Callable[[], T], timeout: float, step: float = 0.02) -> T:
    """The first true value of ``condition``; LabError after PATIENCE times ``timeout`` seconds."""
    timeout *= PATIENCE
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise LabError(f"not within {timeout:g} s: {what}")
        time.sleep(step)


class Process:
    """One child, started at once, in ``namespace_entry``'s network namespace, output in ``log``."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str | Path],
        log: Path,
        *,
        enter: Callable[[], None] | None = None,
        env: Mapping[str, str] | None = None,
        stdout: Path | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self.stdout = stdout or log
        parent = os.getpid()

        def prepare() -> None:
            die_with_parent(parent)
            if enter:
                enter()

        with open(log, "ab") as errors, open(self.stdout, "ab") as output:
            self.popen = subprocess.Popen(
                [str(word) for word in argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env={**os.environ, **(env or {})},
                preexec_fn=prepare,
                start_new_session=True,
            )
        self.pid = self.popen.pid
        self.started = start_time(self.pid)

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    @property
    def status(self) -> int | None:
        return self.popen.poll()

    def output(self) -> str:
        return self.stdout.read_text(errors="replace") if self.stdout.exists() else ""

    def tail(self, lines: int = 8) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def wait(self, timeout: float) -> int:
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise LabError(f"{self.name} did not end within {timeout:g} s:\n{self.tail()}") from None

    def signal(self, number: int) -> None:
        if self.alive:
            self.popen.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.popen.wait()

    def stop(self, timeout: float = 10) -> int:
        """SIGTERM, and SIGKILL if that does not help; the exit status."""
        self.signal(signal.SIGTERM)
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.popen.wait()
