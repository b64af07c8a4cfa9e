# SPDX-License-Identifier: GPL-2.0-or-later
"""The governor under a load that swings, on the twin: share of worker time over time, and whether the table is right.

One node of the laboratory; its worker makes sessions at a low rate, then at a high one, and so on. A running attach is
asked ten times a second what share of the worker's time its probes took in the last second, whether they are on, and
how many sessions it has; at the same time its session pool is counted by ourselves. At each end of a phase of low rate
the table is compared with DPVS's own list, tuple by tuple. Printed: the plot, and what was kept.

The worker says how long the longest round of its loop took between two samples, and the kernel how long it waited for a
processor meanwhile. Samples with a switch among them are compared with those without: does taking the probes away, or
putting them on, hold up the worker?

The twin shares two processors with everything else here: it may not reach the high rate; what it made is printed.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np

from probes.memory import SessionPool
from probes.target import Target
from tests.lab.node import Attached, Settings
from tests.lab.pair import Pair, hugepages_for
from tests.lab.run import Run
from tests.lab.twin import TwinNode
from tests.system.test_table import assert_equal

LIFETIME_MS = 200
SAMPLE_S = 0.1
WIDTH, HEIGHT = 100, 10


@dataclass
class Sample:
    """What was seen at one moment."""

    at_s: float
    share: float  # percent of the last second
    attached: bool
    rate: float  # sessions made a second since the sample before
    table: int
    live: int
    switches: int  # so far
    round_us: int  # the worker's longest since the sample before
    waited_us: float  # by the worker, for a processor, since then


class Watch:
    """Takes samples of one node."""

    def __init__(self, node: TwinNode, probe: Attached, pool: SessionPool) -> None:
        self.node, self.probe, self.pool = node, probe, pool
        self.samples: list[Sample] = []
        self._began = self._last = time.monotonic()
        (worker,) = (tid for tid, name in _threads(node.pid) if name.startswith(("dpdk-worker", "lcore-worker")))
        self._schedstat = Path(f"/proc/{node.pid}/task/{worker}/schedstat")
        self._waited_ns = self._waited()
        self._made = self.made()

    def made(self) -> int:
        return sum(worker["synthetic"] for worker in self._workers())

    def _workers(self) -> list[dict[str, Any]]:
        workers: list[dict[str, Any]] = self.node.tell("stats")["workers"]
        return workers

    def _waited(self) -> int:
        """Nanoseconds that the worker has waited for a processor so far."""
        return int(self._schedstat.read_text().split()[1])

    def sample(self) -> None:
        before = int(np.count_nonzero(self.pool.live()))
        status = self.probe.status()
        live = (before + int(np.count_nonzero(self.pool.live()))) // 2
        workers, waited_ns = self._workers(), self._waited()
        now, made = time.monotonic(), sum(worker["synthetic"] for worker in workers)
        probes = status["probes"]
        self.samples.append(
            Sample(
                now - self._began,
                probes["share_percent"],
                probes["attached"],
                (made - self._made) / (now - self._last),
                status["sessions"]["own"],
                live,
                sum(probes["switches"].values()),
                max(worker["longest_round_us"] for worker in workers),
                (waited_ns - self._waited_ns) / 1000,
            )
        )
        self._last, self._made, self._waited_ns = now, made, waited_ns

    def phase(self, seconds: float, rate: int) -> float:
        """Let the worker make sessions for so long; how many a second it made."""
        began, made = time.monotonic(), self.made()
        self.node.tell(f"synthesize {int(rate * seconds)} {rate} {LIFETIME_MS}")
        while time.monotonic() < began + seconds:
            self.sample()
            time.sleep(SAMPLE_S)
        return (self.made() - made) / (time.monotonic() - began)


def _threads(pid: int) -> list[tuple[int, str]]:
    """(id, name) of each thread of a process."""
    tasks = sorted(Path(f"/proc/{pid}/task").iterdir())
    return [(int(task.name), (task / "comm").read_text().strip()) for task in tasks]


def plot(title: str, values: Sequence[float], marks: Sequence[bool], line: float | None = None) -> None:
    """Values over time, left to right, in WIDTH columns; ``#`` where marked, else ``.``; ``line``: a level to show."""
    edges = np.linspace(0, len(values), min(WIDTH, len(values)) + 1).astype(int)
    columns = [max(values[a:b]) for a, b in pairwise(edges)]
    marked = [any(marks[a:b]) for a, b in pairwise(edges)]
    top = max(*columns, line or 0, 1e-9)
    print(f"\n{title}")
    for row in range(HEIGHT, 0, -1):
        low = top * (row - 1) / HEIGHT
        high = top * row / HEIGHT
        fill = "-" if line is not None and low < line <= high else " "
        text = "".join(("#" if m else ".") if v > low else fill for v, m in zip(columns, marked, strict=True))
        print(f"{high:10.3g} |{text}")
    print(f"{'':10} +{'-' * len(columns)}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--low", type=int, default=1000, help="sessions a second")
    parser.add_argument("--high", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each phase")
    parser.add_argument("--swings", type=int, default=3)
    parser.add_argument("--samples", action="store_true", help="print each of them")
    parser.add_argument("--budget", type=float, default=5.0, help="percent")
    options = parser.parse_args(arguments)
    settings = Settings(pool=1 << 16, poll=True)
    with Run(hugepages_for("twin")) as run, Pair(run, settings=settings) as pair:
        pair.kill("b")  # its threads would share the processors
        node = cast(TwinNode, pair.a)
        probe = node.probe("--no-inject", "--probe-budget", str(options.budget))
        with Target.open(node.pid) as target, SessionPool.open(target, node.layout) as pool:
            watch = Watch(node, probe, pool)
            reached, equal = [], 0
            for _ in range(options.swings):
                watch.phase(options.seconds, options.low)
                assert_equal(node, probe)
                equal += 1
                reached.append(watch.phase(options.seconds, options.high))
            watch.phase(options.seconds, options.low)
            assert_equal(node, probe)
            equal += 1
        status = probe.status()
    if options.samples:
        for sample in watch.samples:
            print(sample)
    return report(watch.samples, reached, equal, status["probes"], options.budget)


def report(
    samples: Sequence[Sample], reached: Sequence[float], equal: int, probes: dict[str, object], budget: float
) -> int:
    """Print it; 0 if the budget was kept."""
    on = [sample.attached for sample in samples]
    plot("share of the worker's time in the last second, percent (# probes on, . away)", [s.share for s in samples], on,
         budget)  # fmt: skip
    plot("sessions made a second", [s.rate for s in samples], on)
    seconds = samples[-1].at_s
    print(f"{'':12}{seconds:.0f} seconds\n")
    differ = [abs(s.table - s.live) for s in samples]
    lag = [1000 * d / s.rate for d, s in zip(differ, samples, strict=True) if s.rate > 1000]
    highest = max(s.share for s in samples)
    print(f"reached a second: {', '.join(f'{rate:.0f}' for rate in reached)}")
    print(f"highest share of any second: {highest:.2f} % (budget {budget:g} %); by the governor's own count"
          f" {probes['highest_share_percent']} %")  # fmt: skip
    print(f"probes on for {100 * sum(on) / len(on):.0f} % of the time; switches: {probes['switches']},"
          f" the longest took {probes['longest_switch_ms']} ms")  # fmt: skip
    print(f"table and DPVS's list were equal, tuple by tuple, {equal} of {equal} times")
    print(f"sessions in the table beside those in the pool: median difference {np.median(differ):.0f}, most"
          f" {max(differ)}; as time, p50 {np.median(lag):.0f} ms, p90 {np.percentile(lag, 90):.0f} ms")  # fmt: skip
    _report_rounds(samples)
    kept = highest <= budget
    print("budget kept" if kept else "budget NOT kept")
    return 0 if kept else 1


def _report_rounds(samples: Sequence[Sample]) -> None:
    """Whether switches hold up the worker. What it waited for a processor is no doing of ours."""
    # A switch is counted when it is over: it began in that sample or in the one before.
    switched = [b.switches != a.switches for a, b in pairwise(samples)]
    near = [here or after for here, after in pairwise([*switched, False])]
    print("\nlongest round of the worker's loop in a sample, us (median, p90, most); what it waited for a processor")
    for title, wanted in (("with a switch", True), ("without", False)):
        chosen = [sample for sample, one in zip(samples[1:], near, strict=True) if one == wanted]
        rounds, waited = [s.round_us for s in chosen], [s.waited_us for s in chosen]
        cells = [f"{np.median(of):.0f}, {np.percentile(of, 90):.0f}, {max(of):.0f}" for of in (rounds, waited) if of]
        print(f"{title:>14} ({len(chosen)} samples): {'; '.join(cells)}")


if __name__ == "__main__":
    sys.exit(main())
