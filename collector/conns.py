# SPDX-License-Identifier: GPL-2.0-or-later
"""DPVS's sessions, as they are read from its memory, made session records."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from .record import RECORD, Records, Slots, words
from .rows import Conversion

# What of a session goes where in a record (``rows.Conversion``).
_BYTES = ("af", "af_out", "proto", "wscale_vs", "wscale_rs", "pp_version", "pp_sent")
_SHORTS = ("state", "flags", "cport", "vport", "lport", "dport")
_WORDS = ("packet_xmit", "timeout_s")
_ADDRESSES = ("caddr", "vaddr", "laddr", "daddr")
_NUMBERS = (
    *(f"fnat_seq_{part}" for part in ("isn", "delta", "fdata_seq", "prev_delta")),
    *(f"syn_proxy_seq_{part}" for part in ("isn", "delta", "fdata_seq", "prev_delta")),
    "rs_end_seq", "rs_end_ack",
)  # fmt: skip


def conversion(conns: "np.dtype[np.void]", modes: Mapping[int, int]) -> Conversion:
    """How sessions that are read as ``conns`` become records.

    ``conns``: the layout's ``dp_vs_conn`` fields (``probes.memory.SessionPool.read``), aligned as in C, a multiple of 8
    bytes;
    ``modes``: address of a ``dp_vs_xmit_*`` function -> forwarding mode, as a session keeps its mode only as its
    transmit function.
    """
    fields = conns.fields
    assert fields is not None

    def places(names: Sequence[str], size: int) -> Slots:
        offsets = np.array([fields[name][1] for name in names], np.int64)
        if (offsets % size).any() or conns.itemsize % 8:
            raise ValueError(f"fields that are not aligned, among {', '.join(names)}")
        return offsets // size

    addresses = places(_ADDRESSES, 4)[:, None] + np.arange(4)
    return Conversion(
        np.concatenate((addresses.ravel(), places(_NUMBERS, 4))).reshape(-1, 2),
        places(_BYTES, 1),  # little-endian: of a longer number the low byte
        places(_SHORTS, 2),
        places(_WORDS, 8),
        np.fromiter(modes.keys(), np.uint64, len(modes)),
        np.fromiter(modes.values(), np.uint8, len(modes)),
    )


def as_words(conns: Records) -> npt.NDArray[np.uint64]:
    """n sessions as they were read, seen as (n, any) words; no copy if they are contiguous."""
    return np.ascontiguousarray(conns).view(np.uint64).reshape(len(conns), conns.dtype.itemsize // 8)


def from_conns(conns: Records, slots: Slots, modes: Mapping[int, int]) -> Records:
    """Session records of n DPVS sessions, shape (n,).

    ``conns``: shape (n,), see ``conversion``; ``slots``: (n,) int64. Generation stays 0, worker unknown: the table
    fills both.
    """
    out = np.empty(len(conns), RECORD)
    how = conversion(conns.dtype, modes)
    how.read(as_words(conns))
    how.rows(slots, words(out))
    return out
