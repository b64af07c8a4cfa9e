# SPDX-License-Identifier: GPL-2.0-or-later
"""A DPVS as up to 1.9.4: its lookup of services takes an argument more, and is called as it wants to be or not at all;
UDP has two states."""

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


def older_layout(directory: Path, udp_states: str = "1.9.4") -> Path:
    """That of the twin, with what is older about this one, and the states of UDP of a release."""
    newer, older = (json.loads((ROOT / f"probes/layouts/{name}.json").read_text()) for name in ("1.10.2", "1.9.4"))
    newer["dpvs"]["structs"][LOOKUP] = older["dpvs"]["structs"][LOOKUP]
    newer["dpvs"]["udp_states"] = {"1.10.2": newer, "1.9.4": older}[udp_states]["dpvs"]["udp_states"]
    file = directory / "older.json"
    file.write_text(json.dumps(newer))
    return file


def test_it_is_called_as_it_wants_to_be(pair: Pair, tmp_path: Path) -> None:
    """By a layout that has it; UDP, of which such a release knows one state, is refused."""
    file = older_layout(tmp_path)
    steady = pair.steady(CONNECTIONS)
    assert pair.datagram(b"one") == b"one"  # answered before it is told of: it is refused once in each state
    pair.replicate(extra=("--layout", str(file)))
    (udp,) = (row for row in pair.a.attached[0].sessions(origin="own") if row["proto"] == "udp")
    assert udp["state"] == "NORMAL"

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


def test_states_of_udp_are_proven(pair: Pair, tmp_path: Path) -> None:
    """A layout with those of later releases is refused where a session shows it, and DPVS goes on."""
    file = older_layout(tmp_path, udp_states="1.10.2")
    waiting = pair.a.probe("--layout", str(file))
    assert pair.datagram(b"one") == b"one"
    wait_for("it ends", lambda: not waiting.alive, 20)
    said = waiting.process.tail(20)
    assert waiting.process.status == 1, said
    assert "dp_vs_conn.state" in said
    assert "The probes were taken off" in said
    done = pair.a.command("attach", "--pid", str(pair.a.pid), "--layout", str(file), timeout=60)
    assert done.returncode == 1
    assert "dp_vs_conn.state" in done.stderr
    assert "Nothing was attached" in done.stderr
    assert pair.datagram(b"two") == b"two"
    right = pair.a.probe("--layout", str(older_layout(tmp_path)))
    assert {row["state"] for row in right.sessions(origin="own")} == {"NORMAL"}
