# SPDX-License-Identifier: GPL-2.0-or-later
"""What became of each kind of session in the tests, kept as data, and the table of docs/injection.md made of it.

Rules: nothing is written here by hand. Tests record what they saw when ``DPVS_PROBE_RECORD_KINDS`` is set; the twin's
outcomes are those of every test run (a test fails that sees something else), those of a real DPVS the latest recorded
run's, with release and date. ``scripts/kinds`` puts the table into the document, and a unit test compares.
"""

import json
import os
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "injection.md"
BEGIN, END = "<!-- kinds: made by scripts/kinds -->", "<!-- kinds: end -->"
NODES = {"twin": "twin", "dpvs": "DPVS 1.10.2"}
SURVIVES = "survives"
RECORD = "DPVS_PROBE_RECORD_KINDS"
# Kind -> what it is: mode, and the families of the client's side and the real server's side.
KINDS = {
    "fnat": "FullNAT, IPv4",
    "fnat6": "FullNAT, IPv6",
    "fnat64": "FullNAT, IPv6 to IPv4 (NAT64)",
    "dr": "direct routing, IPv4",
    "dr6": "direct routing, IPv6",
    "nat": "NAT, IPv4",
    "nat6": "NAT, IPv6",
    "tunnel": "tunnel, IPv4 in IPv4",
    "tunnel6": "tunnel, IPv6 in IPv6",
    "tunnel64": "tunnel, IPv6 in IPv4",
}
COLUMNS = (("tcp", 1), ("tcp", 2), ("udp", 1), ("udp", 2))


def name(kind: str, proto: str, workers: int) -> str:
    return f"{kind} {proto} {workers}"


def load(node: str) -> dict[str, str]:
    """Outcomes by case; ``node`` is "twin" or "dpvs"."""
    path = HERE / f"{node}.json"
    return dict(json.loads(path.read_text())["outcomes"]) if path.exists() else {}


def record(node: str, case: str, outcome: str) -> None:
    """Keep what a test saw, if the environment asks for that."""
    if RECORD not in os.environ:
        return
    outcomes = {**load(node), case: outcome}
    content = {"node": NODES[node], "date": date.today().isoformat(), "outcomes": dict(sorted(outcomes.items()))}
    (HERE / f"{node}.json").write_text(json.dumps(content, indent=1) + "\n")


def recorded_on(node: str) -> str:
    return str(json.loads((HERE / f"{node}.json").read_text())["date"])


def _cell(outcome: str | None) -> str:
    return "not tried" if outcome is None else "yes" if outcome == SURVIVES else outcome.replace("|", "/")


def table() -> str:
    """The table, as it stands in the document."""
    seen = {node: load(node) for node in NODES}
    lines = [
        "| kind | TCP, 1 worker | TCP, 2 workers | UDP, 1 worker | UDP, 2 workers |",
        "|---|---|---|---|---|",
    ]
    for kind, text in KINDS.items():
        cells = [
            " / ".join(_cell(seen[node].get(name(kind, proto, workers))) for node in NODES)
            for proto, workers in COLUMNS
        ]
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    singles = sorted({case for outcomes in seen.values() for case in outcomes if case.split(" ")[0] not in KINDS})
    lines += ["", "| other | twin | stock DPVS 1.10.2 |", "|---|---|---|"]
    lines += [f"| {case} | " + " | ".join(_cell(seen[node].get(case)) for node in NODES) + " |" for case in singles]
    lines += ["", f"First the twin, then stock DPVS 1.10.2, recorded on {recorded_on('dpvs')}."]
    return "\n".join(lines)


def written() -> str:
    """The table in the document."""
    text = DOCUMENT.read_text()
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip("\n")


def write() -> None:
    """Put the table of what is recorded into the document."""
    text = DOCUMENT.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    DOCUMENT.write_text(f"{before}\n{table()}\n{after}")


if __name__ == "__main__":
    write()
