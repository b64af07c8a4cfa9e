# SPDX-License-Identifier: GPL-2.0-or-later
"""The probes on a small program with the functions of DPVS: exact counts, several threads, nothing left behind."""

import mmap
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from probes import loader
from probes.loader import SOURCE_VARIABLE, Probes, ProgramFailed, available
from probes.ring import CREATE, FREE, RECORD_BYTES
from probes.sites import Site, choose, session_sites
from probes.target import REQUIRED, Target
from probes.uprobe import ProbeFailed

PRIME = 7919
WORKERS = 3

# A line "WORKERS OTHERS COUNT" makes so many of the threads that are named as DPDK names its workers, and as many fresh
# ones, create and free a session each, COUNT times. The create site is an emulated jump behind two plain instructions,
# the free site a single-stepped one: both kinds must count right.
SOURCE = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdio.h>
__asm__(".text\n"
	".globl dp_vs_redirect_init\n.type dp_vs_redirect_init,@function\n"
	"dp_vs_redirect_init: mov (%%rsp),%%rax\n test %%rax,%%rax\n je 1f\n 1: ret\n"
	".size dp_vs_redirect_init,.-dp_vs_redirect_init\n"
	".globl dp_vs_laddr_unbind\n.type dp_vs_laddr_unbind,@function\n"
	"dp_vs_laddr_unbind: mov %%rdi,%%rax\n xor %%edi,%%edi\n ret\n"
	".size dp_vs_laddr_unbind,.-dp_vs_laddr_unbind\n"
	".globl dp_vs_redirect_free\n.type dp_vs_redirect_free,@function\n"
	"dp_vs_redirect_free: mov %%rdi,%%rax\n ret\n"
	".size dp_vs_redirect_free,.-dp_vs_redirect_free\n");
void dp_vs_redirect_init(void *);
void dp_vs_laddr_unbind(void *);
%s
static char sessions[64][1024];
static unsigned count;
static sem_t go[64], done;
static void *work(void *number)
{
	char *session = sessions[(uintptr_t)number];
	for (unsigned i = 0; i < count; i++) {
		dp_vs_redirect_init(session);
		dp_vs_laddr_unbind(session);
	}
	return 0;
}
static void *worker(void *number)
{
	char name[16];
	snprintf(name, sizeof(name), "dpdk-worker%%u", (unsigned)(uintptr_t)number + 1);
	pthread_setname_np(pthread_self(), name);
	for (;;) {
		sem_post(&done);
		sem_wait(&go[(uintptr_t)number]);
		work(number);
	}
	return 0;
}
int main(void)
{
	pthread_t thread[64];
	unsigned workers, others;
	setvbuf(stdout, NULL, _IONBF, 0);
	sem_init(&done, 0, 0);
	for (uintptr_t i = 0; i < %d; i++) {
		sem_init(&go[i], 0, 0);
		pthread_create(&thread[i], NULL, worker, (void *)i);
		sem_wait(&done);
	}
	printf("%%p\n", (void *)sessions);
	while (scanf("%%u %%u %%u", &workers, &others, &count) == 3) {
		for (unsigned i = 0; i < workers; i++) sem_post(&go[i]);
		for (uintptr_t i = 0; i < others; i++) pthread_create(&thread[i], NULL, work, (void *)(32 + i));
		for (unsigned i = 0; i < others; i++) pthread_join(thread[i], NULL);
		for (unsigned i = 0; i < workers; i++) sem_wait(&done);
		puts("done");
	}
	return 0;
}
"""

pytestmark = [
    pytest.mark.needs("bpf"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]


class Subject:
    """The program, running."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen([str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.sessions = int(self.process.stdout.readline(), 16)
        self.target = Target.open(self.process.pid)
        self.sites = session_sites(self.target.function)

    def run(self, count: int, *, workers: int = 1, others: int = 0) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{workers} {others} {count}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def close(self) -> None:
        self.target.close()
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("subject") / "subject"
    inline = {"dp_vs_redirect_init", "dp_vs_laddr_unbind", "dp_vs_redirect_free"}
    rest = "\n".join(f"void {name}(void) {{}}" for name in REQUIRED if name not in inline)
    source = path.with_suffix(".c")
    source.write_text(SOURCE % (rest, WORKERS))
    subprocess.run(["cc", "-O2", "-pthread", "-rdynamic", "-o", str(path), str(source)], check=True)
    return path


