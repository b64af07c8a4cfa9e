# SPDX-License-Identifier: GPL-2.0-or-later
"""The archive for a maintainer holds what helps, and no key."""

import gzip
import os
import stat
import tarfile
from pathlib import Path

import pytest

from replicator.keys import init_authority, issue
from replicator.rundir import RunDir
from replicator.sysdump import GONE, Member, collect, scrub, secrets_of, write


def members_of(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        out = {}
        for entry in archive.getmembers():
            file = archive.extractfile(entry)
            assert file is not None
            out[entry.name.partition("/")[2]] = file.read()
    return out


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A node's directory of keys, and the authority's inside of it, as somebody might have it."""
    directory = tmp_path / "keys"
    init_authority(directory / "authority", "east")
    issue(directory / "authority", "lb1")
    return directory


def private_lines(directory: Path) -> list[bytes]:
    out = []
    for path in directory.rglob("*"):
        if path.is_file() and b"PRIVATE KEY" in path.read_bytes():
            out += [line for line in path.read_bytes().splitlines() if b"-----" not in line]
    return out


def test_no_private_key_whatever_is_asked_for(keys: Path, tmp_path: Path) -> None:
    """Even where keys are named as configuration and log, whole, in pieces, or indented."""
    lines = private_lines(keys)
    assert len(lines) >= 2
    private = [path for path in keys.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
    log = tmp_path / "log"
    log.write_bytes(b"it broke at\n  " + lines[0] + b"\n" + b"| " + lines[1] + b" |\n" + private[0].read_bytes()[:-60])
    target = tmp_path / "dump.tar.gz"
    found = collect(os.getpid(), RunDir(tmp_path / "run"), "1", configs=private, logs=[log], keys=keys, sessions=True)
    assert write(target, found, secrets_of(keys)) > 20
    plain = gzip.decompress(target.read_bytes())
    for line in lines:
        assert line not in plain
    assert b"PRIVATE KEY" not in plain
    assert GONE in members_of(target)[f"logs{log}"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    names = members_of(target)["keys"].decode()
    assert all(str(path) in names for path in private), "names and modes help, and give nothing away"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (b"[sync]\npassword = hunter2\nlisten = *:7700\n", b"hunter2"),
        (b"  etcd_password: hunter2\n", b"hunter2"),
        (b'"token": "hunter2",\n', b"hunter2"),
        (b"auth_pass hunter2\n", b"hunter2"),
        (b"etcd = https://root:hunter2@10.0.0.1:2379\n", b"hunter2"),
        (b"x\n-----BEGIN EC PRIVATE KEY-----\nhunter2\n-----END EC PRIVATE KEY-----\ny\n", b"hunter2"),
        (b"-----BEGIN PRIVATE KEY-----\nhunter2 and cut off", b"hunter2"),
    ],
)
def test_what_is_named_as_secret(text: bytes, secret: bytes) -> None:
    said = scrub(text)
    assert secret not in said
    assert GONE in said


def test_all_else_stays() -> None:
    text = b"[sync]\nlisten = *:7700\nkeys = /etc/dpvs-probe/keys\n-----BEGIN CERTIFICATE-----\nMII\n"
    assert scrub(text) == text


def test_what_it_holds_of_a_process(tmp_path: Path) -> None:
    found = {
        one.name: one.data for one in collect(os.getpid(), RunDir(tmp_path / "run"), "9.9", keys=tmp_path / "none")
    }
    assert b'"version": "9.9"' in found["versions.json"]
    base = f"dpvs-{os.getpid()}"
    assert b"[stack]" in found[f"{base}/proc/maps"]
    assert b"cpus" in found[f"{base}/threads"]
    assert b'"name": "process"' in found[f"{base}/doctor.json"]
    assert found[f"{base}/process.json"].startswith(b"not to be had: "), "this is no DPVS"
    assert f"{base}/sessions.json" not in found


def test_an_archive_that_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write(path, [Member("a", b"b")], [])
    assert path.read_bytes() == b"mine"
