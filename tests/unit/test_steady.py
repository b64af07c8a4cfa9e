# SPDX-License-Identifier: GPL-2.0-or-later
"""The load tool tells apart what can become of a connection: the demo's verdict stands on it."""

import asyncio
import importlib.util
import struct
from collections.abc import Awaitable, Callable
from types import ModuleType

import pytest

from tests.available import ROOT
from tests.lab.load import held_up_s
from tests.lab.steady import Options, Report, Steady

Server = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(4096):
        writer.write(data)


async def corrupt_third(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    count = 0
    while data := await reader.read(4096):
        count += 1
        writer.write(data if count < 3 else data[:-2] + b"?\n")


async def close_third(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    for _ in range(3):
        writer.write(await reader.read(4096))
    writer.close()


async def reset_third(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    for _ in range(3):
        writer.write(await reader.read(4096))
    linger_reset = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(1, 13, linger_reset)
    writer.close()


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(4096):
        pass


def report_of(
    server: Server, *, seconds: float = 60, stall: float = 30, enough: Callable[[], bool] = lambda: False
) -> Report:
    """Of three connections, which end as the server has it; else once there is ``enough``, or after ``seconds``."""

    async def finish(steady: Steady) -> None:
        while not enough():
            await asyncio.sleep(0.005)
        steady.finish()

    async def run() -> Report:
        listening = await asyncio.start_server(server, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        steady = Steady(Options("127.0.0.1", port, 3, seconds=seconds, interval=0.02, stall=stall))
        finishing = asyncio.create_task(finish(steady))
        try:
            return await steady.run()
        finally:
            finishing.cancel()
            listening.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("server", "outcome", "options"),
    [
        (echo, "alive", {"seconds": 0.6}),
        (corrupt_third, "corrupted", {}),
        (close_third, "reset", {}),
        (reset_third, "reset", {}),
        (silent, "stalled", {"stall": 0.4}),
    ],
)
def test_each_outcome(server: Server, outcome: str, options: dict[str, float]) -> None:
    report = report_of(server, **options)  # type: ignore[arg-type]
    assert dict(report.outcomes) == {outcome: 3}
    assert report.as_json()[outcome] == 3


def test_what_cannot_open_is_counted() -> None:
    async def run() -> Report:
        listening = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        listening.close()
        await listening.wait_closed()
        return await Steady(Options("127.0.0.1", port, 2, seconds=0.2)).run()

    assert asyncio.run(run()).as_json()["unopened"] == 2


def test_the_longest_pause_is_that_of_the_living() -> None:
    slow = 0

    async def slow_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal slow
        count = 0
        while data := await reader.read(4096):
            count += 1
            if count == 4:
                await asyncio.sleep(0.25)
                slow += 1
            writer.write(data)

    held_up = held_up_s()
    report = report_of(slow_once, enough=lambda: slow == 3)
    assert report.outcomes["alive"] == 3
    assert report.longest_pause_ms >= 250
    assert report.longest_pause_ms - 1e3 * (held_up_s() - held_up) < 400
    assert report.bytes == report.lines * len(b"000000:000000000\n")


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts/demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcomes(**counts: int) -> dict[str, int]:
    return dict.fromkeys(("unopened", "alive", "reset", "stalled", "corrupted"), 0) | counts


@pytest.mark.parametrize(
    ("without", "with_it", "reason"),
    [
        ({"reset": 10}, {"alive": 10}, None),
        ({"stalled": 10}, {"alive": 10}, None),
        ({"alive": 1, "reset": 9}, {"alive": 10}, "without replication 1 connections survived"),
        ({"reset": 10}, {"alive": 9, "reset": 1}, "only 9 of 10"),
        ({"reset": 10}, {"alive": 9, "corrupted": 1}, "wrong bytes"),
        ({"reset": 9, "corrupted": 1}, {"alive": 10}, "wrong bytes"),
        ({"reset": 9, "unopened": 1}, {"alive": 10}, "did not even open"),
        ({"unopened": 10}, {"unopened": 10}, "only 0 of 10"),
    ],
)
def test_the_demos_verdict(
    demo: ModuleType, without: dict[str, int], with_it: dict[str, int], reason: str | None
) -> None:
    said = demo.verdict(demo.Outcome(10, outcomes(**without)), demo.Outcome(10, outcomes(**with_it)))
    assert not said if reason is None else any(reason in line for line in said)
