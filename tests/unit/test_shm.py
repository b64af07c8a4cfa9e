# SPDX-License-Identifier: GPL-2.0-or-later
"""Shared memory: the ring itself, and what a listener makes of a set-up that is not in order."""

import asyncio
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.transport import shm_setup
from replicator.transport.address import BadAddress
from replicator.transport.interface import CannotListen, LinkLost, Loss, PeerUnreachable
from replicator.transport.ring import CONTROL_BYTES, BrokenRing, Reader, Writer
from replicator.transport.shm import RING_BYTES, Security, ShmConnection, ShmDialer, ShmListener, parse
from tests.unit import transports

OPEN = struct.Struct("<4sHHI4x")
CONTROL = mmap.PAGESIZE


@pytest.fixture
def path() -> Iterator[Path]:
    path = Path(f"/tmp/dpvs-probe-shm.{os.getpid()}")
    yield path
    for left in (path, Path(f"{path}.lock")):
        left.unlink(missing_ok=True)


# --- the ring --------------------------------------------------------------------------------------------------------


def ring(size: int = 64) -> tuple[Writer, Reader, memoryview]:
    control, data = memoryview(bytearray(CONTROL_BYTES)), memoryview(bytearray(size))
    return Writer(control, data), Reader(control, data), control


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 80)), max_size=60))
def test_ring_is_a_queue_of_bytes(steps: list[tuple[bool, int]]) -> None:
    writer, reader, _ = ring()
    written, read = bytearray(), bytearray()
    for writes, wanted in steps:
        if writes:
            count = min(wanted, writer.room())
            piece = bytes((len(written) + i) % 251 for i in range(count))
            writer.write(memoryview(piece))
            assert writer.unseen == count
            writer.publish()
            written += piece
        else:
            count = min(wanted, reader.available())
            assert reader.peek(count) == written[len(read) : len(read) + count]
            read += reader.read(count)
            reader.publish()
        assert writer.room() + reader.available() == 64
        assert reader.at_end() == (len(read) == len(written))
    assert read == written[: len(read)]


def test_ring_wakes_only_who_sleeps() -> None:
    writer, reader, _ = ring()
    writer.write(memoryview(b"one"))
    assert not writer.publish()
    assert reader.read(3) == b"one"
    assert not reader.publish()
    reader.sleep()
    writer.write(memoryview(b"two"))
    assert writer.publish()
    writer.write(memoryview(b"six"))
    assert not writer.publish()
    writer.sleep()
    assert reader.read(6) == b"twosix"
    assert reader.publish()
    assert not reader.publish()
    reader.sleep()
    assert not reader.ended
    assert writer.end()
    assert reader.ended


@pytest.mark.parametrize("word", [0, 8])
@pytest.mark.parametrize("value", [1 << 63, 65, (1 << 64) - 1])
def test_ring_with_positions_that_cannot_be(word: int, value: int) -> None:
    writer, reader, control = ring()
    control.cast("Q")[word] = value
    with pytest.raises(BrokenRing):
        (writer.room if word else reader.available)()


# --- addresses -------------------------------------------------------------------------------------------------------


def test_parse() -> None:
    assert parse("shm:/run/a.shm") == parse("unix:/run/a.shm") == Path("/run/a.shm")


@pytest.mark.parametrize("text", ["/run/a", "shm:a", "shm:", "unix:/run/", "tcp:/a", "shm:/a\0b", "shm:/" + "a" * 107])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(BadAddress) as caught:
        parse(text)
    assert "shm:/" in caught.value.help_text


# --- set-up ----------------------------------------------------------------------------------------------------------


def memory(size: int, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    memfd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(memfd, size)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, seals)
    return memfd


def opening(ring_bytes: int = RING_BYTES, *, magic: bytes = b"DPSM", version: int = 1, sealed: int = 0) -> bytes:
    return OPEN.pack(magic, version, sealed, ring_bytes)


