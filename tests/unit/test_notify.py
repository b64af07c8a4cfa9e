# SPDX-License-Identifier: GPL-2.0-or-later
"""What keepalived and routing daemons ask and say."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from replicator.cli import cli
from replicator.cli_notify import BadNotification, state_of
from replicator.rundir import RunDir


@pytest.mark.parametrize(
    ("words", "state"),
    [
        (("MASTER",), "MASTER"),
        (("backup",), "BACKUP"),
        (("INSTANCE", "services", "MASTER", "100"), "MASTER"),
        (("GROUP", "all", "FAULT"), "FAULT"),
        (("INSTANCE", "MASTER", "STOP", "0"), "STOP"),
        (("INSTANCE", "services", "MASTER_RX_LOWER_PRI", "100"), None),
    ],
)
def test_states(words: tuple[str, ...], state: str | None) -> None:
    assert state_of(words) == state


@pytest.mark.parametrize("words", [("UP",), ("INSTANCE", "x"), ("A", "B", "MASTER"), ("MASTER", "now"), ("",)])
def test_other_words(words: tuple[str, ...]) -> None:
    with pytest.raises(BadNotification, match="no state of keepalived"):
        state_of(words)


class Attach:
    """Answers on the admin socket of pid 77 as an attach would."""

    def __init__(self, path: Path) -> None:
        self.asked: list[dict[str, Any]] = []
        self.ready, self.refused = True, {}
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(os.fspath(path / "77.sock"))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection, connection.makefile("rwb") as stream:
                text = stream.readline()
                if not text:
                    continue
                request = json.loads(text)
                if request["command"] == "quit":
                    return
                self.asked.append(request)
                status = {"ready": self.ready, "waiting_for": "" if self.ready else "peers", "injection": {}}
                answer = {"installed": 5, "took_ms": 7.0, "refused": self.refused}
                line = status if request["command"] == "status" else answer
                stream.write(json.dumps(line).encode() + b'\n{"done": true}\n')

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(self._socket.getsockname())
            last.sendall(b'{"command": "quit"}\n')
            self._thread.join()
        self._socket.close()


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.prepare()
    return made


@pytest.fixture
def attach(run_dir: RunDir) -> Iterator[Attach]:
    running = Attach(run_dir.path)
    yield running
    running.close()


def notify(run_dir: RunDir, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["notify", "--run-dir", str(run_dir.path), *words], standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.return_value, done.output


def test_every_state_is_told_and_kept(run_dir: RunDir, attach: Attach) -> None:
    assert not run_dir.was_promoted()
    assert notify(run_dir, "INSTANCE", "services", "MASTER", "100") == (
        0, "MASTER: 5 sessions of peers are in DPVS, after 7 ms\n",
    )  # fmt: skip
    assert run_dir.was_promoted()
    assert notify(run_dir, "INSTANCE", "services", "MASTER_RX_LOWER_PRI", "100")[0] == 0
    attach.refused = {"no_laddr": 3}
    status, text = notify(run_dir, "MASTER", "--wait", "3")
    assert (status, text) == (1, "MASTER: 5 sessions of peers are in DPVS, after 7 ms, refused: 3 no_laddr\n")
    attach.refused = {}
    for state in ("BACKUP", "FAULT", "STOP", "DELETED"):
        assert notify(run_dir, state)[0] == 0
        assert not run_dir.was_promoted()
    assert [(one["command"], one.get("wait")) for one in attach.asked] == [
        ("promote", 10.0), ("promote", 3.0), *[("demote", None)] * 4,
    ]  # fmt: skip


def test_no_attach_yet(run_dir: RunDir) -> None:
    status, text = notify(run_dir, "MASTER")
    assert (status, "the next one begins so" in text, run_dir.was_promoted()) == (0, True, True)


def test_following(run_dir: RunDir, attach: Attach, tmp_path: Path) -> None:
    """A file and a command say each change, and that nobody looks any more."""
    file, log, script = tmp_path / "ready", tmp_path / "log", tmp_path / "script"
    script.write_text(f'#!/bin/sh\necho "$@" >>{log}\n')
    script.chmod(0o700)
    attach.ready = False
    process = subprocess.Popen(
        [Path(sys.executable).parent / "dpvs-probe", "ready", "--follow", "--run-dir", str(run_dir.path), "--file",
         str(file), "--run", f"{script} now"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None

    def says(value: str, line: str) -> None:
        assert process.stdout is not None
        assert process.stdout.readline() == line
        deadline = time.monotonic() + 10
        told = "now ready\n" if value == "0\n" else "now not-ready\n"
        while not (log.exists() and file.read_text() == value and log.read_text().endswith(told)):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    try:
        says("1\n", "not ready: peers\n")
        attach.ready = True
        says("0\n", "ready\n")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert file.read_text() == "1\n"
    assert log.read_text() == "now not-ready\nnow ready\nnow not-ready\n"
