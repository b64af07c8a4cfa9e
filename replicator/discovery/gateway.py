# SPDX-License-Identifier: GPL-2.0-or-later
"""etcd's JSON gateway (etcd 3.4 and later, /v3): requests as they are needed here, over HTTP/1.1 in asyncio.

Rules: one connection a request, closed after it. Every answer has an end in bytes and in time, but for a watch, which
has one line at a time. What comes is bounded before it is kept. Numbers of 64 bits are strings there, bytes are base64.
"""

import asyncio
import base64
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from replicator.transport.address import Address, reason

from .source import SourceFailed

ANSWER_S = 3.0
MAX_BYTES = 1 << 20
MAX_SAID = 200


class Answered(SourceFailed):
    """etcd said no."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"etcd answers {status}: {said}")
        self.status = status


class Way(NamedTuple):
    """How to get there."""

    context: ssl.SSLContext | None = None  # None: not encrypted
    token: str | None = None  # of who logged in


PLAIN = Way()


def encoded(text: str) -> str:
    """A key or a value, as the gateway wants it."""
    return base64.b64encode(text.encode()).decode()


def decoded(text: str) -> str:
    """The text of a key or a value; raises SourceFailed."""
    try:
        return base64.b64decode(text, validate=True).decode()
    except ValueError as error:
        raise SourceFailed(f"etcd has what is no text: {error}") from error


def after(prefix: str) -> str:
    """The end of the range of keys that begin with ``prefix``, which ends in an ASCII character."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


async def call(endpoint: Address, path: str, body: dict[str, Any], way: Way = PLAIN) -> dict[str, Any]:
    """One request, one answer. Raises SourceFailed."""
    try:
        async with asyncio.timeout(ANSWER_S), _request(endpoint, path, body, way) as lines:
            async for line in lines:
                return line
    except TimeoutError:
        raise SourceFailed(f"etcd at {endpoint}: no answer") from None
    raise SourceFailed(f"etcd at {endpoint}: an empty answer")


@asynccontextmanager
async def watch(
    endpoint: Address, path: str, body: dict[str, Any], way: Way = PLAIN
) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """An answer that goes on, object by object. Raises SourceFailed."""
    async with _request(endpoint, path, body, way) as lines:
        yield lines


@asynccontextmanager
async def _request(
    endpoint: Address, path: str, body: dict[str, Any], way: Way
) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection(
                endpoint.host, endpoint.port, limit=MAX_BYTES, ssl=way.context
            )
    except ssl.SSLError as error:
        why = getattr(error, "verify_message", "") or error.reason or str(error)
        raise SourceFailed(f"etcd at {endpoint}: no TLS with it: {why}") from error
    except (OSError, TimeoutError, UnicodeError) as error:
        raise SourceFailed(f"etcd at {endpoint}: {reason(error)}") from error
    try:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {endpoint}\r\nContent-Type: application/json\r\n"
        if way.token is not None:
            head += f"Authorization: {way.token}\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        async with asyncio.timeout(ANSWER_S):
            await writer.drain()
            status, headers = await _head(reader)
        chunks = _chunked(reader) if headers.get("transfer-encoding") == "chunked" else _sized(reader, headers)
        yield _objects(status, chunks)
    except asyncio.IncompleteReadError as error:
        raise SourceFailed(f"etcd at {endpoint}: its answer breaks off") from error
    except (OSError, TimeoutError, asyncio.LimitOverrunError, ValueError) as error:
        raise SourceFailed(f"etcd at {endpoint}: {reason(error)}") from error
    finally:
        writer.transport.abort()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.strip().split("\r\n")
    fields = dict(line.lower().replace(" ", "").split(":", 1) for line in lines if ":" in line)
    return int(first.split(" ")[1]) if first.startswith("HTTP/1.") and " " in first else 0, fields


async def _sized(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    size = int(headers.get("content-length", "0"))
    if not 0 <= size <= MAX_BYTES:
        raise ValueError(f"an answer of {size} bytes")
    yield await reader.readexactly(size) + b"\n"


async def _chunked(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
        if not 0 <= size <= MAX_BYTES:
            raise ValueError(f"a piece of {size} bytes")
        chunk = await reader.readexactly(size + 2)
        if size == 0:
            return
        yield chunk[:-2]


async def _objects(status: int, chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """One object a line, however the lines were cut. Raises Answered for what is an error."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > MAX_BYTES:
            raise ValueError("a line without an end")
        for line in filter(None, lines):
            try:
                said = json.loads(line)
            except ValueError:
                if status == 200:
                    raise
                words = line[:MAX_SAID].decode(errors="replace")  # some refusals are plain text
                raise Answered(status, "".join(c if c.isprintable() else " " for c in words)) from None
            if not isinstance(said, dict):
                raise ValueError("an answer that is no object")
            error = said.get("error")
            if status != 200 or error:
                text = error.get("message", error) if isinstance(error, dict) else error
                raise Answered(status, str(text))
            yield said
    if rest.strip():
        raise ValueError("its answer breaks off")
