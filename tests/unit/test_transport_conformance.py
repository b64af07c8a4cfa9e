# SPDX-License-Identifier: GPL-2.0-or-later
"""What every transport must do, the same for all: replicator/transport/interface.py says it, this holds them to it."""

import asyncio
import hashlib
import itertools
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from replicator.transport.interface import (
    PEER_TIMEOUT_S,
    CannotListen,
    Connection,
    Dialer,
    LinkLost,
    Listener,
    PeerUnreachable,
)
from tests.unit import transports
from tests.unit.transports import COMES_S, MIB, PATIENCE, Kind, Turns, within

SIZES = (1, 15, 16, 17, 4095, 4096, 4097, 65535, 65536, 65537, MIB - 1, MIB, MIB + 16)
NOTICED_S = PEER_TIMEOUT_S + 0.5
PATIENT_S = NOTICED_S * PATIENCE

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(params=transports.names())
def kind(request: pytest.FixtureRequest) -> Kind:
    return transports.make(request.param)


@pytest.fixture(params=transports.names(but=transports.in_one_process))
def far_kind(request: pytest.FixtureRequest) -> Kind:
    """Those whose peer may be another process."""
    return transports.make(request.param)


@pytest.fixture(params=transports.names(but=lambda name: name in ("tcp", "tls")))
def careful(request: pytest.FixtureRequest) -> Kind:
    """Those that set a connection up by bytes of their own. Over tcp none are; TLS has tests of its own."""
    return transports.make(request.param)


@pytest.fixture(params=transports.names(but=lambda name: not transports.is_secured(name)))
def secured(request: pytest.FixtureRequest) -> Kind:
    """Those that know who they talk to."""
    return transports.make(request.param)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    made = Path("/tmp") / f"dpvs-probe-link.{os.getpid()}.{tmp_path.name[-12:]}"  # the path of a socket must be short
    made.mkdir()
    yield made
    for left in made.iterdir():
        left.unlink()
    made.rmdir()


Body = Callable[[Connection, Connection], Awaitable[None]]


def between(kind: Kind, directory: Path, body: Body) -> None:
    """Run ``body`` with both ends of a connection."""

    async def all_of_it() -> None:
        async with listening(kind, directory) as listener:
            near, far = await connect(kind, listener)
            try:
                async with asyncio.timeout(COMES_S):
                    await body(near, far)
            finally:
                await asyncio.gather(near.close(), far.close())

    asyncio.run(all_of_it())


@asynccontextmanager
async def listening(kind: Kind, directory: Path) -> AsyncIterator[Listener]:
    listener = kind.listener(kind.first(directory))
    await listener.start()
    try:
        yield listener
    finally:
        await listener.close()


async def connect(kind: Kind, listener: Listener) -> tuple[Connection, Connection]:
    """Both ends of a connection; the door opens with the first ``accept``, perhaps after the first attempt."""
    return await asyncio.gather(transports.dial(kind.dialer(listener.address)), listener.accept())


