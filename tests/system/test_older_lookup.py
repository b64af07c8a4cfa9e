# SPDX-License-Identifier: GPL-2.0-or-later
"""A DPVS whose lookup of services takes an argument more, as up to 1.9.4: called as it wants to be, or not at all."""

import json
from pathlib import Path

import pytest

from probes.layout import LOOKUP
from tests.available import ROOT
from tests.conftest import demand
from tests.lab.pair import Pair
from tests.lab.process import wait_for
from tests.lab.twin import build_variants

CONNECTIONS = 30

pytestmark = [pytest.mark.needs("twin", "bpf", "agent"), pytest.mark.pair(variant="-outwall")]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    demand("twin")
    build_variants()


def test_it_is_not_called_as_later_ones_are(pair: Pair) -> None:
    """Its release says 1.10.2, as does the shipped layout; its code does not."""
    pair.replicate()
    probe = pair.b.attached[0]
    steady = pair.steady(CONNECTIONS)
    wait_for("it is said", lambda: f"{LOOKUP}.cid" in probe.process.tail(200), 20)
    wait_for("sessions in b's table", lambda: sum(probe.status()["sessions"]["of_peers"].values()) == CONNECTIONS, 20)
    assert len(pair.b.sessions()) == 0
    assert steady.finish()["alive"] == CONNECTIONS


def test_it_is_called_as_it_wants_to_be(pair: Pair, tmp_path: Path) -> None:
    """By a layout that has it; UDP, of which such a release knows one state, is refused."""
    file = tmp_path / "older.json"
    newer, older = (json.loads((ROOT / f"probes/layouts/{name}.json").read_text()) for name in ("1.10.2", "1.9.4"))
    newer["dpvs"]["structs"][LOOKUP] = older["dpvs"]["structs"][LOOKUP]
    file.write_text(json.dumps(newer))
    steady = pair.steady(CONNECTIONS)
    assert pair.datagram(b"one") == b"one"  # answered before it is told of: it is refused once in each state
    pair.replicate(extra=("--layout", str(file)))

    def answered() -> dict[str, int]:
        results: dict[str, int] = pair.b.attached[0].status()["injection"]["results"]
        return results if results.get("created", 0) >= CONNECTIONS and results.get("unsupported", 0) >= 1 else {}

    results = wait_for("an answer for each", answered, 20)
    assert len(pair.b.sessions()) == CONNECTIONS
    assert (results["created"], results["unsupported"]) == (CONNECTIONS, 1), results
    pair.kill("a")
    pair.active("b")
    wait_for("traffic on b", lambda: pair.b.counters().active == CONNECTIONS, 20)
    report = steady.finish()
    assert (report["alive"], report["corrupted"]) == (CONNECTIONS, 0), report
    assert pair.b.alive
