# SPDX-License-Identifier: GPL-2.0-or-later
"""The unit of systemd: it is one, it asks for little, and what it leaves is enough to attach and to inject."""

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from replicator.cli_attach import attach, conflicts
from replicator.settings import Configuration, settings_of
from tests.available import ROOT
from tests.lab.manager import Manager
from tests.lab.node import COMMAND
from tests.lab.pair import Pair
from tests.lab.process import wait_for

UNIT = ROOT / "scripts/packaging/systemd/dpvs-probe.service"
CONFIGURATION = ROOT / "scripts/packaging/etc/dpvs-probe.conf"
MOST_EXPOSED = 3.0  # of 10; systemd calls up to 4 "OK"


def settings(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that is here: systemd looks for it."""
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace("/usr/bin/dpvs-probe", str(COMMAND)))
    return path


def test_systemd_takes_the_unit(unit: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_systemd_takes_the_unit_of_the_example(tmp_path: Path) -> None:
    example = ROOT / "docs/examples/routing/dpvs-announce.service"
    script = example.with_name("dpvs-announce")
    path = tmp_path / example.name
    text = example.read_text().replace("/usr/bin/dpvs-probe", str(COMMAND))
    path.write_text(text.replace("/etc/dpvs-probe/dpvs-announce", str(script)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (stopped,) = re.findall(r"^ExecStopPost=\S+ (.*)$", text, re.MULTILINE)
    steps = [f"{script} {word}; ip -oneline link show dpvs-vips" for word in ("ready", stopped)]
    script_of_all = "; ".join(
        ["ip link add dpvs-vips type veth peer name other", *steps]
    )  # not every kernel has dummies
    done = subprocess.run(["unshare", "--net", "sh", "-ec", script_of_all], capture_output=True, text=True, check=True)
    assert [",UP" in line for line in done.stdout.splitlines()] == [True, False]


def test_the_unit_exposes_little(unit: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(unit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"Overall exposure level for dpvs-probe.service: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) <= MOST_EXPOSED, done.stdout


def test_the_configuration_that_comes_with_it_is_right(tmp_path: Path) -> None:
    path = tmp_path / "dpvs-probe.conf"
    shutil.copy(CONFIGURATION, path)
    path.chmod(0o644)
    values = Configuration(settings_of(attach), str(path), required=True, conflicts=conflicts).values
    assert (values["pid_file"], values["metrics"], values["peers"]) == ("/var/run/dpvs.pid", "9147", ())


@pytest.mark.needs("bpf", "twin", "agent")
def test_what_it_leaves_is_enough(pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Attached, probed and injected with the unit's capabilities and system calls only; the manager hears of it."""
    confined = [sys.executable, "-m", "tests.lab.confined", str(UNIT), str(COMMAND)]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        for node in (pair.a, pair.b):
            monkeypatch.setattr(node, "attach_command", lambda: confined)
        pair.replicate(extra=("--metrics", "*:9147"))
        heard = manager.recv(4096).decode()
    assert heard == f"READY=1\nSTATUS=attached to pid {pair.b.pid}"
    probe = pair.a.attached[0]
    status = dict(line.split(":", 1) for line in Path(f"/proc/{probe.pid}/status").read_text().splitlines())
    assert bin(int(status["CapEff"], 16)).count("1") == len(settings("CapabilityBoundingSet")[0].split())
    assert (status["NoNewPrivs"].strip(), status["Seccomp"].strip()) == ("1", "2")
    steady = pair.steady(5)
    wait_for("copies in b", lambda: len(pair.b.sessions()) == 5, 10)
    assert probe.status()["events"]["created"] >= 5
    assert steady.finish()["alive"] == 5
    assert probe.stop() == 0


def test_a_running_systemd_starts_reloads_and_watches_it(tmp_path: Path) -> None:
    """Notification, reload, watchdog and restart by systemd itself. There is no DPVS: the service waits for one."""
    configuration = tmp_path / "probe.conf"
    configuration.write_text(f"[sync]\npid_file = {tmp_path}/dpvs.pid\n")
    manager = Manager(tmp_path / "manager")
    kept = ("Type", "NotifyAccess", "ExecReload", "Restart", "RestartSec", "KillMode", "TimeoutStartSec")
    lines = [f"{name}={value}" for name in kept for value in settings(name)]
    command = f"{COMMAND} attach --config {configuration} --run-dir {tmp_path}/run"
    lines += [f"ExecStart={command}", "WatchdogSec=10"]
    check = f"{COMMAND} config check {configuration}"
    unit = "\n".join(["[Service]", *lines, ""]).replace("/usr/bin/dpvs-probe config check", check)
    (manager.units / UNIT.name).write_text(unit)
    with manager:
        assert manager.ctl("start", UNIT.name) == (0, "")  # returns when it has said that it is up
        assert manager.show(UNIT.name, "ActiveState") == "active"
        assert manager.show(UNIT.name, "StatusText").startswith("waiting for a DPVS")
        first = manager.show(UNIT.name, "MainPID")
        configuration.write_text(f"[sync]\npid_file = {tmp_path}/dpvs.pid\nsync_interval = 30\n")
        assert manager.ctl("reload", UNIT.name) == (0, "")
        said = manager.directory / "systemd.log"
        wait_for("what was reloaded", lambda: manager.show(UNIT.name, "ActiveState") == "active", 10)
        assert manager.show(UNIT.name, "MainPID") == first
        # It hangs: the watchdog ends it, and another is started.
        assert manager.ctl("kill", "--signal=STOP", UNIT.name) == (0, "")
        wait_for("another one", lambda: manager.show(UNIT.name, "NRestarts") == "1", 40, 0.2)
        wait_for("it is up", lambda: manager.show(UNIT.name, "ActiveState") == "active", 40, 0.2)
        assert manager.show(UNIT.name, "MainPID") not in (first, "0"), said.read_text()
        assert manager.ctl("stop", UNIT.name) == (0, "")
        assert manager.show(UNIT.name, "Result") == "success"
