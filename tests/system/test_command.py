# SPDX-License-Identifier: GPL-2.0-or-later
"""The command where something is wrong: one line that says what, one that says what to do, and the target untouched."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from probes.packets import Packets
from tests.lab.net import inside
from tests.lab.node import COMMAND, Node
from tests.lab.pair import Pair
from tests.lab.process import start_time, wait_for

pytestmark = [pytest.mark.needs("bpf")]
NOBODY = 65534


def complaint(done: "subprocess.CompletedProcess[str]", *words: str) -> str:
    """The one line of a refused command; asserts the form that every error has."""
    assert done.returncode == 1, done
    lines = done.stderr.strip().splitlines()
    said = [line for line in lines if line.startswith("dpvs-probe: ")]
    assert len(said) == 1, done.stderr
    assert lines[-1].startswith("  "), "a line of advice must follow"
    assert "Traceback" not in done.stderr
    for word in words:
        assert word.lower() in said[0].lower(), done.stderr
    return said[0]


def fingerprint(node: Node) -> tuple[int | None, str, list[str]]:
    """What an attach would change in a process: threads, and what is mapped that was not."""
    tasks = sorted(
        Path(f"/proc/{node.pid}/task/{tid}/comm").read_text() for tid in os.listdir(f"/proc/{node.pid}/task")
    )
    files = sorted(
        {line.split()[5] for line in Path(f"/proc/{node.pid}/maps").read_text().splitlines() if len(line.split()) > 5}
    )
    return start_time(node.pid), " ".join(tasks), [name for name in files if "map_" not in name]


@pytest.mark.dpvs
class TestRefusals:
    """One node for many refusals: each must leave it as it was."""

    def test_each_of_them(self, pair: Pair) -> None:
        node = pair.a
        before = fingerprint(node)
        pid = str(node.pid)
        steady = pair.steady(10)

        def refused(target: str, *arguments: str) -> str:
            return complaint(node.command("attach", "--pid", target, *node.with_keys(*arguments)))

        assert "4194303" in refused("4194303")
        assert str(os.getpid()) in refused(str(os.getpid()))
        assert "0.0.1" in refused(pid, "--layout", "0.0.1")
        unreachable = pair.sync_address("b", 9)
        assert unreachable in refused(pid, "--peer", unreachable, "--require-peer", "1")
        refused(pid, "--peer", "no-such-host.invalid:7777", "--require-peer", "1")
        with inside(pair.network.path("a")), socket.create_server((pair.plan.sync("a"), 7777)):
            taken = pair.sync_address("a")
            assert taken in refused(pid, "--listen", taken)
        assert "203.0.113.1" in refused(pid, "--listen", "203.0.113.1:7777")
        without = refused(pid, "--listen", pair.sync_address("a"), "--keys", "/no/such/directory")
        assert "links need keys, and there is no /no/such/directory" in without
        for asks in ("status", "sessions", "peers", "detach"):
            complaint(node.command(asks, "--pid", pid), "attached")

        assert fingerprint(node) == before
        assert node.alive
        assert steady.finish()["alive"] == 10

    def test_without_root(self, pair: Pair) -> None:
        before = fingerprint(pair.a)
        if not readable_by_nobody():
            pytest.skip("this tree cannot be read by another user")
        for command in (["attach"], ["doctor"]):
            done = as_nobody(*command, "--pid", str(pair.a.pid))
            if command == ["attach"]:
                complaint(done, "root")
            else:
                assert done.returncode == 1
                assert "root" in done.stdout + done.stderr
        assert fingerprint(pair.a) == before

    def test_wrong_usage(self, pair: Pair) -> None:
        for wrong in (
            ["attach"],
            ["attach", "--pid", "x"],
            ["attach", "--pid", str(pair.a.pid), "--ring-pages", "3"],
            ["attach", "--pid", str(pair.a.pid), "--require-peer", "1"],
            ["nonsense"],
        ):
            assert pair.a.command(*wrong).returncode == 2

    def test_no_kernel_headers(self, pair: Pair) -> None:
        """A folder without headers is named; without any the shim is used and attach just works."""
        done = subprocess.run(
            [str(COMMAND), "attach", "--pid", str(pair.a.pid)],
            capture_output=True, text=True, timeout=60, check=False,
            env={**os.environ, "BCC_KERNEL_SOURCE": "/nonexistent", "DPVS_PROBE_RUNDIR": str(pair.a.run_directory)},
        )  # fmt: skip
        complaint(done, "/nonexistent")


@pytest.mark.dpvs
@pytest.mark.needs("agent")
class TestLife:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_ends_it_cleanly(self, pair: Pair, number: signal.Signals) -> None:
        probe = pair.a.probe("--listen", pair.sync_address("a"))
        assert probe.stop(number) == 0
        assert not list(pair.a.run_directory.glob("*.sock"))
        again = pair.a.probe("--listen", pair.sync_address("a"))
        assert again.alive

    def test_detach_ends_it_cleanly(self, pair: Pair) -> None:
        probe = pair.a.probe("--listen", pair.sync_address("a"))
        done = pair.a.command("detach", "--pid", str(pair.a.pid))
        assert (done.returncode, done.stdout) == (0, f"detached from pid {pair.a.pid}\n")
        assert probe.process.wait(60) == 0

    def test_the_end_of_the_target_is_status_3(self, pair: Pair) -> None:
        probe = pair.a.probe("--no-inject")
        pair.kill("a")
        assert probe.process.wait(60) == 3

    def test_doctor_says_yes_and_changes_nothing(self, pair: Pair) -> None:
        before = fingerprint(pair.a)
        done = pair.a.command("doctor", "--pid", str(pair.a.pid))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "attach would work" in done.stdout
        assert fingerprint(pair.a) == before

    def test_a_dry_run_says_what_would_be_and_changes_nothing(self, pair: Pair) -> None:
        steady = pair.steady(5)
        client, where = pair.connect(7), pair.sync_address("a")
        client.close()  # one that has ended
        before = fingerprint(pair.a)
        options = ("--pid", str(pair.a.pid), "--listen", where, "--peer", pair.sync_address("b"), "--xdp", "v0",
                   "--dry-run")  # fmt: skip
        done = pair.a.command("attach", *pair.a.with_keys(*options))
        assert done.returncode == 0, done.stdout + done.stderr
        for said in (
            "would be loaded", f"waited for on {where}", f"sent to {pair.sync_address('b')}", "create site",
            "sessions equal field by field", "packets of v0 would be counted: XDP, native",
            "would attach; nothing was touched",
        ):  # fmt: skip
            assert said in done.stdout, done.stdout
        assert re.search(r"sessions +[56] of its own in DPVS; [56] would be put into a peer's DPVS", done.stdout)
        assert fingerprint(pair.a) == before
        with pair.network.inside("a"), socket.socket() as taken, Packets(["v0"]):
            taken.bind((where.split(":")[0], int(where.split(":")[1])))
            taken.listen()
            done = pair.a.command("attach", *pair.a.with_keys(*options))
        assert done.returncode == 1
        assert f"cannot listen on {where}: address already in use" in done.stdout
        assert "interface v0 has another XDP program" in done.stdout
        assert fingerprint(pair.a) == before
        assert steady.finish()["alive"] == 5

    def test_a_peer_that_comes_later(self, pair: Pair) -> None:
        probe = pair.a.probe("--peer", pair.sync_address("b"), "--no-inject")
        steady = pair.steady(7)
        pair.b.probe("--listen", pair.sync_address("b"))
        wait_for("sessions in b", lambda: len(pair.b.sessions()) == 7, 15)
        assert probe.peers()
        assert steady.finish()["alive"] == 7

    def test_sessions_and_their_filters(self, pair: Pair) -> None:
        probe = pair.a.probe("--no-inject")
        with pair.connect(7) as connection:
            port = connection.getsockname()[1]
            connection.sendall(b"x")
            connection.recv(1)
            pair.datagram(b"y")
            wait_for("two sessions", lambda: len(probe.sessions()) == 2, 20)
            (row,) = wait_for("ESTABLISHED", lambda: probe.sessions(state="ESTABLISHED"), 20)
            assert row["client"] == f"{pair.plan.client}:{port}"
            assert row["virtual"] == f"{pair.plan.vip}:7"
            assert (row["origin"], row["proto"], row["mode"]) == ("own", "tcp", "FNAT")
            assert probe.sessions(port=port) == [row]
            assert len(probe.sessions(proto="udp")) == 1
            assert len(probe.sessions(address=pair.plan.client)) == 2
            assert probe.sessions(address="203.0.113.1") == []
            assert probe.sessions(origin="nobody") == []
            asked = pair.a.command("sessions", "--port", str(port), "--json")
            assert [json.loads(line) for line in asked.stdout.splitlines()] == [row]
            text = pair.a.command("sessions", "--proto", "tcp").stdout.splitlines()
            assert len(text) == 2
            assert f"{pair.plan.client}:{port}" in text[1]
        complaint(pair.a.command("sessions", "--state", "SLEEPING"), "SLEEPING")


def readable_by_nobody() -> bool:
    return all(parent.stat().st_mode & 0o005 == 0o005 for parent in COMMAND.resolve().parents)


def as_nobody(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(COMMAND), *arguments],
        capture_output=True, text=True, timeout=60, check=False, user=NOBODY, group=NOBODY, cwd="/",
    )  # fmt: skip
