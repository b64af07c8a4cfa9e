# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether this node has what its peers had, so that traffic may come: what a node says once, and keeps saying.

Rules: ready when our own sessions are read, the first full sync of each peer that is there is in, and our DPVS has
answered for each of those sessions. Peers that do not come are waited for, but not for ever: a node that comes up alone
must be able to work. Once ready, ready: a peer that joins later changes nothing about what this node can do.
"""

from collections.abc import Iterable

from replicator.replica import Replica

ALONE_NS = 10_000_000_000  # after the start: who has not dialled us by then is not there

OWN = "the sessions of our own DPVS are not all read yet"


class Readiness:
    """Ask ``look`` now and then; ``why`` says what is waited for, "" when ``ready``."""

    def __init__(self, now_ns: int, *, origins: int = 0, injecting: bool = False, alone_ns: int = ALONE_NS) -> None:
        """``origins``: peers expected to send us sessions; 0: none will."""
        self._began_ns, self._alone_ns = now_ns, alone_ns
        self._origins, self._injecting = origins, injecting
        self.ready = False
        self.why = OWN

    def expect(self, origins: int) -> None:
        """That many peers are known by now."""
        self._origins = max(self._origins, origins)

    def look(
        self, now_ns: int, *, complete: bool, replicas: Iterable[Replica], under_way: int = 0, restoring: str = ""
    ) -> bool:
        """Whether it is ready; ``complete``: our own sessions are all read; ``under_way``: sessions of peers that DPVS
        was told of and has not answered for; ``restoring``: what keeps those from coming back that an earlier DPVS had.
        """
        if not self.ready:
            self.why = self._missing(now_ns, list(replicas), under_way) or restoring if complete else OWN
            self.ready = not self.why
        return self.ready

    def _missing(self, now_ns: int, replicas: list[Replica], under_way: int) -> str:
        syncing = [replica.node for replica in replicas if replica.connected and not replica.synced]
        if syncing:
            return f"the first full sync of {', '.join(sorted(set(syncing)))} is under way"
        here = {replica.node for replica in replicas if replica.synced}
        left_ns = self._began_ns + self._alone_ns - now_ns
        if len(here) < self._origins and left_ns > 0:
            return (
                f"{len(here)} of {self._origins} peers have sent their sessions, {left_ns / 1e9:.0f} s more for others"
            )
        waiting = sum(replica.pending.pending for replica in replicas) + under_way if self._injecting else 0
        return f"{waiting} sessions of peers are not put in yet" if waiting else ""
