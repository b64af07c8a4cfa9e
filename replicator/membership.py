# SPDX-License-Identifier: GPL-2.0-or-later
"""Who our peers are, when lists of them come from elsewhere and change: what joins, what leaves, and when.

Rules
- A peer that was given by hand stays, whatever any list says. Who is given anew joins at once; who is given no
  more, and is not listed, leaves at once: that was meant.
- A source tells whole lists. One that fails has told nothing: its last list counts, however old it is.
- Who is listed for half a second joins; entries that come and go faster than that change nothing.
- Who is listed nowhere any more leaves, but only when its link has been down for five seconds since: a list that is
  wrong cuts no link that works. Nor does a link that is down remove anybody who is listed.
- There are 64 peers at most, as many as ``placement`` can place: who comes later waits.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from replicator.placement import MAX_PEERS

SETTLE_NS = 500_000_000
LEAVE_NS = 5_000_000_000
GIVEN = "given"


class Change(NamedTuple):
    """What is to be done now: links to make, links to end."""

    joins: list[str]
    leaves: list[str]


class _Source:
    def __init__(self) -> None:
        self.members: frozenset[str] | None = None  # None: nothing was ever heard
        self.heard_ns = 0
        self.trouble = ""
        self.lists = 0
        self.failures = 0


class Membership:
    """Told of lists and of time; ``decide`` says what follows."""

    def __init__(
        self, given: Iterable[str], sources: Iterable[str] = (), *, settle_ns: int = SETTLE_NS, leave_ns: int = LEAVE_NS
    ) -> None:
        """``given``: addresses that are peers already, until ``give``; ``sources``: names of who tells lists."""
        self._given = frozenset(given)
        self.members = set(self._given)
        self._revoked: frozenset[str] = frozenset()  # given no more, and not yet decided
        self._sources = {name: _Source() for name in sources}
        self._settle_ns, self._leave_ns = settle_ns, leave_ns
        self._listed_ns: dict[str, int] = {}  # not a member yet: listed since
        self._missing_ns: dict[str, int] = {}  # a member still: unlisted and down since
        self._last_of: dict[str, str] = {}  # where a member came from, for as long as it is one
        self.joined = self.left = 0

    def heard(self, source: str, members: Iterable[str], now_ns: int) -> bool:
        """This is the whole list of that source now; whether it is another than before, or the first after trouble."""
        entry = self._sources[source]
        fresh = frozenset(members)
        news = fresh != entry.members or bool(entry.trouble)
        entry.members, entry.heard_ns, entry.trouble = fresh, now_ns, ""
        entry.lists += 1
        return news

    def failed(self, source: str, why: str) -> bool:
        """That source could not be asked; whether that is news. Other reasons of one outage are not: each endpoint has
        its own.
        """
        entry = self._sources[source]
        news = not entry.trouble
        entry.trouble = why
        entry.failures += 1
        return news

    def give(self, given: Iterable[str]) -> None:
        """These are the peers that are given by hand from now on."""
        fresh = frozenset(given)
        self._revoked = (self._revoked | self._given) - fresh
        self._given = fresh

    def decide(self, now_ns: int, is_up: Callable[[str], bool]) -> Change:
        """What joins and leaves now; it counts as done. ``is_up``: whether the link to a member works."""
        listed = self._listed()
        joins = sorted(self._given - self.members)[: max(0, MAX_PEERS - len(self.members))]
        self.members.update(joins)
        self._listed_ns = {address: self._listed_ns.get(address, now_ns) for address in sorted(listed - self.members)}
        for address, since_ns in list(self._listed_ns.items()):
            if now_ns - since_ns >= self._settle_ns and len(self.members) < MAX_PEERS:
                joins.append(address)
                self.members.add(address)
                del self._listed_ns[address]
        leaves = sorted((self._revoked & self.members) - listed)
        self._revoked = frozenset()
        self.members.difference_update(leaves)
        missing = self.members - listed - self._given
        self._missing_ns = {
            address: self._missing_ns.get(address, now_ns) for address in sorted(missing) if not is_up(address)
        }
        for address, since_ns in list(self._missing_ns.items()):
            if now_ns - since_ns >= self._leave_ns:
                leaves.append(address)
                self.members.discard(address)
                del self._missing_ns[address]
        for address in leaves:
            self._last_of.pop(address, None)
        for address in self.members & listed:
            self._last_of[address] = self._where(address)
        self.joined += len(joins)
        self.left += len(leaves)
        return Change(joins, leaves)

    def source_of(self, address: str) -> str:
        """Where a member comes from, as ``peers`` shows it."""
        named = [GIVEN] if address in self._given else []
        where = self._where(address)
        if where:
            named.append(where)
        elif not named:
            named.append(f"{self._last_of.get(address, 'unknown')}, no longer listed")
        return ", ".join(named)

    def report(self, now_ns: int) -> dict[str, Any]:
        """For ``status``."""
        return {
            "members": len(self.members),
            "waiting_to_join": len(self._listed_ns),
            "waiting_to_leave": len(self._missing_ns),
            "joined": self.joined,
            "left": self.left,
            "sources": {
                name: {
                    "listed": None if entry.members is None else len(entry.members),
                    "heard_s": round((now_ns - entry.heard_ns) / 1e9, 1) if entry.members is not None else None,
                    "trouble": entry.trouble,
                    "lists": entry.lists,
                    "failures": entry.failures,
                }
                for name, entry in self._sources.items()
            },
        }

    def _listed(self) -> set[str]:
        return {address for entry in self._sources.values() for address in entry.members or ()}

    def _where(self, address: str) -> str:
        return ", ".join(name for name, entry in self._sources.items() if address in (entry.members or ()))
