# SPDX-License-Identifier: GPL-2.0-or-later
import asyncio

import pytest

from replicator.transport.address import Address, BadAddress, UnknownHost, parse, resolve


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.9.8.1:7700", "10.9.8.1", 7700),
        ("node-b.example.com:1", "node-b.example.com", 1),
        ("node_b:65535", "node_b", 65535),
        ("[fd00::2]:7700", "fd00::2", 7700),
        ("[fe80::1%eth0]:7700", "fe80::1%eth0", 7700),
        (" localhost:80 ", "localhost", 80),
    ],
)
def test_parse(text: str, host: str, port: int) -> None:
    address = parse(text)
    assert address == (host, port)
    assert parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("10.9.8.1", "has no port"),
        ("", "has no port"),
        (":7700", "has no host"),
        ("fd00::2:7700", "needs brackets"),
        ("[fd00::2]", "not a port|needs brackets|not an IPv6"),
        ("[10.0.0.1]:80", "not an IPv6 address"),
        ("10.0.0.300:80", "neither an address nor a host name"),
        ("10.0.0:80", "neither an address nor a host name"),
        ("a b:80", "neither an address nor a host name"),
        ("*:80", "neither an address nor a host name"),
        ("host:", "not a port"),
        ("host:65536", "not a port"),
        ("host:-1", "not a port"),
        ("host:http", "not a port"),
        ("host:٣", "not a port"),
        ("host:0", "port 0"),
    ],
)
def test_parse_refuses(text: str, says: str) -> None:
    with pytest.raises(BadAddress, match=says) as caught:
        parse(text)
    assert "HOST:PORT" in caught.value.help_text
    assert "\n" not in str(caught.value)


def test_listen_everywhere_and_on_any_port() -> None:
    assert parse("*:7700", listen=True) == Address("*", 7700)
    assert parse("127.0.0.1:0", listen=True) == Address("127.0.0.1", 0)


def test_resolve() -> None:
    asyncio.run(resolve(Address("127.0.0.1", 1)))
    with pytest.raises(UnknownHost, match=r"cannot resolve 'no-such-host\.invalid'"):
        asyncio.run(resolve(Address("no-such-host.invalid", 7700)))
