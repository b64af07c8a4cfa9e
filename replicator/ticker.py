# SPDX-License-Identifier: GPL-2.0-or-later
"""Pauses shorter than a millisecond in an asyncio loop.

asyncio rounds every wait up to whole milliseconds (Python 3.11, selectors.py: EpollSelector.select), so a pause of
0.2 ms becomes one of more than 1 ms. A timerfd (timerfd_create(2)) is as exact as the kernel's timers and wakes the
loop like any other file.
"""

import asyncio
import ctypes
import os
from collections.abc import Callable
from types import TracebackType
from typing import Self

_CLOCK_MONOTONIC = 1
_libc = ctypes.CDLL(None, use_errno=True)
_SECOND_NS = 1_000_000_000


class _Itimerspec(ctypes.Structure):
    """struct itimerspec of <time.h>: interval, then first expiry, each in seconds and nanoseconds."""

    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns")]


class Ticker:
    """``with Ticker() as ticker: await ticker.run(turn)`` inside a running loop; for one task at a time.

    Raises OSError where the kernel gives no timer.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._spec = _Itimerspec(0, 0, 0, 0)
        self._turn: Callable[[], float | None] | None = None
        self._over: asyncio.Future[None] | None = None
        self._fd = _libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)  # TFD_* are the same numbers
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), f"timerfd_create: {os.strerror(ctypes.get_errno())}")
        self._loop.add_reader(self._fd, self._on_time)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the timer back."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    async def run(self, turn: Callable[[], float | None]) -> None:
        """Call ``turn``, and again after as many seconds at the earliest as it answers; at once, but not before others
        had their turn, if that is 0. Return when it answers None, and raise what it raises.

        It is called by the loop itself: to wake a task for it would take one more round of the loop.
        """
        self._turn, self._over = turn, self._loop.create_future()
        self._loop.call_soon(self._next, self._over)
        try:
            await self._over
        finally:
            self._turn = self._over = None

    def _next(self, over: "asyncio.Future[None]") -> None:
        if self._turn is None or over is not self._over or over.done():
            return  # it was cancelled in between
        try:
            seconds = self._turn()
            if seconds is None:
                over.set_result(None)
            elif (wait_ns := int(seconds * _SECOND_NS)) <= 0:
                self._loop.call_soon(self._next, over)
            else:
                self._set(wait_ns)
        except Exception as error:
            over.set_exception(error)

    def _set(self, wait_ns: int) -> None:
        self._spec.first_s, self._spec.first_ns = divmod(wait_ns, _SECOND_NS)
        if _libc.timerfd_settime(self._fd, 0, ctypes.byref(self._spec), None) < 0:
            raise OSError(ctypes.get_errno(), f"timerfd_settime: {os.strerror(ctypes.get_errno())}")

    def _on_time(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return  # it was set anew in between
        if self._over is not None:
            self._next(self._over)
