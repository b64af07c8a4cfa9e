# SPDX-License-Identifier: GPL-2.0-or-later
"""Compile, load and attach the probe program. The only file that imports bcc.

Rules: compiling is slow (half a second) and happens once; attaching and detaching take some hundredths of a second,
may happen as often as the governor likes, and on a thread beside the one that drains the ring. How the probes are put
on (one link for all sites, or a perf event each) and what a hit costs is found out on a process of our own. Kernel
headers of the running kernel are used where there are any, else the few in ``bpf/shim`` over linux-libc-dev;
BCC_KERNEL_SOURCE, if the user has set it, is left alone. Nothing is read by bcc afterwards: the ring and the counters
are mapped and read as numpy arrays. What happened while the probes were off, only a scan can tell.
"""

import atexit
import importlib.util
import logging
import mmap
import os
import platform
import re
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from probes.errors import DpvsProbeError, NeedRoot
from probes.practice import Costs, Practice, PracticeFailed, assumed, median_of_rounds
from probes.ring import BRIEF_BYTES, CREATE, FREE, THREADS, Ring, ThreadRings
from probes.sites import Site
from probes.target import Target
from probes.uprobe import TRACE_UPROBE_MULTI, MultiUprobe, Uprobe

RING_PAGES = 2048  # 8 MiB: 500 000 events
SHARED_PART = 8  # of the rings of workers, that is the size of the one for all other threads
# One cache line of counters for each CPU; the order is that of bpf/session.bpf.c.
COUNTERS = ("hits_create", "hits_free", "lost")
COUNTERS_PER_CPU = 8
SOURCE_VARIABLE = "BCC_KERNEL_SOURCE"

log = logging.getLogger(__name__)


class BccMissing(DpvsProbeError):
    help_text = (
        "Install it with: apt install python3-bpfcc (the package called bcc on PyPI is something else). It is for"
        " /usr/bin/python3, and for a virtual environment that this made with --system-site-packages."
        " attach --scan-only does without."
    )


class HeadersMissing(DpvsProbeError):
    help_text = "Install either with: apt install linux-headers-$(uname -r), or apt install linux-libc-dev"


class ProgramFailed(DpvsProbeError):
    help_text = "The program does not fit this version of the kernel or of bcc. attach --scan-only does without."


class UnsupportedMachine(DpvsProbeError):
    help_text = "dpvs-probe knows the registers of x86-64 only."


