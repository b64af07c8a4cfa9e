# SPDX-License-Identifier: GPL-2.0-or-later
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator import seal as module
from replicator.seal import (
    HEADER,
    MAX_FRAME,
    OFFER_BYTES,
    OVERHEAD,
    Agreement,
    Fault,
    Opener,
    Party,
    Sealer,
    SealError,
    parse_offer,
)

LB1, LB2 = Party("lb1", 1_700_000_000_000_000_000), Party("lb2", 1_800_000_000_000_000_007)
SECRET = bytes(range(32))


def agree(purposes: tuple[str, str] = ("rdma", "rdma")) -> tuple[tuple[Sealer, Opener], tuple[Sealer, Opener]]:
    near = Agreement(LB1, dialed=True, purpose=purposes[0])
    far = Agreement(LB2, dialed=False, purpose=purposes[1])
    return near.complete(far.offer, LB2), far.complete(near.offer, LB1)


def fault(opener: Opener, sealed: bytes) -> Fault:
    with pytest.raises(SealError) as caught:
        opener.open(sealed)
    return caught.value.fault


def test_both_directions() -> None:
    (near_seals, near_opens), (far_seals, far_opens) = agree()
    for number, frame in enumerate((b"x", b"hello" * 100, bytes(MAX_FRAME))):
        sealed = near_seals.seal(frame)
        assert len(sealed) == len(frame) + OVERHEAD
        assert HEADER.unpack_from(sealed) == (len(frame), 0, number)
        assert far_opens.open(sealed) == frame
        assert near_opens.open(far_seals.seal(frame)) == frame
    assert near_seals.frames == far_opens.frames == 3


def test_between_buffers() -> None:
    (sealer, _), (_, opener) = agree()
    ring, out = memoryview(bytearray(4 * 256)), bytearray(300)
    frames = [os.urandom(size) for size in (200, 1, 224, 37)]
    for slot, frame in enumerate(frames):
        assert sealer.seal_into(memoryview(frame), ring[slot * 256 :]) == len(frame) + OVERHEAD
    for slot, frame in enumerate(frames):
        count = opener.open_into(ring[slot * 256 : slot * 256 + len(frame) + OVERHEAD], out)
        assert out[:count] == frame


def test_golden_frame() -> None:
    """The format and the key schedule stay as they are: docs/security.md."""
    sealer = Sealer(SECRET)
    assert sealer.seal(b"dpvs-probe").hex() == GOLDEN[0]
    assert sealer.seal(b"dpvs-probe").hex() == GOLDEN[1]
    opener = Opener(SECRET)
    assert [opener.open(bytes.fromhex(sealed)) for sealed in GOLDEN] == [b"dpvs-probe"] * 2


GOLDEN = (
    "0a000000000000000000000000000000a4c3916f913fb3be7bb69d39cefbd69ee141297c12eb6e7b36f1",
    "0a000000000000000100000000000000ed0492e8530001c7ddc273445fe96b26fac3d3a34ed05345632f",
)


def test_nothing_is_readable_and_nothing_repeats() -> None:
    sealer = Sealer(SECRET)
    sealed = [sealer.seal(b"same content" * 8) for _ in range(50)]
    assert len({frame[HEADER.size :] for frame in sealed}) == 50
    assert not any(b"same" in frame for frame in sealed)


@given(st.integers(0, 199 + OVERHEAD), st.integers(1, 255))
def test_any_changed_byte(at: int, flip: int) -> None:
    sealed = bytearray(Sealer(SECRET).seal(bytes(200)))
    sealed[at] ^= flip
    opener, out = Opener(SECRET), bytearray(200)
    with pytest.raises(SealError):
        opener.open_into(bytes(sealed), out)
    assert opener.frames == 0


def test_replay_reorder_loss_and_reflection() -> None:
    (sealer, reflected), (_, opener) = agree()
    one, two, three = (sealer.seal(text) for text in (b"one", b"two", b"three"))
    assert fault(reflected, one) is Fault.FORGED, "our own frame back at us"
    assert opener.open(one) == b"one"
    assert fault(opener, one) is Fault.REPLAYED
    (sealer, _), (_, opener) = agree()
    one, two, three = (sealer.seal(text) for text in (b"one", b"two", b"three"))
    assert opener.open(one) == b"one"
    assert fault(opener, three) is Fault.GAP
    assert fault(opener, two) is Fault.GAP, "the first error is final"


def test_a_changed_count_does_not_open() -> None:
    sealer, opener = Sealer(SECRET), Opener(SECRET)
    sealer.seal(b"zero")
    one = bytearray(sealer.seal(b"one"))
    struct.pack_into("<Q", one, 8, 0)
    assert fault(opener, bytes(one)) is Fault.FORGED


@pytest.mark.parametrize("size", [0, 1, HEADER.size, OVERHEAD - 1, OVERHEAD, MAX_FRAME + OVERHEAD + 1])
def test_sizes_that_cannot_be(size: int) -> None:
    assert fault(Opener(SECRET), bytes(size)) is Fault.LENGTH


