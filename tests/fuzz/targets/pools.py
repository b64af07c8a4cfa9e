# SPDX-License-Identifier: GPL-2.0-or-later
"""probes/mempool.py and probes/agent/client.py: structs in the memory of a foreign process, any bytes of which may be
anything.

An input is the contents of one piece of memory at BASE: a table of memory zones, a pool, its headers and objects, and
the agent's door. Everything else is not readable.
"""

import random
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from probes.agent import abi
from probes.agent.client import AgentAbsent, AgentClient, Door
from probes.errors import DpvsProbeError
from probes.layout import Layout
from probes.mapping import MapFailed
from probes.mempool import TABLE, SlotTable, find_objects, find_pools
from probes.target import ReadFailed, Region, Target
from tests.fuzz.judge import SLACK_BYTES, must, only
from tests.fuzz.mutation import resize

MAX_BYTES = 32 << 10
BASE = 0x100000000
POOL, CHUNK, OBJECTS, DOOR = 0x800, 0x1000, 0x1800, 0x4000
COUNT, ELEMENT, HEADER = 6, 384, 64
WORDS = (
    b"MP_dp_vs_conn_0\0", b"dp_vs_conn_0\0", b"\xff" * 8, (BASE + POOL).to_bytes(8, "little"), b"\x01\0\0\0\0\0\0\0",
    (BASE + CHUNK).to_bytes(8, "little"), (BASE + OBJECTS).to_bytes(8, "little"), abi.DOOR_MAGIC,
)  # fmt: skip


@cache
def _layout() -> Layout:
    return Layout.load("1.10.2")


def _put(out: bytearray, at: int, struct: str, **values: int | bytes) -> None:
    for name, value in values.items():
        offset, size = _layout().field(struct, name)
        raw = value if isinstance(value, bytes) else value.to_bytes(size, "little")
        out[at + offset : at + offset + len(raw)] = raw


def seeds() -> Iterable[bytes]:
    out = bytearray(DOOR)
    stride = ELEMENT + HEADER
    _put(out, 0, "rte_memzone", name=b"RG_MP_dp_vs_conn_0", addr=BASE, len=64)
    _put(out, _layout().size("rte_memzone"), "rte_memzone", name=b"MP_dp_vs_conn_0", addr=BASE + POOL, len=4096)
    _put(
        out, POOL, "rte_mempool", name=b"dp_vs_conn_0", size=COUNT, populated_size=COUNT, elt_size=ELEMENT,
        header_size=HEADER, trailer_size=0, nb_mem_chunks=1, elt_list=(BASE + OBJECTS).to_bytes(8, "little"),
        mem_list=(BASE + CHUNK).to_bytes(8, "little"),
    )  # fmt: skip
    _put(out, CHUNK, "rte_mempool_memhdr", addr=BASE + OBJECTS, len=COUNT * stride, mp=BASE + POOL)
    for number in range(COUNT):
        at = OBJECTS + number * stride
        following = BASE + at + stride if number + 1 < COUNT else 0
        _put(out, at, "rte_mempool_objhdr", mp=BASE + POOL, next=following)
    yield bytes(out)
    door = np.zeros((), abi.DOOR)
    door["magic"], door["abi"], door["state"], door["version"] = abi.DOOR_MAGIC, abi.ABI, abi.State.READY, b"1"
    door["slot"], door["entry"], door["worker_mask"] = BASE + 8, BASE, 6
    door["results"] = BASE + DOOR + abi.DOOR.itemsize
    results = np.zeros(abi.RESULTS, abi.RESULT)
    results[0]["request_id"], results[0]["count"], results[0]["done"] = 7, 3, 3
    out[8:16] = BASE.to_bytes(8, "little")
    yield bytes(out) + door.tobytes() + results.tobytes() + bytes(8)


def bound(data: bytes) -> int:
    return 8 * SLACK_BYTES + 48 * len(data)  # zones, headers found, and slots of pages that the memory really has


