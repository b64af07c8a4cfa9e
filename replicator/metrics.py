# SPDX-License-Identifier: GPL-2.0-or-later
"""What a node shows to Prometheus: names, and the counters behind them.

Rules
- Names, labels and units are a promise: none is ever renamed or given another meaning. ``tests/unit/metrics.golden``
  holds them, docs/metrics.md is written from ``TABLE``.
- Nothing is counted twice: all is read from the counters that ``status`` and ``peers`` show, when a scrape comes.
- A scrape runs in the node's own loop, in steps that are short, so that no tick waits for it and nothing is read while
  it changes.
"""

from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from prometheus_client import ProcessCollector
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UntypedMetricFamily,
)

from collector.record import Bools, Records, state_name
from probes.packets import OUTCOMES
from replicator.admin import Line
from replicator.engine import State
from replicator.histogram import Histogram, upper_ns
from replicator.node import Node
from replicator.query import PROTOCOL_NAMES
from replicator.transport.interface import Loss
from replicator.wire import SyncReason

BLOCK = 1 << 14  # slots looked at in one step
MAX_STATE = 16
# Upper bounds of the histogram that is shown: of the 128 that are counted, those near 0.1, 0.2, 0.5, 1 ms ... 10 s.
EDGES_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
CHANGES = ("created", "updated", "deleted")
LINK_STATES = ("down", *(state.value for state in State if state is not State.IDLE))

GAUGE, COUNTER, UNTYPED, HISTOGRAM = "gauge", "counter", "untyped", "histogram"


class Kind(NamedTuple):
    """One metric: what never changes."""

    name: str  # as it is asked for, with _total
    type: str
    labels: tuple[str, ...]
    help: str


