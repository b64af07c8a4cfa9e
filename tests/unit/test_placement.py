# SPDX-License-Identifier: GPL-2.0-or-later
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.record import AF_INET, AF_INET6, RECORD, TCP, Records
from replicator.placement import MAX_PEERS, PLACES, BadPlacement, Placement, hashes, places

ROOT = Path(__file__).parents[2]
NAMES = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), min_size=2, max_size=9, unique=True)


def clients(count: int, *, six: bool = False) -> Records:
    """Sessions as a load balancer sees them: few clients, ports in a row, one VIP, a handful of servers."""
    records = np.zeros(count, RECORD)
    number = np.arange(count, dtype=np.uint32)
    records["slot"] = number
    records["generation"] = 1
    records["af"] = records["af_out"] = AF_INET6 if six else AF_INET
    records["proto"] = TCP
    records["state"] = 1
    tail = 16 if six else 4
    for name, first in (("caddr", 10), ("vaddr", 20), ("laddr", 30), ("daddr", 40)):
        records[name][:, 0] = first
    records["caddr"][:, tail - 1] = number % 251
    records["caddr"][:, tail - 2] = number // 251 % 13
    records["vaddr"][:, tail - 1] = 1
    records["laddr"][:, tail - 1] = number % 7
    records["daddr"][:, tail - 1] = number % 5
    records["cport"] = 1024 + number % 60000
    records["vport"] = 443
    records["lport"] = 1025 + number // 7 % 60000
    records["dport"] = 8443
    return records


SESSIONS = clients(20_011)
SIX = clients(20_011, six=True)


def test_golden() -> None:
    """These numbers are the same on every node, machine and release."""
    assert [hex(found) for found in hashes(clients(3))] == GOLDEN_FOUR
    assert [hex(found) for found in hashes(clients(3, six=True))] == GOLDEN_SIX
    placed = Placement(["lb1", "lb2", "lb3", "lb4"], 2)
    assert placed.masks(clients(12)).tolist() == GOLDEN_MASKS


GOLDEN_FOUR = ["0x5c64606ce1da70eb", "0x330f24a02c8f84", "0x7d9ef1a4e8cbadba"]
GOLDEN_SIX = ["0xae9679bf5f5b4834", "0x148965f8c5bcad4f", "0x2968111ce1281c1f"]
GOLDEN_MASKS = [10, 5, 9, 12, 10, 10, 12, 10, 12, 9, 12, 10]


