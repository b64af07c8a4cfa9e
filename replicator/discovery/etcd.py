# SPDX-License-Identifier: GPL-2.0-or-later
"""Members from etcd: each node has a key under a lease, and watches the others'.

    PREFIX/NODE -> {"address": "10.0.8.1:7700"}

Rules
- The key goes with its lease: ten seconds after a node fell silent, or at once when it leaves in order.
- A watch only says that something changed; what is there is then read as a whole. It is read every ten seconds in any
  case, so a watch that died in silence costs no more than that.
- When an endpoint fails, the next is tried, with the same lease for as long as it lives.
- A key that another run of our name holds is not overwritten: two nodes of one name do not fight, the second says so.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from probes.errors import DpvsProbeError
from replicator.transport import address
from replicator.transport.address import Address
from replicator.transport.interface import Backoff

from . import gateway
from .access import BadAccess
from .gateway import Answered, Way, after, decoded, encoded
from .source import MAX_LISTED, EtcdPlace, Myself, SourceFailed

LEASE_S = 10
REFRESH_S = 10.0
UNAUTHENTICATED = 401  # a token that is none any more
GATHER_S = 0.1  # changes that come together are read together

log = logging.getLogger(__name__)


class EtcdSource:
    """One prefix. ``close`` takes our key away."""

    def __init__(self, place: EtcdPlace, me: Myself, *, lease_s: int = LEASE_S, refresh_s: float = REFRESH_S) -> None:
        self._place, self._me = place, me
        self._lease_s, self._refresh_s = lease_s, refresh_s
        self._lease: str | None = None
        self._token: str | None = None
        self._turn = 0
        self._backoff = Backoff()
        self._said: set[str] = set()

    async def run(self, tell: Callable[[list[str]], None], trouble: Callable[[str], None]) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._serve(tell)
            except* SourceFailed as errors:
                trouble(_first(errors))
            except* (KeyError, ValueError, TypeError, AttributeError) as errors:
                trouble(f"etcd answers what makes no sense: {_first(errors)}")
            self._turn += 1
            self._token = None  # the next endpoint may not know it
            await asyncio.sleep(self._backoff.wait_s())

    async def close(self) -> None:
        """Leave in order: the others see it at once. Raises SourceFailed."""
        lease, self._lease = self._lease, None
        if lease is not None:
            await self._call("/v3/lease/revoke", {"ID": lease})

    @property
    def _endpoint(self) -> Address:
        return self._place.endpoints[self._turn % len(self._place.endpoints)]

    async def _call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            return await gateway.call(self._endpoint, path, body, await self._way())
        except Answered as error:
            if error.status != UNAUTHENTICATED or self._token is None:
                raise
        self._token = None  # tokens end by themselves, and with the etcd that gave them
        return await gateway.call(self._endpoint, path, body, await self._way())

    async def _way(self) -> Way:
        """How to get there; who has to log in does so first. Raises SourceFailed."""
        access = self._place.access
        try:
            context = access.context()
            if access.user is not None and self._token is None:
                who = {"name": access.user, "password": access.password()}
                answer = await gateway.call(self._endpoint, "/v3/auth/authenticate", who, Way(context))
                token = answer.get("token")
                if not isinstance(token, str) or not token.isprintable():
                    raise SourceFailed("etcd gives no token")
                self._token = token
        except BadAccess as error:
            raise SourceFailed(str(error)) from error
        return Way(context, self._token)

    async def _serve(self, tell: Callable[[list[str]], None]) -> None:
        """Talk to one endpoint until something fails, which is raised in a group."""
        changed = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            if self._me.advertised is not None:
                await self._register()
                tasks.create_task(self._keep_alive())
            revision = await self._read(tell)
            self._backoff.reset()
            tasks.create_task(self._watch(revision + 1, changed))
            while True:
                try:
                    async with asyncio.timeout(self._refresh_s):
                        await changed.wait()
                        await asyncio.sleep(GATHER_S)
                except TimeoutError:
                    pass
                changed.clear()
                await self._read(tell)

    # --- our own key -------------------------------------------------------------------------------------------------

    @property
    def _key(self) -> str:
        return self._place.prefix + self._me.node

    async def _register(self) -> None:
        if self._lease is None or not await self._alive():
            granted = await self._call("/v3/lease/grant", {"TTL": str(self._lease_s)})
            if not isinstance(granted.get("ID"), str):
                raise SourceFailed("etcd grants no lease")
            self._lease = granted["ID"]
        await self._put()

    async def _put(self) -> None:
        """Our key, unless it is there under another lease."""
        value = json.dumps({"address": self._me.advertised})
        key = encoded(self._key)
        answer = await self._call(
            "/v3/kv/txn",
            {
                "compare": [{"key": key, "target": "CREATE", "result": "EQUAL", "create_revision": "0"}],
                "success": [{"request_put": {"key": key, "value": encoded(value), "lease": self._lease}}],
                "failure": [{"request_range": {"key": key}}],
            },
        )
        if not answer.get("succeeded"):
            (response,) = answer.get("responses") or [{}]
            found = response.get("response_range", {}).get("kvs") or [{}]
            if found[0].get("lease") != self._lease:
                self._once(f"{self._key} in etcd belongs to another run: it is ours when its lease has ended")

    async def _alive(self) -> bool:
        try:
            answer = await self._call("/v3/lease/keepalive", {"ID": self._lease})
        except Answered:
            return False
        return int(answer.get("result", {}).get("TTL", "0")) > 0

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            if not await self._alive():
                self._lease = None
                raise SourceFailed("etcd has ended our lease")

    # --- the others --------------------------------------------------------------------------------------------------

    async def _read(self, tell: Callable[[list[str]], None]) -> int:
        """Tell the list; its revision. Our own key is put again if it is not there."""
        prefix = self._place.prefix
        answer = await self._call(
            "/v3/kv/range",
            {"key": encoded(prefix), "range_end": encoded(after(prefix)), "limit": str(MAX_LISTED)},
        )
        found, ours = [], False
        for entry in answer.get("kvs", []):
            key = decoded(entry["key"])
            if key == self._key:
                ours = entry.get("lease") == self._lease
            elif (listed := self._address(key, decoded(entry.get("value", "")))) is not None:
                found.append(listed)
        if self._me.advertised is not None and not ours:
            await self._put()
        tell(found)
        return int(answer["header"]["revision"])

    def _address(self, key: str, value: str) -> str | None:
        """What an entry says; what makes no sense is said once and passed over."""
        try:
            said = json.loads(value)
            return str(address.parse(said["address"]))
        except (ValueError, KeyError, TypeError, AttributeError, DpvsProbeError) as error:
            self._once(f"{key} in etcd is passed over: {error!r}")
            return None

    async def _watch(self, revision: int, changed: asyncio.Event) -> None:
        prefix = self._place.prefix
        wanted = {"key": encoded(prefix), "range_end": encoded(after(prefix)), "start_revision": str(revision)}
        way = await self._way()
        async with gateway.watch(self._endpoint, "/v3/watch", {"create_request": wanted}, way) as said:
            async for entry in said:
                result = entry.get("result", {})
                if result.get("canceled"):
                    raise SourceFailed(f"etcd ends the watch: {result.get('cancel_reason', 'no reason given')}")
                if result.get("events"):
                    changed.set()
        raise SourceFailed("etcd ends the watch")

    def _once(self, what: str) -> None:
        if what not in self._said and len(self._said) < MAX_LISTED:
            self._said.add(what)
            log.warning("%s", what)


def _first(errors: BaseExceptionGroup[Exception]) -> str:
    """The first of several: they have one cause."""
    found: BaseException = errors
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return str(found)
