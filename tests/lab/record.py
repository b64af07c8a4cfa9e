# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes what passes an interface of a namespace to a pcap file, as tcpdump would."""

import socket
import struct
import threading
import time
from pathlib import Path
from types import TracebackType

from tests.lab.net import inside

ETH_P_ALL = 0x0003
PACKET_OUTGOING = 4
SNAP = 1 << 18
LINKTYPE_ETHERNET = 1


class Recorder:
    """Records from its making to ``close``. ``incoming``: on a loopback interface each packet goes out and comes in."""

    def __init__(
        self, path: Path, interface: str, namespace_path: str | None = None, *, incoming: bool = False
    ) -> None:
        self.path = path
        self.packets = 0
        self._incoming = incoming
        if namespace_path is None:
            self._socket = self._open(interface)
        else:
            with inside(namespace_path):
                self._socket = self._open(interface)
        self._file = path.open("wb")
        self._file.write(struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, SNAP, LINKTYPE_ETHERNET))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="recorder", daemon=True)
        self._thread.start()

    @staticmethod
    def _open(interface: str) -> socket.socket:
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        opened.bind((interface, ETH_P_ALL))
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
        opened.settimeout(0.1)
        return opened

    def _loop(self) -> None:
        while True:
            try:
                packet, address = self._socket.recvfrom(SNAP)
            except TimeoutError:
                if self._stop.is_set():
                    return
                continue
            except OSError:
                return
            if self._incoming and address[2] == PACKET_OUTGOING:
                continue
            seconds, ns = divmod(time.time_ns(), 1_000_000_000)
            self._file.write(struct.pack("<IIII", seconds, ns, len(packet), len(packet)) + packet)
            self.packets += 1

    def close(self) -> None:
        """What has passed so far is in the file then."""
        self._stop.set()
        self._thread.join()
        self._socket.close()
        self._file.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
