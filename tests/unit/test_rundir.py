# SPDX-License-Identifier: GPL-2.0-or-later
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from replicator.rundir import AlreadyAttached, BadRunDir, ManyAttached, NotAttached, RunDir


@pytest.fixture
def rundir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def listen(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def test_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DPVS_PROBE_RUNDIR", raising=False)
    assert RunDir().path == Path("/run/dpvs-probe")
    monkeypatch.setenv("DPVS_PROBE_RUNDIR", "/tmp/elsewhere")
    assert RunDir().path == Path("/tmp/elsewhere")
    assert RunDir("/tmp/named").path == Path("/tmp/named")


def test_is_made_for_us_alone(rundir: RunDir) -> None:
    rundir.prepare()
    assert rundir.path.stat().st_mode & 0o777 == 0o700


def test_refuses_what_others_can_write(rundir: RunDir) -> None:
    rundir.path.mkdir()
    rundir.path.chmod(0o777)
    with pytest.raises(BadRunDir, match="others may write"):
        rundir.prepare()
    assert rundir.path.stat().st_mode & 0o777 == 0o777, "a directory that we did not make keeps its mode"


def test_refuses_a_file_and_a_long_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadRunDir, match="cannot use run directory"):
        RunDir(tmp_path / "file" / "below").prepare()
    with pytest.raises(BadRunDir, match="too long"):
        RunDir(tmp_path / ("x" * 100)).prepare()


def test_one_attach_a_process(rundir: RunDir) -> None:
    with rundir.lock(7):
        assert rundir.holder(7) == os.getpid()
        says = rf"another dpvs-probe \(pid {os.getpid()}\) is attached to pid 7"
        with pytest.raises(AlreadyAttached, match=says), rundir.lock(7):
            pass
        with rundir.lock(8):
            pass
    assert not rundir.lock_path(7).exists()
    assert rundir.holder(7) is None
    with rundir.lock(7):
        pass


def test_the_lock_ends_with_its_holder(rundir: RunDir) -> None:
    code = (
        "import os, sys; from replicator.rundir import RunDir; lock = RunDir(sys.argv[1]).lock(7); lock.__enter__();"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(rundir.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        assert rundir.holder(7) == child.pid
        child.kill()
        child.wait()
    assert rundir.lock_path(7).exists()
    assert rundir.holder(7) is None
    with rundir.lock(7):
        assert rundir.holder(7) == os.getpid()


def test_choose_and_sweep(rundir: RunDir) -> None:
    with pytest.raises(NotAttached, match="no dpvs-probe attach is running"):
        rundir.choose(None)
    rundir.prepare()
    listen(rundir.socket_path(5)).close()  # leaves its socket behind
    rundir.lock_path(5).touch()
    (rundir.path / "other.sock").touch()
    (rundir.path / "\N{SUPERSCRIPT TWO}.sock").touch()
    with listen(rundir.socket_path(6)):
        assert rundir.choose(None) == 6
        assert not rundir.socket_path(5).exists()
        assert not rundir.lock_path(5).exists()
        assert rundir.choose(6) == 6
        with pytest.raises(NotAttached, match="attached to pid 9"):
            rundir.choose(9)
        with listen(rundir.socket_path(12)), pytest.raises(ManyAttached, match="pids 6, 12"):
            rundir.choose(None)
    assert (rundir.path / "other.sock").exists()


def test_an_attach_that_is_just_starting_is_not_swept(rundir: RunDir) -> None:
    with rundir.lock(5):
        listen(rundir.socket_path(5)).close()
        assert rundir.attached() == []
        assert rundir.socket_path(5).exists()
        assert rundir.holder(5) == os.getpid()
