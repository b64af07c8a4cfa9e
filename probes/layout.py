# SPDX-License-Identifier: GPL-2.0-or-later
"""Layouts of DPVS's and DPDK's structs, as data.

Rules: a struct is a size and fields of (offset, size) in bytes; a stock build carries no debug information, so these
come from ``layouts/*.json``, one file per class of releases with the same structs. A layout is *chosen* by evidence
that the process itself gives (its release number, the size of its session objects) and then *proven* on the live
process (``probes.proof``) before anything relies on it. Pure: reads nothing but its own data files.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any, Self

from probes.errors import DpvsProbeError

FORMAT = 1
SESSION = "dp_vs_conn"
LOOKUP = "dp_vs_service_lookup"  # a function, as a struct of what its caller puts on the stack
UDP_STATES = ("NONE", "ONEWAY", "NORMAL", "LAST")  # DPVS_UDP_S_*, include/ipvs/proto_udp.h, since 1.9.6
UDP_NUMBERS = {name: number for number, name in enumerate(UDP_STATES)}
UDP_BEFORE_1_9_6 = {"NORMAL": 0, "LAST": 1}
MAX_STATE = 255
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)  # of a layout
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)  # of C: struct, member, flag, request


class UnknownLayout(DpvsProbeError):
    help_text = (
        "The struct layout of this DPVS release is not among those shipped (dpvs-probe doctor lists them). "
        "Nothing was attached."
    )


class BadLayout(DpvsProbeError):
    help_text = "The layout file is damaged or of another version of dpvs-probe: install the package again."


@dataclass(frozen=True)
class Struct:
    """One C struct: its size and the (offset, size) of each field, in bytes."""

    name: str
    size: int
    fields: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Evidence:
    """What a process says of itself; None where it does not say."""

    release: str | None = None  # "1.10.2"
    session_bytes: int | None = None  # size of one object of the session pool


@dataclass(frozen=True)
class Layout:
    """The structs, ids and flags of one class of DPVS releases."""

    name: str
    releases: tuple[str, ...]
    dpdk: str
    sockopt_version: int
    sockopt_ids: Mapping[str, int]
    flags: Mapping[str, int]
    structs: Mapping[str, Struct]
    udp_states: Mapping[str, int]  # of UDP_STATES those that it has; up to 1.9.4 there are two, numbered otherwise

    @classmethod
    def shipped(cls) -> list[str]:
        """Names of the layouts in the package."""
        files = resources.files("probes").joinpath("layouts").iterdir()
        return sorted(f.name.removesuffix(".json") for f in files if f.name.endswith(".json"))

    @classmethod
    def load(cls, name: str) -> "Layout":
        """A shipped layout by name; cached, as it never changes."""
        return _load(name)

    @classmethod
    def parse(cls, name: str, data: Mapping[str, Any]) -> Self:
        """Check the JSON form and build the layout: every field inside its struct, every number an integer."""
        try:
            if data["format"] != FORMAT:
                raise BadLayout(f"layout {name} has format {str(data['format'])[:20]!r}, expected {FORMAT}")
            dpvs, dpdk = data["dpvs"], data["dpdk"]
            structs: dict[str, Struct] = {}
            for part in (dpvs, dpdk):
                for struct_name, body in part["structs"].items():
                    if _identifier(struct_name) in structs:
                        raise BadLayout(f"layout {name} defines struct {struct_name} twice")
                    structs[struct_name] = _struct(name, struct_name, body)
            return cls(
                name=name,
                releases=tuple(_text(release) for release in dpvs["releases"]),
                dpdk=_text(dpdk["release"]),
                sockopt_version=_number(dpvs["sockopt_version"]),
                sockopt_ids={_identifier(key): _number(value) for key, value in dpvs["sockopt_ids"].items()},
                flags={_identifier(key): _number(int(value, 16)) for key, value in dpvs["flags"].items()},
                structs=structs,
                udp_states=_udp_states(dpvs.get("udp_states", _usual_udp_states(structs))),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadLayout(f"layout {name} is malformed: {type(error).__name__} {str(error)[:100]}") from None

    def changed(self, struct: Struct) -> "Layout":
        """The same with another struct in place of the one of that name."""
        return replace(self, structs={**self.structs, struct.name: struct})

    def without(self, struct: str, fields: Iterable[str]) -> "Layout":
        """The same without some fields of a struct: nothing reads or writes them any more."""
        old, gone = self.struct(struct), set(fields)
        return self.changed(replace(old, fields={name: at for name, at in old.fields.items() if name not in gone}))

    def struct(self, name: str) -> Struct:
        try:
            return self.structs[name]
        except KeyError:
            raise BadLayout(f"layout {self.name} has no struct {name}") from None

    def has(self, struct: str, field: str | None = None) -> bool:
        """Whether this release has the struct, or the member: test for the member, never for a version."""
        return struct in self.structs and (field is None or field in self.structs[struct].fields)

    def size(self, struct: str) -> int:
        return self.struct(struct).size

    def field(self, struct: str, name: str) -> tuple[int, int]:
        """(offset, size) in bytes."""
        try:
            return self.struct(struct).fields[name]
        except KeyError:
            raise BadLayout(f"layout {self.name}: struct {struct} has no field {name}") from None

    def offset(self, struct: str, name: str) -> int:
        return self.field(struct, name)[0]

    @property
    def udp_waits(self) -> bool:
        """Whether a copy of a UDP session can wait as NONE: only where no session that DPVS made is in that state."""
        return self.udp_states == UDP_NUMBERS

    def flag(self, name: str) -> int:
        try:
            return self.flags[name]
        except KeyError:
            raise BadLayout(f"layout {self.name} has no flag {name}") from None

    def sockopt_id(self, name: str) -> int:
        """Number of a control socket request in this release; they move between releases."""
        try:
            return self.sockopt_ids[name]
        except KeyError:
            raise BadLayout(f"layout {self.name} does not know the control socket request {name}") from None

    def unpack(self, struct: str, name: str, data: bytes, base: int = 0) -> int:
        """One unsigned little-endian field out of the bytes of a struct that starts at ``base``."""
        offset, size = self.field(struct, name)
        if not 0 < size <= 8 or base + offset + size > len(data):
            raise BadLayout(f"layout {self.name}: {struct}.{name} lies outside {len(data)} bytes")
        return int.from_bytes(data[base + offset : base + offset + size], "little")


# Releases whose DPVS_CONN_F_SYNPROXY is 0x8000 (their include/ipvs/conn.h): dpvs-probe layout generate refuses them.
TAKEN = tuple(f"1.8.{minor}" for minor in range(9))


def select(evidence: Evidence, layouts: Iterable[Layout] | None = None) -> Layout:
    """The layout that fits the evidence: its session size must match, and the release must be one it names.

    A process that does not say its release gets the layout whose session size matches, if there is only one. The proof
    on the live process has the last word.
    """
    known = [Layout.load(name) for name in Layout.shipped()] if layouts is None else list(layouts)
    if evidence.release in TAKEN:
        raise UnknownLayout(
            f"DPVS {evidence.release} uses the flag 0x8000 of a session itself, which dpvs-probe marks copies with",
            help_text="Such a DPVS is not supported: 1.8.10 or later is.",
        )
    if evidence.session_bytes is not None:
        sizes = ", ".join(map(str, sorted({layout.size(SESSION) for layout in known})))
        known = [layout for layout in known if layout.size(SESSION) == evidence.session_bytes]
        if not known:
            release = evidence.release or "release unknown"
            raise UnknownLayout(
                f"this DPVS ({release}) keeps sessions of {evidence.session_bytes} bytes; known sizes: {sizes}"
            )
    named = [layout for layout in known if evidence.release in layout.releases]
    if named:
        return named[0]
    if evidence.release is None and len(known) == 1:
        return known[0]
    raise UnknownLayout(f"no layout is known for DPVS {evidence.release or '(release unknown)'}")


def release_name(version: int) -> str:
    """DPVS's ``g_version`` as text: 0x00010a02 is 1.10.2 (DPVS 1.10.2, src/global_data.c)."""
    return f"{version >> 16 & 0xFF}.{version >> 8 & 0xFF}.{version & 0xFF}"


