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
