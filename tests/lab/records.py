# SPDX-License-Identifier: GPL-2.0-or-later
"""Records of sessions that a node of the laboratory can take, and an agent's answers to them."""

import socket
from typing import Any

import numpy as np
import numpy.typing as npt

from collector.record import AF_INET, ESTABLISHED, FNAT, RECORD, TCP, pick
from probes.agent import abi
from probes.agent.client import AgentClient
from tests.lab.net import Plan
from tests.lab.process import wait_for

Records = npt.NDArray[Any]
FIRST_PORT = 1025  # of the local ports that DPVS hands out
PORTS = 65536 - FIRST_PORT


def packed(address: str) -> Records:
    """An IPv4 address as the 16 bytes of a record."""
    return np.frombuffer(socket.inet_aton(address).ljust(16, b"\0"), np.uint8)


def fnat_records(plan: Plan, count: int, locals_: tuple[str, ...] = ()) -> Records:
    """FullNAT TCP sessions of the echo service, (count,) RECORD, all different: as many as local ports allow."""
    addresses = locals_ or tuple(plan.local_addresses)
    if count > PORTS * len(addresses):
        raise ValueError(f"{len(addresses)} local addresses have no {count} ports")
    records = np.zeros(count, RECORD)
    number = np.arange(count)
    records["slot"] = number
    records["af"] = records["af_out"] = AF_INET
    records["proto"], records["fwdmode"], records["state"] = TCP, FNAT, ESTABLISHED
    records["vaddr"] = packed(plan.vip)
    records["laddr"] = np.stack([packed(a) for a in addresses])[number // PORTS]
    records["daddr"] = np.stack([packed(a) for a in plan.servers])[number % len(plan.servers)]
    records["caddr"] = packed("172.16.0.0")
    records["caddr"][:, 2] = number >> 22
    records["caddr"][:, 3] = number >> 14 & 0xFF
    records["cport"] = 1024 + (number & 0x3FFF)
    records["vport"], records["dport"] = 7, 7
    records["lport"] = FIRST_PORT + number % PORTS
    records["fnat_isn"], records["fnat_delta"] = number * 7, number * 13
    records["timeout_ms"], records["worker"] = 90_000, 255
    return records


def answers(client: AgentClient, ops: npt.NDArray[np.uint8] | int, records: Records, limit_s: float = 20) -> Records:
    """Hand records over in as many requests as it takes, one after the other; the codes, (n,) uint8."""
    ops = np.full(len(records), ops, np.uint8) if isinstance(ops, int) else ops
    codes = []
    for begin in range(0, len(records), client.max_records):
        part = slice(begin, begin + client.max_records)
        codes.append(final_codes(client, client.submit(ops[part], records[part]), limit_s))
    return np.concatenate(codes)


def final_codes(client: AgentClient, request: int, limit_s: float = 20) -> Records:
    """The codes of a request, once they are final."""
    codes = None

    def there() -> bool:
        nonlocal codes
        codes = client.results(request)
        return codes is not None

    wait_for("the agent's answer", there, limit_s, 0.001)
    assert codes is not None
    return codes


def churn(client: AgentClient, records: Records, rounds: int, rng: np.random.Generator) -> int:
    """Put sessions in, again, and take them out, in random order, and say so if an answer is not the one that follows
    from the ones before. Ends with all of them taken out; how many were ever made.
    """
    here = np.zeros(len(records), np.bool_)
    made = 0
    for _ in range(rounds):
        for share in (0.9, 0.5, 0.0):  # of those looked at, so many are put in
            which = rng.permutation(len(records))[: len(records) if share == 0 else max(1, len(records) * 3 // 4)]
            put = rng.random(len(which)) < share
            before = here[which]
            expected = np.where(
                put,
                np.where(before, int(abi.Code.UPDATED), int(abi.Code.CREATED)),
                np.where(before, int(abi.Code.DELETED), int(abi.Code.ABSENT)),
            )
            ops = np.where(put, int(abi.RecordOp.UPSERT), int(abi.RecordOp.DELETE)).astype(np.uint8)
            codes = answers(client, ops, pick(records, which))
            if not (codes == expected).all():
                wrong = np.flatnonzero(codes != expected)
                raise AssertionError(f"{len(wrong)} answers: {codes[wrong[:8]]} instead of {expected[wrong[:8]]}")
            here[which] = put
            made += int(np.count_nonzero(codes == abi.Code.CREATED))
    assert not here.any()
    return made
