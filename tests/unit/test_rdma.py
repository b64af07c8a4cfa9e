# SPDX-License-Identifier: GPL-2.0-or-later
"""RDMA without a device: set-up messages, slots and credits over simulated queue pairs, choices, refusals.

What a device does is tested in the virtual machine (tests/vm), by the conformance suite.
"""

import asyncio
import contextlib
import ipaddress
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.errors import DpvsProbeError
from replicator.seal import Party
from replicator.transport import exchange, slots, verbs
from replicator.transport.address import Address, parse
from replicator.transport.exchange import BadSetup, Kind, Messages, Side, pack
from replicator.transport.interface import LinkLost, Loss, PeerUnreachable
from replicator.transport.rdma import RdmaDialer, RdmaListener
from replicator.transport.slots import CREDIT, SlotConnection
from replicator.transport.tcp import TcpDialer, TcpListener
from replicator.transport.tls import TlsDialer, TlsListener
from replicator.transport.verbs import Device, Gid
from tests.unit import transports
from tests.unit.simulated_queue import DEVICE, SimulatedQueue

SIDE = Side(bytes(range(16)), 0x1234, 0xABCDEF, 7, 5, 0x7F0000001000, 0xDEADBEEF, 64, 65536, 99, b"k" * 36)

# --- messages --------------------------------------------------------------------------------------------------------


def test_golden_offer() -> None:
    frame = SIDE.pack(Kind.OFFER)
    assert frame.hex() == (
        "4450524d" "01" "01" "5c00"
        "000102030405060708090a0b0c0d0e0f" "34120000" "efcdab00" "0700" "05" "01"
        "001000000" "07f0000" "efbeadde" "40000000" "00000100" "6300000000000000" + "6b" * 36
    )  # fmt: skip
    messages = Messages()
    messages.feed(frame)
    message = messages.next()
    assert message is not None
    assert message.kind is Kind.OFFER
    assert Side.parse(message.body) == SIDE
    assert messages.next() is None


def test_messages_byte_by_byte_and_all_at_once() -> None:
    sent = [SIDE.pack(Kind.ANSWER), pack(Kind.READY), pack(Kind.BEAT)]
    sent += [exchange.pack_bye(5), exchange.pack_refuse("no ☹")]
    for pieces in ([b"".join(sent)], [bytes([byte]) for byte in b"".join(sent)]):
        messages, kinds = Messages(), []
        for piece in pieces:
            messages.feed(piece)
            while message := messages.next():
                kinds.append(message.kind)
        assert kinds == [Kind.ANSWER, Kind.READY, Kind.BEAT, Kind.BYE, Kind.REFUSE]
    assert message is None
    assert exchange.parse_refuse(sent[-1][8:]) == "no ☹"
    assert exchange.parse_bye(sent[-2][8:]) == 5


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ((0x12345678, 1, 1, 92), "no set-up of RDMA"),
        ((exchange.MAGIC, 2, 1, 92), "version 2"),
        ((exchange.MAGIC, 1, 77, 0), "unknown message 77"),
        ((exchange.MAGIC, 1, 1, 93), "93 bytes for OFFER"),
        ((exchange.MAGIC, 1, 1, 65535), "65535 bytes for OFFER"),
        ((exchange.MAGIC, 1, 3, 1), "1 bytes for READY"),
        ((exchange.MAGIC, 1, 4, 201), "201 bytes for REFUSE"),
    ],
)
def test_bad_headers_are_refused_before_their_body_comes(header: tuple[int, ...], says: str) -> None:
    messages = Messages()
    messages.feed(struct.pack("<IBBH", *header))
    with pytest.raises(BadSetup, match=says):
        messages.next()


@given(st.binary(max_size=300))
def test_any_bytes_give_a_message_or_bad_set_up(data: bytes) -> None:
    for stream in (data, struct.pack("<IBBH", exchange.MAGIC, 1, 1, 92) + data):
        messages = Messages()
        messages.feed(stream)
        with contextlib.suppress(BadSetup):
            while message := messages.next():
                if message.kind is Kind.OFFER:
                    side = Side.parse(message.body)
                    assert side.slots * side.slot_bytes <= exchange.MOST_RING_BYTES


