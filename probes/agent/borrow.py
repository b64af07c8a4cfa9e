# SPDX-License-Identifier: GPL-2.0-or-later
"""A library in a process that runs, by a thread of it that sleeps: the side that asks ``borrow_child`` to do it.

Rules: who asks may die at any moment, by any signal, and the thread is given back all the same. Nothing is touched
before ``load``.
"""

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from pyinjector import injector

from probes.agent.client import AgentError

CHILD = Path(__file__).with_name("borrow_child.py")
START_S = 20.0  # a busy machine
LOAD_S = 20.0


class NotBorrowed(AgentError):
    """The thread was not borrowed, or did not do what it was to do."""


class Borrower:
    """The child, waiting for its word; a context manager.

    ``path``: the library as the process sees it, ``file``: as we do.
    """

    def __init__(self, thread: int, path: str, file: Path) -> None:
        self.thread = thread
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", str(CHILD), injector.__file__, str(thread), path, str(file)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
                start_new_session=True, bufsize=0,
            )  # fmt: skip
        except OSError as error:
            raise NotBorrowed(f"the process that loads the agent does not start: {error.strerror}") from None
        try:
            said = self._line(START_S)
            if said != "ready":
                raise NotBorrowed(f"the process that loads the agent does not start (it said {said!r})")
        except BaseException:
            self.close()
            raise

    def load(self) -> None:
        """Have the thread open the library. Raises NotBorrowed with what went wrong."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(b"go\n")
        except BrokenPipeError:
            raise NotBorrowed("the process that loads the agent has ended") from None
        said = self._line(LOAD_S)
        if said is None:
            raise NotBorrowed(f"thread {self.thread} was not given back within {LOAD_S:g} s, or its borrower died")
        if said:
            raise NotBorrowed(said)

    def close(self) -> None:
        """Never kills it: it ends by itself."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        try:
            self._child.wait(1)
        except subprocess.TimeoutExpired:
            pass
        self._child.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self, limit_s: float) -> str | None:
        """The next line that the child says; None where it says none in time, or has ended."""
        assert self._child.stdout is not None
        deadline = time.monotonic() + limit_s
        text = b""
        while not text.endswith(b"\n"):
            if not select.select([self._child.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            more = os.read(self._child.stdout.fileno(), 4096)
            if not more:
                return None
            text += more
        return text.decode(errors="replace").rstrip("\n")
