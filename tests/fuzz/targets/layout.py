# SPDX-License-Identifier: GPL-2.0-or-later
"""probes/layout.py: layouts as JSON. An input is a file."""

import json
import random
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Any

from probes.layout import BadLayout, Evidence, Layout, UnknownLayout, parse_text, select
from tests.fuzz.judge import SLACK_BYTES, must, only
from tests.fuzz.mutation import resize

MAX_BYTES = 4096
WORDS = (b"Infinity", b"NaN", b"null", b"true", b"-1", b"1e999", b"1.5", b"[]", b"{}", b'"0x"', b"[[[[[[", b'"format"')


@cache
def _small() -> dict[str, Any]:
    """The shipped one, with little of its contents."""
    data = json.loads(resources.files("probes").joinpath("layouts", "1.10.2.json").read_text())
    for part in ("dpvs", "dpdk"):
        structs = data[part]["structs"]
        data[part]["structs"] = {
            name: {"size": structs[name]["size"], "fields": dict(list(structs[name]["fields"].items())[:2])}
            for name in list(structs)[:2]
        }
    for name in ("sockopt_ids", "flags"):
        data["dpvs"][name] = dict(list(data["dpvs"][name].items())[:2])
    return {key: data[key] for key in ("format", "dpvs", "dpdk")}


def seeds() -> Iterable[bytes]:
    yield json.dumps(_small()).encode()
    yield json.dumps({**_small(), "format": 2}).encode()


def bound(data: bytes) -> int:
    return 2 * SLACK_BYTES + 64 * len(data)


def check(data: bytes) -> None:
    with only(BadLayout, UnknownLayout):
        layout = parse_text("fuzz", data)
        must(
            isinstance(layout, Layout) and all(isinstance(name, str) for name in layout.releases), "releases are names"
        )
        numbers = [layout.sockopt_version, *layout.sockopt_ids.values(), *layout.flags.values()]
        for struct in layout.structs.values():
            numbers.append(struct.size)
            for offset, size in struct.fields.values():
                numbers += (offset, size)
                must(0 <= offset <= offset + size <= struct.size, "a field lies in its struct")
        must(all(type(number) is int and number >= 0 for number in numbers), "numbers are numbers")
        for struct in layout.structs.values():
            for name in struct.fields:
                with only(BadLayout):
                    layout.unpack(struct.name, name, bytes(64))
        with only(BadLayout, UnknownLayout):
            layout.size("dp_vs_conn")
            select(Evidence("1.10.2", 64), [layout])


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    """Mostly one value of the tree."""
    rng = random.Random(seed)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return resize(data, longest)
    if rng.random() < 0.4 or not isinstance(tree, dict):
        return resize(data, longest)
    node: Any = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(node[key], dict | list) and rng.random() < 0.9:
            node = node[key]
            continue
        values: tuple[Any, ...] = (
            None,
            True,
            -1,
            1.5,
            1 << 70,
            "",
            "0x1z",
            "x" * 9,
            [],
            {},
            [1],
            [0, 8, 1],
            [0, "8"],
            float("inf"),
            float("nan"),
        )
        node[key] = rng.choice(values)
        break
    return json.dumps(tree).encode()[:longest]
