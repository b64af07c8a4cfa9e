# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs one command in a virtual machine with soft-RoCE, on this machine's own files.

Rules: the guest sees the host's root read-only and writes to memory, so nothing of a run remains but its output and its
exit status. QEMU emulates in software: no KVM is asked for. One processor is quickest that way.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tests.vm import kernel
from tests.vm.initramfs import Archive

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "vm"
QEMU = "qemu-system-x86_64"
BUSYBOX = Path("/bin/busybox")
POLL_S = 0.1
CONSOLE_TAIL = 30

TIMED_OUT = 124
NOT_RUN = 125  # the machine, or its soft-RoCE, did not come up


def missing() -> str | None:
    """What this machine lacks to run the virtual one."""
    if shutil.which(QEMU) is None:
        return f"no {QEMU} (Debian package qemu-system-x86)"
    if not BUSYBOX.exists():
        return f"no {BUSYBOX} (Debian package busybox-static)"
    if b"INTERP" in subprocess.run(["readelf", "-l", BUSYBOX], capture_output=True, check=False).stdout:
        return f"{BUSYBOX} is not static (Debian package busybox-static)"
    if shutil.which("rdma") is None:
        return "no rdma (Debian package iproute2)"
    return None


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    directory: Path = ROOT,
    memory_mib: int = 1536,
    timeout_s: float = 300,
    output: BinaryIO | None = None,
    verbose: bool = False,
) -> int:
    """Exit status of ``command``, run in ``directory`` in the guest; its output goes to ``output`` as it comes.

    TIMED_OUT when it takes too long, NOT_RUN when the machine fails: then its console is on stderr. Raises NoKernel.
    """
    booted = kernel.get(CACHE)
    sink = output or sys.stdout.buffer
    with tempfile.TemporaryDirectory(prefix="dpvs-probe-vm.") as name:
        work = Path(name)
        job = work / "job"
        job.mkdir()
        (job / "guest").write_text(_guest_script(command, environment or {}, directory))
        (work / "initramfs").write_bytes(_initramfs(booted))
        console = work / "console"
        arguments = _qemu(booted, work, memory_mib, verbose=verbose)
        with console.open("wb") as said, _started(arguments, said) as machine:
            in_time = _follow(machine, job / "output", sink, time.monotonic() + timeout_s)
        if not in_time:
            status = TIMED_OUT
        else:
            status = _status(job / "status")
        if verbose or status in (TIMED_OUT, NOT_RUN):
            lines = console.read_text(errors="replace").splitlines()
            sys.stderr.write("".join(f"{line}\n" for line in (lines if verbose else lines[-CONSOLE_TAIL:])))
        return status


def _guest_script(command: Sequence[str], environment: Mapping[str, str], directory: Path) -> str:
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
        "-machine", "q35,hpet=off", "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", str(memory_mib),
        "-kernel", os.fspath(booted.image), "-initrd", os.fspath(work / "initramfs"),
        "-append", f"console=ttyS0 panic=-1 {'' if verbose else 'quiet'} {calm}",
        "-serial", "stdio",
        "-fsdev", f"local,id=host,path={host},security_model=none,readonly=on,multidevs=remap",
        "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
        "-fsdev", f"local,id=job,path={job},security_model=none",
        "-device", "virtio-9p-pci,fsdev=job,mount_tag=job",
    ]  # fmt: skip


@contextmanager
def _started(arguments: list[str], console: BinaryIO) -> Iterator["subprocess.Popen[bytes]"]:
    machine = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
    try:
        yield machine
    finally:
        if machine.poll() is None:
            machine.kill()
        machine.wait()


def _follow(machine: "subprocess.Popen[bytes]", path: Path, sink: BinaryIO, until: float) -> bool:
    """Copy what the guest writes until the machine ends; False if it does not end in time."""
    path.touch()
    with path.open("rb") as source:
        while True:
            ended = machine.poll() is not None
            if data := source.read():
                sink.write(data)
                sink.flush()
            if ended:
                return True
            if time.monotonic() > until:
                return False
            time.sleep(POLL_S)


def _status(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return NOT_RUN