@pytest.mark.parametrize(
    "change",
    [
        {"slots": 3}, {"slots": 257}, {"slot_bytes": 2048}, {"slot_bytes": 2 << 20}, {"slot_bytes": 65537},
        {"slots": 256, "slot_bytes": 1 << 20}, {"mtu": 0}, {"mtu": 6}, {"qp": 1 << 24}, {"psn": 1 << 24},
    ],
)  # fmt: skip
def test_sides_that_cannot_be(change: dict[str, int]) -> None:
    body = Side(**{**SIDE.__dict__, **change}).pack(Kind.OFFER)[8:]
    with pytest.raises(BadSetup):
        Side.parse(body)


# --- slots -----------------------------------------------------------------------------------------------------------


def queue_of(connection: SlotConnection) -> SimulatedQueue:
    assert isinstance(connection._queue, SimulatedQueue)
    return connection._queue


Body = Callable[[SlotConnection, SlotConnection], Awaitable[None]]


def between(body: Body, *, secured: bool = False) -> None:
    async def all_of_it() -> None:
        kind = transports.make("slots+tls" if secured else "slots")
        listener = kind.listener("127.0.0.1:0")
        await listener.start()
        far, near = await asyncio.gather(listener.accept(), transports.dial(kind.dialer(listener.address)))
        assert isinstance(near, SlotConnection)
        assert isinstance(far, SlotConnection)
        try:
            async with asyncio.timeout(20):
                await body(near, far)
        finally:
            await asyncio.gather(near.close(), far.close(), listener.close())
        assert not SimulatedQueue.alive

    asyncio.run(all_of_it())


def test_credits_go_out_by_the_quarter_and_come_to_rest() -> None:
    async def body(near: SlotConnection, far: SlotConnection) -> None:
        for number in range(40):
            await near.send([b"%2d" % number])
            assert await far.receive() == b"%2d" % number
        await asyncio.sleep(0.05)
        assert queue_of(far).words_said == 20  # 8 slots: one for each two
        assert queue_of(near).words_said == 0
        assert queue_of(near).receives == queue_of(far).receives == 8 + verbs.SPARE_RECEIVES

    between(body)


def test_no_more_slots_than_the_peer_has() -> None:
    async def body(near: SlotConnection, far: SlotConnection) -> None:
        task = asyncio.create_task(near.send([bytes(65536)] * 20))
        await asyncio.sleep(0.05)
        assert near._posted == 8
        assert not task.done()
        assert len(await far.receive()) == 4 * 65536
        await asyncio.sleep(0.05)
        assert near._posted == 12
        await read(far, 16 * 65536)
        await task

    between(body)


async def read(connection: SlotConnection, count: int) -> None:
    while count > 0:
        count -= len(await connection.receive())
    assert count == 0


def test_small_frames_share_a_slot() -> None:
    async def body(near: SlotConnection, far: SlotConnection) -> None:
        await near.send([b"x" * 100] * 1000)
        assert near._posted == 2
        await read(far, 100_000)

    between(body)
    between(body, secured=True)


@pytest.mark.parametrize("count", [1, 1000, (1 << 31) - 1])
def test_a_credit_for_what_was_never_written(count: int) -> None:
    async def body(near: SlotConnection, far: SlotConnection) -> None:
        queue_of(far).say(CREDIT | count)
        with pytest.raises(LinkLost, match="a credit for slots that were never written"):
            await near.receive()

    between(body)


def test_lengths_and_numbers_of_slots_that_cannot_be() -> None:
    async def too_long(near: SlotConnection, far: SlotConnection) -> None:
        queue_of(near).say(65537)
        with pytest.raises(LinkLost, match="65537 bytes in a slot"):
            await far.receive()

    async def too_many(near: SlotConnection, far: SlotConnection) -> None:
        for _ in range(9):
            queue_of(near).say(1)
        await asyncio.sleep(0.05)
        assert len(await far.receive()) == 8  # what came until then
        with pytest.raises(LinkLost, match="1 bytes in a slot, behind 8 others"):
            await far.receive()

    between(too_long)
    between(too_many)


def test_a_device_that_gives_up() -> None:
    async def body(near: SlotConnection, far: SlotConnection) -> None:
        await near.send([b"before"])
        await asyncio.sleep(0.02)
        queue_of(far).fail("no answer from its RDMA device")
        assert await far.receive() == b"before"
        with pytest.raises(LinkLost, match="no answer from its RDMA device"):
            await far.receive()
        with pytest.raises(LinkLost, match="no answer from its RDMA device"):
            await far.send([b"x"])

    between(body)


