# SPDX-License-Identifier: GPL-2.0-or-later
"""kill -9 of dpvs-probe at any moment: DPVS goes on, no breakpoint stays, the next one takes over, tables converge.

``DPVS_PROBE_KILL_NINE_S``: longer than 15 s; ``DPVS_PROBE_KILL_NINE_SEED``: other moments.
"""

import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from probes.agent import abi
from probes.agent.client import NAME_PART, Door
from probes.agent.loading import DIRECTORIES, tracer_of
from probes.target import Target
from replicator.admin import AdminError, ask
from tests.lab.churn import Churn
from tests.lab.node import LAYOUT, Node, SessionTuple
from tests.lab.pair import Pair
from tests.lab.process import wait_for
from tests.lab.spawner import Spawned
from tests.lab.twin import TwinNode

SECONDS = float(os.environ.get("DPVS_PROBE_KILL_NINE_S", "15"))
SEED = int(os.environ.get("DPVS_PROBE_KILL_NINE_SEED", "1"))
STEADY, STANDING, BURST = 10, 60, 120
BUDGET = "0.4"  # percent: what the synthetic bursts take is more, so that probes are taken away and put back
TRACED, MOST_TRACED = 4, 20  # rounds; each needs a DPVS without an agent
ENDS = ("close", "reset")  # which work as well where DPVS has forgotten an idle one
IDLE_S = 10
TIMEOUTS = {"fin_wait": 2, "time_wait": 2, "close": 2, "close_wait": 2, "last_ack": 2}
pytestmark = [pytest.mark.needs("bpf", "twin", "agent"), pytest.mark.timeout(1500 + 3 * SECONDS)]


class Spawner:
    """tests.lab.spawner in the namespace of a node."""

    def __init__(self, pair: Pair, name: str) -> None:
        self.node, self.directory = pair.nodes[name], pair.directory
        self._fifo = pair.directory / f"spawner-{name}"
        os.mkfifo(self._fifo)
        self._count = 0
        os.environ["DPVS_PROBE_RUNDIR"] = str(self.node.run_directory)
        try:
            script = 'exec "$0" -m tests.lab.spawner <"$1"'
            self._process = pair.spawn(name, f"spawner-{name}", "/bin/sh", "-c", script, sys.executable, self._fifo)
        finally:
            del os.environ["DPVS_PROBE_RUNDIR"]
        self._requests = self._fifo.open("w")
        wait_for("the spawner", self._process.output, 60)

    def __call__(self, **what: object) -> Spawned:
        self._count += 1
        log = self.directory / f"{self.node.name}-{self._count}.log"
        self._requests.write(json.dumps({"log": str(log), **what}) + "\n")
        self._requests.flush()
        said = wait_for("its pid", lambda: self._process.output().splitlines()[self._count :], 20, 0.001)
        return Spawned(int(said[0]), log)

    def close(self) -> None:
        self._requests.close()


@pytest.fixture
def spawners(pair: Pair) -> Iterator[dict[str, Spawner]]:
    both = {name: Spawner(pair, name) for name in ("a", "b")}
    yield both
    for spawner in both.values():
        spawner.close()


def code(node: Node) -> dict[str, bytes]:
    """All code that is mapped from files: of DPVS and of its libraries, as it is in memory."""
    found: dict[str, bytes] = {}
    with open(f"/proc/{node.pid}/maps") as maps, open(f"/proc/{node.pid}/mem", "rb") as memory:
        for line in maps:
            words = line.split()
            if len(words) == 6 and "x" in words[1] and words[5].startswith("/") and NAME_PART not in words[5]:
                start, end = (int(part, 16) for part in words[0].split("-"))
                memory.seek(start)
                found[f"{words[0]} {words[5]}"] = memory.read(end - start)
    return found


def leftovers() -> set[Path]:
    """Shared objects of ours that lie where DPVS could load them from."""
    return {path for directory in DIRECTORIES for path in Path("/", directory).glob(f"{NAME_PART}*.so")}


def dies(process: Spawned) -> None:
    process.kill()
    wait_for("killed", lambda: not process.alive, 10, 0.001)


def attached(node: Node, process: Spawned) -> bool:
    with suppress(AdminError):
        (line,) = ask(node.run_directory / f"{node.pid}.sock", "status")
        return bool(line["probe_pid"] == process.pid)
    assert process.alive, process.log.read_text()
    return False


@pytest.mark.pair(workers=2)
def test_while_dpvs_is_traced(pair: Pair, spawners: dict[str, Spawner]) -> None:
    """While a thread of DPVS runs what it was told to, whoever told it may die, and DPVS is none the worse."""
    assert isinstance(pair.b, TwinNode)
    hit, before = 0, leftovers()
    for number in range(MOST_TRACED):
        if number >= TRACED and hit:
            break
        if number:
            pair.kill("b")
            pair.start("b")
        text, threads = code(pair.b), len(os.listdir(f"/proc/{pair.b.pid}/task"))
        with Target.open(pair.b.pid) as target:
            borrowed = target.control_thread()
        loader = spawners["b"](load=[pair.b.pid, str(pair.b.ipc), LAYOUT])
        while loader.alive and not tracer_of(borrowed):
            pass
        time.sleep(number % TRACED * 0.002)  # from its first moment to its last
        hit += loader.alive
        dies(loader)
        wait_for("nobody traces it", lambda tid=borrowed: not tracer_of(tid), 10, 0.001)  # type: ignore[misc]
        time.sleep(0.1)
        assert pair.b.alive, f"round {number}: DPVS died with the process that traced it"
        assert pair.b.tell("stats")
        with Target.open(pair.b.pid) as target:
            wait_for("the agent", lambda t=target: (d := Door.find(t)) and d.state == abi.State.READY, 10)  # type: ignore[misc]
        assert code(pair.b) == text
        tasks = f"/proc/{pair.b.pid}/task"
        wait_for("its threads are as before", lambda d=tasks, n=threads: len(os.listdir(d)) == n, 10)  # type: ignore[misc]
        wait_for("the file is gone", lambda: leftovers() <= before, 10)
    assert hit


