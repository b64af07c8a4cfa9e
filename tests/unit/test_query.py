# SPDX-License-Identifier: GPL-2.0-or-later
import socket
from typing import Any

import numpy as np
import pytest

from collector import record
from collector.record import RECORD, Records
from replicator.query import BadFilter, Filter, describe


def packed(text: str) -> np.ndarray[Any, Any]:
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    return np.frombuffer(socket.inet_pton(family, text).ljust(16, b"\0"), np.uint8)


@pytest.fixture
def records() -> Records:
    """Four sessions: FullNAT TCP, FullNAT UDP, TCP over IPv6, and IPv6 to the client with IPv4 inside."""
    out = np.zeros(4, RECORD)
    out["slot"] = [3, 5, 8, 13]
    out["generation"] = [1, 1, 2, 1]
    out["proto"] = [6, 17, 6, 6]
    out["fwdmode"] = [5, 5, 3, 5]
    out["state"] = [1, 1, 5, 1]
    out["af"] = [2, 2, 10, 10]
    out["af_out"] = [2, 2, 10, 2]
    out["worker"] = [1, 255, 2, 1]
    out["flags"] = [0x100, 0x100 | 0x10, 0x300, 0x8300]
    ends = [
        ("10.9.0.10", "10.9.1.100", "10.9.2.200", "10.9.0.20"),
        ("10.9.0.10", "10.9.1.100", "10.9.2.201", "10.9.0.21"),
        ("fd00::10", "fd00:1::100", "fd00::10", "fd00::20"),
        ("a09::", "fd00:1::100", "10.9.2.200", "10.9.0.20"),
    ]
    for row, addresses in zip(out, ends, strict=True):
        for name, text in zip(("caddr", "vaddr", "laddr", "daddr"), addresses, strict=True):
            row[name] = packed(text)
    out["cport"] = [40000, 40001, 40002, 80]
    out["vport"] = [80, 53, 80, 443]
    out["lport"] = [1025, 1026, 40002, 1027]
    out["dport"] = [80, 53, 80, 443]
    out["timeout_ms"] = 90500
    return out


@pytest.mark.parametrize(
    ("request_fields", "slots"),
    [
        ({}, [3, 5, 8, 13]),
        ({"address": "10.9.0.10"}, [3, 5]),
        ({"address": "10.9.2.200"}, [3, 13]),
        ({"address": "10.9.0.21"}, [5]),
        ({"address": "fd00:1::100"}, [8, 13]),
        ({"address": "FD00:1:0::100"}, [8, 13]),
        ({"address": "a09::"}, [13]),
        ({"address": "10.9.0.0"}, []),
        ({"port": 80}, [3, 8, 13]),
        ({"port": 1026}, [5]),
        ({"proto": "udp"}, [5]),
        ({"proto": "TCP", "port": 443}, [13]),
        ({"proto": "17"}, [5]),
        ({"state": "established"}, [3, 13]),
        ({"state": "TIME_WAIT"}, [8]),
        ({"state": "ONEWAY"}, [5]),
        ({"address": "10.9.2.200", "state": "ESTABLISHED", "proto": "tcp", "port": 1025}, [3]),
        ({"address": None, "port": None}, [3, 5, 8, 13]),
    ],
)
def test_filters(records: Records, request_fields: dict[str, Any], slots: list[int]) -> None:
    wanted = Filter.of(request_fields)
    assert records["slot"][wanted.matches(records)].tolist() == slots


@pytest.mark.parametrize(
    ("request_fields", "says"),
    [
        ({"address": "nodeb"}, "'nodeb' is not an IP address"),
        ({"address": 7}, "address 7 is not a text"),
        ({"port": "80"}, "port '80' is not a number"),
        ({"port": True}, "port True is not a number"),
        ({"port": 70000}, "not between 0 and 65535"),
        ({"proto": "tpc"}, "'tpc' is not a protocol"),
        ({"proto": "300"}, "'300' is not a protocol"),
        ({"state": "UP"}, "'UP' is not a state"),
        ({"limit": -1}, "limit -1"),
        ({"limit": "x"}, "limit 'x'"),
    ],
)
def test_bad_filters(request_fields: dict[str, Any], says: str) -> None:
    with pytest.raises(BadFilter, match=says):
        Filter.of(request_fields)


def test_origin() -> None:
    assert Filter.of({}).wants("own")
    assert Filter.of({"origin": "own"}).wants("own")
    assert not Filter.of({"origin": "node-a"}).wants("own")
    assert Filter.of({"origin": "node-a"}).wants("node-a")


def test_describe(records: Records) -> None:
    first, second, third, mixed = describe(records, "node-a")
    assert first == {
        "origin": "node-a",
        "slot": 3,
        "generation": 1,
        "proto": "tcp",
        "mode": "FNAT",
        "state": "ESTABLISHED",
        "client": "10.9.0.10:40000",
        "virtual": "10.9.1.100:80",
        "local": "10.9.2.200:1025",
        "real": "10.9.0.20:80",
        "timeout_s": 90.5,
        "worker": 1,
        "flags": [],
    }
    assert (second["proto"], second["state"]) == ("udp", "ONEWAY")
    assert (second["worker"], second["flags"]) == (None, ["synproxy"])
    assert (third["client"], third["mode"], third["flags"]) == ("[fd00::10]:40002", "DR", ["inactive"])
    assert (mixed["client"], mixed["local"]) == ("[a09::]:80", "10.9.2.200:1027")
    assert mixed["flags"] == ["inactive", "injected"]
    assert record.INJECTED == 0x8000


@pytest.mark.parametrize("name", ["proto", "address", "state"])
@pytest.mark.parametrize("text", ["9" * 5000, "\x1b[2J", "\ud800", "a\nb"])
def test_what_is_no_filter_can_be_told_to_anybody(name: str, text: str) -> None:
    with pytest.raises(BadFilter) as error:
        Filter.of({name: text})
    assert str(error.value).isprintable()