def test_the_stream_ends_without_a_goodbye() -> None:
    async def body(near: SlotConnection, far: SlotConnection) -> None:
        await near.send([b"last words"])
        await near.stream.close()
        await asyncio.sleep(0.05)
        assert await far.receive() == b"last words"
        with pytest.raises(LinkLost, match="the peer has ended"):
            await far.receive()

    between(body)


def test_a_goodbye_does_not_hide_what_is_missing() -> None:
    async def body(near: SlotConnection, far: SlotConnection) -> None:
        await near.send([b"some"])
        await near.stream.send([exchange.pack_bye(2)])
        await near.stream.close()
        assert await far.receive() == b"some"
        with pytest.raises(LinkLost):
            await far.receive()

    between(body)


@pytest.mark.parametrize("message", [pack(Kind.READY), b"garbage!", struct.pack("<IBBH", exchange.MAGIC, 1, 1, 65535)])
def test_nonsense_on_the_stream(message: bytes) -> None:
    async def body(near: SlotConnection, far: SlotConnection) -> None:
        await near.stream.send([message])
        with pytest.raises(LinkLost):
            await far.receive()

    between(body)


def test_a_silent_stream_is_a_dead_peer() -> None:
    async def body(near: SlotConnection, far: SlotConnection) -> None:
        near._watch.cancel()  # no beats any more
        turns = transports.Turns()
        with pytest.raises(LinkLost, match="no heartbeat for 3 s") as lost:
            await far.receive()
        assert lost.value.loss is Loss.SILENT
        assert turns.seconds() < 4  # 2.75, on a machine that is not busy

    between(body)


def test_names_are_proven_and_slots_are_sealed() -> None:
    async def body(near: SlotConnection, far: SlotConnection) -> None:
        assert (near.node, far.node) == ("listener", "dialer")
        await near.send([b"a secret that nobody reads"])
        await asyncio.sleep(0.02)
        assert b"secret" not in bytes(queue_of(far).ring)
        assert b"secret" not in bytes(queue_of(near).staging)
        queue_of(far).ring[40] ^= 1
        with pytest.raises(LinkLost, match="changed on its way") as lost:
            await far.receive()
        assert lost.value.loss is Loss.TAMPERED

    between(body, secured=True)


def test_a_slot_that_comes_again_is_refused() -> None:
    async def body(near: SlotConnection, far: SlotConnection) -> None:
        await near.send([b"pay me"])
        assert await far.receive() == b"pay me"
        here, there = queue_of(near), queue_of(far)
        here.staging[65536 : 65536 + 100] = here.staging[:100]
        here.write(1, [len(b"pay me") + 32])
        await asyncio.sleep(0.02)
        assert bytes(there.ring[:38]) == bytes(there.ring[65536 : 65536 + 38])
        with pytest.raises(LinkLost, match="a frame came again") as lost:
            await far.receive()
        assert lost.value.loss is Loss.TAMPERED

    between(body, secured=True)


