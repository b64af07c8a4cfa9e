# SPDX-License-Identifier: GPL-2.0-or-later
"""The session record: one numpy dtype, used by the table, the wire and the agent alike.

Rules: 144 bytes, little-endian, naturally aligned, no implicit padding; ``probes/agent/agent.c`` declares the same
struct and asserts its size. Addresses are in network order: 16 bytes, an IPv4 address in the first four and zeros
after it (DPVS leaves rubbish there, ``union inet_addr``). Ports are in network order. Sequence fields are copied as
DPVS holds them: ``fnat_*`` and ``sp_*`` in host order (``struct dp_vs_seq``), ``rs_end_*`` as the packet had them.

``rs_end_seq`` and ``rs_end_ack`` move with every packet of the real server and serve only the reset at expiry
(DPVS 1.10.2, ``ip_vs_proto_tcp.c: tcp_out_save_seq, tcp_send_rst``): they travel with a record, but a change of them
alone is not a change.

``claim`` orders the nodes that say of one session that it is theirs: the higher one is right, and of two equal ones
that of the higher node id (docs/ownership.md). The table sets it as a session becomes ours; no comparison counts it.
"""

import numpy as np
import numpy.typing as npt

from probes import layout

RECORD = np.dtype(
    {
        "names": [
            "slot", "generation", "af", "af_out", "proto", "fwdmode", "state", "flags",
            "caddr", "vaddr", "laddr", "daddr", "cport", "vport", "lport", "dport",
            "timeout_ms", "worker", "wscale_vs", "wscale_rs", "pp_version",
            "fnat_isn", "fnat_delta", "fnat_fdata_seq", "fnat_prev_delta",
            "sp_isn", "sp_delta", "sp_fdata_seq", "sp_prev_delta",
            "rs_end_seq", "rs_end_ack", "pp_sent", "claim",
        ],
        "formats": [
            "<u4", "<u4", "u1", "u1", "u1", "u1", "<u2", "<u2",
            "16u1", "16u1", "16u1", "16u1", ">u2", ">u2", ">u2", ">u2",
            "<u4", "u1", "u1", "u1", "u1",
            "<u4", "<u4", "<u4", "<u4",
            "<u4", "<u4", "<u4", "<u4",
            "<u4", "<u4", "u1", "<u4",
        ],
        "offsets": [
            0, 4, 8, 9, 10, 11, 12, 14,
            16, 32, 48, 64, 80, 82, 84, 86,
            88, 92, 93, 94, 95,
            96, 100, 104, 108,
            112, 116, 120, 124,
            128, 132, 136, 140,
        ],
        "itemsize": 144,
    }
)  # fmt: skip
WORDS = RECORD.itemsize // 8

AF_INET, AF_INET6 = 2, 10
TCP, UDP, SCTP = 6, 17, 132

# Forwarding modes: DPVS 1.10.2, include/conf/dest.h (enum dpvs_fwd_mode over IP_VS_CONN_F_*).
NAT, TUNNEL, DR, FNAT, SNAT, UNKNOWN_MODE = 0, 2, 3, 5, 6, 255
MODE_NAMES = {NAT: "NAT", TUNNEL: "TUNNEL", DR: "DR", FNAT: "FNAT", SNAT: "SNAT", UNKNOWN_MODE: "?"}

# Session flags: DPVS 1.10.2, include/conf/conn.h (IP_VS_CONN_F_*). INJECTED is ours; DPVS leaves that bit alone.
SYNPROXY, HASHED, INACTIVE, TEMPLATE, ONE_PACKET = 0x0010, 0x0100, 0x0200, 0x0400, 0x0800
IN_TIMER, REDIRECT_HASHED, INJECTED = 0x1000, 0x2000, 0x8000

UNKNOWN_WORKER = 255

# TCP states: DPVS 1.10.2, include/ipvs/proto_tcp.h.
NONE, ESTABLISHED, SYN_SENT, SYN_RECV, FIN_WAIT, TIME_WAIT, CLOSE, CLOSE_WAIT, LAST_ACK, LISTEN, SYNACK = range(11)
TCP_STATES = (
    "NONE", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT", "TIME_WAIT",
    "CLOSE", "CLOSE_WAIT", "LAST_ACK", "LISTEN", "SYNACK",
)  # fmt: skip
# UDP states, in the numbers of 1.10.2 whatever those of this node's release are.
UDP_NONE, UDP_ONEWAY, UDP_NORMAL = range(3)
UDP_STATES = layout.UDP_STATES
# SCTP states: include/ipvs/proto_sctp.h.
SCTP_INIT, SCTP_ESTABLISHED, SCTP_SHUTDOWN_ACK_SENT = 2, 8, 11
SCTP_STATES = (
    "NONE", "INIT1", "INIT", "COOKIE_SENT", "COOKIE_REPLIED", "COOKIE_WAIT", "COOKIE", "COOKIE_ECHOED",
    "ESTABLISHED", "SHUTDOWN_SENT", "SHUTDOWN_RECEIVED", "SHUTDOWN_ACK_SENT", "REJECTED", "CLOSED",
)  # fmt: skip

Records = npt.NDArray[np.void]
Bools = npt.NDArray[np.bool_]
Slots = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