def test_cut_and_lengthened() -> None:
    sealed = Sealer(SECRET).seal(bytes(100))
    for wrong in (sealed[:-1], sealed + b"\0", sealed[: OVERHEAD + 1]):
        assert fault(Opener(SECRET), wrong) is Fault.LENGTH
    lying = bytearray(sealed[:-1])
    struct.pack_into("<I", lying, 0, 99)
    assert fault(Opener(SECRET), bytes(lying)) is Fault.FORGED


def test_oversize_is_refused_before_memory_is_taken() -> None:
    opener = Opener(SECRET, max_frame=1000)
    assert fault(opener, memoryview(bytearray(1001 + OVERHEAD))) is Fault.LENGTH  # type: ignore[arg-type]
    assert len(opener._private) == 0
    assert Opener(SECRET, 1000).open(Sealer(SECRET, 1000).seal(bytes(1000))) == bytes(1000)


def test_our_own_mistakes_change_nothing() -> None:
    sealer, opener = Sealer(SECRET, 1000), Opener(SECRET, 1000)
    for frame in (b"", bytes(1001)):
        with pytest.raises(ValueError, match="1 to 1000 can be sealed"):
            sealer.seal(frame)
    with pytest.raises(ValueError, match="no room"):
        sealer.seal_into(b"frame", bytearray(5 + OVERHEAD - 1))
    assert sealer.frames == 0
    sealed = sealer.seal(b"frame")
    with pytest.raises(ValueError, match="no room"):
        opener.open_into(sealed, bytearray(4))
    assert opener.open(sealed) == b"frame"
    with pytest.raises(ValueError, match="2\\^32"):
        Sealer(SECRET, rekey_frames=1 << 32)


