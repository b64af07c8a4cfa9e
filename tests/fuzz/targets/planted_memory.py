# SPDX-License-Identifier: GPL-2.0-or-later
"""No decoder of ours: one that makes room for what a header announces, to see that this is found."""

from collections.abc import Iterable

from tests.fuzz.judge import SLACK_BYTES

MAX_BYTES = 64
WORDS = ()


def seeds() -> Iterable[bytes]:
    yield bytes(4)


def bound(data: bytes) -> int:
    return SLACK_BYTES + len(data)


def check(data: bytes) -> None:
    bytearray(int.from_bytes(data[:4], "little") & 0xFFFFFF)
