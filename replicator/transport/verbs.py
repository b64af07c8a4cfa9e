# SPDX-License-Identifier: GPL-2.0-or-later
"""Queue pairs and registered memory through pyverbs, which is imported here and nowhere else.

Rules
- A reliable connection for each link: one queue pair, a completion queue for what comes, with a channel for the event
  loop, one for what was sent, without, a ring that the peer writes to and a staging area of our own. How they are used
  is said in ``slots.py``, how they are agreed upon, over a connection of another transport, in ``exchange.py``.
- Work requests are made once for a connection, two for each slot: one that another follows, and one that ends a chain
  and is reported when it is done. They share one scatter/gather element, so that its length is set in one place.
- A dead peer is found after some ``RETRIES`` of about 0.1 s. Seven retries would be without end for soft-RoCE.
- Calls that would block are never made: they would hold all of Python. Memory is mapped shared, so that a child process
  started meanwhile does not take our pages away from the device.
"""

import ctypes
import errno
import ipaddress
import mmap
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

from probes.errors import DpvsProbeError

from .exchange import MOST_SLOTS, BadSetup, Side
from .slots import CREDITS_OUT, QueueDown

try:
    import pyverbs.device as devices
    import pyverbs.enums as e
    from pyverbs.addr import GID, AHAttr, GlobalRoute
    from pyverbs.cq import CQ, CompChannel
    from pyverbs.mr import MR
    from pyverbs.pd import PD
    from pyverbs.pyverbs_error import PyverbsError, PyverbsRDMAError
    from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
    from pyverbs.wr import SGE, RecvWR, SendWR

    _no_pyverbs = ""
except ImportError as error:
    _no_pyverbs = str(error)

SLOTS = 64
SLOT_BYTES = 64 << 10
RETRIES = 6
ACK_TIMEOUT = 14  # 4.096 us * 2^14 = 67 ms, before the first retry
RNR_RETRIES, RNR_TIMER = 3, 12  # receives are posted ahead of all that a peer in order can send: this is a formality
SPARE_RECEIVES = 2 * CREDITS_OUT + 8
POLL = 64
ROCE_V2 = 1  # enum ibv_gid_type_sysfs
MOST_HOLES = 16  # in a table of addresses
WORD_ID = 1 << 63  # work request ids: slots have their number + 1


class NoRdma(DpvsProbeError):
    """This machine has no RDMA that could be used."""

    help_text = "See `rdma link`; the Debian packages are rdma-core, ibverbs-providers, python3-pyverbs. Or --mode tcp."


class NoLockedMemory(NoRdma):
    """The memory of a link cannot be locked."""

    help_text = "Raise the limit, `ulimit -l` or LimitMEMLOCK= of the systemd unit: 8 MiB a link. Or --mode tcp."


class BadDevice(DpvsProbeError):
    """Text that names no RDMA device of this machine."""

    help_text = "Write DEVICE, DEVICE:PORT or DEVICE:PORT:GID-INDEX, for example mlx5_0:1:3; `rdma link` lists devices."


class Device(NamedTuple):
    """An RDMA device's port. ``gid_index`` None: the first GID of RoCE v2 that both sides can use."""

    name: str
    port: int = 1
    gid_index: int | None = None

    def __str__(self) -> str:
        return ":".join(str(part) for part in self if part is not None)


def find(text: str | None = None) -> Device:
    """The device that ``text`` names, or the first with an active port. Raises NoRdma or BadDevice."""
    names = _device_names()
    if text is None:
        for name in names:
            if _is_active(Device(name)):
                return Device(name)
        raise NoRdma(f"no port of {', '.join(names)} is active")
    name, *rest = text.split(":")
    if len(rest) > 2 or not all(part.isascii() and part.isdigit() and len(part) < 6 for part in rest):
        raise BadDevice(f"'{text}' is no RDMA device")
    if name not in names:
        raise BadDevice(f"there is no RDMA device '{name}', but {', '.join(names)}")
    device = Device(name, *(int(part) for part in rest))
    if not _is_active(device):
        raise NoRdma(f"port {device.port} of {name} is not active")
    if device.gid_index is not None:
        _must_have_gid(device)
    return device


def _must_have_gid(device: Device) -> None:
    with _open(device.name) as context:
        try:
            if _gids(context, device):
                return
        except PyverbsError:  # the table is not as long
            pass
        others = ", ".join(f"{gid.at} ({gid.address})" for gid in _gids(context, device._replace(gid_index=None)))
    has = f", but {others}" if others else ""
    raise BadDevice(f"port {device.port} of {device.name} has no address at index {device.gid_index}{has}")


