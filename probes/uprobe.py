# SPDX-License-Identifier: GPL-2.0-or-later
"""Put a loaded BPF program on an instruction of a running process, and take it away.

Rules: perf_event_open with the kernel's uprobe event source, no tracefs needed. The breakpoint goes into the one
process named, in all its threads, and into no other process of the same program; the program file is named by
/proc/PID/exe, so a replaced or deleted file and another mount namespace make no difference. Closing the descriptor
removes the breakpoint: nothing of ours stays in the process, even if we are killed. include/uapi/linux/perf_event.h.

Two ways: a perf event for each instruction, on any kernel; and since Linux 6.6 one link for all of them, which is put
on and taken off several times as fast, and passes less code at each hit. The program learns from its cookie which
instruction it was. include/uapi/linux/bpf.h: BPF_LINK_CREATE, BPF_TRACE_UPROBE_MULTI.
"""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from probes.errors import DpvsProbeError, NeedRoot

_TYPE = Path("/sys/bus/event_source/devices/uprobe/type")
_SYS_PERF_EVENT_OPEN = 298  # x86-64
_FLAG_CLOEXEC = 8
_IOC_ENABLE, _IOC_DISABLE, _IOC_SET_BPF = 0x2400, 0x2401, 0x40042408
_SYS_BPF = 321  # x86-64
_LINK_CREATE = 28
TRACE_UPROBE_MULTI = 48  # enum bpf_attach_type: what a program for ``MultiUprobe`` is loaded as
_RETURN = 1  # in perf_event_attr.config, and BPF_F_UPROBE_MULTI_RETURN
_LINK_ATTR = struct.Struct("<4I4Q3I4x")  # union bpf_attr, link_create, uprobe_multi


class ProbeFailed(DpvsProbeError):
    help_text = (
        "The kernel must have CONFIG_UPROBE_EVENTS and CONFIG_BPF_EVENTS: run dpvs-probe doctor. "
        "attach --scan-only does without."
    )


class _Attr(ctypes.Structure):
    """struct perf_event_attr, PERF_ATTR_SIZE_VER5."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("config", ctypes.c_uint64),
        ("sample_period", ctypes.c_uint64),
        ("sample_type", ctypes.c_uint64),
        ("read_format", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("wakeup_events", ctypes.c_uint32),
        ("bp_type", ctypes.c_uint32),
        ("uprobe_path", ctypes.c_uint64),  # config1
        ("probe_offset", ctypes.c_uint64),  # config2
        ("rest", ctypes.c_uint64 * 5),
    )


_libc = ctypes.CDLL(None, use_errno=True)


def supported() -> bool:
    """Whether this kernel has uprobes as a perf event source."""
    return _TYPE.exists()


class _Attached:
    """A probe that lasts as long as its file descriptor."""

    fd: int

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


class Uprobe(_Attached):
    """One attached program. ``Uprobe(prog_fd, pid, path, offset)`` attaches, ``close`` detaches."""

    def __init__(self, prog_fd: int, pid: int, path: str, offset: int, *, on_return: bool = False) -> None:
        """``on_return``: the place is a function's entry, and the program runs when it returns: dearer, for benches."""
        self.fd = _open(pid, path, offset, _RETURN if on_return else 0)
        try:
            fcntl.ioctl(self.fd, _IOC_SET_BPF, prog_fd)
            fcntl.ioctl(self.fd, _IOC_ENABLE, 0)
        except OSError as error:
            self.close()
            raise ProbeFailed(f"cannot attach the probe program at {path}+{offset:#x}: {error.strerror}") from None


class MultiUprobe(_Attached):
    """One program on several instructions of a process; raises ProbeFailed where the kernel has no such link.

    ``cookies``: what ``bpf_get_attach_cookie`` says at each of ``offsets``.
    """

    def __init__(
        self,
        prog_fd: int,
        pid: int,
        path: str,
        offsets: Sequence[int],
        cookies: Sequence[int],
        *,
        on_return: bool = False,
    ) -> None:
        count = len(offsets)
        name = ctypes.create_string_buffer(os.fsencode(path))
        where, what = (ctypes.c_uint64 * count)(*offsets), (ctypes.c_uint64 * count)(*cookies)
        attr = ctypes.create_string_buffer(
            _LINK_ATTR.pack(
                prog_fd, 0, TRACE_UPROBE_MULTI, 0,
                ctypes.addressof(name), ctypes.addressof(where), 0, ctypes.addressof(what), count,
                _RETURN if on_return else 0, pid,
            ),
            _LINK_ATTR.size,
        )  # fmt: skip
        self.fd: int = _libc.syscall(_SYS_BPF, _LINK_CREATE, ctypes.byref(attr), _LINK_ATTR.size)
        if self.fd < 0:
            raise _failure(ctypes.get_errno(), pid, f"{path} at {count} places")


def _open(pid: int, path: str, offset: int, config: int) -> int:
    try:
        source = int(_TYPE.read_text())
    except (FileNotFoundError, ValueError):
        raise ProbeFailed("this kernel has no uprobes (no event source 'uprobe' in /sys)") from None
    name = ctypes.create_string_buffer(os.fsencode(path))
    attr = _Attr(
        type=source, size=ctypes.sizeof(_Attr), config=config, sample_period=1, wakeup_events=1,
        uprobe_path=ctypes.addressof(name), probe_offset=offset,
    )  # fmt: skip
    # Arguments: the process, any CPU, no group.
    fd: int = _libc.syscall(_SYS_PERF_EVENT_OPEN, ctypes.byref(attr), pid, -1, -1, ctypes.c_ulong(_FLAG_CLOEXEC))
    if fd >= 0:
        return fd
    raise _failure(ctypes.get_errno(), pid, f"{path}+{offset:#x}")


def _failure(code: int, pid: int, where: str) -> DpvsProbeError:
    if code in (errno.EPERM, errno.EACCES):
        return NeedRoot(f"process {pid} may not be probed: {os.strerror(code)}")
    if code == errno.ESRCH:
        return ProbeFailed(f"process {pid} has ended", help_text="Start DPVS again, then attach to the new process.")
    return ProbeFailed(f"cannot probe {where}: {os.strerror(code)}")
