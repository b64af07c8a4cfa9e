# SPDX-License-Identifier: GPL-2.0-or-later
"""Session records for tests."""

import numpy as np
import numpy.typing as npt

from collector import record
from collector.record import RECORD, Records


def sessions(n: int, *, first: int = 0, ipv6: bool = False, state: int = record.ESTABLISHED) -> Records:
    """n FullNAT sessions with distinct tuples, in slots first, first + 1, ...; generation 1."""
    out = np.zeros(n, RECORD)
    numbers = np.arange(first, first + n)
    out["slot"], out["generation"] = numbers, 1
    out["af"] = out["af_out"] = record.AF_INET6 if ipv6 else record.AF_INET
    out["proto"], out["fwdmode"], out["state"], out["flags"] = record.TCP, record.FNAT, state, record.HASHED
    size = 16 if ipv6 else 4
    for name, base in (("caddr", 10), ("vaddr", 11), ("laddr", 12), ("daddr", 13)):
        out[name][:, 0] = base
        if name == "caddr":
            for byte in (1, 2):
                out[name][:, size - byte] = numbers >> (8 * (byte - 1)) & 0xFF
    out["cport"], out["vport"], out["dport"] = 1024 + numbers % 60000, 80, 8080
    out["lport"] = 1024 + numbers % 60000
    out["timeout_ms"], out["worker"] = 90_000, record.UNKNOWN_WORKER
    out["fnat_isn"], out["fnat_delta"] = numbers * 7 + 1, numbers * 13 + 5
    return out


def random_sessions(rng: np.random.Generator, n: int, slots: int, *, ipv6: bool = False) -> Records:
    """n records of noise that are records all the same, in distinct slots."""
    raw: npt.NDArray[np.uint8] = rng.integers(0, 256, (n, RECORD.itemsize), dtype=np.uint8)
    raw[:, 137:] = 0
    out: Records = raw.view(RECORD).reshape(n)
    out["slot"] = rng.permutation(slots)[:n]
    out["generation"] = rng.integers(1, 1 << 32, n)
    out["af"] = out["af_out"] = record.AF_INET6 if ipv6 else record.AF_INET
    if not ipv6:
        for name in ("caddr", "vaddr", "laddr", "daddr"):
            out[name][:, 4:] = 0
    return out
