# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/service.py and systemd.py: which DPVS, again and again, and what the service manager is told."""

import asyncio
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from probes.errors import DpvsProbeError
from probes.proof import LayoutDisproved
from probes.target import NoSuchProcess
from replicator import service, systemd
from replicator.attach import Options
from replicator.service import ManyProcesses, Service, age_s, find, found_now, of_file, of_name
from tests.unit.simulated_node import until


class NotThereYet(DpvsProbeError):
    help_text = "Wait."


class Manager:
    """A service manager that listens."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)
        self.said: list[str] = []

    def hear(self) -> list[str]:
        while True:
            try:
                self.said += self.socket.recv(1 << 16).decode().split("\n")
            except BlockingIOError:
                return self.said


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    yield manager
    manager.socket.close()


@pytest.fixture
def sleeper() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts processes that are called as nothing else is."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["probe-test-sleeper", "60"], executable="/bin/sleep"))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_the_process_of_a_pid_file(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    assert of_file(path) is None
    for text, pid in {f"{os.getpid()}\n": os.getpid(), "": None, "x": None, "0": None, "-1": None, "4194305": None,
                      "4194303": None, "1 2": None}.items():  # fmt: skip
        path.write_text(text)
        assert of_file(path) == pid, text
    assert find(Options(pid_file=str(path))) is None
    with pytest.raises(NoSuchProcess, match=f"there is no DPVS of {path} now"):
        found_now(Options(pid_file=str(path)))


def test_the_process_of_a_name(sleeper: Callable[[], "subprocess.Popen[bytes]"]) -> None:
    assert of_name("probe-test-sleeper") == []
    first = sleeper()
    deadline = time.monotonic() + 5
    while of_name("probe-test-sleeper") != [first.pid]:
        assert time.monotonic() < deadline
    assert found_now(Options(process_name="probe-test-sleeper")).pid == first.pid
    assert age_s(first.pid) < 60
    sleeper()
    while len(of_name("probe-test-sleeper")) < 2:
        assert time.monotonic() < deadline
    with pytest.raises(ManyProcesses):
        find(Options(process_name="probe-test-sleeper"))


class Attachments:
    """In place of ``replicator.attach.Attachment``: each does what the script says."""

    def __init__(self, *script: Any) -> None:
        self.script = list(script)
        self.pids: list[int] = []
        self.stopped = asyncio.Event()

    def __call__(self, options: Options, on_node: Callable[[Any], None]) -> Any:
        outer, pid = self, options.pid

        class Attachment:
            async def run(self) -> int:
                outer.pids.append(pid)
                does = outer.script.pop(0)
                if isinstance(does, Exception):
                    raise does
                self.pid = pid
                on_node(FakeNode())
                if does == "stay":
                    await outer.stopped.wait()
                    return 0
                return int(does)

            def stop(self) -> None:
                outer.stopped.set()

            def reload_keys(self) -> None:
                logging.getLogger("test").info("keys")

            def use(self, options: Options) -> None:
                raise AssertionError("there is no source")

        return Attachment()


class FakeNode:
    name = "a"
    ticks = 0


def serve(
    options: Options, monkeypatch: pytest.MonkeyPatch, *script: Any, end: bool = False
) -> tuple[int, list[int], Service]:
    async def body() -> tuple[int, list[int], Service]:
        attachments = Attachments(*script)
        monkeypatch.setattr(service, "Attachment", attachments)
        serving = Service(options)
        task = asyncio.create_task(serving.run())
        if end:
            await until(lambda: (not attachments.script and serving._node is not None) or task.done())
            os.kill(os.getpid(), signal.SIGTERM)
        return await asyncio.wait_for(task, 10), attachments.pids, serving

    return asyncio.run(body())


def test_the_end_of_a_process_named_by_its_pid_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert serve(Options(pid=7), monkeypatch, 3)[:2] == (3, [7])
    assert serve(Options(pid=7), monkeypatch, 0)[:2] == (0, [7])
    with pytest.raises(NotThereYet):
        serve(Options(pid=os.getpid()), monkeypatch, NotThereYet("x"))


def test_the_next_process_is_attached_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "pid"
    path.write_text(str(os.getpid()))
    monkeypatch.setattr(service, "age_s", lambda pid: 1.0)
    monkeypatch.setattr(service, "AGAIN_S", 0.01)
    caplog.set_level(logging.INFO)
    wait = NotThereYet("its control socket is not there")
    status, pids, serving = serve(Options(pid_file=str(path)), monkeypatch, 3, wait, wait, 3, "stay", end=True)
    assert (status, pids, serving.attaches) == (0, [os.getpid()] * 5, 3)
    said = manager.hear()
    assert said[:2] == ["READY=1", f"STATUS=attached to pid {os.getpid()}"]
    assert said.count(f"STATUS=pid {os.getpid()} is not ready: its control socket is not there") == 1
    assert said[-1] == "STOPPING=1"
    assert caplog.text.count("its control socket is not there") == 1


def test_what_waiting_does_not_help_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pid"
    path.write_text(str(os.getpid()))
    options = Options(pid_file=str(path))
    with pytest.raises(LayoutDisproved):
        serve(options, monkeypatch, LayoutDisproved("no"))
    monkeypatch.setattr(service, "age_s", lambda pid: 61.0)
    with pytest.raises(NotThereYet):
        serve(options, monkeypatch, NotThereYet("a DPVS that is long there and has no socket"))


def test_a_service_that_waits_is_up_and_can_be_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manager: Manager
) -> None:
    async def body() -> int:
        serving = Service(Options(pid_file=str(tmp_path / "none")))
        task = asyncio.create_task(serving.run())
        await until(lambda: "READY=1" in manager.hear())
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: manager.hear().count("READY=1") == 2)
        os.kill(os.getpid(), signal.SIGTERM)
        return await asyncio.wait_for(task, 5)

    assert asyncio.run(body()) == 0
    assert "RELOADING=1" in manager.said
    assert f"STATUS=waiting for a DPVS of {tmp_path / 'none'}" in manager.said


def test_the_watchdog_hears_of_a_loop_that_turns_and_not_of_one_that_stands(
    monkeypatch: pytest.MonkeyPatch, manager: Manager
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "60000")

    async def body() -> None:
        monkeypatch.setattr(service, "Attachment", Attachments("stay"))
        serving = Service(Options(pid=1))
        task = asyncio.create_task(serving.run())
        await until(lambda: serving._node is not None)
        node = FakeNode()
        serving._node = node  # type: ignore[assignment]
        for _ in range(10):
            node.ticks += 1
            await asyncio.sleep(0.02)
        turning = manager.hear().count("WATCHDOG=1")
        assert turning >= 4
        await asyncio.sleep(0.1)
        standing = manager.hear().count("WATCHDOG=1")
        assert standing <= turning + 2
        await asyncio.sleep(0.2)
        assert manager.hear().count("WATCHDOG=1") == standing
        os.kill(os.getpid(), signal.SIGTERM)
        await task

    asyncio.run(body())


def test_no_service_manager() -> None:
    assert not systemd.notify("READY=1", {})
    assert not systemd.notify("READY=1", {"NOTIFY_SOCKET": "/no/such/socket"})
    assert not systemd.notify("READY=1", {"NOTIFY_SOCKET": "relative"})
    assert systemd.watchdog_s({}) is None
    assert systemd.watchdog_s({"WATCHDOG_USEC": "x"}) is None
    assert systemd.watchdog_s({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}) is None
    assert systemd.watchdog_s({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}) == 3.0
    assert not systemd.under_journal(2, {})
    assert not systemd.under_journal(2, {"JOURNAL_STREAM": "1:2"})


def test_an_abstract_socket() -> None:
    name = f"probe-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0" + name)
        assert systemd.notify("READY=1", {"NOTIFY_SOCKET": "@" + name})
        assert listening.recv(100) == b"READY=1"


def entry(data: bytes) -> dict[str, str]:
    """As the journal reads it."""
    fields = {}
    while data:
        line, _, rest = data.partition(b"\n")
        if b"=" in line:
            name, _, value = line.partition(b"=")
        else:
            name, (size,) = line, struct.unpack_from("<Q", rest)
            value, rest = rest[8 : 8 + size], rest[8 + size + 1 :]
        fields[name.decode()] = value.decode()
        data = rest
    return fields


def test_entries_of_the_journal_have_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(path))
        monkeypatch.setattr(systemd, "common", {"DPVS_PID": 12})
        handler = systemd.JournalHandler(str(path))
        log = logging.Logger("replicator.links")
        log.addHandler(handler)
        log.warning("peer %s is\ndown", "b", extra={"fields": {"PEER": "b", "PEER_ADDRESS": None}})
        fields = entry(journal.recv(1 << 16))
        assert fields["MESSAGE"] == "peer b is\ndown"
        assert (fields["PRIORITY"], fields["SYSLOG_IDENTIFIER"], fields["DPVS_PID"]) == ("4", "dpvs-probe", "12")
        assert (fields["DPVS_PROBE_PART"], fields["PEER"]) == ("replicator.links", "b")
        assert "PEER_ADDRESS" not in fields
        for level, priority in ((logging.DEBUG, "7"), (logging.INFO, "6"), (logging.ERROR, "3")):
            log.log(level, "x")
            assert entry(journal.recv(1 << 16))["PRIORITY"] == priority
    log.error("nobody listens")
    assert handler.dropped == 1
    handler.close()


def test_under_the_journal_the_command_logs_to_it() -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    program = (
        "import os; from replicator import systemd; found = os.fstat(2);"
        "environment = {'JOURNAL_STREAM': f'{found.st_dev}:{found.st_ino}'};"
        "raise SystemExit(0 if systemd.under_journal(2, environment) else 1)"
    )
    with here, there:
        assert subprocess.run([sys.executable, "-c", program], stderr=there, check=False).returncode == 0
