# SPDX-License-Identifier: GPL-2.0-or-later
"""The loops over sessions on their way to a peer and from one, compiled.

Rules: those of ``collector.rows``. What comes from a peer is checked here for all that indexing with it relies on,
before anything is stored; what is wrong is a number, and who asked makes an error of it.
"""

import numpy as np
import numpy.typing as npt

from collector import record

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

# What a peer is to hear of a slot: nothing, that its session ended, or the session itself.
NOTHING, ENDED, CREATE4, UPDATE4, CREATE6, UPDATE6 = range(6)
# What is wrong with records of a peer.
FINE, NO_SUCH_SLOT, NO_GENERATION, NOT_IPV4, NO_FAMILY, LONG_ADDRESS = range(6)

_AF_INET, _AF_INET6 = record.AF_INET, record.AF_INET6
_CREATE4, _UPDATE4, _CREATE6, _UPDATE6, _ENDED, _NOTHING = CREATE4, UPDATE4, CREATE6, UPDATE6, ENDED, NOTHING
_NO_SUCH_SLOT, _NO_GENERATION, _NOT_IPV4, _NO_FAMILY, _LONG_ADDRESS = (
    NO_SUCH_SLOT, NO_GENERATION, NOT_IPV4, NO_FAMILY, LONG_ADDRESS,
)  # fmt: skip
_LEAST_NS, _PER_OCTAVE, _LONG_NS = 1_000, 4, 1 << 54  # of the histogram
_HALF = 0xFFFFFFFF
_AHEAD = 64  # rows fetched at once


def _room(enough: bool) -> None:
    """Raise IndexError where an array is shorter than what is to be done with it."""
    if not enough:
        raise IndexError("arrays of sizes that do not fit")


def _inside(slots: I64, limit: int) -> None:
    """Raise IndexError unless all of n slots are from 0 to before ``limit``."""
    outside = 0
    for i in range(slots.shape[0]):
        outside |= slots[i] < 0 or slots[i] >= limit
    if outside:
        raise IndexError(f"a slot that is not among {limit}")


class Telling:
    """What one peer has been told of the rows of a table."""

    def __init__(self, words: U64, shared: U8, told: U8) -> None:
        """``shared``: rows that peers are told of; ``told``: where this peer may believe a session to be."""
        _room(words.shape[0] == shared.shape[0] == told.shape[0] and words.shape[1] == 18)
        self.words, self.shared, self.told = words, shared, told
        self.fetched = 0

    def fetch(self, slots: I64, first: int) -> None:
        """Touch the next rows: the processor waits for all of them at once instead of for each in its turn."""
        seen = self.fetched
        for i in range(first, min(first + _AHEAD, slots.shape[0])):
            slot = slots[i]
            seen ^= self.words[slot, 0] ^ self.words[slot, 8] ^ self.words[slot, 17]
            seen ^= self.shared[slot] ^ self.told[slot]
        self.fetched = seen

    def sort(self, slots: I64, fresh: U8, kinds: U8, counts: I64) -> None:
        """What the peer is to hear of n slots (``kinds``), from now on counted as told; how many of each in ``counts``.

        ``fresh``: it may never have heard of this generation.
        """
        n = slots.shape[0]
        _inside(slots, self.words.shape[0])
        _room(fresh.shape[0] == n and kinds.shape[0] >= n and counts.shape[0] >= 6)
        for k in range(6):
            counts[k] = 0
        for i in range(slots.shape[0]):
            if i % _AHEAD == 0:
                self.fetch(slots, i)
            slot = slots[i]
            told = self.told[slot]
            self.told[slot] = self.shared[slot]
            if not self.shared[slot]:
                kind = _ENDED if told else _NOTHING  # one that came and went between two frames is not worth a word
            elif self.words[slot, 1] & 0xFFFF == (_AF_INET | _AF_INET << 8):
                kind = _CREATE4 if fresh[i] or not told else _UPDATE4
            else:
                kind = _CREATE6 if fresh[i] or not told else _UPDATE6
            kinds[i] = kind
            counts[kind] += 1

    def pack4(self, slots: I64, out: U64) -> None:
        """Rows of n slots as records of kind 4: (n, 12) words."""
        _inside(slots, self.words.shape[0])
        _room(out.shape[0] >= slots.shape[0] and out.shape[1] == 12)
        for i in range(slots.shape[0]):
            slot = slots[i]
            out[i, 0] = self.words[slot, 0]
            out[i, 1] = self.words[slot, 1]
            out[i, 2] = (self.words[slot, 2] & _HALF) | self.words[slot, 4] << 32
            out[i, 3] = (self.words[slot, 6] & _HALF) | self.words[slot, 8] << 32
            for w in range(8):
                out[i, 4 + w] = self.words[slot, 10 + w]

    def pack6(self, slots: I64, out: U64) -> None:
        """Rows of n slots as records of kind 6: (n, 18) words."""
        _inside(slots, self.words.shape[0])
        _room(out.shape[0] >= slots.shape[0] and out.shape[1] == 18)
        for i in range(slots.shape[0]):
            for w in range(18):
                out[i, w] = self.words[slots[i], w]


