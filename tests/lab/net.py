# SPDX-License-Identifier: GPL-2.0-or-later
"""Network namespaces, veth pairs and one bridge, by netlink.

Rules: every namespace belongs to one ``Network`` and carries its prefix; ``close`` removes them all, which removes the
links in them as well. Nothing outside these namespaces is touched. N is the second byte of all addresses::

    client v0 10.N.0.10 (and 10.N.3.10, for NAT) --+
    server v0 10.N.0.20-.23 (and 10.N.1.101, .102 on lo, for direct routing and tunnels) --+-- bridge in namespace "sw"
    node a v0 (DPVS's own; address 10.N.0.1 lives in DPVS) --+
    node b v0 (DPVS's own; address 10.N.0.2 lives in DPVS) --+
    a s0 10.N.8.1 <-> b s0 10.N.8.2      the sync link, the kernel's own

What is 10.N.X.Y in IPv4 is fd00:N:X::Y in IPv6 (the digits as they are). The client and the server act as the routers
of a real network: their routes say which node is active. Services of NAT are in a subnet of their own, which the client
speaks to from an address of its own, because what the server answers to that has to pass the node. The nodes' ports of
the bridge are isolated from each other: both hold the same addresses, as far as IPv6's duplicate detection can tell.
"""

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from pyroute2 import IPRoute, netns

NETNS_DIR = "/run/netns"
HOSTS = ("client", "server", "a", "b")
CLONE_NEWNET = 0x40000000
SIOCETHTOOL = 0x8946
# ETHTOOL_S* commands that switch one offload: checksums, scatter-gather, TSO, GSO, GRO (linux/ethtool.h)
OFFLOADS = {"rx": 0x15, "tx": 0x17, "sg": 0x19, "tso": 0x1F, "gso": 0x24, "gro": 0x2C}
_libc = ctypes.CDLL(None, use_errno=True)


def set_namespace(path: str) -> None:
    """Move the calling thread into the network namespace at ``path``. Sockets made before stay where they were made."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(descriptor, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {path}")
    finally:
        os.close(descriptor)


@contextmanager
def inside(path: str) -> Iterator[None]:
    """The calling thread is in the namespace at ``path`` within the block."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        set_namespace(path)
        try:
            yield
        finally:
            set_namespace(f"/proc/self/fd/{home}")
    finally:
        os.close(home)


def sysctl(name: str, value: int | str) -> None:
    """Set a sysctl of the calling thread's network namespace; one that this kernel lacks is not missed."""
    try:
        with open("/proc/sys/" + name.replace(".", "/"), "w") as file:
            file.write(str(value))
    except FileNotFoundError:
        pass


