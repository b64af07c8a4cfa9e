# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/rehearsal.py: why sessions are not put in."""

import numpy as np

from collector.record import (
    AF_INET,
    AF_INET6,
    ESTABLISHED,
    FNAT,
    ONE_PACKET,
    RECORD,
    SCTP,
    SCTP_ESTABLISHED,
    SNAT,
    SYN_SENT,
    TCP,
    TEMPLATE,
    TIME_WAIT,
    UDP,
    UDP_NONE,
)
from replicator.inject import injectable
from replicator.rehearsal import refusals


def test_each_session_has_one_reason_or_none() -> None:
    cases: list[tuple[dict[str, int], str | None]] = [
        ({}, None),
        ({"proto": UDP, "state": 1}, None),
        ({"flags": TEMPLATE, "state": 0}, None),
        ({"flags": TEMPLATE, "dport": 0xFFFF}, "a template of persistence that is out of use"),
        ({"flags": TEMPLATE, "fwdmode": SNAT}, "a template of persistence that is out of use"),
        ({"flags": ONE_PACKET}, "of one packet only"),
        ({"proto": SCTP, "state": SCTP_ESTABLISHED}, None),
        ({"proto": SCTP, "state": 1}, "not open yet, or ended"),
        ({"proto": 50}, "protocol 50"),
        ({"state": SYN_SENT}, "not open yet, or ended"),
        ({"state": TIME_WAIT}, "not open yet, or ended"),
        ({"proto": UDP, "state": UDP_NONE}, "not open yet, or ended"),
        ({"fwdmode": SNAT}, "forwarding mode SNAT, or its address families"),
        ({"fwdmode": SNAT, "state": SYN_SENT}, "forwarding mode SNAT, or its address families"),
        ({"af": AF_INET, "af_out": AF_INET6}, "forwarding mode FNAT, or its address families"),
    ]
    records = np.zeros(len(cases), RECORD)
    records["af"] = records["af_out"] = AF_INET
    records["proto"], records["fwdmode"], records["state"] = TCP, FNAT, ESTABLISHED
    for at, (fields, _) in enumerate(cases):
        for name, value in fields.items():
            records[name][at] = value
    reasons: list[list[str]] = [[] for _ in cases]
    for why, which in refusals(records):
        for at in np.flatnonzero(which):
            reasons[int(at)].append(why)
    assert reasons == [[why] if why else [] for _, why in cases]
    assert injectable(records).tolist() == [why is None for _, why in cases]