@pytest.fixture
def subject(program: Path) -> Iterator[Subject]:
    running = Subject(program)
    yield running
    running.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_machine_has_what_it_takes() -> None:
    available()


def test_sites(subject: Subject) -> None:
    create, free = subject.sites
    assert (create.kind, create.cheap, free.kind, free.cheap) == ("jump", True, "stepped", False)


def test_every_event_of_every_thread(subject: Subject) -> None:
    with Probes.attach(subject.target, subject.sites, 512) as probes:
        ring = probes.ring()
        assert ring.owners == sorted(subject.target.workers())
        subject.run(PRIME, workers=3)
        events = ring.drain(1 << 20)
        assert len(events) == 6 * PRIME
        assert np.unique(events["kind"], return_counts=True)[1].tolist() == [3 * PRIME, 3 * PRIME]
        assert np.unique(events["conn"]).tolist() == [subject.sessions + 1024 * i for i in range(3)]
        assert np.unique(events["tid"]).tolist() == ring.owners
        assert (np.diff(events["time_ns"].astype(np.int64)) >= 0).all()
        for tid in ring.owners:
            one = events[events["tid"] == tid]
            assert (one["kind"] == np.tile([CREATE, FREE], PRIME)).all()
        assert probes.hits() == {"create": 3 * PRIME, "free": 3 * PRIME}
        assert probes.lost() == 0


def test_threads_without_a_ring_of_their_own_are_heard(subject: Subject) -> None:
    """Three workers have rings, four are there: so one more thread can get one, and the next cannot."""
    with Probes.attach(subject.target, subject.sites, 1 << 14) as probes:
        ring = probes.ring()
        workers = ring.owners
        subject.run(PRIME, workers=1, others=3)
        events = ring.drain(1 << 20)
        others = set(np.unique(events["tid"]).tolist()) - set(workers)
        assert len(others) == 3
        assert len(events) == 8 * PRIME
        assert (np.diff(events["time_ns"].astype(np.int64)) >= 0).all()
        for tid in others:
            assert (events["kind"][events["tid"] == tid] == np.tile([CREATE, FREE], PRIME)).all()
        assert len(ring.owners) == 4
        assert set(ring.owners) - set(workers) <= others
        assert probes.hits() == {"create": 4 * PRIME, "free": 4 * PRIME}
        assert probes.lost() == 0


