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

from probes.target import Image, Target
from replicator.admin import AdminError, ask
from tests.available import TWIN
from tests.lab.config import text
from tests.lab.node import COMMAND
from tests.lab.process import Process, wait_for
from tests.lab.twin import build_variants

SESSIONS = 53
MEMORY_MIB = 256
START_S = 60.0
SETUP = """\
addr add 10.77.0.1/24
addr add 10.77.1.100/32
service add tcp 10.77.1.100:80 sched rr
dest add tcp 10.77.1.100:80 10.77.0.20:80 fnat
laddr add tcp 10.77.1.100:80 10.77.2.200
synthesize {count} 0 600000
"""
PREFIX = "--file-prefix={name}"
HUGE = ("--huge-dir={huge}", "-m", str(MEMORY_MIB))
# A container's: its own processes, its own mounts, and a directory of the control socket that only it has.
CONTAINER = (
    "unshare", "--pid", "--fork", "--mount-proc", "--propagation", "private", "sh", "-c",
    'mount -t tmpfs none "$0" && exec "$@"', "{inner}",
)  # fmt: skip
# One with debug files that the host does not have.
WITH_DEBUG_FILES = (
    "unshare", "--mount", "--fork", "--propagation", "private", "sh", "-c",
    'mkdir -p /usr/lib/debug && mount --bind "$0" /usr/lib/debug && exec "$@"', "{inner}",
)  # fmt: skip
IN_IT = "agent 0.1.0 is in DPVS"

pytestmark = [pytest.mark.needs("twin", "bpf", "agent")]


class Started:
    """A twin without packets, with sessions. Its control socket is in a directory of its own."""

    def __init__(self, directory: Path, huge: Path, program: Path, options: tuple[str, ...], within: tuple[str, ...]):
        inner = directory / "inner"
        inner.mkdir(parents=True, exist_ok=True)
        self.directory, self.ipc = directory, inner / "dpvs.ipc"
        pid_file, conf, commands = directory / "pid", directory / "conf", directory / "commands"
        commands.write_text(SETUP.format(count=SESSIONS))
        conf.write_text(text(log=directory / "log", workers=1, pool=65536, established_s=600, udp_s=60, oneway_s=60,
                             port_pools=1, timeouts={}))  # fmt: skip
        name = f"matrix-{os.getpid()}-{directory.name}"
        eal = [option.format(huge=huge, name=name) for option in options]
        outside = [word.format(inner=inner) for word in within]
        self.process = Process(
            name,
            [*outside, program, "-c", conf, "-p", pid_file, "-x", self.ipc, "--", "--lcores=0@0,1@0", "--main-lcore=0",
             "--no-pci", "--no-telemetry", *eal],
            directory / "out",
            env={"TWIN_COMMANDS": str(commands)},
        )  # fmt: skip
        wait_for(f"{name} up", lambda: pid_file.exists() or not self.process.alive, START_S)
        assert self.process.alive, self.process.tail()
        self.pid = self.process.pid
        if within:  # as the host counts: the child of what made the namespaces
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
            self.pid = int(children.read_text().split()[0])

    @contextmanager
    def attached(self, *options: str) -> Iterator[Path]:
        run = self.directory / "run"
        probe = Process(
            "probe", [COMMAND, "attach", "--pid", str(self.pid), *options], self.directory / "probe.log",
            env={"DPVS_PROBE_RUNDIR": str(run), "DPVS_PROBE_LAYOUTS": str(self.directory / "layouts")},
        )  # fmt: skip
        try:
            yield run / f"{self.pid}.sock"
        finally:
            probe.stop()
            print(probe.tail())

    def seen(self, *options: str) -> tuple[dict[str, Any], str]:
        """Attach; status and log once all sessions are in the table and the layout is proven."""
        with self.attached(*options) as admin:
            self.proven(admin)
            (status,) = ask(admin, "status")
            log = self.log
        assert "proven on" in log, log
        return status, log

    def proven(self, admin: Path) -> None:
        """Wait until all sessions are in the table, and the layout is proven."""
        wait_for("all sessions in the table", lambda: len(_asked(admin)) == SESSIONS, START_S)
        wait_for("the layout is proven", lambda: "proven on" in self.log, START_S)

    @property
    def log(self) -> str:
        """Of who is attached."""
        return (self.directory / "probe.log").read_text()

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