def _device_names() -> list[str]:
    if _no_pyverbs:
        raise NoRdma(f"pyverbs cannot be imported: {_no_pyverbs}")
    try:
        names = [found.name.decode() for found in devices.get_device_list()]
    except PyverbsError:
        names = []
    if not names:
        raise NoRdma("this machine has no RDMA device")
    return names


def _is_active(device: Device) -> bool:
    with _open(device.name) as context:
        try:
            return bool(context.query_port(device.port).state == e.IBV_PORT_ACTIVE)
        except PyverbsError as error:
            raise BadDevice(f"RDMA device '{device.name}' has no port {device.port}") from error


def _open(name: str) -> Any:
    try:
        return devices.Context(name=name)
    except PyverbsError as error:
        raise NoRdma(f"cannot open RDMA device '{name}': {error}") from error


class Gid(NamedTuple):
    """One address of a port."""

    at: int
    packed: bytes
    roce_v2: bool

    @property
    def address(self) -> str:
        """As people write it."""
        return _readable(self.packed)

    @property
    def rank(self) -> int:
        """Smaller is better: IPv4 over RoCE v2, IPv6, link-local, and what is left."""
        address = ipaddress.IPv6Address(self.packed)
        return (not self.roce_v2) * 4 + (0 if address.ipv4_mapped else 2 if address.is_link_local else 1)


def _readable(packed: bytes) -> str:
    address = ipaddress.IPv6Address(packed)
    return str(address.ipv4_mapped or address)


def choose(gids: Sequence[Gid], like: bytes | None) -> Gid:
    """The best of a port's addresses, of the family of ``like`` if that is given. Raises BadSetup."""
    if like is not None:
        family = ipaddress.IPv6Address(like).ipv4_mapped is None
        gids = [gid for gid in gids if (ipaddress.IPv6Address(gid.packed).ipv4_mapped is None) == family]
    if not gids:
        fits = f" that fits the peer's {_readable(like)}" if like is not None else ""
        raise BadSetup(f"the RDMA device has no address{fits}")
    return min(gids, key=lambda gid: (gid.rank, gid.at))


def _gids(context: Any, device: Device) -> list[Gid]:
    found: list[Gid] = []
    table = range(context.query_port(device.port).gid_tbl_len)
    holes = 0
    for index in table if device.gid_index is None else [device.gid_index]:
        text = str(context.query_gid(device.port, index))
        if text.strip("0:"):
            packed, holes = ipaddress.IPv6Address(text).packed, 0
            found.append(Gid(index, packed, context.query_gid_type(device.port, index) == ROCE_V2))
        elif (holes := holes + 1) > MOST_HOLES:  # tables of a thousand, a handful in use
            break
    return found


