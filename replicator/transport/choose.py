# SPDX-License-Identifier: GPL-2.0-or-later
"""Which transport: one is chosen for all links of a node, and never silently becomes another.

Rules: an address is read as the mode wants it. With keys, every mode proves both names: TCP is TLS 1.3; RDMA is set up
over TLS and its frames are sealed; shared memory agrees on keys over TLS on its socket and is sealed too.
"""

from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from replicator.seal import Party

from . import address, shm_setup
from .address import Address
from .interface import PEER_TIMEOUT_S, Dialer, Listener
from .shm import Security, ShmDialer, ShmListener
from .tcp import TcpDialer, TcpListener
from .tls import Tls, TlsDialer, TlsListener

Where = Address | Path


class Mode(StrEnum):
    """How frames travel between nodes."""

    TCP = "tcp"
    RDMA = "rdma"
    SHM = "shm"


def parse(mode: Mode, text: str, *, listen: bool = False) -> Where:
    """The address that ``text`` names in this mode; raises BadAddress."""
    return shm_setup.parse(text) if mode is Mode.SHM else address.parse(text, listen=listen)


class Transport(NamedTuple):
    """One way for all links of this node. ``tls`` and ``me`` go together; neither: links prove nothing."""

    mode: Mode = Mode.TCP
    tls: Tls | None = None
    me: Party | None = None
    device: str | None = None  # of RDMA; None: the first that is up
    silence_s: float = PEER_TIMEOUT_S  # how long TCP bears a peer that answers nothing

    def check(self) -> None:
        """Refuse now what could not work later. Raises NoRdma or BadDevice."""
        if self.mode is Mode.RDMA:
            from .verbs import find

            find(self.device)

    def dialer(self, where: Where) -> Dialer:
        """For one peer."""
        if isinstance(where, Path):
            return ShmDialer(where, self._security)
        settings = {"silence_s": self.silence_s}
        stream = TlsDialer(where, self.tls, **settings) if self.tls else TcpDialer(where, **settings)
        if self.mode is not Mode.RDMA:
            return stream
        from .rdma import RdmaDialer
        from .verbs import find

        return RdmaDialer(stream, find(self.device), self.me)

    def listener(self, where: Where) -> Listener:
        """For all peers that dial us."""
        if isinstance(where, Path):
            return ShmListener(where, self._security)
        settings = {"silence_s": self.silence_s}
        stream = TlsListener(where, self.tls, **settings) if self.tls else TcpListener(where, **settings)
        if self.mode is not Mode.RDMA:
            return stream
        from .rdma import RdmaListener
        from .verbs import find

        return RdmaListener(stream, find(self.device), self.me)

    @property
    def _security(self) -> Security | None:
        return Security(self.tls, self.me) if self.tls and self.me else None

    def __str__(self) -> str:
        how = f"proven and encrypted as node {self.me.node}" if self.me else "not protected"
        return f"{self.mode}, {how}"
