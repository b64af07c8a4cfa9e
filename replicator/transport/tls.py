# SPDX-License-Identifier: GPL-2.0-or-later
"""TLS 1.3 between nodes, over the same connections as tcp.py; nobody talks who has no certificate of our authority.

Rules
- Both sides show a certificate of an authority that the other trusts. Host names and addresses do not matter: what
  counts is the node name in the certificate, which becomes ``TcpConnection.node``.
- Who dials proves itself first: the dialer takes TLS's server part, the listener its client part, because in TLS 1.3
  the server part shows its certificate before it sees one. So whoever finds our port and knocks sees one ClientHello,
  which is the same from everybody, and no name; and a dialer whose handshake is done knows that it was accepted.
- No resumption, no tickets: each connection is a full handshake. Keys are used up after ``WEAR_BYTES`` (RFC 8446, 5.5,
  AES-GCM: 2^24.5 full records); the connection ends then, and the next one has new keys.
- The engine of asyncio keeps 256 KiB for each connection before it has said a word, drops the alert that tells a peer
  why it was refused, and takes three times the processor time to receive. Here a handshake costs 16 KiB,
  ``MAX_HANDSHAKES`` are under way at most, the oldest gives way, and each ends within ``HANDSHAKE_S``.
"""

import asyncio
import logging
import os
import ssl
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

from cryptography.hazmat.primitives.serialization import Encoding

from replicator.keys import Identity, KeyMismatch, KeysError, load_identity, node_of_der

from .address import Address, reason
from .interface import PEER_TIMEOUT_S, Loss, PeerUnreachable
from .tcp import BUFFER_BYTES, READ_BYTES, TcpConnection, TcpDialer, TcpListener, name_of

HANDSHAKE_S = 2.0
MAX_HANDSHAKES = 64
WEAR_BYTES = 1 << 38
QUIET_S = 10.0  # between two words about strangers that are refused for the same reason
_HANDSHAKE_BYTES = 16 << 10
_CHUNK = 64 << 10  # encrypted at once: still in the cache when the kernel takes it
_PENDING = 2 * READ_BYTES  # received and not yet asked for; beyond it the peer's window closes

log = logging.getLogger(__name__)


class Refusal(StrEnum):
    """Why a handshake came to nothing."""

    NOT_TLS = "it does not speak TLS (is it run with --insecure?)"
    VERSION = "it does not speak TLS 1.3"
    NO_CERTIFICATE = "it shows no certificate"
    AUTHORITY = "its certificate is not of our authority"
    EXPIRED = "its certificate has expired"
    NOT_YET_VALID = "its certificate is not valid yet"
    CERTIFICATE = "its certificate is no good"
    NO_NAME = "its certificate names no node"
    BY_PEER = "it refuses us"
    TAMPERED = "what came was changed on its way"
    SLOW = "it did not finish the handshake (is it run with --insecure?)"
    GONE = "it went away during the handshake"
    CROWDED = "too many handshakes at once"
    OTHER = "the handshake failed"

    @property
    def key(self) -> str:
        """Its name among counters."""
        return self.name.lower()


class Refused(ConnectionError):
    """A handshake came to nothing."""

    def __init__(self, refusal: Refusal, detail: str = "") -> None:
        super().__init__(f"{refusal}: {detail}" if detail else str(refusal))
        self.refusal = refusal
        self.loss = Loss.TAMPERED if refusal is Refusal.TAMPERED else Loss.RESET  # where a connection ends of it


class NotTrusted(PeerUnreachable):
    """A peer is there, and one of us does not believe the other."""

    help_text = "Look at both nodes' keys with `dpvs-probe keys show`: one authority for both, and clocks that agree."

    def __init__(self, message: str, refusal: Refusal) -> None:
        super().__init__(message)
        self.refusal = refusal


class Tls:
    """Our identity, made ready for both parts. ``reload`` takes up new keys without a restart."""

    def __init__(self, identity: Identity) -> None:
        self._use(identity)

    @classmethod
    def load(cls, directory: str | Path) -> "Tls":
        """From a node's directory of keys. Raises KeysError."""
        return cls(load_identity(directory))

    def reload(self) -> Identity:
        """Read the keys again; connections that are up stay as they are. Raises KeysError, and keeps what it had."""
        identity = load_identity(self.identity.directory)
        if identity.node != self.identity.node:
            raise KeysError(
                f"the keys in {identity.directory} are of node {identity.node} now, and we are {self.identity.node}"
            )
        self._use(identity)
        return identity

    def _use(self, identity: Identity) -> None:
        dialing, listening = context_for(identity, dial=True), context_for(identity, dial=False)
        self.identity, self.dialing, self.listening = identity, dialing, listening


