# SPDX-License-Identifier: GPL-2.0-or-later
import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from replicator.transport.address import Address, UnknownHost
from replicator.transport.interface import Backoff, CannotListen, Connection, LinkLost, PeerUnreachable
from replicator.transport.tcp import BUFFER_BYTES, TcpConnection, TcpDialer, TcpListener
from tests.unit.transports import Turns


async def pair() -> tuple[TcpConnection, TcpConnection, TcpListener]:
    listener = TcpListener(Address("127.0.0.1", 0))
    await listener.start()
    host, port = listener.address.rsplit(":", 1)
    near = await TcpDialer(Address(host, int(port))).dial()
    return near, await listener.accept(), listener


def run(body: Callable[[TcpConnection, TcpConnection], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        near, far, listener = await pair()
        try:
            async with asyncio.timeout(20):
                await body(near, far)
        finally:
            await near.close()
            await far.close()
            await listener.close()

    asyncio.run(all_of_it())


async def read_all(connection: Connection, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        data += await connection.receive()
    return bytes(data)


def test_both_ways_and_counted() -> None:
    async def body(near: TcpConnection, far: TcpConnection) -> None:
        await near.send([b"one", b"", b"two"])
        await far.send([b"three"])
        assert await read_all(far, 6) == b"onetwo"
        assert await read_all(near, 5) == b"three"
        assert (near.bytes_sent, near.bytes_received, far.bytes_received) == (6, 5, 6)
        assert near.remote.startswith("127.0.0.1:")
        sock = near._writer.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 3000

    run(body)


def test_send_waits_while_the_peer_reads_nothing() -> None:
    async def body(near: TcpConnection, far: TcpConnection) -> None:
        frame = bytes(BUFFER_BYTES)
        sent = 0

        async def flood() -> None:
            nonlocal sent
            for _ in range(64):
                await near.send([frame])
                sent += 1

        task = asyncio.create_task(flood())
        await asyncio.sleep(0.3)
        held = sent
        assert held < 40
        assert near._writer.transport.get_write_buffer_size() <= 2 * BUFFER_BYTES
        assert len(await read_all(far, 64 * BUFFER_BYTES)) == 64 * BUFFER_BYTES
        await task

    run(body)


def test_orderly_end_is_empty() -> None:
    async def body(near: TcpConnection, far: TcpConnection) -> None:
        await near.send([b"last"])
        await near.close()
        await near.close()
        assert await read_all(far, 4) == b"last"
        assert await far.receive() == b""

    run(body)


def test_reset_is_link_lost() -> None:
    async def body(near: TcpConnection, far: TcpConnection) -> None:
        far._writer.transport.abort()
        with pytest.raises(LinkLost, match=r"link with 127\.0\.0\.1:\d+ lost"):
            while await near.receive():
                pass
            while True:  # an abort with nothing unread is an orderly end to the reader; the writer learns
                await near.send([b"x"])
                await asyncio.sleep(0.01)

    run(body)


def test_close_does_not_wait_for_a_peer_that_takes_nothing() -> None:
    async def body(near: TcpConnection, far: TcpConnection) -> None:
        near._writer.write(bytes(64 << 20))
        turns = Turns()
        await near.close()
        assert turns.seconds() < 2

    run(body)


def test_nobody_listens() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        says = rf"cannot reach peer 127\.0\.0\.1:{port}: connection refused"
        with pytest.raises(PeerUnreachable, match=says) as caught:
            asyncio.run(_dial(TcpDialer(Address("127.0.0.1", port))))
    assert "attach --listen" in caught.value.help_text


async def _dial(dialer: TcpDialer) -> None:
    await dialer.dial()


def test_a_silent_peer_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        address = Address("127.0.0.1", silent.getsockname()[1])

        async def fill() -> None:  # the backlog, so that the next attempt gets no answer
            socks = [socket.socket() for _ in range(4)]
            for sock in socks:
                sock.setblocking(False)
                sock.connect_ex(tuple(address))
            with pytest.raises(PeerUnreachable, match="no answer"):
                await TcpDialer(address, timeout_s=0.3).dial()
            for sock in socks:
                sock.close()

        asyncio.run(fill())


def test_unknown_name() -> None:
    with pytest.raises(PeerUnreachable, match=r"cannot reach peer no-such-host\.invalid:7: "):
        asyncio.run(_dial(TcpDialer(Address("no-such-host.invalid", 7))))


def test_busy_port_and_foreign_address() -> None:
    async def body() -> None:
        first = TcpListener(Address("127.0.0.1", 0))
        await first.start()
        port = int(first.address.rsplit(":", 1)[1])
        with pytest.raises(CannotListen, match=rf"cannot listen on 127\.0\.0\.1:{port}: the port is in use") as caught:
            await TcpListener(Address("127.0.0.1", port)).start()
        assert f"sport = :{port}" in caught.value.help_text
        with pytest.raises(CannotListen, match="this machine does not have that address"):
            await TcpListener(Address("192.0.2.1", port)).start()
        with pytest.raises(UnknownHost):
            await TcpListener(Address("no-such-host.invalid", port)).start()
        await first.close()
        again = TcpListener(Address("*", port))
        await again.start()
        await again.close()

    asyncio.run(body())


def test_backoff_doubles_to_its_limit_with_jitter() -> None:
    low, high = Backoff(draw=lambda: 0.0), Backoff(draw=lambda: 1.0)
    assert [low.wait_s() for _ in range(7)] == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    assert [high.wait_s() for _ in range(6)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0])
    high.reset()
    assert high.wait_s() == pytest.approx(0.1)
