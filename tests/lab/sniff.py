# SPDX-License-Identifier: GPL-2.0-or-later
"""Counts TCP resets that reach, or leave, the interfaces of a namespace, by a packet socket in it."""

import socket
import struct
import threading
from collections import Counter
from types import TracebackType

from tests.lab.net import inside

ETH_P_IP = 0x0800
ETH_P_ALL = 0x0003
FLAG_RST = 0x04


class ResetCounter:
    """``resets`` maps (source, source port, destination, destination port) to how many resets were seen.

    ``segments`` counts all TCP segments, so that a test can tell "no resets" from "saw nothing".
    """

    def __init__(self, namespace_path: str, interface: str = "v0") -> None:
        with inside(namespace_path):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            self._socket.bind((interface, ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
        self._socket.settimeout(0.1)
        self.resets: Counter[tuple[str, int, str, int]] = Counter()
        self.segments = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="reset-counter", daemon=True)
        self._thread.start()

    @property
    def total(self) -> int:
        return sum(self.resets.values())

    def _loop(self) -> None:
        while not self._stop.is_set():
            try:
                frame = self._socket.recv(2048)
            except TimeoutError:
                continue
            except OSError:
                return
            self._frame(frame)

    def _frame(self, frame: bytes) -> None:
        if len(frame) < 54 or struct.unpack_from("!H", frame, 12)[0] != ETH_P_IP or frame[23] != socket.IPPROTO_TCP:
            return
        tcp = 14 + (frame[14] & 15) * 4
        if len(frame) < tcp + 20:
            return
        self.segments += 1
        if frame[tcp + 13] & FLAG_RST:
            source_port, destination_port = struct.unpack_from("!HH", frame, tcp)
            source, destination = socket.inet_ntoa(frame[26:30]), socket.inet_ntoa(frame[30:34])
            self.resets[source, source_port, destination, destination_port] += 1

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> "ResetCounter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