class VerbsQueue:
    """A queue pair with its memory, as ``slots.Queue`` says. Made, then told of the peer by ``connect``."""

    def __init__(self, device: Device, *, like: bytes | None = None, slots: int = SLOTS, slot_bytes: int = SLOT_BYTES):
        """Raises BadSetup or NoRdma. ``like``: the peer's address, if it is known already."""
        self.slots, self.slot_bytes = slots, slot_bytes
        self.peer_slots = self.peer_slot_bytes = self.written = self.words_out = 0
        self.staging = memoryview(b"")
        self._device = device
        self._broken = ""
        self._closed = False
        self._qp: Any = None
        self._elements: list[Any] = []  # one for each slot of the staging area, and two requests
        self._middle: list[Any] = []
        self._last: list[Any] = []
        self._psn = int.from_bytes(os.urandom(3))
        self._undo = ExitStack()
        try:
            self._make(like)
        except PyverbsError as error:
            self.close()
            raise _trouble(device, error) from error
        except BaseException:
            self.close()
            raise

    def _make(self, like: bytes | None) -> None:
        context = self._undo.enter_context(_open(self._device.name))
        port = context.query_port(self._device.port)
        self._mtu, self._lid = int(port.active_mtu), int(port.lid)
        self._gid = choose(_gids(context, self._device), like)
        self._pd = self._undo.enter_context(PD(context))
        self._channel, self.fd = _completion_channel(context)
        self._undo.callback(self._channel.close)
        receives = self.slots + SPARE_RECEIVES
        sends = MOST_SLOTS + 2 * CREDITS_OUT
        self._arrivals = self._undo.enter_context(CQ(context, receives, None, self._channel, 0))
        self._sent = self._undo.enter_context(CQ(context, sends, None, None, 0))
        cap = QPCap(max_send_wr=sends, max_recv_wr=receives, max_send_sge=1, max_recv_sge=1, max_inline_data=0)
        initial = QPInitAttr(qp_type=e.IBV_QPT_RC, scq=self._sent, rcq=self._arrivals, cap=cap, sq_sig_all=0)
        self._qp = QP(self._pd, initial, self._attributes())
        self.ring, address, region = self._register(self.slots * self.slot_bytes)
        self._ring_address, self._rkey = address, int(region.rkey)
        element = SGE(address, 0, region.lkey)
        self._receive = RecvWR(wr_id=0, num_sge=1, sg=[element])
        self._receive.num_sge = 0  # a write with an immediate takes a receive and puts nothing into it
        self._undo.callback(self._receive.close)
        element.close()
        for _ in range(receives):
            self._qp.post_recv(self._receive)
        self.rearm()

    def _attributes(self) -> Any:
        attributes = QPAttr(port_num=self._device.port)
        attributes.qp_access_flags = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE
        return attributes

    def _register(self, size: int) -> tuple[memoryview, int, Any]:
        """Memory that the device may use: a view of it, its address, its region."""
        memory = mmap.mmap(-1, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        view = memoryview(memory)
        self._undo.callback(view.release)
        access = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE
        try:
            region = MR(self._pd, size, access, address=address)
        except PyverbsRDMAError as error:
            if error.error_code == errno.ENOMEM:
                raise NoLockedMemory(
                    f"RDMA device {self._device}: {size >> 20} MiB of memory cannot be locked"
                ) from error
            raise
        return view, address, self._undo.enter_context(region)

    def side(self, epoch: int = 0, offer: bytes = b"") -> Side:
        """What the peer has to know; ``epoch`` and ``offer`` are of the agreement on keys."""
        return Side(
            self._gid.packed, self._qp.qp_num, self._psn, self._lid, self._mtu, self._ring_address, self._rkey,
            self.slots, self.slot_bytes, epoch, offer,
        )  # fmt: skip

    def connect(self, peer: Side) -> None:
        """Reach the peer's queue pair, and get ready to write into its ring. Raises BadSetup."""
        try:
            route = GlobalRoute(dgid=GID(ipaddress.IPv6Address(peer.gid).exploded), sgid_index=self._gid.at)
            route.hop_limit = 64
            attributes = self._attributes()
            attributes.ah_attr = AHAttr(port_num=self._device.port, is_global=1, gr=route, dlid=peer.lid)
            attributes.dest_qp_num = peer.qp
            attributes.path_mtu = min(self._mtu, peer.mtu)
            attributes.sq_psn, attributes.rq_psn = self._psn, peer.psn
            attributes.max_rd_atomic = attributes.max_dest_rd_atomic = 1
            attributes.timeout, attributes.retry_cnt = ACK_TIMEOUT, RETRIES
            attributes.rnr_retry, attributes.min_rnr_timer = RNR_RETRIES, RNR_TIMER
            try:
                self._qp.to_rts(attributes)
            except PyverbsRDMAError as error:
                why = os.strerror(error.error_code)
                raise BadSetup(f"RDMA device {self._device} cannot reach {_readable(peer.gid)}: {why}") from error
            self._prepare(peer)
        except PyverbsError as error:
            raise _trouble(self._device, error) from error

    def _prepare(self, peer: Side) -> None:
        self.peer_slots, self.peer_slot_bytes = peer.slots, peer.slot_bytes
        self.staging, address, region = self._register(self.peer_slots * self.peer_slot_bytes)
        for slot in range(self.peer_slots):
            at = slot * self.peer_slot_bytes
            element = SGE(address + at, 0, region.lkey)
            self._undo.callback(element.close)
            self._elements.append(element)
            for requests, flags in ((self._middle, 0), (self._last, e.IBV_SEND_SIGNALED)):
                request = _request(e.IBV_WR_RDMA_WRITE_WITH_IMM, element, flags)
                request.sg_list = element  # the element itself, and no copy of it
                request.set_wr_rdma(peer.rkey, peer.ring + at)
                requests.append(request)
        for slot, request in enumerate(self._middle):
            request.next_wr = self._middle[(slot + 1) % self.peer_slots]
        self._word = _request(e.IBV_WR_SEND_WITH_IMM, self._elements[0], e.IBV_SEND_SIGNALED)
        self._word.num_sge = 0
        self._word.wr_id = WORD_ID

    def write(self, number: int, lengths: Sequence[int]) -> None:
        """Write slots ``number`` (counted from the beginning), ``number + 1``, ... as one chain. Raises QueueDown."""
        if self._closed:
            raise QueueDown("closed")
        slots = [at % self.peer_slots for at in range(number, number + len(lengths))]
        for slot, length in zip(slots, lengths, strict=True):
            self._elements[slot].length = length
            self._middle[slot].imm_data = length
        end = self._last[slots[-1]]
        end.imm_data, end.wr_id = lengths[-1], number + len(lengths)
        try:
            if len(slots) == 1:
                self._qp.post_send(end)
                return
            before = self._middle[slots[-2]]
            before.next_wr = end
            self._qp.post_send(self._middle[slots[0]])
            before.next_wr = self._middle[slots[-1]]
        except PyverbsError as error:
            raise self._break(str(error)) from error

    def say(self, word: int) -> None:
        """Send an immediate word. Raises QueueDown."""
        if self._closed:
            raise QueueDown("closed")
        self._word.imm_data = word
        try:
            self._qp.post_send(self._word)
        except PyverbsError as error:
            raise self._break(str(error)) from error
        self.words_out += 1

    def poll(self) -> list[int]:
        """Immediate words that came, in order; sees what was written. Raises QueueDown when there is nothing else."""
        words: list[int] = []
        if self._closed:  # the queues are gone, and asking them would be the end of the process
            raise QueueDown("closed")
        try:
            for queue in (self._sent, self._arrivals):  # in this order: what failed first is said in the first one
                count = POLL
                while count == POLL:
                    count, completions = queue.poll(POLL)
                    for completion in completions:
                        self._on_completion(completion, words)
        except PyverbsError as error:
            self._break(str(error))
        if self._broken and not words:
            raise QueueDown(self._broken)
        return words

    def _on_completion(self, completion: Any, words: list[int]) -> None:
        if completion.status != e.IBV_WC_SUCCESS:
            self._break(_STATUS.get(completion.status, f"work completed with status {completion.status}"))
        elif completion.opcode & e.IBV_WC_RECV:
            words.append(completion.imm_data)
            self._qp.post_recv(self._receive)
        elif completion.wr_id == WORD_ID:
            self.words_out -= 1
        else:
            self.written = completion.wr_id

    def rearm(self) -> None:
        """Make ``fd`` tell of what comes from now on. Raises QueueDown."""
        if self._closed:
            raise QueueDown("closed")
        try:
            with suppress(PyverbsRDMAError):  # nothing there: the descriptor does not block
                self._channel.get_cq_event(self._arrivals)
                self._arrivals.ack_events(1)
            self._arrivals.req_notify()
        except PyverbsError as error:
            raise self._break(str(error)) from error

    def close(self) -> None:
        """Give everything back."""
        self._closed = True
        with suppress(PyverbsError):
            if self._qp is not None:
                self._qp.close()  # first: nothing may use the memory any more
        with suppress(PyverbsError):
            self._undo.close()

    def _break(self, why: str) -> QueueDown:
        self._broken = self._broken or why
        return QueueDown(self._broken)


_STATUS = {
    2: "our RDMA device can send no more (is its port up?)",
    5: "the queue pair was shut down",
    10: "it refuses to be written to",
    12: "no answer from its RDMA device",
}


def _trouble(device: Device, error: Exception) -> BadSetup:
    return BadSetup(f"RDMA device {device}: {error}")


def _request(opcode: int, element: Any, flags: int) -> Any:
    request = SendWR(opcode=opcode, num_sge=1, sg=[element], send_flags=flags)
    request.close()  # frees its copy of the element, all that it owns
    return request


def _completion_channel(context: Any) -> tuple[Any, int]:
    """A channel and its descriptor, non-blocking."""
    before = _event_descriptors()
    channel = CompChannel(context)
    descriptor = getattr(channel, "fd", None)
    if descriptor is None:  # pyverbs 44 does not tell
        (descriptor,) = _event_descriptors() - before
    os.set_blocking(descriptor, False)
    return channel, descriptor


def _event_descriptors() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if "[infinibandevent]" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(int(name))
    return found
