# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/link.py, replica.py, sharing.py: thousands of histories of nodes, links and crashes; and that they tell.

A history is made from a seed, so each one can be had again; one that breaks a rule is cut down to the steps it takes.
``DPVS_PROBE_MODEL_RUNS=10`` makes ten times as many, ``DPVS_PROBE_MODEL_SEED`` others. Then planted faults, each of
which has to be found.
"""

import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from collector.table import Dirty
from replicator import wire
from replicator.link import Receiver, Sender
from replicator.replica import LinkRefused, Replica, Replicas
from replicator.wire import Fault, Opcode, ProtocolError, Reason
from tests.unit.cluster import STEPS, WEIGHTS, Cluster

LENGTH = 80  # steps of a history
ALWAYS = ("sessions_come", "sessions_end", "scan", "exchange")  # without these, nothing happens
TIMES = int(os.environ.get("DPVS_PROBE_MODEL_RUNS", "1"))
FIRST = int(os.environ.get("DPVS_PROBE_MODEL_SEED", "0"))
SHRINK_S = 60.0

History = list[tuple[str, int]]
# nodes, peers that hold each session (None: all), histories
KINDS: dict[str, tuple[int, int | None, int]] = {
    "two nodes": (2, None, 1000),
    "three nodes": (3, None, 600),
    "three nodes, each session at one of two peers": (3, 1, 400),
}


def history(seed: int) -> History:
    """What happens in one run: some kinds of steps not at all, some often."""
    rng = random.Random(seed)
    weights = [WEIGHTS.get(name, 1) * rng.choice((0, 1, 1, 3)) + (name in ALWAYS) for name in STEPS]
    return [(name, rng.getrandbits(32)) for name in rng.choices(list(STEPS), weights, k=LENGTH)]


def trouble(kind: str, seed: int, steps: History) -> Exception | None:
    """What goes wrong in a run; None if nothing."""
    nodes, replicas, _ = KINDS[kind]
    try:
        cluster = Cluster(nodes, seed, replicas)
        for name, number in steps:
            cluster.step(name, number)
        cluster.quiet()
    except Exception as error:
        return error
    return None


def shrunk(kind: str, seed: int, steps: History) -> History:
    """As few of the steps as go wrong too, as far as that is found in a minute."""
    until, size = time.monotonic() + SHRINK_S, len(steps) // 2
    while size and time.monotonic() < until:
        at = 0
        while at < len(steps):
            fewer = steps[:at] + steps[at + size :]
            if trouble(kind, seed, fewer) is not None:
                steps = fewer
            else:
                at += size
        size //= 2
    return steps


@pytest.mark.slow
@pytest.mark.timeout(600 * TIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_after_quiet_all_replicas_are_their_origins_tables(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    runs = KINDS[kind][2] * TIMES
    for seed in range(FIRST, FIRST + runs):
        steps = history(seed)
        if trouble(kind, seed, steps) is not None:
            steps = shrunk(kind, seed, steps)
            pytest.fail(f"{kind}, seed {seed}: {trouble(kind, seed, steps)!r}\nafter {steps}")
    with capsys.disabled():
        print(f"\n{runs} runs, {runs * LENGTH} steps, of {kind} in {time.monotonic() - began:.0f} s")


class Clusters(RuleBasedStateMachine):
    """The same steps, chosen and cut down by hypothesis."""

    @initialize(kind=st.sampled_from(list(KINDS)), seed=st.integers(0, 1 << 16))
    def begin(self, kind: str, seed: int) -> None:
        nodes, replicas, _ = KINDS[kind]
        self.cluster = Cluster(nodes, seed, replicas)

    @rule(name=st.sampled_from(list(STEPS)), seed=st.integers(0, 1 << 16))
    def step(self, name: str, seed: int) -> None:
        self.cluster.step(name, seed)

    def teardown(self) -> None:
        if hasattr(self, "cluster"):
            self.cluster.quiet()


Clusters.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestClusters = Clusters.TestCase


# --- planted faults --------------------------------------------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]
FAULTS: dict[str, tuple[Plant, str, int]] = {}  # how, in which kind of cluster, within how many runs


def fault(within: int, kind: str = "two nodes") -> Callable[[Plant], Plant]:
    """The function plants a fault that ``within`` runs have to find."""

    def add(plant: Plant) -> Plant:
        FAULTS[plant.__name__] = (plant, kind, within)
        return plant

    return add


def around(patch: pytest.MonkeyPatch, owner: type, name: str, made: Callable[..., Any]) -> None:
    """Replace a method by one that gets the old one before its arguments."""
    old = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **named: made(old, *args, **named))


@fault(10)
def acknowledgements_are_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sender, "_acknowledge", lambda *_: None)


@fault(60)
def marks_are_dropped_when_a_link_ends(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Dirty, "give_back", lambda *_, **__: None)


@fault(100)
def ends_in_flight_are_forgotten_when_a_link_ends(patch: pytest.MonkeyPatch) -> None:
    def let_go(old: Any, sender: Sender, now_ns: int) -> None:
        told = sender._told.copy()
        old(sender, now_ns)
        sender._told[:] = told

    around(patch, Sender, "_let_go", let_go)


@fault(300)
def the_sweep_is_skipped(patch: pytest.MonkeyPatch) -> None:
    def end(old: Any, replica: Replica, number: int, now_ns: int) -> int:
        replica._named[:] = True
        return int(old(replica, number, now_ns))

    around(patch, Replica, "end_full_sync", end)


@fault(20)
def what_is_named_during_a_full_sync_is_swept(patch: pytest.MonkeyPatch) -> None:
    def put(old: Any, replica: Replica, *args: Any) -> None:
        before = replica._named.copy()
        old(replica, *args)
        replica._named[: replica.slots // 2] = before[: replica.slots // 2]

    around(patch, Replica, "put", put)


@fault(1000)
def the_end_of_a_full_sync_is_taken_once_only(patch: pytest.MonkeyPatch) -> None:
    def end(old: Any, replica: Replica, number: int, now_ns: int) -> int:
        if number != replica._full_sync:
            raise ProtocolError(Fault.UNEXPECTED, "the end of a full sync that did not begin")
        return int(old(replica, number, now_ns))

    around(patch, Replica, "end_full_sync", end)


@fault(300)
def a_gap_is_not_noticed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Receiver, "_missed", lambda *_: None)


@fault(500)
def heartbeats_say_nothing(patch: pytest.MonkeyPatch) -> None:
    def pack(opcode: Opcode, sequence: int = 0, body: bytes = b"", old: Any = wire.pack) -> Any:
        return old(opcode, 0 if opcode is Opcode.HEARTBEAT else sequence, body)

    patch.setattr(wire, "pack", pack)


def _every_frame(old: Any, receiver: Receiver, sequence: int, replica: Replica) -> bool:
    last = receiver._sequence
    old(receiver, sequence, replica)
    receiver._sequence = max(last, sequence)
    return True


@fault(500)
def late_frames_are_taken(patch: pytest.MonkeyPatch) -> None:
    around(patch, Receiver, "_in_order", _every_frame)


@fault(300)
def late_frames_are_taken_and_generations_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    def put(old: Any, replica: Replica, records: Any, now_ns: int) -> None:
        replica.generation[records["slot"].astype(np.int64)] = 0
        old(replica, records, now_ns)

    around(patch, Receiver, "_in_order", _every_frame)
    around(patch, Replica, "put", put)


@fault(250)
def a_connection_that_was_replaced_may_write(patch: pytest.MonkeyPatch) -> None:
    def handle(old: Any, receiver: Receiver, *args: Any) -> None:
        if receiver.replica is not None:
            receiver.replica.owner = receiver
        old(receiver, *args)

    around(patch, Receiver, "_handle", handle)


@fault(300)
def an_earlier_run_is_let_in(patch: pytest.MonkeyPatch) -> None:
    def open_(old: Any, replicas: Replicas, hello: wire.Hello, *args: Any) -> Replica:
        try:
            found: Replica = old(replicas, hello, *args)
        except LinkRefused as refused:
            if refused.reason is not Reason.STALE_EPOCH:
                raise
            replicas._coming.pop(hello.node_id, None)
            replicas._current.pop(hello.node_id, None)
            found = old(replicas, hello, *args)
        return found

    around(patch, Replicas, "open", open_)


@fault(250)
def what_was_let_go_is_not_said(patch: pytest.MonkeyPatch) -> None:
    def distrust(_: Replicas, replica: Replica) -> None:
        replica.synced = False

    patch.setattr(Replicas, "distrust", distrust)


@fault(100)
def a_restart_of_the_peer_is_not_noticed(patch: pytest.MonkeyPatch) -> None:
    around(patch, Sender, "_introduced", lambda old, sender, hello, now: old(sender, replace(hello, epoch=1), now))


@fault(100)
def the_window_has_no_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sender, "_window_full", False)


@fault(500)
def the_injector_is_not_told_of_what_was_swept(patch: pytest.MonkeyPatch) -> None:
    def end(old: Any, replica: Replica, number: int, now_ns: int) -> int:
        replica.pending, kept = Dirty(replica.slots), replica.pending
        took: int = old(replica, number, now_ns)
        replica.pending = kept
        return took

    around(patch, Replica, "end_full_sync", end)


@fault(200, "three nodes, each session at one of two peers")
def a_slot_that_went_over_to_another_peer_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Dirty, "marked", property(lambda marks: np.zeros(marks.slots, np.bool_)))


@fault(10, "three nodes, each session at one of two peers")
def every_peer_gets_every_session(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sender, "share", lambda *_: None)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, kind, within = FAULTS[name]
    plant(monkeypatch)
    found = next((seed for seed in range(within) if trouble(kind, seed, history(seed)) is not None), None)
    assert found is not None, f"{within} runs did not find it"
    print(f"found in run {found + 1}")
