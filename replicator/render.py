# SPDX-License-Identifier: GPL-2.0-or-later
"""Answers as text for a person: aligned columns, plain words, no colour. Pure: gives lines, prints nothing."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

FIRST_ROWS = 1000  # looked at for the widths of a table that may be endless

SESSION_COLUMNS = (
    "origin", "proto", "mode", "state", "client", "virtual", "local", "real", "timeout_s", "worker", "flags",
)  # fmt: skip
PEER_COLUMNS = (
    "direction", "node", "address", "state", "for_s", "sessions", "waiting", "records", "bytes", "source",
    "note",
)  # fmt: skip
ACTIVE_COLUMNS = (*SESSION_COLUMNS, "last_active_s", "packets", "bytes", "tcp_flags")
ORPHAN_COLUMNS = ("proto", "client", "virtual", "last_active_s", "packets", "bytes", "tcp_flags")


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> Iterator[str]:
    """A header and one line a row. Widths fit the first thousand rows; a longer cell later pushes its line out."""
    source = ([cell(row.get(column)) for column in columns] for row in rows)
    first = list(islice(source, FIRST_ROWS))
    header = [heading(column) for column in columns]
    widths = [max(map(len, column)) for column in zip(header, *first, strict=True)]
    for row in chain([header], first, source):
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def heading(column: str) -> str:
    """What stands above a column."""
    return column.removesuffix("_s").replace("_", " ").upper()


def sessions(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A table of sessions; with what their packets say, where that is known of one of the first."""
    source = iter(rows)
    first = list(islice(source, FIRST_ROWS))
    active = any("last_active_s" in row for row in first)
    yield from table(chain(first, source), ACTIVE_COLUMNS if active else SESSION_COLUMNS)


def cell(value: Any) -> str:
    """One value, as short as it can be said."""
    if value is None or (not value and isinstance(value, str | list)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)


def outline(value: Mapping[str, Any], indent: int = 0) -> Iterator[str]:
    """A nested object, one ``name: value`` a line, what is below a name indented."""
    for name, below in value.items():
        plain, unit = _unit(name)
        title = " " * indent + plain.replace("_", " ")
        if isinstance(below, Mapping):
            if below:
                yield f"{title}:"
                yield from outline(below, indent + 2)
        elif isinstance(below, list) and below and isinstance(below[0], Mapping):
            for number, item in enumerate(below):
                yield f"{title} {number}:"
                yield from outline(item, indent + 2)
        else:
            yield f"{title}: {cell(below)}{unit if below is not None else ''}"


def link_title(row: Mapping[str, Any]) -> str:
    """What a row of ``peers`` is about."""
    return " ".join(str(row[name]) for name in ("direction", "node", "address") if row.get(name))


def _unit(name: str) -> tuple[str, str]:
    """A name without the unit it ends in, and the unit."""
    for ending, unit in (("_s", " s"), ("_ms", " ms")):
        if name.endswith(ending):
            return name.removesuffix(ending), unit
    return name, ""


def checks(found: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The report of doctor: a mark, what was looked for, what was found; what to do stands below."""
    for check in found:
        mark = {True: "ok", False: "FAILED", None: "note"}[check["ok"]]
        yield f"{mark:<7} {check['name']:<22} {check['detail']}"
        if check["help"] and check["ok"] is not True:
            yield f"{'':<30} -> {check['help']}"
