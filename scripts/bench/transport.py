# SPDX-License-Identifier: GPL-2.0-or-later
"""The transports side by side, between two processes of this machine: medians of several runs, and ratios to tcp.

For each transport, with and without proof of names and encryption:
  - throughput of frames as links make them (64 KiB) and of small ones (1 KiB, 64 at a time), in MB/s of wall time;
  - processor time of both sides together for a MB, which other work on the machine disturbs less;
  - the time of a question of 64 bytes and its answer, p50 and p99.

Rounds go through all transports in turn, so that a busy moment hits them alike. rdma is measured where there is a
device, and in the virtual machine with tests/vm/run -- scripts/bench/transport rdma tcp --mib 4 --trips 200.
"""

import argparse
import asyncio
import itertools
import multiprocessing
import os
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import NamedTuple

from replicator import keys
from replicator.seal import Party
from replicator.transport.choose import Mode, Transport, Where, parse
from replicator.transport.interface import Connection, PeerUnreachable
from replicator.transport.tls import Tls

MB = 1_000_000
MIB = 1 << 20
NAMES = ("tcp", "tcp+tls", "shm", "shm+tls", "rdma", "rdma+tls")
LARGE, SMALL, SMALL_AT_ONCE = 64 << 10, 1 << 10, 64
TRIP_BYTES = 64
_ORDER = struct.Struct("<BQ")  # what to do: take so many bytes, or answer so many questions
_DONE = struct.Struct("<Q")  # processor time it took, ns
TAKE, ANSWER = 1, 2


class Figures(NamedTuple):
    """Of one transport in one round."""

    large_mb_s: float
    small_mb_s: float
    cpu_ms_mb: float
    p50_us: float
    p99_us: float


def transport(name: str, node: str, directory: Path) -> Transport:
    """The end of ``node``."""
    mode, _, secured = name.partition("+")
    if not secured:
        return Transport(Mode(mode))
    return Transport(Mode(mode), Tls.load(directory / node), Party(node, 1))


def where_of(name: str, text: str, *, listen: bool = False) -> Where:
    return parse(Mode(name.partition("+")[0]), text, listen=listen)


# --- the other process -----------------------------------------------------------------------------------------------


def serve(names: list[str], directory: Path, pipe: Pipe) -> None:
    """Listens on every transport and does what it is told, until it is killed."""
    asyncio.run(_serve(names, directory, pipe))


async def _serve(names: list[str], directory: Path, pipe: Pipe) -> None:
    tasks = []
    addresses = {}
    for name in names:
        text = f"shm:{directory}/{name}" if name.startswith("shm") else "127.0.0.1:0"
        listener = transport(name, "listener", directory).listener(where_of(name, text, listen=True))
        await listener.start()
        addresses[name] = listener.address

        async def accept(listener=listener) -> None:  # type: ignore[no-untyped-def]
            while True:
                connection = await listener.accept()
                await obey(connection)

        tasks.append(asyncio.create_task(accept()))
    pipe.send(addresses)
    await asyncio.gather(*tasks)


async def obey(connection: Connection) -> None:
    stream = Stream(connection)
    while order := await stream.take(_ORDER.size):
        what, count = _ORDER.unpack(order)
        began = time.process_time_ns()
        if what == TAKE:
            await stream.skip(count)
        else:
            for _ in range(count):
                await connection.send([await stream.take(TRIP_BYTES)])
        await connection.send([_DONE.pack(time.process_time_ns() - began)])
    await connection.close()