def test_nothing_is_used_after_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask the queues of a closed connection would be the end of the process."""
    monkeypatch.setattr(slots, "TICK_S", 0)
    monkeypatch.setattr(slots, "SILENT_TICKS", 1 << 30)

    for turns in range(12):

        async def body(near: SlotConnection, far: SlotConnection, turns: int = turns) -> None:
            await near.send([b"x"])
            for _ in range(turns):
                await asyncio.sleep(0)
            await near.close()
            for _ in range(5):
                await asyncio.sleep(0)

        between(body)
    assert SimulatedQueue.crashes == 0


# --- set-up ----------------------------------------------------------------------------------------------------------


def refused(dialer_party: Party | None, listener_party: Party | None, says: str, *, tls: bool) -> None:
    async def body() -> None:
        at = Address("127.0.0.1", 0)
        stream = TlsListener(at, transports._tls("listener")) if tls else TcpListener(at)
        listener = RdmaListener(stream, DEVICE, listener_party, make_queue=SimulatedQueue)
        await listener.start()
        accepting = asyncio.create_task(listener.accept())
        await asyncio.sleep(0.02)
        to = parse(listener.address)
        dialer = TlsDialer(to, transports._tls("dialer")) if tls else TcpDialer(to)
        with pytest.raises(PeerUnreachable, match=says):
            await RdmaDialer(dialer, DEVICE, dialer_party, make_queue=SimulatedQueue).dial()
        assert not accepting.done()
        accepting.cancel()
        await listener.close()
        assert not SimulatedQueue.alive

    asyncio.run(body())


def test_one_side_seals_and_the_other_does_not() -> None:
    refused(Party("dialer", 1), None, "one side seals", tls=True)
    refused(None, Party("listener", 1), "one side seals", tls=True)


def test_sealing_needs_a_stream_that_proves_names() -> None:
    refused(Party("dialer", 1), Party("listener", 1), "has proven its name", tls=False)


def test_a_peer_that_speaks_no_rdma() -> None:
    async def body() -> None:
        listener = TcpListener(Address("127.0.0.1", 0))
        await listener.start()
        accepting = asyncio.create_task(listener.accept())
        await asyncio.sleep(0.02)
        dialing = asyncio.create_task(
            RdmaDialer(TcpDialer(parse(listener.address)), DEVICE, make_queue=SimulatedQueue).dial()
        )
        peer = await accepting
        await peer.receive()
        await peer.close()
        with pytest.raises(PeerUnreachable, match=r"by RDMA: closed while RDMA was set up \(is it in --mode rdma\?\)"):
            await dialing
        await listener.close()

    asyncio.run(body())


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(Path("/sys/class/infiniband").is_dir(), reason="this machine has RDMA")
def test_without_rdma_there_is_a_clear_error_and_nothing_else() -> None:
    for text in (None, "mlx5_0", "mlx5_0:1:3"):
        with pytest.raises(verbs.NoRdma, match=r"no RDMA device|pyverbs cannot be imported") as caught:
            verbs.find(text)
        assert "--mode tcp" in caught.value.help_text

    async def dial() -> None:
        listener = TcpListener(Address("127.0.0.1", 0))
        await listener.start()
        accepting = asyncio.create_task(listener.accept())
        await asyncio.sleep(0.02)
        with pytest.raises(PeerUnreachable, match=r"cannot reach peer .* by RDMA: cannot open RDMA device 'mlx5_0'"):
            await RdmaDialer(TcpDialer(parse(listener.address)), Device("mlx5_0")).dial()
        await (await accepting).close()
        await listener.close()

    asyncio.run(dial())


def test_without_pyverbs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "_no_pyverbs", "No module named 'pyverbs'")
    with pytest.raises(verbs.NoRdma, match="pyverbs cannot be imported: No module named 'pyverbs'"):
        verbs.find()
    with pytest.raises(DpvsProbeError):
        verbs.VerbsQueue(Device("mlx5_0"))


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "_device_names", lambda: ["mlx5_0", "rxe0"])
    monkeypatch.setattr(verbs, "_is_active", lambda device: device.name == "rxe0" and device.port == 1)
    monkeypatch.setattr(verbs, "_must_have_gid", lambda device: None)
    assert verbs.find() == Device("rxe0")
    assert verbs.find("rxe0:1:3") == Device("rxe0", 1, 3)
    assert str(Device("rxe0", 1, 3)) == "rxe0:1:3"
    assert str(Device("rxe0")) == "rxe0:1"
    for text in ("mlx4_0", "rxe0:x", "rxe0:1:2:3", "rxe0:", ""):
        with pytest.raises(verbs.BadDevice, match="no RDMA device") as caught:
            verbs.find(text)
        assert "DEVICE:PORT" in caught.value.help_text
    for text in ("mlx5_0", "rxe0:2"):
        with pytest.raises(verbs.NoRdma, match="is not active"):
            verbs.find(text)


def gid(at: int, text: str, *, roce_v2: bool = True) -> Gid:
    return Gid(at, ipaddress.IPv6Address(text).packed, roce_v2)


def test_choice_of_an_address() -> None:
    local, six, four = gid(0, "fe80::1"), gid(1, "fd00::1"), gid(3, "::ffff:10.0.0.1")
    old = gid(2, "::ffff:10.0.0.1", roce_v2=False)
    assert verbs.choose([local, six, old, four], None) is four
    assert verbs.choose([local, six, old], None) is six
    assert verbs.choose([local, old], None) is local
    assert verbs.choose([local, six, old, four], six.packed) is six
    assert verbs.choose([local, old, four], six.packed) is local
    with pytest.raises(BadSetup, match=r"no address that fits the peer's 10\.0\.0\.1"):
        verbs.choose([local], four.packed)
    with pytest.raises(BadSetup, match="has no address"):
        verbs.choose([], None)
