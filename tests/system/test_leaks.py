# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions put in, refreshed and taken out in random order, many times over: nothing stays behind.

``DPVS_PROBE_LEAK_SESSIONS=100000`` and ``DPVS_PROBE_LEAK_ROUNDS=10`` for more of it.
"""

import os

import numpy as np
import pytest

from probes.agent import loading
from probes.memory import SessionPool
from probes.target import Target
from tests.lab.pair import Pair, hugepages_for, memory_mib
from tests.lab.process import wait_for
from tests.lab.records import PORTS, churn, fnat_records
from tests.lab.run import Run

SESSIONS = int(os.environ.get("DPVS_PROBE_LEAK_SESSIONS", "5003"))
ROUNDS = int(os.environ.get("DPVS_PROBE_LEAK_ROUNDS", "3"))
SLACK_KIB = 512
LARGE = {"pool": 262_144, "memory_mib": 1408}
pytestmark = [pytest.mark.dpvs, pytest.mark.needs("agent"), pytest.mark.timeout(900)]


def memory_kib(target: Target) -> dict[str, int]:
    """What the process has of memory, and of that what its agent has."""
    with open(f"/proc/{target.pid}/status") as status:
        return {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in status)
                 if name in ("VmSize", "VmRSS")}  # fmt: skip


@pytest.fixture(autouse=True)
def _room(lab_run: Run) -> None:
    if SESSIONS > 30_000:
        lab_run.grow(hugepages_for("dpvs") + 2 * (LARGE["memory_mib"] - memory_mib("dpvs")) // 2)


@pytest.mark.pair(workers=2, **(LARGE if SESSIONS > 30_000 else {}))
def test_nothing_stays_behind(pair: Pair) -> None:
    assert PORTS * len(pair.plan.local_addresses) >= SESSIONS
    pair.kill("a")  # it only takes processor time
    records = fnat_records(pair.plan, SESSIONS)
    rng = np.random.default_rng(SESSIONS)
    with Target.open(pair.b.pid) as target, SessionPool.open(target, pair.b.layout) as pool:
        client = loading.load(target, pair.b.layout, pair.b.control)
        made = churn(client, records, 1, rng)  # what is touched for the first time is touched now
        before = memory_kib(target)
        made += churn(client, records, ROUNDS - 1, rng)
        wait_for("ports and counters", lambda: pair.b.counters().idle, 10)
        after = memory_kib(target)
        assert not pool.live().any()
        assert len(pair.b.sessions()) == 0
        assert after["VmSize"] == before["VmSize"]
        assert after["VmRSS"] - before["VmRSS"] < SLACK_KIB
        said = client.counters()
        assert said["outstanding"] == 0
        assert said["records"]["created"] == said["records"]["deleted"] == made
        assert pair.b.alive
    print(f"{made} sessions made and ended, {after}")