def test_a_worker_gets_a_ring_of_its_own_once_it_is_heard(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where thread ids of DPVS are not those that the program sees: in another pid namespace."""
    known = sorted(subject.target.workers())
    monkeypatch.setattr(subject.target, "workers", lambda: {1 << 20 | number: number for number in range(2)})
    with Probes.attach(subject.target, subject.sites, 512) as probes:
        ring = probes.ring()
        ring.release()
        for count in (3, 101, PRIME):
            subject.run(count)
            events = ring.drain(1 << 20)
            assert len(events) == 2 * count
            assert (events["kind"] == np.tile([CREATE, FREE], count)).all()
            assert len(set(events["tid"].tolist())) == 1
            assert ring.owners == [tid for tid in known if tid == events["tid"][0]]


@pytest.mark.parametrize(("workers", "others"), [(1, 0), (0, 1)])
def test_a_full_ring_counts_what_it_loses(subject: Subject, workers: int, others: int) -> None:
    with Probes.attach(subject.target, subject.sites, 1) as probes:
        ring = probes.ring()
        subject.run(PRIME, workers=workers, others=others)
        kept = len(ring.drain())
        assert kept == (ring.size if workers else mmap.PAGESIZE // RECORD_BYTES - 1)  # the kernel's is never quite full
        assert probes.lost() == 2 * PRIME - kept
        subject.run(7, workers=workers, others=others)
        assert len(ring.drain()) == 14
        assert probes.lost() == 2 * PRIME - kept


def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a kernel before 6.6: it takes no program for a link on several sites."""
    monkeypatch.setattr(loader, "_load_multi", lambda *_: None)


def with_deaf_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some kernels of 6.6 to 6.9: the link is there and passes over threads."""

    class Deaf:
        def __init__(self, *_: object) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(loader, "MultiUprobe", Deaf)


@pytest.mark.parametrize("kernel", [without_links, with_deaf_links])
def test_where_links_do_not_work_perf_events_do(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, kernel: Callable[[pytest.MonkeyPatch], None]
) -> None:
    kernel(monkeypatch)
    with Probes.attach(subject.target, subject.sites, 512) as probes:
        assert probes.how == "a perf event for each site"
        assert probes.costs.measured
        ring = probes.ring()
        subject.run(PRIME, workers=3)
        events = ring.drain(1 << 20)
        assert len(events) == 6 * PRIME
        for tid in np.unique(events["tid"]):
            assert (events["kind"][events["tid"] == tid] == np.tile([CREATE, FREE], PRIME)).all()
        probes.detach()
        subject.run(103)
        probes.reattach()
        subject.run(107)
        assert len(ring.drain()) == 214
        assert probes.hits() == {"create": 3 * PRIME + 107, "free": 3 * PRIME + 107}


def test_detached_and_attached_again(subject: Subject) -> None:
    with Probes.attach(subject.target, subject.sites, 64) as probes:
        ring = probes.ring()
        probes.reattach()  # already there: no second breakpoint, no second event
        subject.run(101)
        assert len(ring.drain()) == 202
        probes.detach()
        probes.detach()
        assert not probes.attached
        subject.run(103)
        assert len(ring.drain()) == 0
        probes.reattach()
        subject.run(107)
        assert len(ring.drain()) == 214
        assert probes.hits() == {"create": 208, "free": 208}


def test_fifty_times_leaves_nothing(subject: Subject) -> None:
    address, code = subject.target.function("dp_vs_redirect_init")
    with Probes.attach(subject.target, subject.sites, 64) as probes:
        assert subject.target.read(address, len(code)) != code  # the breakpoint is in memory
        before = descriptors()
        for _ in range(50):
            probes.detach()
            probes.reattach()
        assert descriptors() == before
        subject.run(PRIME)
        assert probes.hits()["create"] == PRIME
    assert subject.target.read(address, len(code)) == code
    assert subject.process.poll() is None


def test_loading_again_and_again_leaves_nothing(subject: Subject) -> None:
    for round_number in range(4):
        with Probes.attach(subject.target, subject.sites, 64) as probes:
            probes.ring()
        if round_number == 0:
            before = descriptors()
    assert descriptors() == before
    assert probes.counters()["hits_create"] == 0  # may still be asked


def test_the_end_of_the_process(subject: Subject) -> None:
    with Probes.attach(subject.target, subject.sites, 64) as probes:
        ring = probes.ring()
        subject.run(13)
        subject.process.kill()
        subject.process.wait()
        assert len(ring.drain()) == 26
        probes.detach()
        with pytest.raises(ProbeFailed):
            probes.reattach()
        assert not probes.attached


def test_another_process_of_the_same_program_is_left_alone(subject: Subject, program: Path) -> None:
    other = Subject(program)
    try:
        with Probes.attach(subject.target, subject.sites, 64) as probes:
            other.run(PRIME)
            subject.run(5)
            assert probes.hits() == {"create": 5, "free": 5}
    finally:
        other.close()


def test_the_register_of_the_site_is_used(subject: Subject) -> None:
    """The free site behind ``mov %rdi,%rax; xor %edi,%edi``: the session is in rax there."""
    create, free = subject.sites
    later = Site(free.address + 5, "stepped", "ret", "", "rax", free.function)
    with Probes.attach(subject.target, (create, later), 64) as probes:
        ring = probes.ring()
        subject.run(3)
        events = ring.drain()
        assert set(events["conn"].tolist()) == {subject.sessions}


def test_a_users_choice_of_headers_is_not_second_guessed(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SOURCE_VARIABLE, str(tmp_path))
    before = descriptors()
    with pytest.raises(ProgramFailed, match="error"):
        Probes.attach(subject.target, subject.sites, 64)
    assert os.environ[SOURCE_VARIABLE] == str(tmp_path)
    assert descriptors() == before


def test_a_ring_size_that_is_no_power_of_two(subject: Subject) -> None:
    with pytest.raises(ProgramFailed, match="power of two"):
        Probes.attach(subject.target, subject.sites, 3)


def test_the_chosen_site_of_this_program_is_the_jump(subject: Subject) -> None:
    address, code = subject.target.function("dp_vs_redirect_init")
    assert choose(code, address).mnemonic.startswith("je")
