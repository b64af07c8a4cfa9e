# SPDX-License-Identifier: GPL-2.0-or-later
"""What was found in a capture, as text for a person or JSON for a program. Pure: gives lines, prints nothing."""

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Protocol

from replicator import query, render

from .links import Counts, End, Said, Seen


class Read(Protocol):
    """What is said of the file (``capture.Capture``)."""

    packets: int
    fragments: int
    unknown_links: int
    cut: bool


def end(capture: Read, counts: Counts) -> str:
    """The last line for a program."""
    return json.dumps({"event": "end", "packets": capture.packets, "cut": capture.cut, **vars(counts)})


def remarks(capture: Read, counts: Counts) -> Iterator[str]:
    """What to know of a capture as a whole, for standard error."""
    if counts.frames:
        passed_over = _several(counts.skipped_bytes, "byte") + " passed over"
        parts = (
            (counts.faults, _several(counts.faults, "fault")),
            (counts.skipped_bytes, passed_over),
            (counts.encrypted, f"{connections(counts.encrypted)} of TLS"),
            (counts.others, f"{connections(counts.others)} of something else"),
            (counts.given_up, f"{connections(counts.given_up)} given up"),
        )
        said = [text for number, text in parts if number]
        yield "; ".join([f"{_several(counts.frames, 'frame')} on {connections(counts.links)}", *said])
    if capture.cut:
        yield "the capture ends within a packet, or is damaged there: what came before is shown"
    if capture.fragments:
        yield f"{capture.fragments} fragments of IP packets were not looked at"
    if capture.unknown_links:
        yield f"{capture.unknown_links} packets are of an unknown kind of network"


def connections(number: int) -> str:
    """``1 connection``, ``2 connections``."""
    return _several(number, "connection")


def _several(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def lines(found: Seen | Said, verbose: bool) -> Iterator[str]:
    """For a person."""
    start = f"{_clock(found.time_ns)}  {_way(found)}"
    if isinstance(found, Said):
        size = f" {found.size} bytes:" if found.size else ":"
        yield f"{start}  {found.what}{size} {found.text}"
        return
    words = [found.opcode.name]
    if found.sequence:
        words.append(f"#{found.sequence}")
    words += _summary(found)
    words.append(f"{found.size} bytes")
    if found.note:
        words.append(f"({found.note})")
    if found.fault:
        words.append(f"FAULT {found.fault}")
    yield f"{start}  {' '.join(words)}"
    if verbose:
        yield from (f"    {line}" for line in _details(found))


def _clock(time_ns: int) -> str:
    seconds = time_ns // 1_000_000_000
    try:
        day = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):  # a damaged packet's
        day = str(seconds)
    return f"{day}.{time_ns // 1000 % 1_000_000:06}"


def _summary(found: Seen) -> list[str]:
    about = found.about
    if "count" in about:
        packed = f"{about.get('compression', '?')} of {about['raw_bytes']}" if about["compressed"] else ""
        what = "ends" if about["kind"] == "ended" else f"{about['kind']} sessions"
        return [word for word in (f"{about['count']} {what},", packed) if word]
    if "node" in about:
        return [f"{about['role']} {about['node']}, run {about['epoch']}, {about['slots']} slots,"]
    words = []
    if "number" in about:
        words.append(f"sync {about['number']},")
    if "reason" in about:
        words.append(f"{about['reason']},")
    if "flows" in about:
        words.append(f"{about['flows']} flows,")
    if about.get("text"):
        words.append(f"'{about['text']}',")
    return words


def _details(found: Seen) -> Iterable[str]:
    if found.sessions is not None:
        for row in query.describe(found.sessions, ""):
            yield (
                f"{row['slot']}.{row['generation']} {row['proto']} {row['mode']} {row['state']}"
                f" {row['client']} -> {row['virtual']} | {row['local']} -> {row['real']}"
                f" timeout {render.cell(row['timeout_s'])} s worker {render.cell(row['worker'])}"
                f" {render.cell(row['flags'])}"
            )
    elif found.ended is not None:
        yield from (f"{slot}.{generation} ended" for slot, generation in found.ended)
    elif "node" in found.about:
        yield from render.outline(found.about)


def objects(found: Seen | Said, verbose: bool) -> Iterator[str]:
    """For a program: one object, one line."""
    line: dict[str, Any] = {
        "time_ns": found.time_ns, "from": _end(found.source), "to": _end(found.destination),
    }  # fmt: skip
    if isinstance(found, Said):
        yield json.dumps({"event": found.what, **line, "bytes": found.size, "text": found.text})
        return
    line |= {"opcode": found.opcode.name, "sequence": found.sequence, "bytes": found.size, **found.about}
    line |= {"note": found.note, "fault": str(found.fault) if found.fault else None}
    if verbose and found.sessions is not None:
        rows = query.describe(found.sessions, "")
        line["sessions"] = [{name: value for name, value in row.items() if name != "origin"} for row in rows]
    elif verbose and found.ended is not None:
        line["sessions"] = [{"slot": slot, "generation": generation} for slot, generation in found.ended]
    yield json.dumps({"event": "frame", **line})


def _way(found: Seen | Said) -> str:
    return f"{_end(found.source)} -> {_end(found.destination)}"


def _end(end: End) -> str:
    address, port = end
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