def unpack4(items: U64, slots: int, out: U64) -> int:
    """Records of kind 4, (n, 12) words, as records, (n, 18); what is wrong with them."""
    _room(items.shape[1] == 12 and out.shape[0] >= items.shape[0] and out.shape[1] == 18)
    for i in range(items.shape[0]):
        if items[i, 1] & 0xFFFF != (_AF_INET | _AF_INET << 8):
            return _NOT_IPV4
        if items[i, 0] & _HALF >= slots:
            return _NO_SUCH_SLOT
        if items[i, 0] >> 32 == 0:
            return _NO_GENERATION
        out[i, 0] = items[i, 0]
        out[i, 1] = items[i, 1]
        out[i, 2] = items[i, 2] & _HALF
        out[i, 3] = 0
        out[i, 4] = items[i, 2] >> 32
        out[i, 5] = 0
        out[i, 6] = items[i, 3] & _HALF
        out[i, 7] = 0
        out[i, 8] = items[i, 3] >> 32
        out[i, 9] = 0
        for w in range(8):
            out[i, 10 + w] = items[i, 4 + w]
    return FINE


def unpack6(items: U64, slots: int, out: U64) -> int:
    """Records of kind 6, (n, 18) words, as records; what is wrong with them."""
    _room(items.shape[1] == out.shape[1] == 18 and out.shape[0] >= items.shape[0])
    for i in range(items.shape[0]):
        af, af_out = items[i, 1] & 0xFF, (items[i, 1] >> 8) & 0xFF
        if (af != _AF_INET and af != _AF_INET6) or (af_out != _AF_INET and af_out != _AF_INET6):
            return _NO_FAMILY
        if af == _AF_INET and (items[i, 2] >> 32 | items[i, 3] | items[i, 4] >> 32 | items[i, 5]):
            return _LONG_ADDRESS
        if af_out == _AF_INET and (items[i, 6] >> 32 | items[i, 7] | items[i, 8] >> 32 | items[i, 9]):
            return _LONG_ADDRESS
        if items[i, 0] & _HALF >= slots:
            return _NO_SUCH_SLOT
        if items[i, 0] >> 32 == 0:
            return _NO_GENERATION
        for w in range(18):
            out[i, w] = items[i, w]
    return FINE


def rising(words: U64) -> bool:
    """Whether the slots of n records go up, so that none stands there twice."""
    _room(words.shape[1] > 0)
    for i in range(1, words.shape[0]):
        if words[i, 0] & _HALF <= words[i - 1, 0] & _HALF:
            return False
    return True


def tally(since_ns: I64, now_ns: int, counts: I64) -> int:
    """Count how long ago n times (0: none) were in ``counts``, see histogram.py; the longest."""
    longest = 0
    _room(counts.shape[0] > 0)
    for i in range(since_ns.shape[0]):
        if since_ns[i] <= 0:
            continue
        took = now_ns - since_ns[i]
        longest = max(longest, took)
        # Four buckets an octave: the octave is where the highest bit stands, the quarter by comparison.
        scaled = (took << 8) // _LEAST_NS if took < _LONG_NS else _LONG_NS
        bucket = 0
        while scaled >= 512:
            scaled >>= 1
            bucket += _PER_OCTAVE
        if scaled >= 431:  # 256 times the root of the root of 8
            bucket += 3
        elif scaled >= 363:
            bucket += 2
        elif scaled >= 305:
            bucket += 1
        counts[bucket if bucket < counts.shape[0] else counts.shape[0] - 1] += 1
    return longest
