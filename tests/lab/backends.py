# SPDX-License-Identifier: GPL-2.0-or-later
"""The real servers: HTTP on port 80, TCP echo on port 7, UDP echo on port 53, on each address given. The datagram
``WHO`` is answered with whom the server sees, and where.

usage: python -m tests.lab.backends ADDRESS...

Prints "ready" once everything listens. Runs in the server's namespace until it is ended.
"""

import asyncio
import resource
import sys
from typing import cast

PAGE = b"hello from the real server\n"
RESPONSE = b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s" % (len(PAGE), PAGE)
BACKLOG = 4096
WHO = b"who am I to you?"


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while (line := await reader.readline()) not in (b"\r\n", b"\n", b""):
            del line
        writer.write(RESPONSE)
        await writer.drain()
    except (OSError, ValueError):
        pass
    finally:
        writer.close()


class UdpEcho(asyncio.DatagramProtocol):
    transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if data == WHO:
            ours = self.transport.get_extra_info("sockname")
            data = f"{addr[0]} {addr[1]} at {ours[0]} {ours[1]}".encode()
        self.transport.sendto(data, addr)


async def serve(addresses: list[str]) -> None:
    loop = asyncio.get_running_loop()
    await asyncio.start_server(echo, ["0.0.0.0", "::"], 7, backlog=BACKLOG)
    await asyncio.start_server(http, ["0.0.0.0", "::"], 80, backlog=BACKLOG)
    for address in addresses:  # one socket each, so that an answer leaves from the address that was asked
        await loop.create_datagram_endpoint(UdpEcho, local_addr=(address, 53))
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(serve(sys.argv[1:]))
