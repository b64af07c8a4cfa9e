# SPDX-License-Identifier: GPL-2.0-or-later
"""Where tables of sessions come from, to be compared: running attaches here and elsewhere, files, DPVS itself.

A source is written as one of

    PID, PID@NODE        an attach on this machine: its own sessions, or its copies of NODE's; @NODE: the only attach
    /PATH.sock, @NODE    the same, by its admin socket
    ssh:HOST, @NODE      the only attach on another machine, by way of ``ssh HOST dpvs-probe diff --export``
    FILE                 a store, a snapshot, or what ``diff --export`` has written
    dpvs:PID             what a DPVS itself says: tuples only

Rules: sessions travel as JSON lines, records in base64. What is not all that, or does not end, is refused.
"""

import base64
import binascii
import json
import re
import subprocess
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from collector.record import AF_INET, AF_INET6, RECORD, WORDS, Bools, Records, digest, pick, words
from probes.errors import DpvsProbeError
from replicator.admin import Line, ask
from replicator.rundir import RunDir
from replicator.store.format import MAGIC, joined
from replicator.store.reader import age_ns, boot_id, now, read

AT_ONCE = 512  # records a line
BLOCK = 1 << 15  # slots looked at before the loop does something else
UNKNOWN_MS = 1 << 40  # age of a session whose birth nobody knows
SSH_S = 120
_HERE = re.compile(r"(?P<pid>\d*)(?:@(?P<node>.+))?")
_SOCKET = re.compile(r"(?P<path>/.*\.sock)(?:@(?P<node>.+))?")
_SSH = re.compile(r"ssh:(?P<host>[^@-][^@]*)(?:@(?P<node>.+))?")
_DPVS = re.compile(r"dpvs:(?P<pid>\d+)")

Ages = npt.NDArray[np.int64]


class BadSource(DpvsProbeError):
    """A table that cannot be had."""

    help_text = "PID[@NODE], /PATH.sock[@NODE], ssh:HOST[@NODE], a file, or dpvs:PID; see `dpvs-probe diff --help`."


class Sessions(NamedTuple):
    """A table as it was at one moment."""

    name: str  # of the source
    origin: str  # whose sessions these are
    records: Records
    age_ms: Ages

    @property
    def digest(self) -> int:
        """Equal for equal sessions, whatever slots they are in."""
        return digest(self.records, by_slot=False)


async def export(
    records: Records, present: Bools, age_ms: Ages | None, origin: str, *, whole: bool
) -> AsyncIterator[list[Line]]:
    """The lines for a table: one with count and digest at the end, and before it, if ``whole``, all records.

    ``age_ms``: by slot; None: not known.
    """
    total = count = 0
    for first in range(0, len(records), BLOCK):
        part = slice(first, first + BLOCK)
        at = np.flatnonzero(present[part])
        some = pick(records[part], at)
        ages = age_ms[part][at] if age_ms is not None else np.full(len(at), UNKNOWN_MS)
        total = (total + digest(some, by_slot=False)) & 0xFFFFFFFFFFFFFFFF
        count += len(some)
        if whole:
            yield [
                {
                    "records": base64.b64encode(words(some[k : k + AT_ONCE]).tobytes()).decode(),
                    "age_ms": ages[k : k + AT_ONCE].tolist(),
                }
                for k in range(0, len(some), AT_ONCE)
            ]
        else:
            yield []
    yield [{"origin": origin, "sessions": count, "digest": f"{total:016x}"}]


def parse(lines: Iterable[Line], name: str) -> tuple[Sessions | None, Line]:
    """What ``export`` said: the sessions, if they are in it, and the last line. Raises BadSource."""
    parts: list[Records] = []
    ages: list[Any] = []
    last: Line | None = None
    try:
        for line in lines:
            if "records" in line:
                raw = np.frombuffer(base64.b64decode(line["records"], validate=True), np.uint64)
                parts.append(raw.reshape(-1, WORDS).copy().view(RECORD).reshape(-1))
                ages += line["age_ms"]
            else:
                last = line
        if last is None:
            raise BadSource(f"{name} broke off")
        sessions = Sessions(name, str(last["origin"]), joined(parts), np.array(ages, np.int64))
        if parts and (
            len(sessions.records) != last["sessions"] or len(ages) != last["sessions"]
            or f"{sessions.digest:016x}" != last["digest"]
        ):  # fmt: skip
            raise BadSource(f"{name} does not hold what it says")
        return (sessions if parts or last["sessions"] == 0 else None), last
    except (ValueError, KeyError, TypeError, OverflowError, binascii.Error) as error:
        raise BadSource(f"{name} is no export of sessions") from error


