# SPDX-License-Identifier: GPL-2.0-or-later
"""The session probes by themselves: nanoseconds a hit, and records a second from the ring to Python.

A small program with DPVS's session functions is compiled, the real probe program is attached to it, and it creates
sessions in a loop. The ring is then drained by probes.ring. Best of several rounds, in processor time throughout.
"""

import argparse
import mmap
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from probes.loader import Probes
from probes.sites import session_sites
from probes.target import REQUIRED, Target

RECORD_BYTES = 32
# The same instructions as a stock DPVS 1.10.2 has at the entry of dp_vs_redirect_init.
SOURCE = r"""
#include <stdint.h>
#include <stdio.h>
#include <time.h>
__asm__(".text\n.globl dp_vs_redirect_init\n.type dp_vs_redirect_init,@function\n"
	"dp_vs_redirect_init: mov 0x230(%%rdi),%%rax\n test %%rax,%%rax\n je 1f\n nop\n 1: ret\n"
	".size dp_vs_redirect_init,.-dp_vs_redirect_init\n");
void dp_vs_redirect_init(void *);
%s
static char session[1024];
static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}
int main(void)
{
	unsigned count;
	setvbuf(stdout, NULL, _IONBF, 0);
	while (scanf("%%u", &count) == 1) {
		uint64_t start = now();
		for (unsigned i = 0; i < count; i++)
			dp_vs_redirect_init(session);
		printf("%%lu\n", (unsigned long)(now() - start));
	}
	return 0;
}
"""


class Subject:
    """The program, running."""

    def __init__(self, directory: Path, events: int) -> None:
        path = directory / "subject"
        rest = "\n".join(f"void {name}(void) {{}}" for name in REQUIRED if name != "dp_vs_redirect_init")
        path.with_suffix(".c").write_text(SOURCE % rest)
        subprocess.run(["cc", "-O2", "-rdynamic", "-o", str(path), str(path.with_suffix(".c"))], check=True)
        self.events = events
        self.process = subprocess.Popen([str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def create(self) -> float:
        """Create sessions; nanoseconds for each."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(self.events, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline()) / self.events


def drained(read: Callable[[], int], subject: Subject, rounds: int) -> tuple[float, float]:
    """(ns a hit, ns of processor time a record) of the best round each."""
    hits, costs = [], []
    for _ in range(rounds):
        hits.append(subject.create())
        start, count = time.process_time_ns(), 0
        while got := read():
            count += got
        costs.append((time.process_time_ns() - start) / count)
    return min(hits), min(costs)


def callback_reader(bpf: Any) -> Callable[[], int]:
    """A Python call for each record of the ring buffer ``events`` of a program."""
    seen = [0]

    def callback(context: object, data: object, size: int) -> int:
        seen[0] += 1
        return 0

    bpf[b"events"].open_ring_buffer(callback)

    def read() -> int:
        seen[0] = 0
        bpf.ring_buffer_consume()
        return seen[0]

    return read


def line(what: str, nanoseconds: float) -> None:
    print(f"{what:<44}{nanoseconds:10.1f} ns{1e3 / nanoseconds:10.2f} M/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=200_000, help="a round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    pages = 1 << (arguments.events * RECORD_BYTES // mmap.PAGESIZE).bit_length()
    with tempfile.TemporaryDirectory() as directory:
        subject = Subject(Path(directory), arguments.events)
        try:
            line("call without a probe", min(subject.create() for _ in range(arguments.rounds)))
            with Target.open(subject.process.pid) as target:
                sites = session_sites(target.function)
                print(f"site: {sites[0].mnemonic}, {sites[0].why}")
                with Probes.attach(target, sites, pages) as probes:
                    ring = probes.ring()
                    subject.create()
                    while len(ring.drain()):  # its thread has a ring of its own from now on
                        pass
                    hit, cost = drained(lambda: len(ring.drain(1 << 15)), subject, arguments.rounds)
                    line("hit, event into the ring", hit)
                    line("ring to array", cost)
        finally:
            subject.process.kill()
            subject.process.communicate()


if __name__ == "__main__":
    main()
