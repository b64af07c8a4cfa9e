# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/keys.py: certificates as a TLS peer shows them (DER) and as they lie in files (PEM).

An input is a form u8 (0: DER, else PEM) and the bytes.
"""

import json
import random
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from unittest.mock import patch

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from replicator import keys
from tests.fuzz.judge import SLACK_BYTES, must, only
from tests.fuzz.mutation import resize

MAX_BYTES = 4096
WORDS = (
    b"dpvs-probe:node:", b"\x55\x1d\x11", b"\x55\x1d\x13", b"\x55\x04\x03", b"\x30\x82", b"\x06\x03", b"\x17\x0d",
    b"\x18\x0f", b"\x2a\x86\x48\xce\x3d\x02\x01", b"-----BEGIN CERTIFICATE-----\n", b"-----END CERTIFICATE-----\n",
)  # fmt: skip
NOW = datetime(2026, 1, 1, tzinfo=UTC)
DER, PEM = 0, 1


@cache
def _files() -> dict[str, bytes]:
    """An authority and a node, but for their signatures the same ones each time."""
    numbers = iter(range(1, 9))
    with (
        tempfile.TemporaryDirectory() as directory,
        patch.object(ec, "generate_private_key", lambda curve: ec.derive_private_key(next(numbers) << 200, curve)),
        patch.object(x509, "random_serial_number", lambda: next(numbers) << 100),
    ):
        authority, out = Path(directory) / "authority", Path(directory) / "node"
        keys.init_authority(authority, "east", now=NOW)
        keys.issue(authority, "lb-1", out, addresses=("10.0.0.1", "fd00::1", "lb1.example.org"), now=NOW)
        return {path.name: path.read_bytes() for path in out.iterdir()}


def seeds() -> Iterable[bytes]:
    files = _files()
    for name in (keys.NODE_CERTIFICATE, keys.CA_CERTIFICATE):
        yield bytes([DER]) + x509.load_pem_x509_certificate(files[name]).public_bytes(Encoding.DER)
    yield bytes([PEM]) + files[keys.CA_CERTIFICATE] + files[keys.NODE_CERTIFICATE]
    yield bytes([PEM]) + files[keys.NODE_KEY]


def bound(data: bytes) -> int:
    return 4 * SLACK_BYTES + 64 * len(data)  # names, extensions and texts, several times over


def check(data: bytes) -> None:
    if not data:
        return
    form, text = data[0], data[1:]
    if form == DER:
        node = keys.node_of_der(text)  # raises nothing
        must(node is None or (node.isascii() and node.isprintable() and 0 < len(node) <= 64), "a name, or none")
        if node is None:
            return
        text = x509.load_der_x509_certificate(text).public_bytes(Encoding.PEM)
    with only(keys.KeysError):
        found = keys.parse_certificates(text, "node.crt")
        must(0 < len(found) <= keys.MAX_AUTHORITIES, "one certificate at least, and not too many")
        for certificate in found:
            look(certificate)


def look(certificate: x509.Certificate) -> None:
    """All that is done with a certificate."""
    with only(keys.KeysError):
        said = keys.describe(certificate)
        must(json.dumps(said.as_dict(NOW)), "a description can be sent")
        must(said.name.isprintable() and said.issuer.isprintable(), "names can be printed")
        must(all(text.isprintable() for text in said.addresses), "addresses can be printed")
        must(said.node == keys.node_of(certificate), "one name")
        for days in (0, 700, 20_000):
            warning = keys.expiry_warning(certificate, NOW + timedelta(days=days))
            must(warning is None or len(warning.splitlines()) == 1, "a warning is one line")
    authority = x509.load_pem_x509_certificate(_files()[keys.CA_CERTIFICATE])
    must(keys._signed(certificate, authority) in (True, False), "signed or not")


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    """Half of the time one value of the DER tree is changed, and the lengths around it are made to fit."""
    rng = random.Random(seed)
    if not data or data[0] != DER or rng.random() < 0.5:
        return resize(data, longest)
    try:
        return (data[:1] + _mutate_der(data[1:], rng))[:longest]
    except (IndexError, ValueError):
        return resize(data, longest)


def _mutate_der(data: bytes, rng: random.Random) -> bytes:
    tag, value, rest = _read(data)
    if tag & 0x20 and value and rng.random() < 0.95:
        items = _items(value)
        at = rng.randrange(len(items))
        what = rng.random()
        if what < 0.04:
            del items[at]
        elif what < 0.08:
            items.insert(at, items[rng.randrange(len(items))])
        else:
            items[at] = _mutate_der(items[at], rng)
        value = b"".join(items)
    elif tag == 0x04 and value[:1] == b"\x30" and rng.random() < 0.9:  # what an extension holds
        value = _mutate_der(value, rng)
    else:
        value = resize(value, len(value) + 40)
        if rng.random() < 0.1:
            tag = rng.randrange(256)
    return _write(tag, value) + rest


def _read(data: bytes) -> tuple[int, bytes, bytes]:
    tag, length, at = data[0], data[1], 2
    if length & 0x80:
        size = length & 0x7F
        length, at = int.from_bytes(data[2 : 2 + size]), 2 + size
    if at + length > len(data):
        raise ValueError("cut")
    return tag, data[at : at + length], data[at + length :]


def _items(value: bytes) -> list[bytes]:
    found = []
    while value:
        _, _, rest = _read(value)
        found.append(value[: len(value) - len(rest)])
        value = rest
    return found


def _write(tag: int, value: bytes) -> bytes:
    if len(value) < 0x80:
        return bytes([tag, len(value)]) + value
    length = len(value).to_bytes((len(value).bit_length() + 7) // 8)
    return bytes([tag, 0x80 | len(length)]) + length + value
