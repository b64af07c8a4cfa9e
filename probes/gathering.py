# SPDX-License-Identifier: GPL-2.0-or-later
"""The loops over words of another process's memory, compiled.

Rules: those of ``collector.rows``. Each word is read by one aligned 8-byte load. What is to be read twice takes
two calls from Python, so that no compiler can make one load of them.
"""

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

_CONN = (1 << 62) - 1  # of the first word of an event: the address; the rest is its kind


def _inside(flat: U64, places: I64, words: I64) -> None:
    """Raise IndexError unless all words of all places are in ``flat``."""
    low, high, outside = 0, -1, 0
    for k in range(words.shape[0]):
        low, high = min(low, words[k]), max(high, words[k])
    for i in range(places.shape[0]):
        outside |= places[i] + low < 0 or places[i] + high >= flat.shape[0]
    if outside:
        raise IndexError(f"a word that is not among {flat.shape[0]}")


def gather(flat: U64, places: I64, words: I64, out: U64) -> None:
    """To ``out``, (n, k), the words of ``flat`` that stand ``words``, (k,), behind each of n places."""
    n, each = places.shape[0], words.shape[0]
    _inside(flat, places, words)
    if out.shape[0] != n or out.shape[1] != each:
        raise IndexError("no room for what is gathered")
    for i in range(n):
        place = places[i]
        for k in range(each):
            out[i, k] = flat[place + words[k]]


def still(flat: U64, places: I64, words: I64, seen: U64, same: U8) -> None:
    """In ``same``, (n,), whether the words are those that ``gather`` brought: the first k of each row of ``seen``."""
    n, each = places.shape[0], words.shape[0]
    _inside(flat, places, words)
    if seen.shape[0] != n or seen.shape[1] < each or same.shape[0] != n:
        raise IndexError("arrays of sizes that do not fit")
    for i in range(n):
        place, differ = places[i], 0
        for k in range(each):
            differ |= flat[place + words[k]] ^ seen[i, k]
        same[i] = differ == 0


def fold(flat: U64, places: I64, words: I64, weights: U64, out: U32) -> None:
    """To ``out``, (n,), one number for the words of each place: the upper half of their weighted sum, and never 0."""
    n, each = places.shape[0], words.shape[0]
    _inside(flat, places, words)
    if out.shape[0] != n or weights.shape[0] < each:
        raise IndexError("arrays of sizes that do not fit")
    for i in range(n):
        place, total = places[i], 0
        for k in range(each):
            total += flat[place + words[k]] * weights[k]
        out[i] = (total >> 32) | 1


def find(
    addresses: U64, starts: U64, ends: U64, pages: I64, page0: I64, first: U64, base: I64, count: U64, shift: int,
    stride: int, out: I64,
) -> None:  # fmt: skip
    """To ``out``, (n,), the slot of each address, -1 where there is none; the arrays are those of ``SlotTable``."""
    n, extents = addresses.shape[0], starts.shape[0]
    if not (ends.shape[0] == pages.shape[0] == page0.shape[0] == extents > 0 and out.shape[0] == n and stride > 0):
        raise IndexError("arrays of sizes that do not fit")
    if not first.shape[0] == base.shape[0] == count.shape[0]:
        raise IndexError("arrays of sizes that do not fit")
    extent = 0
    for i in range(n):
        address = addresses[i]
        out[i] = -1
        if address < starts[extent] or address >= ends[extent]:  # most follow one of the same extent
            low, high = 0, extents
            while low < high:
                middle = (low + high) >> 1
                if starts[middle] <= address:
                    low = middle + 1
                else:
                    high = middle
            if low == 0 or address >= ends[low - 1]:
                continue
            extent = low - 1
        page = pages[extent] + (address >> shift) - page0[extent]
        if page < 0 or page >= first.shape[0] or address < first[page]:
            continue
        number = (address - first[page]) // stride
        if number < count[page] and first[page] + number * stride == address:
            out[i] = base[page] + number


def take(events: U64, size: int, tails: U64, heads: U64, tids: U64, before_ns: int, out: U64, taken: I64) -> int:
    """To ``out``, (n, 3), events of dtype EVENT of several rings, one ring after the other; how many in all.

    ``events``: the rings one behind the other, ``size`` (a power of two) events of two words each, struct brief;
    ``tails``, ``heads``: of each ring what to begin with and what to end before; ``before_ns``: nothing later is taken;
    ``taken``: how many of each.
    """
    rings, found, room = tails.shape[0], 0, out.shape[0]
    if not heads.shape[0] == tids.shape[0] == taken.shape[0] == rings or out.shape[1] != 3:
        raise IndexError("arrays of sizes that do not fit")
    if size <= 0 or size & (size - 1) or events.shape[0] < 2 * size * rings:
        raise IndexError("rings of another size")
    for ring in range(rings):
        if heads[ring] - tails[ring] > room:
            raise IndexError("no room for what is taken")
        room -= heads[ring] - tails[ring]
    for ring in range(rings):
        tid, tail, count, base, number = tids[ring], tails[ring], heads[ring] - tails[ring], size * ring, 0
        for i in range(count):
            place = 2 * (base + ((tail + i) & (size - 1)))
            time_ns = events[place + 1]
            if time_ns > before_ns:
                break
            word = events[place]
            out[found, 0] = word & _CONN
            out[found, 1] = time_ns
            out[found, 2] = tid | (word >> 62) << 32
            number += 1
            found += 1
        taken[ring] = number
    return found
