# SPDX-License-Identifier: GPL-2.0-or-later
"""When compressing pays, measured per connection. No clock: time is an argument."""

SECOND = 1_000_000_000


class Pays:
    """Whether compressing pays: when the link, not we, is what holds us back, and slower than LZ4 makes up for.

    ``setting``: True or False decide, None measures.
    """

    SLOW_BYTES_PER_S = 40 << 20  # LZ4 packs ten times as much; a peer's own work hardly looks slower than this
    UNPAID = 8  # frames in a row that did not shrink, then a pause
    PAUSE = 256  # frames

    def __init__(self, setting: bool | None) -> None:
        self._setting = setting
        self.bytes_per_s = 0.0  # acknowledged while we were held back; 0: never were
        self._since_ns: int | None = None
        self._unpaid = self._pause = 0

    @property
    def on(self) -> bool:
        """Compress the next frame."""
        if self._setting is not None:
            return self._setting
        return 0 < self.bytes_per_s < self.SLOW_BYTES_PER_S and not self._pause

    def waiting(self, now_ns: int, *, held_back: bool) -> None:
        """After each round of sending: is there more, and no room for it?"""
        if not held_back:
            self._since_ns = None
        elif self._since_ns is None:
            self._since_ns = now_ns

    def acknowledged(self, size: int, now_ns: int) -> None:
        """Bytes that arrived."""
        if self._since_ns is not None and now_ns > self._since_ns:
            rate = size * SECOND / (now_ns - self._since_ns)
            self.bytes_per_s = rate if self.bytes_per_s == 0 else 0.9 * self.bytes_per_s + 0.1 * rate
            self._since_ns = now_ns

    def packed(self, *, smaller: bool) -> None:
        """What became of a frame while ``on``."""
        if self._pause:
            self._pause -= 1
        elif self.on:
            self._unpaid = 0 if smaller else self._unpaid + 1
            if self._unpaid >= self.UNPAID:
                self._unpaid, self._pause = 0, self.PAUSE

    def reset(self) -> None:
        """Another connection: perhaps another way."""
        self._since_ns, self.bytes_per_s, self._unpaid, self._pause = None, 0.0, 0, 0
