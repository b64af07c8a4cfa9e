# SPDX-License-Identifier: GPL-2.0-or-later
"""The directory where running attaches leave their lock and their admin socket: ``<pid>.lock`` and ``<pid>.sock``; and
``role``, what keepalived said last of this node.

Rules: pid is that of the DPVS process. One attach a process, held by flock, so it ends with the process that holds
it however that dies. The directory belongs to whoever runs us and nobody else may write to it. What dead attaches
left is swept by the next one that looks.
"""

import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from probes.errors import DpvsProbeError

DEFAULT = "/run/dpvs-probe"
ENVIRONMENT = "DPVS_PROBE_RUNDIR"
_LONGEST_PATH = 107  # sockaddr_un.sun_path, with its final zero


class BadRunDir(DpvsProbeError):
    """The run directory cannot be used."""

    help_text = f"Name another with --run-dir or {ENVIRONMENT}; it must be ours and writable by nobody else."


class AlreadyAttached(DpvsProbeError):
    """Another dpvs-probe holds this DPVS."""

    help_text = "See it with `dpvs-probe status`, end it with `dpvs-probe detach`."

    def __init__(self, pid: int, holder: int | None) -> None:
        super().__init__(f"another dpvs-probe{f' (pid {holder})' if holder else ''} is attached to pid {pid}")
        self.pid, self.holder = pid, holder


class NotAttached(DpvsProbeError):
    """No attach runs that could answer."""

    help_text = "Start one with `dpvs-probe attach --pid PID`; --run-dir must be the same for both."


class ManyAttached(DpvsProbeError):
    """More than one attach runs and none was named."""

    help_text = "Say which one with --pid."


class RunDir:
    """The run directory at ``path``; nothing is made before it is needed."""

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path or os.environ.get(ENVIRONMENT) or DEFAULT)

    def socket_path(self, pid: int) -> Path:
        """Where the attach to ``pid`` listens."""
        return self.path / f"{pid}.sock"

    def lock_path(self, pid: int) -> Path:
        """What the attach to ``pid`` holds."""
        return self.path / f"{pid}.lock"

    def prepare(self) -> None:
        """Make the directory, or make sure that the one there is safe. Raises BadRunDir."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.path.stat()
        except OSError as error:
            raise BadRunDir(f"cannot use run directory {self.path}: {error.strerror}") from error
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
            raise BadRunDir(f"run directory {self.path} belongs to uid {found.st_uid} or others may write to it")
        if len(os.fsencode(self.socket_path(4194304))) > _LONGEST_PATH:
            raise BadRunDir(f"the name of run directory {self.path} is too long for a socket in it")

    @contextmanager
    def lock(self, pid: int) -> Iterator[None]:
        """Hold the attach to ``pid``. Raises AlreadyAttached."""
        self.prepare()
        path = self.lock_path(pid)
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = _holder(fd)
                os.close(fd)
                raise AlreadyAttached(pid, holder) from error
            if _is_file(path, fd):
                break
            os.close(fd)  # its last holder unlinked it between our open and our lock
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(fd)

    def holder(self, pid: int) -> int | None:
        """The pid of the dpvs-probe that is attached to ``pid``; 0 when it does not say, None when there is none."""
        try:
            fd = os.open(self.lock_path(pid), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return _holder(fd) or 0
        finally:
            os.close(fd)
        return None

    def remember_role(self, *, promoted: bool) -> None:
        """Keep what was said last of this node, for an attach that starts later."""
        fresh = self.path / f"role.{os.getpid()}"
        fresh.write_text("promoted\n" if promoted else "standby\n")
        os.replace(fresh, self.path / "role")

    def was_promoted(self) -> bool:
        """Whether this node was said to have the addresses, since the machine started: /run does not outlive it."""
        try:
            return (self.path / "role").read_text() == "promoted\n"
        except OSError:
            return False

    def attached(self) -> list[int]:
        """The DPVS pids that a live attach answers for, ascending. What dead ones left is removed."""
        pids = []
        for path in sorted(self.path.glob("*.sock")):
            if not (path.stem.isascii() and path.stem.isdigit()):
                continue
            if answers(path):
                pids.append(int(path.stem))
            else:
                self.sweep(int(path.stem))
        return sorted(pids)

    def sweep(self, pid: int) -> None:
        """Remove the socket and the lock of an attach to ``pid`` that is dead. A live one keeps both."""
        try:
            with self.lock(pid):
                self.socket_path(pid).unlink(missing_ok=True)
        except (AlreadyAttached, BadRunDir, OSError):
            pass

    def choose(self, pid: int | None) -> int:
        """The attach that is meant: ``pid``, or the only one. Raises NotAttached, ManyAttached."""
        if pid is not None:
            if not answers(self.socket_path(pid)):
                raise NotAttached(f"no dpvs-probe is attached to pid {pid} (looked in {self.path})")
            return pid
        if self.path.is_dir() and not os.access(self.path, os.R_OK | os.X_OK):
            raise BadRunDir(f"run directory {self.path} is not open to us", help_text="Run it as root.")
        pids = self.attached()
        if not pids:
            raise NotAttached(f"no dpvs-probe attach is running (looked in {self.path})")
        if len(pids) > 1:
            raise ManyAttached(f"{len(pids)} attaches are running: pids {', '.join(map(str, pids))}")
        return pids[0]


def answers(path: Path) -> bool:
    """Whether someone listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:  # its backlog is full: busy, not dead
            return True
        except OSError:
            return False
    return True


def _holder(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else None


def _is_file(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False
