# SPDX-License-Identifier: GPL-2.0-or-later
"""One run of the laboratory, and everything it must give back to the machine.

Rules: a run has a unique prefix (``dpl-`` and six hex digits) that its namespaces, its state directory
``/run/dpvs-lab/<prefix>`` and DPDK's runtime directories carry. ``close`` gives everything back. What a run that was
killed could not give back is written down in its ``owner.json``, and ``sweep`` gives it back for it: it looks at
nothing but these directories, and only at those whose owner no longer lives.
"""

import json
import os
import secrets
import shutil
import signal
from pathlib import Path

from replicator.keys import init_authority, issue
from tests.lab import hugepages
from tests.lab.net import NETNS_DIR, remove_namespace
from tests.lab.process import start_time

STATE = Path("/run/dpvs-lab")
DPDK_RUNTIME = Path("/run/dpdk")


class Run:
    """Owner of a state directory, a hugetlbfs mount and a share of the hugepage pool; a context manager."""

    def __init__(self, hugepages_wanted: int = 0) -> None:
        sweep()
        self.prefix = f"dpl-{secrets.token_hex(3)}"
        self.directory = STATE / self.prefix
        self.huge = self.directory / "huge"
        self.directory.mkdir(parents=True, mode=0o755)
        self._owner = os.getpid()
        self._pairs = 0
        self._raised = 0
        self._processes: dict[int, int] = {}
        self._write()
        try:
            if hugepages_wanted:
                hugepages.mount(self.huge)
                self._raised = hugepages.raise_pool(hugepages_wanted)
                self._write()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def grow(self, pages: int) -> None:
        """Raise the pool by ``pages`` more."""
        if not os.path.ismount(self.huge):
            hugepages.mount(self.huge)
        self._raised += hugepages.raise_pool(pages)
        self._write()

    def keys(self, node: str) -> Path:
        """The directory with the keys of a node of this run's own cluster."""
        authority = self.directory / "authority"
        if not authority.exists():
            init_authority(authority, "laboratory")
        directory = self.directory / "keys" / node
        if not directory.exists():
            issue(authority, node, directory)
        return directory

    def next_pair(self) -> int:
        """A number that no other pair of this run has."""
        self._pairs += 1
        return self._pairs

    def remember(self, pid: int) -> None:
        """Write a child down, so that the sweep after a killed run can end it."""
        started = start_time(pid)
        if started is not None:
            self._processes[pid] = started
            self._write()

    def _write(self) -> None:
        text = json.dumps(
            {
                "pid": os.getpid(),
                "started": start_time(os.getpid()),
                "hugepages": self._raised,
                "processes": list(self._processes.items()),
            }
        )
        fresh = self.directory / "owner.json.new"
        fresh.write_text(text)
        fresh.replace(self.directory / "owner.json")

    def close(self) -> None:
        if os.getpid() == self._owner:  # never in a forked child
            _give_back(self.directory)


def _owner(directory: Path) -> dict[str, object]:
    try:
        owner: dict[str, object] = json.loads((directory / "owner.json").read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}
    return owner


def _give_back(directory: Path) -> None:
    owner = _owner(directory)
    processes = owner.get("processes", [])
    assert isinstance(processes, list)
    for pid, started in processes:
        if start_time(pid) == started:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            if os.getpid() == owner.get("pid"):
                try:
                    os.waitpid(pid, 0)
                except ChildProcessError:
                    continue
    for name in sorted(os.listdir(NETNS_DIR)) if os.path.isdir(NETNS_DIR) else []:
        if name.startswith(directory.name + "-"):
            remove_namespace(name)
    huge = directory / "huge"
    if os.path.ismount(huge):
        for file in huge.iterdir():
            file.unlink(missing_ok=True)
        hugepages.unmount(huge)
    raised = owner.get("hugepages", 0)
    assert isinstance(raised, int)
    hugepages.lower_pool(raised)
    if DPDK_RUNTIME.is_dir():
        for runtime in DPDK_RUNTIME.glob(directory.name + "-*"):
            shutil.rmtree(runtime, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)


def sweep() -> list[str]:
    """Give back what runs without a living owner left behind; returns their prefixes."""
    swept = []
    for directory in sorted(STATE.glob("dpl-*")) if STATE.is_dir() else []:
        owner = _owner(directory)
        pid = owner.get("pid")
        if isinstance(pid, int) and start_time(pid) == owner.get("started"):
            continue
        if not owner and directory.stat().st_mtime > Path("/proc/self").stat().st_mtime - 5:
            continue  # just being made by another run
        _give_back(directory)
        swept.append(directory.name)
    return swept


if __name__ == "__main__":
    for left_behind in sweep():
        print(f"swept what {left_behind} left behind")
