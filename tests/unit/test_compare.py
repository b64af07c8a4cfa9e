# SPDX-License-Identifier: GPL-2.0-or-later
"""Tables compared, and where they come from."""

import asyncio
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from collector import record
from collector.record import Records, identity
from replicator.admin import Line
from replicator.compare import compare, fields, losses
from replicator.rundir import RunDir
from replicator.sources import BadSource, Sessions, Source, export, parse
from tests.unit.session_records import sessions


def lines_of(records: Records, *, whole: bool = True, origin: str = "a") -> list[Line]:
    async def all_of() -> list[Line]:
        ages = np.arange(len(records)) * 10
        present = np.ones(len(records), np.bool_)
        return [line async for block in export(records, present, ages, origin, whole=whole) for line in block]

    return asyncio.run(all_of())


def test_equal_tables_in_other_slots() -> None:
    one, other = sessions(50), sessions(50)[::-1].copy()
    other["slot"] += 7
    other["generation"], other["worker"], other["rs_end_seq"], other["claim"] = 9, 3, 4, 5
    assert compare(one, other).total == 0
    assert fields(one[0], other[-1]) == {}


def test_what_differs() -> None:
    one, other = sessions(50), sessions(50, first=2)
    other["state"][5] = record.FIN_WAIT
    other["fnat_delta"][6] += 1
    found = compare(one, other)
    assert found.missing.tolist() == [0, 1]
    assert found.extra.tolist() == [48, 49]
    assert found.changed.tolist() == [[7, 5], [8, 6]]
    assert fields(one[7], other[5]) == {"state": ("1", "4")}
    assert list(fields(one[8], other[6])) == ["fnat_delta"]
    assert compare(one, one[:0]).missing.tolist() == list(range(50))
    assert compare(one[:0], one).extra.tolist() == list(range(50))


def test_losses() -> None:
    before = sessions(6)
    before["state"][5] = record.SYN_RECV
    ages = np.array([5000, 5000, 100, 300, 5000, 5000])
    found = losses(before, ages, identity(before[[0]]), 200)
    assert (found.lost.tolist(), found.young.tolist(), found.not_kept.tolist()) == ([1, 3, 4], [2], [5])


class TestExport:
    def test_goes_there_and_back(self) -> None:
        for count in (0, 1, 700):
            records = sessions(count)
            found, last = parse(lines_of(records), "x")
            assert found is not None
            assert (last["sessions"], found.origin, found.age_ms.tolist()) == (
                count,
                "a",
                [10 * k for k in range(count)],
            )
            assert found.records.tobytes() == records.tobytes()
            digest = lines_of(records, whole=False)
            assert digest == [last]

    def test_what_is_damaged_is_refused(self) -> None:
        lines = lines_of(sessions(600))
        for damage in (
            lines[:-1],
            lines[1:],
            [{"records": "AAAA", "age_ms": []}, *lines],
            [{"sessions": 1}],
            [{}],
            [{**lines[0], "age_ms": [10**40] * 512}, *lines[1:]],
        ):
            with pytest.raises(BadSource):
                parse(damage, "x")

    def test_only_a_digest(self) -> None:
        found, last = parse(lines_of(sessions(5), whole=False), "x")
        assert found is None
        assert last["sessions"] == 5


class TestSources:
    @pytest.fixture
    def run_dir(self, tmp_path: Path) -> RunDir:
        return RunDir(tmp_path / "run")

    def file(self, path: Path, records: Records) -> str:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines_of(records)))
        return str(path)

    def test_a_file(self, tmp_path: Path, run_dir: RunDir) -> None:
        name = self.file(tmp_path / "x", sessions(9))
        source = Source(name, run_dir)
        assert not source.live
        assert source.digest() is None
        found = source.sessions()
        assert isinstance(found, Sessions)
        assert len(found.records) == len(source.tuples()) == 9

    def test_another_machine(self, tmp_path: Path, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file(tmp_path / "x", sessions(9))
        ssh = tmp_path / "bin" / "ssh"
        ssh.parent.mkdir()
        ssh.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked\ncat {tmp_path}/x\n')
        ssh.chmod(0o700)
        monkeypatch.setenv("PATH", f"{ssh.parent}{os.pathsep}{os.environ['PATH']}")
        assert len(Source("ssh:lb2@lb1", run_dir).sessions().records) == 9
        assert (tmp_path / "asked").read_text() == "-o BatchMode=yes -- lb2 dpvs-probe diff --export @lb1\n"
        ssh.write_text("#!/bin/sh\necho no such host >&2\nexit 255\n")
        with pytest.raises(BadSource, match="no such host"):
            Source("ssh:lb2", run_dir).sessions()

    @pytest.mark.parametrize("text", ["", "x.sock", "ssh:", "ssh:-oProxyCommand=x", "dpvs:", "-5", "/dev/null"])
    def test_what_is_none(self, text: str, run_dir: RunDir) -> None:
        with pytest.raises(BadSource):
            Source(text, run_dir)

    def test_files_that_are_none(self, tmp_path: Path, run_dir: RunDir) -> None:
        path = tmp_path / "x"
        for data in (b"", b"hello", b"[1]\n", b'{"records": 5}\n', b'{"origin": "a", "sessions": 3, "digest": "0"}\n'):
            path.write_bytes(data)
            with pytest.raises(BadSource):
                Source(str(path), run_dir).sessions()

    def test_losses_by_the_script(self, tmp_path: Path) -> None:
        import subprocess

        script = Path(__file__).parents[2] / "scripts" / "check_session_loss.py"
        before, after = (
            self.file(tmp_path / "before", sessions(40)),
            self.file(tmp_path / "after", sessions(38, first=2)),
        )

        def run(*words: str) -> "subprocess.CompletedProcess[str]":
            return subprocess.run(
                [sys.executable, script, before, after, *words], capture_output=True, text=True, check=False
            )

        young = run("--young", "11")
        assert young.returncode == 0
        assert young.stdout.startswith("40 sessions of a: 38 kept, 0 lost, 2 lost that were younger than 11 ms, 0 of")
        older = run("--young", "5")
        assert older.returncode == 1
        assert "1 lost, 1 lost that were younger" in older.stdout
        assert "lost: tcp 10.0.0.1:1025 11.0.0.0:80" in older.stdout
        (tmp_path / "after").write_text("?")
        assert run().returncode == 2
