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
        pauses = [0.0002, 0.003, 0.0, -1.0]
        called: list[tuple[float, int]] = []

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        def turn() -> float | None:
            called.append((time.monotonic(), turns))
            return pauses[len(called) - 1] if len(called) <= len(pauses) else None

        running = asyncio.create_task(other())
        with Ticker() as ticker:
            await ticker.run(turn)
        running.cancel()
        assert len(called) == 5
        for seconds, (before, seen), (after, then) in zip(pauses, called, called[1:], strict=False):
            assert after - before >= seconds
            assert then > seen
        return turns

    assert asyncio.run(work()) > 3


def test_what_a_turn_raises_ends_it() -> None:
    async def work() -> None:
        with Ticker() as ticker:
            with pytest.raises(ZeroDivisionError):
                await ticker.run(lambda: 1 / 0)
            await asyncio.wait_for(ticker.run(lambda: None), 5)

    asyncio.run(work())


def test_one_that_is_cancelled_leaves_the_timer_usable() -> None:
    async def work() -> None:
        with Ticker() as ticker:
            for first in (60.0, 0.0):
                turns = 0

                def turn(first: float = first) -> float:
                    nonlocal turns
                    turns += 1
                    return first

                waiting = asyncio.create_task(ticker.run(turn))
                await asyncio.sleep(0.001)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                before = turns
                answers = iter((0.001, None))
                await asyncio.wait_for(ticker.run(lambda answers=answers: next(answers)), 5)  # type: ignore[misc]
                assert turns == before > 0

    asyncio.run(work())


def test_it_gives_its_file_back() -> None:
    async def work() -> None:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            with Ticker():
                pass
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(work())
