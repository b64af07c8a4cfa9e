# SPDX-License-Identifier: GPL-2.0-or-later
"""Sealed frames, for links that are not TLS themselves: nobody reads, changes, repeats or reorders them unnoticed.

Rules
- Two nodes exchange ``Agreement.offer`` over a connection that is authenticated already (TLS). Keys come from an
  X25519 exchange made for this link alone, by HKDF-SHA256 over both offers, node names and epochs and the purpose:
  keys of another link, run, node or direction do not fit. docs/security.md has the formulas.
- AES-256-GCM. Each direction has its own key and counts its frames from 0; the count is the nonce, never sent twice.
  A frame is opened only if it is exactly the next one. Links that are sealed lose and reorder nothing, so anything
  else is an attack or a fault: the first ``SealError`` is final, the link ends and a new one agrees on new keys.
- A key serves ``rekey_frames`` frames and ``rekey_bytes`` bytes at most, then both sides go on to the next one, which
  does not give the last one away. The receiver refuses a key that served MAX_PHASE_FRAMES frames.
- No I/O here. Frames go from one buffer to another without a copy between; the one exception is opening from memory
  that the peer can write to (anything but ``bytes``): that is copied first, for what is checked must be what is read.

    sealed frame: length u32 | phase u32 | counter u64 | ciphertext, ``length`` bytes | tag, 16 bytes  (little-endian)
"""

import hashlib
import struct
from enum import StrEnum
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from probes.errors import DpvsProbeError

from .wire import HEADER as FRAME_HEADER
from .wire import MAX_BODY, MAX_NAME

Buffer = bytes | bytearray | memoryview

VERSION = 1
HEADER = struct.Struct("<IIQ")
TAG_BYTES = 16
OVERHEAD = HEADER.size + TAG_BYTES
MAX_FRAME = FRAME_HEADER.size + MAX_BODY
MAX_PHASE_FRAMES = 1 << 32
REKEY_FRAMES = 1 << 24
REKEY_BYTES = 1 << 38  # chance to tell ciphertext from noise stays below 2^-60, as in RFC 8446, 5.5
_OFFER = struct.Struct("<2sBx32s")
_OFFER_MAGIC = b"DK"
OFFER_BYTES = _OFFER.size
_LABEL = b"dpvs-probe seal 1"
_LAST = (1 << 64) - 1


class Fault(StrEnum):
    """The kinds of ``SealError``."""

    OFFER = "bad offer of keys"
    LENGTH = "bad length"
    REPLAYED = "a frame came again"
    GAP = "a frame is missing"
    KEY = "a frame of another key"
    FORGED = "a frame was changed on its way, or is not the peer's"
    WORN = "a key has served too long"


class SealError(DpvsProbeError):
    """What came is not what the peer sealed for us, in its order."""

    help_text = "The link is made anew by itself; if this repeats, somebody or something changes what is sent."

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(f"{fault.value}: {detail}")
        self.fault = fault


class Party(NamedTuple):
    """One side of a link, as its certificate and its HELLO say."""

    node: str
    epoch: int

    def packed(self) -> bytes:
        """Bytes that no other party has."""
        name = self.node.encode()
        if not 0 < len(name) <= MAX_NAME:
            raise ValueError(f"a node name has 1 to {MAX_NAME} bytes")
        return struct.pack("<HQ", len(name), self.epoch) + name


class Agreement:
    """One side of one exchange of keys: send ``offer``, then ``complete`` with the peer's, once."""

    def __init__(self, me: Party, *, dialed: bool, purpose: str = "") -> None:
        """``dialed``: we made the connection. ``purpose``: what is sealed, say "rdma"; both sides name the same."""
        self._me, self._dialed, self._purpose = me, dialed, purpose.encode()
        self._private: X25519PrivateKey | None = X25519PrivateKey.generate()
        self.offer = _OFFER.pack(_OFFER_MAGIC, VERSION, self._private.public_key().public_bytes_raw())

    def complete(self, offer: Buffer, peer: Party, max_frame: int = MAX_FRAME) -> "tuple[Sealer, Opener]":
        """What seals our frames and opens the peer's. Raises SealError."""
        if self._private is None:
            raise ValueError("an agreement is made once")
        private, self._private = self._private, None
        offer = bytes(offer[: OFFER_BYTES + 1])
        try:
            shared = private.exchange(X25519PublicKey.from_public_bytes(parse_offer(offer)))
        except ValueError as error:
            raise SealError(Fault.OFFER, "a public key that gives no secret") from error
        if offer == self.offer:
            raise SealError(Fault.OFFER, "it is our own")
        mine, theirs = self._me.packed() + self.offer, peer.packed() + offer
        both = mine + theirs if self._dialed else theirs + mine
        bound = hashlib.sha256(_LABEL + struct.pack("<H", len(self._purpose)) + self._purpose + both).digest()
        secrets = HKDF(SHA256(), 64, salt=bound, info=_LABEL).derive(shared)
        dialers, listeners = secrets[:32], secrets[32:]
        own, others = (dialers, listeners) if self._dialed else (listeners, dialers)
        return Sealer(own, max_frame), Opener(others, max_frame)


def parse_offer(offer: Buffer) -> bytes:
    """The public key in an offer. Raises SealError."""
    if len(offer) != OFFER_BYTES:
        raise SealError(Fault.OFFER, f"{len(offer)} bytes")
    magic, version, public = _OFFER.unpack(offer)
    if magic != _OFFER_MAGIC or version != VERSION:
        raise SealError(Fault.OFFER, f"version {version}" if magic == _OFFER_MAGIC else "no offer at all")
    return bytes(public)


