# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``dpvs-probe top`` shows, out of two answers of a running attach. Pure: gives sections, prints nothing."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from replicator import render

Answer = Mapping[str, Any]


class Section(NamedTuple):
    """A title and a table."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]]


def rates(before: Answer, now: Answer) -> dict[str, float]:
    """Sessions created, changed and ended a second, events, packets, records told to peers, between two answers."""
    seconds = (now["at_ns"] - before["at_ns"]) / 1e9
    if seconds <= 0:
        return {}
    numbers = (_numbers(answer) for answer in (before, now))
    old, new = numbers
    return {name: round(max(0, new[name] - old.get(name, 0)) / seconds, 1) for name in new}


def _numbers(answer: Answer) -> dict[str, int]:
    found = {name: int(value) for name, value in answer["totals"].items()}
    found["events"] = answer["status"]["events"]["total"]
    found["told_to_peers"] = sum(row["records"] for row in answer["peers"] if row["direction"] == "to")
    packets = answer["status"].get("packets")
    if isinstance(packets, Mapping):
        found["packets"] = packets["counted"]
    return found


def headline(answer: Answer, rate: Mapping[str, float]) -> Iterator[str]:
    """Some lines on the whole."""
    status = answer["status"]
    sessions = status["sessions"]
    of_peers = sum(sessions["of_peers"].values())
    ready = "ready" if status["ready"] else f"not ready: {status['waiting_for']}"
    yield f"node {status['node']}, DPVS pid {status['pid']}, {status['state']} for {status['for_s']:.0f} s, {ready}"
    yield f"sessions {sessions['own']}, copies in DPVS {sessions['copies']}, peers' {of_peers}"
    per_second = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in rate.items())
    yield f"a second: {per_second or '-'}"
    yield from _probes(status.get("probes", {}))
    packets = status.get("packets")
    if isinstance(packets, Mapping):
        where = ", ".join(f"{one['interface']} {one['mode']}" for one in packets["interfaces"])
        yield f"packets: {where}; {packets['flows']} flows, {packets['orphans']} orphans"


def _probes(probes: Mapping[str, Any]) -> Iterator[str]:
    """What the probes cost, as far as it is known."""
    said = [str(probes["how"])] if "how" in probes else []
    if "share_percent" in probes:
        said.append(f"{probes['share_percent']:g} % of a worker's time (budget {probes['budget_percent']:g} %)")
        said.append(f"{probes['hit_create_ns']} + {probes['hit_free_ns']} ns a session ({probes['hit_cost']})")
    if probes.get("lost"):
        said.append(f"{probes['lost']} events lost")
    if said:
        yield f"probes {'on' if probes.get('attached') else 'off'}: {', '.join(said)}"


def sections(answer: Answer) -> Iterator[Section]:
    """The tables."""
    columns = ("name", "sessions", "open")
    for title, name in (("services", "services"), ("real servers", "real_servers")):
        total = answer[f"{name}_total"]
        more = f" ({len(answer[name])} of {total})" if total > len(answer[name]) else ""
        yield Section(title + more, columns, answer[name])
    for title, name in (("states", "states"), ("workers", "workers")):
        yield Section(title, ("name", "sessions"), [{"name": n, "sessions": c} for n, c in answer[name].items()])
    peers = [
        {**row, "lag_p50_ms": row.get("event_to_peer_p50_ms"), "lag_p99_ms": row.get("event_to_peer_p99_ms")}
        for row in answer["peers"]
        if row["direction"] != "listen"
    ]
    yield Section(
        "peers", ("direction", "node", "address", "state", "sessions", "waiting", "lag_p50_ms", "lag_p99_ms"), peers
    )


def plain(answer: Answer, rate: Mapping[str, float]) -> Iterator[str]:
    """All of it as lines of text."""
    yield from headline(answer, rate)
    for section in sections(answer):
        if section.rows:
            yield from chain(["", section.title], (f"  {line}" for line in render.table(section.rows, section.columns)))
