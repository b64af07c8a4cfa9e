# SPDX-License-Identifier: GPL-2.0-or-later
"""A session pool as DPDK would lay it out, in this very process, and a ``Target`` that names this process.

So the code that reads another process's memory runs for real, through /proc and process_vm_readv, without root and
without DPVS.
"""

import ctypes
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from probes.layout import Layout
from probes.mempool import TABLE
from probes.target import Region, Symbol, Target, start_time

LAYOUT = Layout.load("1.10.2")
CONN = LAYOUT.size("dp_vs_conn")
HEADER, TRAILER = 64, 64
STRIDE = HEADER + CONN + TRAILER
CODE = 0x400000  # where the functions of the pretended binary lie
EXPIRE, XMIT_FNAT, XMIT_DR = CODE + 0x100, CODE + 0x200, CODE + 0x300


class OwnImage:
    """Symbols of the pretended binary."""

    is_pie = False
    build_id = "00"
    entry = 0
    segments: tuple[()] = ()

    def __init__(self, symbols: Mapping[str, int]) -> None:
        self.symbols = dict(symbols)

    def symbol(self, name: str) -> Symbol | None:
        return Symbol(self.symbols[name], 16) if name in self.symbols else None

    def executable(self, value: int) -> bool:
        return CODE <= value < CODE + 0x1000


class OwnTarget(Target):
    """This process; of the tables of memory zones in it only the one in ``directory`` counts."""

    directory: Path

    def maps(self) -> list[Region]:
        inside = str(self.directory) + "/"
        return [r for r in super().maps() if TABLE not in r.path or r.path.startswith(inside)]


def own_target(directory: Path, **symbols: int) -> Target:
    named = {"dp_vs_conn_expire": EXPIRE, "dp_vs_xmit_fnat": XMIT_FNAT, "dp_vs_xmit_dr": XMIT_DR, **symbols}
    pid = os.getpid()
    image = OwnImage({name: value for name, value in named.items() if value})
    target = OwnTarget(pid, os.pidfd_open(pid), image=image, load_base=0, start_time=start_time(pid))  # type: ignore[arg-type]
    target.directory = directory
    return target


