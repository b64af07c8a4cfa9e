# SPDX-License-Identifier: GPL-2.0-or-later
"""Two nodes, 20 000 changes a second, the link between them cut, stalled and reset at random for a minute: then both
tables are equal, and neither node's memory has grown.

``DPVS_PROBE_KILLING_S``: another time than 60 s; ``DPVS_PROBE_KILLING_SEED``: other troubles.
"""

import asyncio
import contextlib
import json
import os
import random
import socket
import struct
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from replicator import keys

ROOT = Path(__file__).parents[2]
SECONDS = float(os.environ.get("DPVS_PROBE_KILLING_S", "60"))
SEED = int(os.environ.get("DPVS_PROBE_KILLING_SEED", "1"))
SLOTS, PER_S = 16_384, 20_000
WARM_S = 10.0
GROWTH_BYTES = 24 << 20  # window, buffers of both sides, the allocator's leftovers
EQUAL_S = 60.0


class Wire:
    """A TCP proxy that can do its worst."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._open = asyncio.Event()
        self._open.set()
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._arrived, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._server.close()
        self.cut(reset=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self, *, reset: bool) -> None:
        """End all connections, with RST or FIN; what is on its way is lost."""
        for pair in self._pairs:
            for writer in pair:
                if reset:
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
        self._pairs.clear()

    def stall(self) -> None:
        """Pass nothing on; ``go_on`` ends it."""
        self._open.clear()

    def go_on(self) -> None:
        self._open.set()

    async def _arrived(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, far_writer)
        self._pairs.add(pair)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pass(source, sink, pair))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, pair: tuple[asyncio.StreamWriter, ...]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                await self._open.wait()
                sink.write(data)
                await sink.drain()
        for writer in pair:
            writer.close()
        self._pairs = {other for other in self._pairs if other is not pair}


class Process:
    """One node."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process, self.port = process, port
        self.rss: list[tuple[float, int]] = []

    @classmethod
    async def start(cls, name: str, directory: Path, per_s: int, *ports: int) -> "Process":
        command = [sys.executable, "-m", "tests.system.killed_node", name, str(directory / name), str(SLOTS)]
        with open(directory / f"{name}.log", "wb") as log:
            process = await asyncio.create_subprocess_exec(
                *command, str(per_s), *map(str, ports), cwd=ROOT, stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE, stderr=log, limit=1 << 20,
            )  # fmt: skip
        assert process.stdout is not None
        return cls(process, int(await process.stdout.readline()))

    async def say(self, word: str = "") -> dict[str, Any]:
        """Its report."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n".encode())
        said: dict[str, Any] = json.loads(await self._process.stdout.readline())
        self.rss.append((time.monotonic(), said["rss_bytes"]))
        return said

    async def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 10)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def growth(self, since: float) -> int:
        """Most memory after ``since``, over what it was then."""
        later = [size for when, size in self.rss if when >= since]
        return max(later) - later[0]


async def trouble(wire: Wire, until: float, counts: Counter[str]) -> None:
    rng = random.Random(SEED)
    while time.monotonic() < until:
        await asyncio.sleep(rng.uniform(0.2, 2.0))
        what = rng.choice(("cut", "reset", "short stall", "long stall"))
        counts[what] += 1
        if "stall" in what:
            wire.stall()
            await asyncio.sleep(rng.uniform(3.2, 5.0) if what == "long stall" else rng.uniform(0.05, 2.5))
            wire.go_on()
        else:
            wire.cut(reset=what == "reset")


async def watch(nodes: list[Process], until: float) -> None:
    while time.monotonic() < until:
        await asyncio.sleep(1)
        for node in nodes:
            await node.say()


@pytest.mark.slow
@pytest.mark.timeout(240 + 3 * SECONDS)
def test_a_link_that_is_killed_again_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys.init_authority(tmp_path / "authority", "east")
    for name in ("a", "b"):
        keys.issue(tmp_path / "authority", name, tmp_path / name)

    async def body() -> str:
        async with contextlib.AsyncExitStack() as stack:
            b = await Process.start("b", tmp_path, 0)
            stack.push_async_callback(b.close)
            wire = Wire(b.port)
            await wire.start()
            stack.push_async_callback(wire.close)
            a = await Process.start("a", tmp_path, PER_S, wire.port)
            stack.push_async_callback(a.close)
            await watch([a, b], time.monotonic() + WARM_S)
            warm, first = time.monotonic(), await a.say()
            await b.say()
            counts: Counter[str] = Counter()
            until = time.monotonic() + SECONDS
            await asyncio.gather(trouble(wire, until, counts), watch([a, b], until))
            took = time.monotonic() - warm
            last = await a.say("calm")
            quiet = time.monotonic()
            while True:
                here, there = await a.say(), await b.say()
                replica = there["replica"]
                if here["digest"] == here["truth"] == replica["digest"] and replica["synced"]:
                    break
                assert time.monotonic() < quiet + EQUAL_S, f"not equal after {EQUAL_S:g} s: {here} {there}"
                await asyncio.sleep(0.1)
            equal = time.monotonic() - quiet
            assert replica["sessions"] == here["sessions"] > SLOTS // 4
            link = here["link"]
            assert link["connections"] > 1
            assert link["protocol_errors"] == 0
            growth = {"a": a.growth(warm), "b": b.growth(warm)}
            assert max(growth.values()) < GROWTH_BYTES, f"{growth}: {a.rss} {b.rss}"
            rate, made = ((last[n] - first[n]) / took for n in ("changes", "made"))
            return (
                f"{made:.0f} changes/s made, {rate:.0f} seen and sent on, {dict(counts)}; {link['connections']} "
                f"connections, {link['full_syncs']} full and {link['partial_syncs']} partial syncs, "
                f"{link['bytes'] / 1e6:.1f} MB; {here['sessions']} sessions equal {equal:.2f} s after the last change; "
                f"memory grew by {growth['a'] >> 10} and {growth['b'] >> 10} KiB, "
                f"to {a.rss[-1][1] >> 20} and {b.rss[-1][1] >> 20} MiB"
            )

    said = asyncio.run(body())
    with capsys.disabled():
        print(f"\n{said}")
