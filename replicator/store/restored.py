# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions that this node's DPVS had before it was started anew, on their way back into it.

Rules
- To the injector they are one more origin, whose link is down: copies that wait, become this node's own sessions with
  their first packet, are not refreshed, and end in silence when their time is over.
- Their time: what DPVS had left of a session's timeout is not known, only that it was not over. So each gets its
  timeout less the time since the store was last known to be right. One for which nothing is left does not come back.
- They claim nothing: if a peer, or this DPVS, has such a session of its own by now, that one is right.
"""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from collector.record import INJECTED, RECORD, Bools, Records, identity, pick
from collector.table import Dirty
from probes.agent import abi
from probes.agent.client import code_name
from replicator.inject import injectable
from replicator.store.format import Instant, joined
from replicator.store.reader import Contents, age_ns
from replicator.wire import node_id

MS = 1_000_000
_IN = (abi.Code.CREATED, abi.Code.UPDATED, abi.Code.LIVE)


class Fit(NamedTuple):
    """What of a store can come back: ``records`` with what is left of their timeouts, and what cannot, counted."""

    records: Records
    expired: int
    unfit: int
    claim: int  # the highest that any of them had


def fit(contents: Contents, boot: bytes, at: Instant, *, own: bool = True) -> Fit:
    """What of a store may come back at the moment ``at`` of the machine's run ``boot``. ``own``: those of the pool too,
    because the DPVS that had them is no more. Raises StoreRefused where nobody knows how old it is.
    """
    ages = (
        age_ns(contents.stamp.at, contents.head.boot_id, at, boot),
        age_ns(contents.head.created, contents.head.boot_id, at, boot),
    )
    kept, expired, unfit = [], 0, 0
    for records, age in zip((contents.own if own else contents.own[:0], contents.waiting), ages, strict=True):
        can = injectable(records)
        unfit += int(np.count_nonzero(~can))
        some = pick(records, can)
        left = some["timeout_ms"].astype(np.int64) - age // MS
        expired += int(np.count_nonzero(left <= 0))
        lasting = pick(some, left > 0)
        lasting["timeout_ms"] = left[left > 0]
        kept.append(lasting)
    # one that had its first packet stands in the pool's part as well, and there it is right
    again = np.isin(identity(kept[1]), identity(kept[0]))
    records = joined((kept[0], pick(kept[1], ~again)))
    claim = int(records["claim"].max()) if len(records) else 0
    return Fit(records, expired, unfit, claim)


class Restored:
    """An origin for the injector (``replicator.inject.Origin``)."""

    link_up = False

    def __init__(self, found: Fit, contents: Contents, now_ns: int) -> None:
        """``now_ns``: the moment that the timeouts of ``found`` count from."""
        self.found = found
        self.node, self.instance = contents.head.node, contents.head.instance
        self.node_id, self.workers = node_id(contents.head.node), contents.head.workers
        self.source = str(contents.path)
        self._began_ns = now_ns
        self.records: Records = pick(found.records, np.arange(len(found.records)))
        self._left_ms = self.records["timeout_ms"].copy()
        self.records["claim"] = 0
        self.records["flags"] &= np.uint16(0xFFFF ^ INJECTED)
        self.slots = max(1, len(self.records))
        if len(self.records) == 0:
            self.records = np.zeros(1, RECORD)
            self._left_ms = np.zeros(1, np.uint32)
        self.present: Bools = np.arange(self.slots) < len(found.records)
        self.pending = Dirty(self.slots)
        self.pending.mark(np.flatnonzero(self.present), now_ns)

    def age(self, now_ns: int) -> None:
        """Time has passed: those whose time is over come back no more, the others for what is left."""
        left = self._left_ms.astype(np.int64) - (now_ns - self._began_ns) // MS
        self.present &= left > 0
        self.records["timeout_ms"] = np.maximum(left, 1)

    def remaining(self) -> Records:
        """All that may still wait, with what is left of their time; a copy."""
        return pick(self.records, self.present)

    def unsettled(self, codes: npt.NDArray[np.uint8]) -> int:
        """How many DPVS was not asked about yet, or refuses for now. ``codes``: its answers (``Injector.codes``)."""
        open_ = (codes == abi.Code.PENDING) | ((codes >= abi.RETRYABLE) & (codes < abi.PERMANENT))
        return int(np.count_nonzero(open_ & self.present))

    def report(self, codes: npt.NDArray[np.uint8]) -> dict[str, Any]:
        """For people: what became of them. ``in_dpvs``: put in, whether they had a packet since or not."""
        total = len(self.found.records)
        said = Counter(int(code) for code in codes[:total])
        return {
            "from": self.source,
            "sessions": total,
            "in_dpvs": sum(said[code] for code in _IN),
            "unsettled": self.unsettled(codes),
            "refused": {
                code_name(code): count for code, count in sorted(said.items())
                if code >= abi.RETRYABLE or code == abi.Code.FOREIGN
            },
            "expired": self.found.expired,
            "not_to_be_put_in": self.found.unfit,
        }  # fmt: skip
