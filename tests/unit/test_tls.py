# SPDX-License-Identifier: GPL-2.0-or-later
"""Real handshakes on the loopback interface. Who dials takes TLS's server part: so strangers do here, too."""

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from replicator import keys as k
from replicator.transport import tls as module
from replicator.transport.address import Address
from replicator.transport.interface import Direct, LinkLost, Loss, PeerUnreachable
from replicator.transport.tcp import BUFFER_BYTES, TcpConnection, TcpDialer, TcpListener
from replicator.transport.tls import NotTrusted, Refusal, Refused, Tls, TlsDialer, TlsListener, TlsStream, explain
from tests.unit.transports import Turns

Body = Callable[[TlsListener], Awaitable[None]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two nodes of one authority, one of another with the same name, one whose time is over."""
    where = tmp_path_factory.mktemp("keys")
    k.init_authority(where / "ours", "east")
    k.init_authority(where / "theirs", "east")
    k.issue(where / "ours", "lb1", where / "lb1")
    k.issue(where / "ours", "lb2", where / "lb2")
    k.issue(where / "theirs", "lb2", where / "stranger")
    return where


@pytest.fixture(scope="module")
def lb1(directory: Path) -> Tls:
    return Tls.load(directory / "lb1")


@pytest.fixture(scope="module")
def lb2(directory: Path) -> Tls:
    return Tls.load(directory / "lb2")


@pytest.fixture(scope="module")
def expired(tmp_path_factory: pytest.TempPathFactory, directory: Path) -> Tls:
    where = tmp_path_factory.mktemp("expired")
    then = datetime.now(UTC) - timedelta(days=30)
    k.init_authority(where / "a", "east", now=then)
    out = k.issue(where / "a", "lb2", days=7, now=then).directory
    return Tls(k.load_identity(out, now=then))


def listening(own: Tls, body: Body) -> None:
    async def all_of_it() -> None:
        listener = TlsListener(Address("127.0.0.1", 0), own)
        await listener.start()
        try:
            async with asyncio.timeout(20):
                await body(listener)
        finally:
            await listener.close()

    asyncio.run(all_of_it())


def dialer(listener: TlsListener, own: Tls) -> TlsDialer:
    host, port = listener.address.rsplit(":", 1)
    return TlsDialer(Address(host, int(port)), own)


def connected(own: Tls, other: Tls, body: Callable[[TcpConnection, TcpConnection], Awaitable[None]]) -> None:
    async def with_both(listener: TlsListener) -> None:
        near = await dialer(listener, own).dial()
        far = await listener.accept()
        try:
            await body(near, far)
        finally:
            await near.close()
            await far.close()

    listening(other, with_both)


async def refusals(listener: TlsListener, count: int = 1) -> dict[Refusal, int]:
    while sum(listener.refused.values()) < count:
        await asyncio.sleep(0.005)
    return {refusal: listener.refused[refusal.key] for refusal in Refusal if listener.refused[refusal.key]}


async def read_all(connection: TcpConnection, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        data += await connection.receive()
    return bytes(data)


def stream_of(connection: TcpConnection) -> TlsStream:
    assert isinstance(connection._writer, TlsStream)
    return connection._writer


# --- the right ones ------------------------------------------------------------------------------------------------


def test_both_know_each_other(lb1: Tls, lb2: Tls) -> None:
    async def body(near: TcpConnection, far: TcpConnection) -> None:
        assert (near.node, far.node) == ("lb1", "lb2")
        assert stream_of(near).cipher == stream_of(far).cipher == "TLS_AES_256_GCM_SHA384"
        await near.send([b"one", b"", b"two"])
        await far.send([b"three"])
        assert await read_all(far, 6) == b"onetwo"
        assert await read_all(near, 5) == b"three"
        assert (near.bytes_sent, near.bytes_received, far.bytes_received) == (6, 5, 6)
        assert near.remote.startswith("127.0.0.1:")
        sock = near._writer.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 3000

    connected(lb2, lb1, body)


def test_what_comes_is_delivered_as_it_comes(lb1: Tls, lb2: Tls) -> None:
    async def body(near: TcpConnection, far: TcpConnection) -> None:
        assert isinstance(near, Direct)
        assert isinstance(far, Direct)
        data, heard, kept = os.urandom(1_000_003), bytearray(), asyncio.Event()

        def hear(piece: bytes) -> None:
            heard.extend(piece)
            if len(heard) >= len(data):
                kept.set()

        await near.send([b"before"])
        assert await read_all(far, 6) == b"before"
        far.deliver(hear)
        reading = asyncio.create_task(far.receive())
        for start in range(0, len(data), 100_000):
            while not near.roomy:
                await asyncio.sleep(0)
            near.send_now([data[start : start + 9], data[start + 9 : start + 100_000]])
        await kept.wait()
        assert bytes(heard) == data
        assert (near.bytes_sent, far.bytes_received) == (len(data) + 6, len(data) + 6)
        assert not reading.done()
        far.deliver(None)
        await near.send([b"after"])
        assert await reading == b"after"
        far.deliver(hear)
        await near.close()
        assert not near.roomy
        with pytest.raises(LinkLost):
            near.send_now([b"too late"])
        assert await far.receive() == b""  # the end is for whoever reads

    connected(lb2, lb1, body)


def test_both_ways_at_once_and_large(lb1: Tls, lb2: Tls) -> None:
    async def body(near: TcpConnection, far: TcpConnection) -> None:
        data = os.urandom(5_000_011)

        async def say(connection: TcpConnection) -> None:
            for start in range(0, len(data), 700_001):
                await connection.send([data[start : start + 700_001][:9], data[start + 9 : start + 700_001]])

        said = asyncio.gather(say(near), say(far))
        heard = await asyncio.gather(read_all(near, len(data)), read_all(far, len(data)))
        assert heard == [data, data]
        await said

    connected(lb2, lb1, body)


def test_send_waits_while_the_peer_reads_nothing(lb1: Tls, lb2: Tls) -> None:
    async def body(near: TcpConnection, far: TcpConnection) -> None:
        frame = bytes(BUFFER_BYTES)
        sent = 0

        async def flood() -> None:
            nonlocal sent
            for _ in range(64):
                await near.send([frame])
                sent += 1

        task = asyncio.create_task(flood())
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.3)
        assert sent < 40
        assert near._writer.transport.get_write_buffer_size() <= 3 * BUFFER_BYTES
        assert stream_of(far)._incoming.pending <= module._PENDING + module.READ_BYTES
        assert len(await read_all(far, 64 * BUFFER_BYTES)) == 64 * BUFFER_BYTES
        await task

    connected(lb2, lb1, body)


def test_orderly_end_is_empty(lb1: Tls, lb2: Tls) -> None:
    async def body(near: TcpConnection, far: TcpConnection) -> None:
        await near.send([b"last"])
        await near.close()
        await near.close()
        assert await read_all(far, 4) == b"last"
        assert await far.receive() == b""
        assert await far.receive() == b""

    connected(lb2, lb1, body)


def test_large_end_arrives_whole(lb1: Tls, lb2: Tls) -> None:
    async def body(near: TcpConnection, far: TcpConnection) -> None:
        data = os.urandom(3 << 20)
        await near.send([data])
        closing = asyncio.create_task(near.close())
        assert await read_all(far, len(data)) == data
        assert await far.receive() == b""
        await closing

    connected(lb2, lb1, body)


def test_end_without_goodbye_is_link_lost(lb1: Tls, lb2: Tls) -> None:
    """What was sent before is delivered; that no more will come is not taken from who may have cut the line."""

    async def body(near: TcpConnection, far: TcpConnection) -> None:
        await near.send([b"last"])
        near._writer.get_extra_info("socket")._sock.shutdown(socket.SHUT_WR)
        assert await read_all(far, 4) == b"last"
        with pytest.raises(LinkLost, match="gone without a goodbye"):
            await far.receive()
        with pytest.raises(LinkLost):
            await far.send([b"x"])

    connected(lb2, lb1, body)


def test_reset_is_link_lost(lb1: Tls, lb2: Tls) -> None:
    async def body(near: TcpConnection, far: TcpConnection) -> None:
        sock = far._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        far._writer.transport.abort()
        with pytest.raises(LinkLost, match=r"link with 127\.0\.0\.1:\d+ lost"):
            await near.receive()
        with pytest.raises(LinkLost):
            await near.send([b"x"])

    connected(lb2, lb1, body)


def test_close_does_not_wait_for_a_peer_that_takes_nothing(lb1: Tls, lb2: Tls) -> None:
    async def body(near: TcpConnection, far: TcpConnection) -> None:
        near._writer.write(bytes(64 << 20))
        turns = Turns()
        await near.close()
        assert turns.seconds() < 2

    connected(lb2, lb1, body)


def test_after_close_nothing_goes(lb1: Tls, lb2: Tls) -> None:
    async def body(near: TcpConnection, far: TcpConnection) -> None:
        await near.close()
        for attempt in (near.send([b"x"]), near.receive()):
            with pytest.raises(LinkLost):
                await attempt

    connected(lb2, lb1, body)


def test_changed_on_the_way(lb1: Tls, lb2: Tls) -> None:
    async def body(near: TcpConnection, far: TcpConnection) -> None:
        await near.send([b"good"])
        assert await read_all(far, 4) == b"good"
        stream = stream_of(near)
        stream._tls.write(b"to be changed")
        record = bytearray(stream._outgoing.read())
        record[-1] ^= 1
        stream.transport.write(bytes(record))
        with pytest.raises(LinkLost, match="changed on its way") as lost:
            await far.receive()
        assert lost.value.loss is Loss.TAMPERED
        with pytest.raises(LinkLost, match="refuses us"):
            await near.receive()

    connected(lb2, lb1, body)


def test_replayed_and_reordered_records(lb1: Tls, lb2: Tls) -> None:
    async def body(near: TcpConnection, far: TcpConnection) -> None:
        stream = stream_of(near)
        stream._tls.write(b"once")
        record = stream._outgoing.read()
        stream.transport.write(record + record)
        assert await read_all(far, 4) == b"once"
        with pytest.raises(LinkLost, match="changed on its way") as lost:
            await far.receive()
        assert lost.value.loss is Loss.TAMPERED

    connected(lb2, lb1, body)


def test_keys_wear_out(lb1: Tls, lb2: Tls) -> None:
    async def body(near: TcpConnection, far: TcpConnection) -> None:
        stream_of(near)._left_bytes = 10
        await near.send([b"0123456789"])
        with pytest.raises(LinkLost, match=r"its keys have carried \d+ GiB"):
            await near.send([b"x"])
        assert await read_all(far, 10) == b"0123456789"
        assert await far.receive() == b""

    connected(lb2, lb1, body)


def test_new_keys_without_a_restart(tmp_path: Path, lb1: Tls) -> None:
    k.init_authority(tmp_path / "a", "east")
    k.issue(tmp_path / "a", "lb1", tmp_path / "lb1")
    k.issue(tmp_path / "a", "lb2", tmp_path / "lb2")
    own, other = Tls.load(tmp_path / "lb1"), Tls.load(tmp_path / "lb2")

    async def body(listener: TlsListener) -> None:
        before = await dialer(listener, other).dial()
        serial = own.identity.certificate.serial_number
        k.issue(tmp_path / "a", "lb1", tmp_path / "lb1", force=True)
        assert own.reload().certificate.serial_number != serial
        after = await dialer(listener, other).dial()
        assert before.node == after.node == "lb1"
        (tmp_path / "lb1" / "node.key").chmod(0o644)
        with pytest.raises(k.KeyExposed):
            own.reload()
        k.issue(tmp_path / "a", "lb9", tmp_path / "lb1", force=True)
        with pytest.raises(k.KeysError, match="of node lb9 now, and we are lb1"):
            own.reload()
        again = await dialer(listener, other).dial()
        assert again.node == "lb1", "what was loaded before still serves"
        for connection in (before, after, again):
            await connection.close()

    listening(own, body)


def test_new_authority_in_two_steps(tmp_path: Path) -> None:
    """First trust both, then show the new one: at no time is anybody refused."""
    for name in ("old", "new"):
        k.init_authority(tmp_path / name, "east")
    k.issue(tmp_path / "old", "lb1", tmp_path / "lb1")
    k.issue(tmp_path / "old", "lb2", tmp_path / "lb2")
    both = (tmp_path / "new" / "ca.crt").read_bytes() + (tmp_path / "old" / "ca.crt").read_bytes()
    (tmp_path / "lb2" / "ca.crt").write_bytes(both)
    own, other = Tls.load(tmp_path / "lb1"), Tls.load(tmp_path / "lb2")

    async def met(listener: TlsListener) -> None:
        connection = await dialer(listener, own).dial()
        assert connection.node == "lb2"
        await connection.close()

    listening(other, met)
    (tmp_path / "lb1" / "ca.crt").write_bytes(both)
    own.reload()
    (tmp_path / "new" / "ca.crt").write_bytes(both)
    k.issue(tmp_path / "new", "lb2", tmp_path / "lb2", force=True)
    other.reload()
    listening(other, met)


# --- the wrong ones --------------------------------------------------------------------------------------------------


def test_another_authority(directory: Path, lb1: Tls, caplog: pytest.LogCaptureFixture) -> None:
    """Of the same name, even: neither the listener nor the dialer believes it."""
    stranger = Tls.load(directory / "stranger")

    async def dials_us(listener: TlsListener) -> None:
        for _ in range(3):
            with pytest.raises(NotTrusted, match="refuses us: our certificate is not of its authority") as caught:
                await dialer(listener, stranger).dial()
        assert caught.value.refusal is Refusal.BY_PEER
        assert isinstance(caught.value, PeerUnreachable)
        assert "keys show" in caught.value.help_text
        assert await refusals(listener, 3) == {Refusal.AUTHORITY: 3}
        assert listener._waiting.empty()

    with caplog.at_level(logging.WARNING):
        listening(lb1, dials_us)
    assert len(caplog.messages) == 1, "said once in a while, not at each attempt"
    assert "refused: its certificate is not of our authority" in caplog.text

    async def is_dialled_by_us(listener: TlsListener) -> None:
        with pytest.raises(NotTrusted, match="refuses us: our certificate is not of its authority"):
            await dialer(listener, lb1).dial()

    listening(stranger, is_dialled_by_us)


def test_dialer_who_is_believed_does_not_believe(directory: Path, lb1: Tls, tmp_path: Path) -> None:
    """One side trusts both authorities, the other only its own."""
    both = tmp_path / "both"
    k.issue(directory / "ours", "lb2", both)
    (both / "ca.crt").write_bytes((both / "ca.crt").read_bytes() + (directory / "theirs" / "ca.crt").read_bytes())
    stranger = Tls.load(directory / "stranger")

    async def body(listener: TlsListener) -> None:
        with pytest.raises(NotTrusted, match="its certificate is not of our authority") as caught:
            await dialer(listener, stranger).dial()
        assert caught.value.refusal is Refusal.AUTHORITY
        taken = await listener.accept()
        with pytest.raises(LinkLost, match="refuses us: our certificate is not of its authority"):
            await taken.receive()
        await taken.close()

    listening(Tls.load(both), body)


def test_expired(expired: Tls, lb1: Tls) -> None:
    trusting = Tls(replace(lb1.identity, authorities=(*lb1.identity.authorities, *expired.identity.authorities)))

    async def body(listener: TlsListener) -> None:
        with pytest.raises(NotTrusted, match="our certificate has expired"):
            await dialer(listener, expired).dial()
        assert await refusals(listener) == {Refusal.EXPIRED: 1}

    listening(trusting, body)


def test_certificate_without_a_node(directory: Path, lb1: Tls, lb2: Tls) -> None:
    """Signed by our authority is not enough."""
    authority = serialization.load_pem_private_key((directory / "ours" / "ca.key").read_bytes(), None)
    assert isinstance(authority, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    issuer = lb1.identity.authorities[0].subject
    certificate = x509.CertificateBuilder(
        issuer, k._common_name("lb2"), key.public_key(), 7, now - timedelta(days=1), now + timedelta(days=1)
    ).sign(authority, hashes.SHA256())
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    nobody = Tls(replace(lb2.identity, certificate=certificate, certificate_pem=pem, key_pem=k._key_pem(key)))

    async def body(listener: TlsListener) -> None:
        connection = await dialer(listener, nobody).dial()
        with pytest.raises(LinkLost):
            await connection.receive()
        assert await refusals(listener) == {Refusal.NO_NAME: 1}
        assert listener._waiting.empty()
        await connection.close()

    listening(lb1, body)

    async def dialled(listener: TlsListener) -> None:
        with pytest.raises(NotTrusted, match="names no node"):
            await dialer(listener, lb1).dial()

    listening(nobody, dialled)


def bare(protocol: int = ssl.PROTOCOL_TLS_SERVER, newest: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if newest is not None:
        context.maximum_version = newest
    return context


def with_keys(context: ssl.SSLContext, where: Path) -> ssl.SSLContext:
    context.load_cert_chain(where / "node.crt", where / "node.key")
    return context


async def knock(listener: TlsListener, context: ssl.SSLContext, *, server_side: bool) -> None:
    """Like a stranger with a TLS library."""
    host, port = listener.address.rsplit(":", 1)

    def talk() -> None:
        with socket.create_connection((host, int(port)), timeout=5) as plain:
            side = {"server_side": True} if server_side else {"server_hostname": None}
            with context.wrap_socket(plain, **side) as secured:
                assert not secured.recv(1)

    await asyncio.to_thread(talk)


def test_no_certificate(lb1: Tls) -> None:
    async def body(listener: TlsListener) -> None:
        with pytest.raises(OSError):
            await knock(listener, bare(), server_side=True)
        assert set(await refusals(listener)) <= {Refusal.BY_PEER, Refusal.VERSION}  # OpenSSL's way to say it has none
        assert listener._waiting.empty()

    listening(lb1, body)


def test_dialled_peer_shows_no_certificate(lb1: Tls) -> None:
    """A peer that plays TLS's client part without one: the dialer does not take it."""

    async def body() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await asyncio.get_running_loop().start_tls(
                    writer.transport, asyncio.StreamReaderProtocol(reader), bare(ssl.PROTOCOL_TLS_CLIENT)
                )
            except OSError:
                pass

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        address = Address(*server.sockets[0].getsockname()[:2])
        with pytest.raises(NotTrusted, match="it shows no certificate"):
            await TlsDialer(address, lb1).dial()
        server.close()

    asyncio.run(body())


def test_old_tls(directory: Path, lb1: Tls) -> None:
    """TLS 1.2 is not spoken, whatever certificate comes with it."""
    old = with_keys(bare(newest=ssl.TLSVersion.TLSv1_2), directory / "lb2")

    async def body(listener: TlsListener) -> None:
        with pytest.raises(OSError):
            await knock(listener, old, server_side=True)
        assert await refusals(listener) == {Refusal.VERSION: 1}

    listening(lb1, body)


def test_a_usual_tls_client(directory: Path, lb1: Tls) -> None:
    """A scanner sees a ClientHello where it expects an answer; no certificate, no name."""
    context = with_keys(bare(ssl.PROTOCOL_TLS_CLIENT), directory / "lb2")

    async def body(listener: TlsListener) -> None:
        with pytest.raises(OSError):
            await knock(listener, context, server_side=False)
        await refusals(listener)
        assert listener._waiting.empty()

    listening(lb1, body)


def test_what_a_stranger_sees(lb1: Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_S", 0.3)
    seen = bytearray()

    async def body(listener: TlsListener) -> None:
        host, port = listener.address.rsplit(":", 1)
        with socket.create_connection((host, int(port))) as sock:
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            seen.extend(await loop.sock_recv(sock, 4096))
            await loop.sock_sendall(sock, b"\x16\x03\x03\x00\x02hi")
            while data := await loop.sock_recv(sock, 4096):
                seen.extend(data)

    listening(lb1, body)
    assert seen[:1] == b"\x16"
    certificate = lb1.identity.certificate
    for secret in (b"lb1", b"east", b"dpvs", certificate.fingerprint(hashes.SHA256())):
        assert secret not in seen
    assert len(seen) < 600


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", {Refusal.NOT_TLS}),
        (b"\x44\x50\x01\x01" + bytes(60), {Refusal.NOT_TLS}),
        (os.urandom(4096), set(Refusal)),
        (b"\x16\x03\x03\xff\xff" + bytes(70000), set(Refusal)),
        (b"", {Refusal.GONE}),
    ],
)
def test_plain_tcp_to_a_listener(lb1: Tls, says: bytes, why: set[Refusal]) -> None:
    async def body(listener: TlsListener) -> None:
        host, port = listener.address.rsplit(":", 1)
        _reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(says)
        if not says:
            writer.write_eof()
        found = await refusals(listener)
        assert set(found) <= why
        assert not listener._shaking
        writer.close()

    listening(lb1, body)


