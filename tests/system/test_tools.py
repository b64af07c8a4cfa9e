# SPDX-License-Identifier: GPL-2.0-or-later
"""What an operator reaches for: tables compared, a failover rehearsed, an archive for a maintainer, losses counted."""

import json
import tarfile

import pytest

from tests.lab.loss import fail_over, own, source
from tests.lab.pair import Pair
from tests.lab.process import wait_for

pytestmark = [pytest.mark.dpvs, pytest.mark.needs("bpf", "agent")]
TALKING, SYNTHETIC, FLOWS = 10, 200, 500


def test_on_a_pair_that_works(pair: Pair) -> None:
    """One after the other, while connections talk that none of it may disturb."""
    pair.replicate(both=True)
    steady = pair.steady(TALKING)
    wait_for("copies in b", lambda: len(pair.b.sessions()) == TALKING, 20)

    same = pair.a.command("diff", source(pair, "a"), source(pair, "b", "a"))
    assert same.returncode == 0, same.stdout + same.stderr
    assert same.stdout.startswith(f"equal: {TALKING} sessions, digest ")
    file = pair.directory / "one.snapshot"
    assert pair.a.command("snapshot", "save", str(file)).returncode == 0
    assert pair.a.command("diff", "@own", str(file)).returncode == 0
    with pair.connect(7) as another:
        another.sendall(b"x")
        another.recv(1)
        wait_for("one more", lambda: own(pair, "a") == TALKING + 1, 10)
        differs = pair.a.command("diff", "--settle", "0", "@own", str(file))
        assert differs.returncode == 1
        assert f"{TALKING + 1} sessions in @own, {TALKING} in {file}: 1 differ" in differs.stdout
        assert f"not in {file}: tcp {pair.plan.client}:{another.getsockname()[1]}" in differs.stdout

    peer = f"{pair.b.run_directory}/{pair.b.pid}.sock"
    before = pair.a.counters().ports_used
    with pair.resets("client") as at_client, pair.resets("server") as at_server:
        rehearsed = pair.a.command("drill", "--sessions", str(SYNTHETIC), "--peer", peer)
        assert rehearsed.returncode == 0, rehearsed.stdout + rehearsed.stderr
        print(rehearsed.stdout)
        assert f"{SYNTHETIC} synthetic sessions: the failover works" in rehearsed.stdout
        assert at_client.total == at_server.total == 0
    for node in (pair.a, pair.b):
        assert not [one for one in node.tuples() if one[1].startswith("198.1")]
    wait_for("their ports are free", lambda: pair.a.counters().ports_used <= before, 10)
    wait_for("nothing else in b", lambda: len(pair.b.sessions()) == TALKING, 10)

    archive = pair.directory / "dump.tar.gz"
    dumped = pair.a.command(
        "sysdump", "--keys", str(pair.run.keys("a")), "--log", str(pair.a.attached[-1].log), str(archive)
    )
    assert dumped.returncode == 0, dumped.stderr
    with tarfile.open(archive) as members:
        held = {name.partition("/")[2]: members.extractfile(name) for name in members.getnames()}
        status = held[f"dpvs-{pair.a.pid}/status.json"]
        assert status is not None
        assert json.loads(status.read())["sessions"]["own"] >= TALKING
        doctor = held[f"dpvs-{pair.a.pid}/doctor.json"]
        assert doctor is not None
        assert {"process", "layout", "control socket"} <= {check["name"] for check in json.loads(doctor.read())}
    assert steady.finish()["alive"] == TALKING


def test_losses_are_counted(pair: Pair) -> None:
    """What scripts/dpvs-test does, with fewer sessions."""
    pair.replicate()
    done = fail_over(pair, FLOWS)
    assert done.good, done
    assert (done.loss["before"], done.loss["kept"], done.loss["sessions"]) == (FLOWS, FLOWS, [])
