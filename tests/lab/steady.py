# SPDX-License-Identifier: GPL-2.0-or-later
"""Hold N TCP echo connections through a load balancer and report which survive.

usage: python -m tests.lab.steady HOST PORT [--connections N] [--seconds S] [--interval S] [--stall S] [--report FILE]

Each connection sends a numbered line every interval and must get the very same bytes back. "ready" is printed when all
are open and have exchanged their first line. SIGTERM ends the run early, as if its time were over. At the end one line
of JSON goes to standard output: of all connections, how many are unopened, alive, reset (closed by the other side),
stalled (no answer for --stall seconds) and corrupted (a wrong byte); lines exchanged; bytes; and the longest pause
between a line and its answer in milliseconds, over the connections that are alive. Exit 0 only if all are alive.
"""

import argparse
import asyncio
import json
import resource
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

OUTCOMES = ("unopened", "alive", "reset", "stalled", "corrupted")


@dataclass
class Options:
    host: str
    port: int
    connections: int = 1
    seconds: float = 20.0
    interval: float = 0.2
    stall: float = 10.0
    opening: float = 15.0
    close: bool = True


@dataclass
class Report:
    connections: int
    outcomes: Counter[str] = field(default_factory=Counter)
    lines: int = 0
    bytes: int = 0
    longest_pause_ms: float = 0.0

    def as_json(self) -> dict[str, float]:
        outcomes = {name: self.outcomes[name] for name in OUTCOMES}
        return {
            "connections": self.connections,
            **outcomes,
            "lines": self.lines,
            "bytes": self.bytes,
            "longest_gap_ms": round(self.longest_pause_ms, 1),
        }


class Steady:
    """The connections, all in the calling thread's network namespace."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.report = Report(options.connections)
        self._over = asyncio.Event()
        self._open = 0
        self._all_open = asyncio.Event()

    def finish(self) -> None:
        self._over.set()

    async def run(self) -> Report:
        options = self.options
        tasks = [asyncio.create_task(self._connection(number)) for number in range(options.connections)]
        waiter = asyncio.create_task(self._all_open.wait())
        await asyncio.wait([waiter], timeout=options.opening + 1)
        waiter.cancel()
        print("ready", flush=True)
        end = asyncio.get_running_loop().call_later(options.seconds, self._over.set)
        await asyncio.gather(*tasks)
        end.cancel()
        return self.report

    def _settled(self) -> None:
        self._open += 1
        if self._open == self.options.connections:
            self._all_open.set()

    async def _connection(self, number: int) -> None:
        options = self.options
        try:
            reader, writer = await asyncio.wait_for(
                asyncio.open_connection(options.host, options.port), options.opening
            )
        except (OSError, TimeoutError):
            self.report.outcomes["unopened"] += 1
            self._settled()
            return
        try:
            outcome, worst = await self._exchange(number, reader, writer)
        finally:
            writer.close()
        self.report.outcomes[outcome] += 1
        if outcome == "alive":
            self.report.longest_pause_ms = max(self.report.longest_pause_ms, worst * 1e3)

    async def _exchange(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[str, float]:
        worst, count = 0.0, 0
        try:
            while True:
                line = b"%06d:%09d\n" % (number, count)
                sent = time.monotonic()
                writer.write(line)
                answer = await asyncio.wait_for(reader.readexactly(len(line)), self.options.stall)
                worst = max(worst, time.monotonic() - sent)
                if answer != line:
                    return "corrupted", worst
                count += 1
                self.report.lines += 1
                self.report.bytes += len(line)
                if count == 1:
                    self._settled()
                if self._over.is_set():
                    return "alive", worst
                try:
                    await asyncio.wait_for(self._over.wait(), self.options.interval)
                except TimeoutError:
                    continue
        except TimeoutError:
            outcome = "stalled"
        except (OSError, asyncio.IncompleteReadError):
            outcome = "reset"
        if count == 0:
            self._settled()
        return outcome, worst


async def _main(options: Options) -> int:
    steady = Steady(options)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, steady.finish)
    report = await steady.run()
    print(json.dumps(report.as_json()), flush=True)
    return 0 if report.outcomes["alive"] == options.connections else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--interval", type=float, default=0.2)
    parser.add_argument("--stall", type=float, default=10)
    parser.add_argument("--opening", type=float, default=15, help="how long a connection may take to open")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return asyncio.run(_main(Options(**vars(parser.parse_args()))))


if __name__ == "__main__":
    sys.exit(main())
