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
