# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: what it takes, what it prints, and how it ends."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

from probes import candidates
from probes.errors import DpvsProbeError
from replicator import cli_ask as module
from replicator.cli import cli, main
from replicator.rundir import RunDir
from tests.unit.simulated_node import SimulatedNode, until

CONTEXT = click.Context(cli)
COMMANDS = {name: cli.get_command(CONTEXT, name) for name in cli.list_commands(CONTEXT)}


class Ran:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


class Runner:
    """Calls ``main`` as the console does."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Ran:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        captured = self._capsys.readouterr()
        return Ran(int(ended.value.code or 0), captured.out, captured.err)

    def complains(self, *arguments: str) -> str:
        """The command must end with status 1, one line of error and one of advice; gives the error."""
        ran = self(*arguments)
        assert ran.status == 1, ran.err
        lines = [line for line in ran.err.splitlines() if not line[:2].isdigit()]
        assert len(lines) == 2, ran.err
        assert lines[0].startswith("dpvs-probe: ")
        assert lines[1].startswith("  ")
        assert len(lines[1].strip()) > 0
        assert "Traceback" not in ran.err
        return lines[0].removeprefix("dpvs-probe: ")


@pytest.fixture(autouse=True)
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run"
    monkeypatch.setenv("DPVS_PROBE_RUNDIR", str(path))
    return path


@pytest.fixture(autouse=True)
def quiet_logging() -> Iterator[None]:
    """attach sends all logging to what is standard error at that moment."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(capsys)


@pytest.fixture
def node(run_dir: Path) -> Iterator[SimulatedNode]:
    """A node with three sessions in a thread of its own, found as the attach to pid 4711."""
    run_dir.mkdir(mode=0o700)
    ready, over = threading.Event(), threading.Event()
    holder: list[SimulatedNode] = []

    async def live() -> None:
        node = SimulatedNode("a", run_dir, admin_name="4711.sock")
        for slot in range(3):
            node.dpvs.create(slot, slot)
        holder.append(node)
        with RunDir(run_dir).lock(4711):
            async with node:
                await until(lambda: len(node.table) == 3)
                ready.set()
                await until(lambda: over.is_set() or node.task is None or node.task.done(), 60)

    thread = threading.Thread(target=lambda: asyncio.run(live()))
    thread.start()
    assert ready.wait(10)
    yield holder[0]
    over.set()
    thread.join()


def test_version_and_help(run: Runner) -> None:
    ran = run("--version")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith("dpvs-probe, version ")
    for name in COMMANDS:
        ran = run(name, "--help")
        assert ran.status == 0
        assert f"dpvs-probe {name}" in ran.out
    assert sorted(COMMANDS) == [
        "agent", "attach", "config", "decode", "demote", "detach", "diff", "doctor", "drill", "keys", "layout",
        "notify", "orphans", "peers", "promote", "ready", "sessions", "snapshot", "status", "sysdump", "top", "watch",
    ]  # fmt: skip


def test_the_list_of_commands_says_what_they_say_themselves() -> None:
    assert {name: part.summary for name, part in cli.parts.items()} == {
        name: command.get_short_help_str(1000) for name, command in COMMANDS.items()
    }
    plain = click.Group("dpvs-probe", commands=COMMANDS, context_settings=cli.context_settings)
    listed = cli.get_help(CONTEXT).partition("Commands:")[2]
    assert listed == plain.get_help(click.Context(plain, **cli.context_settings)).partition("Commands:")[2] != ""
    for start in ("", "s", "zz"):
        ours, theirs = (group.shell_complete(click.Context(group), start) for group in (cli, plain))
        assert [(item.value, item.help) for item in ours] == [(item.value, item.help) for item in theirs]


