# SPDX-License-Identifier: GPL-2.0-or-later
"""Packets to the watched services on interfaces that the kernel sees: the XDP program, its maps, its links.

Rules: the program passes every packet on. It is put on by a link, so that the kernel takes it off when we end, however
that is. Native first, generic where the driver has none, and which of the two is said. An interface that has another
XDP program is left alone. Counters only grow while the program is there; a flow's entry stands for the last connection
from its port. What is read of the maps is copied; no packet is.
"""

import errno
import mmap
import os
import socket
from collections.abc import Iterable, Sequence
from enum import StrEnum
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from probes import bpfcall, loader
from probes.errors import DpvsProbeError, NeedRoot
from probes.flow import FLOW, FLOW_KEY, SERVICE

# In the order of the program. Each packet is in ``packets`` and in one of the next seven; ``bytes`` are of those that
# are in ``counted``.
COUNTERS = (
    "packets", "counted", "unwatched", "not_ip", "other_protocol", "fragments", "malformed", "deep",
    "flows_new", "flows_renewed", "flows_no_room", "bytes",
)  # fmt: skip
OUTCOMES = COUNTERS[1:8]
COUNTERS_PER_CPU = 16
FLOWS = 1 << 18
SERVICES = 1 << 14

Flows = npt.NDArray[np.void]


class Mode(StrEnum):
    """How the program is put on an interface."""

    AUTO = "auto"  # native, else generic
    NATIVE = "native"  # in the driver, before the kernel makes anything of a packet
    GENERIC = "generic"


class NoInterface(DpvsProbeError):
    help_text = "ip link shows the interfaces of this network namespace. Ports that DPDK drives itself have none."


class OtherProgram(DpvsProbeError):
    help_text = (
        "It is left alone. ip link show says which it is; take it off (ip link set dev IFACE xdp off) or leave this "
        "interface out."
    )


class CannotAttach(DpvsProbeError):
    help_text = "XDP links need Linux 5.9 or later with CONFIG_XDP_SOCKETS or CONFIG_NET; see what dmesg says."


class Attachment(NamedTuple):
    """The program on one interface."""

    interface: str
    mode: str  # "native" or "generic"
    why: str  # why not native; empty if it is
    fd: int


