# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/admin.py, admin_server.py and query.py: requests to the admin socket, and what they select.

An input is one line as a client may send it, or, behind a byte 0, lines as a server may answer them.
"""

import io
import json
from collections.abc import Iterable
from functools import cache

from collector.record import Records
from replicator import admin, admin_server, query
from replicator.admin import AdminError
from replicator.admin_server import BadRequest
from replicator.query import BadFilter, Filter
from tests.fuzz.judge import SLACK_BYTES, must, only
from tests.unit.session_records import sessions

MAX_BYTES = 16 << 10
WORDS = (
    b'"command"', b'"sessions"', b'"address"', b'"port"', b'"proto"', b'"state"', b'"origin"', b'"limit"', b'"own"',
    b'"error"', b'"help"', b'"done"', b"true", b"null", b"NaN", b"Infinity", b"1e999", b"[[[[[[[[",
    b'{"a":{"a":', b"\\ud800",
)  # fmt: skip


def seeds() -> Iterable[bytes]:
    yield b'{"command": "status"}\n'
    wanted = {"address": "10.0.0.1", "port": 80, "proto": "tcp", "state": "established", "origin": "own", "limit": 3}
    yield json.dumps({"command": "sessions", **wanted}).encode() + b"\n"
    yield json.dumps({"command": "sessions", "address": "fd00::1", "proto": "17", "state": "NONE"}).encode() + b"\n"
    yield b'\0{"pid": 7, "sessions": {"own": 3}}\n{"done": true}\n'
    yield b'\0{"error": "there is no command x", "help": "The commands are ..."}\n'


def bound(data: bytes) -> int:
    return 4 * SLACK_BYTES + 64 * len(data)  # "[[[[" is 56 bytes a list


@cache
def _records() -> Records:
    return sessions(4)


def check(data: bytes) -> None:
    if data[:1] == b"\0":
        answered(data[1:])
        return
    with only(BadRequest, BadFilter):
        request = admin_server._parse(data)
        must(isinstance(request["command"], str), "a request names its command")
        wanted = Filter.of(request)
        hit = wanted.matches(_records())
        lines = list(query.describe(_records()[hit], query.OWN)) if wanted.wants(query.OWN) else []
        must(json.loads(json.dumps(lines)) == lines, "an answer can be sent")


def answered(text: bytes) -> None:
    """What a client makes of an answer."""
    with only(AdminError):
        for line in admin.read_answer(io.BytesIO(text), "/run/x.sock"):
            must(isinstance(line, dict), "a line is an object")