class _Process:
    """A process with one piece of memory."""

    pid = 1
    exe = "/usr/bin/dpvs"

    def __init__(self, data: bytes) -> None:
        self._data = data.ljust(-(-len(data) // 8) * 8, b"\0")

    def maps(self) -> list[Region]:
        end = BASE + len(self._data)
        return [Region(BASE, end, "rw-s", 0, "00:2f", 1, f"/run/dpdk/rte/{TABLE}")]

    def read(self, address: int, size: int) -> bytes:
        at = address - BASE
        if at < 0 or size < 0 or at + size > len(self._data):
            raise ReadFailed(f"cannot read {size} bytes at {address:#x}")
        return self._data[at : at + size]

    # --- as probes.mapping.Memory ------------------------------------------------------------------------------------

    def locate(self, addresses: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        return ((addresses - np.uint64(BASE)) >> np.uint64(3)).astype(np.int64)

    def gather(self, places: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        words = np.frombuffer(self._data, np.uint64)
        return words.take(places[:, None] + (offsets >> 3), mode="clip")

    def block(self, address: int, size: int) -> npt.NDArray[np.uint64]:
        return np.frombuffer(self.read(address, size), np.uint64)


def check(data: bytes) -> None:
    process = _Process(data)
    with only(DpvsProbeError):
        target = cast(Target, process)
        pools = find_pools(target, _layout(), "dp_vs_conn_")
        for pool in pools:
            if any(start < BASE or end > BASE + len(data) for start, end in pool.chunks):
                raise MapFailed("not readable memory of DPVS")  # as open_memory does
            must(all(start < end for start, end in pool.chunks), "a chunk has an end")
            objects = find_objects(cast(Any, process), _layout(), pool)
            must(len(objects) == pool.populated, "as many objects as the pool says")
            slots(pool.chunks, objects, pool.stride)
    with only(DpvsProbeError):
        door(cast(Target, process))


def slots(chunks: Sequence[tuple[int, int]], objects: npt.NDArray[np.uint64], stride: int) -> None:
    """Slots of the objects of a pool."""
    extents = [(chunk, objects[(objects >= chunk[0]) & (objects < chunk[1])]) for chunk in chunks]
    table = SlotTable(extents, stride)
    must((table.slot_of(table.addresses) == np.arange(len(table.addresses))).all(), "a slot for each object")
    must(table.slot_of(np.array([0, BASE - 1, (1 << 64) - 1], np.uint64)).max() == -1, "and for nothing else")


def door(target: Target) -> None:
    """What stands where the agent's door should be."""
    found = Door(target, BASE + DOOR)
    client = AgentClient(target, _layout(), cast(Any, None), found)
    must(found.is_installed() in (True, False), "installed or not")
    with only(AgentAbsent, ReadFailed):
        found.prove()
    must(all(isinstance(text, str) and text.isprintable() for text in (found.version, found.error)), "printable words")
    with only(DpvsProbeError):
        must(isinstance(client.counters(), dict), "counters")
    with only(DpvsProbeError):
        codes = client.results(7)
        must(codes is None or len(codes) <= abi.MAX_RECORDS, "codes of one request")


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    """Mostly one number of a struct."""
    rng = random.Random(seed)
    if len(data) < OBJECTS or rng.random() < 0.2:
        return resize(data, longest)
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        struct, at = rng.choice((
            ("rte_memzone", 0), ("rte_memzone", _layout().size("rte_memzone")), ("rte_mempool", POOL),
            ("rte_mempool", POOL),
            ("rte_mempool_memhdr", CHUNK), ("rte_mempool_objhdr", OBJECTS + (ELEMENT + HEADER) * rng.randrange(COUNT)),
            ("door", DOOR),
        ))  # fmt: skip
        if struct == "door":
            name = rng.choice(abi.DOOR.names or ())
            kind, offset = abi.DOOR[name], abi.DOOR.fields[name][1] if abi.DOOR.fields else 0
            size = min(kind.itemsize, 8)
        else:
            offset, size = _layout().field(struct, rng.choice(list(_layout().struct(struct).fields)))
        old = int.from_bytes(out[at + offset : at + offset + size], "little")
        new = rng.choice((
            0, 1, old + 1, old - 1, old * 2, old + 8, old + 64, BASE + rng.randrange(len(data)), (1 << 64) - 1, 1 << 63,
            rng.getrandbits(64), rng.getrandbits(8), 0xFFFF, 1 << 20, 1 << 28,
        ))  # fmt: skip
        if at + offset + size <= len(out):
            out[at + offset : at + offset + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(out[:longest])
