# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs one command in a virtual machine with soft-RoCE, on this machine's own files.

Rules: the guest sees the host's root read-only and writes to memory, so nothing of a run remains but its output and its
exit status. QEMU emulates in software: no KVM is asked for. One processor is quickest that way, and one without AVX,
which QEMU emulates slowly, but with a random number generator, for which Python would wait otherwise.
"""

import os
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Self

from tests.vm import kernel
from tests.vm.initramfs import Archive

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
QEMU = "qemu-system-x86_64"
BUSYBOX = Path("/bin/busybox")
POLL_S = 0.1
CONSOLE_TAIL = 30
PT_INTERP = 3

TIMED_OUT = 124
NOT_RUN = 125  # the machine, or its soft-RoCE, did not come up
IN_GUEST = "DPVS_PROBE_GUEST"  # this environment variable is set in there


def missing() -> str | None:
    """What this machine lacks to run the virtual one, but for a kernel, which can be fetched."""
    if shutil.which(QEMU) is None:
        return f"no {QEMU} (Debian package qemu-system-x86; ./scripts/setup installs it)"
    if not BUSYBOX.exists():
        return f"no {BUSYBOX} (Debian package busybox-static; ./scripts/setup installs it)"
    if not _is_static(BUSYBOX):
        return f"{BUSYBOX} is not static (Debian package busybox-static)"
    if shutil.which("rdma") is None:
        return "no rdma (Debian package iproute2)"
    return None


def not_ready() -> str | None:
    """What this machine lacks to run the virtual one at once."""
    return missing() or (None if kernel.is_there() else "no kernel for it in build/vm: ./scripts/setup")


def _is_static(program: Path) -> bool:
    """Whether an x86_64 ELF file asks for no interpreter."""
    header = program.read_bytes()[:4096]
    start, size, count = *struct.unpack_from("<Q", header, 32), *struct.unpack_from("<HH", header, 54)
    return all(struct.unpack_from("<I", header, start + at * size)[0] != PT_INTERP for at in range(count))


class Guest:
    """A virtual machine that runs one command; it is ended when the context is left, whatever it does.

    ``job`` is a directory that the guest has as /run/job and may write to. Raises NoKernel when entered without one.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
        directory: Path = ROOT,
        memory_mib: int = 1536,
        verbose: bool = False,
        niceness: int = 0,
    ) -> None:
        """``files``: what the job directory holds."""
        self._command, self._environment, self._directory = command, environment or {}, directory
        self._files = files or {}
        self._memory_mib, self._verbose, self._niceness = memory_mib, verbose, niceness
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dpvs-probe-vm.")))
            booted = kernel.get()
            self.job, self._console = work / "job", work / "console"
            self.job.mkdir()
            (self.job / "guest").write_text(_guest_script(self._command, self._environment, self._directory))
            for name, text in {"output": "", **self._files}.items():
                (self.job / name).write_text(text)
            self._output = stack.enter_context((self.job / "output").open("rb"))
            (work / "initramfs").write_bytes(_initramfs(booted))
            said = stack.enter_context(self._console.open("wb"))
            # It shall not outlive us, even if we are killed.
            prefix = ["setpriv", "--pdeathsig", "KILL", "nice", "-n", str(self._niceness)]
            arguments = [*prefix, *_qemu(booted, work, self._memory_mib, verbose=self._verbose)]
            self._machine = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
            stack.callback(self.stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def stop(self) -> None:
        """End the machine as it is; what it said can still be read."""
        if self._machine.poll() is None:
            self._machine.kill()
        self._machine.wait()

    def running(self) -> bool:
        """Whether the machine has not ended yet."""
        return self._machine.poll() is None

    def output(self) -> bytes:
        """What the command wrote since the last call."""
        return self._output.read()

    def console(self) -> str:
        """All that the machine's console and QEMU said."""
        return self._console.read_text(errors="replace")

    def status(self) -> int:
        """The command's exit status; NOT_RUN when it has none."""
        try:
            return int((self.job / "status").read_text())
        except (OSError, ValueError):
            return NOT_RUN


def run(guest: Guest, *, timeout_s: float = 300, output: BinaryIO | None = None, verbose: bool = False) -> int:
    """Exit status of the command in ``guest``; its output goes to ``output`` as it comes.

    TIMED_OUT when it takes too long, NOT_RUN when the machine fails: then its console is on stderr. Raises NoKernel.
    """
    sink = output or sys.stdout.buffer
    until = time.monotonic() + timeout_s
    with guest:
        while True:
            running = guest.running()
            if data := guest.output():
                sink.write(data)
                sink.flush()
            if not running or time.monotonic() > until:
                break
            time.sleep(POLL_S)
        status = TIMED_OUT if running else guest.status()
        if verbose or status in (TIMED_OUT, NOT_RUN):
            lines = guest.console().splitlines()
            sys.stderr.write("".join(f"{line}\n" for line in (lines if verbose else lines[-CONSOLE_TAIL:])))
        return status


def _guest_script(command: Sequence[str], environment: Mapping[str, str], directory: Path) -> str:
    environment = {IN_GUEST: "1", **environment}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    lines.append(f"cd {shlex.quote(os.fspath(directory))} && exec {shlex.join(command)}")
    return (HERE / "guest.sh").read_text() + "\n".join(lines) + "\n"


def _initramfs(booted: kernel.Kernel) -> bytes:
    archive = Archive()
    for directory in ("bin", "dev", "modules"):
        archive.directory(directory)
    archive.console()
    archive.file("bin/busybox", BUSYBOX.read_bytes(), executable=True)
    archive.file("init", (HERE / "init.sh").read_bytes(), executable=True)
    archive.file("modules/order", " ".join(path.name for path in booted.modules).encode())
    for path in booted.modules:
        archive.file(f"modules/{path.name}", path.read_bytes())
    return bytes(archive)


def _qemu(booted: kernel.Kernel, work: Path, memory_mib: int, *, verbose: bool) -> list[str]:
    calm = "mitigations=off nokaslr tsc=reliable no_timer_check random.trust_cpu=on cryptomgr.notests net.ifnames=0"
    # Paths in these options may hold commas, which are doubled.
    host, job = "/", os.fspath(work / "job").replace(",", ",,")
    return [
        QEMU, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-machine", "q35,hpet=off", "-accel", "tcg", "-cpu", "Westmere,+rdrand", "-smp", "1", "-m", str(memory_mib),
        "-kernel", os.fspath(booted.image), "-initrd", os.fspath(work / "initramfs"),
        "-append", f"console=ttyS0 panic=-1 {'' if verbose else 'quiet'} {calm}",
        "-serial", "stdio",
        "-fsdev", f"local,id=host,path={host},security_model=none,readonly=on,multidevs=remap",
        "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
        "-fsdev", f"local,id=job,path={job},security_model=none",
        "-device", "virtio-9p-pci,fsdev=job,mount_tag=job",
    ]  # fmt: skip
