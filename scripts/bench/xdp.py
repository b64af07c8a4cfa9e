# SPDX-License-Identifier: GPL-2.0-or-later
"""The packet program by itself: packets a second and nanoseconds a packet with few flows and with many.

Two namespaces of our own with a veth pair between them. Frames of 60 bytes, each of the next flow in turn, are sent on
one side by sendmmsg; the other side has the program, natively, generically or not at all. Sending, the program and the
kernel's receiving share one processor, so packets a second are of all three; nanoseconds a packet are the program's
own, as the kernel counts them (BPF_ENABLE_STATS). Then the flows are read in batches and joined to a table of as many
sessions. Best of the rounds.
"""

import argparse
import ctypes
import os
import secrets
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from pyroute2 import IPRoute, netns

from collector.flows import FlowJoin, Sessions
from collector.record import AF_INET, ESTABLISHED, FNAT, RECORD, TCP
from probes.packets import Mode, Packets, services_of
from tests.lab.net import inside, offloads_off, remove_namespace

VIP, PORT = b"\x0a\x01\x00\x01", 80
FRAME_BYTES = 60
AT_ONCE = 1024
SYS_BPF, SYS_SENDMMSG = 321, 307  # x86-64
SO_SNDBUFFORCE, SOL_PACKET, PACKET_QDISC_BYPASS = 32, 263, 20
BPF_OBJ_GET_INFO_BY_FD, BPF_ENABLE_STATS = 15, 32
RUN_TIME_AT = 192  # of struct bpf_prog_info: run_time_ns, run_cnt

_libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class Frames:
    """One frame for each of n flows, in one piece of memory, and the headers that sendmmsg wants."""

    def __init__(self, flows: int) -> None:
        frame = bytearray(b"\x02\0\0\0\0\1" + b"\x02\0\0\0\0\2" + b"\x08\0")
        frame += struct.pack("!BBHHHBBH4s4s", 0x45, 0, FRAME_BYTES - 14, 0, 0, 64, TCP, 0, bytes(4), VIP)
        frame += struct.pack("!HHIIBBHHH", 0, PORT, 1, 1, 0x50, 0x10, 500, 0, 0)
        frame += bytes(FRAME_BYTES - len(frame))
        self._data = np.tile(np.frombuffer(frame, np.uint8), (flows, 1))
        clients(np.arange(flows), self._data[:, 26:30], self._data[:, 34:36])
        self._vectors = np.zeros((flows, 2), np.uint64)  # struct iovec
        self._vectors[:, 0] = self._data.ctypes.data + np.arange(flows, dtype=np.uint64) * np.uint64(FRAME_BYTES)
        self._vectors[:, 1] = FRAME_BYTES
        self._headers = np.zeros((flows, 8), np.uint64)  # struct mmsghdr
        self._headers[:, 2] = self._vectors.ctypes.data + np.arange(flows, dtype=np.uint64) * np.uint64(16)
        self._headers[:, 3] = 1
        self.flows = flows

    def send(self, out: socket.socket, count: int) -> None:
        """So many frames, flow after flow, beginning again after the last."""
        at = 0
        while count:
            now = min(AT_ONCE, count, self.flows - at)
            headers = self._headers.ctypes.data + at * 64
            sent = checked(_libc.syscall(SYS_SENDMMSG, out.fileno(), ctypes.c_void_p(headers), now, 0))
            at = (at + sent) % self.flows
            count -= sent


def clients(numbers: npt.NDArray[np.int64], addresses: npt.NDArray[np.uint8], ports: npt.NDArray[np.uint8]) -> None:
    """A client's address and port for each number."""
    addresses[:, 0] = 10
    addresses[:, 1] = 2
    addresses[:, 2:4] = (numbers >> 15).astype(">u2").view(np.uint8).reshape(-1, 2)
    ports[:] = (1024 + (numbers & 0x7FFF)).astype(">u2").view(np.uint8).reshape(-1, 2)


def table_of(flows: int, slots: int) -> Sessions:
    """Sessions with these flows, among ``slots``."""
    records, present = np.zeros(slots, RECORD), np.zeros(slots, np.bool_)
    at = np.random.default_rng(1).permutation(slots)[:flows]
    rows = np.zeros(flows, RECORD)
    ports = np.zeros((flows, 2), np.uint8)
    clients(np.arange(flows), rows["caddr"], ports)
    rows["cport"] = ports.view(">u2")[:, 0]
    rows["vaddr"][:, :4] = np.frombuffer(VIP, np.uint8)
    rows["slot"], rows["generation"], rows["vport"], rows["af"], rows["af_out"] = at, 1, PORT, AF_INET, AF_INET
    rows["proto"], rows["fwdmode"], rows["state"] = TCP, FNAT, ESTABLISHED
    records[at] = rows
    present[at] = True
    return Sessions(records, present)


