# SPDX-License-Identifier: GPL-2.0-or-later
"""Operated as a service: a Prometheus scrapes it, SIGHUP changes it, DPVS starts anew under it, and it is killed."""

import json
import os
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.lab.node import Attached
from tests.lab.pair import Pair
from tests.lab.process import wait_for
from tests.lab.prometheus import SERVER, TOOL
from tests.unit.test_monitoring import RULES, queries

pytestmark = [pytest.mark.needs("bpf", "twin", "agent")]
METRICS, PROMETHEUS = 9147, 9090
PATIENT = "heartbeat_timeout = 60\n"  # a link is only made anew where that is meant


def get(pair: Pair, name: str, port: int, path: str) -> str:
    """From a port of a node, in its namespace."""
    with (
        pair.network.inside(name),
        urllib.request.urlopen(f"http://{pair.plan.sync(name)}:{port}{path}", timeout=60) as r,
    ):
        return str(r.read().decode())


def query(pair: Pair, text: str) -> list[dict[str, Any]]:
    answer = json.loads(get(pair, "a", PROMETHEUS, "/api/v1/query?query=" + urllib.parse.quote(text)))
    assert answer["status"] == "success"
    return list(answer["data"]["result"])


@pytest.mark.needs("prometheus")
def test_prometheus_scrapes_a_node_and_every_query_works(pair: Pair, tmp_path: Path) -> None:
    where = {name: f"{pair.plan.sync(name)}:{METRICS}" for name in ("a", "b")}
    pair.b.probe("--listen", pair.sync_address("b"), "--metrics", where["b"])
    probe = pair.a.probe("--peer", pair.sync_address("b"), "--metrics", where["a"])
    config = {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "dpvs-probe", "static_configs": [{"targets": list(where.values())}]}],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    server = pair.spawn(
        "a", "prometheus", SERVER, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address={pair.plan.sync('a')}:{PROMETHEUS}", "--log.level=warn",
    )  # fmt: skip
    steady = pair.steady(20)
    wait_for("copies in b", lambda: len(pair.b.sessions()) == 20, 15)

    def established() -> bool:
        if not server.alive:
            raise AssertionError(server.tail())
        try:
            found = query(pair, 'sum by (instance, origin) (dpvs_sessions{state="ESTABLISHED"})')
        except OSError:
            return False
        return {(row["metric"]["origin"], row["value"][1]) for row in found} == {("own", "20"), ("a", "20")}

    wait_for("20 sessions, twice, in Prometheus", established, 20)
    peer = pair.sync_address("b")
    assert query(pair, f'dpvs_sync_link_up{{peer="{peer}"}}')[0]["value"][1] == "1"
    delay = f'dpvs_sync_delay{{peer="{peer}"}}'
    wait_for("it hardly lags", lambda: float(query(pair, delay)[0]["value"][1]) < 1, 20, 0.2)
    assert query(pair, "dpvs_sync_failures")
    assert float(query(pair, "sum(dpvs_probe_hits_total)")[0]["value"][1]) >= 20
    assert float(query(pair, 'dpvs_injections_total{result="created"}')[0]["value"][1]) >= 20
    for text in queries():
        query(pair, text)
    text = get(pair, "a", METRICS, "/metrics")
    lint = subprocess.run([TOOL, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert lint.returncode == 0, lint.stdout + lint.stderr
    assert get(pair, "b", METRICS, "/ready") == "ready\n"
    assert steady.finish()["alive"] == 20
    assert probe.stop() == 0


def attach(pair: Pair, *arguments: str) -> Attached:
    """A service on node a: it takes whatever DPVS its pid file names."""
    return pair.a.probe("--pid-file", str(pair.a.pid_file), *pair.a.with_keys(*arguments))


def test_settings_that_change_under_sighup(pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "probe.conf"
    to_b, to_nobody = pair.sync_address("b"), f"{pair.plan.sync('b')}:1"
    file.write_text(f"[sync]\npid_file = {pair.a.pid_file}\npeers = {to_b}\nsync_interval = 20\n{PATIENT}")
    pair.b.probe("--listen", to_b, "--no-inject", "--heartbeat-timeout", "60")
    probe = attach(pair, "--config", str(file), "--keys", str(pair.run.keys("a")))
    steady = pair.steady(6)
    wait_for("sessions in b", lambda: copies(pair) == 6, 10)
    rows = {row["setting"]: row for row in probe.ask("config")}
    assert (rows["sync_interval"]["value"], rows["sync_interval"]["from"]) == ("20", f"{file}:4")
    assert rows["keys"]["from"] == "command line"
    file.write_text("[sync]\nsync_intervall = 1\n")
    probe.process.signal(signal.SIGHUP)
    wait_for(
        "the mistake is said", lambda: f"{file}:2: there is no setting sync_intervall" in probe.process.tail(20), 5
    )
    file.write_text(
        f"[sync]\npid_file = {pair.a.pid_file}\npeers = {to_b}\nfilter_services = 10.99.0.0/16\nring_pages = 64\n"
        + PATIENT
    )
    probe.process.signal(signal.SIGHUP)
    wait_for("nothing passes", lambda: copies(pair) == 0, 10)
    said = probe.process.tail(20)
    assert "filter_services is 10.99.0.0/16 now, it was not given" in said
    assert "ring_pages is 64 now, it was 2048; that needs a restart" in said
    assert probe.status()["held_back_by_filter"]["service"] == 6

    def peers_are(*addresses: str) -> None:
        file.write_text(f"[sync]\npid_file = {pair.a.pid_file}\npeers = {' '.join(addresses)}\n{PATIENT}")
        probe.process.signal(signal.SIGHUP)
        wait_for("the peers", lambda: {row["address"] for row in probe.peers()} == set(addresses), 10)

    def heard() -> bool:
        """Whether b hears from a."""
        return any(row["direction"] == "from" and row["state"] == "live" for row in pair.b.attached[0].peers())

    peers_are(to_b, to_nobody)  # one joins: the other does not notice
    wait_for("all pass again", lambda: copies(pair) == 6, 10)
    wait_for("live", lambda: any(row["state"] == "live" for row in probe.peers()), 10)
    rows = {row["address"]: row for row in probe.peers()}
    assert heard()
    assert (rows[to_b]["state"], rows[to_b]["link"]["connections"]) == ("live", 1)
    assert rows[to_nobody]["state"] == "down"
    peers_are(to_nobody)
    wait_for("b hears nothing", lambda: not heard(), 10)
    peers_are(to_b)
    wait_for("b has them", lambda: heard() and copies(pair) == 6, 15)
    assert probe.alive
    assert steady.finish()["alive"] == 6


def copies(pair: Pair) -> int:
    """Sessions of a's that b has in its table."""
    return sum(pair.b.attached[0].status()["sessions"]["of_peers"].values())


def test_dpvs_is_started_anew_and_the_service_killed(pair: Pair) -> None:
    """It attaches to the next DPVS by itself; peers keep what they have meanwhile. Killed, its successor goes on."""
    pair.b.probe("--listen", pair.sync_address("b"))
    probe = attach(pair, "--peer", pair.sync_address("b"))
    steady = pair.steady(20)
    wait_for("copies in b", lambda: len(pair.b.sessions()) == 20, 15)

    # kill -9 of dpvs-probe, under load: DPVS and its connections go on, a new one takes over, tables converge.
    before, threads = pair.a.pid, len(os.listdir(f"/proc/{pair.a.pid}/task"))
    probe.process.signal(signal.SIGKILL)
    assert probe.process.wait(60) != 0
    more = pair.steady(7)  # that nobody sees
    assert pair.a.alive
    probe = attach(pair, "--peer", pair.sync_address("b"))
    wait_for("all in b's DPVS", lambda: pair.b.tuples() == pair.a.tuples() and len(pair.a.tuples()) == 27, 15)
    assert probe.tuples() == pair.a.tuples()
    assert (pair.a.pid, len(os.listdir(f"/proc/{pair.a.pid}/task"))) == (before, threads)
    assert more.finish()["alive"] == 7
    held = len(pair.a.tuples())

    # DPVS dies and is started again under the running service.
    pair.kill("a")
    pair.active("b")
    time.sleep(0.5)
    assert len(pair.b.sessions()) >= 20, "an owner's death ends no session"
    assert probe.alive
    pair.start("a")
    wait_for("attached to the new one", lambda: answers(probe), 30)
    assert probe.pid == probe.status()["probe_pid"]
    assert probe.process.tail(200).count("attached\n") == 2 or "waiting for a DPVS" in probe.process.tail(200)
    assert steady.finish()["alive"] == 20
    assert held >= 20
    assert probe.stop() == 0


def answers(probe: Attached) -> bool:
    from replicator.admin import AdminError

    try:
        return bool(probe.status()["pid"] == probe.node.pid)
    except AdminError:
        return False
