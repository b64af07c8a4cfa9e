# SPDX-License-Identifier: GPL-2.0-or-later
"""The probes on a small program with the functions of DPVS: exact counts, several threads, nothing left behind."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from probes import loader
from probes.layout import Layout
from probes.loader import SOURCE_VARIABLE, Probes, ProgramFailed, available
from probes.ring import CREATE, FREE
from probes.sites import Site, choose, session_sites
from probes.target import REQUIRED, Target
from probes.uprobe import ProbeFailed

LAYOUT = Layout.load("1.10.2")
PRIME = 7919
INJECTED, LIVE = 0x8000, 0x1305

# A line "THREADS COUNT FLAGS UNREADABLE" makes each thread create and free a session so many times. The create site is
# an emulated jump behind two plain instructions, the free site a single-stepped one: both kinds must count right.
SOURCE = r"""
#include <pthread.h>
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
static unsigned count, flags, unreadable;
static void *work(void *number)
{
	char *session = unreadable ? (char *)8 : sessions[(uintptr_t)number];
	if (!unreadable)
		*(uint16_t *)(session + %d) = flags;
	for (unsigned i = 0; i < count; i++) {
		dp_vs_redirect_init(session);
		dp_vs_laddr_unbind(session);
	}
	return 0;
}
int main(void)
{
	pthread_t thread[64];
	unsigned threads;
	setvbuf(stdout, NULL, _IONBF, 0);
	printf("%%p\n", (void *)sessions);
	while (scanf("%%u %%u %%x %%u", &threads, &count, &flags, &unreadable) == 4) {
		for (uintptr_t i = 0; i < threads; i++) pthread_create(&thread[i], NULL, work, (void *)i);
		for (unsigned i = 0; i < threads; i++) pthread_join(thread[i], NULL);
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

    def run(self, count: int, *, threads: int = 1, flags: int = LIVE, unreadable: bool = False) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{threads} {count} {flags:x} {int(unreadable)}\n")
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
    source.write_text(SOURCE % (rest, LAYOUT.offset("dp_vs_conn", "flags")))
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
    with Probes.attach(subject.target, LAYOUT, subject.sites, 512) as probes:
        ring = probes.ring()
        subject.run(PRIME, threads=3)
        events = ring.drain(1 << 20)
        assert len(events) == 6 * PRIME
        assert np.unique(events["kind"], return_counts=True)[1].tolist() == [3 * PRIME, 3 * PRIME]
        assert np.unique(events["conn"]).tolist() == [subject.sessions + 1024 * i for i in range(3)]
        assert set(events["flags"].tolist()) == {LIVE}
        tids = np.unique(events["tid"])
        assert len(tids) == 3
        assert subject.process.pid not in tids
        for tid in tids:
            one = events[events["tid"] == tid]
            assert (one["kind"] == np.tile([CREATE, FREE], PRIME)).all()
            assert (np.diff(one["time_ns"].astype(np.int64)) >= 0).all()
        assert probes.hits() == {"create": 3 * PRIME, "free": 3 * PRIME}
        assert probes.lost() == 0


def test_copies_that_we_made_are_not_heard(subject: Subject) -> None:
    with Probes.attach(subject.target, LAYOUT, subject.sites, 64) as probes:
        ring = probes.ring()
        subject.run(PRIME, flags=INJECTED | LIVE)
        assert len(ring.drain()) == 0
        assert probes.counters() == {
            "hits_create": PRIME, "hits_free": PRIME, "injected": 2 * PRIME, "lost": 0, "unreadable": 0,
        }  # fmt: skip


def test_where_there_are_no_copies_nobody_looks_for_them(subject: Subject) -> None:
    with Probes.attach(subject.target, LAYOUT, subject.sites, 512) as probes:
        ring = probes.ring()
        probes.drop_copies(False)
        subject.run(PRIME, flags=INJECTED | LIVE)
        subject.run(11, unreadable=True)
        events = ring.drain(1 << 20)
        assert len(events) == 2 * PRIME + 22
        assert set(events["flags"].tolist()) == {0}
        assert probes.counters() == {
            "hits_create": PRIME + 11, "hits_free": PRIME + 11, "injected": 0, "lost": 0, "unreadable": 0,
        }  # fmt: skip
        probes.drop_copies(True)
        subject.run(7, flags=INJECTED | LIVE)
        assert len(ring.drain()) == 0
        assert probes.counters()["injected"] == 14


def test_a_session_that_cannot_be_read_is_told_all_the_same(subject: Subject) -> None:
    with Probes.attach(subject.target, LAYOUT, subject.sites, 64) as probes:
        ring = probes.ring()
        subject.run(11, unreadable=True)
        events = ring.drain()
        assert len(events) == 22
        assert set(events["flags"].tolist()) == {0}
        assert probes.counters()["unreadable"] == 22


def test_a_full_ring_counts_what_it_loses(subject: Subject) -> None:
    with Probes.attach(subject.target, LAYOUT, subject.sites, 1) as probes:
        ring = probes.ring()
        subject.run(PRIME)
        kept = len(ring.drain())
        assert kept == probes.ring_bytes // 40
        assert probes.lost() == 2 * PRIME - kept
        subject.run(7)
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
    with Probes.attach(subject.target, LAYOUT, subject.sites, 512) as probes:
        assert probes.how == "a perf event for each site"
        assert probes.costs.measured
        ring = probes.ring()
        subject.run(PRIME, threads=3)
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
    with Probes.attach(subject.target, LAYOUT, subject.sites, 64) as probes:
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
    with Probes.attach(subject.target, LAYOUT, subject.sites, 64) as probes:
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
        with Probes.attach(subject.target, LAYOUT, subject.sites, 64) as probes:
            probes.ring()
        if round_number == 0:
            before = descriptors()
    assert descriptors() == before
    assert probes.counters()["hits_create"] == 0  # may still be asked


def test_the_end_of_the_process(subject: Subject) -> None:
    with Probes.attach(subject.target, LAYOUT, subject.sites, 64) as probes:
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
        with Probes.attach(subject.target, LAYOUT, subject.sites, 64) as probes:
            other.run(PRIME)
            subject.run(5)
            assert probes.hits() == {"create": 5, "free": 5}
    finally:
        other.close()


def test_the_register_of_the_site_is_used(subject: Subject) -> None:
    """The free site behind ``mov %rdi,%rax; xor %edi,%edi``: the session is in rax there."""
    create, free = subject.sites
    later = Site(free.address + 5, "stepped", "ret", "", "rax", free.function)
    with Probes.attach(subject.target, LAYOUT, (create, later), 64) as probes:
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
        Probes.attach(subject.target, LAYOUT, subject.sites, 64)
    assert os.environ[SOURCE_VARIABLE] == str(tmp_path)
    assert descriptors() == before


def test_a_ring_size_that_is_no_power_of_two(subject: Subject) -> None:
    with pytest.raises(ProgramFailed, match="power of two"):
        Probes.attach(subject.target, LAYOUT, subject.sites, 3)


def test_the_chosen_site_of_this_program_is_the_jump(subject: Subject) -> None:
    address, code = subject.target.function("dp_vs_redirect_init")
    assert choose(code, address).mnemonic.startswith("je")
