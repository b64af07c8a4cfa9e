# SPDX-License-Identifier: GPL-2.0-or-later
"""What nodes offer: the services that every pair has, and those of each further kind that a test asks for by name."""

from dataclasses import dataclass, replace

from tests.lab.net import Plan

ECHO, HTTP, DATAGRAM = 7, 80, 53


@dataclass(frozen=True)
class Service:
    """One virtual service."""

    proto: str  # tcp, udp, sctp
    address: str
    port: int
    servers: tuple[str, ...]
    local_addresses: tuple[str, ...] = ()
    mode: str = "fnat"  # dr, nat, tunnel

    @property
    def key(self) -> str:
        return endpoint(self.address, self.port)


def endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


# Kind -> forwarding mode, family outside, family inside, subnet and last byte of its virtual address.
KINDS = {
    "fnat": ("fnat", 4, 4, 1, 100),
    "fnat6": ("fnat", 6, 6, 1, 100),
    "fnat64": ("fnat", 6, 4, 1, 104),
    "dr": ("dr", 4, 4, 1, 101),
    "dr6": ("dr", 6, 6, 1, 101),
    "nat": ("nat", 4, 4, 4, 100),
    "nat6": ("nat", 6, 6, 4, 100),
    "tunnel": ("tunnel", 4, 4, 1, 102),
    "tunnel6": ("tunnel", 6, 6, 1, 102),
    "tunnel64": ("tunnel", 6, 4, 1, 103),
}
ONE_SERVER = (
    "dr",
    "tunnel",
)  # the server has one address for them: where it answers from says nothing of who was asked


def address(plan: Plan, kind: str) -> str:
    """The virtual address of a kind's services."""
    _, outside, _, third, fourth = KINDS[kind]
    return plan.at(third, fourth) if outside == 4 else plan.at6(third, fourth)


def of_kind(plan: Plan, kind: str) -> list[Service]:
    """TCP echo and UDP echo."""
    mode, _, inside, _, _ = KINDS[kind]
    servers = tuple(plan.servers if inside == 4 else plan.servers6)
    local = tuple(plan.local_addresses if inside == 4 else plan.local_addresses6) if mode == "fnat" else ()
    chosen = servers[:1] if mode in ONE_SERVER else servers
    return [
        Service(proto, address(plan, kind), port, chosen, local, mode)
        for proto, port in (("tcp", ECHO), ("udp", DATAGRAM))
    ]


def of_sctp(plan: Plan) -> list[Service]:
    """Echo over SCTP in three modes, one of them in IPv6 too."""
    found = []
    for kind in ("fnat", "fnat6", "nat", "dr"):
        echo = of_kind(plan, kind)[0]
        found.append(replace(echo, proto="sctp"))
    return found


def services(plan: Plan, kinds: tuple[str, ...], *, sctp: bool = False) -> list[Service]:
    """The services of every pair, and those of ``kinds``."""
    servers, local = tuple(plan.servers), tuple(plan.local_addresses)
    found = [
        Service("tcp", plan.vip, HTTP, servers, local),
        Service("tcp", plan.vip, ECHO, servers, local),
        Service("udp", plan.vip, DATAGRAM, servers, local),
        Service("tcp", plan.vip_dr, HTTP, servers[:1], mode="dr"),
        Service("tcp", plan.vip_dr, ECHO, servers[:1], mode="dr"),
    ]
    for kind in kinds:
        found += [service for service in of_kind(plan, kind) if service not in found]
    return found + (of_sctp(plan) if sctp else [])
