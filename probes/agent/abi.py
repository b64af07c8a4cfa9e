# SPDX-License-Identifier: GPL-2.0-or-later
"""What the agent inside DPVS and we outside share: ``agent_abi.h``, mirrored.

Rules: the header is the one place that declares it. The list of struct fields whose offsets the agent needs is read
from that very file; the structs are mirrored as numpy dtypes, and a test compiles the header and compares the two.
Everything is little-endian.
"""

import re
from enum import IntEnum
from pathlib import Path

import numpy as np

HEADER = Path(__file__).with_name("agent_abi.h")

ABI = 2
BUILD = 6
MAX_RECORDS = 4096
MAX_REQUESTS = 8
RESULTS = 64
MAX_WORKERS = 64
OFFSETS = 128
CONFIG_MAGIC = b"DPVSPROBE-CONFIG"
DOOR_MAGIC = b"DPVSPROBE-DOOR-1"
REQUEST_MAGIC = int.from_bytes(b"DPVSPRB1", "little")
RECORD_BYTES = 144


class State(IntEnum):
    """What the door says of the agent."""

    LOADING = 0
    READY = 1
    RETIRED = 2
    POISONED = 3
    FAILED = 4
    REPLACED = 5


class Op(IntEnum):
    """What a request asks."""

    HELLO = 1
    BATCH = 2
    RETIRE = 3
    REVIVE = 4
    TRIAL = 5


class RecordOp(IntEnum):
    """What to do with one record."""

    UPSERT = 1
    DELETE = 2
    CHECK = 3
    YIELD = 4
    CLAIM = 5


class Code(IntEnum):
    """What became of one record. Below 16: done or rightly left alone; 16-31: may work later; from 32: never will."""

    PENDING = 0
    CREATED = 1
    UPDATED = 2
    DELETED = 3
    ABSENT = 4
    LIVE = 5
    FOREIGN = 6
    WAITING = 7
    YIELDED = 8
    NO_SERVICE = 16
    NO_DEST = 17
    NO_LADDR = 18
    PORT_BUSY = 19
    NO_MEMORY = 20
    BUSY = 21
    OVERLOAD = 22
    BAD_RECORD = 32
    UNSUPPORTED = 33
    WRONG_WORKER = 34
    MODE_MISMATCH = 35
    RETIRED = 36


# Fields that the agent can do without: it refuses what would need one that it is not given. Those of a service are for
# templates.
OPTIONAL: tuple[tuple[str, str | None], ...] = (
    *(("dp_vs_conn", member) for member in ("syn_proxy_seq", "wscale_vs", "wscale_rs", "pp_version", "pp_sent")),
    *(("dp_vs_service", member) for member in ("flags", "timeout", "netmask")),
)

RETRYABLE = 16  # codes from here to PERMANENT - 1
PERMANENT = 32

CONFIG = np.dtype(
    [
        ("magic", "S16"), ("abi", "<u4"), ("filled", "<u4"), ("token", "<u8"), ("version", "S32"),
        ("time_limit_ms", "<u4"), ("sockopt_version", "<u4"), ("sockopt_set_conn", "<u4"),
        ("sockopt_get_conn_min", "<u4"), ("sockopt_get_conn_max", "<u4"),
        ("msg_type_work", "<u4"), ("msg_type_done", "<u4"), ("chunk_limit_ns", "<u4"),
        ("worker_share", "<u4"), ("watchdog_ms", "<u4"), ("start_retired", "<u4"), ("udp_waits", "<u4"),
        ("digest", "<u8"), ("old_door", "<u8"), ("old_token", "<u8"), ("offsets", "<u2", OFFSETS),
    ]
)  # fmt: skip

WORKER = np.dtype([("chunks", "<u8"), ("records", "<u8"), ("busy_ns", "<u8"), ("max_ns", "<u8"), ("late", "<u8")])

RESULT = np.dtype(
    [
        ("request_id", "<u8"), ("count", "<u4"), ("done", "<u4"), ("begin_ns", "<u8"), ("end_ns", "<u8"),
        ("conn", "<u8"), ("reserved", "<u8"),
    ]
)  # fmt: skip
# What the door's ``results`` points to: RESULTS heads, then as many arrays of MAX_RECORDS codes.
RESULT_HEADS_BYTES = RESULTS * RESULT.itemsize

DOOR = np.dtype(
    [
        ("magic", "S16"), ("abi", "<u4"), ("state", "<u4"), ("token", "<u8"), ("entry", "<u8"), ("slot", "<u8"),
        ("pid", "<u4"), ("n_workers", "<u4"), ("worker_mask", "<u8"), ("hello_nonce", "<u8"),
        ("version", "S32"), ("error", "S128"),
        ("requests", "<u8"), ("malformed", "<u8"), ("wrong_token", "<u8"), ("busy", "<u8"), ("refused", "<u8"),
        ("outstanding", "<u8"), ("loaded_ns", "<u8"),
        ("set_handler", "<u8"), ("work_handler", "<u8"), ("done_handler", "<u8"), ("trampolines", "<u8"),
        ("build", "<u4"), ("worker_share", "<u4"), ("digest", "<u8"), ("results", "<u8"), ("accepted", "<u8"),
        ("reserved", "<u8", 4),
        ("by_code", "<u8", 64), ("workers", WORKER, MAX_WORKERS),
    ]
)  # fmt: skip

REQUEST = np.dtype(
    [
        ("magic", "<u8"), ("abi", "<u4"), ("op", "<u4"), ("token", "<u8"), ("request_id", "<u8"),
        ("count", "<u4"), ("record_bytes", "<u4"), ("reserved", "<u8", 3),
    ]
)  # fmt: skip


def fields() -> list[tuple[str, str | None]]:
    """The (struct, field) pairs of ``AGENT_FIELDS`` in order; field None asks for the size of the struct."""
    out: list[tuple[str, str | None]] = []
    for kind, inner in re.findall(r"^\t(FIELD|SIZE)\(([^)]*)\)", HEADER.read_text(), re.MULTILINE):
        names = [n.strip() for n in inner.split(",")]
        out.append((names[0], names[1] if kind == "FIELD" else None))
    return out
