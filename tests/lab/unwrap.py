# SPDX-License-Identifier: GPL-2.0-or-later
"""The far end of tunnels: IP in IP, IPv6 in IP, IPv6 in IPv6, for kernels without devices for these.

usage: python -m tests.lab.unwrap

What comes out goes into a TUN device. Prints "ready" once it listens. Runs in the server's namespace until it is ended.
"""

import fcntl
import os
import selectors
import socket
import struct

from pyroute2 import IPRoute

from tests.lab.net import sysctl

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
DEVICE = "unwrap0"
BUFFER = 8 << 20


def open_device() -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    with IPRoute() as handle:
        handle.link("set", index=handle.link_lookup(ifname=DEVICE)[0], state="up")
    for scope in ("all", DEVICE):
        sysctl(f"net.ipv4.conf.{scope}.rp_filter", 0)
    return descriptor


def raw(family: int, protocol: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_RAW, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    return made


def main() -> None:
    device = open_device()
    selector = selectors.DefaultSelector()
    for protocol in (socket.IPPROTO_IPIP, socket.IPPROTO_IPV6):
        selector.register(raw(socket.AF_INET, protocol), selectors.EVENT_READ, True)
    selector.register(raw(socket.AF_INET6, socket.IPPROTO_IPV6), selectors.EVENT_READ, False)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            packet = key.fileobj.recv(65536)  # type: ignore[union-attr]
            os.write(device, packet[(packet[0] & 15) * 4 :] if key.data else packet)  # IPv4's comes with its header


if __name__ == "__main__":
    main()