def copies(node: Node) -> set[SessionTuple]:
    """The sessions of a's in the table of who is attached to b."""
    rows = ask(node.run_directory / f"{node.pid}.sock", "sessions", origin="a")
    return {(row["proto"], row["client"], row["virtual"], row["local"], row["real"]) for row in rows}


class Rounds:
    """The pair, attached to again and again."""

    def __init__(self, pair: Pair, spawners: dict[str, Spawner]) -> None:
        self.pair, self.spawners = pair, spawners
        self.random = random.Random(SEED)
        self.running: dict[str, Spawned] = {}
        self.start_s = 1.0
        self.counts: Counter[str] = Counter()

    def start(self, name: str) -> None:
        other = {"a": "b", "b": "a"}[name]
        pair = self.pair
        self.running[name] = self.spawners[name](
            arguments=[
                "attach", "--config", "/dev/null", "--pid", str(pair.nodes[name].pid), "--node", name,
                "--probe-budget", BUDGET, "--insecure",
                "--listen", pair.sync_address(name), "--peer", pair.sync_address(other),
            ]
        )  # fmt: skip

    def up(self) -> None:
        """Both run and answer."""
        for name in self.pair.nodes:
            if name not in self.running or not self.running[name].alive:
                self.start(name)
        for name, node in self.pair.nodes.items():
            wait_for(f"{name} attached", lambda n=node, p=self.running[name]: attached(n, p), 60)  # type: ignore[misc]

    def kill(self, name: str) -> None:
        dies(self.running.pop(name))

    def one(self, churn: Churn) -> None:
        """Somebody is killed while it starts, or while sessions come and go."""
        node = self.pair.nodes[victim := self.random.choice("ab")]
        what = self.random.choice(("start", "burst", "burst", "governor"))
        self.counts[f"{what} {victim}"] += 1
        if what == "start":
            if victim in self.running:
                self.kill(victim)
            self.start(victim)
            killer = threading.Timer(self.random.uniform(0, self.start_s), self.kill, [victim])
        else:
            self.up()
            if what == "governor":
                assert isinstance(self.pair.a, TwinNode)
                self.pair.a.tell("synthesize 3001 6000 700")
            killer = threading.Timer(self.random.uniform(0, 0.6), self.kill, [victim])
        killer.start()
        while killer.is_alive():
            churn.open(BURST // 4)
            churn.close(len(churn.open_ones) - STANDING, ENDS)
        killer.join()
        assert node.alive, f"node {victim} died: {self.counts}, seed {SEED}"


@pytest.mark.pair(established_timeout_s=IDLE_S, timeouts=TIMEOUTS)
def test_at_any_moment(pair: Pair, spawners: dict[str, Spawner], capsys: pytest.CaptureFixture[str]) -> None:
    rounds = Rounds(pair, spawners)
    text = {name: code(node) for name, node in pair.nodes.items()}
    before = leftovers()
    threads = {name: len(os.listdir(f"/proc/{node.pid}/task")) for name, node in pair.nodes.items()}
    began = time.monotonic()
    rounds.up()
    rounds.start_s = 1.1 * (time.monotonic() - began)
    steady = pair.steady(STEADY)
    began = time.monotonic()
    with Churn(pair.network.path("client"), pair.plan.vip, 7, seed=SEED) as churn:
        while time.monotonic() < began + SECONDS:
            rounds.one(churn)
        rounds.up()
        converging = time.monotonic()
        churn.close(len(churn.open_ones), ENDS)
        wait_for("ended ones are gone", lambda: len(pair.a.sessions()) == STEADY, 60)
        assert all(attached(node, rounds.running[name]) for name, node in pair.nodes.items())
        # Copies of what ended while nobody was attached to b stay in its DPVS until their own timeout.
        wait_for("b has what a has", lambda: copies(pair.b) == pair.a.tuples() <= pair.b.tuples(), 60)
        assert len(pair.a.tuples()) == STEADY
        took = time.monotonic() - converging
    done = steady.finish()
    assert (done["alive"], done["corrupted"]) == (STEADY, 0)
    for name, node in pair.nodes.items():
        rounds.kill(name)
        wait_for(f"{name} has its own code", lambda n=node: code(n) == text[n.name], 10)  # type: ignore[misc]
        assert len(os.listdir(f"/proc/{node.pid}/task")) == threads[name]
    assert leftovers() <= before
    kills = sum(rounds.counts.values()) + 2
    with capsys.disabled():
        print(f"\n{kills} kills {dict(rounds.counts)}; tables equal {took:.1f} s after the last; {done}")
