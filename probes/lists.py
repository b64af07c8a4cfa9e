# SPDX-License-Identifier: GPL-2.0-or-later
"""Objects of DPVS that hang on its own static lists: services, addresses, kinds of messages.

Rules: reading only, DPVS is not asked. A list head is known by its shape alone: two pointers whose neighbours point
back. Which struct the nodes are in is for others to judge (``probes.evidence``); a list that changes while it is
walked is left where it no longer closes.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from probes.target import ReadFailed, Region, Target

Addresses = npt.NDArray[np.uint64]
BLOCK_BYTES = 16 << 20
MAX_NODES = 1 << 16
MAX_RING = 256  # nodes of one list


def static_nodes(target: Target, regions: Sequence[Region] | None = None) -> Addresses:
    """Addresses of all nodes on lists whose heads are static variables of the program, ascending."""
    regions = target.maps() if regions is None else regions
    readable = _Readable(regions)
    heads = [
        _heads(target, readable, region.start, region.size)
        for region in regions
        if "w" in region.perms and "r" in region.perms and any(_overlap(region, s) for s in _data(target))
    ]
    found = _rings(target, readable, np.concatenate(heads) if heads else np.empty(0, np.uint64))
    return np.unique(found)


def _data(target: Target) -> list[tuple[int, int]]:
    base = target.load_base
    return [(base + s.vaddr, base + s.vaddr + s.memsz) for s in target.image.segments if not s.executable]


def _overlap(region: Region, span: tuple[int, int]) -> bool:
    return region.start < span[1] and region.end > span[0]


class _Readable:
    """Which 16 bytes may be read, by the memory map."""

    def __init__(self, regions: Sequence[Region]) -> None:
        good = [r for r in regions if "r" in r.perms and not r.path.startswith("[v")]
        self._starts = np.array([r.start for r in good], np.uint64)
        self._ends = np.array([r.end for r in good], np.uint64)

    def __call__(self, addresses: Addresses) -> npt.NDArray[np.bool_]:
        if not len(self._starts):
            return np.zeros(len(addresses), bool)
        at = np.searchsorted(self._starts, addresses, "right").astype(np.int64) - 1
        good: npt.NDArray[np.bool_] = (at >= 0) & (addresses % np.uint64(8) == 0)
        return good & (addresses < self._ends[at] - np.uint64(15))


def _heads(target: Target, readable: _Readable, start: int, size: int) -> Addresses:
    """Addresses in a piece of memory that look like the head of a list that is not empty."""
    found = []
    for first in range(start, start + size, BLOCK_BYTES):
        words = np.frombuffer(target.read(first, min(BLOCK_BYTES + 8, start + size - first) // 8 * 8), np.uint64)
        here = np.uint64(first) + np.arange(len(words) - 1, dtype=np.uint64) * np.uint64(8)
        following, previous = words[:-1], words[1:]
        maybe = (following > np.uint64(4096)) & (previous > np.uint64(4096)) & (following != here)
        maybe[maybe] = readable(following[maybe]) & readable(previous[maybe])
        head, following = here[maybe], following[maybe]
        if len(head):
            found.append(head[_pairs(target, following)[:, 1] == head])
    return np.concatenate(found) if found else np.empty(0, np.uint64)


def _rings(target: Target, readable: _Readable, heads: Addresses) -> Addresses:
    """The nodes of the lists with these heads, all walked at once."""
    found, at, head = [], heads, heads
    for _ in range(MAX_RING):
        following = _pairs(target, at)[:, 0]
        going = (following != head) & readable(following)
        at, head, following = at[going], head[going], following[going]
        back = _pairs(target, following)[:, 1] == at
        at, head = following[back], head[back]
        found.append(at)
        if not len(at) or sum(map(len, found)) > MAX_NODES:
            break
    return np.concatenate(found) if found else np.empty(0, np.uint64)


def _pairs(target: Target, addresses: Addresses) -> npt.NDArray[np.uint64]:
    """Shape (n, 2): the two words at each address, zeros where memory went away meanwhile."""
    if not len(addresses):
        return np.empty((0, 2), np.uint64)
    try:
        return target.read_many(addresses, 16).view(np.uint64)
    except ReadFailed:
        out = np.zeros((len(addresses), 2), np.uint64)
        for row, address in enumerate(addresses.tolist()):
            try:
                out[row] = np.frombuffer(target.read(address, 16), np.uint64)
            except ReadFailed:
                continue
        return out
