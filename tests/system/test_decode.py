# SPDX-License-Identifier: GPL-2.0-or-later
"""``dpvs-probe decode`` on captures of real links: it shows what was sent, no less and no more."""

import asyncio
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from collector.record import RECORD, digest
from replicator.codec import Buffer
from replicator.dissect.capture import Capture
from replicator.dissect.links import Links, Seen
from replicator.engine import Engine
from replicator.wire import Frame, FrameReader, Opcode
from tests.lab.node import COMMAND
from tests.lab.pair import SYNC_PORT, Pair
from tests.lab.process import wait_for
from tests.lab.record import Recorder
from tests.unit.simulated_node import LiveDpvs, SimulatedNode, until
from tests.unit.transports import dial, keys_directory, make

NOBODY = 65534
CONNECTIONS = 31
Said = dict[str, list[Buffer]]  # sender or receiver -> what its engine has handed to the transport


def decode(path: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """As a user who is not root and may not even look into root's directories."""
    with path.open() as file:
        return subprocess.run(
            [COMMAND, "decode", "-", *arguments],
            stdin=file, capture_output=True, text=True, timeout=120, user=NOBODY, check=False,
        )  # fmt: skip


def objects(done: "subprocess.CompletedProcess[str]") -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def frames_of(stream: bytes) -> list[Frame]:
    reader, found = FrameReader(), []
    reader.feed(stream)
    while (frame := reader.next()) is not None:
        found.append(frame)
    assert reader.buffered == 0
    return found


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    """All that engines send from now on."""
    everything: Said = defaultdict(list)
    original = Engine.outgoing

    def outgoing(self: Engine, now_ns: int) -> list[Buffer]:
        ready = original(self, now_ns)
        everything[type(self).__name__] += map(bytes, ready)
        return ready

    monkeypatch.setattr(Engine, "outgoing", outgoing)
    return everything


def test_what_two_engines_said_to_each_other(tmp_path: Path, said: Said) -> None:
    """Real TCP on the loopback interface: every frame, byte for byte; and the table of the receiver made of them."""
    path = tmp_path / "link.pcap"
    truth: list[np.ndarray[Any, Any]] = []
    port = 0

    async def talk() -> None:
        nonlocal port
        random = np.random.default_rng(7)
        dpvs = LiveDpvs(4096)
        for slot in range(1009):
            dpvs.create(slot, slot)
        async with SimulatedNode("b", tmp_path) as b:
            with Recorder(path, "lo", incoming=True):
                async with SimulatedNode("a", tmp_path, slots=4096, dpvs=dpvs, peers=(b.address,)) as a:
                    for _ in range(40):
                        a.dpvs.churn(random, 50)
                        await asyncio.sleep(0.005)
                    await until(lambda: b.holds(a), 20)
                    await until(lambda: a.outbound[0].sender.settled, 20)
                    replica = b.replica_of("a")
                    assert replica is not None
                    truth.append(replica.sessions())
                    port = b.address.port
                await asyncio.sleep(0.3)

    asyncio.run(talk())
    links = Links(port)
    with Capture(path) as capture:
        found = [item for segment in capture for item in links.segment(segment)]
    found += links.finish()
    assert all(isinstance(item, Seen) for item in found), found
    seen = [item for item in found if isinstance(item, Seen)]
    assert all(item.note is None and item.fault is None for item in seen)
    dialler = seen[0].source
    for engine, of_it in (("Sender", True), ("Receiver", False)):
        sent = [(frame.opcode, frame.sequence, 16 + len(frame.body)) for frame in frames_of(b"".join(said[engine]))]
        got = [(item.opcode, item.sequence, item.size) for item in seen if (item.source == dialler) is of_it]
        assert got == sent, engine
    table: dict[int, bytes] = {}
    for item in seen:
        for slot, _ in item.ended or ():
            table.pop(slot, None)
        for row in item.sessions if item.sessions is not None else ():
            table[int(row["slot"])] = row.tobytes()
    held = np.frombuffer(b"".join(table[slot] for slot in sorted(table)), RECORD)
    assert digest(held) == digest(truth[0])
    shown = objects(decode(path, "--json", "-v", "--port", str(port)))
    assert shown[-1]["event"] == "end"
    assert (shown[-1]["frames"], shown[-1]["links"], shown[-1]["skipped_bytes"]) == (len(seen), 1, 0)
    sessions = sum(len(line["sessions"]) for line in shown if line.get("opcode") in ("CREATE", "UPDATE"))
    assert sessions == sum(len(item.sessions) for item in seen if item.sessions is not None)


def test_a_capture_that_begins_late_and_lacks_packets(tmp_path: Path, said: Said) -> None:
    """What is shown was said, in that order; what is not shown is said to be missing."""
    path = tmp_path / "link.pcap"
    port = 0

    async def talk() -> None:
        nonlocal port
        random = np.random.default_rng(8)
        async with SimulatedNode("b", tmp_path) as b, SimulatedNode("a", tmp_path, slots=4096, peers=(b.address,)) as a:
            port = b.address.port
            await until(lambda: b.holds(a))
            with Recorder(path, "lo", incoming=True):
                for _ in range(100):
                    a.dpvs.churn(random, 100)
                    await asyncio.sleep(0.005)
                await until(lambda: b.holds(a), 20)
                await asyncio.sleep(0.3)

    asyncio.run(talk())
    with Capture(path) as capture:
        segments = list(capture)
    links = Links(port)
    kept = [segment for number, segment in enumerate(segments) if number % 23]
    found = [item for segment in kept for item in links.segment(segment)]
    found += links.finish()
    seen = [item for item in found if isinstance(item, Seen) and item.opcode >= Opcode.CREATE]
    sent = iter(frames_of(b"".join(said["Sender"])))
    assert len(seen) > 20
    for item in seen:  # each was sent, after the one before it
        wanted = (item.opcode, item.sequence, item.size)
        assert any((frame.opcode, frame.sequence, 16 + len(frame.body)) == wanted for frame in sent)
    assert all(item.fault is None for item in seen)
    assert links.counts.skipped_bytes > 0 or any("missing" in getattr(item, "text", "") for item in found)


def test_tls_on_the_loopback_interface(tmp_path: Path) -> None:
    path = tmp_path / "link.pcap"
    port = ""
    assert keys_directory()

    async def talk() -> None:
        nonlocal port
        kind = make("tls")
        listener = kind.listener("127.0.0.1:0")
        await listener.start()
        port = listener.address.rpartition(":")[2]
        with Recorder(path, "lo", incoming=True):
            there, here = await asyncio.gather(listener.accept(), dial(kind.dialer(listener.address)))
            await here.send([b"DP\x01\x03" + bytes(12)] * 100)
            await there.receive()
            await here.close()
            await there.close()
            await asyncio.sleep(0.3)
        await listener.close()

    asyncio.run(talk())
    done = decode(path, "--port", port)
    assert done.returncode == 1
    assert "TLS" in done.stdout
    assert done.stderr.startswith("dpvs-probe: no frame in ")
    assert "Traceback" not in done.stderr


@pytest.mark.needs("bpf")
class TestNodes:
    """Two nodes with their DPVS, each in a namespace, the link between them captured."""

    @pytest.mark.needs("twin")
    def test_sessions_of_a_link_without_keys(self, pair: Pair, tmp_path: Path) -> None:
        path = tmp_path / "link.pcap"
        steady = pair.steady(CONNECTIONS)
        listen = pair.sync_address("b")
        with Recorder(path, "s0", pair.network.path("a")):
            pair.b.probe("--insecure", "--listen", listen)
            a = pair.a.probe("--insecure", "--peer", listen)
            wait_for("all sessions injected in b", lambda: len(pair.b.sessions()) == CONNECTIONS, 20)
            tuples = a.tuples()
        assert steady.finish()["alive"] == CONNECTIONS
        shown = objects(decode(path, "--port", str(SYNC_PORT), "-v", "--json"))
        hellos = [(line["node"], line["role"]) for line in shown if line.get("opcode") == "HELLO"]
        assert hellos == [("a", "sender"), ("b", "receiver")]
        rows = [row for line in shown if line.get("opcode") in ("CREATE", "UPDATE") for row in line["sessions"]]
        assert {tuple(row[name] for name in ("proto", "client", "virtual", "local", "real")) for row in rows} == tuples
        assert shown[-1]["skipped_bytes"] == shown[-1]["faults"] == 0
        text = decode(path).stdout
        assert text.count(" CREATE #") == sum(line.get("opcode") == "CREATE" for line in shown)

    @pytest.mark.needs("twin")
    def test_a_link_with_keys_is_said_to_be_encrypted(self, pair: Pair, tmp_path: Path) -> None:
        path = tmp_path / "link.pcap"
        steady = pair.steady(CONNECTIONS)
        with Recorder(path, "s0", pair.network.path("a")):
            pair.replicate()
            wait_for("all sessions injected in b", lambda: len(pair.b.sessions()) == CONNECTIONS, 20)
        assert steady.finish()["alive"] == CONNECTIONS
        done = decode(path)
        assert done.returncode == 1, done
        assert done.stdout.count("encrypted: this connection is TLS") == 1
        assert done.stderr.splitlines()[0].endswith("can be read: 1 connection of TLS")


def test_scapy_is_not_imported_for_other_commands() -> None:
    code = "import sys, replicator.cli; sys.exit(any(name.split('.')[0] == 'scapy' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60, env=os.environ).returncode == 0
