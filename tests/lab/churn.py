# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections that open and close in a random but repeatable pattern, held by the test itself.

Each opened connection exchanges one line, so it is ESTABLISHED on both sides of the load balancer. It ends in one of
the ways that real ones do: closed, half-closed until the real server closes as well, or reset.
"""

import random
import selectors
import socket
import struct
import time
from collections.abc import Callable

from tests.lab.net import inside
from tests.lab.process import LabError

LINGER_RESET = struct.pack("ii", 1, 0)
Action = Callable[[socket.socket], None]
BURST, BREAK_S = 100, 0.005
OPENING_S, ANSWER_S = 60.0, 30.0  # on a busy machine
WAYS = ("close", "half-close", "reset")


class Churn:
    """Connections from ``namespace_path`` to (host, port), where lines are echoed; a context manager."""

    def __init__(self, namespace_path: str, host: str, port: int, seed: int = 1) -> None:
        self._path, self._address = namespace_path, (host, port)
        self.random = random.Random(seed)
        self.open_ones: list[socket.socket] = []
        self.opened = 0

    def __enter__(self) -> "Churn":
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self.open_ones:
            connection.close()

    def open(self, count: int, timeout: float = OPENING_S) -> None:
        """Open ``count`` connections at once, and exchange a line on each."""
        fresh = []
        with inside(self._path):
            for _ in range(count):
                connection = socket.socket()
                connection.setblocking(False)
                connection.connect_ex(self._address)
                fresh.append(connection)
        line = b"churn %06d\n" % self.opened
        self._each(fresh, selectors.EVENT_WRITE, lambda connection: connection.sendall(line), timeout)
        answers: dict[socket.socket, bytes] = {}

        def receive(connection: socket.socket) -> None:
            answers[connection] = connection.recv(4096)

        self._each(fresh, selectors.EVENT_READ, receive, timeout)
        wrong = [answer for answer in answers.values() if answer != line]
        if wrong:
            raise LabError(f"{len(wrong)} of {count} connections got wrong bytes, such as {wrong[0]!r}")
        self.open_ones += fresh
        self.opened += count

    def close(self, count: int, ways: tuple[str, ...] = WAYS) -> None:
        """End ``count`` of the open connections, picked at random.

        With breaks: a reset is sent once, and where it finds a queue full it is lost.
        """
        for number in range(min(count, len(self.open_ones))):
            if number % BURST == BURST - 1:
                time.sleep(BREAK_S)
            connection = self.open_ones.pop(self.random.randrange(len(self.open_ones)))
            way = self.random.choice(ways)
            connection.setblocking(True)
            connection.settimeout(ANSWER_S)
            if way == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            elif way == "half-close":
                connection.shutdown(socket.SHUT_WR)
                if connection.recv(4096):
                    raise LabError("bytes came after the end")
            connection.close()

    def echo(self) -> None:
        """Every open connection exchanges a line."""
        for connection in self.open_ones:
            connection.setblocking(True)
            connection.settimeout(ANSWER_S)
            connection.sendall(b"still here\n")
            if connection.recv(4096) != b"still here\n":
                raise LabError("wrong bytes on an open connection")

    @staticmethod
    def _each(connections: list[socket.socket], event: int, action: Action, timeout: float) -> None:
        end = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for connection in connections:
                selector.register(connection, event, connection)
            while selector.get_map():
                if time.monotonic() > end:
                    raise LabError(f"{len(selector.get_map())} of {len(connections)} connections made no progress")
                for key, _ in selector.select(0.5):
                    action(key.data)
                    selector.unregister(key.fileobj)
