# SPDX-License-Identifier: GPL-2.0-or-later
"""A place that knows who the peers are: how it is written, and what it has to do.

Rules: a source gives addresses and nothing else. Who may talk to whom, certificates decide: a list that somebody forged
makes us dial a stranger, who proves nothing and hears nothing.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from probes.errors import DpvsProbeError
from replicator.transport import address
from replicator.transport.address import Address

from .access import Access
from .access import parse as parse_access

EXAMPLES = "Write etcd://HOST:2379/PREFIX, etcd+tls://HOST:2379/PREFIX?ca=FILE, or dns+srv://_dpvs-probe._tcp.NAME."
MAX_LISTED = 256


class BadSource(DpvsProbeError):
    """Text that names no source of peers."""

    help_text = EXAMPLES


class SourceFailed(DpvsProbeError):
    """A source cannot be asked now, or gives what makes no sense."""

    help_text = "It is asked again; what it said last counts until then."


class EtcdPlace(NamedTuple):
    """Keys below ``prefix`` (with a slash at its end) in the cluster that these endpoints serve."""

    endpoints: tuple[Address, ...]
    prefix: str
    access: Access = Access()


class SrvPlace(NamedTuple):
    """An SRV record; ``server``: whom to ask, or None for those of resolv.conf."""

    name: str
    server: Address | None


Place = EtcdPlace | SrvPlace


@dataclass(frozen=True)
class Myself:
    """This node, as a source has to know it."""

    node: str
    advertised: str | None  # where peers reach us; None: nobody does
    port: int | None  # that we listen on


class Source(Protocol):
    """``run`` tells the whole list each time it may have changed, and trouble; until it is cancelled."""

    async def run(self, tell: Callable[[list[str]], None], trouble: Callable[[str], None]) -> None: ...


def parse(text: str) -> Place:
    """The source that ``text`` names; raises BadSource, BadAccess or BadAddress."""
    scheme, colon, rest = text.strip().partition("://")
    if not colon:
        raise BadSource(f"'{text}' has no scheme")
    where, _, path = rest.partition("/")
    if scheme in ("etcd", "etcd+tls"):
        path, _, query = path.partition("?")
        if not where or not path.strip("/") or not path.isprintable():
            raise BadSource(f"'{text}' needs an endpoint and a prefix")
        access = parse_access(query, tls=scheme == "etcd+tls")
        return EtcdPlace(tuple(address.parse(each) for each in where.split(",")), f"/{path.strip('/')}/", access)
    if scheme == "dns+srv":
        server, name = (address.parse(where), path) if path else (None, where)
        if not re.fullmatch(r"_[a-z0-9-]+\._(tcp|udp)(\.[a-z0-9_-]{1,63})+\.?", name, re.IGNORECASE) or len(name) > 253:
            raise BadSource(f"'{name}' is not the name of an SRV record (_service._tcp.name)")
        return SrvPlace(name, server)
    raise BadSource(f"'{text}': there is no source '{scheme}'")


def name_of(place: Place) -> str:
    """What people read: ``etcd`` or ``dns+srv`` with what is asked for."""
    return f"etcd {place.prefix}" if isinstance(place, EtcdPlace) else f"dns+srv {place.name}"