class Area:
    """Memory of this process: a shared file, as DPDK's hugepages are, or private."""

    def __init__(self, path: Path | None, size: int, align: int = mmap.PAGESIZE) -> None:
        if path is None:
            self.map = mmap.mmap(-1, size + align, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            with path.open("w+b") as file:
                file.truncate(size + align)
                self.map = mmap.mmap(file.fileno(), size + align, mmap.MAP_SHARED)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.start = -(-base // align) * align
        self._shift = self.start - base

    def write(self, address: int, value: int | bytes, size: int = 8) -> None:
        raw = value if isinstance(value, bytes) else (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        at = address - self.start + self._shift
        self.map[at : at + len(raw)] = raw

    def field(self, address: int, struct: str, name: str, value: int | bytes) -> None:
        offset, size = LAYOUT.field(struct, name)
        self.write(address + offset, value, size)


class OwnPool:
    """A mempool ``name`` with ``chunks`` of so many objects, each in its own memory, no object across a page."""

    def __init__(
        self,
        directory: Path,
        *,
        chunks: Sequence[int] = (100,),
        page: int = 4096,
        name: str = "dp_vs_conn_0",
        shared: bool = True,
    ) -> None:
        self.name = name
        tag = name if shared else None
        self.areas: list[Area] = []
        per_page = page // STRIDE
        for number, count in enumerate(chunks):
            size = (-(-count // per_page) + 1) * page
            path = directory / f"{tag}_{number}" if tag else None
            self.areas.append(Area(path, size, page))
        self.head = Area(directory / f"{tag}_head" if tag else None, 4096)
        self.address = self.head.start
        objects: list[int] = []
        for area, count in zip(self.areas, chunks, strict=True):
            at = area.start
            for _ in range(count):
                if at // page != (at + STRIDE - 1) // page:
                    at = -(-at // page) * page
                objects.append(at + HEADER)
                at += STRIDE
        self.addresses = np.array(objects, np.uint64)
        self._head(chunks, per_page, page)
        headers = [int(a) - LAYOUT.size("rte_mempool_objhdr") for a in self.addresses]
        for header, following in zip(headers, [*headers[1:], 0], strict=True):
            area = self.area(header)
            area.field(header, "rte_mempool_objhdr", "next", following)
            area.field(header, "rte_mempool_objhdr", "mp", self.address)

    def _head(self, chunks: Sequence[int], per_page: int, page: int) -> None:
        put = self.head.field
        for name, value in {
            "name": self.name.encode(), "size": sum(chunks), "populated_size": sum(chunks), "elt_size": CONN,
            "header_size": HEADER, "trailer_size": TRAILER, "nb_mem_chunks": len(chunks),
            "elt_list": (int(self.addresses[0]) - LAYOUT.size("rte_mempool_objhdr")).to_bytes(8, "little"),
            "mem_list": (self.address + 1024).to_bytes(8, "little"),
        }.items():  # fmt: skip
            put(self.address, "rte_mempool", name, value)
        for number, (area, count) in enumerate(zip(self.areas, chunks, strict=True)):
            at = self.address + 1024 + 64 * number
            put(at, "rte_mempool_memhdr", "next", at + 64 if number + 1 < len(chunks) else 0)
            put(at, "rte_mempool_memhdr", "mp", self.address)
            put(at, "rte_mempool_memhdr", "addr", area.start)
            put(at, "rte_mempool_memhdr", "len", -(-count // per_page) * page)

    def area(self, address: int) -> Area:
        return max((a for a in self.areas if a.start <= address), key=lambda a: a.start)

    def set(self, slot: int, **fields: int | bytes) -> None:
        """Set members of ``struct dp_vs_conn`` of the n-th object."""
        address = int(self.addresses[slot])
        for name, value in fields.items():
            self.area(address).field(address, "dp_vs_conn", name, value)

    def session(
        self, slot: int, *, flags: int = 0x1305, state: int = 1, port: int = 40000, **more: int | bytes
    ) -> None:
        """A live IPv4 FullNAT session, its hash entries included."""
        client, vip, local, server = b"\x0a\1\0\5", b"\x0a\1\1\x64", b"\x0a\1\2\xc8", b"\x0a\1\0\x14"
        cport, vport, lport, dport = (p.to_bytes(2, "big") for p in (port, 80, 1025 + slot, 8080))
        rubbish = b"\xee" * 12  # DPVS leaves what was on the stack behind an IPv4 address
        address = int(self.addresses[slot])
        area, offset = self.area(address), LAYOUT.offset
        self.set(
            slot, af=2, proto=6, caddr=client + rubbish, vaddr=vip + rubbish, laddr=local + rubbish, daddr=server,
            cport=cport, vport=vport, lport=lport, dport=dport, connpool=self.address, refcnt=1, flags=flags,
            state=state, packet_xmit=XMIT_FNAT, dest=0x1234,
            timeout=(90).to_bytes(8, "little") + (250000).to_bytes(8, "little"),
        )  # fmt: skip
        entry = address + offset("dp_vs_conn", "tuplehash")
        for direct, (sa, sp, da, dp) in enumerate(((client, cport, vip, vport), (server, dport, local, lport))):
            for name, value in {
                "direct": direct, "af": 2, "proto": 6, "saddr": sa, "daddr": da, "sport": sp, "dport": dp,
            }.items():  # fmt: skip
                area.field(entry, "conn_tuple_hash", name, value)
            entry += LAYOUT.size("conn_tuple_hash")
        area.field(address + offset("dp_vs_conn", "timer"), "dpvs_timer", "handler", EXPIRE)
        area.field(address + offset("dp_vs_conn", "fnat_seq"), "dp_vs_seq", "delta", 1000 + slot)
        self.set(slot, **more)


class OwnZones:
    """DPDK's table of memory zones with what ``pools`` need in it; a nameless one if ``directory`` is None."""

    def __init__(self, directory: Path | None, pools: Sequence[OwnPool]) -> None:
        self.area = Area(directory and directory / "fbarray_memzone", 8192)
        size = LAYOUT.size("rte_memzone")
        names = [("rte_eth_dev_data", 0x1000), *((f"MP_{pool.name}", pool.address) for pool in pools)]
        for number, (name, address) in enumerate(names, start=2):
            at = self.area.start + number * size
            for field, value in {"name": name.encode(), "addr": address, "len": 4096}.items():
                self.area.field(at, "rte_memzone", field, value)


def slots(*numbers: int) -> npt.NDArray[np.int64]:
    return np.array(numbers, np.int64)