@pytest.fixture(scope="module")
def built() -> Path:
    """The directory of the twin's variants; linked of what is compiled already."""
    return build_variants()


def test_stripped_in_a_container(start: Any, tmp_path: Path) -> None:
    """Symbols that only a debugger needs are gone; other processes, other mounts, another socket; agent and probes."""
    program = tmp_path / "dpvs-stripped"
    shutil.copy2(TWIN, program)
    subprocess.run(["strip", program], check=True)
    started = start(*HUGE, PREFIX, program=program, within=CONTAINER)
    for kind in ("pid", "mnt"):
        assert os.readlink(f"/proc/{started.pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
    assert not started.ipc.exists()  # for us
    status, log = started.seen("--listen", "127.0.0.1:0", "--insecure")
    assert (status["layout"], status["memory"]) == ("1.10.2", "mapped")
    assert IN_IT in log
    assert "one link for all sites" in log or "probe at dp_vs_redirect_init" in log


def test_stripped_with_a_debug_file(start: Any, built: Path, tmp_path: Path) -> None:
    """The debug information is in a file of its own, named by the build id, where only this DPVS sees it."""
    program, debug = tmp_path / "dpvs-bare", tmp_path / "dpvs-bare.debug"
    shutil.copy2(built / "dpvs-twin-debug", program)
    subprocess.run(["objcopy", "--only-keep-debug", program, debug], check=True)
    subprocess.run(["strip", program], check=True)
    build_id = Image(str(program)).build_id
    place = tmp_path / "twin-0" / "inner" / ".build-id" / build_id[:2] / f"{build_id[2:]}.debug"
    place.parent.mkdir(parents=True)
    debug.rename(place)
    started = start(*HUGE, PREFIX, program=program, within=WITH_DEBUG_FILES)
    _, log = started.seen("--scan-only")
    assert f"debug information of /proc/{started.pid}/root/usr/lib/debug/.build-id/{build_id[:2]}/" in log, log


def test_at_a_fixed_address_with_unlinked_pages(start: Any, built: Path) -> None:
    started = start(*HUGE, PREFIX, "--huge-unlink", program=built / "dpvs-twin-nopie")
    with Target.open(started.pid) as target:
        assert not target.is_pie
    status, log = started.seen("--listen", "127.0.0.1:0", "--insecure")
    assert status["memory"] == "mapped"
    assert IN_IT in log
    assert "probe at dp_vs_redirect_init" in log


@pytest.mark.parametrize(
    "options", [("--in-memory", "--huge-dir={huge}"), ("--no-huge", PREFIX)], ids=["in-memory", "no-huge"]
)
def test_memory_without_files(start: Any, options: tuple[str, ...]) -> None:
    """DPDK takes a memfd for both, which is mapped as files are; the table of zones is in none with the first."""
    status, _ = start(*options, "-m", str(MEMORY_MIB)).seen("--scan-only")
    assert status["memory"] == "mapped"


def test_two_on_a_host(start: Any, built: Path, tmp_path: Path) -> None:
    """One with debug information, one for which a layout was added; each attach sees its own."""
    one = start(*HUGE, PREFIX, program=built / "dpvs-twin-debug")
    other = start(*HUGE, PREFIX)
    made, kept = tmp_path / "made.json", other.directory / "layouts"
    _command("layout", "generate", "--debug", str(built / "dpvs-twin-debug"), "--release", "1.10.2", str(made))
    said = _command("layout", "add", str(made), "--pid", str(other.pid), DPVS_PROBE_LAYOUTS=str(kept))
    assert said.stdout.startswith(f"kept as {kept}/")
    said = _command("doctor", status=2)
    assert f"{one.pid} " in said.stderr
    assert f"{other.pid} " in said.stderr
    with one.attached("--scan-only") as first, other.attached("--scan-only") as second:
        one.proven(first)
        other.proven(second)
    for started, source in ((one, "debug information of"), (other, "added for build id")):
        assert source in started.log, started.log
        assert "proven on" in started.log, started.log


def _command(*words: str, status: int = 0, **env: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run([COMMAND, *words], check=False, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == status, done.stderr
    return done


def _asked(admin: Path) -> list[dict[str, Any]]:
    try:
        return list(ask(admin, "sessions"))
    except AdminError:
        return []
