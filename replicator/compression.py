# SPDX-License-Identifier: GPL-2.0-or-later
"""When compressing pays, tried and measured per connection. No clock: time is an argument.

Rules
- What counts is how fast *sessions* arrive, in bytes before compression, while the window holds us back. A link that
  never does that is left alone, and so is one faster than LZ4 could help.
- The way must be what is slow. A receiver that is busy looks just like a slow link from here, and LZ4 would only make a
  busy processor busier. So the transport says where the bytes are: less than half of them on the way, or the peer's
  window closed for more than half of the time, and it is not the way.
- Else it is tried: LZ4 on, what is still on its way from before let through, the rate measured again. It stays on if
  that was faster by a seventh: where the receiver is slow, not the link, it is not, and goes off again.
- The other way is tried again now and then, seldom if it never pays, as links and loads change.
"""

SECOND = 1_000_000_000

SLOW_BYTES_PER_S = 60 << 20  # half of 1 Gbit/s: on faster links LZ4 costs the sender more time than it saves the link
JUDGE_NS = 50_000_000  # of being held back, for one measurement
GAIN = 8, 7  # that much faster is better
HALF = 2
AGAIN_NS, SELDOM_NS = 10 * SECOND, 300 * SECOND  # until the next trial, after one that failed: doubled up to ...
KEEP_NS = 60 * SECOND  # after one that paid
UNPAID_FRAMES = 8  # that did not shrink, one after the other, ...
PAUSE_FRAMES = 256  # ... and so many are not tried


class Pays:
    """Whether compressing pays on this connection."""

    def __init__(self, setting: bool | None) -> None:
        """``setting``: True or False decide, None measures."""
        self._setting = setting
        self.reset()

    def reset(self) -> None:
        """Another connection: perhaps another way."""
        self.bytes_per_s = 0  # of sessions, uncompressed, as last measured; 0: we were never held back
        self.trials = 0
        self._on = False
        self._before: int | None = None  # the rate without the change that is tried now
        self._due_ns = 0  # of the next trial
        self._wait_ns = AGAIN_NS
        self._old_bytes: int | None = None  # sent before the last change, to be let through; None: never held back yet
        self._since_ns: int | None = None  # held back, and what came since then counted, from here on
        self._wire = self._plain = self._busy_ns = 0
        self._open_total_ns: int | None = None  # as last told; None: the transport does not know
        self._open_ns = self._way_bytes = self._flight_bytes = 0  # while we were held back; bytes: summed over samples
        self._unpaid = self._pause = 0

    @property
    def on(self) -> bool:
        """Compress the next frame."""
        return self._on and not self._pause if self._setting is None else self._setting

    @property
    def held_back(self) -> bool:
        """There is more to send than the way takes, and what it takes is being measured."""
        return self._since_ns is not None and self._setting is None

    def waiting(self, now_ns: int, *, held_back: bool) -> None:
        """After each round of sending: is there more, and no room for it?"""
        if not held_back:
            self._since_ns = None
        elif self._since_ns is None:
            self._since_ns = now_ns

    def on_the_way(self, size: int, open_ns: int, in_flight: int) -> None:
        """Where the ``in_flight`` bytes are that are not acknowledged: ``size`` of them on the way. ``open_ns``: how
        long since the connection began there were any, and not for want of room at the peer.
        """
        if self._open_total_ns is not None and self._since_ns is not None:
            self._open_ns += open_ns - self._open_total_ns
            self._way_bytes += size
            self._flight_bytes += in_flight
        self._open_total_ns = open_ns

    def acknowledged(self, wire: int, plain: int, in_flight: int, now_ns: int) -> None:
        """Frames arrived: their bytes, their bytes before compression, and the bytes that are still on their way."""
        if self._old_bytes is not None:
            self._old_bytes -= wire
        if self._since_ns is None or self._setting is not None:
            return
        if self._old_bytes is None:
            self._old_bytes = in_flight  # buffers on the way were empty: what filled them says nothing
        spent = max(0, now_ns - self._since_ns)
        self._since_ns = now_ns
        if self._old_bytes > 0:
            self._open_ns = self._way_bytes = self._flight_bytes = 0
            return
        self._wire += wire
        self._plain += plain
        self._busy_ns += spent
        if self._busy_ns >= JUDGE_NS:
            link = self._wire * SECOND // self._busy_ns
            self.bytes_per_s = max(1, self._plain * SECOND // self._busy_ns)
            slow = link < SLOW_BYTES_PER_S
            if self._open_total_ns is not None:
                slow &= self._open_ns * HALF >= self._busy_ns and self._way_bytes * HALF >= self._flight_bytes
            self._wire = self._plain = self._busy_ns = 0
            self._open_ns = self._way_bytes = self._flight_bytes = 0
            self._judge(slow, in_flight, now_ns)

    def packed(self, *, smaller: bool) -> None:
        """What became of a frame of sessions."""
        if self._pause:
            self._pause -= 1
        elif self.on:
            self._unpaid = 0 if smaller else self._unpaid + 1
            if self._unpaid >= UNPAID_FRAMES:
                self._unpaid, self._pause = 0, PAUSE_FRAMES

    def _judge(self, slow: bool, in_flight: int, now_ns: int) -> None:
        if self._before is None:
            if now_ns >= self._due_ns and (self._on or slow):
                self.trials += 1
                self._before = self.bytes_per_s
                self._switch(in_flight)
            return
        without, with_ = (self._before, self.bytes_per_s) if self._on else (self.bytes_per_s, self._before)
        self._before = None
        pays = with_ * GAIN[1] > without * GAIN[0]
        if pays != self._on:
            self._switch(in_flight)
        if pays:
            self._due_ns, self._wait_ns = now_ns + KEEP_NS, AGAIN_NS
        else:
            self._due_ns, self._wait_ns = now_ns + self._wait_ns, min(2 * self._wait_ns, SELDOM_NS)

    def _switch(self, in_flight: int) -> None:
        self._on = not self._on
        self._old_bytes = in_flight
        self._unpaid = self._pause = 0