# The words (8 bytes each) whose difference makes a record new to a peer: all but slot/generation (word 0), the worker
# bits that we only learn late, and rs_end_* (word 16).
COMPARE = np.full(WORDS, ~np.uint64(0), np.uint64)
COMPARE[0] = 0
COMPARE[16] = 0
COMPARE[11] &= ~np.uint64(0xFF << 32)  # worker, byte 92
# flags: only what outlives the packet being handled; hash and timer bits flicker while DPVS re-hashes.
COMPARE[1] &= ~np.uint64((HASHED | IN_TIMER | REDIRECT_HASHED) << 48)
COMPARE[17] = 0xFF  # pp_sent; the rest is padding, which numpy leaves undefined when it copies fields, and claim
# The words that make up the tuple: af, af_out, proto (word 1, lower bytes), addresses (2..9), ports (10). No session
# becomes a template, or one of one packet (DPVS sets these flags as it makes one): that is another session too.
_TUPLE_BITS_1 = np.uint64(0xFFFFFF | (TEMPLATE | ONE_PACKET) << 48)
_TUPLE_WORDS = np.zeros(WORDS, np.bool_)
_TUPLE_WORDS[2:11] = True
_IDENTITY_BYTES = 76
_DIGEST_BLOCK = 8192
_DIGEST_SALT = (np.arange(1, WORDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
_DIGEST_WEIGHTS = (_DIGEST_SALT * np.uint64(0xD1B54A32D192ED03)) | np.uint64(1)


def words(records: Records) -> Words:
    """Records, shape (n,), seen as (n, 18) little-endian 64-bit words; no copy, valid as long as ``records``."""
    contiguous = np.ascontiguousarray(records)
    return contiguous.view(np.uint64).reshape(len(contiguous), WORDS)


def pick(records: Records, which: Slots | Bools) -> Records:
    """``records[which]``, padding and all: plain indexing copies field by field and leaves rubbish between them."""
    rows = words(records)
    chosen = rows[which] if which.dtype == np.bool_ else rows.take(which, axis=0)  # which is twice as fast
    return chosen.view(RECORD).reshape(-1)


def differences(old: Words, new: Words) -> tuple[Bools, Bools]:
    """Of n pairs of records as words: (another session, anything that a peer must know differs), each (n,) bool.

    What ``rows.Rows.one`` decides for one row as it stores it.
    """
    apart = ((old ^ new) & COMPARE) != 0
    sort = ((old[:, 1] ^ new[:, 1]) & COMPARE[1] & _TUPLE_BITS_1) != 0
    return apart[:, _TUPLE_WORDS].any(axis=1) | sort, apart.any(axis=1)


def changed(old: Records, new: Records) -> Bools:
    """Which of n pairs differ in anything a peer must know; rs_end_*, slot, generation and worker do not count."""
    return differences(words(old), words(new))[1]


def same_identity(old: Records, new: Records) -> Bools:
    """Which of n pairs have the same tuple (families, protocol, four addresses, four ports) and are of one sort."""
    return ~differences(words(old), words(new))[0]


def identity(records: Records) -> npt.NDArray[np.void]:
    """The tuples of n records as opaque keys, (n,) V76: equal keys, equal sessions.

    Families, protocol, four addresses, four ports; nothing of the node that holds the session. A copy.
    """
    keys = np.zeros((len(records), _IDENTITY_BYTES), np.uint8)
    raw = np.ascontiguousarray(records).view(np.uint8).reshape(len(records), RECORD.itemsize)
    keys[:, :3] = raw[:, 8:11]
    keys[:, 4:] = raw[:, 16:88]
    return keys.view(f"V{_IDENTITY_BYTES}").reshape(len(records))


def digest(records: Records, *, by_slot: bool = True) -> int:
    """One 64-bit number for a set of n sessions, whatever their order: equal sets, equal digests.

    Takes in all that ``changed`` compares, and slot and generation too when ``by_slot``; leave those out to compare
    sessions of different nodes. Digests of disjoint sets add up modulo 2**64.
    """
    total = 0
    for start in range(0, len(records), _DIGEST_BLOCK):
        mixed = words(records[start : start + _DIGEST_BLOCK]) & COMPARE
        if by_slot:
            mixed[:, 0] = words(records[start : start + _DIGEST_BLOCK])[:, 0]
        mixed += _DIGEST_SALT
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
            mixed ^= mixed >> np.uint64(shift)
            mixed *= np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
        row = mixed @ _DIGEST_WEIGHTS
        row ^= row >> np.uint64(32)
        row *= np.uint64(0xD6E8FEB86659FD93)
        row ^= row >> np.uint64(32)
        total += int(row.sum(dtype=np.uint64))
    return total & 0xFFFFFFFFFFFFFFFF


def replicable(records: Records) -> Bools:
    """Which of n sessions a peer could carry on: not those of one packet, which have no second one."""
    return np.asarray((records["flags"] & ONE_PACKET) == 0)


def carried(records: Records) -> Bools:
    """Which of n sessions were put into a DPVS as copies: they wait there, or were carried on from another node."""
    return np.asarray((records["flags"] & INJECTED) != 0)


def waiting(records: Records) -> Bools:
    """Which of n sessions of a DPVS are copies that wait there for their first packet.

    The agent makes a copy SYNACK and INACTIVE (TCP) or NONE (``probes/agent/session.c``), and DPVS itself moves it on
    with the first packet. One that is NONE and TCP is just being made, or a template, which has no state.
    """
    states = records["state"]
    still = (records["proto"] == TCP) & (states == SYNACK) & ((records["flags"] & INACTIVE) != 0)
    return np.asarray(carried(records) & (still | (states == NONE)))


def state_name(proto: int, state: int) -> str:
    """The field's name of a session state; ``?<number>`` where DPVS has none."""
    names = {TCP: TCP_STATES, UDP: UDP_STATES, SCTP: SCTP_STATES}.get(proto, ())
    return names[state] if state < len(names) else f"?{state}"
