# SPDX-License-Identifier: GPL-2.0-or-later
"""Each session at k peers of several: who holds what, as peers come and go.

Rules:
- Peers are known by the addresses that we dial, so every start of a node shares alike (``placement.py``).
- A peer that is away for ten seconds while others are there is left out: its share goes to those that stand next on
  the ring. Nobody is left out while nobody is there, nor for ten seconds after that.
- A peer that comes back is given its share first, and only when it has all of it do the others drop what is its.
- A peer that joins is as one that comes back; one that leaves gives its share to those that stand next.
- No session is held by fewer than k of the peers that are there, but for those ten seconds and the sync after them.
"""

import logging
from collections.abc import Sequence
from typing import Protocol

from collector.record import Bools, Slots
from collector.table import SessionTable

from .engine import State
from .link import Picks, Sender
from .placement import POINTS, Placement

AWAY_NS = 10_000_000_000

log = logging.getLogger(__name__)


class Link(Protocol):
    """``links.Outbound``."""

    sender: Sender

    @property
    def address(self) -> str: ...
    def down_ns(self, now_ns: int) -> int | None: ...


class Sharing:
    """Tells the sender of each link which sessions are its peer's."""

    def __init__(
        self,
        table: SessionTable,
        links: Sequence[Link],
        replicas: int,
        *,
        away_ns: int = AWAY_NS,
        points: int = POINTS,
    ) -> None:
        """``links``: to all peers, none of them connected yet; ``points``: that each has on the ring. Raises
        BadPlacement.
        """
        self._table, self._links, self.replicas, self._away_ns = table, list(links), replicas, away_ns
        self._points = points
        self.members = {link.address for link in links}  # peers that count when the others' shares are made
        self._shared: dict[str, Placement] = {}
        self._alone_ns = 0  # when no member was there last
        self._apply()

    def add(self, link: Link) -> None:
        """One more peer, not connected yet: it gets its share first, then the others drop that. Raises BadPlacement."""
        self._links.append(link)
        self._apply()

    def remove(self, address: str) -> None:
        """A peer that is none any more."""
        self._links = [link for link in self._links if link.address != address]
        self.members.discard(address)
        self._shared.pop(address, None)
        self._apply()

    def tick(self, now_ns: int) -> None:
        """To be called about once a second."""
        down = {link.address: link.down_ns(now_ns) for link in self._links}
        if all(down[address] is not None for address in self.members):
            self._alone_ns = now_ns  # it is us who were cut off: who comes back last is not the one to blame
        for link in self._links:
            for_ns = min(down[link.address] or 0, now_ns - self._alone_ns)
            if link.address in self.members and for_ns >= self._away_ns:
                self.members.discard(link.address)
                log.warning("peer %s is away: its share of the sessions goes to the others", link.address)
        for link in self._links:
            if link.address not in self.members and link.sender.state is State.LIVE:
                self.members.add(link.address)
                log.info("peer %s is there and has its share of the sessions", link.address)
        self._apply()

    def part(self, address: str) -> float:
        """What part of all sessions this peer holds, 0 to 1."""
        return self._shared[address].shares()[address]

    def _apply(self) -> None:
        """Who is not a member gets what it will have as one; the others share as if it were not there."""
        made: dict[frozenset[str], Placement] = {}
        for link in self._links:
            wanted = frozenset(self.members | {link.address})
            before = self._shared.get(link.address)
            if before is not None and frozenset(before.peers) == wanted:
                continue
            placement = made.setdefault(wanted, Placement(wanted, self.replicas, self._points))
            self._shared[link.address] = placement
            if before is None and placement.everywhere:
                continue
            if before is None or not (before.everywhere and placement.everywhere):
                link.sender.share(None if placement.everywhere else self._picks(placement, link.address))

    def _picks(self, placement: Placement, address: str) -> Picks:
        def picks(slots: Slots) -> Bools:
            return placement.held_by(address, self._table.rows(slots))

        return picks
