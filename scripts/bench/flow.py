# SPDX-License-Identifier: GPL-2.0-or-later
"""A flow of numbered datagrams to an echo service, until SIGTERM; then one line of JSON: sent, lost, round trips.

usage: python -m scripts.bench.flow ADDRESS PORT PER_SECOND
"""

import json
import signal
import socket
import struct
import sys
import time

LAST_ANSWERS_S = 0.5


def flow(address: str, port: int, per_second: int) -> dict[str, float]:
    """Send and count until told to stop."""
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    sent: list[float] = []
    took: dict[int, float] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        connection.connect((address, port))
        connection.setblocking(False)
        print("ready", flush=True)
        began = time.monotonic()
        end = float("inf")
        while (now := time.monotonic()) < end:
            if stopped and end == float("inf"):
                end = now + LAST_ANSWERS_S
            due = len(sent) if stopped else int((now - began) * per_second)
            while len(sent) < due:
                try:
                    connection.send(struct.pack("<Q", len(sent)).ljust(64, b"."))
                except BlockingIOError:
                    break
                sent.append(time.monotonic())
            try:
                while True:
                    (number,) = struct.unpack_from("<Q", connection.recv(64))
                    took.setdefault(number, time.monotonic() - sent[number])
            except BlockingIOError:
                time.sleep(0.0002)
    times = sorted(took.values()) or [0.0]
    return {
        "sent": len(sent),
        "lost": len(sent) - len(took),
        "p50_ms": 1000 * times[len(times) // 2],
        "p99_ms": 1000 * times[len(times) * 99 // 100],
        "max_ms": 1000 * times[-1],
    }


if __name__ == "__main__":
    print(json.dumps(flow(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