class Probes:
    """The session probes of one DPVS. ``attach`` compiles and attaches; ``detach`` and ``reattach`` toggle; ``close``
    ends. ``ring_bytes``: of all rings."""

    def __init__(
        self,
        target: Target | None,
        sites: Sequence[Site],
        ring_pages: int = RING_PAGES,
    ) -> None:
        """``target``: None to probe only processes of our own. ``ring_pages``: of the rings of all workers together;
        each worker has one of its own, of a page at least.
        """
        create, free = sites
        if ring_pages <= 0 or ring_pages & (ring_pages - 1):
            raise ProgramFailed(f"a ring of {ring_pages} pages is no power of two", help_text="Give a power of two.")
        self._target = target
        self.sites = (create, free)
        self._workers = sorted(target.workers()) if target is not None else []
        rings = min(THREADS, 1 << max(0, len(self._workers) - 1).bit_length())
        pages = max(ring_pages // rings, 1)
        self._shared_bytes = max(ring_pages // SHARED_PART, 1) * mmap.PAGESIZE
        self._shape = rings, pages * mmap.PAGESIZE // BRIEF_BYTES
        self.ring_bytes = self._shared_bytes + rings * pages * mmap.PAGESIZE
        cpus = possible_cpus()
        flags = [
            f"-DCREATE_CONN={create.pt_regs_field}",
            f"-DFREE_CONN={free.pt_regs_field}",
            f"-DTHREADS={THREADS}",
            f"-DRINGS={rings}",
            f"-DEVENTS={self._shape[1]}",
            f"-DSHARED_PAGES={self._shared_bytes // mmap.PAGESIZE}",
            f"-DCOUNTER_SLOTS={cpus * COUNTERS_PER_CPU}",
        ]
        self._uprobes: list[Uprobe | MultiUprobe] = []
        self._rings: list[ThreadRings] = []
        self._bpf = _compile(flags)
        try:
            self._either = _load_multi(self._bpf, b"session_either")
            self._programs: list[int] = []
            self._counters_map = mmap.mmap(
                self._bpf[b"counters"].map_fd, _pages(cpus * COUNTERS_PER_CPU * 8), mmap.MAP_SHARED, mmap.PROT_READ
            )
            counters = np.frombuffer(self._counters_map, np.uint64, cpus * COUNTERS_PER_CPU)
            self._counters: npt.NDArray[np.uint64] = counters.reshape(cpus, COUNTERS_PER_CPU)
            self._before: npt.NDArray[np.uint64] = np.zeros_like(self._counters)
        except BaseException:
            _free(self._bpf)
            raise
        self.costs = assumed(self.sites)
        try:
            self._practise()
        except BaseException:
            self.close()
            raise

    @classmethod
    def attach(cls, target: Target, sites: Sequence[Site], ring_pages: int = RING_PAGES) -> Self:
        """Compile the program for this DPVS and put it on the (create, free) sites."""
        if platform.machine() != "x86_64":
            raise UnsupportedMachine(f"this is a {platform.machine()} machine")
        probes = cls(target, sites, ring_pages)
        try:
            probes.reattach()
        except BaseException:
            probes.close()
            raise
        return probes

    @property
    def attached(self) -> bool:
        return bool(self._uprobes)

    def reattach(self) -> None:
        """Put the probes on their sites; does nothing if they are."""
        if self._uprobes:
            return
        try:
            assert self._target is not None
            offsets = [self._target.file_offset(site.address) for site in self.sites]
            self._uprobes = self._put(self._target.pid, self._target.exe_path, offsets)
        except BaseException:
            self.detach()
            raise

    @property
    def how(self) -> str:
        """How the probes are put on their sites."""
        return "one link for all sites" if self._either is not None else "a perf event for each site"

    def _put(self, pid: int, path: str, offsets: Sequence[int]) -> list[Uprobe | MultiUprobe]:
        if self._either is not None:
            return [MultiUprobe(self._either, pid, path, offsets, (CREATE, FREE))]
        if not self._programs:
            self._programs = [_load(self._bpf, name) for name in (b"session_create", b"session_free")]
        put: list[Uprobe | MultiUprobe] = []
        try:
            for program, offset in zip(self._programs, offsets, strict=True):
                put.append(Uprobe(program, pid, path, offset))
        except BaseException:
            for uprobe in put:
                uprobe.close()
            raise
        return put

    def _practise(self) -> None:
        """Find out on a process of our own which way works and what a hit costs. Nothing of it is counted or heard."""
        rings = self._map_rings()
        try:
            with Practice([(site.kind, site.conn_register) for site in self.sites]) as practice:
                bare = [practice.run(which, 10_000) for which in range(2)]
                costs = self._try(practice, rings)
                if costs is None and self._either is not None:
                    self._either = None  # this kernel's link passes over threads, or is not there
                    costs = self._try(practice, rings)
        except PracticeFailed as error:
            log.warning("the cost of a hit is not measured: %s", error)
            if self._either is not None:
                self._either = None  # not known to fire on every thread
            return
        finally:
            self._before = self._counters.copy()
            _empty(rings)
            rings.release()
            rings.close()
        if costs is not None:
            create, free = (max(0.0, cost - one) for cost, one in zip(costs, bare, strict=True))
            self.costs = Costs(create, free, measured=True)

    def _try(self, practice: Practice, rings: ThreadRings) -> tuple[float, float] | None:
        """Nanoseconds of each loop with the probes on; None if they cannot be put on, or a hit was not counted."""
        before = self.hits()
        try:
            uprobes = self._put(practice.pid, practice.path, practice.offsets)
        except DpvsProbeError as error:
            log.debug("%s: %s", self.how, error)
            return None
        try:
            practice.run(0, 1)
            _empty(rings)  # its thread is heard, and has a ring of its own, as workers have
            found = [
                median_of_rounds(practice, which, site.cost_ns, most=rings.size // 2, between=lambda: _empty(rings))
                for which, site in enumerate(self.sites)
            ]
        finally:
            for uprobe in uprobes:
                uprobe.close()
        after = self.hits()
        expected = (found[0][1] + 1, found[1][1])
        if (after["create"] - before["create"], after["free"] - before["free"]) != expected:
            log.debug("%s: %d of %d hits counted", self.how, after["create"] - before["create"], expected[0])
            return None
        return found[0][0], found[1][0]

    def detach(self) -> None:
        """Take the probes away; the ring stays and can still be drained."""
        uprobes, self._uprobes = self._uprobes, []
        for uprobe in uprobes:
            uprobe.close()

    def ring(self) -> ThreadRings:
        """All that the program writes, mapped; closed with the probes. There may be one consumer only."""
        rings = self._map_rings()
        rings.adopt(self._workers)
        self._rings.append(rings)
        return rings

    def _map_rings(self) -> ThreadRings:
        shared = Ring.map(self._bpf[b"shared"].map_fd, self._shared_bytes)
        return ThreadRings.map(shared, self._bpf[b"threads"].map_fd, self._bpf[b"rings"].map_fd, *self._shape)

    def counters(self) -> dict[str, int]:
        """All counters since loading: no system call, may be asked as often as one likes."""
        sums = self._counted().sum(axis=0)
        return {name: int(sums[index]) for index, name in enumerate(COUNTERS)}

    def hits(self) -> dict[str, int]:
        """How often each site was hit since loading."""
        counters = self.counters()
        return {"create": counters["hits_create"], "free": counters["hits_free"]}

    def hits_by_cpu(self) -> npt.NDArray[np.uint64]:
        """Shape (possible CPUs, 2): how often the create and the free site were hit on each since loading."""
        return self._counted()[:, :2]

    def lost(self) -> int:
        """Events that found their ring full."""
        return int(self._counted()[:, COUNTERS.index("lost")].sum())

    def _counted(self) -> npt.NDArray[np.uint64]:
        return self._counters - self._before

    def close(self) -> None:
        """Detach and give everything back: descriptors, maps, memory."""
        self.detach()
        for ring in self._rings:
            ring.close()
        self._rings = []
        if self._bpf is not None:
            self._counters = self._counted()
            self._before = np.zeros_like(self._counters)
            self._counters_map.close()
            _free(self._bpf)
            self._bpf = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


class Program:
    """A program of ``bpf/NAME.bpf.c``, compiled with ``flags``; ``close`` gives all of it back."""

    def __init__(self, name: str, flags: list[str]) -> None:
        self._bpf = _compile(flags, name)

    def load_xdp(self, function: bytes) -> int:
        """The descriptor of one of its functions, accepted by the kernel as an XDP program."""
        return _load(self._bpf, function, xdp=True)

    def map_fd(self, name: bytes) -> int:
        """The descriptor of one of its maps."""
        fd: int = self._bpf[name].map_fd
        return fd

    def close(self) -> None:
        if self._bpf is not None:
            _free(self._bpf)
            self._bpf = None


# --- bcc -----------------------------------------------------------------------------------------------------------


def available() -> None:
    """Raise what is missing to compile a probe program on this machine: bcc, headers, root."""
    if importlib.util.find_spec("bcc") is None:
        raise BccMissing(f"{sys.executable} has no Python package bcc")
    _import_bcc()
    if not os.environ.get(SOURCE_VARIABLE) and not kernel_headers() and not api_headers():
        raise HeadersMissing("there are neither headers of the running kernel nor linux-libc-dev")
    if os.geteuid() != 0:
        raise NeedRoot("loading a BPF program needs root")


def kernel_headers() -> Path | None:
    """Headers of the running kernel, where bcc looks for them."""
    for name in ("build", "source"):
        path = Path("/lib/modules", platform.release(), name)
        if (path / "include/linux/kconfig.h").exists():
            return path
    return None


def api_headers() -> list[Path]:
    """The directories of linux-libc-dev; empty if it is not installed."""
    root, arch = Path("/usr/include"), Path("/usr/include", sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu")
    return [arch, root] if (root / "linux/types.h").exists() and (arch / "asm/types.h").exists() else []


def possible_cpus() -> int:
    """One more than the highest CPU number this kernel may ever use."""
    text = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return int(re.split(r"[-,]", text)[-1]) + 1


def _import_bcc() -> Any:
    try:
        import bcc
    except ImportError as error:
        raise BccMissing(f"bcc cannot be imported: {error}") from None
    except OSError as error:  # its shared library
        raise BccMissing(f"bcc's library cannot be loaded: {error}") from None
    return bcc


def _compile(flags: list[str], program: str = "session", *, source: bytes | None = None) -> Any:
    """A program of ours, or ``source``, compiled with the first set of headers that works; a bcc.BPF."""
    bcc = _import_bcc()
    if source is None:
        source = resources.files("probes").joinpath(f"bpf/{program}.bpf.c").read_bytes()
    if os.environ.get(SOURCE_VARIABLE) or kernel_headers():
        try:
            return _build(bcc, source, flags, None)
        except ProgramFailed:
            if os.environ.get(SOURCE_VARIABLE):
                raise  # the user's choice is not second-guessed
    system = api_headers()
    if not system:
        raise HeadersMissing("there are no usable headers of the running kernel, and linux-libc-dev is not installed")
    own = [word for path in system for word in ("-idirafter", str(path))]
    with resources.as_file(resources.files("probes").joinpath("bpf/shim")) as shim:
        return _build(bcc, source, flags + own, str(shim))


def _build(bcc: Any, source: bytes, flags: list[str], kernel_source: str | None) -> Any:
    before = os.environ.get(SOURCE_VARIABLE)
    if kernel_source is not None:
        os.environ[SOURCE_VARIABLE] = kernel_source
    try:
        with _captured() as output:
            try:
                return bcc.BPF(text=source, cflags=flags)
            except Exception:
                message = _first_error(output)
    finally:
        if kernel_source is not None:
            os.environ.pop(SOURCE_VARIABLE, None)
            if before is not None:
                os.environ[SOURCE_VARIABLE] = before
    if os.geteuid() != 0:
        raise NeedRoot("loading a BPF program needs root")
    raise ProgramFailed(f"the probe program does not compile: {message}")


def _load(bpf: Any, name: bytes, *, xdp: bool = False) -> int:
    bcc = _import_bcc()
    with _captured() as output:
        try:
            fd: int = bpf.load_func(name, bcc.BPF.XDP if xdp else bcc.BPF.KPROBE).fd
            return fd
        except Exception:
            message = _first_error(output)
    if os.geteuid() != 0:
        raise NeedRoot("loading a BPF program needs root")
    raise ProgramFailed(f"the kernel does not accept the probe program {name.decode()}: {message}")


def _load_multi(bpf: Any, name: bytes) -> int | None:
    """A program for one link on several sites; None where the kernel has no such links."""
    bcc = _import_bcc()
    with _captured():
        try:
            fd: int = bpf.load_func(name, bcc.BPF.KPROBE, attach_type=TRACE_UPROBE_MULTI).fd
            return fd
        except Exception:
            return None


def _free(bpf: Any) -> None:
    """All that bcc holds; it also keeps itself alive until exit, unless told not to."""
    atexit.unregister(bpf.cleanup)
    bpf.cleanup()


@contextmanager
def _captured() -> Iterator[Any]:
    """What the compiler writes to descriptor 2 meanwhile, as a file: only its first error is for the user."""
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _first_error(output: Any) -> str:
    output.seek(0)
    lines = output.read().decode(errors="replace").splitlines()
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message").strip()


def _empty(rings: ThreadRings) -> None:
    while len(rings.drain()):
        pass


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
