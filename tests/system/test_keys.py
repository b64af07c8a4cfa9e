# SPDX-License-Identifier: GPL-2.0-or-later
"""Links with keys: two nodes of one authority replicate, and who is not of it learns nothing."""

import signal
import subprocess
from pathlib import Path

import pytest

from tests.lab.node import COMMAND
from tests.lab.pair import Pair
from tests.lab.process import wait_for

pytestmark = [pytest.mark.needs("bpf", "agent")]
CONNECTIONS = 20


def keys(*arguments: str | Path) -> None:
    subprocess.run([COMMAND, "keys", *arguments], check=True, capture_output=True, timeout=60)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """Directory with the keys of nodes a and b of one authority, and of an a of another one."""
    for authority in ("ours", "theirs"):
        keys("init", "--dir", tmp_path / authority, "--name", authority)
        for node in ("a", "b"):
            keys("issue", node, "--dir", tmp_path / authority, "--out", tmp_path / f"{authority}-{node}")
    return tmp_path


def attach(pair: Pair, a_keys: Path, b_keys: Path) -> None:
    listen = pair.sync_address("b")
    pair.b.probe("--keys", str(b_keys), "--listen", listen)
    pair.a.probe("--keys", str(a_keys), "--peer", listen)


def test_sessions_cross_an_encrypted_link(pair: Pair, cluster: Path) -> None:
    steady = pair.steady(CONNECTIONS)
    attach(pair, cluster / "ours-a", cluster / "ours-b")
    wait_for("all sessions injected in b", lambda: len(pair.b.sessions()) == CONNECTIONS, 20)
    assert "proven and encrypted as node b" in pair.b.command("status", check=True).stdout
    pair.kill("a")
    pair.active("b")
    wait_for("traffic on b", lambda: pair.b.counters().active == CONNECTIONS, 20)
    report = steady.finish()
    assert report["alive"] == CONNECTIONS, report
    assert report["corrupted"] == 0, report


def test_a_node_of_another_authority_is_refused_and_tells_nothing(pair: Pair, cluster: Path) -> None:
    steady = pair.steady(CONNECTIONS)
    attach(pair, cluster / "theirs-a", cluster / "ours-b")
    wait_for("a says it is not trusted", lambda: "no trust" in pair.a.attached[0].process.tail(), 10)
    assert len(pair.b.sessions()) == 0
    assert steady.finish()["alive"] == CONNECTIONS


def test_a_node_without_keys_does_not_talk_to_one_with_keys(pair: Pair, cluster: Path) -> None:
    listen = pair.sync_address("b")
    pair.b.probe("--keys", str(cluster / "ours-b"), "--listen", listen)
    pair.a.probe("--insecure", "--peer", listen)
    wait_for("b says why", lambda: "does not speak TLS" in pair.b.attached[0].process.tail(), 15)
    assert len(pair.b.sessions()) == 0


def test_new_keys_without_a_restart(pair: Pair, cluster: Path) -> None:
    """SIGHUP reads keys again; those that are no good leave the old ones in use."""
    attach(pair, cluster / "ours-a", cluster / "ours-b")
    probe = pair.a.attached[0]
    keys("issue", "a", "--dir", cluster / "ours", "--out", cluster / "ours-a", "--days", "1", "--force")
    probe.process.signal(signal.SIGHUP)
    wait_for("new keys in use", lambda: "keys read again" in probe.log.read_text(), 10)
    (cluster / "ours-a" / "node.key").unlink()
    probe.process.signal(signal.SIGHUP)
    wait_for("no key, and said so", lambda: "the keys stay as they were" in probe.log.read_text(), 10)
    steady = pair.steady(CONNECTIONS)
    wait_for("all sessions injected in b", lambda: len(pair.b.sessions()) == CONNECTIONS, 20)
    assert steady.finish()["alive"] == CONNECTIONS


def test_without_keys_only_when_told_so(pair: Pair) -> None:
    """--insecure on both sides: it works, and says loudly what it is."""
    steady = pair.steady(CONNECTIONS)
    pair.replicate(extra=("--insecure",))
    wait_for("all sessions injected in b", lambda: len(pair.b.sessions()) == CONNECTIONS, 20)
    for node in (pair.a, pair.b):
        assert "NOT PROTECTED" in node.attached[0].log.read_text()
        assert node.attached[0].status()["links"] == "tcp, not protected"
    assert steady.finish()["alive"] == CONNECTIONS


def test_shared_memory_carries_sessions_sealed(pair: Pair, cluster: Path) -> None:
    steady = pair.steady(CONNECTIONS)
    where = f"shm:{cluster / 'b.shm'}"
    pair.b.probe("--mode", "shm", "--keys", str(cluster / "ours-b"), "--listen", where)
    pair.a.probe("--mode", "shm", "--keys", str(cluster / "ours-a"), "--peer", where)
    wait_for("all sessions injected in b", lambda: len(pair.b.sessions()) == CONNECTIONS, 20)
    assert "shm, proven and encrypted as node b" in pair.b.command("status", check=True).stdout
    assert steady.finish()["alive"] == CONNECTIONS


def test_a_mode_never_becomes_another(pair: Pair) -> None:
    if Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir()):
        pytest.skip("this machine has RDMA")
    peer = pair.a.with_keys("--peer", pair.sync_address("b"))
    ran = pair.a.command("attach", "--pid", str(pair.a.pid), "--mode", "rdma", *peer)
    assert ran.returncode == 1
    assert "RDMA" in ran.stderr
    assert "Traceback" not in ran.stderr
    ran = pair.a.command("attach", "--pid", str(pair.a.pid), "--mode", "shm", *peer)
    assert ran.returncode == 1
    assert "shm:/PATH" in ran.stderr