@pytest.mark.parametrize(
    "words", [["--version"], ["--help"], ["ready"], ["notify", "BACKUP"], ["status"], ["ready", "--help"]], ids=" ".join
)
def test_short_commands_import_little(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom replicator.cli import main\n"
        f"try: main({words})\nexcept SystemExit: print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "DPVS_PROBE_RUNDIR": str(tmp_path / "run")},
    )  # fmt: skip
    known = done.stderr.splitlines()[-1].split()
    slow = {
        "asyncio",
        "ssl",
        "numpy",
        "cryptography",
        "elftools",
        "bcc",
        "scapy",
        "rich",
        "prometheus_client",
        "logging",
    }
    assert "replicator.lazy" in known
    assert slow.isdisjoint(known)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            continue
        assert isinstance(parameter, click.Option)
        assert parameter.help, parameter.name


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["attach"],
        ["attach", "--pid", "x"],
        ["attach", "--pid", "0"],
        ["attach", "--pid", "1", "--ring-pages", "3"],
        ["attach", "--pid", "1", "--require-peer", "1"],
        ["attach", "--pid", "1", "--peer"],
        ["attach", "--pid", "1", "--nonsense"],
        ["sessions", "--port", "70000"],
        ["sessions", "--limit", "0"],
    ],
)
def test_wrong_usage_is_status_2(run: Runner, arguments: list[str]) -> None:
    ran = run(*arguments)
    assert ran.status == 2
    assert "Usage: dpvs-probe" in ran.err or ran.err.startswith("Error: ")
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("command", ["doctor", "attach"])
def test_which_dpvs(run: Runner, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Without --pid all there are, are said; doctor takes the only one."""
    one = candidates.Candidate(os.getpid(), "/usr/bin/dpvs", "dpvs -x it", contained=False)
    monkeypatch.setattr(candidates, "running", lambda: [one, replace(one, pid=2, contained=True)])
    ran = run(command)
    assert ran.status == 2
    assert f"{os.getpid()} dpvs -x it; 2 dpvs -x it (in a container)" in ran.err
    monkeypatch.setattr(candidates, "running", list)
    assert "No DPVS runs" in run(command).err
    monkeypatch.setattr(candidates, "running", lambda: [one])
    ran = run(command)
    assert (ran.status, "is not DPVS" in ran.out) == ((1, True) if command == "doctor" else (2, False))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--peer", "nodeb"], "'nodeb' has no port"),
        (["--peer", "10.0.0.2:x"], "'10.0.0.2:x': 'x' is not a port (1 to 65535)"),
        (["--peer", "fd00::2:7777"], "'fd00::2:7777': an IPv6 address needs brackets around it"),
        (["--listen", "10.0.0.300:7777"], "'10.0.0.300:7777': '10.0.0.300' is neither an address nor a host name"),
        (["--node", ""], "'' cannot be a node's name"),
        (["--node", "x" * 65], f"'{'x' * 65}' cannot be a node's name"),
        (["--node", "own"], "'own' cannot be a node's name"),
    ],
)
def test_attach_refuses_what_is_written_wrong(run: Runner, arguments: list[str], says: str) -> None:
    assert run.complains("attach", "--pid", "1", *arguments) == says


def test_attach_needs_root(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in run.complains("attach", "--pid", "1")


def test_attach_to_what_is_not_there_or_no_dpvs(run: Runner, monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert run.complains("attach", "--pid", "4194303") == "there is no process 4194303"
    assert "is not DPVS" in run.complains("attach", "--pid", str(os.getpid()))
    assert not run_dir.exists(), "nothing was made for an attach that never began"


def test_nobody_to_ask(run: Runner, run_dir: Path) -> None:
    for command in ("status", "sessions", "peers", "detach"):
        assert "no dpvs-probe attach is running" in run.complains(command)
        assert "no dpvs-probe is attached to pid 7" in run.complains(command, "--pid", "7")
    assert str(run_dir) in run.complains("status")
    assert "/elsewhere" in run.complains("status", "--run-dir", "/elsewhere")


def test_status(run: Runner, node: SimulatedNode) -> None:
    ran = run("status", "--json")
    (status,) = map(json.loads, ran.out.splitlines())
    assert (ran.status, status["node"], status["sessions"]["own"]) == (0, "a", 3)
    assert ran.err == ""
    text = run("status", "--pid", "4711").out
    assert "node: a\n" in text
    assert "  own: 3\n" in text


def test_sessions(run: Runner, node: SimulatedNode) -> None:
    rows: list[dict[str, Any]] = [json.loads(line) for line in run("sessions", "--json").out.splitlines()]
    assert [row["client"] for row in rows] == ["10.0.0.0:1024", "10.0.0.1:1025", "10.0.0.2:1026"]
    header, line = run("sessions", "--port", "1025", "--proto", "tcp", "--state", "none").out.splitlines()
    assert header.split()[:5] == ["ORIGIN", "PROTO", "MODE", "STATE", "CLIENT"]
    assert line.split()[:5] == ["own", "tcp", "FNAT", "NONE", "10.0.0.1:1025"]
    assert len(run("sessions", "--json", "--limit", "2").out.splitlines()) == 2
    assert run("sessions", "--json", "--origin", "b").out == ""
    assert run.complains("sessions", "--state", "SLEEPING").startswith("'SLEEPING' is not a state of a session")
    assert run.complains("sessions", "--address", "nodeb") == "'nodeb' is not an IP address"


def test_peers(run: Runner, node: SimulatedNode) -> None:
    (line,) = run("peers", "--json").out.splitlines()
    row = json.loads(line)
    assert (row["direction"], row["state"], row["link"]["refused"]) == ("listen", "listening", 0)
    header, door = run("peers").out.splitlines()
    assert header.split() == [
        "DIRECTION", "NODE", "ADDRESS", "STATE", "FOR", "SESSIONS", "WAITING", "RECORDS", "BYTES", "SOURCE", "NOTE",
    ]  # fmt: skip
    assert door.split()[:4] == ["listen", "-", row["address"], "listening"]
    verbose = run("peers", "-v").out.splitlines()
    assert verbose[0] == f"listen {row['address']}:"
    assert "    refused: 0" in verbose


def test_ready(run: Runner, node: SimulatedNode) -> None:
    ran = run("ready", "--wait", "5")
    assert (ran.status, ran.out) == (0, "ready\n")


def test_ready_of_none(run: Runner) -> None:
    assert "no dpvs-probe attach is running" in run.complains("ready", "--wait", "0.3")


def test_detach(run: Runner, node: SimulatedNode) -> None:
    ran = run("detach")
    assert (ran.status, ran.out) == (0, "detached from pid 4711\n")
    assert node.task is not None
    assert "no dpvs-probe" in run.complains("status")


def test_doctor_of_no_dpvs(run: Runner) -> None:
    pytest.importorskip("bcc")
    ran = run("doctor", "--pid", str(os.getpid()))
    assert ran.status == 1
    assert "FAILED  process" in ran.out
    assert ran.out.endswith("attach would not work\n")
    ran = run("doctor", "--pid", str(os.getpid()), "--json")
    report = json.loads(ran.out)
    assert (ran.status, report["ok"]) == (1, False)
    assert [c["name"] for c in report["checks"] if c["ok"] is False][-1] == "process"


def test_a_reader_that_leaves_is_nobodys_fault(node: SimulatedNode, run_dir: Path) -> None:
    command = [sys.executable, "-c", "from replicator.cli import main; main(['sessions', '--json'])"]
    environment = {**os.environ, "DPVS_PROBE_RUNDIR": str(run_dir), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait() == 1


def test_an_interrupt_is_quiet(run: Runner, node: SimulatedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(module, "show", interrupted)
    ran = run("status")
    assert (ran.status, ran.out, ran.err) == (130, "", "\n")


def test_an_error_is_one_line_even_if_it_was_written_in_two() -> None:
    assert str(DpvsProbeError("one\n  two")) == "one two"
