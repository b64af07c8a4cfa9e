# SPDX-License-Identifier: GPL-2.0-or-later
"""Which processes of this host are a DPVS, for whoever did not say which one is meant.

Rules: looks at program files through /proc, so into containers too; opens no memory and asks nobody. A program is a
DPVS if it names a function that every build of DPVS exports; each file is looked into once. What may not be read, or
ends meanwhile, is passed over.
"""

import contextlib
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

MARK = b"\0dp_vs_redirect_init\0"  # in a string table of the program: names of symbols end and begin with a zero
MAX_PROGRAM_BYTES = 1 << 30
MAX_COMMAND = 100


@dataclass(frozen=True)
class Candidate:
    """A process that is a DPVS. ``contained``: in other pid or mount namespaces than ours."""

    pid: int
    program: str
    command: str
    contained: bool

    def __str__(self) -> str:
        return f"{self.pid} {self.command or self.program}{' (in a container)' if self.contained else ''}"


def running(proc: Path = Path("/proc")) -> list[Candidate]:
    """Every DPVS on this host, by process id."""
    known: dict[tuple[int, int], bool] = {}
    found = []
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError):  # a kernel thread, one that has ended, an empty file
            status = (entry / "exe").stat()
            key = (status.st_dev, status.st_ino)
            if key not in known:
                known[key] = _is_dpvs(entry / "exe", status.st_size)
            if known[key]:
                found.append(_candidate(proc, entry))
    return sorted(found, key=lambda one: one.pid)


def advice(found: list[Candidate] | None = None) -> str:
    """What to do next: which process ids there are to choose from (None: looked for now)."""
    found = running() if found is None else found
    if not found:
        return "No DPVS runs on this host. Start it first; its process id is then what `pidof dpvs` says."
    return "Running here, to be named by --pid: " + "; ".join(map(str, found))


def _is_dpvs(program: Path, size: int) -> bool:
    if not 0 < size <= MAX_PROGRAM_BYTES:
        return False
    with open(program, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        return content[:4] == b"\x7fELF" and content.find(MARK) >= 0


def _candidate(proc: Path, entry: Path) -> Candidate:
    words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
    command = "".join(c if c.isprintable() else "?" for c in " ".join(words).strip())
    if len(command) > MAX_COMMAND:
        command = f"{command[: MAX_COMMAND - 3]}..."
    contained = any(
        os.readlink(entry / "ns" / kind) != os.readlink(proc / "self" / "ns" / kind) for kind in ("pid", "mnt")
    )
    return Candidate(int(entry.name), os.readlink(entry / "exe"), command, contained)
