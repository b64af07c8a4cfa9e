# SPDX-License-Identifier: GPL-2.0-or-later
"""Hugepages and a hugetlbfs mount of our own, both given back.

Rules: other programs of this machine may use hugepages at the same time. So the pool is only ever moved by differences
(raised by what is missing, lowered by what we raised), under a lock of our own, and nobody's mount but ours is touched.
"""

import ctypes
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE_BYTES = 2 << 20
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
LOCK = Path("/run/dpvs-lab.lock")
_libc = ctypes.CDLL(None, use_errno=True)


class HugepageError(RuntimeError):
    """The kernel did not give what was asked for."""


@contextmanager
def pool_lock() -> Iterator[None]:
    with open(LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _number(name: str) -> int:
    return int((POOL / name).read_text())


def raise_pool(pages: int) -> int:
    """Make the pool larger by ``pages``; returns by how many it grew, which ``lower_pool`` takes back."""
    with pool_lock():
        before = _number("nr_hugepages")
        if pages > 0:
            (POOL / "nr_hugepages").write_text(str(before + pages))
        grown = _number("nr_hugepages") - before
        if grown < pages:
            if grown > 0:
                (POOL / "nr_hugepages").write_text(str(before))
            raise HugepageError(f"wanted {pages} more hugepages of 2 MiB, the kernel had memory for {grown}")
        return grown


def lower_pool(pages: int) -> None:
    if pages > 0:
        with pool_lock():
            (POOL / "nr_hugepages").write_text(str(max(0, _number("nr_hugepages") - pages)))


def mount(where: Path) -> None:
    where.mkdir(parents=True, exist_ok=True)
    if _libc.mount(b"nodev", os.fsencode(where), b"hugetlbfs", 0, b"pagesize=2M") != 0:
        raise HugepageError(f"cannot mount hugetlbfs on {where}: {os.strerror(ctypes.get_errno())}")


def unmount(where: Path) -> None:
    detach = 2  # MNT_DETACH: a process that still maps pages keeps them, the directory goes
    if os.path.ismount(where) and _libc.umount2(os.fsencode(where), detach) != 0:
        raise HugepageError(f"cannot unmount {where}: {os.strerror(ctypes.get_errno())}")
