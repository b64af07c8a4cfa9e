# SPDX-License-Identifier: GPL-2.0-or-later
"""probes/layout.py: what is shipped is sound, what is damaged is refused, and the evidence decides."""

import copy
import itertools
import json
from importlib import resources
from typing import Any

import pytest

from probes.judging import faults
from probes.layout import LOOKUP, BadLayout, Evidence, Layout, UnknownLayout, parse_text, release_name, select

SHIPPED = Layout.shipped()


def source(name: str = "1.10.2") -> dict[str, Any]:
    data: dict[str, Any] = json.loads(resources.files("probes").joinpath("layouts", f"{name}.json").read_text())
    return data


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_layouts_are_whole(name: str) -> None:
    layout = Layout.load(name)
    for struct in layout.structs.values():
        spans = sorted(struct.fields.values())
        for (offset, size), (following, _) in itertools.pairwise(spans):
            assert offset + size <= following or struct.name.startswith("rte_"), struct.name  # unions in DPDK's
        assert all(offset + size <= struct.size for offset, size in spans)
    get = [number for name, number in layout.sockopt_ids.items() if "_SET_" not in name]
    assert len(set(get)) == len(get)
    assert not faults(layout)
    flags = list(layout.flags.values())
    assert all(flag & (flag - 1) == 0 for flag in flags)
    assert len(set(flags)) == len(flags)


def test_the_facts_of_1_10_2() -> None:
    layout = Layout.load("1.10.2")
    assert layout.size("dp_vs_conn") == 576
    assert layout.field("dp_vs_conn", "flags") == (538, 2)
    assert layout.offset("dp_vs_seq", "fdata_seq") == 8
    assert layout.sockopt_id("SOCKOPT_SET_CONN") == 89
    assert layout.flag("HASHED") == 0x100
    assert layout.flag("INJECTED") == 0x8000
    assert layout.has("dp_vs_conn", "pp_sent")
    assert not layout.has("dp_vs_conn", "ctime")
    assert not layout.has("no_such_struct")


def test_flags_are_those_of_the_record() -> None:
    from collector import record

    layout = Layout.load("1.10.2")
    for name in ("SYNPROXY", "HASHED", "INACTIVE", "TEMPLATE", "ONE_PACKET", "IN_TIMER", "REDIRECT_HASHED", "INJECTED"):
        assert layout.flag(name) == getattr(record, name)


@pytest.mark.parametrize(
    "ask",
    [
        lambda layout: layout.size("no_such_struct"),
        lambda layout: layout.offset("dp_vs_conn", "no_such_field"),
        lambda layout: layout.flag("NO_SUCH_FLAG"),
        lambda layout: layout.sockopt_id("NO_SUCH_ID"),
        lambda layout: layout.unpack("dpvs_sock_msg", "len", b"short"),
    ],
)
def test_unknown_names_are_typed_errors(ask: Any) -> None:
    with pytest.raises(BadLayout):
        ask(Layout.load("1.10.2"))


def test_unpack_is_little_endian_and_takes_a_base() -> None:
    layout = Layout.load("1.10.2")
    data = b"\xff" * 3 + (5).to_bytes(4, "little") + (0x01020304).to_bytes(4, "little") + bytes(16)
    assert layout.unpack("dpvs_sock_msg", "version", data, 3) == 5
    assert layout.unpack("dpvs_sock_msg", "id", data, 3) == 0x01020304


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(format=2),
        lambda d: d.pop("dpdk"),
        lambda d: d["dpvs"]["structs"]["dp_vs_conn"]["fields"].update(af=[574, 4]),
        lambda d: d["dpvs"]["structs"]["dp_vs_conn"]["fields"].update(af=[-1, 4]),
        lambda d: d["dpvs"]["structs"]["dp_vs_conn"]["fields"].update(af="0,4"),
        lambda d: d["dpvs"]["structs"]["dp_vs_conn"].pop("size"),
        lambda d: d["dpvs"]["flags"].update(HASHED="hashed"),
        lambda d: d["dpdk"]["structs"].update(dp_vs_conn={"size": 1, "fields": {}}),
        lambda d: d["dpvs"].update(structs=[]),
        lambda d: d["dpvs"].update(releases=["1.10.2\x1b[2J"]),
        lambda d: d["dpdk"].update(release="24.11\n"),
        lambda d: d["dpvs"]["structs"].update({"dp_vs\x7fconn": {"size": 8, "fields": {}}}),
        lambda d: d["dpvs"]["structs"]["dp_vs_conn"]["fields"].update({"a\x1b[2Jf": [0, 99]}),
        lambda d: d["dpvs"]["structs"]["dp_vs_conn"]["fields"].update({"a\x1b[2Jf": [0, 9999]}),
        lambda d: d["dpvs"]["flags"].update({"HASH\x07ED": "0x1"}),
        lambda d: d["dpvs"]["sockopt_ids"].update({"SOCK\nOPT": 1}),
        lambda d: d["dpvs"].update(udp_states={}),
        lambda d: d["dpvs"].update(udp_states=["NORMAL"]),
        lambda d: d["dpvs"].update(udp_states="NORMAL"),
        lambda d: d["dpvs"].update(udp_states=7),
        lambda d: d["dpvs"].update(udp_states={"NORMAL": 0, "ODD\x1b[2J": 1}),
        lambda d: d["dpvs"].update(udp_states={"NORMAL": 0, "LAST": 0}),
        lambda d: d["dpvs"].update(udp_states={"NORMAL": 0, "LAST": -1}),
        lambda d: d["dpvs"].update(udp_states={"NORMAL": 0, "LAST": [1]}),
        lambda d: d["dpvs"].update(udp_states={"NORMAL": 0, "LAST": 1 << 70}),
    ],
)
def test_damaged_data_is_refused(damage: Any) -> None:
    data = copy.deepcopy(source())
    damage(data)
    with pytest.raises(BadLayout) as error:
        Layout.parse("damaged", data)
    assert str(error.value).isprintable()


