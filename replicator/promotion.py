# SPDX-License-Identifier: GPL-2.0-or-later
"""When peers' sessions go into our DPVS: at once, or when this node is promoted.

Rules: under the policy ``inject`` each session goes in as it arrives, for nodes that both have the addresses, where
routes decide. Under ``promote`` it stays in memory until somebody (keepalived) says that the addresses are here; all of
them go in then, and what DPVS refuses because addresses or services are not there yet is tried again, often for a
while. A node starts as standby.
"""

from enum import StrEnum

HURRY_NS = 30_000_000_000  # after a promotion
RETRY_NS = 250_000_000
SAMPLE = 512  # of more refusals than that so many are tried, and all again when that helped


class Policy(StrEnum):
    """When peers' sessions go into DPVS."""

    INJECT = "inject"
    PROMOTE = "promote"


class Promotion:
    """The role of one node."""

    def __init__(self, policy: Policy = Policy.INJECT) -> None:
        self.policy = policy
        self._promoted = False
        self._hurry_until_ns = self._retry_at_ns = 0

    @property
    def puts_in(self) -> bool:
        """Peers' sessions are to stand in DPVS now."""
        return self._promoted or self.policy is Policy.INJECT

    @property
    def role(self) -> str:
        """For people: ``promoted``, ``standby``, or ``always`` where sessions go in anyway."""
        return "always" if self.policy is Policy.INJECT else "promoted" if self._promoted else "standby"

    def promote(self, now_ns: int) -> None:
        """The addresses are here, or about to be."""
        self._promoted = True
        self._hurry_until_ns, self._retry_at_ns = now_ns + HURRY_NS, now_ns + RETRY_NS

    def hurry(self, now_ns: int) -> None:
        """Something waits for addresses or services that are about to come: as after a promotion, in the same role."""
        if now_ns >= self._hurry_until_ns:
            self._retry_at_ns = now_ns + RETRY_NS
        self._hurry_until_ns = now_ns + HURRY_NS

    def demote(self) -> None:
        """They are not."""
        self._promoted = False
        self._hurry_until_ns = 0

    def retry_due(self, now_ns: int) -> bool:
        """Refused sessions are to be tried again without waiting for their refresh. True once each time."""
        if not self._retry_at_ns <= now_ns < self._hurry_until_ns:
            return False
        self._retry_at_ns = now_ns + RETRY_NS
        return True
