# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows and services as arrays: the structs of ``bpf/packet.bpf.c``.

Addresses: 16 bytes in network order, an IPv4 address in the first four and zeros after it. Ports in network order. af
2 or 10, as the system has it. Times CLOCK_MONOTONIC.
"""

import numpy as np

# struct flow_key
FLOW_KEY = np.dtype(
    [
        ("caddr", "16u1"),
        ("vaddr", "16u1"),
        ("cport", ">u2"),
        ("vport", ">u2"),
        ("proto", "u1"),
        ("af", "u1"),
        ("zero", "<u2"),
    ]
)
# struct flow
FLOW = np.dtype(
    [
        ("first_ns", "<u8"),
        ("last_ns", "<u8"),
        ("packets", "<u8"),
        ("bytes", "<u8"),  # of whole frames
        ("flags", "<u4"),  # of TCP, all that were seen
        ("zero", "<u4"),
    ]
)
# struct service
SERVICE = np.dtype([("addr", "16u1"), ("port", ">u2"), ("proto", "u1"), ("af", "u1")])