def test_memory_that_changes_while_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the peer writes after we began to look does not matter: we look at our own copy."""
    shared = bytearray(Sealer(SECRET).seal(b"what was sealed"))
    opener = Opener(SECRET)
    cipher = opener._key.cipher

    class Racing:
        def decrypt_into(self, *arguments: object) -> int:
            shared[:] = bytes(len(shared))
            return cipher.decrypt_into(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(opener._key, "cipher", Racing())
    assert opener.open(shared) == b"what was sealed"


# --- keys ----------------------------------------------------------------------------------------------------------


def test_keys_change_after_frames() -> None:
    sealer, opener = Sealer(SECRET, rekey_frames=3), Opener(SECRET)
    phases = []
    for number in range(10):
        sealed = sealer.seal(b"%d" % number)
        phases.append(HEADER.unpack_from(sealed)[1])
        assert opener.open(sealed) == b"%d" % number
    assert phases == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert sealer.phase == opener.phase == 3


def test_keys_change_after_bytes() -> None:
    sealer, opener = Sealer(SECRET, rekey_bytes=100), Opener(SECRET)
    for size, phase in ((60, 0), (40, 0), (1, 1), (99, 1), (500, 2), (1, 3)):
        sealed = sealer.seal(bytes(size))
        assert HEADER.unpack_from(sealed)[1] == phase
        assert opener.open(sealed) == bytes(size)


def test_a_forged_change_of_keys_does_not_change_them() -> None:
    opener = Opener(SECRET)
    forged = bytearray(Sealer(SECRET).seal(b"frame"))
    struct.pack_into("<I", forged, 4, 1)
    assert fault(opener, bytes(forged)) is Fault.FORGED
    assert opener.phase == 0
    for phase in (2, 0xFFFFFFFF):
        struct.pack_into("<I", forged, 4, phase)
        assert fault(Opener(SECRET), bytes(forged)) is Fault.KEY


def test_no_way_back_to_an_old_key() -> None:
    sealer, opener = Sealer(SECRET, rekey_frames=1), Opener(SECRET)
    for _ in range(2):
        opener.open(sealer.seal(b"x"))
    old = bytearray(sealer.seal(b"x"))
    struct.pack_into("<I", old, 4, 0)
    assert fault(opener, bytes(old)) is Fault.KEY


def test_a_key_that_served_too_long() -> None:
    sealer, opener = Sealer(SECRET), Opener(SECRET)
    opener.open(sealer.seal(b"x"))
    opener._key.frames = module.MAX_PHASE_FRAMES
    assert fault(opener, sealer.seal(b"x")) is Fault.WORN
    sealer.frames = (1 << 64) - 1
    with pytest.raises(SealError, match="no counts are left"):
        sealer.seal(b"x")


def test_wrong_keys() -> None:
    """Another link between the same nodes; another purpose; other names, epochs, roles: nothing opens."""
    (sealer, _), _ = agree()
    assert fault(agree()[1][1], sealer.seal(b"x")) is Fault.FORGED
    (sealer, _), (_, opener) = agree(("rdma", "shm"))
    assert fault(opener, sealer.seal(b"x")) is Fault.FORGED
    for claimed in (LB1._replace(node="lb3"), LB1._replace(epoch=1), LB2):
        near, far = Agreement(LB1, dialed=True), Agreement(LB2, dialed=False)
        sealer, _ = near.complete(far.offer, LB2)
        _, opener = far.complete(near.offer, claimed)
        assert fault(opener, sealer.seal(b"x")) is Fault.FORGED
    near, far = Agreement(LB1, dialed=True), Agreement(LB2, dialed=True)
    sealer, _ = near.complete(far.offer, LB2)
    _, opener = far.complete(near.offer, LB1)
    assert fault(opener, sealer.seal(b"x")) is Fault.FORGED


def test_an_agreement_is_made_once() -> None:
    near, far = Agreement(LB1, dialed=True), Agreement(LB2, dialed=False)
    near.complete(far.offer, LB2)
    with pytest.raises(ValueError, match="once"):
        near.complete(far.offer, LB2)


def test_offers_that_are_none() -> None:
    good = Agreement(LB2, dialed=False).offer
    assert len(good) == OFFER_BYTES == 36
    assert parse_offer(good) == good[4:]
    own = Agreement(LB1, dialed=True)
    assert own.offer != Agreement(LB1, dialed=True).offer
    for offer in (
        b"",
        good[:-1],
        good + b"x",
        b"XX" + good[2:],
        b"DK\x02" + good[3:],
        good[:4] + bytes(32),
        bytes(1 << 20),
    ):
        with pytest.raises(SealError) as caught:
            Agreement(LB1, dialed=True).complete(offer, LB2)
        assert caught.value.fault is Fault.OFFER
    with pytest.raises(SealError, match="our own"):
        own.complete(own.offer, LB2)


@pytest.mark.parametrize("name", ["", "x" * 65])
def test_names_are_bounded(name: str) -> None:
    with pytest.raises(ValueError, match="1 to 64 bytes"):
        Agreement(LB1, dialed=True).complete(Agreement(LB2, dialed=False).offer, Party(name, 1))


def test_parties_are_told_apart() -> None:
    parties = [Party("a", 1), Party("a", 256), Party("aa", 1), Party("ab", 1), Party("é", 1)]
    assert len({party.packed() for party in parties}) == len(parties)


@given(st.binary(max_size=100))
def test_any_bytes_as_offer(data: bytes) -> None:
    try:
        assert len(parse_offer(data)) == 32
    except SealError:
        pass


@given(st.binary(max_size=300))
def test_any_bytes_as_frame(data: bytes) -> None:
    with pytest.raises(SealError):
        Opener(SECRET).open(data)


@given(st.binary(max_size=64), st.integers(0, 3), st.integers(0, 3))
def test_any_content_below_a_fitting_header(data: bytes, phase: int, counter: int) -> None:
    with pytest.raises(SealError):
        Opener(SECRET).open(HEADER.pack(len(data), phase, counter) + data + bytes(16))


@given(
    st.lists(st.binary(min_size=1, max_size=50), min_size=1, max_size=12),
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from(["drop", "repeat", "swap", "flip"]), st.integers(0, 11)), max_size=3),
)
def test_what_arrives_is_a_beginning_of_what_was_sent(
    frames: list[bytes], rekey: int, mischief: list[tuple[str, int]]
) -> None:
    sealer, opener = Sealer(SECRET, rekey_frames=rekey), Opener(SECRET)
    sent = [sealer.seal(frame) for frame in frames]
    line = list(sent)
    for what, where in mischief:
        if not line:
            break
        at = where % len(line)
        if what == "drop":
            del line[at]
        elif what == "repeat":
            line.insert(where % (len(line) + 1), line[at])
        elif what == "swap":
            line[at], line[-1] = line[-1], line[at]
        else:
            line[at] = line[at][:-1] + bytes([line[at][-1] ^ 0x80])
    arrived = []
    try:
        for sealed in line:
            arrived.append(opener.open(sealed))
    except SealError:
        with pytest.raises(SealError):
            opener.open(sent[min(len(arrived), len(sent) - 1)])
    assert arrived == frames[: len(arrived)]
    if line == sent:
        assert arrived == frames


def test_low_order_points() -> None:
    """Public keys that make the secret known to everybody."""
    for public in (bytes(32), b"\x01" + bytes(31), bytes.fromhex("ec" + "ff" * 30 + "7f")):
        offer = Agreement(LB2, dialed=False).offer[:4] + public
        with pytest.raises(SealError, match="gives no secret"):
            Agreement(LB1, dialed=True).complete(offer, LB2)


def test_an_error_that_is_raised_again_and_again_keeps_nothing_alive() -> None:
    opener, depths = Opener(bytes(32)), set()
    for _ in range(20):
        with pytest.raises(SealError) as error:
            opener.open(bytes(64))
        depths.add(len(error.traceback))
    assert len(depths) <= 2