TABLE = (
    Kind("dpvs_sync_delay", GAUGE, ("peer",),
         "Age in seconds of the oldest change that the peer has not acknowledged; 0: it has everything."),
    Kind("dpvs_sync_failures", UNTYPED, ("direction", "peer", "reason"),
         "The same as dpvs_sync_failures_total, by the name without the suffix."),
    Kind("dpvs_sync_failures_total", COUNTER, ("direction", "peer", "reason"),
         "Links and attempts at links that failed: to a peer, from one, or of strangers at the listening port."),
    Kind("dpvs_sync_peer_info", GAUGE, ("peer", "node"),
         "1 for each peer that we send to: its address, and the node that was last met there."),
    Kind("dpvs_sync_link_up", GAUGE, ("direction", "peer"),
         "1 if the link stands and both sides have introduced themselves; peer: an address (to), a node "
         "(from)."),
    Kind("dpvs_sync_link_state", GAUGE, ("peer", "state"), "1 for the state that the link to the peer is in."),
    Kind("dpvs_sync_pending_sessions", GAUGE, ("peer",),
         "Sessions that the peer has to be told of and that are not sent yet."),
    Kind("dpvs_sync_in_flight_bytes", GAUGE, ("peer",), "Sent to the peer and not acknowledged."),
    Kind("dpvs_sync_sent_changes_total", COUNTER, ("peer", "change"),
         "Sessions sent to the peer as created, updated or deleted."),
    Kind("dpvs_sync_sent_bytes_total", COUNTER, ("peer",), "Bytes of sessions sent to the peer, as they were sent."),
    Kind("dpvs_sync_uncompressed_bytes_total", COUNTER, ("peer",), "The same bytes before compression."),
    Kind("dpvs_sync_resyncs_total", COUNTER, ("peer", "reason"), "Full syncs sent to the peer, by why."),
    Kind("dpvs_sync_partial_syncs_total", COUNTER, ("peer",), "Reconnects that went on where the link was."),
    Kind("dpvs_sync_full_sync_seconds", GAUGE, ("peer",),
         "How long the last full sync to the peer took; 0 before the first."),
    Kind("dpvs_sync_event_to_ack_seconds", HISTOGRAM, ("peer",),
         "From a change in DPVS to the peer's acknowledgement."),
    Kind("dpvs_sync_received_changes_total", COUNTER, ("origin", "change"),
         "Sessions of the node that were created, updated or deleted here as it said."),
    Kind("dpvs_sync_gaps_total", COUNTER, ("origin",), "Frames of the node that were missed; each makes a full sync."),
    Kind("dpvs_sync_complete", GAUGE, ("origin",),
         "1 if all sessions of the node are here: a full sync is in and nothing was missed since."),
    Kind("dpvs_sync_filtered_sessions_total", COUNTER, ("reason",),
         "Sessions that filters held back from peers, each once, by what did first."),
    Kind("dpvs_sessions", GAUGE, ("origin", "proto", "state"),
         "Sessions in the tables; origin: own, or the node whose copies they are."),
    Kind("dpvs_session_changes_total", COUNTER, ("change",),
         "Sessions of our own DPVS that were created, updated or deleted."),
    Kind("dpvs_injections_total", COUNTER, ("result",), "Answers of the agent to sessions of peers, by result."),
    Kind("dpvs_injected_sessions", GAUGE, (), "Sessions of peers that stand in our DPVS because of us."),
    Kind("dpvs_injections_waiting", GAUGE, (), "Sessions of peers that are to be put into DPVS and are not yet."),
    Kind("dpvs_injection_stopped", GAUGE, (), "1 if nothing more is put into DPVS because of an error."),
    Kind("dpvs_store_up", GAUGE, (), "1 while this node's own sessions are kept in a store, whole (--store)."),
    Kind("dpvs_store_sessions", GAUGE, (), "Sessions in the store."),
    Kind("dpvs_store_restored_sessions", GAUGE, ("result",),
         "Sessions of an earlier DPVS on this node: in_dpvs, unsettled (not back yet), expired or not_to_be_put_in."),
    Kind("dpvs_agent_state", GAUGE, ("state",), "1 for the state of the agent inside DPVS."),
    Kind("dpvs_probe_info", GAUGE, ("node", "version", "dpvs", "layout", "links"), "1; what runs here."),
    Kind("dpvs_probe_attached", GAUGE, (), "1 while attached to a DPVS; 0 while waiting for one."),
    Kind("dpvs_probe_attaches_total", COUNTER, (), "How often this process attached to a DPVS."),
    Kind("dpvs_probe_ready", GAUGE, (), "1 if traffic may come: our own sessions and those of the peers are here."),
    Kind("dpvs_probe_promoted", GAUGE, (),
         "1 if peers' sessions go into DPVS as they come; 0 on a standby of --policy promote."),
    Kind("dpvs_probe_events_total", COUNTER, ("kind",),
         "Events of the probes: sessions created or freed, copies of peers' sessions too, or of no slot."),
    Kind("dpvs_probe_events_lost_total", COUNTER, (),
         "Events dropped because a ring was full; the scan repairs what they said."),
    Kind("dpvs_probe_hits_total", COUNTER, ("site",), "Times a worker ran into a probe."),
    Kind("dpvs_probe_worker_time_ratio", GAUGE, (),
         "Share of the busiest worker's time that probes took in the last second."),
    Kind("dpvs_probe_worker_time_budget_ratio", GAUGE, (), "The share that probes may take (--probe-budget)."),
    Kind("dpvs_probe_probes_attached", GAUGE, (), "1 while the probes are in DPVS; 0: the scan works alone."),
    Kind("dpvs_probe_detached_over_budget_total", COUNTER, (),
         "Times the probes were taken away because they took too much."),
    Kind("dpvs_probe_switches_total", COUNTER, ("switch",),
         "Times the probes were put on (attached), taken away as they took too much (detached_over_budget), or could "
         "not be put back (failed)."),
    Kind("dpvs_probe_worker_time_highest_ratio", GAUGE, (),
         "The highest share of any worker's time in any second since the attach began."),
    Kind("dpvs_probe_longest_switch_seconds", GAUGE, (),
         "Longest time that putting the probes on or taking them away took; DPVS does not wait for it."),
    Kind("dpvs_probe_hit_seconds", GAUGE, ("site",), "What a hit takes of a worker's time, as attach found out."),
    Kind("dpvs_probe_scan_seconds_total", COUNTER, (), "Processor time spent on scanning the session pool."),
    Kind("dpvs_probe_scan_passes_total", COUNTER, (), "Walks over the whole session pool."),
    Kind("dpvs_probe_scan_late_total", COUNTER, (), "Walks that took longer than they should."),
    Kind("dpvs_probe_torn_reads_total", COUNTER, (),
         "Sessions that DPVS changed while they were read; they are read again."),
    Kind("dpvs_probe_longest_tick_seconds", GAUGE, (), "Longest round of the loop since the attach began."),
    Kind("dpvs_packet_interface_info", GAUGE, ("interface", "mode"),
         "1 for each interface whose packets are counted (--xdp), and how: native or generic."),
    Kind("dpvs_packets_total", COUNTER, ("outcome",),
         "Packets that came on these interfaces: counted for a service, or why not."),
    Kind("dpvs_packet_bytes_total", COUNTER, (), "Bytes of the frames that were counted for a service."),
    Kind("dpvs_packet_services", GAUGE, (), "Services whose packets are counted."),
    Kind("dpvs_packet_flows", GAUGE, ("covered_by",),
         "Flows that are kept, by whose session covers them: own, a peer, or nobody."),
    Kind("dpvs_packet_flows_limit", GAUGE, (), "Flows that there is room for (--xdp-flows)."),
    Kind("dpvs_packet_flows_dropped_total", COUNTER, ("reason",),
         "Flows that are not kept: evicted to make room for others, or no_room for them."),
    Kind("dpvs_packet_orphans", GAUGE, (),
         "Flows to a service that no session here covers, at two looks, with packets since."),
    Kind("dpvs_packet_orphans_asked_total", COUNTER, (), "Flows whose sessions peers were asked for."),
    Kind("dpvs_packet_look_failures_total", COUNTER, (),
         "Looks at the flows, or at the list of services, that failed; the next one comes a second later."),
)  # fmt: skip
NAMES = {kind.name: kind for kind in TABLE}
# Of prometheus_client.ProcessCollector, on Linux.
PROCESS_NAMES = (
    "process_virtual_memory_bytes", "process_resident_memory_bytes", "process_start_time_seconds",
    "process_cpu_seconds_total", "process_open_fds", "process_max_fds",
)  # fmt: skip

