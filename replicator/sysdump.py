# SPDX-License-Identifier: GPL-2.0-or-later
"""What a maintainer needs to see of a machine where something is wrong, in one archive; nothing that is secret.

Rules: looks and asks as ``doctor`` does, and changes nothing. What cannot be had is a line that says why. Before
anything goes into the archive, private keys and what configurations name as secret are taken out of it: by what they
look like, and by the very bytes of this node's keys. Sessions (clients' addresses) are in it only if that is asked for.
"""

import io
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from probes.doctor import examine
from probes.errors import DpvsProbeError
from probes.layout import Layout
from probes.target import Target
from replicator.admin import ask
from replicator.rundir import RunDir

GONE = b"[taken out by sysdump]"
MAX_BYTES = 16 << 20  # of one member
TAIL_BYTES = 2 << 20  # of a log
JOURNAL_S = 20
_PEM = re.compile(rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_SECRET = re.compile(
    rb"(?im)^(?P<name>[ \t\"']*[\w.-]*"
    rb"(?:password|passwd|secret|token|auth_pass|credential|private)[\w.-]*[\"']?[ \t]*[:=\s])"
    rb"[ \t]*\S[^\r\n]*"
)
_URL = re.compile(rb"(?P<start>\b[a-z][a-z0-9+.-]*://[^/\s:@]*:)[^/\s@]+(?=@)")
_PROC = ("status", "limits", "cmdline", "cgroup", "maps", "numa_maps", "mounts")
_SYSTEM = (
    "/etc/os-release", "/proc/cpuinfo", "/proc/meminfo", "/proc/cmdline", "/proc/sys/kernel/perf_event_paranoid",
    "/proc/sys/kernel/unprivileged_bpf_disabled", "/proc/sys/kernel/yama/ptrace_scope", "/proc/loadavg", "/proc/uptime",
)  # fmt: skip


class Member(NamedTuple):
    """One file of the archive."""

    name: str
    data: bytes


def secrets_of(directory: Path) -> list[bytes]:
    """What must not be in the archive, from a directory of keys: lines of the private ones."""
    found: list[bytes] = []
    for path in sorted(directory.glob("**/*")) if directory.is_dir() else ():
        try:
            data = path.read_bytes()[:MAX_BYTES] if path.is_file() else b""
        except OSError:
            continue  # what we cannot read, we cannot give away
        for block in _PEM.finditer(data):
            lines = [line.strip() for line in block.group().splitlines()]
            found += [line for line in lines if len(line) >= 16 and b"-----" not in line]
    return found


def scrub(data: bytes, secrets: Iterable[bytes] = ()) -> bytes:
    """``data`` without private keys, values of settings that are named as secret, and ``secrets``."""
    data = _PEM.sub(GONE, data)
    data = _SECRET.sub(lambda match: match["name"] + b" " + GONE, data)
    data = _URL.sub(lambda match: match["start"] + GONE, data)
    for secret in secrets:
        data = data.replace(secret, GONE)
    return data


def collect(
    pid: int | None,
    run_dir: RunDir,
    version: str,
    *,
    configs: Iterable[Path] = (),
    logs: Iterable[Path] = (),
    keys: Path | None = None,
    sessions: bool = False,
) -> Iterator[Member]:
    """All there is to say. ``pid``: a DPVS; None: those that are attached to."""
    attached = run_dir.attached() if run_dir.path.is_dir() and os.access(run_dir.path, os.R_OK | os.X_OK) else []
    pids = [pid] if pid is not None else attached
    about = {
        "version": version,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kernel": " ".join(platform.uname()),
        "python": sys.version,
        "packages": {one.metadata["Name"]: one.version for one in distributions()},
        "layouts": Layout.shipped(),
        "dpvs": pids,
        "attached": attached,
    }
    yield Member("versions.json", _json(about))
    for name in _SYSTEM:
        yield Member(f"system{name}", _said(Path(name).read_bytes))
    for path in sorted(Path("/sys/kernel/mm/hugepages").glob("*/*_hugepages")):
        yield Member(f"system{path}", _said(path.read_bytes))
    for one in pids:
        yield from _dpvs(one, run_dir, sessions=sessions and one in attached, attached=one in attached)
    for path in configs:
        yield Member(f"config{path}", _said(path.read_bytes))
    for path in logs:
        yield Member(f"logs{path}", _said(partial(_tail, path)))
    yield Member("logs/journal", _said(_journal))
    if keys is not None:
        yield Member("keys", _said(lambda: _names(keys)))


def write(path: Path, members: Iterable[Member], secrets: Iterable[bytes]) -> int:
    """Make the archive, mode 0600; how many members it has. An existing file is not replaced."""
    known = list(secrets)
    count = 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        root = path.name.removesuffix(".gz").removesuffix(".tar")
        for member in members:
            data = scrub(member.data[:MAX_BYTES], known)
            entry = tarfile.TarInfo(f"{root}/{member.name.lstrip('/')}")
            entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
            archive.addfile(entry, io.BytesIO(data))
            count += 1
    return count


def _dpvs(pid: int, run_dir: RunDir, *, sessions: bool, attached: bool) -> Iterator[Member]:
    base = f"dpvs-{pid}"
    for name in _PROC:
        yield Member(f"{base}/proc/{name}", _said(Path(f"/proc/{pid}/{name}").read_bytes))
    yield Member(f"{base}/threads", _said(lambda: _threads(pid)))
    yield Member(f"{base}/process.json", _said(lambda: _process(pid)))
    yield Member(f"{base}/doctor.json", _said(lambda: _doctor(pid, run_dir)))
    for word in _words(pid, "-c", "--conf-file"):
        yield Member(f"{base}/config{word}", _said(Path(word).read_bytes))
    if attached:
        for command in ("status", "peers", *(("sessions",) if sessions else ())):
            path = run_dir.socket_path(pid)
            yield Member(f"{base}/{command}.json", _said(partial(_lines, path, command)))


def _said(get: Callable[[], bytes]) -> bytes:
    try:
        return get()
    except (OSError, DpvsProbeError, subprocess.SubprocessError, ValueError) as error:
        return f"not to be had: {error}\n".encode()


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, default=str).encode() + b"\n"


