# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m tests.lab.confined UNIT COMMAND ...``: a command as confined as systemd would start it by a unit.

Of the unit count CapabilityBoundingSet, NoNewPrivileges, SystemCallFilter and SystemCallErrorNumber. The filter is the
kernel's own (seccomp(2)), made of what ``systemd-analyze syscall-filter`` says of each group.
"""

import ctypes
import errno
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 24, 38, 22
SECCOMP_MODE_FILTER = 2
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # struct sock_filter: code, jump if true, jump if false, operand
ARCH_X86_64 = 0xC000003E
NUMBERS = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
CAPABILITIES = Path("/usr/include/linux/capability.h")


class Fprog(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def setting(unit: str, name: str) -> list[str]:
    found = re.findall(rf"^{name}=(.*)$", unit, re.MULTILINE)
    return " ".join(found).split()


def defines(path: Path, prefix: str) -> dict[str, int]:
    found = re.findall(rf"^#define\s+{prefix}(\w+)\s+(\d+)\s*$", path.read_text(), re.MULTILINE)
    return {name.lower(): int(number) for name, number in found}


def system_calls(words: list[str]) -> set[str]:
    """Names of system calls, of groups and of groups in groups."""
    names: set[str] = set()
    for word in words:
        if word.startswith("@"):
            said = subprocess.run(
                ["systemd-analyze", "syscall-filter", word], capture_output=True, text=True, check=True
            )
            lines = [line.strip() for line in said.stdout.splitlines()[1:]]
            names |= system_calls([line for line in lines if line and not line.startswith("#")])
        else:
            names.add(word)
    return names


def program(numbers: list[int], otherwise: int) -> bytes:
    """The filter: those numbers are allowed."""
    made = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, ARCH_X86_64), (RETURN, 0, 0, otherwise), (LOAD, 0, 0, 0)]
    for number in numbers:
        made += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    made.append((RETURN, 0, 0, otherwise))
    return b"".join(struct.pack("<HBBI", *step) for step in made)


def confine(unit: str) -> None:
    """This process, from now on."""
    libc = ctypes.CDLL(None, use_errno=True)

    def prctl(*arguments: int) -> None:
        words = [ctypes.c_ulong(word) for word in (*arguments, 0, 0, 0, 0)[:5]]
        if libc.prctl(*words) != 0:
            raise OSError(ctypes.get_errno(), f"prctl {arguments[0]}: {os.strerror(ctypes.get_errno())}")

    known = defines(NUMBERS, "__NR_")
    allowed = sorted(known[name] for name in system_calls(setting(unit, "SystemCallFilter")) if name in known)
    (number,) = setting(unit, "SystemCallErrorNumber")
    code = program(allowed, ERRNO | getattr(errno, number))
    kept = {word.removeprefix("CAP_").lower() for word in setting(unit, "CapabilityBoundingSet")}
    for name, bit in defines(CAPABILITIES, "CAP_").items():
        if name not in kept:
            prctl(PR_CAPBSET_DROP, bit)
    if setting(unit, "NoNewPrivileges") == ["yes"]:
        prctl(PR_SET_NO_NEW_PRIVS, 1)
    buffer = ctypes.create_string_buffer(code)
    filter_ = Fprog(len(code) // 8, ctypes.addressof(buffer))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(filter_))


if __name__ == "__main__":
    confine(Path(sys.argv[1]).read_text())
    os.execv(sys.argv[2], sys.argv[2:])
