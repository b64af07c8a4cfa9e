# SPDX-License-Identifier: GPL-2.0-or-later
"""Pauses shorter than a millisecond."""

import asyncio
import os
import time

import pytest

from replicator.ticker import Ticker


def test_a_pause_is_no_shorter_and_lets_others_run() -> None:
    async def work() -> int:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        running = asyncio.create_task(other())
        with Ticker() as ticker:
            for seconds in (0.0002, 0.003, 0.0, -1.0):
                began = time.monotonic()
                await ticker.pause(seconds)
                assert time.monotonic() - began >= seconds
        running.cancel()
        return turns

    assert asyncio.run(work()) > 3


def test_a_pause_that_is_cancelled_leaves_the_timer_usable() -> None:
    async def work() -> None:
        with Ticker() as ticker:
            waiting = asyncio.create_task(ticker.pause(60))
            await asyncio.sleep(0.001)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await asyncio.wait_for(ticker.pause(0.001), 5)

    asyncio.run(work())


def test_it_gives_its_file_back() -> None:
    async def work() -> None:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            with Ticker():
                pass
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(work())