Labels = Sequence[str]
Value = tuple[Labels, float]


def family(name: str, *values: Value) -> Metric:
    """A metric of ``TABLE`` with its values: label values in the table's order."""
    kind = NAMES[name]
    if kind.type == COUNTER:
        made: Any = CounterMetricFamily(name.removesuffix("_total"), kind.help, labels=kind.labels)
    elif kind.type == UNTYPED:
        made = UntypedMetricFamily(name, kind.help, labels=kind.labels)
    else:
        made = GaugeMetricFamily(name, kind.help, labels=kind.labels)
    for labels, value in values:
        made.add_metric([str(label) for label in labels], float(value))
    assert isinstance(made, Metric)
    return made


async def collect(node: Node | None, attaches: int) -> AsyncIterator[Metric | None]:
    """All that there is to say; ``node``: None while there is no DPVS. None: nothing, but time for something else."""
    yield family("dpvs_probe_attached", ((), node is not None))
    yield family("dpvs_probe_attaches_total", ((), attaches))
    if node is None:
        yield family("dpvs_probe_ready", ((), 0))
    else:
        for metric in links(node.links_now(), node.latencies()):
            yield metric
        yield None
        for metric in of_status(node.status()):
            yield metric
        found: Counter[tuple[str, str, str]] = Counter()
        for origin, records, present in node.tables():
            for start in range(0, len(records), BLOCK):
                part = slice(start, start + BLOCK)
                for (proto, state), number in states(records[part], present[part]).items():
                    found[origin, proto, state] += number
                yield None
        yield family("dpvs_sessions", *sorted(found.items()))
    for metric in ProcessCollector(registry=None).collect():
        yield metric


