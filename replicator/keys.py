# SPDX-License-Identifier: GPL-2.0-or-later
"""The authority of a cluster, and the certificates by which its nodes know each other.

Rules: an authority is a P-256 key and its self-signed certificate; whoever holds a certificate that it signed is a
node of the cluster, under the name that the certificate carries as the URI ``dpvs-probe:node:NAME``. P-256 because
OpenSSL 3.0 signs and verifies with it at twice the speed of Ed25519, and every TLS stack takes it. A node's directory
holds ``ca.crt`` (one authority, or several while one replaces another), ``node.crt`` and ``node.key``; what those
files must be is said in ``keyfiles.py``.
"""

import ipaddress
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .keyfiles import MAX_FILE_BYTES, BadKeys, KeyExposed, KeysError, KeysExist, KeysMissing, read_file, write_files

__all__ = ["BadKeys", "KeyExposed", "KeysError", "KeysExist", "KeysMissing"]

AUTHORITY_DIRECTORY = "/etc/dpvs-probe/authority"
KEYS_DIRECTORY = "/etc/dpvs-probe/keys"
AUTHORITY_DAYS = 3652
NODE_DAYS = 730
MAX_DAYS = 36525
CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
NODE_CERTIFICATE, NODE_KEY = "node.crt", "node.key"
MAX_AUTHORITIES = 16
MAX_ADDRESSES = 64
WARN_BEFORE = timedelta(days=30)
NODE_URI = "dpvs-probe:node:"

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9_])?")
_HOST = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
# All that the library raises about a certificate that is not as it should be.
_MALFORMED = (
    ValueError, TypeError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType,
    UnsupportedAlgorithm, InvalidSignature,
)  # fmt: skip
_BACKDATED = timedelta(hours=1)  # clocks of two nodes need not agree to the second


class BadName(KeysError):
    """A name or address that no certificate of ours can carry."""

    help_text = "Names are 1 to 64 letters, digits, '.', '_' and '-', and begin with a letter or digit."


class KeyMismatch(KeysError):
    """Key and certificate do not belong together."""


class NotSigned(KeysError):
    """A certificate that none of the authorities has signed."""

    help_text = "Copy ca.crt, node.crt and node.key together, out of one directory made by `dpvs-probe keys issue`."


class Expired(KeysError):
    """A certificate whose time is over."""

    help_text = "Issue a new one with `dpvs-probe keys issue NODE --force` and copy it to the node."


class NotYetValid(KeysError):
    """A certificate whose time has not come."""

    help_text = "Check the clock of this machine, and of the one that issued the certificate."


class Description(NamedTuple):
    """What a certificate says."""

    name: str
    node: str | None  # None: no node of a cluster
    authority: bool
    issuer: str
    serial: str
    not_before: datetime
    not_after: datetime
    addresses: tuple[str, ...]
    key: str
    fingerprint: str  # SHA-256

    def as_dict(self, now: datetime) -> dict[str, Any]:
        """For JSON; times as text, and the days that are left."""
        return {
            **self._asdict(),
            "not_before": self.not_before.isoformat(),
            "not_after": self.not_after.isoformat(),
            "addresses": list(self.addresses),
            "days_left": (self.not_after - now).days,
        }


@dataclass(frozen=True)
class Identity:
    """Who we are and whom we trust, proven to fit together. The bytes are what was checked, read once."""

    node: str
    directory: Path
    certificate: x509.Certificate
    authorities: tuple[x509.Certificate, ...]
    certificate_pem: bytes = field(repr=False)
    authorities_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)

    def warnings(self, now: datetime | None = None) -> list[str]:
        """What will soon end, one line each."""
        told = [expiry_warning(certificate, now) for certificate in (self.certificate, *self.authorities)]
        return [text for text in told if text]


class Issued(NamedTuple):
    """What ``init_authority`` and ``issue`` made."""

    directory: Path
    description: Description


