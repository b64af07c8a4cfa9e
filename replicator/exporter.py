# SPDX-License-Identifier: GPL-2.0-or-later
"""The HTTP endpoint that Prometheus scrapes: ``/metrics``, and ``/ready`` for who asks whether traffic may come.

Rules: in the node's own loop, a few sockets at a time, each answered in short steps and closed. It can be read by
whoever reaches the port and changes nothing; a request is one line and headers, bounded in size and time. It is there
from the start of the process to its end, with and without a DPVS.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator

from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric

from replicator import metrics
from replicator.node import Node
from replicator.transport.address import Address, metrics_address, reason
from replicator.transport.interface import CannotListen

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_CLIENTS = 8
REQUEST_BYTES = 16 << 10
REQUEST_S = 5.0
SEND_S = 10.0
STEP_S = 0.0005  # of processor time, before the loop does something else

log = logging.getLogger(__name__)


class _One:
    """A registry of one metric, for ``generate_latest``."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> list[Metric]:
        return [self._metric]


class Exporter:
    """``node`` and ``attaches`` are set by who attaches."""

    def __init__(self, where: str) -> None:
        """``where``: ``ADDRESS:PORT``. Raises BadAddress."""
        self._where = metrics_address(where)
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self.node: Node | None = None
        self.attaches = 0
        self.scrapes = 0
        self.longest_step_ns = 0

    async def start(self) -> None:
        """Listen. Raises CannotListen."""
        host = None if self._where.host == "*" else self._where.host
        try:
            self._server = await asyncio.start_server(self._arrived, host, self._where.port, limit=REQUEST_BYTES)
        except OSError as error:
            raise CannotListen(
                f"cannot show metrics on {self._where}: {reason(error)}", help_text="Give another --metrics."
            ) from error
        log.info("metrics for Prometheus on http://%s/metrics", self.address)

    @property
    def address(self) -> Address:
        """Where it listens."""
        assert self._server is not None
        return Address(self._where.host, self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Listen no more, drop who is being answered."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    def _arrived(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._clients) >= MAX_CLIENTS:
            writer.close()
            return
        task = asyncio.create_task(self._serve(reader, writer))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_S):
                head = await reader.readuntil(b"\r\n\r\n")
            async with asyncio.timeout(SEND_S):
                status, body = await self._answer(head)
                start = f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n"
                only_head = head.startswith(b"HEAD ")
                writer.write(start.encode() + b"Connection: close\r\n\r\n" + (b"" if only_head else body))
                await writer.drain()
        except (OSError, EOFError, asyncio.LimitOverrunError) as error:  # TimeoutError is an OSError
            log.debug("a scrape came to nothing: %s", error)
        except Exception:
            log.exception("a scrape failed")
        finally:
            writer.close()

    async def _answer(self, head: bytes) -> tuple[str, bytes]:
        words = head.split(b"\r\n", 1)[0].split()
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return "400 Bad Request", b"this is not HTTP/1\n"
        if words[0] not in (b"GET", b"HEAD"):
            return "405 Method Not Allowed", b"GET only\n"
        path = words[1].split(b"?", 1)[0]
        if path == b"/metrics":
            async with self._turn:
                return "200 OK", await self.text()
        if path == b"/ready":
            ready = self.node is not None and self.node.readiness.ready
            why = self.node.readiness.why if self.node is not None else "waiting for a DPVS"
            return ("200 OK", b"ready\n") if ready else ("503 Service Unavailable", f"not ready: {why}\n".encode())
        return "404 Not Found", b"there are /metrics and /ready\n"

    async def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        self.scrapes += 1
        pieces: list[bytes] = []
        began = time.thread_time_ns()
        async for metric in self._metrics():
            if metric is not None:
                pieces.append(generate_latest(_One(metric)))
            now = time.thread_time_ns()
            if now - began >= STEP_S * 1e9:
                self.longest_step_ns = max(self.longest_step_ns, now - began)
                await asyncio.sleep(0)
                began = time.thread_time_ns()
        return b"".join(pieces)

    def _metrics(self) -> AsyncIterator[Metric | None]:
        return metrics.collect(self.node, self.attaches)