def _struct(layout: str, name: str, body: Mapping[str, Any]) -> Struct:
    size = _number(body["size"])
    fields = {}
    for field, (offset, length) in body["fields"].items():
        member = _identifier(field)
        if _number(offset) + _number(length) > size:
            raise BadLayout(f"layout {layout}: {name}.{member} lies outside its struct")
        fields[member] = (offset, length)
    return Struct(name, size, fields)


def _usual_udp_states(structs: Mapping[str, Struct]) -> Mapping[str, int]:
    """Of a file that does not say: the lookup of services changed with them."""
    older = LOOKUP in structs and "outwall" in structs[LOOKUP].fields
    return UDP_BEFORE_1_9_6 if older else UDP_NUMBERS


def _udp_states(names: Mapping[str, int]) -> Mapping[str, int]:
    if not names or not set(names) <= set(UDP_STATES) or len(set(names.values())) < len(names):
        raise ValueError(f"{str(dict(names))[:60]} are not states of UDP")
    if max(map(_number, names.values())) > MAX_STATE:
        raise ValueError("a state of UDP is too large a number")
    return names


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:20]!r} is no number of bytes, or no id")
    return value


def _identifier(value: str) -> str:
    if not _IDENTIFIER.fullmatch(value):
        raise ValueError(f"{value[:20]!r} is no name in C")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise TypeError(f"{str(value)[:20]!r} is no text")
    return value


def parse_text(name: str, text: bytes) -> Layout:
    """A layout as it stands in a file. Raises BadLayout."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = str(error)[:100] if text.isascii() else type(error).__name__
        raise BadLayout(f"layout {name} is not JSON: {what}") from None
    return Layout.parse(name, data)


@cache
def _load(name: str) -> Layout:
    if not _NAME.fullmatch(name):
        raise UnknownLayout(f"{name!r} is not the name of a layout")
    file = resources.files("probes").joinpath("layouts", f"{name}.json")
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        raise UnknownLayout(f"there is no layout {name}; shipped are {', '.join(Layout.shipped())}") from None
    return parse_text(name, text)
