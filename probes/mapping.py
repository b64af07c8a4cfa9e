# SPDX-License-Identifier: GPL-2.0-or-later
"""Another process's memory as 64-bit words.

Rules: reading only. Where the memory is shared (hugepage files, memfd) the same pages are mapped here, read-only, and
DPVS spends nothing on our reading; where it is private (``--in-memory`` without memfd) the words are copied by
process_vm_readv. Both answer to ``Memory``. Every word is read by one aligned 8-byte load, so a word is never torn; a
set of words may be. ``close`` gives the pages back: a mapping must not outlive its use, as it would keep the hugepages
of a dead process.
"""

import ctypes
import mmap
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from probes import gathering
from probes.errors import DpvsProbeError
from probes.target import Region, Target

Words = npt.NDArray[np.uint64]
Addresses = npt.NDArray[np.uint64]
Prints = npt.NDArray[np.uint32]
Bools = npt.NDArray[np.bool_]
Span = tuple[int, int]
BLOCK_BYTES = 16 << 20
ROWS = 512  # rows gathered at once: what is touched stays in the second-level cache
_WEIGHTS = (np.arange(1, 9, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)

PROT_NONE, MAP_FIXED, MAP_NORESERVE = 0, 0x10, 0x4000
MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class MapFailed(DpvsProbeError):
    help_text = "dpvs-probe needs to read DPVS's memory: run it as root, in the host's user namespace."


class MemoryClosed(DpvsProbeError):
    help_text = "The session pool was released, most likely because its DPVS ended."


class Memory(Protocol):
    """Read-only words of a set of address spans."""

    shared: bool

    def locate(self, addresses: Addresses) -> npt.NDArray[np.int64]:
        """A place for each address, opaque, to be given to ``gather``; addresses must lie in the spans."""

    def gather(self, places: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], out: Words | None = None) -> Words:
        """Shape (n, k), a copy: the word at each of k byte offsets (multiples of 8) from each of n places."""

    def still(self, places: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], seen: Words) -> Bools:
        """Shape (n,): whether the words at k offsets are what ``gather`` brought, the first k columns of ``seen``."""

    def fold(self, places: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]) -> Prints:
        """``folded`` of what ``gather`` would bring."""

    def block(self, address: int, size: int) -> Words:
        """The words of a contiguous piece inside one span; valid until ``close``."""

    def close(self) -> None:
        """Release the pages; afterwards reading raises MemoryClosed."""