class _Key:
    """The key of one phase."""

    def __init__(self, secret: bytes, phase: int) -> None:
        self._secret, self.phase = secret, phase
        self.cipher = AESGCM(_expand(secret, b"key", 32))
        self._iv = int.from_bytes(_expand(secret, b"iv", 12))
        self.frames = self.bytes = 0

    def nonce(self, counter: int) -> bytes:
        """12 bytes, another for each count (as in RFC 8446, 5.3)."""
        return (self._iv ^ counter).to_bytes(12)

    def next(self) -> "_Key":
        """The key after this one; it says nothing about this one."""
        return _Key(_expand(self._secret, b"next", 32), self.phase + 1)


class Sealer:
    """Seals what we send. ``frames``: how many were sealed."""

    def __init__(
        self,
        secret: bytes,
        max_frame: int = MAX_FRAME,
        *,
        rekey_frames: int = REKEY_FRAMES,
        rekey_bytes: int = REKEY_BYTES,
    ) -> None:
        if not 0 < rekey_frames < MAX_PHASE_FRAMES:
            raise ValueError("a key serves less than 2^32 frames")
        self._key = _Key(secret, 0)
        self._max_frame, self._rekey_frames, self._rekey_bytes = max_frame, rekey_frames, rekey_bytes
        self.frames = 0

    @property
    def phase(self) -> int:
        """How many times the key was changed."""
        return self._key.phase

    def seal_into(self, frame: Buffer, out: bytearray | memoryview) -> int:
        """Seal ``frame`` into the first ``len(frame) + OVERHEAD`` bytes of ``out``; how many they are."""
        length = len(frame)
        end = length + OVERHEAD
        if not 0 < length <= self._max_frame:
            raise ValueError(f"a frame of {length} bytes; 1 to {self._max_frame} can be sealed")
        if len(out) < end:
            raise ValueError(f"{len(out)} bytes are no room for a sealed frame of {end}")
        key = self._key
        if key.frames >= self._rekey_frames or (key.frames and key.bytes + length > self._rekey_bytes):
            key = self._key = key.next()
        if self.frames >= _LAST:
            raise SealError(Fault.WORN, "no counts are left")
        header = HEADER.pack(length, key.phase, self.frames)
        nonce = key.nonce(self.frames)
        self.frames += 1  # first: a nonce that was tried is used
        room = memoryview(out)[:end]
        key.cipher.encrypt_into(nonce, frame, header, room[HEADER.size :])
        room[: HEADER.size] = header
        key.frames += 1
        key.bytes += length
        return end

    def seal(self, frame: Buffer) -> bytes:
        """A sealed frame of its own."""
        out = bytearray(len(frame) + OVERHEAD)
        self.seal_into(frame, out)
        return bytes(out)


class Opener:
    """Opens what the peer sealed. ``frames``: how many were opened; the first error is final."""

    def __init__(self, secret: bytes, max_frame: int = MAX_FRAME) -> None:
        self._key = _Key(secret, 0)
        self._max_frame = max_frame
        self._private = memoryview(bytearray(0))
        self._error: SealError | None = None
        self.frames = 0

    @property
    def phase(self) -> int:
        """How many times the key was changed."""
        return self._key.phase

    def open_into(self, sealed: Buffer, out: bytearray | memoryview) -> int:
        """Open exactly one sealed frame into the beginning of ``out``; its length. Raises SealError.

        After an error ``out`` holds nothing of meaning. ``sealed`` may lie in memory that the peer writes to.
        """
        if self._error is not None:
            raise self._error.with_traceback(None)  # else each time keeps one frame more alive
        length = len(sealed) - OVERHEAD
        if not 0 < length <= self._max_frame:
            raise self._fail(Fault.LENGTH, f"a sealed frame of {len(sealed)} bytes")
        if len(out) < length:
            raise ValueError(f"{len(out)} bytes are no room for a frame of {length}")
        if isinstance(sealed, bytes):
            view = memoryview(sealed)
        else:
            if len(self._private) < len(sealed):
                self._private = memoryview(bytearray(len(sealed)))
            view = self._private[: len(sealed)]
            view[:] = sealed
        header = bytes(view[: HEADER.size])
        said, phase, counter = HEADER.unpack(header)
        if said != length:
            raise self._fail(Fault.LENGTH, f"{said} bytes announced, {length} here")
        if counter != self.frames:
            fault = Fault.REPLAYED if counter < self.frames else Fault.GAP
            raise self._fail(fault, f"number {counter} where {self.frames} was due")
        key = self._key
        if phase == key.phase + 1:
            key = key.next()  # taken up only if the frame is good
        elif phase != key.phase:
            raise self._fail(Fault.KEY, f"phase {phase} after {key.phase}")
        if key.frames >= MAX_PHASE_FRAMES:
            raise self._fail(Fault.WORN, f"{key.frames} frames in phase {phase}")
        try:
            key.cipher.decrypt_into(key.nonce(counter), view[HEADER.size :], header, memoryview(out)[:length])
        except InvalidTag:
            raise self._fail(Fault.FORGED, f"number {counter}") from None
        self._key = key
        key.frames += 1
        self.frames += 1
        return length

    def open(self, sealed: Buffer) -> bytes:
        """The frame in a sealed frame. Raises SealError."""
        out = bytearray(min(max(len(sealed) - OVERHEAD, 0), self._max_frame))
        self.open_into(sealed, out)
        return bytes(out)

    def _fail(self, fault: Fault, detail: str) -> SealError:
        self._error = SealError(fault, detail)
        return self._error


def _expand(secret: bytes, label: bytes, length: int) -> bytes:
    return HKDFExpand(SHA256(), length, _LABEL + b" " + label).derive(secret)
