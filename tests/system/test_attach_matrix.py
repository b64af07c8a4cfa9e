# SPDX-License-Identifier: GPL-2.0-or-later
"""Any process: however the twin was built and started, attach proves its layout and sees its sessions."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from probes.choosing import choose
from probes.target import Target
from replicator.admin import AdminError, ask
from tests.available import ROOT, TWIN
from tests.lab.config import text
from tests.lab.node import COMMAND
from tests.lab.process import Process, wait_for

SESSIONS = 53
MEMORY_MIB = 128
SETUP = """\
addr add 10.77.0.1/24
addr add 10.77.1.100/32
service add tcp 10.77.1.100:80 sched rr
dest add tcp 10.77.1.100:80 10.77.0.20:80 fnat
laddr add tcp 10.77.1.100:80 10.77.2.200
synthesize {count} 0 600000
"""
HUGE = ("--huge-dir={huge}", "-m", str(MEMORY_MIB))

pytestmark = [pytest.mark.needs("twin", "bpf")]


class Started:
    """A twin without packets, with sessions."""

    def __init__(self, directory: Path, huge: Path, program: Path, options: tuple[str, ...], within: tuple[str, ...]):
        directory.mkdir()
        self.directory = directory
        self.ipc = directory / "dpvs.ipc"
        pid_file, conf, commands = directory / "pid", directory / "conf", directory / "commands"
        commands.write_text(SETUP.format(count=SESSIONS))
        conf.write_text(text(log=directory / "log", workers=1, pool=2047, established_s=600, udp_s=60, oneway_s=60,
                             port_pools=1, timeouts={}))  # fmt: skip
        name = f"matrix-{os.getpid()}-{directory.name}"
        eal = [option.format(huge=huge, name=name) for option in options]
        self.process = Process(
            name,
            [*within, program, "-c", conf, "-p", pid_file, "-x", self.ipc, "--", "--lcores=0@0,1@0", "--main-lcore=0",
             "--no-pci", "--no-telemetry", *eal],
            directory / "out",
            env={"TWIN_COMMANDS": str(commands)},
        )  # fmt: skip
        wait_for(f"{name} up", lambda: pid_file.exists() or not self.process.alive, 30)
        assert self.process.alive, self.process.tail()
        self.pid = self.process.pid
        if within:  # as the host counts: the child of what made the namespaces
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
            self.pid = int(children.read_text().split()[0])

    @contextmanager
    def attached(self) -> Iterator[Path]:
        run = self.directory / "run"
        probe = Process("probe", [COMMAND, "attach", "--pid", str(self.pid)], self.directory / "probe.log",
                        env={"DPVS_PROBE_RUNDIR": str(run)})  # fmt: skip
        try:
            yield run / f"{self.pid}.sock"
        finally:
            probe.stop()
            print(probe.tail())

    def seen(self) -> dict[str, Any]:
        """Attach; the status once all sessions are in the table and the layout is proven."""
        with self.attached() as admin:
            said: dict[str, Any] = {}

            def all_there() -> bool:
                nonlocal said
                try:
                    (said,) = ask(admin, "status")
                except AdminError:
                    return False
                return len(_asked(admin)) == SESSIONS

            wait_for("all sessions in the table", all_there, 25)
            log = (self.directory / "probe.log").read_text()
            assert "proven on" in log, log
            return said

    def close(self) -> None:
        self.process.kill()
        if self.pid != self.process.pid and Path(f"/proc/{self.pid}").exists():
            os.kill(self.pid, 9)


@pytest.fixture
def start(tmp_path: Path, lab_run: Any, lab_pages: Any) -> Iterator[Any]:
    lab_pages("twin")
    running: list[Started] = []

    def begin(*options: str, program: Path = TWIN, within: tuple[str, ...] = ()) -> Started:
        started = Started(tmp_path / f"twin-{len(running)}", lab_run.huge, program, options, within)
        running.append(started)
        return started

    yield begin
    for one in running:
        one.close()
    for page in lab_run.huge.glob(f"matrix-{os.getpid()}-*"):
        page.unlink()


def variant(option: str, name: str) -> Path:
    subprocess.run(["make", "-s", "-C", ROOT / "tests" / "twin", f"OUT={TWIN.parent}", option], check=True, timeout=200)
    return TWIN.with_name(name)


@pytest.mark.parametrize(
    ("options", "memory"),
    [
        ((*HUGE, "--file-prefix={name}"), "mapped"),
        ((*HUGE, "--file-prefix={name}", "--huge-unlink"), "mapped"),
        (("--in-memory", "--huge-dir={huge}", "-m", str(MEMORY_MIB)), "mapped"),
        (("--no-huge", "-m", str(MEMORY_MIB), "--file-prefix={name}"), "copied"),
    ],
    ids=["file-prefix", "huge-unlink", "in-memory", "no-huge"],
)
def test_memory(start: Any, options: tuple[str, ...], memory: str) -> None:
    assert start(*options).seen()["memory"] == memory


def test_stripped(start: Any, tmp_path: Path) -> None:
    program = tmp_path / "dpvs-stripped"
    shutil.copy2(TWIN, program)
    subprocess.run(["strip", program], check=True)
    start(*HUGE, "--file-prefix={name}", program=program).seen()


def test_not_position_independent(start: Any) -> None:
    started = start(*HUGE, "--file-prefix={name}", program=variant("PIE=0", "dpvs-twin-nopie"))
    with Target.open(started.pid) as target:
        assert not target.is_pie
    started.seen()


def test_debug_information_is_taken_before_anything_else(start: Any) -> None:
    started = start(*HUGE, "--file-prefix={name}", program=variant("DEBUG=1", "dpvs-twin-debug"))
    with Target.open(started.pid) as target:
        layout, source = choose(target)
    assert source.startswith("debug information")
    assert layout.offset("dp_vs_conn", "flags") == 538
    assert started.seen()["layout"] == layout.name


def test_other_namespaces(start: Any) -> None:
    """A container's: its own processes, its own mounts, and a control socket where only it has a directory."""
    within = ("unshare", "--pid", "--mount", "--fork", "--propagation", "private")
    started = start(*HUGE, "--file-prefix={name}", within=within)
    assert os.readlink(f"/proc/{started.pid}/ns/pid") != os.readlink("/proc/self/ns/pid")
    assert os.readlink(f"/proc/{started.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
    started.seen()


def test_two_on_a_host(start: Any) -> None:
    one, other = (start(*HUGE, "--file-prefix={name}") for _ in range(2))
    with one.attached() as first, other.attached() as second:
        wait_for("the sessions of one", lambda: len(_asked(first)) == SESSIONS, 25)
        wait_for("the sessions of the other", lambda: len(_asked(second)) == SESSIONS, 25)


def _asked(admin: Path) -> list[dict[str, Any]]:
    try:
        return list(ask(admin, "sessions"))
    except AdminError:
        return []
