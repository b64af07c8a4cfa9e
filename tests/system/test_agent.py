# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent's life inside a process: loaded twice, followed by a newer one, retired in the middle of its work."""

import ctypes
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from collector.conns import from_conns
from collector.record import FNAT, SYNPROXY
from probes.agent import abi, loading
from probes.agent.client import AgentAbsent, AgentBusy, AgentClient, AgentRefused, Door
from probes.memory import SessionPool
from probes.target import Target
from replicator.trial import TrialFailed, tried_first
from tests.lab.node import ROOT
from tests.lab.pair import Pair
from tests.lab.process import wait_for
from tests.lab.records import answers, final_codes, fnat_records

pytestmark = [pytest.mark.dpvs, pytest.mark.needs("agent")]
SOURCES = Path(loading.__file__).parent
ENDED = {abi.Code.DELETED, abi.Code.ABSENT}
COPIED = ("af", "af_out", "proto", "cport", "vport", "lport", "dport")
SMALL = {"wscale_vs": 15, "wscale_rs": 15, "pp_version": 3, "pp_sent": 2}
NEVER_MS = 3_600_000
UPSERT, DELETE = int(abi.RecordOp.UPSERT), int(abi.RecordOp.DELETE)


@pytest.fixture
def target(pair: Pair) -> Iterator[Target]:
    with Target.open(pair.b.pid) as opened:
        yield opened
        assert pair.b.alive
        pair.active("b")
        assert pair.request() == b"hello from the real server\n"


def load(pair: Pair, target: Target) -> AgentClient:
    return loading.load(target, pair.b.layout, pair.b.control)


def built(sources: Path, out: Path, build: int) -> Path:
    """An agent of these sources that says it is of this build."""
    library = out / f"agent-{build}.so"
    flags = ["-std=gnu11", "-O2", "-fPIC", "-shared", "-pthread", f"-DAGENT_BUILD={build}"]
    subprocess.run(["cc", *flags, "-o", library, *sorted(sources.glob("*.c"))], check=True)
    return library


def empty(pair: Pair) -> bool:
    return len(pair.b.sessions()) == 0 and pair.b.counters().idle


def accepted(client: AgentClient) -> int:
    return int(client.door.read().data["accepted"])


@contextmanager
def held(target: Target) -> Iterator[None]:
    """The thread of lcore 1 does nothing meanwhile. To be entered while that is idle: at work it may hold a lock."""
    (worker,) = (tid for tid, lcore in target.workers().items() if lcore == 1)
    libc, attach, detach = ctypes.CDLL(None, use_errno=True), 16, 17
    assert libc.ptrace(attach, worker, None, None) == 0
    os.waitpid(worker, 0x40000000)  # __WALL
    try:
        yield
    finally:
        assert libc.ptrace(detach, worker, None, None) == 0


def outstanding(client: AgentClient, records: "np.ndarray[tuple[int], np.dtype[np.void]]") -> list[int]:
    """Hand everything over at once, as far as the agent takes it; the requests."""
    ops = np.full(abi.MAX_RECORDS, UPSERT, np.uint8)
    requests = []
    for begin in range(0, len(records), abi.MAX_RECORDS):
        part = records[begin : begin + abi.MAX_RECORDS]
        requests.append(client.submit(ops[: len(part)], part))
    return requests


