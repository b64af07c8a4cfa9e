# SPDX-License-Identifier: GPL-2.0-or-later
"""A cpio archive ("newc") in memory: the first file system of the virtual machine."""

import stat

_TRAILER = "TRAILER!!!"


class Archive:
    """Add directories, files and devices in the order in which they shall appear; ``bytes`` at the end."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._inodes = 0

    def directory(self, name: str) -> None:
        """An empty directory; its parent comes first."""
        self._entry(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, *, executable: bool = False) -> None:
        """A regular file."""
        self._entry(name, stat.S_IFREG | (0o755 if executable else 0o644), data)

    def console(self) -> None:
        """/dev/console, without which init has no output."""
        self._entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))

    def __bytes__(self) -> bytes:
        self._entry(_TRAILER, 0)
        return b"".join(self._parts)

    def _entry(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inodes += 1
        path = name.encode() + b"\0"
        fields = (self._inodes, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        self._append(b"070701" + b"".join(b"%08x" % field for field in fields) + path)
        self._append(data)

    def _append(self, data: bytes) -> None:
        """Every header with its name, and every body, ends at a multiple of four."""
        padded = data + b"\0" * (-(self._size + len(data)) % 4)
        self._parts.append(padded)
        self._size += len(padded)