class Source:
    """One source, as it is written on a command line. Raises BadSource."""

    def __init__(self, text: str, run_dir: RunDir) -> None:
        self.text, self._run_dir = text, run_dir
        self._here, self._socket = _HERE.fullmatch(text), _SOCKET.fullmatch(text)
        self._ssh, self._dpvs = _SSH.fullmatch(text), _DPVS.fullmatch(text)
        self.live = bool(text) and any((self._here, self._socket, self._ssh, self._dpvs))
        if not self.live and not Path(text).is_file():
            raise BadSource(f"'{text}' is no source of sessions, and no file")

    def digest(self) -> tuple[int, str] | None:
        """How many sessions and their digest; None where only all of it can be had."""
        if self._ssh or self._dpvs or not self.live:
            return None
        _, last = parse(self._lines(whole=False), self.text)
        return int(last["sessions"]), str(last["digest"])

    def sessions(self) -> Sessions:
        """All of it, now."""
        if self._dpvs:
            raise BadSource(f"{self.text} tells tuples only, which cannot be compared here")
        if not self.live:
            return self._file()
        found, _ = parse(self._lines(whole=True), self.text)
        if found is None:
            raise BadSource(f"{self.text} gave no sessions")
        return found

    def tuples(self) -> "npt.NDArray[np.void]":
        """``identity`` of each session."""
        from collector.record import identity

        return identity(told_by_dpvs(int(self._dpvs["pid"])) if self._dpvs else self.sessions().records)

    def raw(self) -> Iterator[Line]:
        """The lines of an export, to be written to a file."""
        if self._dpvs or not self.live:
            raise BadSource(f"{self.text} is no attach")
        return self._lines(whole=True)

    def _lines(self, *, whole: bool) -> Iterator[Line]:
        if self._ssh:
            return self._remote(self._ssh["host"], self._ssh["node"])
        if self._socket:
            return ask(Path(self._socket["path"]), "records", origin=self._socket["node"] or "own", whole=whole)
        assert self._here is not None
        pid = self._run_dir.choose(int(self._here["pid"]) if self._here["pid"] else None)
        return ask(self._run_dir.socket_path(pid), "records", origin=self._here["node"] or "own", whole=whole)

    def _remote(self, host: str, node: str | None) -> Iterator[Line]:
        words_ = ["ssh", "-o", "BatchMode=yes", "--", host, "dpvs-probe", "diff", "--export", f"@{node or 'own'}"]
        try:
            done = subprocess.run(words_, capture_output=True, timeout=SSH_S, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            raise BadSource(f"{self.text} cannot be asked: {error}") from error
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["it does not say why"]
            raise BadSource(f"{self.text} cannot be asked: {said[0]}")
        yield from json_lines(done.stdout, self.text)

    def _file(self) -> Sessions:
        path = Path(self.text)
        with path.open("rb") as file:
            start = file.read(64 + len(MAGIC))
        if start[64:] == MAGIC:
            contents = read(path)
            contents.require_whole()
            age_ns(contents.stamp.at, contents.head.boot_id, now(), boot_id())
            return Sessions(self.text, contents.head.node, contents.own, np.full(len(contents.own), UNKNOWN_MS))
        found, _ = parse(json_lines(path.read_bytes(), self.text), self.text)
        if found is None:
            raise BadSource(f"{self.text} has a digest and no sessions")
        return found


def json_lines(data: bytes, name: str) -> Iterator[Line]:
    """The objects of a text, one a line. Raises BadSource."""
    for text in data.splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSource(f"{name} is no export of sessions") from error
        if not isinstance(line, dict):
            raise BadSource(f"{name} is no export of sessions")
        yield line


def told_by_dpvs(pid: int) -> Records:
    """Records with the tuples that a DPVS lists itself (GET_CONN_ALL); all else in them is 0."""
    from probes.choosing import choose
    from probes.control import ControlSocket
    from probes.target import Target

    with Target.open(pid) as target:
        rows = ControlSocket(target.ipc_path, choose(target)[0]).sessions()
    out = np.zeros(len(rows), RECORD)
    out["af"], out["af_out"], out["proto"] = rows["in_af"], rows["out_af"], rows["proto"]
    for name in ("cport", "vport", "lport", "dport"):
        out[name] = rows[name]
    for name, family in (("caddr", "af"), ("vaddr", "af"), ("laddr", "af_out"), ("daddr", "af_out")):
        for af, size in ((AF_INET, 4), (AF_INET6, 16)):
            which = out[family] == af
            out[name][which, :size] = rows[name][which, :size]
    return out