def test_states_of_udp() -> None:
    older = Layout.load("1.9.4")
    assert older.udp_states == {"NORMAL": 0, "LAST": 1}
    assert not older.udp_waits
    assert Layout.load("1.9.6").udp_waits
    data = copy.deepcopy(source())
    del data["dpvs"]["udp_states"]  # a file that does not say
    assert Layout.parse("silent", data).udp_states == Layout.load("1.10.2").udp_states
    data["dpvs"]["structs"][LOOKUP] = source("1.9.4")["dpvs"]["structs"][LOOKUP]
    assert Layout.parse("silent", data).udp_states == older.udp_states
    data["dpvs"]["udp_states"] = {"NONE": 0, "NORMAL": 1, "LAST": 2}  # nobody's: such a copy might not wait
    assert not Layout.parse("odd", data).udp_waits


@pytest.mark.parametrize("name", ["0.0.1", "../1.10.2", "", "1.10.2/../x", "1.10.2\n"])
def test_no_such_layout(name: str) -> None:
    with pytest.raises(UnknownLayout):
        Layout.load(name)


def variant(name: str, releases: list[str], size: int) -> Layout:
    data = source()
    data["dpvs"]["releases"] = releases
    data["dpvs"]["structs"]["dp_vs_conn"]["size"] = size
    return Layout.parse(name, data)


OLD, NEW = variant("old", ["1.9.8"], 640), variant("new", ["1.10.1", "1.10.2"], 576)


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [
        (Evidence("1.10.2", 576), "new"),
        (Evidence("1.9.8", 640), "old"),
        (Evidence("1.10.1", None), "new"),
        (Evidence(None, 640), "old"),
    ],
)
def test_evidence_selects(evidence: Evidence, expected: str) -> None:
    assert select(evidence, [OLD, NEW]).name == expected


@pytest.mark.parametrize(
    ("evidence", "message"),
    [
        (Evidence("1.10.2", 608), "608 bytes"),  # built with debug options
        (Evidence("1.9.8", 576), "1.9.8"),
        (Evidence("1.11.0", 576), "1.11.0"),  # a newer release is not guessed at
        (Evidence(None, None), "release unknown"),
    ],
)
def test_what_does_not_fit_is_refused(evidence: Evidence, message: str) -> None:
    with pytest.raises(UnknownLayout, match=message) as error:
        select(evidence, [OLD, NEW])
    assert error.value.help_text


def test_release_name() -> None:
    assert release_name(0x00010A02) == "1.10.2"
    assert release_name(0x00010908) == "1.9.8"


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 60_000, b"9" * 5000, b"\xff", b"7", b"[]", b"null"])
def test_text_that_is_no_layout(text: bytes) -> None:
    with pytest.raises(BadLayout) as error:
        parse_text("damaged", text)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("number", [1.5, True, -1, "8", float("inf"), float("nan"), None, [8]])
def test_numbers_are_integers(number: Any) -> None:
    for damage in (
        lambda d: d["dpvs"].update(sockopt_version=number),
        lambda d: d["dpvs"]["sockopt_ids"].update(SOCKOPT_SET_CONN=number),
        lambda d: d["dpvs"]["structs"]["dp_vs_conn"].update(size=number),
        lambda d: d["dpvs"]["structs"]["dp_vs_conn"]["fields"].update(af=[number, 4]),
        lambda d: d["dpvs"]["structs"]["dp_vs_conn"]["fields"].update(af=[0, number]),
    ):
        test_damaged_data_is_refused(damage)


@pytest.mark.parametrize("release", ["1.8.2", "1.8.8"])
def test_a_release_that_uses_our_flag(release: str) -> None:
    with pytest.raises(UnknownLayout, match="0x8000"):
        select(Evidence(release, 704))