def states(records: Records, present: Bools) -> dict[tuple[str, str], int]:
    """How many of the present sessions are of which protocol and state."""
    slots = np.flatnonzero(present)
    if len(slots) == 0:
        return {}
    proto, state = records["proto"][slots], np.minimum(records["state"][slots], MAX_STATE - 1)
    counts = np.bincount(proto.astype(np.int64) * MAX_STATE + state, minlength=1)
    return {
        (PROTOCOL_NAMES.get(int(at) // MAX_STATE, str(int(at) // MAX_STATE)),
         state_name(int(at) // MAX_STATE, int(at) % MAX_STATE)): int(counts[at])
        for at in np.flatnonzero(counts)
    }  # fmt: skip


def links(rows: Sequence[Line], latencies: Mapping[str, Histogram]) -> Iterator[Metric]:
    """Of the rows of ``peers``."""
    to = {row["address"]: row for row in rows if row["direction"] == "to"}
    origins: dict[str, list[Line]] = {}
    for row in rows:
        if row["direction"] == "from":
            origins.setdefault(row["node"], []).append(row)
    yield family("dpvs_sync_delay", *(((peer,), row["delay_ns"] / 1e9) for peer, row in to.items()))
    failed = list(_failures(rows))
    yield family("dpvs_sync_failures", *failed)
    yield family("dpvs_sync_failures_total", *failed)
    yield family("dpvs_sync_peer_info", *(((peer, row["node"] or ""), 1) for peer, row in to.items()))
    up: list[Value] = [(("to", peer), row["state"] in ("syncing", "live")) for peer, row in to.items()]
    up += [(("from", node), any(row["state"] in ("syncing", "live") for row in mine)) for node, mine in origins.items()]
    yield family("dpvs_sync_link_up", *up)
    yield family(
        "dpvs_sync_link_state",
        *(((peer, state), row["state"] == state) for peer, row in to.items() for state in LINK_STATES),
    )
    yield family("dpvs_sync_pending_sessions", *(((peer,), row["waiting"]) for peer, row in to.items()))
    for name, key in (
        ("dpvs_sync_in_flight_bytes", "in_flight_bytes"),
        ("dpvs_sync_sent_bytes_total", "bytes_sent"),
        ("dpvs_sync_uncompressed_bytes_total", "bytes_plain"),
        ("dpvs_sync_partial_syncs_total", "partial_syncs"),
    ):
        yield family(name, *(((peer,), row["link"][key]) for peer, row in to.items()))
    yield family(
        "dpvs_sync_sent_changes_total",
        *(((peer, change), row["link"][change]) for peer, row in to.items() for change in CHANGES),
    )
    reasons = [reason.name.lower() for reason in SyncReason]
    yield family(
        "dpvs_sync_resyncs_total",
        *(
            ((peer, reason), row["link"]["full_syncs_by_reason"].get(reason, 0))
            for peer, row in to.items()
            for reason in reasons
        ),
    )
    yield family("dpvs_sync_full_sync_seconds", *(((p,), row["link"]["full_sync_ns"] / 1e9) for p, row in to.items()))
    yield histogram("dpvs_sync_event_to_ack_seconds", latencies)
    yield family(
        "dpvs_sync_received_changes_total",
        *(
            ((node, change), sum(row["link"][change] for row in mine))
            for node, mine in origins.items()
            for change in CHANGES
        ),
    )
    yield family(
        "dpvs_sync_gaps_total",
        *(((node,), sum(row["link"].get("gaps", 0) for row in mine)) for node, mine in origins.items()),
    )
    yield family(
        "dpvs_sync_complete",
        *(((node,), any(not row["incomplete"] for row in mine)) for node, mine in origins.items()),
    )


def _failures(rows: Sequence[Line]) -> Iterator[Value]:
    """Labels and numbers of what failed. Reasons that are usual are there from the start, at 0."""
    found: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        direction, link = row["direction"], row["link"]
        peer = row["address"] if direction == "to" else row["node"] if direction == "from" else ""
        for loss in Loss:
            found[direction, peer, str(loss)] += link.get(f"lost_{loss}", 0)
        if direction == "to":
            found[direction, peer, "unreachable"] += link["dials_failed"]
        for name, number in link.items():
            for who in ("refused_by_peer_", "refused_"):
                if name.startswith(who) and isinstance(number, int) and name != "refused_by_peer":
                    found[direction, peer, name] += number
                    break
        for why, number in link.get("refused_at_the_door", {}).items():
            found[direction, peer, f"door_{why}"] += number
        if "crowded" in link:
            found[direction, peer, "crowded"] += link["crowded"]
    return iter([(labels, number) for labels, number in found.items()])


def histogram(name: str, of: Mapping[str, Histogram]) -> Metric:
    """Durations by one label, with the bounds ``EDGES_S``; the sum is made of the buckets' upper bounds."""
    kind = NAMES[name]
    made = HistogramMetricFamily(name, kind.help, labels=kind.labels)
    bounds = upper_ns()
    for label, durations in of.items():
        counts = durations.counts.astype(np.int64)
        buckets = [
            (f"{edge:g}", float(counts[: int(np.searchsorted(bounds, edge * 1e9, "right"))].sum())) for edge in EDGES_S
        ]
        buckets.append(("+Inf", float(counts.sum())))
        made.add_metric([label], buckets, sum_value=float(np.minimum(bounds, durations.greatest_ns) @ counts) / 1e9)
    return made


def of_status(status: Line) -> Iterator[Metric]:
    """Of what ``status`` says."""
    collector, events, probes = status["collector"], status["events"], status.get("probes", {})
    info = (status["node"], status.get("version", ""), status.get("release", ""), status.get("layout", ""),
            status.get("links", ""))  # fmt: skip
    yield family("dpvs_probe_info", (info, 1))
    yield family("dpvs_probe_ready", ((), status["ready"]))
    yield family("dpvs_session_changes_total", *(((change,), collector[change]) for change in CHANGES))
    kinds = (("created", "created"), ("freed", "freed"), ("unknown_slot", "unknown_slot"))
    yield family("dpvs_probe_events_total", *(((label,), events[name]) for label, name in kinds))
    yield family("dpvs_probe_events_lost_total", ((), events["lost"]))
    hits = {site: probes[f"hits_{site}"] for site in ("create", "free") if f"hits_{site}" in probes}
    yield family("dpvs_probe_hits_total", *(((site,), number) for site, number in hits.items()))
    if "share_percent" in probes:
        yield family("dpvs_probe_worker_time_ratio", ((), probes["share_percent"] / 100))
        yield family("dpvs_probe_worker_time_budget_ratio", ((), probes["budget_percent"] / 100))
        yield family("dpvs_probe_detached_over_budget_total", ((), probes["switches"]["detached_over_budget"]))
        yield family("dpvs_probe_switches_total", *(((which,), n) for which, n in probes["switches"].items()))
        yield family("dpvs_probe_worker_time_highest_ratio", ((), probes["highest_share_percent"] / 100))
        yield family("dpvs_probe_longest_switch_seconds", ((), probes["longest_switch_ms"] / 1e3))
        yield family("dpvs_probe_hit_seconds", *(((s,), probes[f"hit_{s}_ns"] / 1e9) for s in ("create", "free")))
    yield family("dpvs_probe_probes_attached", ((), bool(probes.get("attached"))))
    yield family("dpvs_probe_scan_seconds_total", ((), status["loop"]["scan_s"]))
    yield family("dpvs_probe_scan_passes_total", ((), status["scans"]))
    yield family("dpvs_probe_scan_late_total", ((), collector["scan_late"]))
    yield family("dpvs_probe_torn_reads_total", ((), collector["reads_torn"]))
    yield family("dpvs_probe_longest_tick_seconds", ((), status["loop"]["longest_tick_ms"] / 1e3))
    held = status["held_back_by_filter"]
    of_filters = held if isinstance(held, dict) else dict.fromkeys(("service", "state", "age"), 0)
    yield family("dpvs_sync_filtered_sessions_total", *(((why,), number) for why, number in of_filters.items()))
    injection = status["injection"]
    if isinstance(injection, dict):
        yield family("dpvs_injections_total", *(((why,), number) for why, number in injection["results"].items()))
        yield family("dpvs_injected_sessions", ((), injection["installed"]))
        yield family("dpvs_injections_waiting", ((), status["injections_waiting"]))
        yield family("dpvs_injection_stopped", ((), injection["stopped"] is not None))
        yield family("dpvs_probe_promoted", ((), injection["role"] != "standby"))
    packets = status["packets"]
    if isinstance(packets, dict):
        yield from _of_packets(packets)
    store = status["store"]
    if store["state"] != "off":
        yield family("dpvs_store_up", ((), store["state"] == "kept"))
        yield family("dpvs_store_sessions", ((), store.get("sessions", 0)))
    if "restored" in store:
        results = ("in_dpvs", "unsettled", "expired", "not_to_be_put_in")
        counts = ((result, sum(one[result] for one in store["restored"])) for result in results)
        yield family("dpvs_store_restored_sessions", *(((result,), count) for result, count in counts))
    if "state" in status.get("agent", {}):
        yield family("dpvs_agent_state", ((status["agent"]["state"],), 1))


def _of_packets(packets: Line) -> Iterator[Metric]:
    """Of what ``status`` says of --xdp."""
    yield family("dpvs_packet_interface_info", *(((o["interface"], o["mode"]), 1) for o in packets["interfaces"]))
    yield family("dpvs_packets_total", *(((outcome,), packets[outcome]) for outcome in OUTCOMES))
    yield family("dpvs_packet_bytes_total", ((), packets["bytes"]))
    yield family("dpvs_packet_services", ((), packets["services_watched"]))
    own, peers = packets["flows_of_sessions"], packets["flows_of_peers_sessions"]
    covered = (("own", own), ("peer", peers), ("nobody", packets["flows"] - own - peers))
    yield family("dpvs_packet_flows", *(((who,), number) for who, number in covered))
    yield family("dpvs_packet_flows_limit", ((), packets["flows_limit"]))
    dropped = (("evicted", packets["flows_evicted"]), ("no_room", packets["flows_no_room"]))
    yield family("dpvs_packet_flows_dropped_total", *(((why,), number) for why, number in dropped))
    yield family("dpvs_packet_orphans", ((), packets["orphans"]))
    yield family("dpvs_packet_orphans_asked_total", ((), packets["orphans_asked_for"]))
    yield family("dpvs_packet_look_failures_total", ((), packets["failures"]))


def markdown() -> Iterator[str]:
    """The table for docs/metrics.md: lines."""
    yield "| name | type | labels | |"
    yield "|---|---|---|---|"
    for kind in TABLE:
        labels = ", ".join(f"`{label}`" for label in kind.labels)
        yield f"| `{kind.name}` | {kind.type} | {labels} | {kind.help} |"