class Packets:
    """``Packets(["eth1"])`` compiles, loads and attaches; ``close`` takes it off everywhere. One thread at a time."""

    def __init__(self, interfaces: Iterable[str], flows: int = FLOWS, mode: Mode = Mode.AUTO) -> None:
        """``flows``: how many are kept, 80 bytes each. Raises NoInterface, OtherProgram, CannotAttach, and what
        ``loader`` raises; then nothing stays attached.
        """
        numbers = {name: _number(name) for name in dict.fromkeys(interfaces)}
        cpus = loader.possible_cpus()
        self.limit = flows
        self.attached: list[Attachment] = []
        self._watched: set[bytes] = set()
        self._map: mmap.mmap | None = None
        flags = [f"-DFLOWS={flows}", f"-DSERVICES={SERVICES}", f"-DCOUNTER_SLOTS={cpus * COUNTERS_PER_CPU}"]
        self._program = loader.Program("packet", flags)
        try:
            self.program_fd = self._program.load_xdp(b"packet")
            self._flows_fd, self._services_fd = self._program.map_fd(b"flows"), self._program.map_fd(b"services")
            size = -(-cpus * COUNTERS_PER_CPU * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
            self._map = mmap.mmap(self._program.map_fd(b"counters"), size, mmap.MAP_SHARED, mmap.PROT_READ)
            self._counters: npt.NDArray[np.uint64] = np.frombuffer(  # no other name for it: ``close`` unmaps
                self._map, np.uint64, cpus * COUNTERS_PER_CPU
            ).reshape(cpus, COUNTERS_PER_CPU)
            self._keys, self._values = np.zeros(flows, FLOW_KEY), np.zeros(flows, FLOW)
            for name, number in numbers.items():
                self.attached.append(_attach(self.program_fd, name, number, mode))
        except BaseException:
            self.close()
            raise

    @property
    def watched(self) -> int:
        """How many services are watched."""
        return len(self._watched)

    def watch(self, services: npt.NDArray[np.void]) -> int:
        """Count packets to these services (dtype SERVICE) from now on, and to no others; how many found no room."""
        wanted = {row.tobytes() for row in services.astype(SERVICE)}  # joined arrays may have turned the ports around
        for key in self._watched - wanted:
            bpfcall.remove(self._services_fd, key)
        self._watched &= wanted
        left = 0
        for key in wanted - self._watched:
            try:
                bpfcall.put(self._services_fd, key, b"\1\0\0\0")
            except OSError as error:
                if error.errno not in (errno.E2BIG, errno.ENOMEM):
                    raise
                left += 1
                continue
            self._watched.add(key)
        return left

    def read(self) -> tuple[Flows, Flows]:
        """All flows: n keys (FLOW_KEY) and n values (FLOW), read in batches. Views, good until the next ``read``."""
        count = bpfcall.read_map(self._flows_fd, self._keys, self._values)
        return self._keys[:count], self._values[:count]

    def counters(self) -> dict[str, int]:
        """All counters since loading: no system call."""
        sums = self._counters.sum(axis=0)
        return {name: int(sums[index]) for index, name in enumerate(COUNTERS)}

    def interfaces(self) -> list[dict[str, str]]:
        """For status: where it is attached, and how."""
        return [
            {"interface": one.interface, "mode": one.mode, **({"why": one.why} if one.why else {})}
            for one in self.attached
        ]

    def close(self) -> None:
        """Off all interfaces, all maps given back."""
        attached, self.attached = self.attached, []
        for one in attached:
            os.close(one.fd)
        if self._map is not None:
            self._counters = self._counters.copy()
            self._map.close()
            self._map = None
        self._program.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def foresee(name: str, mode: Mode) -> str:
    """What attaching to an interface would do, in words; changes nothing. Raises NoInterface, OtherProgram,
    CannotAttach.
    """
    from probes import interface  # netlink takes a while to import, and only this needs it

    _number(name)
    try:
        now = interface.look(name)
    except OSError as error:
        raise CannotAttach(f"interface {name} cannot be asked: {error.strerror or error}") from None
    if now.program is not None:
        which = f" (id {now.program})" if now.program else ""
        raise OtherProgram(f"interface {name} has another XDP program{which}")
    if mode == Mode.GENERIC:
        return "generic, as --xdp-mode says"
    if now.native is None:
        return "native where the driver takes it, which this kernel does not tell before" + (
            ", else generic" if mode == Mode.AUTO else ""
        )
    if now.native:
        return "native: the driver takes XDP programs"
    if mode == Mode.NATIVE:
        raise CannotAttach(
            f"no XDP on {name}: its driver takes none", help_text="--xdp-mode auto takes the generic one."
        )
    return "generic: the driver takes no XDP programs"


def services_of(entries: Sequence[tuple[int, int, bytes, int]]) -> npt.NDArray[np.void]:
    """(af, proto, address of 4 or 16 bytes, port) of n services as SERVICE, (n,)."""
    out = np.zeros(len(entries), SERVICE)
    for row, (af, proto, address, port) in zip(out, entries, strict=True):
        row["af"], row["proto"], row["port"] = af, proto, port
        row["addr"][: len(address)] = np.frombuffer(address, np.uint8)
    return out


def _number(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except (OSError, ValueError):
        raise NoInterface(f"there is no interface {name} here") from None


def _attach(program_fd: int, name: str, number: int, mode: Mode) -> Attachment:
    said = []
    for tried, flag in ((Mode.NATIVE, bpfcall.XDP_NATIVE), (Mode.GENERIC, bpfcall.XDP_GENERIC)):
        if mode not in (Mode.AUTO, tried):
            continue
        try:
            fd = bpfcall.attach_xdp(program_fd, number, flag)
        except OSError as error:
            _refuse(error, name)
            said.append(f"{tried}: {error.strerror}")
            continue
        return Attachment(name, tried, f"the driver does not take it: {said[0]}" if said else "", fd)
    raise CannotAttach(f"no XDP on {name}: {', '.join(said)}")


def _refuse(error: OSError, name: str) -> None:
    """What another mode does not help against. net/core/dev.c: dev_xdp_attach."""
    if error.errno in (errno.EBUSY, errno.EEXIST):
        raise OtherProgram(f"interface {name} has another XDP program") from None
    if error.errno in (errno.EPERM, errno.EACCES):
        raise NeedRoot(f"no XDP on {name}: {error.strerror}") from None
    if error.errno == errno.ENODEV:
        raise NoInterface(f"interface {name} is gone") from None