def context_for(identity: Identity, *, dial: bool) -> ssl.SSLContext:
    """What one part of a handshake needs. AES-256-GCM comes first in OpenSSL's own order, X25519 for the exchange."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if dial else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    if dial:
        context.num_tickets = 0
    try:
        context.load_verify_locations(
            cadata="".join(c.public_bytes(Encoding.PEM).decode() for c in identity.authorities)
        )
        # The module takes files only; these are the bytes that were checked, whatever happened to the files since.
        with open(os.memfd_create("identity"), "wb", buffering=0) as file:
            file.write(identity.key_pem + b"\n" + identity.certificate_pem)
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    except ssl.SSLError as error:
        raise KeyMismatch(f"the keys in {identity.directory} are of no use for TLS: {_lower(error)}") from error
    return context


def peer_name(ssl_object: ssl.SSLObject | ssl.SSLSocket) -> str | None:
    """The name of the node whose certificate the peer has shown and proven; None if it names none."""
    der = ssl_object.getpeercert(binary_form=True)
    return node_of_der(der) if der else None


class TlsStream(asyncio.BufferedProtocol):
    """One TLS connection as reader and writer at once, in the manner of asyncio's streams. ``ready``: the peer's name
    once the handshake is done, or Refused.
    """

    transport: asyncio.Transport

    def __init__(self, context: ssl.SSLContext, *, dial: bool, wear_bytes: int = WEAR_BYTES) -> None:
        self._loop = asyncio.get_running_loop()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=dial)
        self._network = memoryview(bytearray(_HANDSHAKE_BYTES))
        self._plain = memoryview(b"")
        self._wear_bytes = wear_bytes
        self._left_bytes = wear_bytes
        self._writable, self._readable, self._gone = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._writable.set()
        self._error: OSError | None = None  # once it is set, nothing more can be read or written
        self._closing = False
        self._hear: Callable[[bytes], None] | None = None
        self.ready: asyncio.Future[str] = self._loop.create_future()
        self._timer = self._loop.call_later(HANDSHAKE_S, self.refuse, Refused(Refusal.SLOW))

    @property
    def cipher(self) -> str:
        """Name of the cipher suite."""
        found = self._tls.cipher()
        return found[0] if found else ""

    def refuse(self, why: Refused) -> None:
        """End a handshake; nothing happens when it is over already."""
        if not self.ready.done():
            self._timer.cancel()
            self._fail(why)
            self.ready.set_exception(why)
            self.ready.exception()  # somebody may have ceased to wait: no complaint about that
            if hasattr(self, "transport"):
                self.transport.close()  # after what is buffered: the alert that says why

    # --- as a writer and a reader ------------------------------------------------------------------------------------

    def write(self, data: bytes | memoryview) -> None:
        """Encrypt and hand to the kernel, or buffer. Raises OSError."""
        if self._error is not None:
            raise self._error
        if self._closing:
            raise ConnectionError("the connection is closed")
        view, at = memoryview(data), 0
        self._left_bytes -= len(view)
        if self._left_bytes < 0:
            self._fail(
                ConnectionError(f"its keys have carried {self._wear_bytes >> 30} GiB; the next link has new ones")
            )
            self.close()
            raise self._error or ConnectionError
        while at < len(view):
            at += self._tls.write(view[at : at + _CHUNK])
            self._flush()

    async def drain(self) -> None:
        """Return when there is room. Raises OSError."""
        await self._writable.wait()
        if self._error is not None:
            raise self._error

    async def read(self, size: int) -> bytes:
        """What has come, at most ``size`` or READ_BYTES; b"" when the peer has said that it ends. Raises OSError."""
        while True:
            count, ended = self._decrypt(min(size, len(self._plain)))
            if self._incoming.pending < _PENDING // 2 and not self._closing and not self.transport.is_reading():
                self._resume()
            if count or ended:
                return bytes(self._plain[:count])
            if self._error is not None:
                raise self._error
            self._readable.clear()
            await self._readable.wait()

    def deliver(self, hear: Callable[[bytes], None] | None) -> None:
        """Call ``hear`` with what comes, as it comes, instead of keeping it for ``read``; None: keep it again."""
        self._hear = hear

    def close(self) -> None:
        """Say that we end, and close when all is sent."""
        if self._closing:
            return
        self._closing = True
        self._timer.cancel()
        if self.ready.done() and not self._gone.is_set():
            try:
                self._tls.unwrap()
            except (ssl.SSLError, ValueError):
                pass  # the peer's goodbye is not waited for
            self._flush()
        self._fail(ConnectionError("the connection is closed"))
        self.transport.close()

    async def wait_closed(self) -> None:
        """Return when the socket is closed."""
        await self._gone.wait()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Like a transport's."""
        return self.transport.get_extra_info(name, default)

    # --- as a protocol -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is connected."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=BUFFER_BYTES)
        self._shake_hands()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the kernel puts what comes."""
        return self._network

    def buffer_updated(self, nbytes: int) -> None:
        """It has put so much there."""
        self._incoming.write(self._network[:nbytes])
        if not self.ready.done():
            self._shake_hands()
        if self._hear is not None and self.ready.done():
            self._hand_over()
            return
        if self._incoming.pending >= _PENDING:
            self.transport.pause_reading()
        self._readable.set()

    def eof_received(self) -> None:
        """No more will come. TLS would have said so itself: the peer was killed, or somebody cut the line."""
        self.refuse(Refused(Refusal.GONE))
        self._fail(ConnectionError("the peer is gone without a goodbye"))

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed."""
        self.refuse(Refused(Refusal.GONE))
        self._fail(exc if isinstance(exc, OSError) else ConnectionResetError("the connection is lost"))
        self._gone.set()

    def pause_writing(self) -> None:
        """The buffer is full."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The buffer has room."""
        self._writable.set()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLError as error:
            self._flush()
            self.refuse(explain(error))
            return
        self._flush()
        name = peer_name(self._tls)
        if name is None:
            self.refuse(Refused(Refusal.NO_NAME))
            return
        self._timer.cancel()
        self._network = memoryview(bytearray(READ_BYTES))
        self._plain = memoryview(bytearray(READ_BYTES))
        self.ready.set_result(name)

    def _hand_over(self) -> None:
        """To whoever wants to be called; the end is for ``read`` to tell."""
        while self._hear is not None:
            count, ended = self._decrypt(len(self._plain))
            if count:
                self._hear(bytes(self._plain[:count]))
            if ended or self._error is not None:
                self._readable.set()
            if count < len(self._plain):
                break

    def _decrypt(self, size: int) -> tuple[int, bool]:
        """Bytes put into the buffer, and whether the peer has said that it ends."""
        count = 0
        try:
            while count < size:
                got = cast(int, self._tls.read(size - count, self._plain[count:]))
                if not got:
                    return count, not count
                count += got
                if not self._incoming.pending and not self._tls.pending() and not self._incoming.eof:
                    break  # to be told so by an error takes as long as the reading
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            return count, not count
        except ssl.SSLError as error:
            self._fail(explain(error))
        if self._outgoing.pending:
            self._flush()  # an answer of TLS's own
        return count, False

    def _resume(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def _flush(self) -> None:
        data = self._outgoing.read()
        if data and not self.transport.is_closing():
            self.transport.write(data)

    def _fail(self, error: OSError) -> None:
        if self._error is None:
            self._error = error
        self._writable.set()
        self._readable.set()


class TlsConnection(TcpConnection):
    """One established TLS connection, which can be served without a task's turn."""

    def __init__(self, stream: TlsStream, node: str, *, silence_s: float = PEER_TIMEOUT_S) -> None:
        super().__init__(stream, stream, node, silence_s=silence_s)
        self._stream = stream

    def deliver(self, hear: Callable[[bytes], None] | None) -> None:
        """Call ``hear`` with what comes, as it comes; ``receive`` then only tells of the end."""
        if hear is None:
            self._stream.deliver(None)
            return

        def counted(data: bytes) -> None:
            self.bytes_received += len(data)
            hear(data)

        self._stream.deliver(counted)


class TlsDialer(TcpDialer):
    """Makes TLS connections to one peer."""

    def __init__(self, address: Address, tls: Tls, **settings: Any) -> None:
        super().__init__(address, **settings)
        self._tls = tls

    async def _connect(self, host: str, port: int) -> TcpConnection:
        loop = asyncio.get_running_loop()
        _, stream = await loop.create_connection(lambda: TlsStream(self._tls.dialing, dial=True), host, port)
        try:
            node = await stream.ready
            return TlsConnection(stream, node, silence_s=self._silence_s)
        except BaseException as error:
            stream.refuse(Refused(Refusal.GONE))
            stream.transport.close()
            if isinstance(error, Refused):
                message = f"no trust between us and peer {self.address}: {error}"
                raise NotTrusted(message, error.refusal) from error
            raise


class TlsListener(TcpListener):
    """Takes TLS connections from peers. ``refused`` has the reasons of ``Refusal`` too, by their keys."""

    def __init__(self, address: Address, tls: Tls, **settings: Any) -> None:
        super().__init__(address, **settings)
        self._tls = tls
        self._shaking: dict[TlsStream, None] = {}  # in order of arrival
        self._said_s: dict[Refusal, float] = {}

    async def close(self) -> None:
        """Listen no more; connections that were accepted live on, all others are dropped."""
        await super().close()
        for stream in list(self._shaking):
            stream.refuse(Refused(Refusal.GONE))

    async def _serve(self, host: str | None, port: int) -> asyncio.Server:
        return await asyncio.get_running_loop().create_server(self._knocked, host, port)

    def _knocked(self) -> TlsStream:
        stream = TlsStream(self._tls.listening, dial=False)
        if len(self._shaking) >= MAX_HANDSHAKES:  # a flood of the silent must not keep out who means it
            next(iter(self._shaking)).refuse(Refused(Refusal.CROWDED))
        self._shaking[stream] = None
        stream.ready.add_done_callback(lambda ready: self._shaken(stream, ready))
        return stream

    def _shaken(self, stream: TlsStream, ready: "asyncio.Future[str]") -> None:
        del self._shaking[stream]
        error = ready.exception()
        if error is None:
            self._accept(lambda: TlsConnection(stream, ready.result(), silence_s=self._silence_s), stream)
        elif isinstance(error, Refused) and self._server is not None:
            self.refused[error.refusal.key] += 1
            now = asyncio.get_running_loop().time()
            loud = now - self._said_s.get(error.refusal, -QUIET_S) >= QUIET_S
            if loud:
                self._said_s[error.refusal] = now
            who = name_of(stream.get_extra_info("peername"))
            quiet = error.refusal in (Refusal.GONE, Refusal.CROWDED)  # a port that is only looked at, or a flood
            log.log(
                logging.WARNING if loud and not quiet else logging.DEBUG, "connection from %s refused: %s", who, error
            )


_UNTRUSTED = frozenset((2, 7, 18, 19, 20, 21, 24, 26, 79))  # X509_V_ERR_*: openssl/x509_vfy.h
_OUR_WORDS = {
    "UNKNOWN_CA": "our certificate is not of its authority",
    "CERTIFICATE_EXPIRED": "our certificate has expired",
    "CERTIFICATE_REQUIRED": "it wants a certificate",
    "BAD_CERTIFICATE": "our certificate is no good",
}


def explain(error: ssl.SSLError) -> Refused:
    """Why TLS failed, in words about the peer."""
    if isinstance(error, ssl.SSLCertVerificationError):
        code = error.verify_code
        if code == 10:
            return Refused(Refusal.EXPIRED)
        if code == 9:
            return Refused(Refusal.NOT_YET_VALID)
        return Refused(Refusal.AUTHORITY) if code in _UNTRUSTED else Refused(Refusal.CERTIFICATE, error.verify_message)
    what = _reason(error)
    if "ALERT_" in what:
        alert = what.partition("ALERT_")[2]
        if alert == "PROTOCOL_VERSION":
            return Refused(Refusal.VERSION)
        return Refused(Refusal.BY_PEER, _OUR_WORDS.get(alert, alert.lower().replace("_", " ")))
    if what == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return Refused(Refusal.NO_CERTIFICATE)
    if what in ("UNSUPPORTED_PROTOCOL", "VERSION_TOO_LOW", "NO_PROTOCOLS_AVAILABLE"):
        return Refused(Refusal.VERSION)
    if what in ("DECRYPTION_FAILED_OR_BAD_RECORD_MAC", "BAD_RECORD_TYPE", "PACKET_LENGTH_TOO_LONG"):
        return Refused(Refusal.TAMPERED)
    if what in (
        "WRONG_VERSION_NUMBER",
        "HTTP_REQUEST",
        "HTTPS_PROXY_REQUEST",
        "UNEXPECTED_MESSAGE",
        "BAD_PACKET_LENGTH",
    ):
        return Refused(Refusal.NOT_TLS)
    return Refused(Refusal.OTHER, _lower(error))


def _reason(error: ssl.SSLError) -> str:
    return getattr(error, "reason", None) or ""  # only errors of the library itself have one


def _lower(error: ssl.SSLError) -> str:
    return _reason(error).lower().replace("_", " ") or reason(error)
