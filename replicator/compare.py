# SPDX-License-Identifier: GPL-2.0-or-later
"""Two tables of the same sessions: are they equal, and if not, which sessions differ and in what.

Rules: pure. A session is its tuple; slots and generations are a node's own affair and are not compared, nor is what
moves with every packet (``collector.record.COMPARE``).
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from collector.record import (
    HASHED,
    IN_TIMER,
    RECORD,
    REDIRECT_HASHED,
    Records,
    Slots,
    changed,
    identity,
    pick,
)
from replicator.inject import injectable

_NOT_COMPARED = {"slot", "generation", "worker", "rs_end_seq", "rs_end_ack", "claim"}
_FIELDS = [name for name in RECORD.names or () if name not in _NOT_COMPARED]


class Difference(NamedTuple):
    """Of two sets of sessions."""

    missing: Slots  # positions in the first whose sessions the second does not have
    extra: Slots  # positions in the second whose sessions the first does not have
    changed: Slots  # (n, 2) positions of sessions that both have, and not alike

    @property
    def total(self) -> int:
        """How many sessions."""
        return len(self.missing) + len(self.extra) + len(self.changed)


def compare(one: Records, other: Records) -> Difference:
    """How ``other`` differs from ``one``, session by session."""
    there = {key: at for at, key in enumerate(identity(other).tolist())}
    at = np.array([there.pop(key, -1) for key in identity(one).tolist()], np.int64)
    both = np.flatnonzero(at >= 0)
    unlike = both[changed(pick(one, both), pick(other, at[both]))] if len(both) else both
    extra = np.array(sorted(there.values()), np.int64)
    return Difference(np.flatnonzero(at < 0), extra, np.stack((unlike, at[unlike]), axis=1))


def fields(one: "np.void", other: "np.void") -> dict[str, tuple[str, str]]:
    """Where two records of one session differ: field -> both values as text."""
    found = {}
    for name in _FIELDS:
        left, right = one[name], other[name]
        if name == "flags":
            keep = 0xFFFF ^ (HASHED | IN_TIMER | REDIRECT_HASHED)
            left, right = int(left) & keep, int(right) & keep
        if not np.array_equal(left, right):
            found[name] = (str(left), str(right))
    return found


class Loss(NamedTuple):
    """What became of sessions after a failover: positions in what was there before."""

    lost: Slots
    young: Slots  # lost as well, but younger than it takes to tell a peer of them
    not_kept: Slots  # of kinds or states that no peer puts into its DPVS


def losses(before: Records, age_ms: npt.NDArray[np.int64], after: "npt.NDArray[np.void]", young_ms: int) -> Loss:
    """``after``: tuples (``collector.record.identity``) of all that is there now."""
    gone = ~np.isin(identity(before), after)
    could = injectable(before)
    new = age_ms < young_ms
    return Loss(np.flatnonzero(gone & could & ~new), np.flatnonzero(gone & could & new), np.flatnonzero(gone & ~could))