def init_authority(
    directory: str | Path,
    name: str,
    *,
    days: int = AUTHORITY_DAYS,
    force: bool = False,
    now: datetime | None = None,
) -> Issued:
    """Make a new authority in ``directory``: ca.crt and ca.key. Raises KeysError."""
    if not _NAME.fullmatch(name):
        raise BadName(f"'{name}' cannot be the name of an authority")
    where, now = Path(directory), now or _now()
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _common_name(name)
    usage = {"key_cert_sign": True, "crl_sign": True}
    certificate = (
        _builder(subject, subject, key, now - _BACKDATED, now + _days(days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(**usage), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = {CA_KEY: _key_pem(key), CA_CERTIFICATE: _pem(certificate)}
    write_files(where, files, force=force)
    return Issued(where, describe(certificate))


def issue(
    directory: str | Path,
    node: str,
    out: str | Path | None = None,
    *,
    days: int = NODE_DAYS,
    addresses: Iterable[str] = (),
    force: bool = False,
    now: datetime | None = None,
) -> Issued:
    """Make keys for ``node``, signed by the authority in ``directory``: ca.crt, node.crt and node.key in ``out``
    (``directory``/nodes/``node`` if not given). Raises KeysError.

    ``addresses``: host names and IP addresses to put in as well. Nothing of ours looks at them.
    """
    if not _NAME.fullmatch(node):
        raise BadName(f"'{node}' cannot be the name of a node in a certificate")
    where, now = Path(directory), now or _now()
    out = Path(out) if out is not None else where / "nodes" / node
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(NODE_URI + node)]
    names += [_general_name(address) for address in addresses]
    if len(names) > MAX_ADDRESSES + 1:
        raise BadName(f"{len(names) - 1} addresses in one certificate", help_text=f"{MAX_ADDRESSES} at most.")
    authority, authority_key, bundle = _load_authority(where, now)
    key = ec.generate_private_key(ec.SECP256R1())
    begin = max(now - _BACKDATED, authority.not_valid_before_utc)
    end = min(now + _days(days), authority.not_valid_after_utc)
    signer = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(_common_name(node), authority.subject, key, begin, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signer), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    files = {NODE_KEY: _key_pem(key), NODE_CERTIFICATE: _pem(certificate), CA_CERTIFICATE: bundle}
    write_files(out, files, force=force)
    return Issued(out, describe(certificate))


def load_identity(directory: str | Path = KEYS_DIRECTORY, *, now: datetime | None = None) -> Identity:
    """What a node's directory holds, once all of it is found to fit and to be valid. Raises KeysError."""
    where, now = Path(directory), now or _now()
    bundle = read_file(where / CA_CERTIFICATE)
    authorities = _authorities(bundle, where / CA_CERTIFICATE)
    certificate_pem = read_file(where / NODE_CERTIFICATE)
    certificate = parse_certificates(certificate_pem, where / NODE_CERTIFICATE)[0]
    key_pem = read_file(where / NODE_KEY, secret=True)
    key = _parse_key(key_pem, where / NODE_KEY)
    _must_match(key, certificate, where / NODE_KEY, where / NODE_CERTIFICATE)
    node = node_of(certificate)
    if node is None:
        raise BadKeys(f"{where / NODE_CERTIFICATE} names no node", help_text="Make it with `dpvs-probe keys issue`.")
    signers = [authority for authority in authorities if _signed(certificate, authority)]
    if not signers:
        raise NotSigned(f"{where / NODE_CERTIFICATE} is not signed by an authority in {where / CA_CERTIFICATE}")
    _must_be_valid(certificate, where / NODE_CERTIFICATE, now)
    for signer in signers:
        _must_be_valid(signer, where / CA_CERTIFICATE, now)
    return Identity(node, where, certificate, authorities, certificate_pem, bundle, key_pem)


def node_of(certificate: x509.Certificate) -> str | None:
    """The name of the node that a certificate is for; None if it is for none, or for more than one."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, *_MALFORMED):
        return None
    found = [uri.removeprefix(NODE_URI) for uri in uris if uri.startswith(NODE_URI)]
    return found[0] if len(found) == 1 and _NAME.fullmatch(found[0]) else None


def describe(certificate: x509.Certificate) -> Description:
    """What a certificate says; raises BadKeys where it says it badly."""
    try:
        extensions = certificate.extensions
        addresses: list[str] = []
        with suppress(x509.ExtensionNotFound):
            names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            addresses += map(_printable, names.get_values_for_type(x509.DNSName))
            addresses += map(str, names.get_values_for_type(x509.IPAddress))
        authority = False
        with suppress(x509.ExtensionNotFound):
            authority = extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        return Description(
            name=_name_text(certificate.subject),
            node=node_of(certificate),
            authority=authority,
            issuer=_name_text(certificate.issuer),
            serial=f"{certificate.serial_number:x}",
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            addresses=tuple(addresses),
            key=_key_text(certificate),
            fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
        )
    except _MALFORMED as error:
        raise BadKeys(f"a certificate that makes no sense: {_words(error)}") from error


def expiry_warning(certificate: x509.Certificate, now: datetime | None = None) -> str | None:
    """One line if a certificate has ended or will soon: within 30 days, or within the last third of a shorter life."""
    now = now or _now()
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    what = f"the certificate of {_name_text(certificate.subject)}"
    if now > end:
        return f"{what} has expired ({_day(end)})"
    left = end - now
    if left > min(WARN_BEFORE, (end - begin) / 3):
        return None
    days = left.days
    return f"{what} expires in {days} days ({_day(end)})" if days > 1 else f"{what} expires at {_minute(end)}"


def read_certificates(path: str | Path) -> list[x509.Certificate]:
    """The certificates in a PEM file, in its order, at least one. Raises KeysMissing, BadKeys."""
    return parse_certificates(read_file(Path(path), trusted=False), path)


def parse_certificates(pem: bytes, source: str | Path) -> list[x509.Certificate]:
    """The certificates in PEM text, in its order, at least one. Raises BadKeys."""
    if len(pem) > MAX_FILE_BYTES:
        raise BadKeys(f"{source} is too long for what it should hold")
    try:
        certificates = x509.load_pem_x509_certificates(pem)
    except _MALFORMED as error:
        raise BadKeys(f"{source} holds no certificate: {_words(error)}") from error
    if len(certificates) > MAX_AUTHORITIES:
        raise BadKeys(f"{source} holds {len(certificates)} certificates", help_text=f"{MAX_AUTHORITIES} at most.")
    return certificates


def node_of_der(der: bytes) -> str | None:
    """``node_of`` of a certificate as a TLS peer showed it; None for anything that is no certificate."""
    try:
        return node_of(x509.load_der_x509_certificate(der))
    except _MALFORMED:
        return None


# --- making ----------------------------------------------------------------------------------------------------------


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, begin: datetime, end: datetime
) -> x509.CertificateBuilder:
    if end <= begin:
        raise Expired("the authority's own certificate has expired", help_text="Make a new one with `keys init`.")
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _key_usage(**wanted: bool) -> x509.KeyUsage:
    kinds = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{kind: wanted.get(kind, False) for kind in kinds})


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        if len(address) > 253 or not _HOST.fullmatch(address) or re.fullmatch(r"[0-9.]+", address):
            help_text = "Give host names and IP addresses, without ports."
            raise BadName(f"'{address}' is neither a host name nor an address", help_text=help_text) from None
        return x509.DNSName(address)


def _days(days: int) -> timedelta:
    if not 1 <= days <= MAX_DAYS:
        raise BadName(f"a certificate for {days} days", help_text=f"Give 1 to {MAX_DAYS} days.")
    return timedelta(days=days)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


# --- reading ---------------------------------------------------------------------------------------------------------


def _load_authority(directory: Path, now: datetime) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey, bytes]:
    bundle = read_file(directory / CA_CERTIFICATE)
    key_path = directory / CA_KEY
    key = _parse_key(read_file(key_path, secret=True), key_path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadKeys(f"{key_path} is not a key on an elliptic curve")
    for authority in _authorities(bundle, directory / CA_CERTIFICATE):
        if authority.public_key() == key.public_key():
            _must_be_valid(authority, directory / CA_CERTIFICATE, now)
            return authority, key, bundle
    raise KeyMismatch(f"{key_path} is not the key of a certificate in {directory / CA_CERTIFICATE}")


def _authorities(pem: bytes, path: Path) -> tuple[x509.Certificate, ...]:
    certificates = parse_certificates(pem, path)
    for certificate in certificates:
        if not describe(certificate).authority:
            raise BadKeys(f"{path}: {_name_text(certificate.subject)} is not an authority")
    return tuple(certificates)


def _parse_key(pem: bytes, path: Path) -> Any:
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except TypeError as error:
        help_text = "A node starts unattended: store the key without a passphrase, for its owner only."
        raise BadKeys(f"the key {path} is locked with a passphrase", help_text=help_text) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadKeys(f"{path} holds no private key: {_words(error)}") from error


def _must_match(key: Any, certificate: x509.Certificate, key_path: Path, certificate_path: Path) -> None:
    try:
        same = key.public_key() == certificate.public_key()
    except _MALFORMED as error:
        raise BadKeys(f"{certificate_path}: {_words(error)}") from error
    if not same:
        raise KeyMismatch(f"{key_path} is not the key of {certificate_path}")


def _signed(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except _MALFORMED:
        return False
    return True


def _must_be_valid(certificate: x509.Certificate, path: Path, now: datetime) -> None:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise Expired(f"{path}: the certificate of {_name_text(certificate.subject)} expired on {_day(end)}")
    if now < begin:
        raise NotYetValid(f"{path}: the certificate of {_name_text(certificate.subject)} begins at {_minute(begin)}")


def _name_text(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return _printable(str(found[0].value) if found else name.rfc4514_string())


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _key_text(certificate: x509.Certificate) -> str:
    key = certificate.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"EC {key.curve.name}"
    return type(key).__name__.removesuffix("PublicKey").lstrip("_")


def _now() -> datetime:
    return datetime.now(UTC)


def _day(when: datetime) -> str:
    return f"{when:%Y-%m-%d}"


def _minute(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M} UTC"


def _words(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:100].rstrip(". ") or type(error).__name__
