# SPDX-License-Identifier: GPL-2.0-or-later
"""The DPVS process: its binary, symbols, memory map and threads.

Rules: reading only. Everything comes from /proc/PID and from the program file as the process itself holds it
(/proc/PID/exe), so a binary that was replaced, deleted or lies in a container is still the right one. Addresses are
run-time addresses of the process unless a name says ``file_offset``. A pidfd and the start time pin the process down:
a later process with the same pid is never mistaken for it.
"""

import ctypes
import os
import re
import select
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from probes import candidates
from probes.errors import DpvsProbeError, NeedRoot

# Global functions and variables of DPVS that make a process DPVS to us; DPDK's --export-dynamic keeps them in .dynsym
# even of a stripped binary (DPVS 1.10.2, src/dpdk.mk).
REQUIRED = (
    "dp_vs_conn_new",
    "dp_vs_conn_get",
    "dp_vs_conn_put",
    "dp_vs_redirect_init",
    "dp_vs_redirect_free",
    "dp_vs_laddr_unbind",
)
DEFAULT_IPC = "/var/run/dpvs.ipc"  # DPVS 1.10.2, src/main.c
AT_ENTRY = 9
STARTING_S = 0.5
EM_X86_64 = 62
IOV_MAX = 1024
MAX_SECTIONS = 4096
MAX_FUNCTION_BYTES = 1 << 20
MAX_NOTE_BYTES = 64 << 10
_WORKER = re.compile(r"^(?:dpdk-worker|lcore-slave-|lcore-worker-|rte-worker-)(\d+)$")
_MAPS_LINE = re.compile(  # fs/proc/task_mmu.c, show_map_vma
    r"(?P<start>[0-9a-f]{1,16})-(?P<end>[0-9a-f]{1,16}) (?P<perms>[rwxsp-]{4}) (?P<offset>[0-9a-f]{1,16}) "
    r"(?P<dev>[0-9a-f:]+) (?P<inode>[0-9]{1,20}) *(?P<path>.*)",
    re.DOTALL | re.ASCII,
)
_CONTROL = ("dpdk-intr", "eal-intr-thread")
_SYMBOL = np.dtype(  # Elf64_Sym
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("shndx", "<u2"), ("value", "<u8"), ("size", "<u8")]
)
_STT_TLS = 6


class NoSuchProcess(DpvsProbeError):
    help_text = "Find the process id of dpvs with: pidof dpvs"


class NotDpvs(DpvsProbeError):
    help_text = "Give the process id of a running dpvs: pidof dpvs"


class UnsupportedBinary(DpvsProbeError):
    help_text = "dpvs-probe reads x86-64 ELF programs only."


class SymbolMissing(DpvsProbeError):
    help_text = (
        "This binary does not export a function that dpvs-probe needs. Link DPVS the stock way "
        "(DPDK's pkg-config adds --export-dynamic), or use a stock build."
    )


class ProcessGone(DpvsProbeError):
    help_text = "The DPVS process ended. Start it again, then attach to the new process."


class ReadFailed(DpvsProbeError):
    help_text = "The process may be ending, or its memory may have changed: try again, then run dpvs-probe doctor."


@dataclass(frozen=True)
class Region:
    """One line of /proc/PID/maps; ``end`` is exclusive."""

    start: int
    end: int
    perms: str
    offset: int
    dev: str
    inode: int
    path: str

    @property
    def shared(self) -> bool:
        return "s" in self.perms

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Symbol:
    """A symbol by its link-time value; ``size`` is 0 when the linker did not say."""

    value: int
    size: int


@dataclass(frozen=True)
class Segment:
    """A PT_LOAD segment of the program file, link-time addresses."""

    vaddr: int
    memsz: int
    filesz: int
    offset: int
    executable: bool


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = [
    ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
]  # fmt: skip