def test_the_same_in_another_process() -> None:
    program = (
        "from tests.unit.test_placement import *\n"
        "print(Placement(['a', 'b', 'c'], 1).masks(SESSIONS).sum(), int(hashes(SESSIONS).sum()))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    there = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    here = f"{Placement(['c', 'a', 'b'], 1).masks(SESSIONS).sum()} {int(hashes(SESSIONS).sum())}"
    assert there.stdout.strip() == here


def test_only_the_tuple_counts() -> None:
    other = SESSIONS.copy()
    rubbish = np.random.default_rng(3)
    for name in (
        "slot", "generation", "state", "flags", "fwdmode", "timeout_ms", "worker", "fnat_isn", "fnat_delta", "sp_isn",
        "rs_end_seq", "rs_end_ack", "pp_sent", "wscale_vs",
    ):  # fmt: skip
        other[name] = rubbish.integers(0, np.iinfo(RECORD[name]).max, len(other))
    assert (hashes(other) == hashes(SESSIONS)).all()
    for name in ("af", "af_out", "proto", "caddr", "vaddr", "laddr", "daddr", "cport", "vport", "lport", "dport"):
        changed = SESSIONS[:100].copy()
        changed[name] ^= 1
        assert (hashes(changed) != hashes(SESSIONS[:100])).all(), name


@pytest.mark.parametrize("records", [SESSIONS, SIX], ids=["IPv4", "IPv6"])
def test_hashes_differ_and_spread(records: Records) -> None:
    found = hashes(records)
    assert len(np.unique(found)) == len(found)
    for shift in (0, 16, 32, 48):
        counts = np.bincount((found >> np.uint64(shift)).astype(np.int64) & 255, minlength=256)
        expected = len(found) / 256
        assert ((counts - expected) ** 2 / expected).sum() < 380, "chi-squared, 255 degrees: one in a million"


def test_last_bytes_of_two_addresses() -> None:
    """What differs only in the uppermost bytes of two words must not fall together."""
    records = np.zeros(65536, RECORD)
    number = np.arange(65536)
    records["caddr"][:, 15] = number & 255
    records["laddr"][:, 15] = number >> 8
    assert len(np.unique(hashes(records))) == 65536
    assert len(np.unique(places(records))) > 65536 * 0.6  # 1 - 1/e of them for a random function


@pytest.mark.parametrize("count", [0, 1, 2047, 2048, 2049])
def test_sizes(count: int) -> None:
    placed = Placement(["a", "b", "c"], 2)
    assert (hashes(SESSIONS[:count]) == hashes(SESSIONS)[:count]).all()
    assert placed.masks(SESSIONS[:count]).shape == (count,)
    assert placed.owners(SESSIONS[:count]).shape == (count, 3)
    assert (hashes(SESSIONS[:count][::-1]) == hashes(SESSIONS[:count])[::-1]).all(), "not contiguous"


@settings(max_examples=40)
@given(NAMES, st.integers(1, 10))
def test_each_session_is_held_k_times(names: list[str], replicas: int) -> None:
    placed = Placement(names, replicas)
    owners = placed.owners(SESSIONS[:997])
    assert (owners.sum(axis=1) == min(replicas, len(names))).all()
    masks = placed.masks(SESSIONS[:997])
    at = places(SESSIONS[:997])
    assert (placed.masks_at(at) == masks).all()
    for number, peer in enumerate(placed.peers):
        held = placed.held_by(peer, SESSIONS[:997])
        assert (held == owners[:, number]).all()
        assert (held == ((masks >> np.uint64(number)) & np.uint64(1)).astype(bool)).all()
        assert (placed.held_at(peer, at) == held).all()


@settings(max_examples=40)
@given(NAMES, st.integers(1, 4), st.randoms(use_true_random=False))
def test_order_of_names_does_not_matter(names: list[str], replicas: int, dice: object) -> None:
    shuffled = list(names)
    dice.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = Placement(names, replicas), Placement(shuffled, replicas)
    assert one.peers == other.peers
    assert (one.masks(SESSIONS[:499]) == other.masks(SESSIONS[:499])).all()


@settings(max_examples=40)
@given(NAMES, st.integers(1, 4), st.text(min_size=9, max_size=12))
def test_a_peer_that_joins_takes_and_nothing_else_moves(names: list[str], replicas: int, new: str) -> None:
    before, after = Placement(names, replicas), Placement([*names, new], replicas)
    took = after.held_by(new, SESSIONS[:2003])
    for peer in before.peers:
        old, now = before.held_by(peer, SESSIONS[:2003]), after.held_by(peer, SESSIONS[:2003])
        assert not (now & ~old).any(), "nobody but the new peer gets anything"
        assert not (old & ~now & ~took).any(), "nobody lets go of what the new peer did not take"


@settings(max_examples=40)
@given(NAMES, st.integers(1, 4))
def test_a_peer_that_leaves_gives_its_own_and_nothing_else_moves(names: list[str], replicas: int) -> None:
    gone, *rest = names
    before, after = Placement(names, replicas), Placement(rest, replicas)
    had = before.held_by(gone, SESSIONS[:2003])
    for peer in after.peers:
        old, now = before.held_by(peer, SESSIONS[:2003]), after.held_by(peer, SESSIONS[:2003])
        assert not (old & ~now).any()
        assert not (now & ~old & ~had).any()


@pytest.mark.parametrize("peers", [2, 3, 5, 10, 30])
@pytest.mark.parametrize("replicas", [1, 2])
def test_about_one_nth_moves(peers: int, replicas: int) -> None:
    names = [f"lb{number}" for number in range(peers)]
    after = Placement([*names, "another"], replicas)
    moved = after.held_by("another", SESSIONS).mean()
    fair = replicas / (peers + 1)
    assert 0.7 * fair < moved < 1.4 * fair


@pytest.mark.parametrize("peers", [2, 3, 5, 10, 30])
def test_balance(peers: int) -> None:
    """64 places a peer: the deviation is about 1/8 of the share."""
    names = [f"lb{number}" for number in range(peers)]
    shares = Placement(names, 1).shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares.values()) * peers < 1.5
    assert min(shares.values()) * peers > 0.6
    held = Placement(names, 1).owners(SESSIONS).mean(axis=0)
    assert held == pytest.approx(list(shares.values()), abs=0.02), "sessions fall where the places are"


def test_all_is_the_default() -> None:
    for placed in (Placement(["a", "b"]), Placement(["a", "b"], 2), Placement(["a", "b"], 7)):
        assert placed.everywhere
        assert placed.replicas == 2
        assert placed.owners(SESSIONS[:10]).all()
        assert (placed.masks(SESSIONS[:10]) == 3).all()
        assert placed.held_by("b", SESSIONS[:10]).all()
        assert placed.held_at("a", places(SESSIONS[:10])).all()
        assert placed.shares() == {"a": 1, "b": 1}


def test_few_and_many() -> None:
    assert Placement([]).owners(SESSIONS[:5]).shape == (5, 0)
    assert (Placement([]).masks(SESSIONS[:5]) == 0).all()
    assert Placement(["only"], 3).owners(SESSIONS[:5]).all()
    full = Placement([f"lb{number}" for number in range(MAX_PEERS)], 63)
    assert (full.owners(SESSIONS[:500]).sum(axis=1) == 63).all()
    assert (Placement([f"lb{number}" for number in range(MAX_PEERS)]).masks(SESSIONS[:5]) == 2**64 - 1).all()
    every = Placement(["a", "b", "c"], 1)
    assert set(every.masks_at(np.arange(PLACES, dtype=np.uint16)).tolist()) == {1, 2, 4}


def test_what_cannot_be_placed() -> None:
    for peers, replicas, says in (
        (["a", "b", "a"], None, "two peers have one name"),
        ([str(number) for number in range(MAX_PEERS + 1)], None, "65 peers"),
        (["a", "b"], 0, "0 replicas"),
        (["a", "b"], -1, "-1 replicas"),
    ):
        with pytest.raises(BadPlacement, match=says):
            Placement(peers, replicas)
    with pytest.raises(KeyError):
        Placement(["a", "b"], 1).held_by("c", SESSIONS)


def test_fast_enough() -> None:
    """Loose, for machines that do other things; on a free one it is above 10 million a second."""
    records = SESSIONS[np.arange(200_000) % len(SESSIONS)]
    placed = Placement(["a", "b", "c", "d", "e"], 2)
    placed.held_by("a", records)
    took = []
    for _ in range(5):
        began = time.process_time()
        placed.held_by("a", records)
        took.append(time.process_time() - began)
    assert len(records) / min(took) > 1e6
