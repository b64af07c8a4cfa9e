# SPDX-License-Identifier: GPL-2.0-or-later
"""Members from DNS: the SRV records of one name, as a headless service of Kubernetes has them.

Rules
- A member is the name and the port of a record, and keeps that name when its address changes: links resolve it anew
  each time.
- Asked again after the records' time to live, but not within a second and not later than 30 s.
- A name that is not there, an empty answer and no answer are failures, not an empty list: a cluster of nobody would be
  us alone, and who is asked cannot tell it from a mistake.
- Who among them we are is known by a local address and our port.
"""

import asyncio
import errno
import socket
from collections.abc import Callable, Iterable

import dns.asyncresolver
import dns.exception
import dns.rdatatype
import dns.rdtypes.IN.SRV

from replicator.transport import address
from replicator.transport.address import Address, BadAddress, reason

from .source import MAX_LISTED, Myself, SourceFailed, SrvPlace

ANSWER_S = 3.0
OFTEN_S, SELDOM_S = 1.0, 30.0
RETRY_S = 1.0


class SrvSource:
    """One name."""

    def __init__(self, place: SrvPlace, me: Myself, *, seldom_s: float = SELDOM_S) -> None:
        self._place, self._me, self._seldom_s = place, me, seldom_s

    async def run(self, tell: Callable[[list[str]], None], trouble: Callable[[str], None]) -> None:
        """Until cancelled."""
        while True:
            try:
                found, ttl_s = await self._ask()
            except SourceFailed as error:
                trouble(str(error))
                await asyncio.sleep(RETRY_S)
            else:
                tell([str(each) for each in await self._others(found)])
                await asyncio.sleep(min(max(ttl_s, OFTEN_S), self._seldom_s))

    async def close(self) -> None:
        """Who is in DNS is not ours to say."""

    async def _ask(self) -> tuple[list[Address], float]:
        """Whom the records name, and for how many seconds. Raises SourceFailed."""
        server = self._place.server
        try:
            resolver = dns.asyncresolver.Resolver(configure=server is None)
            if server is not None:
                resolver.nameservers, resolver.port = await _addresses(server), server.port
            answer = await resolver.resolve(self._place.name, dns.rdatatype.SRV, lifetime=ANSWER_S, search=False)
        except (dns.exception.DNSException, OSError, UnicodeError) as error:
            raise SourceFailed(f"DNS: {self._place.name}: {_said(error)}") from error
        found = []
        for record in answer:
            assert isinstance(record, dns.rdtypes.IN.SRV.SRV)
            host = record.target.to_text(omit_final_dot=True)
            try:
                found.append(address.parse(str(Address(host, record.port))))
            except BadAddress:  # the root, port 0 (no such service, RFC 2782), or what is no host name
                continue
        if not found:
            raise SourceFailed(f"DNS: {self._place.name}: it names nobody")
        if len(found) > MAX_LISTED:
            raise SourceFailed(f"DNS: {self._place.name}: {len(found)} records")
        return found, float(answer.rrset.ttl if answer.rrset is not None else 0)

    async def _others(self, found: Iterable[Address]) -> list[Address]:
        return [each for each in dict.fromkeys(found) if each.port != self._me.port or not await self._is_me(each)]

    async def _is_me(self, member: Address) -> bool:
        if str(member) == self._me.advertised:
            return True
        try:
            return any(map(_is_local, await _addresses(member)))
        except OSError:
            return False  # it is somebody who cannot be reached now


async def _addresses(where: Address) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def _is_local(host: str) -> bool:
    """Whether this machine has that address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                return False
            raise
    return True


def _said(error: Exception) -> str:
    return reason(error) if isinstance(error, OSError) else " ".join(str(error).split()) or type(error).__name__
