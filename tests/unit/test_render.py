# SPDX-License-Identifier: GPL-2.0-or-later
from itertools import islice, repeat

from replicator.render import cell, checks, outline, table


def test_table_is_aligned() -> None:
    rows = [{"name": "a", "for_s": 1.0, "tags": ["x", "y"]}, {"name": "longer", "for_s": 12.34, "tags": []}]
    assert list(table(rows, ("name", "for_s", "tags"))) == [
        "NAME    FOR   TAGS",
        "a       1     x,y",
        "longer  12.3  -",
    ]


def test_an_endless_table_begins_at_once() -> None:
    assert len(list(islice(table(repeat({"a": 1}), ("a",)), 5000))) == 5000


def test_cells() -> None:
    assert [cell(v) for v in (None, "", [], True, False, 0, 2.0, 2.25, "x")] == [
        "-", "-", "-", "yes", "no", "0", "2", "2.2", "x",
    ]  # fmt: skip


def test_outline() -> None:
    value = {
        "node": "a",
        "for_s": 1.5,
        "longest_ms": 2,
        "nobody_s": None,
        "table": {"present": 3, "nothing": {}, "by_origin": {"b": 2}},
        "sites": [{"kind": "nop"}],
    }
    assert list(outline(value)) == [
        "node: a",
        "for: 1.5 s",
        "longest: 2 ms",
        "nobody: -",
        "table:",
        "  present: 3",
        "  by origin:",
        "    b: 2",
        "sites 0:",
        "  kind: nop",
    ]


def test_checks() -> None:
    found = [
        {"name": "root", "ok": True, "detail": "yes", "help": "never shown"},
        {"name": "headers", "ok": False, "detail": "none found", "help": "install them"},
        {"name": "agent", "ok": None, "detail": "not there", "help": ""},
    ]
    assert list(checks(found)) == [
        "ok      root                   yes",
        "FAILED  headers                none found",
        "                               -> install them",
        "note    agent                  not there",
    ]