SIZE = CONTROL + 2 * RING_BYTES
Descriptors = Callable[[], list[int]]
BAD: dict[str, tuple[bytes, Descriptors, str]] = {
    "magic": (opening(magic=b"DPRM"), list, "no set-up"),
    "short": (opening()[:-1], list, "no set-up"),
    "long": (opening() + b"x", list, "no set-up"),
    "version": (opening(version=2), list, "version 2"),
    "sealed": (opening(sealed=1), list, "one side seals"),
    "ring too small": (opening(4096), list, "a ring of 4096"),
    "ring too large": (opening(128 << 20), list, "a ring of"),
    "ring of no power of two": (opening((1 << 20) + 1), list, "a ring of"),
    "no descriptors": (opening(), list, "0 descriptors"),
    "two descriptors": (opening(), lambda: [memory(SIZE), os.eventfd(0)], "2 descriptors"),
    "no memory": (opening(), lambda: [os.eventfd(0), os.eventfd(0), os.eventfd(0)], "should be memory"),
    "memory too small": (opening(), lambda: [memory(SIZE - 4096), os.eventfd(0), os.eventfd(0)], "another size"),
    "memory that can shrink": (opening(), lambda: [memory(SIZE, 0), os.eventfd(0), os.eventfd(0)], "can shrink"),
    "no eventfd": (opening(), lambda: [memory(SIZE), os.eventfd(0), os.open("/dev/null", os.O_RDWR)], "an eventfd"),
}


@pytest.mark.parametrize(("message", "descriptors", "says"), BAD.values(), ids=BAD)
def test_a_bad_set_up_is_refused_and_leaves_nothing(
    path: Path, message: bytes, descriptors: Descriptors, says: str
) -> None:
    async def body() -> None:
        listener = ShmListener(path)
        await listener.start()
        accepting = asyncio.create_task(listener.accept())
        await asyncio.sleep(0)
        before = open_files()
        made = descriptors()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(os.fspath(path))
            socket.send_fds(sock, [message], made)
            for descriptor in made:
                os.close(descriptor)
            sock.setblocking(False)
            answer = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 4096), 5)
            with pytest.raises(shm_setup.BadSetup, match=says):
                shm_setup.read_answer(answer)
        async with asyncio.timeout(60):
            while open_files() != before:
                await asyncio.sleep(0.01)
        assert not accepting.done()
        accepting.cancel()
        await listener.close()

    asyncio.run(body())


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_connections_give_back_what_they_took(path: Path) -> None:
    async def once() -> None:
        listener = ShmListener(path)
        await listener.start()
        far, near = await asyncio.gather(listener.accept(), transports.dial(ShmDialer(path)))
        await near.send([b"x"])
        assert await far.receive() == b"x"
        await asyncio.gather(near.close(), far.close(), listener.close())
        assert not path.exists()

    asyncio.run(once())
    before = open_files(), mappings()
    for _ in range(5):
        asyncio.run(once())
    assert (open_files(), mappings()) == before


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("dpvs-probe-link")


def between(path: Path, body: Callable[[ShmConnection, ShmConnection], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        listener = ShmListener(path)
        await listener.start()
        far, near = await asyncio.gather(listener.accept(), transports.dial(ShmDialer(path)))
        assert isinstance(near, ShmConnection)
        async with asyncio.timeout(20):
            await body(near, far)
        await asyncio.gather(near.close(), far.close(), listener.close())

    asyncio.run(all_of_it())


def test_a_peer_that_breaks_the_rules_breaks_only_the_link(path: Path) -> None:
    async def body(near: ShmConnection, far: ShmConnection) -> None:
        near._writer._words[0] = 1 << 40  # a head that cannot be
        near._ring()
        with pytest.raises(LinkLost, match="positions"):
            await far.receive()

    between(path, body)


def test_bytes_on_the_socket_are_against_the_rules(path: Path) -> None:
    async def body(near: ShmConnection, far: ShmConnection) -> None:
        await near.send([b"before"])
        near._sock.send(b"x")
        assert await far.receive() == b"before"
        with pytest.raises(LinkLost, match="speaks where it should not"):
            await far.receive()

    between(path, body)


def test_the_last_words_of_a_dead_peer(path: Path) -> None:
    async def body(near: ShmConnection, far: ShmConnection) -> None:
        await near.send([b"last words"])
        near._sock.shutdown(socket.SHUT_RDWR)  # as at the end of its process: no goodbye
        await asyncio.sleep(0.05)
        assert await far.receive() == b"last words"
        with pytest.raises(LinkLost, match="the peer has ended"):
            await far.receive()

    between(path, body)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_user_is_refused(path: Path) -> None:
    async def body() -> None:
        listener = ShmListener(path)
        await listener.start()
        accepting = asyncio.create_task(listener.accept())
        await asyncio.sleep(0)
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o666)
        child = await asyncio.create_subprocess_exec(
            "setpriv", "--reuid=65534", "--clear-groups", "/usr/bin/python3", "-c",
            f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(path)!r}); print(s.recv(4096))",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, _ = await asyncio.wait_for(child.communicate(), 20)
        assert b"it runs as user 65534, we as user 0" in out
        accepting.cancel()
        await listener.close()

    asyncio.run(body())


