# SPDX-License-Identifier: GPL-2.0-or-later
"""What an interface would do with an XDP program, asked of the kernel without putting one on.

Rules: two questions over netlink, nothing is changed. Whether the driver takes XDP itself is known since Linux 6.3
(family ``netdev``, include/uapi/linux/netdev.h); before that only trying tells.
"""

import socket
from typing import NamedTuple

from pyroute2 import IPRoute
from pyroute2.netlink import NLM_F_REQUEST, genlmsg
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import GenericNetlinkSocket

_DEV_GET = 1
_BASIC = 1  # NETDEV_XDP_ACT_BASIC: the driver runs programs
_PROGRAMS = ("IFLA_XDP_PROG_ID", "IFLA_XDP_DRV_PROG_ID", "IFLA_XDP_SKB_PROG_ID", "IFLA_XDP_HW_PROG_ID")


class _Dev(genlmsg):  # type: ignore[misc]
    nla_map = (("UNSPEC", "none"), ("IFINDEX", "uint32"), ("PAD", "hex"), ("XDP_FEATURES", "uint64"))


class Interface(NamedTuple):
    """One interface as it is now."""

    program: int | None  # the id of the XDP program on it, 0 where the kernel does not tell; None: there is none
    native: bool | None  # the driver takes XDP; None: this kernel does not say


def look(name: str) -> Interface:
    """Raises OSError where there is no such interface, or the kernel does not answer."""
    number = socket.if_nametoindex(name)
    try:
        with IPRoute() as handle:
            (link,) = handle.get_links(number)
        xdp = link.get_attr("IFLA_XDP")
        return Interface(_program(xdp), _native(number))
    except NetlinkError as error:
        raise OSError(error.code, f"netlink: {error}") from None


def _program(xdp: object) -> int | None:
    """From IFLA_XDP of a link."""
    said = dict(xdp["attrs"]) if isinstance(xdp, dict) else {}
    if not said.get("IFLA_XDP_ATTACHED"):
        return None
    return next((int(said[name]) for name in _PROGRAMS if said.get(name)), 0)


def _native(number: int) -> bool | None:
    with GenericNetlinkSocket() as handle:
        try:
            handle.bind("netdev", _Dev)
            question = _Dev()
            question["cmd"], question["version"], question["attrs"] = _DEV_GET, 1, [("IFINDEX", number)]
            (answer,) = handle.nlm_request(question, msg_type=handle.prid, msg_flags=NLM_F_REQUEST)
        except NetlinkError:
            return None
        features = answer.get_attr("XDP_FEATURES")
    return None if features is None else bool(features & _BASIC)