async def read(connection: Connection, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = await connection.receive()
        assert piece, f"ended after {len(data)} of {count} bytes"
        data += piece
    return bytes(data)


async def read_to_end(connection: Connection) -> bytes:
    pieces = []
    while piece := await connection.receive():
        pieces.append(piece)
    return b"".join(pieces)


def frames_of(seed: int, total: int) -> list[bytes]:
    """Frames of all SIZES, in random order, as often as fits in ``total``."""
    draw = random.Random(seed)
    noise = draw.randbytes(2 * MIB)
    sizes: list[int] = []
    for size in itertools.cycle(draw.sample(SIZES, len(SIZES))):
        if sum(sizes) + size > total and len(sizes) >= len(SIZES):
            break
        sizes.append(size)
    starts = [draw.randrange(MIB) for _ in sizes]
    return [noise[start : start + size] for start, size in zip(starts, sizes, strict=True)]


async def send_in_groups(connection: Connection, frames: list[bytes], seed: int) -> None:
    draw = random.Random(seed)
    at = 0
    while at < len(frames):
        group = frames[at : at + draw.randrange(1, 5)]
        await connection.send(itertools.chain(group, [b""]))
        at += len(group)


def test_bytes_arrive_as_they_were_sent(kind: Kind, directory: Path) -> None:
    frames = frames_of(1, kind.bulk_bytes)
    whole = hashlib.sha256(b"".join(frames)).digest()
    total = sum(map(len, frames))

    async def body(near: Connection, far: Connection) -> None:
        sending = asyncio.create_task(send_in_groups(near, frames, 2))
        assert hashlib.sha256(await read(far, total)).digest() == whole
        await sending
        assert (near.bytes_sent, far.bytes_received) == (total, total)
        assert (far.bytes_sent, near.bytes_received) == (0, 0)
        assert near.remote
        assert far.remote

    between(kind, directory, body)


def test_both_directions_at_once(kind: Kind, directory: Path) -> None:
    there, back = frames_of(3, kind.bulk_bytes // 2), frames_of(4, kind.bulk_bytes // 2)

    async def body(near: Connection, far: Connection) -> None:
        _, _, at_far, at_near = await asyncio.gather(
            send_in_groups(near, there, 5),
            send_in_groups(far, back, 6),
            read(far, sum(map(len, there))),
            read(near, sum(map(len, back))),
        )
        assert at_far == b"".join(there)
        assert at_near == b"".join(back)

    between(kind, directory, body)


def test_a_question_and_its_answer(kind: Kind, directory: Path) -> None:
    async def body(near: Connection, far: Connection) -> None:
        for number in range(200):
            await near.send([b"%3d" % number])
            assert await read(far, 3) == b"%3d" % number
            await far.send([b"ok"])
            assert await read(near, 2) == b"ok"

    between(kind, directory, body)


def test_many_small_frames_without_waiting(kind: Kind, directory: Path) -> None:
    async def body(near: Connection, far: Connection) -> None:
        async def send() -> None:
            for number in range(2000):
                await near.send([b"%7d\n" % number])

        _, data = await asyncio.gather(send(), read(far, 2000 * 8))
        assert [int(line) for line in data.split()] == list(range(2000))

    between(kind, directory, body)


def test_a_peer_that_reads_nothing_holds_the_sender(kind: Kind, directory: Path) -> None:
    async def body(near: Connection, far: Connection) -> None:
        frame, count = os.urandom(MIB), kind.held_bytes // MIB + 4
        sent = 0

        async def flood() -> None:
            nonlocal sent
            for _ in range(count):
                await near.send([frame])
                sent += 1

        task = asyncio.create_task(flood())
        await asyncio.sleep(0.5)
        held, way = sent, near.on_the_way()
        assert near.bytes_sent <= kind.held_bytes
        await asyncio.sleep(0.5)
        assert sent == held
        assert way is not None
        later = near.on_the_way()
        assert later is not None
        assert later.open_ns - way.open_ns < 100_000_000  # it is the peer who is slow, not the way
        assert await read(far, count * MIB) == frame * count
        await task

    between(kind, directory, body)


def test_a_slow_peer_is_no_dead_one(far_kind: Kind, directory: Path) -> None:
    async def body() -> None:
        async with listening(far_kind, directory) as listener:
            peer = transports.start(far_kind.name, "trickle", listener.address)
            connection = await listener.accept()
            began, frame = time.monotonic(), bytes(MIB)
            while time.monotonic() - began < PEER_TIMEOUT_S - 1 and peer.is_alive():
                await connection.send([frame])
            assert peer.is_alive()
            kill(peer)
            await connection.close()

    asyncio.run(body())


def test_a_peer_that_takes_nothing_for_long_is_lost(kind: Kind, directory: Path) -> None:
    async def body(near: Connection, far: Connection) -> None:
        frame, turns, whole = bytes(MIB), Turns(), Turns()
        with pytest.raises(LinkLost):
            while True:
                since = time.monotonic()
                await near.send([frame])
                turns.seconds()
        assert time.monotonic() - since > 1
        assert turns.seconds() < NOTICED_S + 1
        assert whole.seconds() < (NOTICED_S + 3) * PATIENCE
        assert far

    between(kind, directory, body)


def test_an_orderly_end_comes_after_the_last_byte(kind: Kind, directory: Path) -> None:
    last = os.urandom(300_000)

    async def body(near: Connection, far: Connection) -> None:
        await near.send([last])
        await near.close()
        await near.close()
        assert await read_to_end(far) == last
        assert await far.receive() == b""
        assert await ended(near)
        with pytest.raises(LinkLost, match=r"link with .* lost"):
            await near.send([b"x"])
        await lost_within(far)

    between(kind, directory, body)


async def ended(connection: Connection) -> bool:
    """A connection that we closed gives nothing more, whichever way it says so."""
    try:
        return await connection.receive() == b""
    except LinkLost:
        return True


async def lost_within(connection: Connection, seconds: float = PATIENT_S) -> None:
    """Sending fails soon."""
    async with within(seconds):
        with pytest.raises(LinkLost):
            while True:
                await connection.send([b"x"])
                await asyncio.sleep(0.01)


def test_close_does_not_wait_for_a_peer_that_takes_nothing(kind: Kind, directory: Path) -> None:
    async def body(near: Connection, far: Connection) -> None:
        task = asyncio.create_task(near.send([bytes(kind.held_bytes + MIB)]))
        await asyncio.sleep(0.1)
        async with within(2 * PATIENCE):
            await near.close()
        async with within(PATIENCE):
            await asyncio.wait({task})
        assert task.done()
        assert task.exception() is None or isinstance(task.exception(), LinkLost)
        assert far

    between(kind, directory, body)


def test_close_wakes_who_waits_for_bytes(kind: Kind, directory: Path) -> None:
    async def body(near: Connection, far: Connection) -> None:
        waiting = [asyncio.create_task(ended(near)), asyncio.create_task(far.receive())]
        await asyncio.sleep(0.05)
        await near.close()
        async with within(PATIENT_S):
            assert await waiting[1] == b""
            assert await asyncio.wait(waiting[:1])

    between(kind, directory, body)


def test_a_cancelled_send_leaves_no_hole(kind: Kind, directory: Path) -> None:
    first, second = os.urandom(kind.held_bytes + MIB), b"and the next"

    async def body(near: Connection, far: Connection) -> None:
        task = asyncio.create_task(near.send([first]))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        sending = asyncio.create_task(near.send([second]))
        assert await read(far, len(first) + len(second)) == first + second
        await sending

    between(kind, directory, body)


def test_a_cancelled_receive_loses_nothing(kind: Kind, directory: Path) -> None:
    async def body(near: Connection, far: Connection) -> None:
        data = bytearray()
        for number in range(100):
            task = asyncio.create_task(far.receive())
            await asyncio.sleep(0)
            await near.send([b"%3d" % number])
            for _ in range(number % 4):
                await asyncio.sleep(0)
            task.cancel()
            try:
                data += await task
            except asyncio.CancelledError:
                pass
        data += await read(far, 300 - len(data)) if len(data) < 300 else b""
        assert data == b"".join(b"%3d" % number for number in range(100))

    between(kind, directory, body)


def test_a_quick_peer_does_not_get_the_loop_for_itself(far_kind: Kind, directory: Path) -> None:
    async def body() -> None:
        async with listening(far_kind, directory) as listener:
            peer = transports.start(far_kind.name, "flood", listener.address)
            connection = await listener.accept()
            turns, until = 0, time.process_time() + 0.5  # other() keeps the processor

            async def other() -> None:
                nonlocal turns
                while True:
                    await asyncio.sleep(0)
                    turns += 1

            beside = asyncio.create_task(other())
            while time.process_time() < until:
                assert await connection.receive()
            assert turns > 20
            beside.cancel()
            kill(peer)
            await connection.close()

    asyncio.run(body())


def kill(peer: transports.Peer) -> None:
    assert peer.pid is not None
    os.kill(peer.pid, signal.SIGKILL)
    peer.join()


async def noticed(connection: Connection, behaviour: str) -> float:
    """Seconds until the connection says that its peer is gone."""
    turns = Turns()
    try:
        async with asyncio.timeout(COMES_S):
            while True:
                if behaviour == "drink":
                    await connection.send([bytes(64 << 10)])
                    await asyncio.sleep(0)  # send need not, while there is room
                elif not await connection.receive():
                    break
    except LinkLost:
        pass
    return turns.seconds()


@pytest.mark.parametrize("behaviour", ["idle", "flood", "drink"])
def test_a_killed_peer_is_noticed_and_can_come_back(far_kind: Kind, directory: Path, behaviour: str) -> None:
    async def body() -> None:
        async with listening(far_kind, directory) as listener:
            peer = transports.start(far_kind.name, behaviour, listener.address)
            connection = await listener.accept()
            assert (await connection.receive()).startswith(behaviour.encode())
            if behaviour == "drink":
                for _ in range(8):
                    await connection.send([bytes(64 << 10)])
            kill(peer)
            assert await noticed(connection, behaviour) < NOTICED_S
            await lost_within(connection)
            await connection.close()

            again = transports.start(far_kind.name, "leave", listener.address)
            connection = await listener.accept()
            assert await read_to_end(connection) == b"leave"
            await connection.close()
            again.join()

    asyncio.run(body())


def must_be_told(error: PeerUnreachable) -> None:
    """What is wrong in one line, and what to do."""
    assert "\n" not in str(error)
    assert error.help_text


def test_a_peer_that_dies_at_any_step_of_the_set_up(far_kind: Kind, directory: Path) -> None:
    """Whichever turn of its event loop is its last: the listener drops what it began, and serves who comes next."""
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def serve(listener: Listener) -> None:
        while True:
            connection = await listener.accept()
            async with within(PATIENT_S):
                with suppress(LinkLost):
                    heard.put_nowait(await read_to_end(connection))
            await connection.close()

    async def body() -> None:
        async with listening(far_kind, directory) as listener:
            serving = asyncio.create_task(serve(listener))
            for steps in itertools.count(0, far_kind.stride):
                peer = transports.start(far_kind.name, "leave", listener.address, steps)
                await asyncio.to_thread(peer.join)
                if peer.exitcode == 0:
                    break
                assert peer.exitcode == -signal.SIGKILL
            assert steps >= 2 * far_kind.stride
            transports.start(far_kind.name, "leave", listener.address)
            async with asyncio.timeout(COMES_S):
                while heard.empty() or await heard.get() != b"leave":
                    if serving.done():
                        await serving  # it ends by an error only
                    await asyncio.sleep(0.01)
            serving.cancel()

    asyncio.run(body())


def test_a_listener_that_dies_at_any_step_of_the_set_up(far_kind: Kind, directory: Path) -> None:
    """Whichever turn of its event loop is its last: the dialer is told so, in time."""

    async def attempt(address: str) -> bytes:
        try:
            connection = await far_kind.dialer(address).dial()
        except PeerUnreachable as error:
            must_be_told(error)
            return b""
        try:
            return await read_to_end(connection)
        except LinkLost:
            return b""
        finally:
            await connection.close()

    async def body() -> None:
        for steps in itertools.count(0, far_kind.stride):
            peer, address = transports.start_listener(far_kind.name, directory, steps)
            said, turns = b"", Turns()
            while peer.is_alive() and not said:
                said = await attempt(address)
            assert turns.seconds() < NOTICED_S
            peer.kill()
            peer.join()
            if said:
                assert said == b"hello"
                break
        assert steps >= 2 * far_kind.stride

    asyncio.run(body())


def test_a_peer_with_keys_of_another_cluster_stays_outside(secured: Kind, directory: Path) -> None:
    """Though it has the name of a peer, and its authority that of ours. Nor does it take us for a peer."""

    async def body() -> None:
        async with listening(secured, directory) as listener:
            accepting = asyncio.create_task(listener.accept())
            await asyncio.sleep(0.01)
            stranger = transports.make(secured.name, transports.STRANGER)
            with pytest.raises(PeerUnreachable, match="authority") as caught:
                await stranger.dialer(listener.address).dial()
            must_be_told(caught.value)
            near, far = await transports.dial(secured.dialer(listener.address)), await accepting
            assert (near.node, far.node) == ("listener", "dialer")
            await asyncio.gather(near.close(), far.close())

    asyncio.run(body())


def test_a_peer_without_keys_stays_outside(secured: Kind, directory: Path) -> None:
    bare = transports.make({"tls": "tcp"}.get(secured.name, secured.name.removesuffix("+tls")))

    async def knock(address: str) -> None:
        try:
            connection = await bare.dialer(address).dial()
        except PeerUnreachable as error:
            must_be_told(error)
            return
        with pytest.raises((LinkLost, EOFError)):  # over TCP it takes the other side's silence, or its TLS, for a peer
            while True:
                await connection.send([b"x" * 1000])
                await asyncio.sleep(0.05)
        await connection.close()

    async def body() -> None:
        async with listening(secured, directory) as listener:
            accepting = asyncio.create_task(listener.accept())
            await asyncio.sleep(0.01)
            async with within(2 * PATIENT_S):
                await knock(listener.address)
            assert not accepting.done()
            near, far = await transports.dial(secured.dialer(listener.address)), await accepting
            await asyncio.gather(near.close(), far.close())
        async with listening(bare, directory) as listener:
            accepting = asyncio.create_task(listener.accept())
            await asyncio.sleep(0.01)
            with pytest.raises(PeerUnreachable):
                await secured.dialer(listener.address).dial()
            accepting.cancel()

    asyncio.run(body())


def test_nobody_there(kind: Kind, directory: Path) -> None:
    dialer = kind.dialer(kind.nobody(directory))
    with pytest.raises(PeerUnreachable, match="cannot reach peer ") as caught:
        asyncio.run(_dial(dialer))
    assert dialer.address in str(caught.value)
    assert "attach --listen" in caught.value.help_text


async def _dial(dialer: Dialer) -> None:
    await dialer.dial()


def test_an_address_is_listened_on_once(kind: Kind, directory: Path) -> None:
    async def body() -> None:
        async with listening(kind, directory) as first:
            with pytest.raises(CannotListen, match="cannot listen on ") as caught:
                await kind.listener(first.address).start()
            assert caught.value.help_text
            near, far = await connect(kind, first)
        second = kind.listener(first.address)
        await second.start()
        await near.send([b"lives on"])
        assert await read(far, 8) == b"lives on"
        await near.close()
        await far.close()
        await second.close()

    asyncio.run(body())


def test_several_peers(kind: Kind, directory: Path) -> None:
    async def body() -> None:
        async with listening(kind, directory) as listener:
            first = asyncio.create_task(listener.accept())
            dialled = await asyncio.gather(*(transports.dial(kind.dialer(listener.address)) for _ in range(3)))
            for number, connection in enumerate(dialled):
                await connection.send([b"%d" % number])
            accepted = [await first, *[await listener.accept() for _ in dialled[1:]]]
            assert sorted([await read(connection, 1) for connection in accepted]) == [b"%d" % n for n in range(3)]
            await asyncio.gather(*(connection.close() for connection in (*dialled, *accepted)))

    asyncio.run(body())


def _raw(address: str) -> socket.socket:
    """A connection to where a listener listens, without the transport's set-up."""
    if address.startswith("shm:"):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address.removeprefix("shm:"))
    else:
        host, port = address.rsplit(":", 1)
        sock = socket.create_connection((host, int(port)))
    sock.settimeout(COMES_S)
    return sock


@pytest.mark.parametrize(
    ("garbage", "stays"),
    [(b"", True), (b"D", True), (b"GET / HTTP/1.1\r\n\r\n", False), (b"\xff" * 4096, True), (bytes(256 << 10), False)],
    ids=["nothing", "a byte", "text", "ones", "much"],
)
def test_strangers_do_not_keep_peers_out(careful: Kind, directory: Path, garbage: bytes, stays: bool) -> None:
    async def body() -> None:
        async with listening(careful, directory) as listener:
            accepting = asyncio.create_task(listener.accept())
            await asyncio.sleep(0.01)
            stranger = await asyncio.to_thread(_raw, listener.address)
            try:
                await asyncio.to_thread(stranger.sendall, garbage)
            except OSError:  # thrown out in the middle of it
                pass
            if not stays:
                stranger.close()
            async with within(PATIENT_S):
                near, far = await careful.dialer(listener.address).dial(), await accepting
            await near.send([b"hello"])
            assert await read(far, 5) == b"hello"
            if stays:
                async with within(PATIENT_S):
                    assert await asyncio.to_thread(_thrown_out, stranger)
            stranger.close()
            await near.close()
            await far.close()

    asyncio.run(body())


def _thrown_out(sock: socket.socket) -> bool:
    try:
        while sock.recv(4096):
            pass
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize("answer", [b"", b"\0", bytes(4096), b"\xff" * 4096], ids=["none", "a byte", "zeros", "ones"])
def test_who_answers_nonsense_is_no_peer(careful: Kind, directory: Path, answer: bytes) -> None:
    async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await reader.read(1)
        await asyncio.sleep(PATIENT_S)
        writer.close()

    async def body() -> None:
        if careful.name.startswith("shm"):
            address = f"shm:{directory}/stranger"
            server = await asyncio.start_unix_server(stranger, directory / "stranger")
        else:
            server = await asyncio.start_server(stranger, "127.0.0.1", 0)
            address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with within(PATIENT_S + 1):
            with pytest.raises(PeerUnreachable, match=r"cannot reach peer|no trust between us"):
                await careful.dialer(address).dial()
        server.close()

    asyncio.run(body())


def test_a_peer_killed_while_it_connects(far_kind: Kind, directory: Path) -> None:
    """Its half connection is dropped, and the next peer is served."""

    async def body() -> None:
        async with listening(far_kind, directory) as listener:
            for delay in (0.0, 0.005, 0.02, 0.05):
                peer = transports.start(far_kind.name, "idle", listener.address)
                await asyncio.sleep(delay)
                kill(peer)
            peer = transports.start(far_kind.name, "leave", listener.address)
            while True:
                async with within(PATIENT_S + 5):
                    connection = await listener.accept()
                    try:
                        if await read_to_end(connection) == b"leave":
                            break
                    except LinkLost:
                        pass
                    finally:
                        await connection.close()
            peer.join()

    asyncio.run(body())