class _Bounded:
    """A file of which no more is read than it has: asked for 4 GiB, Python makes room for them first."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._size: int = file.seek(0, os.SEEK_END)

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_SET:
            position = min(position, self._size)
        return int(self._file.seek(position, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self.tell(), 0)
        return bytes(self._file.read(left if size < 0 else min(size, left)))


class Image:
    """The program file: segments, symbols and code bytes, at link-time addresses.

    Read at once and then closed. Symbols come from .dynsym and, where ``strip`` left it, .symtab.
    """

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self._parse(file, path)
        self._path = path

    def _parse(self, file: Any, path: str) -> None:
        try:
            self._read(ELFFile(_Bounded(file)), path)
        except DpvsProbeError:
            raise
        except ELFError as error:
            raise UnsupportedBinary(f"{path} is not an ELF program: {error}") from None
        except Exception as error:  # a parser that trusts what it reads, and a file that anybody may have made
            raise UnsupportedBinary(f"{path} is a damaged ELF program ({type(error).__name__})") from error

    def _read(self, elf: ELFFile, path: str) -> None:
        if elf.elfclass != 64 or elf["e_machine"] != "EM_X86_64" or not elf.little_endian:
            raise UnsupportedBinary(f"{path} is a {elf.elfclass}-bit {elf.get_machine_arch()} program, not x86-64")
        self.entry: int = elf["e_entry"]
        self.is_pie: bool = elf["e_type"] == "ET_DYN"
        if elf["e_shnum"] > MAX_SECTIONS or (elf["e_shnum"] == 0 and elf["e_shoff"]) or elf["e_phnum"] > MAX_SECTIONS:
            raise UnsupportedBinary(f"{path} has too many parts")
        self.segments = [
            Segment(s["p_vaddr"], s["p_memsz"], s["p_filesz"], s["p_offset"], bool(s["p_flags"] & 1))
            for s in elf.iter_segments("PT_LOAD")
        ]
        self.build_id = ""
        self._symbols: dict[str, Symbol] = {}
        for section in elf.iter_sections():
            if section["sh_type"] == "SHT_NOTE" and section["sh_size"] <= MAX_NOTE_BYTES:
                for note in section.iter_notes():
                    if (note["n_name"], note["n_type"]) == ("GNU", "NT_GNU_BUILD_ID"):  # others have a type 3 too
                        self.build_id = note["n_desc"]
            elif section["sh_type"] in ("SHT_DYNSYM", "SHT_SYMTAB"):
                self._add_symbols(_content(elf, section), _content(elf, elf.get_section(section["sh_link"])))

    def _add_symbols(self, table: bytes, names: bytes) -> None:
        """All defined symbols of one table; a global one is never replaced by a static one of the same name."""
        symbols = np.frombuffer(table, _SYMBOL, len(table) // _SYMBOL.itemsize)
        kind, binding = symbols["info"] & 15, symbols["info"] >> 4
        wanted = (symbols["shndx"] != 0) & (kind <= 10) & (kind != _STT_TLS) & (kind != 3) & (kind != 4)
        for index in np.flatnonzero(wanted)[np.argsort(binding[wanted] == 0, kind="stable")]:
            start = int(symbols["name"][index])
            name = names[start : names.index(b"\0", start)].decode("ascii", "replace")
            if name:
                self._symbols.setdefault(name, Symbol(int(symbols["value"][index]), int(symbols["size"][index])))

    def symbol(self, name: str) -> Symbol | None:
        return self._symbols.get(name)

    def file_offset(self, value: int) -> int:
        """Where the byte at link-time address ``value`` lies in the file."""
        for s in self.segments:
            if s.vaddr <= value < s.vaddr + s.filesz:
                return value - s.vaddr + s.offset
        raise UnsupportedBinary(f"address {value:#x} is in no part of the program file")

    def code(self, value: int, size: int) -> bytes:
        """Bytes of the file, not of memory: a probe that is attached already puts an int3 into memory."""
        with open(self._path, "rb") as file:
            return os.pread(file.fileno(), size, self.file_offset(value))

    def executable(self, value: int) -> bool:
        return any(s.executable and s.vaddr <= value < s.vaddr + s.memsz for s in self.segments)


def _entry(proc: Path) -> int | None:
    """Run-time address of a program's entry; waits for one that is being started (execve(2)), where it is set last."""
    deadline = time.monotonic() + STARTING_S
    while True:
        auxv = (proc / "auxv").read_bytes()
        entry = dict(struct.iter_unpack("<QQ", auxv[: len(auxv) // 16 * 16])).get(AT_ENTRY)
        if entry is not None or time.monotonic() > deadline:
            return entry
        time.sleep(STARTING_S / 100)


class Target:
    """A running DPVS. Use ``with Target.open(pid) as target``; closing it only closes the pidfd."""

    def __init__(self, pid: int, pidfd: int, *, image: Image, load_base: int, start_time: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.image = image
        self.load_base = load_base
        self.start_time = start_time
        self._proc = proc = Path(f"/proc/{pid}")
        self.exe = os.readlink(proc / "exe")
        self.exe_path = str(proc / "exe")
        self.is_pie = image.is_pie
        self.build_id = image.build_id

    # --- opening -----------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, pid: int) -> Self:
        """Attach to ``pid``: raises NoSuchProcess, NeedRoot, NotDpvs or UnsupportedBinary, and leaves nothing open."""
        if pid <= 0:
            raise NoSuchProcess(f"{pid} is not a process id")
        try:
            pidfd = os.pidfd_open(pid)
        except (ProcessLookupError, OverflowError):
            raise NoSuchProcess(f"there is no process {pid}") from None
        except OSError as error:  # EINVAL: a thread, not a process
            raise NoSuchProcess(f"{pid} is not a process: {error.strerror}") from None
        try:
            return cls._open(pid, pidfd)
        except BaseException:
            os.close(pidfd)
            raise

    @classmethod
    def _open(cls, pid: int, pidfd: int) -> Self:
        proc = Path(f"/proc/{pid}")
        try:
            image = Image(str(proc / "exe"))
            start = start_time(pid)
            entry = _entry(proc)
        except PermissionError:
            raise NeedRoot(f"process {pid} may not be read") from None
        except FileNotFoundError:
            raise NoSuchProcess(
                f"process {pid} is a kernel thread or has just ended", help_text=candidates.advice()
            ) from None
        except ProcessLookupError:
            raise NoSuchProcess(f"process {pid} has just ended") from None
        missing = [name for name in REQUIRED if image.symbol(name) is None]
        if missing:
            text = f"process {pid} ({os.readlink(proc / 'exe')}) is not DPVS: it has no {missing[0]}()"
            raise NotDpvs(text, help_text=candidates.advice())
        if entry is None:
            raise NotDpvs(f"process {pid} has no entry address", help_text="It may be starting: try again.")
        return cls(pid, pidfd, image=image, load_base=entry - image.entry, start_time=start)

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def alive(self) -> bool:
        """False once the process has ended, even while its parent has not reaped it."""
        if self.pidfd < 0:
            return False
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    # --- symbols and code --------------------------------------------------------------------------------------------

    def find(self, name: str) -> int | None:
        """Run-time address of a symbol, None if the binary does not name it."""
        symbol = self.image.symbol(name)
        return None if symbol is None else symbol.value + self.load_base

    def symbol(self, name: str) -> int:
        address = self.find(name)
        if address is None:
            raise SymbolMissing(f"{self.exe} has no symbol {name}")
        return address

    def function(self, name: str) -> tuple[int, bytes]:
        """Run-time address and code bytes of a function; 512 bytes where the symbol table gives no size."""
        symbol = self.image.symbol(name)
        if symbol is None:
            raise SymbolMissing(f"{self.exe} has no function {name}()")
        return symbol.value + self.load_base, self.image.code(symbol.value, min(symbol.size or 512, MAX_FUNCTION_BYTES))

    def file_offset(self, address: int) -> int:
        """Offset in the program file of a run-time address, as uprobes want it."""
        return self.image.file_offset(address - self.load_base)

    def is_code(self, address: int) -> bool:
        """Whether a run-time address lies in executable code of the program itself."""
        return self.image.executable(address - self.load_base)

    def global_u32(self, name: str) -> int | None:
        """Value of a global 32-bit variable, None if the binary does not name it."""
        address = self.find(name)
        return None if address is None else int.from_bytes(self.read(address, 4), "little")

    # --- memory ------------------------------------------------------------------------------------------------------

    def maps(self) -> list[Region]:
        try:
            text = (self._proc / "maps").read_bytes().decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            raise ProcessGone(f"process {self.pid} has ended") from None
        except PermissionError:
            raise NeedRoot(f"the memory map of process {self.pid} may not be read") from None
        return parse_maps(text)

    def read(self, address: int, size: int) -> bytes:
        """``size`` bytes at a run-time address, in one process_vm_readv: DPVS is not stopped."""
        buffer = bytearray(size)
        start = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if size else 0
        local, remote = _Iovec(start, size), _Iovec(address, size)
        got = _libc.process_vm_readv(self.pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        if got != size:
            raise self._failed(address, size, got)
        return bytes(buffer)

    def read_many(self, addresses: npt.NDArray[np.uint64], size: int) -> npt.NDArray[np.uint8]:
        """Shape (n, size) uint8: ``size`` bytes at each of n addresses; 1024 pieces a system call."""
        n = len(addresses)
        out = np.empty((n, size), np.uint8)
        remote = np.empty((min(n, IOV_MAX), 2), np.uint64)
        remote[:, 1] = size
        for first in range(0, n, IOV_MAX):
            count = min(IOV_MAX, n - first)
            remote[:count, 0] = addresses[first : first + count]
            local = _Iovec(out.ctypes.data + first * size, count * size)
            got = _libc.process_vm_readv(self.pid, ctypes.byref(local), 1, remote.ctypes.data, count, 0)
            if got != count * size:
                raise self._failed(int(addresses[first]), count * size, got)
        return out

    def _failed(self, address: int, size: int, got: int) -> DpvsProbeError:
        code = ctypes.get_errno() if got < 0 else 0
        if not self.alive():
            return ProcessGone(f"process {self.pid} has ended")
        if code == 1:  # EPERM
            return NeedRoot(f"the memory of process {self.pid} may not be read")
        why = os.strerror(code) if code else f"only {got} bytes"
        return ReadFailed(f"cannot read {size} bytes at {address:#x} of process {self.pid}: {why}")

    def read_string(self, address: int, limit: int = 4096) -> str:
        """A C string; stops at the end of a page if the next one is not readable."""
        data = b""
        while b"\0" not in data and len(data) < limit:
            step = min(limit - len(data), 4096 - (address + len(data)) % 4096)
            data += self.read(address + len(data), step)
        return data.split(b"\0", 1)[0].decode("utf-8", "replace")

    # --- threads, command line ---------------------------------------------------------------------------------------

    def threads(self) -> dict[int, str]:
        """Thread id -> name."""
        found = {}
        try:
            tasks = os.listdir(self._proc / "task")
        except (FileNotFoundError, ProcessLookupError):
            raise ProcessGone(f"process {self.pid} has ended") from None
        for task in tasks:
            try:
                found[int(task)] = (self._proc / "task" / task / "comm").read_text(errors="replace").rstrip("\n")
            except (FileNotFoundError, ProcessLookupError):
                continue  # a thread that has just ended
        return found

    def workers(self) -> dict[int, int]:
        """Thread id -> lcore of the forwarding and other worker threads, by the names DPDK gives them."""
        return {tid: int(m[1]) for tid, name in self.threads().items() if (m := _WORKER.match(name))}

    def worker_cpus(self) -> dict[int, set[int]]:
        """lcore -> the CPUs its thread may run on; DPDK pins each to one or a few."""
        found = {}
        for tid, lcore in self.workers().items():
            try:
                found[lcore] = os.sched_getaffinity(tid)
            except OSError:
                continue  # a thread that has just ended
        return found

    def control_thread(self) -> int:
        """Thread id of DPDK's interrupt thread: asleep in epoll_wait nearly always."""
        for tid, name in self.threads().items():
            if name in _CONTROL:
                return tid
        raise NotDpvs(f"process {self.pid} has no DPDK control thread ({' or '.join(_CONTROL)})")

    @cached_property
    def arguments(self) -> list[str]:
        try:
            raw = (self._proc / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            raise ProcessGone(f"process {self.pid} has ended") from None
        return [part.decode("utf-8", "surrogateescape") for part in raw.split(b"\0")[:-1]]

    @cached_property
    def ipc_name(self) -> str:
        """The control socket as DPVS names it: its variable dpvs_ipc_file, else its command line, else the default."""
        pointer = self.find("dpvs_ipc_file")
        if pointer is not None:
            address = int.from_bytes(self.read(pointer, 8), "little")
            if address and (name := self.read_string(address)):
                return name
        return ipc_argument(self.arguments) or DEFAULT_IPC

    @property
    def ipc_path(self) -> str:
        """The control socket as we can open it, whatever the mount namespace of DPVS."""
        name = self.ipc_name
        return f"{self._proc}/root{name}" if name.startswith("/") else f"{self._proc}/cwd/{name}"


def _content(elf: ELFFile, section: Any) -> bytes:
    """What the file has of a section: never more than the file, whatever the section claims."""
    if section.compressed or section["sh_type"] == "SHT_NOBITS":
        raise UnsupportedBinary(f"section {section.name} of the program is compressed or not there")
    elf.stream.seek(section["sh_offset"])
    return bytes(elf.stream.read(section["sh_size"]))


def start_time(pid: int) -> int:
    """Start of the process in clock ticks since boot: with the pid it names a process for ever."""
    stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    return int(stat.rpartition(")")[2].split()[19])


def parse_maps(text: str) -> list[Region]:
    """The lines of a /proc/PID/maps file. Raises ReadFailed for what is none.

    A name of a file may hold anything; only newlines are written in another way (``\\012``).
    """
    regions = []
    for line in text.split("\n"):
        if not line:
            continue
        found = _MAPS_LINE.match(line)
        if found is None or int(found["start"], 16) > int(found["end"], 16):
            raise ReadFailed(f"{line[:100]!r} is no line of a memory map")
        start, end, offset = (int(found[name], 16) for name in ("start", "end", "offset"))
        regions.append(Region(start, end, found["perms"], offset, found["dev"], int(found["inode"]), found["path"]))
    return regions


def ipc_argument(arguments: Sequence[str]) -> str | None:
    """The value of -x / --ipc-file among DPVS's own arguments, that is, before ``--`` (DPVS 1.10.2, src/main.c).

    getopt_long also takes unambiguous abbreviations (--ipc) and values glued to the option (-x/run/dpvs.ipc).
    """
    found = None
    own = list(arguments[1:])
    if "--" in own:
        own = own[: own.index("--")]
    position = 0
    while position < len(own):
        word = own[position]
        name, equals, value = word.partition("=")
        if len(name) > 2 and "--ipc-file".startswith(name):
            if not equals and position + 1 < len(own):
                position += 1
                value = own[position]
            found = value
        elif word.startswith("-x") and not word.startswith("--"):
            if len(word) > 2:
                found = word[2:]
            elif position + 1 < len(own):
                position += 1
                found = own[position]
        elif word in ("-c", "-p", "--conf", "--pid-file"):
            position += 1
        position += 1
    return found