def _lines(path: Path, command: str) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in ask(path, command))


def _threads(pid: int) -> bytes:
    out = []
    for task in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda path: int(path.name)):
        affinity = sorted(os.sched_getaffinity(int(task.name)))
        out.append(f"{task.name} {(task / 'comm').read_text().strip()} cpus {affinity}\n")
    return "".join(out).encode()


def _process(pid: int) -> bytes:
    with Target.open(pid) as target:
        said = {"exe": target.exe, "build_id": target.build_id, "ipc": target.ipc_path, "workers": target.workers()}
        return _json({**said, "alive": target.alive()})


def _doctor(pid: int, run_dir: RunDir) -> bytes:
    return _json([check._asdict() for check in examine(pid, lock_holder=run_dir.holder(pid))])


def _words(pid: int, *options: str) -> list[str]:
    """Absolute paths that follow an option on a process's command line."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
    return [word for before, word in pairwise(words) if before in options and word.startswith("/")]


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        return file.read(TAIL_BYTES)


def _journal() -> bytes:
    words = ["journalctl", "--no-pager", "-o", "short-iso-precise", "-n", "5000", "-u", "dpvs-probe*", "-u", "dpvs*"]
    done = subprocess.run(words, capture_output=True, timeout=JOURNAL_S, check=False)
    return done.stdout + done.stderr


def _names(directory: Path) -> bytes:
    """Names, owners and modes of files, not what is in them."""
    out = []
    for path in sorted(directory.rglob("*")):
        found = path.lstat()
        out.append(f"{found.st_mode:o} {found.st_uid}:{found.st_gid} {found.st_size} {path}\n")
    return "".join(out).encode() or b"nothing\n"