def test_one_follows_the_other(pair: Pair, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = pair.b.layout
    records = fnat_records(pair.plan, 8 * abi.MAX_RECORDS)
    records["timeout_ms"] = 600_000  # agents are built meanwhile
    first = load(pair, target)
    assert first.door.build == abi.BUILD
    assert load(pair, target).door.address == first.door.address, "one that works is used"

    # Loaded once more by force: it finds the slot filled, and leaves everything as it is.
    with pytest.raises(loading.AgentNotLoaded, match="already filled"):
        loading.bring_in(target, layout, None)
    assert (answers(first, UPSERT, records[:300]) == abi.Code.CREATED).all()

    def becomes(build: int) -> None:
        monkeypatch.setattr(loading, "LIBRARY", built(SOURCES, tmp_path, build))
        monkeypatch.setattr(abi, "BUILD", build)

    # A newer one takes over while the older has all it can have to do. What that has not begun it gives back.
    becomes(abi.BUILD + 1)
    requests = outstanding(first, records)
    second = load(pair, target)
    assert second.door.address != first.door.address
    codes = np.concatenate([final_codes(first, request) for request in requests])
    there = np.arange(len(records)) < 300
    back = codes == abi.Code.RETIRED
    assert (codes == np.where(back, abi.Code.RETIRED, np.where(there, abi.Code.UPDATED, abi.Code.CREATED))).all()
    with pytest.raises(AgentAbsent, match="newer agent took over"):
        first.hello()
    found = Door.find(target)
    assert found is not None
    assert found.address == second.door.address
    fresh = back & ~there
    assert (answers(second, UPSERT, records) == np.where(fresh, abi.Code.CREATED, abi.Code.UPDATED)).all()

    # And one after that goes by the trampolines of the first.
    becomes(abi.BUILD + 1)
    third = load(pair, target)
    assert third.door.data["trampolines"] == first.door.data["trampolines"] != 0
    assert (answers(third, UPSERT, records[:1000]) == abi.Code.UPDATED).all()

    # An older one is not loaded over a newer: it uses that if they speak the same, and is refused if it insists.
    becomes(abi.BUILD - 1)
    assert load(pair, target).door.address == third.door.address
    with pytest.raises(loading.AgentNotLoaded, match=rf"build {abi.BUILD} does not take over from build"):
        loading.bring_in(target, layout, third.door)
    assert third.state == abi.State.READY
    assert set(answers(third, DELETE, records).tolist()) <= ENDED
    wait_for("nothing is left", lambda: empty(pair), 10)


def test_retired_in_the_middle(pair: Pair, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has begun it ends, what it has not comes back; woken it goes on."""
    monkeypatch.setattr(loading, "WATCHDOG_MS", NEVER_MS)
    records = fnat_records(pair.plan, 8 * abi.MAX_RECORDS)
    records["timeout_ms"] = 600_000
    client = load(pair, target)
    requests = outstanding(client, records)
    client.retire()
    codes = np.concatenate([final_codes(client, request) for request in requests])
    assert set(codes.tolist()) <= {abi.Code.CREATED, abi.Code.RETIRED}
    created = np.count_nonzero(codes == abi.Code.CREATED)
    assert len(pair.b.sessions()) == created

    # It may have ended all of that by then. Of what its worker cannot begin all comes back.
    assert load(pair, target).door.address == client.door.address
    with held(target):
        requests = outstanding(client, records)
        with pytest.raises(AgentBusy):
            client.submit(np.full(1, UPSERT, np.uint8), records[:1])
        client.retire()
    codes = np.concatenate([final_codes(client, request) for request in requests])
    assert (codes == abi.Code.RETIRED).all()
    assert len(pair.b.sessions()) == created
    with pytest.raises(AgentRefused):
        client.submit(np.full(1, UPSERT, np.uint8), records[:1])
    assert load(pair, target).door.address == client.door.address
    assert set(answers(client, DELETE, records).tolist()) <= ENDED
    wait_for("nothing is left", lambda: empty(pair), 10)


@pytest.mark.pair(workers=2)
def test_several_at_once(pair: Pair, target: Target) -> None:
    """Two injectors, and between them one that hangs up in the middle of a request and one that does not wait."""
    records = fnat_records(pair.plan, 10_000)
    halves = records[::2], records[1::2]
    clients = load(pair, target), load(pair, target)
    layout, set_conn = pair.b.layout, pair.b.layout.sockopt_id("SOCKOPT_SET_CONN")

    def rude(body: bytes, announced: int) -> None:
        header = pair.b.control._build(
            "dpvs_sock_msg", version=layout.sockopt_version, id=set_conn, type=1, len=announced
        )
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(pair.b.ipc))
            connection.sendall(header + body)

    head = np.zeros((), abi.REQUEST)
    head["magic"], head["abi"], head["op"] = abi.REQUEST_MAGIC, abi.ABI, abi.Op.BATCH
    head["token"], head["request_id"] = clients[0].door.data["token"], 99
    head["count"], head["record_bytes"] = 100, abi.RECORD_BYTES
    whole = head.tobytes() + bytes([UPSERT]) * 104 + records[:100].tobytes()
    for op, expected in ((UPSERT, {abi.Code.CREATED, abi.Code.UPDATED}), (DELETE, {abi.Code.DELETED})):
        pending: list[tuple[AgentClient, int]] = []
        for begin in range(0, 5000, 1250):
            for client, part in zip(clients, halves, strict=True):
                some = part[begin : begin + 1250]
                pending.append((client, client.submit(np.full(len(some), op, np.uint8), some)))
            if op == UPSERT:
                rude(whole[: len(whole) // 2], len(whole))
        for client, request in pending:
            assert set(final_codes(client, request).tolist()) <= expected
        if op == UPSERT:
            assert len(pair.b.sessions()) == 10_000
            rude(whole, len(whole))  # all of it, and gone before the answer
            wait_for("what was sent counts", lambda: accepted(clients[1]) == 10_100, 10)
            assert set(final_codes(clients[1], 99).tolist()) == {abi.Code.UPDATED}
    assert clients[0].state == abi.State.READY
    wait_for("nothing is left", lambda: empty(pair), 10)


def test_a_trial_comes_first(pair: Pair, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One session is put in, looked at and taken out; an agent that writes a field to the wrong place is found out."""
    layout, control = pair.b.layout, pair.b.control
    records = fnat_records(pair.plan, 500)
    records["wscale_vs"], records["wscale_rs"], records["sp_delta"] = 7, 9, 4711
    ops = np.full(len(records), UPSERT, np.uint8)
    modes = {address: FNAT for address in [target.find("dp_vs_xmit_fnat")] if address is not None}
    with SessionPool.open(target, layout) as pool:
        client = load(pair, target)
        agent = tried_first(client, layout, pool, control, modes)
        codes = final_codes(client, agent.submit(ops, records))
        assert (codes == abi.Code.CREATED).all(), np.bincount(codes)
        by_code = client.counters()["records"]
        assert by_code["created"] == 501
        assert by_code["deleted"] == 1
        assert len(pair.b.sessions()) == 500
        assert tried_first(client, layout, pool, control, modes).submit(ops, records), "copies stay"
        assert (answers(client, DELETE, records) == abi.Code.DELETED).all()

        for path in SOURCES.glob("*.[ch]"):
            text = path.read_text()
            if path.name == "session.c":
                right = "put8(AT(conn, dp_vs_conn, wscale_vs), r->wscale_vs)"
                assert text.count(right) == 1
                text = text.replace(right, right.replace("r->wscale_vs", "r->wscale_rs"))
            (tmp_path / path.name).write_text(text)
        monkeypatch.setattr(loading, "LIBRARY", built(tmp_path, tmp_path, abi.BUILD + 1))
        monkeypatch.setattr(abi, "BUILD", abi.BUILD + 1)
        client = load(pair, target)
        with pytest.raises(TrialFailed, match=r"wscale_vs in memory is 9, not 7$"):
            tried_first(client, layout, pool, control, modes).submit(ops, records)
    wait_for("nothing is left", lambda: empty(pair), 10)


def test_a_copy_has_all_that_its_record_has(pair: Pair, target: Target) -> None:
    """Read back from DPVS's memory, when it was made and when it was told again."""
    rng = np.random.default_rng(23)
    client, records = load(pair, target), fnat_records(pair.plan, 211)
    numbers = [f"{which}_{part}" for which in ("fnat", "sp") for part in ("isn", "delta", "fdata_seq", "prev_delta")]
    with SessionPool.open(target, pair.b.layout) as pool:
        for answer in (abi.Code.CREATED, abi.Code.UPDATED):
            for name in (*numbers, "rs_end_seq", "rs_end_ack"):
                records[name] = rng.integers(1 << 32, size=len(records))
            for name, end in SMALL.items():
                records[name] = rng.integers(end, size=len(records))
            records["flags"] = rng.choice([0, SYNPROXY], len(records))
            records["timeout_ms"] = 1000 * rng.integers(30, 600, size=len(records))
            assert set(answers(client, UPSERT, records).tolist()) == {answer}
            slots = np.flatnonzero(pool.live())
            seen = from_conns(pool.read(slots)[0], slots, {})
            seen = seen[np.argsort(seen["fnat_isn"])]
            wanted = records[np.argsort(records["fnat_isn"])]
            for name in (*COPIED, *SMALL, *numbers, "rs_end_seq", "rs_end_ack"):
                assert (seen[name] == wanted[name]).all(), name
            for name in ("caddr", "vaddr", "laddr", "daddr"):  # DPVS leaves rubbish above an IPv4 address
                assert (seen[name][:, :4] == wanted[name][:, :4]).all(), name
            assert (seen["flags"] & SYNPROXY == wanted["flags"]).all()
            assert (seen["timeout_ms"] == wanted["timeout_ms"]).all()
        counters = pair.b.counters()
        assert (counters.active, counters.inactive, counters.ports_used) == (0, len(records), len(records))
        assert (answers(client, DELETE, records) == abi.Code.DELETED).all()
    wait_for("nothing is left", lambda: empty(pair), 10)


@pytest.mark.parametrize("way", ["-d", "LD_PRELOAD"])
def test_there_before_dpvs_starts(pair: Pair, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Loaded as DPVS starts, it sleeps until an attach wakes it: nothing is traced."""
    node, library = pair.b, pair.directory / "dpvs-probe-agent-start.so"  # DPDK takes none from below /tmp
    loading.prepare(node.layout, library)
    pair.kill("b")
    argv, environment = node.argv(), node.environment()
    if way == "-d":
        monkeypatch.setattr(node, "argv", lambda: [*argv, "-d", str(library)])
    else:
        monkeypatch.setattr(node, "environment", lambda: {**environment, "LD_PRELOAD": str(library)})
        assert subprocess.run(["true"], env={"LD_PRELOAD": str(library)}, check=False).returncode == 0
    pair.start("b")

    def never(tid: int, *_: object) -> None:
        raise AssertionError(f"thread {tid} was to be traced")

    monkeypatch.setattr(loading, "Borrower", never)
    with Target.open(node.pid) as target:
        wait_for("the agent", lambda: (door := Door.find(target)) is not None and door.is_installed(), 10)
        door = Door.find(target)
        assert door is not None
        assert door.state == abi.State.RETIRED
        client = load(pair, target)
        assert client.door.address == door.address
        assert client.state == abi.State.READY
        records = fnat_records(pair.plan, 500)
        assert (answers(client, UPSERT, records) == abi.Code.CREATED).all()
        assert len(node.sessions()) == 500
        assert (answers(client, DELETE, records) == abi.Code.DELETED).all()
    wait_for("nothing is left", lambda: empty(pair), 10)


def test_a_worker_that_does_not_answer(pair: Pair, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread of DPVS is held: the agent notices, refuses everything for good, and says why. DPVS goes on."""
    monkeypatch.setattr(loading, "WATCHDOG_MS", 300)
    client, records = load(pair, target), fnat_records(pair.plan, 100)
    with held(target):
        request = client.submit(np.full(len(records), UPSERT, np.uint8), records)
        wait_for("the watchdog", lambda: client.state == abi.State.POISONED, 20)
    assert client.door.error == "lcore 1 has not answered for 300 ms"
    with pytest.raises(AgentRefused, match="has not answered"):
        client.submit(np.full(1, UPSERT, np.uint8), records[:1])

    def late() -> list[int]:
        """What it answers once its thread goes on; before that, that it has shut itself."""
        with suppress(AgentRefused):
            codes = client.results(request)
            return codes.tolist() if codes is not None else []
        return []

    assert set(wait_for("what came late is refused too", late, 20)) == {abi.Code.RETIRED}
    with pytest.raises(loading.AgentNotLoaded, match="has shut itself: lcore 1"):
        load(pair, target)
    assert empty(pair)


@pytest.mark.needs("twin")
def test_the_benchmark_of_injection() -> None:
    """scripts/bench/inject runs to its end on the twin: all went in and out again, beside a flow that it counts."""
    command = [sys.executable, "-m", "scripts.bench.inject", "--quick", "--sessions", "10000", "--flow", "200"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = [line.split(" s ")[0].split() for line in done.stdout.splitlines() if "ns a session" in line]
    assert [" ".join(words[:2]) for words in figures] == [
        f"{how}: {what}" for how in ("requests", "injector") for what in ("create", "refresh", "delete")
    ]
    flows = re.findall(r"datagrams +(\d+) lost +(\d+)", done.stdout)
    assert len(flows) == 7
    assert all(int(sent) > int(lost) for sent, lost in flows), done.stdout
