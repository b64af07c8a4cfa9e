# SPDX-License-Identifier: GPL-2.0-or-later
"""What systemd is told (sd_notify(3)), and the journal's own protocol (https://systemd.io/JOURNAL_NATIVE_PROTOCOL).

Rules: without systemd nothing of it happens and nothing fails. Both are datagrams on Unix sockets; one that cannot be
sent at once is dropped, as neither may hold up or end what it tells of.
"""

import logging
import os
import socket
import stat
import struct
import time
from collections.abc import Mapping
from typing import Any

JOURNAL = "/run/systemd/journal/socket"
IDENTIFIER = "dpvs-probe"
# syslog(3) priorities
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_MAX_BYTES = 128 << 10

common: dict[str, Any] = {}  # fields that every entry of this process has from now on


def notify(text: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Tell the service manager; ``text``: assignments, one a line. Whether there is one that was told."""
    where = environment.get("NOTIFY_SOCKET", "")
    if not where.startswith(("/", "@")):
        return False
    address = "\0" + where[1:] if where.startswith("@") else where
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
            sock.sendto(text.encode(), address)
    except OSError as error:
        logging.getLogger(__name__).debug("the service manager cannot be told: %s", error)
        return False
    return True


def ready(status: str) -> bool:
    """The service is up."""
    return notify(f"READY=1\nSTATUS={status}")


def reloading() -> bool:
    """Settings are being read again; ``ready`` ends that."""
    return notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_s(environment: Mapping[str, str] = os.environ) -> float | None:
    """How often the service manager wants to hear of us at least; None if it does not watch us."""
    text, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not (text.isascii() and text.isdigit() and int(text) > 0) or (pid and pid != str(os.getpid())):
        return None
    return int(text) / 1e6


def under_journal(fd: int = 2, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether what is written to ``fd`` goes to the journal."""
    device, colon, inode = environment.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return bool(colon) and (device, inode) == (str(found.st_dev), str(found.st_ino)) and stat.S_ISSOCK(found.st_mode)


class JournalHandler(logging.Handler):
    """Log records with fields of their own: DPVS_PROBE_PART, and those in ``common``, such as DPVS_PID.

    A record's ``extra={"fields": {"PEER": ...}}`` adds more. Names are upper case letters, digits and underscores.
    """

    def __init__(self, path: str = JOURNAL) -> None:
        super().__init__()
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self.dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = self.format(record)
            priority = next((number for level, number in _PRIORITIES if record.levelno >= level), 7)
            fields = {
                "MESSAGE": message,
                "PRIORITY": priority,
                "SYSLOG_IDENTIFIER": IDENTIFIER,
                "CODE_FILE": record.pathname,
                "CODE_LINE": record.lineno,
                "CODE_FUNC": record.funcName,
                "DPVS_PROBE_PART": record.name,
                **common,
                **getattr(record, "fields", {}),
            }
            self._socket.sendto(pack(fields), self._path)
        except Exception:
            self.dropped += 1

    def close(self) -> None:
        self._socket.close()
        super().close()


def pack(fields: Mapping[str, Any]) -> bytes:
    """One entry: NAME=value and a newline, or, where a value has newlines, its length as 64 bits before it."""
    entry = bytearray()
    for name, value in fields.items():
        if value is None:
            continue
        data = str(value).encode(errors="replace")[:_MAX_BYTES]
        if b"\n" in data:
            entry += name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
        else:
            entry += name.encode() + b"=" + data + b"\n"
    return bytes(entry)
