# SPDX-License-Identifier: GPL-2.0-or-later
"""When compressing pays, measured per connection. No clock: time is an argument."""

SECOND = 1_000_000_000

SLOW_BYTES_PER_S = 150 << 20  # a little more than 1 Gbit/s; LZ4 packs sessions several times as fast
JUDGE_NS = 20_000_000  # of being held back, before the link is judged anew
UNPAID_FRAMES = 8  # that did not shrink, one after the other, ...
PAUSE_FRAMES = 256  # ... and so many are not tried


class Pays:
    """Whether compressing pays: when the link, not we, is what holds us back, and slower than LZ4 makes up for."""

    def __init__(self, setting: bool | None) -> None:
        """``setting``: True or False decide, None measures."""
        self._setting = setting
        self.bytes_per_s = 0  # of the link, while it held us back; 0: it never did
        self._since_ns: int | None = None  # held back, and what came since then counted, from here on
        self._bytes = self._busy_ns = 0
        self._unpaid = self._pause = 0

    @property
    def on(self) -> bool:
        """Compress the next frame."""
        if self._setting is not None:
            return self._setting
        return 0 < self.bytes_per_s < SLOW_BYTES_PER_S and not self._pause

    def waiting(self, now_ns: int, *, held_back: bool) -> None:
        """After each round of sending: is there more, and no room for it?"""
        if not held_back:
            self._since_ns = None
        elif self._since_ns is None:
            self._since_ns = now_ns

    def acknowledged(self, size: int, now_ns: int) -> None:
        """Bytes of frames that arrived."""
        if self._since_ns is None:
            return
        self._bytes += size
        self._busy_ns += max(0, now_ns - self._since_ns)
        self._since_ns = now_ns
        if self._busy_ns >= JUDGE_NS:
            self.bytes_per_s = max(1, self._bytes * SECOND // self._busy_ns)
            self._bytes = self._busy_ns = 0

    def packed(self, *, smaller: bool) -> None:
        """What became of a frame of sessions."""
        if self._pause:
            self._pause -= 1
        elif self.on:
            self._unpaid = 0 if smaller else self._unpaid + 1
            if self._unpaid >= UNPAID_FRAMES:
                self._unpaid, self._pause = 0, PAUSE_FRAMES

    def reset(self) -> None:
        """Another connection: perhaps another way."""
        self._since_ns = None
        self.bytes_per_s = self._bytes = self._busy_ns = self._unpaid = self._pause = 0
