# SPDX-License-Identifier: GPL-2.0-or-later
"""A week of operation, compressed: sessions come and go for as long as one likes, and everything else that happens to
a pair happens all the time. Is memory flat, and are file descriptors?

Rules: of a process count the memory that is its own (RssAnon: what dpvs-probe maps of DPVS's is not), its descriptors
and its threads. The first quarter of the samples is warming up. Growth is the median of the last half of the rest, less
that of the first half of it: a peak between two collections of garbage is no leak, and a leak cannot hide from it.
"""

import os
import signal
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.lab.churn import Churn
from tests.lab.node import Settings
from tests.lab.pair import Pair
from tests.lab.process import LabError, wait_for

TICK_S = 0.25
WARM_PART = 4  # one in so many samples
SAMPLES = 240  # of a whole run, or one a second
METRICS = 9147
STEADY = 20
ALLOWED_KIB = 4096  # more than the noise of an allocator, and less than any leak takes in a night
CUT_S = 4.0  # longer than heartbeat_timeout: the link is given up and made anew
ALLOWED_FILES = 1  # a connection under way at the moment of most samples
LEAST_SAMPLES, LEAST_RELOADS, LEAST_CUTS = 24, 2, 1  # a run goes on until it has them
# What ends stays for seconds only, so that as many go as come after a few of them.
SETTINGS = Settings(timeouts={"fin_wait": 3, "time_wait": 3, "close": 2, "close_wait": 3, "last_ack": 3})
SETTLE_S = SETTINGS.established_timeout_s + 60  # a reset is sent once, and may be lost


class Sample(NamedTuple):
    """One process at one moment."""

    at_s: float
    memory_kib: int
    files: int
    threads: int


def sample(pid: int, at_s: float) -> Sample:
    """What a process has now. Raises LabError where it is gone."""
    try:
        files = len(os.listdir(f"/proc/{pid}/fd"))
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError as error:
        raise LabError(f"process {pid} is gone") from error
    values = dict(line.partition(":")[::2] for line in text.splitlines())
    return Sample(at_s, int(values["RssAnon"].split()[0]), files, int(values["Threads"]))


class Growth(NamedTuple):
    """Of one process, after it was warm."""

    memory_kib: float
    kib_per_hour: float
    files: float
    threads: float
    last: Sample

    def problems(self, allowed_kib: float) -> list[str]:
        """Why it is not flat; empty if it is."""
        found = []
        if self.memory_kib > allowed_kib:
            found.append(f"memory grew by {self.memory_kib:.0f} KiB")
        if self.files > ALLOWED_FILES:
            found.append(f"descriptors grew by {self.files:g}")
        if self.threads > 0:
            found.append(f"threads grew by {self.threads:g}")
        return found