class Stream:
    """A connection's bytes by count."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._data = b""

    async def take(self, count: int) -> bytes:
        """The next bytes; b"" when the peer closed."""
        while len(self._data) < count:
            piece = await self._connection.receive()
            if not piece:
                return b""
            self._data += piece
        taken, self._data = self._data[:count], self._data[count:]
        return taken

    async def skip(self, count: int) -> None:
        """Let bytes pass."""
        while count > len(self._data):
            count -= len(self._data)
            self._data = await self._connection.receive()
        self._data = self._data[count:]


# --- this one --------------------------------------------------------------------------------------------------------


async def measure(name: str, address: str, directory: Path, size: int, trips: int) -> Figures:
    """One round of one transport."""
    connection = await dial(name, address, directory)
    answers = Stream(connection)
    try:
        await throughput(connection, answers, MIB, LARGE, 1)  # warm
        large_s, large_ns = await throughput(connection, answers, size, LARGE, 1)
        small_s, _ = await throughput(connection, answers, size // 4, SMALL, SMALL_AT_ONCE)
        p50, p99 = await round_trips(connection, answers, trips)
        return Figures(size / MB / large_s, size / 4 / MB / small_s, large_ns / 1e6 / (size / MB), p50, p99)
    finally:
        await connection.close()


async def dial(name: str, address: str, directory: Path) -> Connection:
    dialer = transport(name, "dialer", directory).dialer(where_of(name, address))
    for _ in range(100):
        try:
            return await dialer.dial()
        except PeerUnreachable:
            await asyncio.sleep(0.05)
    return await dialer.dial()


async def throughput(
    connection: Connection, answers: Stream, size: int, frame_bytes: int, at_once: int
) -> tuple[float, int]:
    """Seconds, and processor time of both sides in ns."""
    frames = [os.urandom(frame_bytes) for _ in range(at_once)]
    rounds = size // (frame_bytes * at_once)
    began_ns, began = time.process_time_ns(), time.perf_counter()
    await connection.send([_ORDER.pack(TAKE, rounds * frame_bytes * at_once)])
    for _ in range(rounds):
        await connection.send(frames)
    (theirs_ns,) = _DONE.unpack(await answers.take(_DONE.size))
    return time.perf_counter() - began, time.process_time_ns() - began_ns + theirs_ns


async def round_trips(connection: Connection, answers: Stream, count: int) -> tuple[float, float]:
    """p50 and p99 in us."""
    question = os.urandom(TRIP_BYTES)
    times = []
    await connection.send([_ORDER.pack(ANSWER, count)])
    for _ in range(count):
        began = time.perf_counter_ns()
        await connection.send([question])
        await answers.take(TRIP_BYTES)
        times.append(time.perf_counter_ns() - began)
    await answers.take(_DONE.size)
    cuts = statistics.quantiles(times, n=100)
    return cuts[49] / 1000, cuts[98] / 1000


@contextmanager
def other_process(names: list[str], directory: Path) -> Iterator[dict[str, str]]:
    """Addresses by transport. Spawned, as no RDMA device may be open where a process forks."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(names, directory, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    except EOFError:
        raise SystemExit("the other process did not start") from None
    finally:
        process.kill()
        process.join()


def here() -> list[str]:
    """The transports that this machine has."""
    devices = Path("/sys/class/infiniband")
    rdma = devices.is_dir() and any(devices.iterdir())
    return [name for name in NAMES if rdma or not name.startswith("rdma")]


def show(results: dict[str, list[Figures]]) -> None:
    medians = {
        name: Figures(*(statistics.median(column) for column in zip(*rounds, strict=True)))
        for name, rounds in results.items()
    }
    base = medians.get("tcp")
    print(f"{'':10}{'64 KiB frames':>22}{'1 KiB frames':>22}{'processor time':>22}{'round trip':>30}")
    for name, one in medians.items():
        cells = [f"{one.large_mb_s:8.0f} MB/s", f"{one.small_mb_s:8.0f} MB/s", f"{one.cpu_ms_mb:8.2f} ms/MB"]
        if base:
            ratios = [
                one.large_mb_s / base.large_mb_s, one.small_mb_s / base.small_mb_s, one.cpu_ms_mb / base.cpu_ms_mb
            ]  # fmt: skip
            cells = [f"{cell} {ratio:5.2f}x" for cell, ratio in zip(cells, ratios, strict=True)]
        trip = f"{one.p50_us:8.0f} us, p99 {one.p99_us:6.0f} us"
        if base:
            trip += f" {one.p50_us / base.p50_us:5.2f}x"
        print(f"{name:10}" + "".join(f"{cell:>22}" for cell in cells) + f"{trip:>30}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="TRANSPORT", help=f"any of {', '.join(NAMES)}; all that are here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--mib", type=int, default=256, help="sent in large frames in a round, a quarter of it in small"
    )
    parser.add_argument("--trips", type=int, default=2000, help="questions in a round")
    options = parser.parse_args()
    names = options.names or here()
    if unknown := set(names) - set(NAMES):
        sys.exit(f"no such transport: {', '.join(sorted(unknown))}")
    results: dict[str, list[Figures]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="dpvs-probe-bench.") as made:
        directory = Path(made)
        keys.init_authority(directory / "authority", "bench")
        for node in ("dialer", "listener"):
            keys.issue(directory / "authority", node, directory / node)
        with other_process(names, directory) as addresses:
            for _, name in itertools.product(range(options.rounds), names):
                one = measure(name, addresses[name], directory, options.mib * MIB, options.trips)
                results[name].append(asyncio.run(one))
    print(f"medians of {options.rounds} rounds, {options.mib} MiB, {options.trips} questions; ratios to tcp")
    show(results)


if __name__ == "__main__":
    main()