def run_stats(program_fd: int) -> tuple[int, int]:
    """(nanoseconds, runs) of a program since it was loaded."""
    info = ctypes.create_string_buffer(256)
    attributes = ctypes.create_string_buffer(struct.pack("<IIQ", program_fd, len(info), ctypes.addressof(info)), 128)
    checked(_libc.syscall(SYS_BPF, BPF_OBJ_GET_INFO_BY_FD, attributes, 128))
    spent, runs = struct.unpack_from("<QQ", info, RUN_TIME_AT)
    return spent, runs


@contextmanager
def counted() -> Iterator[None]:
    """The kernel counts the time of BPF programs."""
    fd = checked(_libc.syscall(SYS_BPF, BPF_ENABLE_STATS, ctypes.create_string_buffer(128), 128))
    try:
        yield
    finally:
        os.close(fd)


@contextmanager
def wire() -> Iterator[tuple[str, socket.socket]]:
    """Paths of the receiving namespace (interface y0), and a socket that sends to it."""
    names = [f"dpb-{secrets.token_hex(3)}-{side}" for side in "xy"]
    made = []
    with ExitStack() as stack:
        for name in names:
            netns.create(name)
            made.append(name)
            stack.callback(remove_namespace, name)
        left, right = (f"/run/netns/{name}" for name in names)
        with inside(left), IPRoute() as handle:
            handle.link("add", ifname="x0", kind="veth", peer={"ifname": "y0", "net_ns_fd": names[1]})
        for path, interface in ((right, "y0"), (left, "x0")):
            with inside(path), IPRoute() as handle:
                with open("/proc/sys/net/ipv6/conf/all/disable_ipv6", "w") as file:
                    file.write("1")
                offloads_off(interface)
                handle.link("set", index=handle.link_lookup(ifname=interface)[0], state="up")
        with inside(left):
            out = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
            out.bind(("x0", 0))
            out.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 256 << 20)  # sending does not wait for receiving
            out.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
        yield right, out


def rate(frames: Frames, out: socket.socket, packets: int, rounds: int) -> float:
    """Packets a second of the best round."""
    frames.send(out, min(frames.flows, packets))  # the flows are known from then on
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        frames.send(out, packets)
        took.append(time.perf_counter() - start)
    return packets / min(took)


def measure(flows: int, arguments: argparse.Namespace) -> Iterator[str]:
    frames = Frames(flows)
    with wire() as (right, out):
        yield row(flows, "none", f"{rate(frames, out, arguments.packets, arguments.rounds):12,.0f}")
        for mode in (Mode.NATIVE, Mode.GENERIC):
            with inside(right):
                packets = Packets(["y0"], flows=arguments.table, mode=mode)
            with packets:
                packets.watch(services_of([(AF_INET, TCP, VIP, PORT)]))
                plain = rate(frames, out, arguments.packets, arguments.rounds)
                with counted():
                    before = run_stats(packets.program_fd)
                    frames.send(out, arguments.packets)
                    spent, runs = (now - then for now, then in zip(run_stats(packets.program_fd), before, strict=True))
                time.sleep(0.05)  # what is still queued
                said = packets.counters()
                sent = min(flows, arguments.packets) + arguments.packets * (arguments.rounds + 1)
                kept, reading, joining = read(packets, flows, arguments)
                yield row(
                    flows, mode, f"{plain:12,.0f}", f"{spent / runs:8.0f}", f"{sent - said['counted']:8,}",
                    f"{kept:9,}", f"{reading * 1e3:9.1f}", f"{joining * 1e3:9.1f}",
                )  # fmt: skip


def read(packets: Packets, flows: int, arguments: argparse.Namespace) -> tuple[int, float, float]:
    """(flows kept, seconds to read them, seconds to join them), of the best round each."""
    table, join = table_of(flows, arguments.slots), FlowJoin(arguments.slots)
    reading, joining, kept = [], [], 0
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        keys, values = packets.read()
        middle = time.perf_counter()
        join.look(keys, values, table, [], time.monotonic_ns())
        reading.append(middle - start)
        joining.append(time.perf_counter() - middle)
        kept = len(keys)
        if join.joined != kept:
            sys.exit(f"{kept} flows were read, {join.joined} joined")
    return kept, min(reading), min(joining)


def row(flows: int, mode: str, *cells: str) -> str:
    return f"{flows:>8,} {mode:<8}" + " ".join(cells)


def main() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flows", type=int, nargs="+", default=[1, 1000, 50_000, 200_000])
    parser.add_argument("--packets", type=int, default=300_000, help="a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", type=int, default=1 << 18, help="flows that the program keeps")
    parser.add_argument("--slots", type=int, default=1 << 20, help="of the table of sessions")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the namespaces go as well
    print("   flows program     packets/s ns/packet not counted flows kept read ms join ms")
    for flows in arguments.flows:
        for line in measure(flows, arguments):
            print(line, flush=True)


if __name__ == "__main__":
    main()
