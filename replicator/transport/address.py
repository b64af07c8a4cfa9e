# SPDX-License-Identifier: GPL-2.0-or-later
"""Addresses of peers as a person writes them: ``HOST:PORT``, ``[IPv6]:PORT``, and ``*:PORT`` to listen everywhere."""

import asyncio
import ipaddress
import os
import re
import socket
from typing import NamedTuple

from probes.errors import DpvsProbeError

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_-]{1,63})*\.?")


class BadAddress(DpvsProbeError):
    """Text that names no address of a peer."""

    help_text = "Write HOST:PORT, or [IPv6 address]:PORT, for example 10.0.0.2:7700 or [fd00::2]:7700."


class UnknownHost(DpvsProbeError):
    """A host name that resolves to nothing."""

    help_text = "Check the name, or give the address itself."


class Address(NamedTuple):
    """Where a peer listens, or we do. ``host`` is a name, an address without brackets, or ``*``."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(text: str, *, listen: bool = False) -> Address:
    """The address that ``text`` names; raises BadAddress. ``*`` as host and port 0 are for listening only."""
    host, colon, port_text = text.strip().rpartition(":")
    if not colon:
        raise BadAddress(f"'{text}' has no port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        bare, _, scope = host.partition("%")
        if not _is_ip(bare, 6) or ("%" in host and not scope):
            raise BadAddress(f"'{text}': '{host}' is not an IPv6 address")
    elif ":" in host:
        raise BadAddress(f"'{text}': an IPv6 address needs brackets around it")
    elif not host:
        raise BadAddress(f"'{text}' has no host")
    elif not (listen and host == "*") and not _is_host(host):
        raise BadAddress(f"'{text}': '{host}' is neither an address nor a host name")
    if not (port_text.isascii() and port_text.isdigit() and len(port_text) <= 5 and int(port_text) <= 65535):
        raise BadAddress(f"'{text}': '{port_text}' is not a port (1 to 65535)")
    if int(port_text) == 0 and not listen:
        raise BadAddress(f"'{text}': nobody can be reached at port 0")
    return Address(host, int(port_text))


def metrics_address(text: str) -> Address:
    """Where to show metrics: as ``parse`` for listening, or a port alone, which is on the loopback interface."""
    return parse(f"127.0.0.1:{text}" if text.isdigit() else text, listen=True)


async def resolve(address: Address) -> None:
    """Make sure that the host of a peer resolves; raises UnknownHost."""
    try:
        await asyncio.get_running_loop().getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UnknownHost(f"cannot resolve '{address.host}' (peer {address}): {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Why a socket call failed, in the words of the system and without error numbers."""
    if isinstance(error, TimeoutError):
        return "no answer"
    if isinstance(error, socket.gaierror) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, OSError) and error.errno:
        return os_words(error.errno)
    return str(error) or type(error).__name__


def os_words(number: int) -> str:
    """``strerror`` in the middle of a sentence."""
    words = os.strerror(number)
    return words[:1].lower() + words[1:]


def _is_ip(text: str, version: int) -> bool:
    try:
        return ipaddress.ip_address(text).version == version
    except ValueError:
        return False


def _is_host(text: str) -> bool:
    # What looks like an IPv4 address must be one: 10.0.0.300 is a mistake, not a name.
    if re.fullmatch(r"[0-9.]+", text):
        return _is_ip(text, 4)
    return len(text) <= 253 and _NAME.fullmatch(text) is not None
