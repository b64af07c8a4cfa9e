# SPDX-License-Identifier: GPL-2.0-or-later
"""The admin socket of a running attach, the side that answers; ``admin`` has the protocol.

Rules: Unix stream socket, mode 0600; who connects must be root or the user that we run as (SO_PEERCRED). Long answers
come in blocks, and between blocks the loop does its other work.
"""

import asyncio
import json
import logging
import os
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

from probes.errors import DpvsProbeError
from replicator.admin import Line

Answer = AsyncGenerator[list[Line], None]  # blocks of lines
Handler = Callable[[Mapping[str, Any]], Answer]

REQUEST_BYTES = 64 << 10
REQUEST_S = 5.0
ANSWER_S = 30.0  # a client that takes nothing for so long is dropped
MAX_CLIENTS = 16

log = logging.getLogger(__name__)


class BadRequest(DpvsProbeError):
    """A request that is not one."""

    help_text = (
        "The commands are status, sessions, peers, config, orphans, top, watch, promote, demote, snapshot, records,"
        " drill and detach."
    )


class AdminServer:
    """Answers on a Unix socket by means of ``handler``, an asynchronous generator of blocks of lines."""

    def __init__(self, path: Path, handler: Handler) -> None:
        self._path, self._handler = path, handler
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. The caller holds the lock that goes with the path, so what is there is a leftover."""
        self._path.unlink(missing_ok=True)
        before = os.umask(0o177)  # the socket is born 0600; nothing else of ours runs between these two lines
        try:
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listening.bind(os.fspath(self._path))
        finally:
            os.umask(before)
        self._server = await asyncio.start_unix_server(self._arrived, sock=listening, limit=REQUEST_BYTES)

    async def close(self, wait_s: float = 1.0) -> None:
        """Listen no more, give answers under way a moment to end, remove the socket."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        self._path.unlink(missing_ok=True)
        if self._clients:
            await asyncio.wait(self._clients, timeout=wait_s)
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    def _arrived(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        uid = _peer_uid(writer.get_extra_info("socket"))
        if uid not in (0, os.geteuid()) or len(self._clients) >= MAX_CLIENTS:
            log.debug("admin connection of uid %s refused", uid)
            writer.close()
            return
        task = asyncio.create_task(self._serve(reader, writer))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            try:
                async with asyncio.timeout(REQUEST_S):
                    text = await reader.readline()
                if not text:
                    return  # somebody only looked whether we live
                async with aclosing(self._handler(_parse(text))) as blocks:  # also where the client goes away
                    async for block in blocks:
                        await _write(writer, block)
                last: Line = {"done": True}
            except DpvsProbeError as error:
                last = {"error": str(error), "help": error.help_text}
            except ValueError:  # readline: longer than the limit
                last = {"error": "the request is too long", "help": BadRequest.help_text}
            await _write(writer, [last])
        except OSError as error:  # the client went away, or took nothing: TimeoutError is one
            log.debug("admin client lost: %s", error)
        except Exception:
            log.exception("an admin request failed")
        finally:
            writer.close()


def _parse(text: bytes) -> Line:
    try:
        request = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest("the request is not JSON") from error
    if not isinstance(request, dict) or not isinstance(request.get("command"), str):
        raise BadRequest("the request names no command")
    return request


async def _write(writer: asyncio.StreamWriter, block: list[Line]) -> None:
    writer.write(b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in block))
    async with asyncio.timeout(ANSWER_S):
        await writer.drain()
    await asyncio.sleep(0)  # drain alone does not yield while there is room


def _peer_uid(sock: socket.socket) -> int:
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(uid)
