# SPDX-License-Identifier: GPL-2.0-or-later
"""The XDP program: each packet is counted as a plain reading of it says, on veth in both modes and on forged frames."""

import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from pyroute2 import IPRoute, netns
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import raw

from probes import bpfcall
from probes.packets import (
    COUNTERS,
    OUTCOMES,
    CannotAttach,
    Mode,
    NoInterface,
    OtherProgram,
    Packets,
    foresee,
    services_of,
)
from tests.lab.net import inside, offloads_off, remove_namespace
from tests.lab.process import wait_for
from tests.system import frames
from tests.system.frames import Flow

pytestmark = [pytest.mark.needs("bpf")]

XDP_PASS = 2
FRAMES = 1801
CONNECTIONS, LINES = 23, 5
ADDRESS = "10.77.0"
FORGER = bytes.fromhex("020000000002")  # whom forged frames come from


def watched() -> set[tuple[int, int, bytes, int]]:
    return {
        (af, proto, socket.inet_pton(socket.AF_INET if af == 2 else socket.AF_INET6, vip).ljust(16, b"\0"), port)
        for af, proto, vip, port in frames.SERVICES
    }


def read(packets: Packets) -> dict[Flow, tuple[int, int, int]]:
    """Of each flow: packets, bytes, flags."""
    keys, values = packets.read()
    return {
        Flow(
            key["caddr"].tobytes(), key["vaddr"].tobytes(), int(key["cport"]), int(key["vport"]), int(key["proto"]),
            int(key["af"]),
        ): (int(value["packets"]), int(value["bytes"]), int(value["flags"]))
        for key, value in zip(keys, values, strict=True)
    }  # fmt: skip


class Expected:
    """What frames, in order, should have been counted as."""

    def __init__(self, services: set[tuple[int, int, bytes, int]]) -> None:
        self.counters: Counter[str] = Counter()
        self.flows: dict[Flow, tuple[int, int, int]] = {}
        self._services = services

    def add(self, frame: bytes) -> None:
        counter, flow, flags = frames.outcome(frame, self._services)
        self.counters.update(("packets", counter))
        if flow is None:
            return
        self.counters["bytes"] += len(frame)
        count, size, seen = self.flows.get(flow, (0, 0, 0))
        if count and flags & 0x12 == 2 and seen & 5:
            count = size = seen = 0
            self.counters["flows_renewed"] += 1
        elif not count:
            self.counters["flows_new"] += 1
        self.flows[flow] = (count + 1, size + len(frame), seen | flags)


@pytest.fixture(scope="module")
def program() -> Iterator[Packets]:
    with Packets([]) as packets:
        yield packets


def test_frames_that_no_interface_saw_are_counted_as_they_read(program: Packets) -> None:
    program.watch(
        services_of([(af, proto, address[: 4 if af == 2 else 16], port) for af, proto, address, port in watched()])
    )
    assert program.watched == 4
    before = program.counters()
    expected, rng = Expected(watched()), random.Random(7)
    for _ in range(FRAMES):
        frame = frames.forged(rng)
        expected.add(frame)
        verdict, _ = bpfcall.trial(program.program_fd, frame)
        assert verdict == XDP_PASS
    counted = {name: value - before[name] for name, value in program.counters().items()}
    assert counted == {name: expected.counters[name] for name in COUNTERS}
    assert read(program) == expected.flows
    assert all(expected.counters[name] >= 10 for name in OUTCOMES), expected.counters  # the frames are worth something
    assert expected.counters["flows_renewed"] > 10


def test_services_come_and_go(program: Packets) -> None:
    frame = bytes(raw(Ether() / IP(src="10.9.9.9", dst="10.1.0.9") / UDP(sport=9, dport=9)))
    one, two = services_of([(2, 17, bytes((10, 1, 0, 9)), 9)]), services_of([(2, 17, bytes((10, 1, 0, 8)), 9)])

    def counted() -> int:
        before = program.counters()["counted"]
        bpfcall.trial(program.program_fd, frame)
        return program.counters()["counted"] - before

    assert (program.watch(one), counted()) == (0, 1)
    assert (program.watch(two), counted(), program.watched) == (0, 0, 1)
    assert (program.watch(np.concatenate((one, two))), counted(), program.watched) == (0, 1, 2)
    assert (program.watch(one[:0]), counted(), program.watched) == (0, 0, 0)


