# SPDX-License-Identifier: GPL-2.0-or-later
"""collector/record.py: layout, comparison, digests, and records made of DPVS's sessions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector import record
from collector.conns import from_conns
from collector.record import RECORD, Records
from tests.unit.session_records import random_sessions, sessions
from tests.unit.simulated_dpvs import CONN, MODES, XMIT_FNAT

TUPLE = ("af", "af_out", "proto", "caddr", "vaddr", "laddr", "daddr", "cport", "vport", "lport", "dport")
SILENT = ("slot", "generation", "worker", "rs_end_seq", "rs_end_ack", "claim")


def with_other(records: Records, name: str) -> Records:
    other = record.pick(records, np.arange(len(records)))
    other[name] ^= np.asarray(0x11, other.dtype[name].base)
    return other


def test_the_record_is_144_bytes_with_one_gap() -> None:
    assert RECORD.itemsize == 144
    covered = np.zeros(144, np.int64)
    assert RECORD.fields is not None
    for dtype, offset, *_ in RECORD.fields.values():
        covered[offset : offset + dtype.itemsize] += 1
    assert covered.tolist() == [1] * 137 + [0] * 3 + [1] * 4


@pytest.mark.parametrize("name", RECORD.names)
def test_each_field_counts_as_it_should(name: str) -> None:
    old = sessions(3)
    new = with_other(old, name)
    assert record.changed(old, new).tolist() == [name not in SILENT] * 3
    assert record.same_identity(old, new).tolist() == [name not in TUPLE] * 3
    by_number = name not in SILENT or name in ("slot", "generation")
    assert (record.digest(old) != record.digest(new)) == by_number
    assert (record.digest(old, by_slot=False) != record.digest(new, by_slot=False)) == (name not in SILENT)
    assert (record.identity(old).tobytes() != record.identity(new).tobytes()) == (name in TUPLE)


@pytest.mark.parametrize("flag", [record.TEMPLATE, record.ONE_PACKET])
def test_a_session_of_another_sort_is_another_session(flag: int) -> None:
    old, new = sessions(2), sessions(2)
    new["flags"][0] |= flag
    assert record.same_identity(old, new).tolist() == [False, True]


def test_flags_that_flicker_do_not_count() -> None:
    old, new = sessions(1), sessions(1)
    new["flags"] ^= record.HASHED | record.IN_TIMER | record.REDIRECT_HASHED
    assert not record.changed(old, new).any()
    new["flags"] ^= record.INACTIVE
    assert record.changed(old, new).all()


def test_padding_does_not_count() -> None:
    old, new = sessions(4), sessions(4)
    new.view(np.uint8).reshape(4, 144)[:, 137:] = 0xAA
    assert not record.changed(old, new).any()
    assert record.digest(old) == record.digest(new)


@given(st.integers(0, 2**32 - 1), st.integers(0, 40))
def test_digests_do_not_depend_on_order_and_add_up(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    records = random_sessions(rng, n, 1000, ipv6=bool(seed & 1))
    shuffled = record.pick(records, rng.permutation(n))
    assert record.digest(records) == record.digest(shuffled)
    halves = record.digest(records[: n // 2]) + record.digest(records[n // 2 :])
    assert halves % 2**64 == record.digest(records)
    if n:
        assert record.digest(records) != record.digest(records[1:])


def test_identities_can_be_looked_up() -> None:
    here, there = sessions(50), sessions(50, first=30)
    assert int(np.isin(record.identity(here), record.identity(there)).sum()) == 20


def test_pick_keeps_every_byte() -> None:
    records = sessions(100)
    raw = records.view(np.uint8).reshape(100, 144)
    raw[:, 137:] = np.arange(7)
    chosen = record.pick(records, np.arange(0, 100, 3))
    assert chosen.tobytes() == raw[::3].tobytes()


def test_from_conns() -> None:
    conns = np.zeros(3, CONN)
    conns["af"] = (2, 10, 10)
    conns["af_out"] = (2, 10, 2)
    conns["proto"] = 6
    conns["packet_xmit"] = (XMIT_FNAT, 1, XMIT_FNAT)
    conns["caddr"] = conns["daddr"] = np.arange(16)
    conns["cport"] = 0x1234
    conns["timeout_s"] = (90, 2**40, 0)
    conns["fnat_seq_delta"], conns["syn_proxy_seq_isn"] = 7, 8
    out = from_conns(conns, np.array([5, 6, 7]), MODES)
    assert out["slot"].tolist() == [5, 6, 7]
    assert out["fwdmode"].tolist() == [record.FNAT, record.UNKNOWN_MODE, record.FNAT]
    four, six = [0, 1, 2, 3] + [0] * 12, list(range(16))
    assert out["caddr"].tolist() == [four, six, six]
    assert out["daddr"].tolist() == [four, six, four]
    assert out["cport"].tobytes() == b"\x12\x34" * 3
    assert out["timeout_ms"].tolist() == [90_000, 0xFFFFFFFF, 0]
    assert out["fnat_delta"].tolist() == [7] * 3
    assert out["sp_isn"].tolist() == [8] * 3
    assert out["worker"].tolist() == [record.UNKNOWN_WORKER] * 3
    assert len(from_conns(conns[:0], np.empty(0, np.int64), MODES)) == 0


def test_state_names() -> None:
    assert record.state_name(record.TCP, 1) == "ESTABLISHED"
    assert record.state_name(record.UDP, 2) == "NORMAL"
    assert record.state_name(record.TCP, 77) == "?77"
    assert record.state_name(1, 0) == "?0"