# --- the path --------------------------------------------------------------------------------------------------------


def test_what_a_dead_node_left_is_removed(path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(os.fspath(path))
    left.close()

    async def body() -> None:
        listener = ShmListener(path)
        await listener.start()
        await listener.close()
        assert not path.exists()

    asyncio.run(body())


def test_what_is_not_ours_stays(path: Path) -> None:
    async def start(says: str) -> None:
        with pytest.raises(CannotListen, match=says):
            await ShmListener(path).start()
        assert path.exists()

    path.write_text("precious")
    asyncio.run(start("is no socket"))
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(os.fspath(path))
        other.listen()
        asyncio.run(start("another program listens there"))
    with pytest.raises(CannotListen, match="no such file or directory"):
        asyncio.run(ShmListener(Path("/tmp/no-such-directory/a")).start())


# --- sealed ----------------------------------------------------------------------------------------------------------


def secured(node: str) -> Security:
    security = Security(transports._tls(node), transports.Party(node, 7))
    assert security.me.node == node
    return security


def test_names_are_proven_and_what_is_written_is_sealed(path: Path) -> None:
    async def body() -> None:
        listener = ShmListener(path, secured("listener"))
        await listener.start()
        far, near = await asyncio.gather(listener.accept(), transports.dial(ShmDialer(path, secured("dialer"))))
        assert isinstance(near, ShmConnection)
        assert (near.node, far.node) == ("listener", "dialer")
        await near.send([b"a secret that nobody reads"])
        assert b"secret" not in bytes(near._shared.memory[:])
        near._shared.memory[CONTROL + 40] ^= 1
        with pytest.raises(LinkLost, match="changed on its way") as lost:
            await far.receive()
        assert lost.value.loss is Loss.TAMPERED
        await asyncio.gather(near.close(), far.close(), listener.close())

    asyncio.run(body())


@pytest.mark.parametrize("forged", ["length", "end"])
def test_forged_lengths_and_ends(path: Path, forged: str) -> None:
    async def body() -> None:
        listener = ShmListener(path, secured("listener"))
        await listener.start()
        far, near = await asyncio.gather(listener.accept(), transports.dial(ShmDialer(path, secured("dialer"))))
        assert isinstance(near, ShmConnection)
        if forged == "length":
            await near.send([b"x" * 100])
            near._shared.memory[CONTROL] ^= 0x40
            with pytest.raises(LinkLost, match=r"sealed piece|changed|bad length"):
                await far.receive()
        else:
            near._writer.end()
            near._ring()
            with pytest.raises(TimeoutError):  # it waits for TLS to say so
                await asyncio.wait_for(far.receive(), 0.2)
        await asyncio.gather(near.close(), far.close(), listener.close())

    asyncio.run(body())


def test_one_side_seals_and_the_other_does_not(path: Path) -> None:
    async def body(here: Security | None, there: Security | None) -> None:
        listener = ShmListener(path, there)
        await listener.start()
        accepting = asyncio.create_task(listener.accept())
        await asyncio.sleep(0)
        with pytest.raises(PeerUnreachable, match="one side seals"):
            await ShmDialer(path, here).dial()
        accepting.cancel()
        await listener.close()

    asyncio.run(body(secured("dialer"), None))
    asyncio.run(body(None, secured("listener")))
