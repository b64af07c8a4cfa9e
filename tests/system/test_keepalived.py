# SPDX-License-Identifier: GPL-2.0-or-later
"""A real keepalived drives two nodes by the configuration in docs/examples/: the address moves, connections live."""

import pytest

from tests.lab.pair import Pair
from tests.lab.process import wait_for
from tests.lab.vrrp import Keepalived

pytestmark = [pytest.mark.needs("bpf", "agent", "keepalived")]
CONNECTIONS = 30


def role(pair: Pair, name: str) -> str:
    return str(pair.nodes[name].attached[-1].status()["injection"]["role"])


@pytest.mark.dpvs
def test_the_address_moves_and_connections_live(pair: Pair) -> None:
    """The node whose DPVS dies is not ready any more: keepalived there gives the address up by its track_script."""
    pair.replicate(both=True, extra=("--policy", "promote"))
    for node in pair.nodes.values():
        assert node.command("ready", "--wait", "20").returncode == 0
    first, second = Keepalived(pair, pair.a, 150), Keepalived(pair, pair.b, 100)
    assert first.check() == (0, ""), "keepalived has nothing to complain of"
    first.start()
    wait_for("a has the address", first.has_address, 20)
    second.start()
    wait_for("a is promoted, b stands by", lambda: (role(pair, "a"), role(pair, "b")) == ("promoted", "standby"), 20)
    steady = pair.steady(CONNECTIONS, stall=30)
    known = {"a": CONNECTIONS}
    wait_for("b knows them", lambda: pair.b.attached[-1].status()["sessions"]["of_peers"] == known, 15)
    assert not pair.b.tuples()
    pair.kill("a")
    wait_for("b has the address", second.has_address, 20)
    wait_for("routes moved", lambda: "routes to b" in second.said(), 20)
    assert not first.has_address()
    assert f"MASTER: {CONNECTIONS} sessions of peers are in DPVS" in second.said(), second.said()
    wait_for("traffic on b", lambda: pair.b.counters().active == CONNECTIONS, 30)
    report = steady.finish()
    assert report["alive"] == CONNECTIONS, report
    assert report["corrupted"] == 0, report
    print(f"longest pause {report['longest_gap_ms']:.0f} ms")
    wait_for("a was told that it is out", lambda: "FAULT" in first.said(), 10)