def test_a_table_of_flows_that_is_full_forgets_the_silent_ones() -> None:
    with Packets([], flows=1024) as packets:
        packets.watch(services_of([(2, 17, bytes((10, 1, 0, 9)), 9)]))
        frame = bytearray(raw(Ether() / IP(dst="10.1.0.9") / UDP(sport=9, dport=9)))
        for number in range(5003):
            frame[34:36] = number.to_bytes(2, "big")
            bpfcall.trial(packets.program_fd, bytes(frame))
        keys, values = packets.read()
        assert 512 < len(keys) <= 1024
        assert (values["packets"] == 1).all()
        assert (keys["cport"] == 5002).any()
        assert packets.counters()["counted"] == packets.counters()["flows_new"] == 5003


# --- on interfaces ----------------------------------------------------------------------------------------------------


class Wire:
    """Two namespaces joined by a veth pair: x0 on the left, with the sender, y0 on the right."""

    def __init__(self, prefix: str) -> None:
        self.left, self.right = (f"{prefix}-{secrets.token_hex(2)}-{side}" for side in ("x", "y"))
        self._made: list[str] = []

    def __enter__(self) -> "Wire":
        for name in (self.left, self.right):
            netns.create(name)
            self._made.append(name)
        with self.inside(self.left), IPRoute() as handle:
            handle.link("add", ifname="x0", kind="veth", peer={"ifname": "y0", "net_ns_fd": self.right})
        for fourth, name, interface in ((1, self.left, "x0"), (2, self.right, "y0")):
            with self.inside(name):
                with open("/proc/sys/net/ipv6/conf/all/disable_ipv6", "w") as file:
                    file.write("1")  # nothing but what the test says
                offloads_off(interface)
                with IPRoute() as handle:
                    index = handle.link_lookup(ifname=interface)[0]
                    handle.addr("add", index=index, address=f"{ADDRESS}.{fourth}", prefixlen=24)
                    for number in (1, index):
                        handle.link("set", index=number, state="up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._made:
            remove_namespace(name)

    @staticmethod
    def inside(name: str) -> Any:
        return inside(f"/run/netns/{name}")

    @contextmanager
    def heard(self, expected: Expected) -> Iterator[None]:
        """What the kernel of the left sends to y0 goes to ``expected`` as well, by a packet socket, after the block.

        Forged frames are not taken from there: the kernel takes their VLANs off first, or drops them.
        """
        with self.inside(self.right):
            tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
            tap.bind(("y0", 3))
        with tap:
            tap.setblocking(False)
            yield
            while True:
                try:
                    frame, address = tap.recvfrom(65536)
                except BlockingIOError:
                    return
                if address[2] != socket.PACKET_OUTGOING and frame[6:12] != FORGER:
                    expected.add(frame)


@pytest.fixture
def wire(lab_run: Any) -> Iterator[Wire]:
    with Wire(lab_run.prefix) as up:
        yield up


def talk(wire: Wire, port: int) -> None:
    """CONNECTIONS of real TCP from left to right, closed by the client, all of it over when this returns."""
    with wire.inside(wire.right):
        server = socket.create_server((f"{ADDRESS}.2", port), backlog=CONNECTIONS)

    def echo() -> None:
        for _ in range(CONNECTIONS):
            one, _ = server.accept()
            with one:
                while data := one.recv(4096):
                    one.sendall(data)

    thread = threading.Thread(target=echo)
    thread.start()
    for number in range(CONNECTIONS):
        with wire.inside(wire.left):
            client = socket.create_connection((f"{ADDRESS}.2", port), timeout=60)
        with client:
            for line in range(LINES):
                text = b"x" * (100 + 331 * number * line % 1300)
                client.sendall(text)
                left = len(text)
                while left:
                    left -= len(client.recv(left))
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
    thread.join()
    server.close()


def quiet(packets: Packets) -> bool:
    """Whether none comes for half a second: an acknowledgement may be late."""
    before = packets.counters()
    time.sleep(0.5)
    return packets.counters() == before


@pytest.mark.parametrize("mode", [Mode.NATIVE, Mode.GENERIC])
def test_real_tcp_and_forged_frames_are_counted_exactly(wire: Wire, mode: Mode) -> None:
    vip = socket.inet_aton(f"{ADDRESS}.2")
    services = {*watched(), (2, 6, vip.ljust(16, b"\0"), 4080)}
    with wire.inside(wire.right):
        packets = Packets(["y0"], mode=mode)
    with packets:
        assert [(one.interface, one.mode, one.why) for one in packets.attached] == [("y0", mode, "")]
        packets.watch(
            services_of([(af, proto, address[: 4 if af == 2 else 16], port) for af, proto, address, port in services])
        )
        expected = Expected(services)
        rng = random.Random(11)
        with wire.heard(expected):
            with wire.inside(wire.left):
                out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
                out.bind(("x0", 0))
            with out:
                sent = [frame for frame in (frames.forged(rng) for _ in range(503)) if len(frame) >= 15]
                for frame in sent:
                    out.send(frame)
                    expected.add(frame)
            talk(wire, 4080)
            wait_for("all packets", lambda: packets.counters()["counted"] > 300, 5)
            wait_for("no more of them", lambda: quiet(packets), 30)
            own = [flow for flow in read(packets) if flow.vaddr[:4] == vip]
            assert len(own) == CONNECTIONS
        counted = packets.counters()
        assert counted["packets"] == sum(counted[name] for name in OUTCOMES)
        assert {name: counted[name] for name in COUNTERS} == {name: expected.counters[name] for name in COUNTERS}
        assert read(packets) == expected.flows
        assert {expected.flows[flow][2] for flow in own} == {0x02 | 0x10 | 0x08 | 0x01}
        _, values = packets.read()
        assert (values["first_ns"] <= values["last_ns"]).all()
    talk(wire, 4081)  # taken off, the interface is as it was


def test_another_program_is_left_alone(wire: Wire) -> None:
    for first in (Mode.NATIVE, Mode.GENERIC):
        with wire.inside(wire.right):
            with Packets(["y0"], mode=first), pytest.raises(OtherProgram, match="y0 has another XDP program"):
                Packets(["lo", "y0"])
            with Packets(["y0"]) as packets:  # and what was put on lo is off as well
                assert packets.attached[0].mode == "native"
            with Packets(["lo"], mode=Mode.GENERIC):
                pass


def test_a_driver_without_native_xdp_gets_the_generic_one(wire: Wire) -> None:
    with wire.inside(wire.right), Packets(["lo"]) as packets:
        (where,) = packets.interfaces()
        assert where["mode"] == "generic"
        assert "native" in where["why"]


def test_what_would_be_done_is_said_before_and_changes_nothing(wire: Wire) -> None:
    with wire.inside(wire.right):
        for mode, said in ((Mode.AUTO, "native: "), (Mode.NATIVE, "native: "), (Mode.GENERIC, "generic")):
            assert foresee("y0", mode).startswith(said)
        assert foresee("lo", Mode.AUTO).startswith("generic: ")
        with pytest.raises(CannotAttach, match="its driver takes none"):
            foresee("lo", Mode.NATIVE)
        with pytest.raises(NoInterface, match="no interface z9"):
            foresee("z9", Mode.AUTO)
        for mode in (Mode.NATIVE, Mode.GENERIC):
            with (
                Packets(["y0"], mode=mode),
                pytest.raises(OtherProgram, match=r"another XDP program \(id \d+\)"),
            ):
                foresee("y0", Mode.AUTO)
        assert foresee("y0", Mode.AUTO).startswith("native: ")


def test_an_interface_that_is_not_there(wire: Wire) -> None:
    with wire.inside(wire.right), pytest.raises(NoInterface, match="no interface z9"):
        Packets(["y0", "z9"])


def test_a_killed_process_leaves_nothing_on_the_interface(wire: Wire) -> None:
    code = (
        "from probes.packets import Packets; p = Packets(['y0']); print('up', flush=True); import time; time.sleep(600)"
    )
    with wire.inside(wire.right):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=os.getcwd())
        assert child.stdout is not None
        with child.stdout:
            assert child.stdout.readline() == b"up\n"
            with pytest.raises(OtherProgram):
                Packets(["y0"])
            child.send_signal(signal.SIGKILL)
            child.wait()

        def off() -> bool:
            try:
                Packets(["y0"]).close()
            except OtherProgram:
                return False
            return True

        wait_for("the interface is free", off, 5)