def folded(words: Words) -> Prints:
    """One number for each of n rows of up to 8 words, never 0; as good as surely another one when a word is."""
    folds: Prints = (words @ _WEIGHTS[: words.shape[1]] >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    return folds


class SharedMemory:
    """The spans mapped one after the other into one reserved range, seen as one flat array of words."""

    shared = True

    def __init__(self, target: Target, spans: Sequence[Span], regions: Sequence[Region]) -> None:
        self._base = self._length = 0
        self._flat: Words | None = None
        covers = [_cover(span, regions) for span in spans]
        align = max(_page_bytes(target, region) for cover in covers for region in cover)
        # Each span starts at the same offset in its page as in DPVS, so that huge pages map as such.
        firsts = [start // align * align for start, _ in spans]
        lasts = [-(-end // align) * align for _, end in spans]
        sizes = [last - first for first, last in zip(firsts, lasts, strict=True)]
        offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        try:
            base = self._reserve(sum(sizes), align)
            for cover, first, last, offset in zip(covers, firsts, lasts, offsets, strict=True):
                for region in cover:
                    _map(target, region, (first, last), base + offset)
        except BaseException:
            self.close()
            raise
        order = np.argsort(firsts)
        self._starts = np.array(firsts, np.uint64)[order]
        self._offsets = np.array(offsets, np.uint64)[order]
        flat = np.ctypeslib.as_array((ctypes.c_uint64 * (sum(sizes) // 8)).from_address(base))
        flat.flags.writeable = False
        self._flat = flat

    def _reserve(self, total: int, align: int) -> int:
        """A range of addresses without memory; returns its first multiple of ``align``."""
        length = total + align
        base: int = _libc.mmap(None, length, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if base == MAP_FAILED:
            raise MapFailed(f"cannot reserve {total >> 20} MiB of address space: {os.strerror(ctypes.get_errno())}")
        self._base, self._length = base, length
        return -(-base // align) * align

    def locate(self, addresses: Addresses) -> npt.NDArray[np.int64]:
        span = np.searchsorted(self._starts, addresses, "right") - 1
        return ((addresses - self._starts[span] + self._offsets[span]) >> np.uint64(3)).astype(np.int64)

    def gather(self, places: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], out: Words | None = None) -> Words:
        out = np.empty((len(places), len(offsets)), np.uint64) if out is None else out
        gathering.gather(self._words(), places, offsets >> 3, out)
        return out

    def still(self, places: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], seen: Words) -> Bools:
        same = np.empty(len(places), np.uint8)
        gathering.still(self._words(), places, offsets >> 3, seen, same)
        return same.view(np.bool_)

    def fold(self, places: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]) -> Prints:
        out = np.empty(len(places), np.uint32)
        gathering.fold(self._words(), places, offsets >> 3, _WEIGHTS, out)
        return out

    def block(self, address: int, size: int) -> Words:
        first = int(self.locate(np.array([address], np.uint64))[0])
        return self._words()[first : first + size // 8]

    def _words(self) -> Words:
        if self._flat is None:
            raise MemoryClosed("the session pool is closed")
        return self._flat

    def close(self) -> None:
        self._flat = None
        if self._base:
            _libc.munmap(self._base, self._length)
            self._base = 0


class CopiedMemory:
    """Private memory: each read is a copy by process_vm_readv. The same answers, some thirty times slower."""

    shared = False

    def __init__(self, target: Target) -> None:
        self._target: Target | None = target

    def _alive(self) -> Target:
        if self._target is None:
            raise MemoryClosed("the session pool is closed")
        return self._target

    def locate(self, addresses: Addresses) -> npt.NDArray[np.int64]:
        return addresses.astype(np.int64)

    def gather(self, places: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], out: Words | None = None) -> Words:
        low, high = int(offsets.min()), int(offsets.max()) + 8
        objects = self._alive().read_many((places + low).astype(np.uint64), high - low)
        out = np.empty((len(places), len(offsets)), np.uint64) if out is None else out
        out[:] = objects.view(np.uint64)[:, (offsets - low) >> 3]
        return out

    def still(self, places: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64], seen: Words) -> Bools:
        return np.asarray((self.gather(places, offsets) == seen[:, : len(offsets)]).all(axis=1))

    def fold(self, places: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]) -> Prints:
        return folded(self.gather(places, offsets))

    def block(self, address: int, size: int) -> Words:
        return np.frombuffer(self._alive().read(address, size), np.uint64)

    def close(self) -> None:
        self._target = None


def open_memory(target: Target, spans: Sequence[Span], regions: Sequence[Region] | None = None) -> Memory:
    """The spans mapped if all of them are shared memory that we may open, else by copying."""
    regions = target.maps() if regions is None else regions
    for span in spans:
        cover = _cover(span, regions)
        if not all(region.shared for region in cover):
            return CopiedMemory(target)
    return SharedMemory(target, spans, regions)


def _cover(span: Span, regions: Sequence[Region]) -> list[Region]:
    """The regions that hold the span, which must be without a hole."""
    cover = [r for r in regions if r.start < span[1] and r.end > span[0]]
    position = span[0]
    for region in cover:
        if region.start > position or "r" not in region.perms:
            break
        position = region.end
    if position < span[1]:
        raise MapFailed(f"{span[0]:#x}-{span[1]:#x} is not readable memory of DPVS")
    return cover


def _open_region(target: Target, region: Region) -> int:
    """A read-only descriptor of the file behind a shared region.

    /proc/PID/map_files opens it even when it has no name any more (memfd, ``--huge-unlink``), but wants
    CAP_CHECKPOINT_RESTORE in the first user namespace. Else the file by name, if it is still the same one.
    """
    link = f"/proc/{target.pid}/map_files/{region.start:x}-{region.end:x}"
    try:
        return os.open(link, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        reason = error.strerror
    try:
        fd = os.open(f"/proc/{target.pid}/root{region.path}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise MapFailed(f"cannot open DPVS's memory {region.path}: {reason}; by name: {error.strerror}") from None
    if os.fstat(fd).st_ino != region.inode:
        os.close(fd)
        raise MapFailed(f"cannot open DPVS's memory {region.path}: {reason}; the file of that name is another one")
    return fd


def _page_bytes(target: Target, region: Region) -> int:
    """Page size of the file's file system: that of hugetlbfs counts, a bigger number elsewhere does no harm."""
    fd = _open_region(target, region)
    try:
        return max(os.fstatvfs(fd).f_bsize, mmap.PAGESIZE)
    finally:
        os.close(fd)


def _map(target: Target, region: Region, span: Span, local: int) -> None:
    """Map what of ``region`` lies in ``span``; the span's first byte belongs at ``local``. One descriptor at a time:
    each huge page may be a file of its own."""
    start, end = max(region.start, span[0]), min(region.end, span[1])
    fd = _open_region(target, region)
    try:
        got = _libc.mmap(
            local + start - span[0], end - start, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED,
            fd, region.offset + start - region.start,
        )  # fmt: skip
        if got == MAP_FAILED:
            raise MapFailed(f"cannot map {region.path} read-only: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(fd)
