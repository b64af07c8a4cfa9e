# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/seal.py: offers of keys, and sealed frames that were changed, repeated, left out or made up on their way.

Both ends have a secret of ours, so that mutations can be of what was sealed well. An input is a list of steps.
"""

from collections.abc import Iterable

from replicator.seal import HEADER, MAX_FRAME, OVERHEAD, Agreement, Opener, Party, Sealer, SealError, parse_offer
from tests.fuzz import frames
from tests.fuzz.frames import Step
from tests.fuzz.judge import SLACK_BYTES, Finding, must, only, told
from tests.fuzz.mutation import resize

MAX_BYTES = 4096
WORDS = (b"DK\x01\x00", bytes(16), b"\x01\x00\x00\x00")
SECRET = bytes(range(32))
GOOD, REPEATED, LEFT_OUT, CHANGED, MADE_UP, CUT, OFFER, IN_PLACE, KINDS = range(9)
_MADE = Sealer(SECRET).seal(b"made up")


def seeds() -> Iterable[bytes]:
    good = [Step(GOOD, b"a frame"), Step(GOOD, b"x"), Step(GOOD, bytes(600)), Step(IN_PLACE, b"of a ring")]
    for kind in (REPEATED, LEFT_OUT, CUT):
        yield frames.pack_steps([*good, Step(kind, b"\x05\x00"), *good])
    yield frames.pack_steps([*good, Step(CHANGED, b"\x11\x00\x80"), good[0]])
    yield frames.pack_steps([Step(MADE_UP, _MADE), Step(MADE_UP, _MADE)])
    offer = b"DK\x01\x00" + bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    yield frames.pack_steps([Step(OFFER, offer), Step(OFFER, offer[:4] + bytes(32))])


def bound(data: bytes) -> int:
    return SLACK_BYTES + 12 * len(data)  # what was sealed, the private copy of it, what was opened


def check(data: bytes) -> None:
    sealer, opener = Sealer(SECRET, rekey_frames=3), Opener(SECRET)
    last = (-1, b"", b"")  # number, what was sealed, and what it looks like then
    over = False  # the first error is final
    for kind, payload in frames.parse_steps(data, KINDS):
        if kind == OFFER:
            offer(payload)
            continue
        number, plain, sealed = last
        if kind == MADE_UP:
            number, plain, sealed = (0 if payload == _MADE else -1), b"made up", payload
        elif kind in (CHANGED, CUT):
            number, sealed = -1, _spoil(sealer.seal(b"some frame or other"), payload, cut=kind == CUT)
        elif kind != REPEATED:
            if not payload:
                continue
            number, plain, sealed = last = (sealer.frames, payload, sealer.seal(payload))
            if kind == LEFT_OUT:
                continue
        good = number == opener.frames and not over
        try:
            opened = opener.open(memoryview(bytearray(sealed)) if kind == IN_PLACE else sealed)
        except SealError as error:
            told(error)
            must(not good, "a good frame is opened")
            over = True
        else:
            must(good and opened == plain, "nothing but what was sealed comes out, once and in order")


def _spoil(sealed: bytes, how: bytes, *, cut: bool) -> bytes:
    where, flipped = int.from_bytes(how[:2], "little") % len(sealed), (how + bytes(3))[2] or 1
    if cut:
        return sealed[:where]
    return sealed[:where] + bytes([sealed[where] ^ flipped]) + sealed[where + 1 :]


def offer(payload: bytes) -> None:
    """An offer of keys, as it comes and as it is taken up."""
    with only(SealError):
        must(len(parse_offer(payload)) == 32, "a public key")
        ours = Agreement(Party("lb-a", 1), dialed=True)
        sealer, opener = ours.complete(payload, Party("lb-b", (1 << 64) - 1))
        with only(SealError):
            opener.open(sealer.seal(b"our own"))
            raise Finding("our own frame was taken for the peer's")


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    spares = [HEADER.pack(7, 0, 0) + bytes(OVERHEAD), HEADER.pack(MAX_FRAME, 0, 0), b"\x00\x00\x01"]
    return frames.mutate_steps(data, longest, seed, resize, kinds=KINDS, feeds=KINDS, spares=spares)