def growth(samples: Sequence[Sample]) -> Growth:
    """What it has more of in the end. Raises LabError where there are too few samples to say."""
    warm = samples[len(samples) // WARM_PART :]
    if len(warm) < 6:
        raise LabError(f"{len(samples)} samples say nothing")
    halves = warm[: len(warm) // 2], warm[len(warm) // 2 :]

    def more(value: Callable[[Sample], float]) -> float:
        before, after = (statistics.median(map(value, half)) for half in halves)
        return after - before

    memory = more(lambda each: each.memory_kib)
    return Growth(
        memory, memory / more(lambda each: each.at_s) * 3600, more(lambda each: each.files),
        more(lambda each: each.threads), samples[-1],
    )  # fmt: skip


@dataclass
class Report:
    """How it went."""

    seconds: float
    sessions: int = 0
    cuts: int = 0
    reloads: int = 0
    scrapes: int = 0
    alive: int = 0  # of STEADY connections that talked all the time
    longest_pause_ms: float = 0.0
    copies: int = 0  # in b, of as many sessions of a, at the end
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    @property
    def enough(self) -> bool:
        """Whether it can say something."""
        samples = min((len(each) for each in self.samples.values()), default=0)
        return samples >= LEAST_SAMPLES and self.reloads >= LEAST_RELOADS and self.cuts >= LEAST_CUTS

    def lines(self) -> list[str]:
        """For a person."""
        said = [
            f"{self.sessions} connections in {self.seconds:.0f} s, {self.cuts} cuts of the sync link,"
            f" {self.reloads} reloads, {self.scrapes} scrapes",
            f"{self.alive} of {STEADY} lasting connections alive, longest pause {self.longest_pause_ms:.0f} ms;"
            f" tables equal at the end, {self.copies} sessions",
        ]
        for name, samples in self.samples.items():
            grown, first = growth(samples), samples[len(samples) // WARM_PART]
            memory = f"{first.memory_kib} to {grown.last.memory_kib} KiB, growth {grown.memory_kib:+.0f} KiB"
            said.append(
                f"{name:12} memory {memory} ({grown.kib_per_hour:+.0f} KiB an hour); descriptors {first.files} to"
                f" {grown.last.files}; threads {first.threads} to {grown.last.threads}"
            )
        return said

    def problems(self, allowed_kib: float = ALLOWED_KIB) -> list[str]:
        """Why it was not flat, or not well; empty if it was."""
        found = [f"only {self.alive} of {STEADY} lasting connections live"] if self.alive != STEADY else []
        for name, samples in self.samples.items():
            found += [f"{name}: {problem}" for problem in growth(samples).problems(allowed_kib)]
        return found


class Soak:
    """Of a pair with ``SETTINGS``, nothing attached yet."""

    def __init__(self, pair: Pair, directory: Path, *, seed: int = 1) -> None:
        self.pair = pair
        self.seed = seed
        self.conf = directory / "soak.conf"
        self.store = directory / "soak.store"

    def attach(self) -> None:
        """Both nodes, each the other's peer, with metrics, a configuration file, a store."""
        self.conf.write_text("[sync]\nsync_interval = 100\n")
        for name, other in (("b", "a"), ("a", "b")):
            extra = ("--store", str(self.store)) if name == "a" else ()
            self.pair.nodes[name].probe(
                "--listen", self.pair.sync_address(name), "--peer", self.pair.sync_address(other),
                "--metrics", f"{self.pair.plan.sync(name)}:{METRICS}", "--config", str(self.conf), *extra,
            )  # fmt: skip

    def run(
        self, seconds: float, *, rate: int = 200, standing: int = 300, trouble_s: float = 20.0,
        say: Callable[[str], None] = lambda _: None,
    ) -> Report:  # fmt: skip
        """``rate`` connections a second through node a, ``standing`` of them open at a time.

        Every ``trouble_s`` the sync link is cut for ``CUT_S``; between two cuts the configuration is read again.
        """
        pair, report = self.pair, Report(seconds)
        steady = pair.steady(STEADY, seconds=seconds + 600, stall=20)
        every = max(1.0, seconds / SAMPLES) if seconds > 60 else 0.5
        began = time.monotonic()
        next_sample, troubles = began, self._troubles(report, trouble_s)
        next_trouble, next_word = began + next(troubles), began
        with Churn(pair.network.path("client"), pair.plan.vip, 7, seed=self.seed) as churn:
            while (now := time.monotonic()) < began + seconds or not report.enough:
                churn.open(max(1, int(rate * TICK_S)))
                churn.close(len(churn.open_ones) - standing)
                if now >= next_sample:
                    next_sample = now + every
                    self._look(report, now - began)
                if now >= next_trouble:
                    next_trouble = now + next(troubles)
                if now >= next_word:
                    next_word = now + max(10.0, seconds / 20)
                    say(f"{now - began:.0f} s: {churn.opened} connections")
                time.sleep(max(0.0, now + TICK_S - time.monotonic()))
            pair.network.set_link("a", "s0", True)
            report.sessions = churn.opened
            churn.echo()
            self._settle(report, standing)
        done = steady.finish()
        report.alive, report.longest_pause_ms = int(done["alive"]), float(done["longest_gap_ms"])
        report.seconds = time.monotonic() - began
        return report

    def _troubles(self, report: Report, every_s: float) -> Iterator[float]:
        """Each step makes one trouble and gives the seconds until the next."""
        while True:
            yield every_s / 2
            for node in self.pair.nodes.values():
                node.attached[-1].process.signal(signal.SIGHUP)
            report.reloads += 1
            yield every_s / 2
            self.pair.network.set_link("a", "s0", False)
            report.cuts += 1
            yield CUT_S
            self.pair.network.set_link("a", "s0", True)

    def _look(self, report: Report, at_s: float) -> None:
        """One sample of each process; then what an operator's tools ask, so that answering is part of it."""
        for name, node in self.pair.nodes.items():
            attached = node.attached[-1]
            for what, pid in (("DPVS", node.pid), ("dpvs-probe", attached.pid)):
                report.samples.setdefault(f"{what} {name}", []).append(sample(pid, at_s))
        for name, node in self.pair.nodes.items():
            node.attached[-1].status()
            node.attached[-1].peers()
            with (
                self.pair.network.inside(name),
                urllib.request.urlopen(f"http://{self.pair.plan.sync(name)}:{METRICS}/metrics", timeout=60) as answer,
            ):
                answer.read()
            report.scrapes += 1

    def _settle(self, report: Report, standing: int) -> None:
        """What has ended is gone, and what is open is on both nodes: in DPVS, in the table, in the peer's."""
        a, b = self.pair.a, self.pair.b
        wait_for("ended sessions are gone", lambda: len(a.sessions()) <= standing + STEADY, SETTLE_S, 0.2)
        wait_for("a's table is DPVS's", lambda: a.attached[-1].tuples() == a.tuples(), SETTLE_S, 0.2)
        wait_for("b's DPVS has the same", lambda: b.tuples() == a.tuples(), SETTLE_S, 0.2)
        report.copies = len(b.tuples())