def test_insecure_dialer(lb1: Tls) -> None:
    async def body(listener: TlsListener) -> None:
        host, port = listener.address.rsplit(":", 1)
        plain = await TcpDialer(Address(host, int(port))).dial()
        assert plain.node is None
        await plain.send([b"DP\x01\x01" + bytes(200)])
        assert await refusals(listener) == {Refusal.NOT_TLS: 1}
        await plain.close()

    listening(lb1, body)


def test_insecure_listener(lb1: Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_S", 0.2)

    async def body() -> None:
        listener = TcpListener(Address("127.0.0.1", 0))
        await listener.start()
        host, port = listener.address.rsplit(":", 1)
        with pytest.raises(NotTrusted, match="--insecure"):
            await TlsDialer(Address(host, int(port)), lb1).dial()
        await listener.close()

    asyncio.run(body())


def test_silence_is_ended(lb1: Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_S", 0.1)

    async def body(listener: TlsListener) -> None:
        host, port = listener.address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        assert await refusals(listener) == {Refusal.SLOW: 1}
        while await reader.read(4096):
            pass
        writer.close()

    listening(lb1, body)


def test_a_flood_of_the_silent_keeps_nobody_out(lb1: Tls, lb2: Tls) -> None:
    async def body(listener: TlsListener) -> None:
        host, port = listener.address.rsplit(":", 1)
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(module.MAX_HANDSHAKES + 7)]
        near = await dialer(listener, lb2).dial()
        far = await listener.accept()
        assert far.node == "lb2"
        assert len(listener._shaking) <= module.MAX_HANDSHAKES
        assert listener.refused[Refusal.CROWDED.key] >= 7
        for _, writer in silent:
            writer.close()
        await near.close()
        await far.close()

    listening(lb1, body)


def test_closing_ends_handshakes(lb1: Tls) -> None:
    async def body(listener: TlsListener) -> None:
        host, port = listener.address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        await reader.read(1)
        await listener.close()
        while await reader.read(4096):
            pass
        writer.close()
        assert not listener._shaking

    listening(lb1, body)


def test_nobody_listens(lb1: Tls) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = Address(*reserved.getsockname())
        with pytest.raises(PeerUnreachable, match=r"cannot reach peer .*: connection refused"):
            asyncio.run(_dial(TlsDialer(address, lb1)))


async def _dial(by: TlsDialer) -> None:
    await by.dial()


def test_cancelled_dial_leaves_nothing_open(lb1: Tls) -> None:
    async def body() -> None:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            begun.set()
            await reader.read()
            ended.set()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        address = Address(*server.sockets[0].getsockname()[:2])
        task = asyncio.create_task(_dial(TlsDialer(address, lb1, timeout_s=60)))
        async with asyncio.timeout(60):
            await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(60):
            await ended.wait()
        server.close()

    asyncio.run(body())


def test_words() -> None:
    def error(reason: str) -> Refusal:
        made = ssl.SSLError(1, f"[SSL: {reason}] something (_ssl.c:1)")
        made.reason = reason
        return explain(made).refusal

    assert error("TLSV1_ALERT_PROTOCOL_VERSION") is Refusal.VERSION
    assert error("UNSUPPORTED_PROTOCOL") is Refusal.VERSION
    assert error("SSLV3_ALERT_CERTIFICATE_EXPIRED") is Refusal.BY_PEER
    assert error("NEVER_HEARD_OF") is Refusal.OTHER
    assert str(explain(ssl.SSLError(1, "strange"))).startswith("the handshake failed")
    assert str(Refused(Refusal.NO_NAME)) == "its certificate names no node"
    for code, refusal in ((9, Refusal.NOT_YET_VALID), (10, Refusal.EXPIRED), (18, Refusal.AUTHORITY)):
        wrong = ssl.SSLCertVerificationError(1, "x")
        wrong.verify_code, wrong.verify_message = code, "x"
        assert explain(wrong).refusal is refusal
    assert module.peer_name(SimpleNamespace(getpeercert=lambda binary_form: None)) is None  # type: ignore[arg-type]
    assert module.peer_name(SimpleNamespace(getpeercert=lambda binary_form: b"\x30\x00")) is None  # type: ignore[arg-type]
