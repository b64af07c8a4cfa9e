# SPDX-License-Identifier: GPL-2.0-or-later
"""probes/proof.py: a right layout is proven, each wrong one is told, and sessions that move are no proof against it."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probes.anatomy import Anatomy
from probes.control import ControlTimeout
from probes.layout import SESSION
from probes.memory import SessionPool
from probes.proof import PAUSES_S, SAMPLES, LayoutDisproved, Proof, prove, require, spread
from probes.target import Target
from tests.unit.own_pool import LAYOUT, OwnPool, OwnZones, own_target, slots

# A DPVS whose code is seen to touch every field where it is, as wide as it is.
ANATOMY = Anatomy(
    {
        **{(name,): frozenset(struct.fields.values()) for name, struct in LAYOUT.structs.items()},
        (SESSION,): frozenset(LAYOUT.structs[SESSION].fields.values())
        | {(LAYOUT.offset(SESSION, "fnat_seq") + at, 4) for at in (0, 4, 8)},
    }
)
STATES = [b"TCP_NONE", b"TCP_EST", b"SYN_SENT", b"SYN_RECV", b"FIN_WAIT", b"TIME_WAIT"]


class Says:
    """The control socket of a DPVS that tells what the pool holds, or something else."""

    def __init__(self, pool: SessionPool, **other: Any) -> None:
        self.pool, self.other, self.asked = pool, other, 0
        self.missing = False
        self.moves = 0  # how many answers are of a session that moves meanwhile
        self.rng: random.Random | None = None  # which of a session's copies it is answered for, else the first

    def release(self) -> int:
        return 0x00010A02

    def session(self, *tuple_: Any) -> dict[str, Any] | None:
        _, _, _, sport, _, dport = tuple_
        self.asked += 1
        if self.missing:
            return None
        conns, _ = self.pool.read(np.flatnonzero(self.pool.live()))
        those = conns[(conns["cport"] == sport) & (conns["vport"] == dport)]
        conn = those[self.rng.randrange(len(those)) if self.rng else 0]
        names = ("caddr", "vaddr", "laddr", "daddr", "cport", "vport", "lport", "dport", "proto")
        row = {name: conn[name] for name in names}
        row |= {"in_af": conn["af"], "out_af": conn["af_out"], "timeout": int(conn["timeout_s"])}
        row["state"] = STATES[int(conn["state"])].ljust(16, b"\0")
        if self.asked <= self.moves:
            row["state"] = b"LISTEN"
        return row | self.other


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    with own_target(tmp_path) as own:
        yield own


@pytest.fixture
def own(tmp_path: Path) -> OwnPool:
    own = OwnPool(tmp_path)
    own.zones = OwnZones(tmp_path, [own])  # type: ignore[attr-defined]
    for slot in range(0, 100, 2):
        own.session(slot, port=40000 + slot)
    return own


@pytest.fixture
def pool(own: OwnPool, target: Target) -> Iterator[SessionPool]:
    with SessionPool.open(target, LAYOUT) as opened:
        yield opened


def status(proof: Proof) -> dict[str, str]:
    return {check.name: check.status for check in proof.checks}


def test_all_proven(target: Target, pool: SessionPool) -> None:
    says = Says(pool)
    proof = prove(target, LAYOUT, pool, says, ANATOMY)  # type: ignore[arg-type]
    assert set(status(proof).values()) == {"ok"}, proof.checks
    assert proof.fields_ok
    assert proof.capture_ok
    assert proof.sampled == says.asked == SAMPLES
    require(proof)


def test_nothing_to_prove_it_on(tmp_path: Path, target: Target) -> None:
    own = OwnPool(tmp_path)
    own.zones = OwnZones(tmp_path, [own])  # type: ignore[attr-defined]
    with SessionPool.open(target, LAYOUT) as pool:
        proof = prove(target, LAYOUT, pool, Says(pool), ANATOMY)  # type: ignore[arg-type]
    assert status(proof)["session pool"] == status(proof)["release"] == "ok"
    assert status(proof)["sessions against DPVS"] == status(proof)["timer handler"] == "not yet"
    assert proof.capture_ok
    assert not proof.fields_ok
    assert proof.failed == []


def test_without_the_control_socket(target: Target, pool: SessionPool) -> None:
    proof = prove(target, LAYOUT, pool, None, ANATOMY)
    assert status(proof)["sessions against DPVS"] == status(proof)["release"] == "not yet"
    assert status(proof)["hash entries"] == "ok"
    assert not proof.fields_ok


def test_a_control_socket_that_does_not_answer(target: Target, pool: SessionPool) -> None:
    class Mute:
        def release(self) -> int:
            raise ControlTimeout("no answer")

        def session(self, *_: object) -> None:
            raise ControlTimeout("no answer")

    proof = prove(target, LAYOUT, pool, Mute(), ANATOMY)  # type: ignore[arg-type]
    assert status(proof)["sessions against DPVS"] == "not yet"
    assert proof.capture_ok


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        ({"timer": bytes(48)}, "timer handler"),
        ({"connpool": 0x1000}, "pool pointer"),
        ({"laddr": b"\x0a\xff\0\1"}, "hash entries"),
        ({"dport": b"\0\1"}, "hash entries"),
        ({"proto": 17}, "hash entries"),
        ({"packet_xmit": 0x1000}, "forwarding mode"),
    ],
)
def test_what_is_wrong_in_memory(
    target: Target, own: OwnPool, pool: SessionPool, wrong: dict[str, int | bytes], check: str
) -> None:
    own.set(4, **wrong)
    proof = prove(target, LAYOUT, pool, None, ANATOMY)
    assert [c.name for c in proof.failed] == [check]
    assert proof.capture_ok is (check == "forwarding mode")
    if not proof.capture_ok:
        with pytest.raises(LayoutDisproved, match=check):
            require(proof)


@pytest.mark.parametrize(
    "other",
    [
        {"in_af": 10}, {"out_af": 10}, {"proto": 17}, {"cport": 1}, {"vport": 1}, {"lport": 1}, {"dport": 1},
        {"timeout": 7}, {"state": b"TIME_WAIT"}, {"caddr": bytes(16)}, {"vaddr": bytes(16)}, {"laddr": bytes(16)},
        {"daddr": bytes(16)},
    ],
)  # fmt: skip
def test_each_field_is_compared(target: Target, pool: SessionPool, other: dict[str, Any]) -> None:
    says = Says(pool, **other)
    proof = prove(target, LAYOUT, pool, says, ANATOMY)  # type: ignore[arg-type]
    assert [c.name for c in proof.failed] == ["sessions against DPVS"]
    assert says.asked == (1 + len(PAUSES_S)) * SAMPLES  # each was asked for again, and again
    assert not proof.fields_ok


def test_a_session_that_moves_is_asked_again(target: Target, pool: SessionPool) -> None:
    says = Says(pool)
    says.moves = 1
    proof = prove(target, LAYOUT, pool, says, ANATOMY)  # type: ignore[arg-type]
    assert proof.fields_ok
    assert says.asked == SAMPLES + 1


@pytest.fixture
def copied(own: OwnPool) -> OwnPool:
    """Each session stands on a second worker, too, where packets moved it on."""
    for slot in range(0, 100, 2):
        own.session(slot + 1, port=40000 + slot, lcore=2, state=4)
        own.set(slot + 1, timeout=(7).to_bytes(8, "little") + bytes(8))
    return own


@pytest.mark.usefixtures("copied")
def test_dpvs_answers_for_the_copy_on_its_first_worker(target: Target, pool: SessionPool) -> None:
    says = Says(pool)
    proof = prove(target, LAYOUT, pool, says, ANATOMY)  # type: ignore[arg-type]
    assert proof.fields_ok, proof.checks
    assert says.asked > SAMPLES  # some of them were those of the second worker


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("seed", range(30))
def test_dpvs_answers_for_the_copy_of_whichever_worker_it_hears_first(
    target: Target, pool: SessionPool, seed: int
) -> None:
    """Now that of one worker, now that of the other: an answer and all copies have to be of one look."""
    says = Says(pool)
    says.rng = random.Random(seed)
    proof = prove(target, LAYOUT, pool, says, ANATOMY)  # type: ignore[arg-type]
    assert proof.fields_ok, proof.checks
    assert SAMPLES < says.asked <= 2 * SAMPLES  # none of them more than twice


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("other", [{"timeout": 60}, {"state": b"LISTEN"}, {"lport": 1}])
def test_an_answer_that_is_no_copys_counts(target: Target, pool: SessionPool, other: dict[str, Any]) -> None:
    proof = prove(target, LAYOUT, pool, Says(pool, **other), ANATOMY)  # type: ignore[arg-type]
    assert [c.name for c in proof.failed] == ["sessions against DPVS"]


def test_sessions_that_dpvs_does_not_know(target: Target, pool: SessionPool) -> None:
    says = Says(pool)
    says.missing = True
    proof = prove(target, LAYOUT, pool, says, ANATOMY)  # type: ignore[arg-type]
    assert [c.name for c in proof.failed] == ["sessions against DPVS"]


def test_sessions_that_end_meanwhile(target: Target, own: OwnPool, pool: SessionPool) -> None:
    class Ends(Says):
        def session(self, *arguments: Any) -> None:
            for slot in range(100):
                own.set(slot, flags=0)

    proof = prove(target, LAYOUT, pool, Ends(pool), ANATOMY)  # type: ignore[arg-type]
    assert status(proof)["sessions against DPVS"] == "not yet"


def test_another_release(tmp_path: Path, own: OwnPool) -> None:
    own.head.write(own.address + 4000, 0x00010908, 4)
    with own_target(tmp_path, g_version=own.address + 4000) as target, SessionPool.open(target, LAYOUT) as pool:
        proof = prove(target, LAYOUT, pool, None, ANATOMY)
        assert [c.name for c in proof.failed] == ["release"]
        with pytest.raises(LayoutDisproved, match=r"1\.9\.8"):
            require(proof)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1000])
def test_spread(count: int) -> None:
    chosen = spread(count, 16)
    assert len(chosen) == min(count, 16)
    assert len(set(chosen.tolist())) == len(chosen)
    if count:
        assert (chosen[0], chosen[-1]) == (0, count - 1)
    assert slots(*chosen).dtype == np.int64
