# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs the sources of peers beside the links, and makes and ends links as ``membership`` decides.

Rules: what it decides is not decided here. A source whose code fails is said as a fault of ours and started again: the
links go on.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from probes.errors import DpvsProbeError
from replicator.membership import Membership

from .etcd import EtcdSource
from .source import EtcdPlace, Myself, Place, Source, name_of

LOOK_S = 0.2
AGAIN_S = 5.0
CLOSE_S = 1.0

log = logging.getLogger(__name__)


class Closing(Source, Protocol):
    """A source that can leave in order."""

    async def close(self) -> None: ...


class Peers(Protocol):
    """``links.Links``, as far as peers come and go."""

    def join(self, address: str) -> None: ...
    async def leave(self, address: str) -> None: ...
    def is_up(self, address: str) -> bool: ...


def source(place: Place, me: Myself) -> Closing:
    """The real thing."""
    if isinstance(place, EtcdPlace):
        return EtcdSource(place, me)
    from .srv import SrvSource

    return SrvSource(place, me)


class Discovery:
    """Members of a cluster, kept. ``run`` returns only by being cancelled, and has left the sources in order then."""

    def __init__(
        self,
        membership: Membership,
        sources: Mapping[str, Closing],
        *,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """``sources``: by the names that ``membership`` knows them by."""
        self.membership, self._sources, self._clock = membership, sources, clock

    @classmethod
    def of(cls, places: Iterable[Place], given: Iterable[str], me: Myself) -> "Discovery":
        """From what the command line says."""
        sources = {name_of(place): source(place, me) for place in places}
        return cls(Membership(given, sources), sources)

    async def run(self, peers: Peers) -> None:
        """Keep ``peers`` as the sources say."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for name, each in self._sources.items():
                    tasks.create_task(self._follow(name, each))
                while True:
                    await asyncio.sleep(LOOK_S)
                    await self.look(peers)
        finally:
            await self._leave()

    async def look(self, peers: Peers) -> None:
        """One round."""
        change = self.membership.decide(self._clock(), peers.is_up)
        for address in change.joins:
            log.info("peer %s joins (%s)", address, self.membership.source_of(address))
            peers.join(address)
        for address in change.leaves:
            log.info("peer %s is listed nowhere any more: it has left", address)
            await peers.leave(address)

    def report(self) -> dict[str, Any]:
        """For ``status``."""
        return self.membership.report(self._clock())

    async def _follow(self, name: str, each: Source) -> None:
        def tell(members: list[str]) -> None:
            if self.membership.heard(name, members, self._clock()):
                log.info("%s lists %d peers: %s", name, len(members), ", ".join(sorted(members)) or "none")

        def trouble(why: str) -> None:
            if self.membership.failed(name, why):
                log.warning("%s; the last list counts", why)

        while True:
            try:
                await each.run(tell, trouble)
            except Exception as error:
                trouble(f"{name} failed: {error!r}")
                log.error("%s failed", name, exc_info=error)
            await asyncio.sleep(AGAIN_S)

    async def _leave(self) -> None:
        for name, each in self._sources.items():
            try:
                async with asyncio.timeout(CLOSE_S):
                    await each.close()
            except (DpvsProbeError, TimeoutError) as error:
                log.warning("%s: not told that we leave: %s", name, error or "no answer")
