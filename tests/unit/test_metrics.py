# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/metrics.py and exporter.py: names that never change, true numbers, and a scrape that nothing waits for."""

import asyncio
import json
import re
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from prometheus_client.parser import text_string_to_metric_families

from collector import record
from collector.governed import Governed
from probes.practice import Costs
from replicator import metrics
from replicator.exporter import MAX_CLIENTS, Exporter
from replicator.histogram import Histogram
from replicator.transport.address import Address, BadAddress, metrics_address
from replicator.transport.interface import CannotListen
from tests.unit.session_records import sessions
from tests.unit.simulated_node import SimulatedNode, until
from tests.unit.test_activity import FakePackets

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("metrics.golden")
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    """Every sample by name and labels; asserts that none comes twice."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, key
            found[key] = sample.value
    return found


def one(found: Samples, name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


async def get(exporter: Exporter, path: str = "/metrics", method: str = "GET") -> tuple[int, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", exporter.address.port)
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n".encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    assert f"Content-Length: {len(body)}" in head or method == "HEAD"
    return int(head.split()[1]), body


def test_names_that_were_given_out_stay() -> None:
    """A line of the golden file may be added; none may be changed or taken away."""
    now = {f"{kind.name} {kind.type} {','.join(kind.labels)}".rstrip() for kind in metrics.TABLE}
    golden = set(GOLDEN.read_text().splitlines())
    assert golden <= now, f"renamed or gone: {golden - now}"
    assert now <= golden, f"add to {GOLDEN.name}: {now - golden}"


def test_names_follow_the_rules_of_prometheus() -> None:
    for kind in metrics.TABLE:
        assert re.fullmatch(r"dpvs_[a-z_]+", kind.name)
        assert kind.name.endswith("_total") == (kind.type == metrics.COUNTER), kind.name
        assert not re.search(r"_(ms|ns|us|milliseconds|percent|kb|mb)(_|$)", kind.name), "base units only"
        assert kind.help.endswith(".")
    assert len(metrics.NAMES) == len(metrics.TABLE)


def test_the_document_has_every_name() -> None:
    """Write it anew with ``python -m tests.unit.test_metrics``."""
    assert document().read_text() == rewritten()


def document() -> Path:
    return ROOT / "docs/metrics.md"


def rewritten() -> str:
    before, mark, rest = document().read_text().partition("<!-- metrics -->\n")
    _, end, after = rest.partition("<!-- end of metrics -->\n")
    assert mark
    assert end
    return before + mark + "\n".join(metrics.markdown()) + "\n" + end + after


def test_a_pair_of_nodes(tmp_path: Path) -> None:
    async def body() -> None:
        async with SimulatedNode("b", tmp_path) as b, SimulatedNode("a", tmp_path, peers=(b.address,)) as a:
            exporters = {}
            for node in (a, b):
                exporter = exporters[node.name] = Exporter("127.0.0.1:0")
                exporter.node, exporter.attaches = node.node, 1
                await exporter.start()
            for slot in range(30):
                a.dpvs.create(slot, slot)
            for slot in range(20):
                a.dpvs.establish(slot, 1)
            await until(lambda: b.holds(a))
            for slot in range(25, 30):
                a.dpvs.free(slot)
            await until(lambda: b.holds(a) and a.node._parts.links.settled())
            here, there = [samples((await get(exporters[name]))[1]) for name in ("a", "b")]
            peer = str(b.address)
            assert one(here, "dpvs_sync_delay", peer=peer) == 0
            assert one(here, "dpvs_sync_link_up", direction="to", peer=peer) == 1
            assert one(there, "dpvs_sync_link_up", direction="from", peer="a") == 1
            assert one(here, "dpvs_sync_link_state", peer=peer, state="live") == 1
            assert one(here, "dpvs_sync_peer_info", peer=peer, node="b") == 1
            assert one(here, "dpvs_sync_resyncs_total", peer=peer, reason="first") == 1
            assert one(here, "dpvs_sync_pending_sessions", peer=peer) == 0
            assert one(here, "dpvs_sessions", origin="own", proto="tcp", state="ESTABLISHED") == 20
            assert one(there, "dpvs_sessions", origin="a", proto="tcp", state="ESTABLISHED") == 20
            assert sum(v for (name, _), v in there.items() if name == "dpvs_sessions") == 25
            assert one(here, "dpvs_session_changes_total", change="created") == 30
            assert one(here, "dpvs_session_changes_total", change="deleted") == 5
            assert one(there, "dpvs_sync_received_changes_total", origin="a", change="created") == 30
            assert one(there, "dpvs_sync_received_changes_total", origin="a", change="deleted") == 5
            assert one(there, "dpvs_sync_complete", origin="a") == 1
            assert one(here, "dpvs_sync_event_to_ack_seconds_count", peer=peer) > 0
            assert one(here, "dpvs_probe_events_total", kind="created") == 30
            assert one(here, "dpvs_probe_ready") == 0, "nobody has sent it anything yet"
            assert one(here, "process_resident_memory_bytes") > 1 << 20
            for name in ("dpvs_sync_failures", "dpvs_sync_failures_total"):
                assert one(here, name, direction="to", peer=peer, reason="reset") == 0
            names = {name for name, _ in (here | there)}
            assert {name for name in names if not name.startswith("process_")} <= {
                *metrics.NAMES, *(f"dpvs_sync_event_to_ack_seconds_{part}" for part in ("bucket", "count", "sum")),
            }  # fmt: skip
            assert {name for name in names if name.startswith("process_")} == set(metrics.PROCESS_NAMES)
            await b.die()
            a.dpvs.create(40, 40)
            await until(lambda: a.outbound[0].counters["dials_failed"] > 0)
            await asyncio.sleep(0.05)
            here = samples((await get(exporters["a"]))[1])
            assert one(here, "dpvs_sync_link_up", direction="to", peer=peer) == 0
            assert one(here, "dpvs_sync_delay", peer=peer) >= 0.05
            assert one(here, "dpvs_sync_failures", direction="to", peer=peer, reason="unreachable") > 0
            assert one(here, "dpvs_sync_pending_sessions", peer=peer) == 1
            for exporter in exporters.values():
                await exporter.close()

    asyncio.run(body())


def test_packets_and_the_governor(tmp_path: Path) -> None:
    packets = FakePackets()

    async def body() -> None:
        async with SimulatedNode("a", tmp_path, packets=packets) as a:
            for slot in range(5):
                a.dpvs.create(slot, slot)
            await until(lambda: len(a.table) == 5)
            flows = sessions(3)  # of nobody
            flows[:2] = a.table.rows(np.array([1, 2]))
            packets.arrive(flows, 9, time.monotonic_ns())
            packets.ever_new = 12
            reads = packets.reads
            await until(lambda: packets.reads > reads + 1)
            said = {
                **Governed(NoProbes(), a.collector, [], 0).status(), "share_percent": 2.0, "highest_share_percent": 4.0,
                "longest_switch_ms": 55.0, "switches": {"attached": 3, "detached_over_budget": 2, "failed": 1},
            }  # fmt: skip
            found: Samples = {}
            for metric in metrics.of_status({**a.node.status(), "probes": said}):
                for sample in metric.samples:
                    found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
        assert one(found, "dpvs_packet_interface_info", interface="eth1", mode="native") == 1
        assert one(found, "dpvs_packets_total", outcome="counted") == 7
        assert sum(v for (name, _), v in found.items() if name == "dpvs_packets_total") == 7
        assert one(found, "dpvs_packet_bytes_total") == 700
        covered = {who: one(found, "dpvs_packet_flows", covered_by=who) for who in ("own", "peer", "nobody")}
        assert covered == {"own": 2, "peer": 0, "nobody": 1}
        assert one(found, "dpvs_packet_flows_limit") == 1024
        dropped = {why: one(found, "dpvs_packet_flows_dropped_total", reason=why) for why in ("evicted", "no_room")}
        assert dropped == {"evicted": 9, "no_room": 0}
        assert one(found, "dpvs_packet_orphans") == 1
        for name in ("dpvs_packet_orphans_asked_total", "dpvs_packet_look_failures_total"):
            assert one(found, name) == 0
        switches = {n: one(found, "dpvs_probe_switches_total", switch=n) for n in said["switches"]}
        assert switches == {"attached": 3, "detached_over_budget": 2, "failed": 1}
        assert one(found, "dpvs_probe_detached_over_budget_total") == 2
        assert one(found, "dpvs_probe_worker_time_highest_ratio") == 0.04
        assert one(found, "dpvs_probe_longest_switch_seconds") == 0.055
        assert [one(found, "dpvs_probe_hit_seconds", site=site) for site in ("create", "free")] == [600e-9, 700e-9]

    asyncio.run(body())


class NoProbes:
    """What ``Governed`` asks of probes."""

    costs = Costs(600, 700, measured=True)
    how = "one link for all sites"

    def reattach(self) -> None: ...

    def detach(self) -> None: ...

    def hits_by_cpu(self) -> npt.NDArray[np.uint64]:
        return np.zeros((1, 2), np.uint64)


def test_without_a_dpvs() -> None:
    async def body() -> None:
        exporter = Exporter("0")
        await exporter.start()
        status, text = await get(exporter)
        assert (status, one(samples(text), "dpvs_probe_attached"), one(samples(text), "dpvs_probe_ready")) == (
            200,
            0,
            0,
        )
        assert await get(exporter, "/ready") == (503, "not ready: waiting for a DPVS\n")
        assert (await get(exporter, "/nothing"))[0] == 404
        assert (await get(exporter, method="POST"))[0] == 405
        assert (await get(exporter, method="HEAD")) == (200, "")
        with pytest.raises(CannotListen):
            await Exporter(str(exporter.address)).start()
        await exporter.close()

    asyncio.run(body())


def test_strangers_do_no_harm(tmp_path: Path) -> None:
    async def body() -> None:
        exporter = Exporter("0")
        await exporter.start()
        port = exporter.address.port
        for noise in (b"\0" * 1000 + b"\r\n\r\n", b"GET\r\n\r\n", b"GET / SSH/2\r\n\r\n", b"x" * 40_000, b""):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(noise)
            if writer.can_write_eof():
                writer.write_eof()
            with_answer = await reader.read()
            assert with_answer == b"" or b" 400 " in with_answer.split(b"\r\n")[0]
            writer.close()
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(MAX_CLIENTS)]
        await until(lambda: len(exporter._clients) == MAX_CLIENTS)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.read() == b"", "no room for one more"
        for _, writer in idle:
            writer.close()
        await until(lambda: not exporter._clients)
        assert (await get(exporter))[0] == 200
        await exporter.close()

    asyncio.run(body())


def test_where_metrics_are_shown() -> None:
    assert metrics_address("9147") == Address("127.0.0.1", 9147)
    assert metrics_address("*:9147") == Address("*", 9147)
    assert metrics_address("[::1]:9147") == Address("::1", 9147)
    with pytest.raises(BadAddress):
        metrics_address("here")


def test_states_are_counted_as_they_are() -> None:
    records = sessions(9)
    records["state"][:4] = record.TIME_WAIT
    records["proto"][7:], records["state"][7:] = record.UDP, record.UDP_NORMAL
    records["proto"][8], records["state"][8] = 99, 4000
    present = np.ones(9, np.bool_)
    present[0] = False
    assert metrics.states(records, present) == {
        ("tcp", "TIME_WAIT"): 3, ("tcp", "ESTABLISHED"): 3, ("udp", "NORMAL"): 1, ("99", "?15"): 1,
    }  # fmt: skip
    assert metrics.states(records, np.zeros(9, np.bool_)) == {}


def test_the_histogram_that_is_shown() -> None:
    durations = Histogram()
    durations.add(np.array([0, 1000_000_000 - 300_000, 1000_000_000 - 4_000_000] + [1] * 3), 1_000_000_000)
    (_, *_) = found = metrics.histogram("dpvs_sync_event_to_ack_seconds", {"p": durations}).samples
    buckets = {sample.labels["le"]: sample.value for sample in found if sample.name.endswith("_bucket")}
    assert list(buckets.values()) == sorted(buckets.values())
    assert (buckets["0.0002"], buckets["0.0005"], buckets["0.002"], buckets["0.005"], buckets["0.5"]) == (0, 1, 1, 2, 2)
    assert (buckets["2"], buckets["+Inf"]) == (5, 5)
    (total,) = [sample.value for sample in found if sample.name.endswith("_sum")]
    assert 3.0 <= total <= 3.6


def test_a_scrape_holds_up_nothing(tmp_path: Path) -> None:
    """A table of a million slots, full: no step of a scrape takes longer than a few ticks."""

    async def body() -> dict[str, float]:
        slots = 1 << 20
        a = SimulatedNode("a", tmp_path, slots=slots)  # it only answers
        await a.listener.start()
        a.table.records["proto"] = record.TCP
        a.table.present[:] = True
        exporter = Exporter("0")
        exporter.node = a.node
        await exporter.start()
        gaps: list[float] = []

        async def beat() -> None:
            last = time.perf_counter()
            while True:
                await asyncio.sleep(0)
                now = time.perf_counter()
                gaps.append(now - last)
                last = now

        beating = asyncio.create_task(beat())
        began = time.perf_counter()
        status, text = await get(exporter)
        took = time.perf_counter() - began
        beating.cancel()
        assert status == 200
        assert sum(v for (name, _), v in samples(text).items() if name == "dpvs_sessions") == slots
        await exporter.close()
        await a.listener.close()
        return {"scrape_s": took, "longest_step_s": exporter.longest_step_ns / 1e9, "gaps": len(gaps)}

    measured = asyncio.run(body())
    print(json.dumps(measured))
    assert measured["longest_step_s"] < 0.05, measured
    assert measured["gaps"] > 20, "others had their turns"


if __name__ == "__main__":
    document().write_text(rewritten())
