# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of a running attach equals DPVS's own list, tuple by tuple, whenever nothing moves."""

import time

import pytest

from tests.lab.churn import Churn
from tests.lab.node import Attached, Node
from tests.lab.pair import Pair
from tests.lab.process import LabError, wait_for

pytestmark = [pytest.mark.dpvs, pytest.mark.needs("bpf")]
PRIME = 1009


def assert_equal(node: Node, probe: Attached, within: float = 3.0) -> int:
    """The table is DPVS's own list, now or very soon; how many sessions that are.

    Sessions end by their timers while one looks, so DPVS is asked before and after the table: what it lists both times
    must be in the table, and nothing may be there that it lists neither time.
    """
    end = time.monotonic() + within
    while True:
        before, table, after = node.tuples(), probe.tuples(), node.tuples()
        missing, extra = (before & after) - table, table - (before | after)
        if not missing and not extra:
            return len(table)
        if time.monotonic() > end:
            raise AssertionError(
                f"table of {len(table)}, DPVS lists {len(before)}: {len(missing)} missing, such as "
                f"{sorted(missing)[:3]}; {len(extra)} too many, such as {sorted(extra)[:3]}"
            )
        time.sleep(0.05)


def wait_until_empty(node: Node) -> None:
    """DPVS lists no session any more.

    A reset is sent once: where a busy machine drops it, the session lives on until its idle timeout.
    """
    within = node.settings.established_timeout_s + 30
    wait_for("DPVS's list empty", lambda: len(node.sessions()) == 0, within, 0.2)


class TestEqual:
    @pytest.mark.pair(established_timeout_s=45)
    @pytest.mark.parametrize("seed", [1, 2])
    def test_churn_in_any_pattern(self, pair: Pair, seed: int) -> None:
        probe = pair.a.probe("--no-inject")
        with Churn(pair.network.path("client"), pair.plan.vip, 7, seed) as churn:
            while churn.opened < PRIME:
                churn.open(min(churn.random.randint(1, 120), PRIME - churn.opened))
                churn.close(churn.random.randint(0, len(churn.open_ones)))
                assert assert_equal(pair.a, probe) >= len(churn.open_ones)
            churn.echo()
            churn.close(PRIME)
        wait_until_empty(pair.a)
        assert assert_equal(pair.a, probe) == 0
        assert pair.a.counters().idle
        assert probe.status()["events"]["lost"] == 0

    def test_all_at_once_and_no_pause(self, pair: Pair) -> None:
        probe = pair.a.probe("--no-inject")
        with Churn(pair.network.path("client"), pair.plan.vip, 7) as churn:
            churn.open(PRIME)
            assert assert_equal(pair.a, probe) == PRIME
            for _ in range(7):
                churn.close(PRIME // 7, ("reset",))
                churn.open(PRIME // 7)
            assert_equal(pair.a, probe)
            churn.close(PRIME)
        wait_until_empty(pair.a)
        assert assert_equal(pair.a, probe) == 0

    def test_http_and_udp_and_direct_routing(self, pair: Pair) -> None:
        probe = pair.a.probe("--no-inject")
        for _ in range(31):
            assert pair.request() == b"hello from the real server\n"
        with pair.connect(80, pair.plan.vip_dr) as direct:
            direct.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert direct.recv(4096).startswith(b"HTTP/1.0 200")
        for number in range(13):
            assert pair.datagram(b"datagram %d" % number) == b"datagram %d" % number
        assert assert_equal(pair.a, probe) >= 13
        states = {row["state"] for row in probe.sessions(origin="own") if row["proto"] == "udp"}
        assert states == {"NORMAL"}  # whatever number that is in this release

    @pytest.mark.pair(workers=2)
    def test_two_workers(self, pair: Pair) -> None:
        probe = pair.a.probe("--no-inject")
        with Churn(pair.network.path("client"), pair.plan.vip, 7) as churn:
            churn.open(307)
            assert assert_equal(pair.a, probe) == 307
            workers = {row["worker"] for row in probe.sessions(origin="own")}
            assert workers == {1, 2}
            churn.close(307)
        wait_until_empty(pair.a)
        assert assert_equal(pair.a, probe) == 0

    @pytest.mark.pair(timeouts={"time_wait": 60})
    def test_a_reused_client_port(self, pair: Pair) -> None:
        """A client that reuses its port in TIME_WAIT gets the old session back, which no probe point tells."""
        probe = pair.a.probe("--no-inject")
        for _ in range(5):
            with pair.connect(80, source_port=33333) as connection:  # the real server closes first
                connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                while connection.recv(4096):
                    pass
            assert assert_equal(pair.a, probe) == 1
        assert probe.status()["events"]["created"] == 1


def test_ring_overflow_heals_within_two_scans(pair: Pair) -> None:
    """A ring far too small loses events; the scan makes the table right all the same."""
    probe = pair.a.probe("--no-inject", "--ring-pages", "1")
    with Churn(pair.network.path("client"), pair.plan.vip, 7) as churn:
        probe.pause()
        churn.open(PRIME)
        churn.close(PRIME // 2, ("reset",))
        probe.resume()
        churn.open(101)
        lost = wait_for("lost events counted", lambda: probe.status()["events"]["lost"], 10)
        assert lost > 0
        scans = probe.status()["scans"]
        wait_for("two more scans", lambda: probe.status()["scans"] >= scans + 2, 10)
        assert_equal(pair.a, probe, within=0.5)
        churn.close(PRIME)
    wait_until_empty(pair.a)
    assert assert_equal(pair.a, probe) == 0


def test_sessions_of_before_the_attach_are_there_within_a_second(pair: Pair) -> None:
    with Churn(pair.network.path("client"), pair.plan.vip, 7) as churn:
        churn.open(PRIME)
        probe = pair.a.probe("--no-inject")
        answered = time.monotonic()
        assert assert_equal(pair.a, probe, within=1.0) == PRIME
        assert time.monotonic() - answered < 2.5  # the two lists take their time as well
        churn.echo()


@pytest.mark.timeout(3000)
def test_attach_and_detach_fifty_times_under_traffic(pair: Pair) -> None:
    before = pair.a.pid
    with pair.resets("client") as at_client, pair.resets("server") as at_server:
        steady = pair.steady(40, interval=0.02)
        for number in range(50):
            probe = pair.a.probe("--no-inject") if number % 2 else pair.a.probe()
            if number % 10 == 0:
                assert assert_equal(pair.a, probe) == 40
            assert probe.stop() == 0
        report = steady.finish()
        assert report["alive"] == 40, report
        assert at_client.total == at_server.total == 0
        assert at_client.segments > 1000
    assert pair.a.alive
    assert pair.a.pid == before


def test_a_killed_probe_leaves_the_target_alone(pair: Pair) -> None:
    steady = pair.steady(20, interval=0.05)
    for _ in range(5):
        probe = pair.a.probe()
        probe.process.kill()
    probe = pair.a.probe()
    assert assert_equal(pair.a, probe) == 20
    assert steady.finish()["alive"] == 20


def test_two_at_once_are_refused(pair: Pair) -> None:
    pair.a.probe("--no-inject")
    with pytest.raises(LabError, match="attached"):
        pair.a.probe("--no-inject")
