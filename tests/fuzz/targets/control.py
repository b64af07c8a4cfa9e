# SPDX-License-Identifier: GPL-2.0-or-later
"""probes/control.py: what may come out of DPVS's control socket.

An input is which question u8, size of a piece u8, and the replies one after the other; a connection takes the next one.
"""

import struct
from collections.abc import Iterable
from functools import cache
from typing import Any
from unittest.mock import patch

from probes.control import ControlSocket
from probes.errors import DpvsProbeError
from probes.layout import Layout
from tests.fuzz.judge import SLACK_BYTES, must, only

MAX_BYTES = 4096
WORDS = (b"\x01\x00\x00\x00", b"\x00\x00\x00\x80", b"\xfc\xff\xff\xff", b"\x00\x00\x00\x04", b"\xff\xff\xff\xff")
QUESTIONS = ("release", "session", "sessions", "set")
TAKEN_BYTES = 1 << 20  # of one reply: what is announced is made room for


@cache
def _layout() -> Layout:
    return Layout.load("1.10.2")


def _reply(name: str, body: bytes, code: int = 0, text: bytes = b"") -> bytes:
    layout = _layout()
    out = bytearray(layout.size("dpvs_sock_msg_reply"))
    fields = {
        "version": layout.sockopt_version,
        "id": layout.sockopt_id(name),
        "type": 0,
        "errcode": code,
        "len": len(body),
    }
    for field, value in fields.items():
        offset, size = layout.field("dpvs_sock_msg_reply", field)
        out[offset : offset + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    offset, size = layout.field("dpvs_sock_msg_reply", "errstr")
    out[offset : offset + len(text)] = text[:size]
    return bytes(out) + body


def _array(count: int, result: int, worker: int = 1) -> bytes:
    layout = _layout()
    body = bytearray(layout.offset("ip_vs_conn_array", "array") + count * layout.size("ip_vs_conn_entry"))
    for field, value in (("nconns", count), ("resl", result), ("curcid", worker)):
        offset, size = layout.field("ip_vs_conn_array", field)
        body[offset : offset + size] = value.to_bytes(size, "little")
    return bytes(body)


def seeds() -> Iterable[bytes]:
    layout = _layout()
    yield b"\x00\x00" + _reply(
        "DPVS_SO_GET_INFO", struct.pack("<I", 0x10A02).ljust(layout.size("dp_vs_getinfo"), b"\0")
    )
    yield b"\x01\x03" + _reply("SOCKOPT_GET_CONN_SPECIFIED", _array(1, 1))
    yield b"\x01\x00" + _reply("SOCKOPT_GET_CONN_SPECIFIED", b"", -4, b"not exist")
    yield b"\x01\x00" + _reply("SOCKOPT_GET_CONN_SPECIFIED", b"", -1, b"no\nmemory \xff")
    yield b"\x02\x40" + _reply("SOCKOPT_GET_CONN_ALL", _array(2, 2)) + _reply("SOCKOPT_GET_CONN_ALL", _array(1, 1))


def bound(data: bytes) -> int:
    return 2 * SLACK_BYTES + 2 * TAKEN_BYTES + 16 * len(data)


class _Connection:
    """Gives what is left of the replies, in pieces."""

    def __init__(self, replies: bytearray, piece: int) -> None:
        self._replies, self._piece = replies, piece

    def __enter__(self) -> "_Connection":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def settimeout(self, seconds: float) -> None:
        pass

    def sendall(self, data: bytes) -> None:
        pass

    def recv_into(self, buffer: memoryview) -> int:
        size = min(self._piece, len(buffer), len(self._replies))
        buffer[:size] = self._replies[:size]
        del self._replies[:size]
        return size


class _Control(ControlSocket):
    def __init__(self, data: bytes) -> None:
        super().__init__("/run/dpvs.ipc", _layout())
        self._replies, self._piece = bytearray(data[2:]), data[1] + 1

    def _connect(self, size: int) -> Any:
        return _Connection(self._replies, self._piece)


def check(data: bytes) -> None:
    layout = _layout()
    if len(data) < 2 + layout.size("dpvs_sock_msg_reply"):
        return
    control, which = _Control(data), data[0] % len(QUESTIONS)
    with only(DpvsProbeError), patch("probes.control.MAX_REPLY_BYTES", TAKEN_BYTES):
        if which == 0:
            must(0 <= control.release() < 1 << 32, "a release is a number")
        elif which == 1:
            row = control.session(2, 6, bytes(4), 1, bytes(4), 2)
            must(row is None or row.dtype == control.entry_dtype, "a session, or none")
        elif which == 2:
            rows = control.sessions()
            must(rows.nbytes <= len(data), "no more sessions than came")
        else:
            code, text, body = control.request(0, layout.sockopt_id("DPVS_SO_GET_INFO"), b"")
            must(-(1 << 31) <= code < 1 << 31 and len(body) <= len(data), "an error is a number")
            must(text.isprintable(), "DPVS's words can be printed")