def offloads_off(interface: str) -> None:
    """Plain frames of wire size with real checksums, which is what DPDK's packet socket driver understands."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for command in OFFLOADS.values():
            value = ctypes.create_string_buffer(struct.pack("=II", command, 0))
            request = struct.pack("16sQ16x", interface.encode(), ctypes.addressof(value))
            try:
                fcntl.ioctl(control, SIOCETHTOOL, request)
            except OSError:
                continue  # veth has no such switch here: nothing to turn off


@dataclass(frozen=True)
class Plan:
    """Addresses of a network whose second byte is ``net``."""

    net: int = 9

    def at(self, third: int, fourth: int) -> str:
        return f"10.{self.net}.{third}.{fourth}"

    def at6(self, third: int, fourth: int) -> str:
        return f"fd00:{self.net}:{third}::{fourth}"

    @property
    def client(self) -> str:
        return self.at(0, 10)

    @property
    def servers(self) -> list[str]:
        return [self.at(0, k) for k in (20, 21, 22, 23)]

    @property
    def servers6(self) -> list[str]:
        return [self.at6(0, k) for k in (20, 21, 22, 23)]

    @property
    def vip(self) -> str:
        return self.at(1, 100)

    @property
    def server_vips(self) -> list[str]:
        """Virtual addresses that the server has as well: packets come to it with them."""
        return [at(1, k) for at in (self.at, self.at6) for k in (101, 102)] + [self.at6(1, 103)]

    @property
    def vip_dr(self) -> str:
        return self.at(1, 101)

    @property
    def local_addresses(self) -> list[str]:
        return [self.at(2, 200), self.at(2, 201)]

    @property
    def local_addresses6(self) -> list[str]:
        return [self.at6(2, 200), self.at6(2, 201)]

    def node_prefixes(self, name: str) -> list[str]:
        """What a node has of addresses in subnets: with each comes a route."""
        fourth = ord(name) - ord("a") + 1
        subnets = [f"{self.at(third, fourth)}/24" for third in (0, 3)]
        return subnets + [f"{self.at6(third, fourth)}/64" for third in (0, 3)]

    def node(self, name: str) -> str:
        return self.at(0, {"a": 1, "b": 2}[name])

    def sync(self, name: str) -> str:
        return self.at(8, {"a": 1, "b": 2}[name])


class Network:
    """The namespaces of one laboratory; a context manager."""

    def __init__(self, prefix: str, plan: Plan) -> None:
        self.prefix = prefix
        self.plan = plan
        self._names: list[str] = []
        self._owner = os.getpid()

    def name(self, host: str) -> str:
        return f"{self.prefix}-{host}"

    def path(self, host: str) -> str:
        return f"{NETNS_DIR}/{self.name(host)}"

    def inside(self, host: str) -> Any:
        return inside(self.path(host))

    def netlink(self, host: str) -> Any:
        """A netlink handle in a host's namespace; a context manager. Its socket is made here, without any helper."""
        with self.inside(host):
            return IPRoute()

    def enter_in_child(self, host: str) -> Callable[[], None]:
        """For ``subprocess.Popen(preexec_fn=)``."""
        path = self.path(host)
        return lambda: set_namespace(path)

    def __enter__(self) -> "Network":
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._names and os.getpid() == self._owner:  # never in a forked child
            remove_namespace(self._names.pop())

    def _build(self) -> None:
        for host in ("sw", *HOSTS):
            netns.create(self.name(host))
            self._names.append(self.name(host))
            with self.inside(host):
                for scope in ("all", "default"):
                    sysctl(f"net.ipv6.conf.{scope}.disable_ipv6", 0 if host in ("client", "server") else 1)
                    for what in ("accept_dad", "dad_transmits", "accept_ra", "router_solicitations"):
                        sysctl(f"net.ipv6.conf.{scope}.{what}", 0)
        with ExitStack() as stack:
            routes = {host: stack.enter_context(self.netlink(host)) for host in ("sw", *HOSTS)}
            for handle in routes.values():
                handle.link("set", index=1, state="up")
            switch = routes["sw"]
            switch.link("add", ifname="br0", kind="bridge")
            bridge = _index(switch, "br0")
            switch.link("set", index=bridge, state="up")
            for host in HOSTS:
                port = f"p-{host}"
                switch.link("add", ifname=port, kind="veth", peer={"ifname": "v0", "net_ns_fd": self.name(host)})
                switch.link("set", index=_index(switch, port), master=bridge, state="up")
                routes[host].link("set", index=_index(routes[host], "v0"), state="up")
                if host in ("a", "b"):
                    switch.brport("set", index=_index(switch, port), isolated=1)
                with self.inside(host):
                    offloads_off("v0")
                with self.inside("sw"):
                    offloads_off(port)
            routes["a"].link("add", ifname="s0", kind="veth", peer={"ifname": "s0", "net_ns_fd": self.name("b")})
            for host in ("a", "b"):
                sync = _index(routes[host], "s0")
                routes[host].addr("add", index=sync, address=self.plan.sync(host), prefixlen=24)
                routes[host].link("set", index=sync, state="up")
            client, server = routes["client"], routes["server"]
            for third in (0, 3):
                client.addr("add", index=_index(client, "v0"), address=self.plan.at(third, 10), prefixlen=24)
                client.addr("add", index=_index(client, "v0"), address=self.plan.at6(third, 10), prefixlen=64)
            for address in (*self.plan.servers, *self.plan.servers6):
                server.addr("add", index=_index(server, "v0"), address=address, prefixlen=64 if ":" in address else 24)
            for address in self.plan.server_vips:
                server.addr("add", index=1, address=address, prefixlen=128 if ":" in address else 32)
        with self.inside("server"):  # the address for direct routing must not be answered for
            sysctl("net.ipv4.conf.all.arp_ignore", 1)
            sysctl("net.ipv4.conf.all.arp_announce", 2)
        with self.inside("client"):  # a churn of thousands of connections needs ports
            sysctl("net.ipv4.ip_local_port_range", "10000 65000")
            sysctl("net.ipv4.tcp_tw_reuse", 1)

    def active(self, node: str) -> None:
        """Route the VIPs, the local addresses and NAT's clients to ``node``."""
        fourth = {"a": 1, "b": 2}[node]
        for host, subnets in (("client", (1, 4)), ("server", (2, 3))):
            with self.netlink(host) as handle:
                for at, family, plen in ((self.plan.at, socket.AF_INET, 24), (self.plan.at6, socket.AF_INET6, 64)):
                    for third in subnets:
                        source = {"prefsrc": at(3, 10)} if third == 4 else {}
                        gateway = at(0, fourth)
                        handle.route("replace", family=family, dst=f"{at(third, 0)}/{plen}", gateway=gateway, **source)

    def gate(self, *, is_open: bool, hosts: tuple[str, ...] = ("client", "server")) -> None:
        """Whether packets pass between the nodes and the others, as where no node's routes are announced: the switch
        keeps isolated ports apart, and the nodes' always are.
        """
        with self.netlink("sw") as handle:
            for host in hosts:
                handle.brport("set", index=_index(handle, f"p-{host}"), isolated=0 if is_open else 1)

    def set_link(self, host: str, interface: str, up: bool) -> None:
        with self.netlink(host) as handle:
            handle.link("set", index=_index(handle, interface), state="up" if up else "down")


def remove_namespace(name: str) -> None:
    try:
        netns.remove(name)
    except FileNotFoundError:
        pass


def _index(handle: Any, interface: str) -> int:
    found = handle.link_lookup(ifname=interface)
    if not found:
        raise LookupError(f"no interface {interface}")
    return int(found[0])
