# SPDX-License-Identifier: GPL-2.0-or-later
"""DPVS ends and another one takes its place on the same machine: what it had comes back."""

import json
import signal
import time

import pytest

from tests.lab.node import Node
from tests.lab.pair import Pair
from tests.lab.process import wait_for
from tests.lab.restart import attach, restart, stored, stores, wait_until_stored

pytestmark = [pytest.mark.dpvs, pytest.mark.needs("bpf", "agent")]
TALKING, IDLE = 40, 7
STALL_S, WAIT_S = 60, 30


def own(node: Node) -> int:
    return int(node.attached[-1].status()["sessions"]["own"])


@pytest.mark.pair(established_timeout_s=600)
def test_dpvs_restarted_twice(pair: Pair) -> None:
    """In order; and with dpvs-probe, both by SIGKILL. Those that say nothing are carried through both times, and go on
    with their next segment.
    """
    pair.kill("b")  # this is about one machine
    attach(pair.a)
    quiet = [pair.connect(7) for _ in range(IDLE)]
    steady = pair.steady(TALKING, stall=STALL_S)
    wait_until_stored(pair.a, TALKING + IDLE)
    for how, crash in ((signal.SIGTERM, False), (signal.SIGKILL, True)):
        done = restart(pair, how=how, crash=crash)
        assert done.restored["in_dpvs"] == TALKING + IDLE, done
        assert done.restored["refused"] == {}
        wait_for("those that talk are its own", lambda: own(pair.a) == TALKING, WAIT_S)
        wait_for("and stored", lambda: stored(pair.a) == TALKING, 10)
        print("\n".join(done.lines()))
        time.sleep(1)  # TCP waits as long as it did last until it has measured anew
    for connection in quiet:
        connection.sendall(b"still here")
        assert connection.recv(100) == b"still here"
    wait_for("all are its own", lambda: own(pair.a) == TALKING + IDLE, WAIT_S)
    report = steady.finish()
    print(f"longest pause of {TALKING} connections {report['longest_gap_ms']:.0f} ms")
    assert report["alive"] == TALKING, report
    assert report["corrupted"] == 0, report
    for connection in quiet:
        connection.close()
    wait_for("it counts nothing any more", lambda: pair.a.counters().idle, 120, 0.5)


@pytest.mark.pair(established_timeout_s=600)
def test_a_restart_beside_a_peer(pair: Pair) -> None:
    """The peer takes what it has of the DPVS that died for its own, until packets say whose it is."""
    links = ("--listen", pair.sync_address("a"), "--peer", pair.sync_address("b"))
    pair.b.probe("--listen", pair.sync_address("b"), "--peer", pair.sync_address("a"))
    attach(pair.a, *links)
    steady = pair.steady(TALKING, stall=STALL_S)
    wait_until_stored(pair.a, TALKING)
    wait_for("copies in b", lambda: len(pair.b.sessions()) == TALKING, 20)
    done = restart(pair, options=links)
    assert done.restored["sessions"] == TALKING, done
    wait_for("all are a's own", lambda: (own(pair.a), own(pair.b)) == (TALKING, 0), 60)
    wait_for("copies of all in b again", lambda: len(pair.b.sessions()) == TALKING, 20)
    report = steady.finish()
    assert (report["alive"], report["corrupted"]) == (TALKING, 0), report


@pytest.mark.pair(established_timeout_s=600)
def test_a_service_brings_them_back_by_itself(pair: Pair) -> None:
    """One dpvs-probe, told of DPVS by its pid file: it waits for the next DPVS and puts back what its store has."""
    pair.kill("b")  # this is about one machine
    service = attach(pair.a, "--pid-file", str(pair.a.pid_file))
    steady = pair.steady(TALKING, stall=STALL_S)
    wait_until_stored(pair.a, TALKING)
    pair.network.gate(is_open=False)
    pair.kill("a")
    wait_for("it is not ready any more", lambda: pair.a.command("ready").returncode != 0, 10)
    pair.start("a")
    ready = pair.a.command("ready", "--wait", "240", timeout=300)
    assert ready.returncode == 0, ready.stdout + ready.stderr + service.process.tail()
    pair.network.gate(is_open=True)
    status = service.status()
    assert (status["pid"], status["probe_pid"]) == (pair.a.pid, service.process.pid)
    assert status["store"]["restored"][0]["in_dpvs"] == TALKING, status["store"]
    wait_for("those that talk are its own", lambda: own(pair.a) == TALKING, WAIT_S)
    report = steady.finish()
    assert (report["alive"], report["corrupted"]) == (TALKING, 0), report
    assert service.stop() == 0


@pytest.mark.pair(established_timeout_s=600)
def test_snapshots(pair: Pair) -> None:
    """Saved by hand from a running attach, looked at, and refused or restored."""
    pair.kill("b")
    pair.a.probe("--listen", pair.sync_address("a"))
    file = pair.directory / "a.snapshot"
    steady = pair.steady(TALKING, stall=STALL_S)
    wait_for("all are its own", lambda: own(pair.a) == TALKING, 20)
    saved = pair.a.command("snapshot", "save", str(file))
    assert saved.stdout.startswith(f"{TALKING} sessions in {file}"), saved.stdout + saved.stderr
    again = pair.a.command("snapshot", "restore", str(file))
    assert again.returncode == 1
    assert "it is of the very DPVS that runs here" in again.stderr
    seen = json.loads(pair.a.command("snapshot", "inspect", "--json", str(file)).stdout)
    assert (seen["node"], seen["sessions"], seen["states"]) == ("a", TALKING, {"ESTABLISHED": TALKING})
    pair.network.gate(is_open=False)
    pair.kill("a")
    assert pair.a.attached[-1].process.wait(60) == 3
    pair.start("a")
    tried = pair.a.command("attach", "--dry-run", "--pid", str(pair.a.pid), "--node", "a", "--store", str(file))
    assert f"{file}: {TALKING} sessions would be put back, 0 are too old" in tried.stdout, tried.stdout
    pair.a.probe("--listen", pair.sync_address("a"))
    data = file.read_bytes()
    file.write_bytes(data[:-4096])
    refused = pair.a.command("snapshot", "restore", str(file))
    assert refused.returncode == 1
    assert "cut short" in refused.stderr
    file.write_bytes(data)
    back = pair.a.command("snapshot", "restore", str(file))
    assert back.returncode == 0, back.stdout + back.stderr
    assert back.stdout == f"{TALKING} of {TALKING} sessions are in DPVS\n"
    pair.network.gate(is_open=True)
    assert len(pair.a.sessions()) == TALKING
    wait_for("they are its own", lambda: own(pair.a) == TALKING, WAIT_S)
    assert steady.finish()["alive"] == TALKING
    assert not stores(pair.a).exists()
