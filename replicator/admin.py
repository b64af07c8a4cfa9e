# SPDX-License-Identifier: GPL-2.0-or-later
"""The admin socket of a running attach: one line of JSON asks, lines of JSON answer, a last line ``{"done": true}``.

Rules: a request is ``{"command": NAME, ...}``. An answer that goes wrong ends with ``{"error": ..., "help": ...}``
instead of ``done``. This is who asks; ``admin_server`` answers. Nothing here may be slow to import: commands that are
run every second begin with it.
"""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from probes.errors import DpvsProbeError

Line = dict[str, Any]

ANSWER_BYTES = 4 << 20  # of one line
CLIENT_S = 60.0


class AdminError(DpvsProbeError):
    """The running attach answered with an error, or not at all."""

    help_text = "Look at what that attach printed; it may be of another version or just ending."


def ask(path: Path, command: str, /, **fields: Any) -> Iterator[Line]:
    """Send one request to the attach at ``path``, give its answer line by line. Raises AdminError."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(CLIENT_S)
            sock.connect(os.fspath(path))
            sock.sendall(json.dumps({"command": command, **fields}).encode() + b"\n")
            with sock.makefile("rb") as answer:
                yield from read_answer(answer, f"{path}")
    except OSError as error:
        raise AdminError(f"no answer on {path}: {error}") from error


def read_answer(answer: BinaryIO, name: str) -> Iterator[Line]:
    """The lines of an answer up to its end. Raises AdminError, OSError."""
    while text := answer.readline(ANSWER_BYTES):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise AdminError(f"the answer on {name} is not JSON") from error
        if not isinstance(line, dict):
            raise AdminError(f"the answer on {name} is no object")
        if "error" in line:
            raise AdminError(_printable(line["error"]) or "no reason", help_text=_printable(line.get("help", "")))
        if line.get("done") is True:
            return
        yield line
    raise AdminError(f"the answer on {name} broke off")


def _printable(text: Any) -> str:
    return "".join(c if c.isprintable() else " " for c in str(text)).strip()
